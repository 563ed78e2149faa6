//! Sessions and contexts: a plan loaded once, run many times.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;

use planfile::plan::{Plan, PlanEntry};
use planfile::reader::PlanFile;
use planfile::{Buffer, Tensor};
use rayon::ThreadPoolBuilder;

use crate::error::RuntimeError;
use crate::memory::allocate;
use crate::signature::arrange;
use crate::virtual_devices::{DeviceMemory, Observer, StepTime, run_entry};

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
    devices: Vec<DeviceMemory>,
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

    /// Reserves the activation arenas of all ranks, for any of the entries. Ranks share the machine's cores evenly.
    ///
    /// # Errors
    /// [`RuntimeError::Memory`], [`RuntimeError::Threads`].
    pub fn context(&self) -> Result<Context, RuntimeError> {
        self.context_with_threads(self.default_threads())
    }

    /// The machine's cores over the ranks, at least one.
    pub fn default_threads(&self) -> NonZero<usize> {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        NonZero::new(cores / self.plan().manifest.ranks.max(1) as usize).unwrap_or(NonZero::<usize>::MIN)
    }

    /// As [`Self::context`], with a number of threads for each virtual device. It has no influence on results.
    ///
    /// # Errors
    /// As [`Self::context`].
    pub fn context_with_threads(&self, threads: NonZero<usize>) -> Result<Context, RuntimeError> {
        let plan = self.plan();
        let devices = (0..plan.manifest.ranks)
            .map(|rank| {
                let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
                let bytes = programs.map(|program| program.arena_bytes).max().unwrap_or(0);
                let arena = allocate(bytes, || format!("the activation arena of rank {rank}"))?;
                let pool = ThreadPoolBuilder::new().num_threads(threads.get());
                let pool = pool.thread_name(move |thread| format!("rank {rank} thread {thread}"));
                let pool = pool.build().map_err(|source| RuntimeError::Threads { rank, source })?;
                Ok(DeviceMemory { arena, pool })
            })
            .collect::<Result<_, RuntimeError>>()?;
        Ok(Context { session: self.clone(), devices })
    }
}

impl Context {
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Threads that share the work of each virtual device's steps.
    pub fn threads_per_device(&self) -> usize {
        self.devices.first().map_or(1, |device| device.pool.current_num_threads())
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
        self.execute(entry, inputs, None)
    }

    /// As [`Self::run`]; `observe` is told by all ranks' threads how long each step took.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_observed(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
        observe: &(dyn Fn(StepTime) + Sync),
    ) -> Result<Vec<(String, Tensor)>, RuntimeError> {
        self.execute(entry, inputs, Some(observe))
    }

    fn execute(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
        observe: Observer<'_>,
    ) -> Result<Vec<(String, Tensor)>, RuntimeError> {
        let Loaded { plan, weights } = &*self.session.loaded;
        let entry = self.session.entry(entry)?;
        let inputs = arrange(entry, inputs)?;
        let outputs = run_entry(plan, entry, &inputs, &mut self.devices, weights, observe)?;
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
