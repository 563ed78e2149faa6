//! Sessions and contexts: a plan loaded once, run many times.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use planfile::plan::{Plan, PlanEntry};
use planfile::reader::PlanFile;
use planfile::{Buffer, Tensor};

use crate::error::RuntimeError;
use crate::memory::allocate;
use crate::signature::arrange;
use crate::virtual_devices::run_entry;

/// What a plan's ranks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Devices {
    /// One thread per rank on the CPU. They execute what kernels are said to compute, whatever target a plan was
    /// compiled for.
    #[default]
    Virtual,
}

/// A loaded plan: what it says, and the weight arenas of its ranks. Cheap to clone.
#[derive(Clone)]
pub struct Session {
    loaded: Arc<Loaded>,
}

struct Loaded {
    plan: Plan,
    /// By rank.
    weights: Vec<Buffer>,
}

/// Activation arenas over a session's weights: as many runs at the same time as there are contexts.
pub struct Context {
    session: Session,
    /// By rank.
    arenas: Vec<Buffer>,
}

impl Session {
    /// Opens, verifies and loads the plan at `path`.
    ///
    /// # Errors
    /// [`RuntimeError::Plan`] for a file that is no plan, damaged or not readable, [`RuntimeError::Memory`].
    pub fn load(path: &Path, devices: Devices) -> Result<Self, RuntimeError> {
        Self::load_file(PlanFile::open(path)?, devices, |_| {})
    }

    /// Loads an open plan. `progress` is told, now and then, how many bytes of weight arenas are in place.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_file(file: PlanFile, devices: Devices, progress: impl FnMut(u64)) -> Result<Self, RuntimeError> {
        let Devices::Virtual = devices;
        let weights = weight_arenas(&file, progress)?;
        Ok(Self { loaded: Arc::new(Loaded { plan: file.into_plan(), weights }) })
    }

    /// What the plan says.
    pub fn plan(&self) -> &Plan {
        &self.loaded.plan
    }

    /// The ways into the model, with the names and types of their inputs and outputs.
    pub fn entries(&self) -> &[PlanEntry] {
        &self.loaded.plan.manifest.entries
    }

    /// The named entry.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownEntry`], which lists those there are.
    pub fn entry(&self, name: &str) -> Result<&PlanEntry, RuntimeError> {
        let known = || self.entries().iter().map(|entry| format!("`{}`", entry.name)).collect();
        let found = self.entries().iter().find(|entry| entry.name == name);
        found.ok_or_else(|| RuntimeError::UnknownEntry { name: name.to_owned(), known: known() })
    }

    /// Reserves the activation arenas of all ranks, for any of the entries.
    ///
    /// # Errors
    /// [`RuntimeError::Memory`].
    pub fn context(&self) -> Result<Context, RuntimeError> {
        let plan = self.plan();
        let arenas = (0..plan.manifest.ranks)
            .map(|rank| {
                let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
                let bytes = programs.map(|program| program.arena_bytes).max().unwrap_or(0);
                allocate(bytes, || format!("the activation arena of rank {rank}"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Context { session: self.clone(), arenas })
    }
}

impl Context {
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Runs an entry on whole tensors by name; whole outputs in the order of the entry. The same inputs give the same
    /// bytes.
    ///
    /// # Errors
    /// An unknown entry, inputs that do not fit its signature, or [`RuntimeError::Step`].
    pub fn run(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
    ) -> Result<Vec<(String, Tensor)>, RuntimeError> {
        let Loaded { plan, weights } = &*self.session.loaded;
        let entry = self.session.entry(entry)?;
        let inputs = arrange(entry, inputs)?;
        let outputs = run_entry(plan, entry, &inputs, &mut self.arenas, weights)?;
        Ok(entry.outputs.iter().map(|port| port.name.clone()).zip(outputs).collect())
    }
}

/// Copies each rank's weights to their places.
fn weight_arenas(file: &PlanFile, mut progress: impl FnMut(u64)) -> Result<Vec<Buffer>, RuntimeError> {
    let manifest = &file.plan().manifest;
    if manifest.weight_arena_bytes.len() != manifest.ranks as usize {
        let what = format!("{} weight arenas for {} ranks", manifest.weight_arena_bytes.len(), manifest.ranks);
        return Err(RuntimeError::Contradiction { what });
    }
    let mut arenas = Vec::new();
    for (rank, &bytes) in manifest.weight_arena_bytes.iter().enumerate() {
        arenas.push(allocate(bytes, || format!("the weight arena of rank {rank}"))?);
    }
    let mut done = 0;
    for placed in &manifest.placed {
        let outside = || {
            let weight = manifest.weights.get(placed.weight as usize);
            let name = weight.map_or("?", |weight| weight.name.as_str());
            RuntimeError::Contradiction { what: format!("weight `{name}` is placed outside of a rank's arena") }
        };
        let len = placed.ty.bytes().and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(outside)?;
        let first = usize::try_from(placed.arena_offset).map_err(|_| outside())?;
        let end = first.checked_add(len).ok_or_else(outside)?;
        for (&rank, &image) in placed.ranks.iter().zip(&placed.images) {
            let arena = arenas.get_mut(rank as usize).ok_or_else(outside)?;
            file.read_weights(image, arena.bytes_mut().get_mut(first..end).ok_or_else(outside)?)?;
            done += len as u64;
            progress(done);
        }
    }
    Ok(arenas)
}

#[cfg(test)]
mod tests;
