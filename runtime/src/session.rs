//! Sessions and contexts: a plan loaded once, run many times.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZero;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use planfile::plan::{Plan, PlanEntry};
use planfile::reader::PlanFile;
use planfile::{Buffer, Tensor};
use rayon::ThreadPoolBuilder;

use crate::error::RuntimeError;
use crate::gpus::{CudaContext, CudaSession, DeviceMemoryReport, OtherVersion, StepDuration, StepRecord, Told};
use crate::memory::allocate;
use crate::signature::arrange;
use crate::virtual_devices::{DeviceMemory, Observer, StepTime, run_entry};

/// Most threads of all virtual devices together. Far more than any machine has cores for, and few enough to start.
pub(crate) const MAX_THREADS: usize = 4096;

/// What a plan's ranks are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Devices {
    /// One thread per rank on the CPU. They execute what kernels are said to compute, whatever target a plan was
    /// compiled for.
    #[default]
    Virtual,
    /// One GPU per rank, by the numbers that CUDA gives them; `None` takes the first ones.
    Cuda { ordinals: Option<Vec<u32>> },
}

impl Devices {
    /// What a plan was compiled for.
    pub fn of(plan: &Plan) -> Self {
        match plan.manifest.target.architecture.as_str() {
            "cpu" => Self::Virtual,
            _ => Self::Cuda { ordinals: None },
        }
    }
}

impl FromStr for Devices {
    type Err = String;

    /// `cpu`, `cuda`, or `cuda:0,2` for GPUs by number.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Virtual),
            None if text == "cuda" => Ok(Self::Cuda { ordinals: None }),
            Some(("cuda", list)) => {
                let number = |text: &str| text.trim().parse().map_err(|_| format!("`{text}` is no number of a GPU"));
                Ok(Self::Cuda { ordinals: Some(list.split(',').map(number).collect::<Result<_, _>>()?) })
            }
            _ => Err(format!("`{text}` is none of `cpu`, `cuda` and `cuda:0,1,…`")),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Virtual => f.write_str("cpu"),
            Self::Cuda { ordinals: None } => f.write_str("cuda"),
            Self::Cuda { ordinals: Some(ordinals) } => {
                let ordinals: Vec<String> = ordinals.iter().map(u32::to_string).collect();
                write!(f, "cuda:{}", ordinals.join(","))
            }
        }
    }
}

/// A loaded plan: what it says, and the weight arenas of its ranks. Cheap to clone.
#[derive(Clone)]
pub struct Session {
    loaded: Arc<Loaded>,
}

struct Loaded {
    plan: Arc<Plan>,
    memory: Memory,
}

/// Where the ranks' weights are.
enum Memory {
    /// By rank.
    Virtual(Vec<Buffer>),
    Cuda(Arc<CudaSession>),
}

/// Activation arenas over a session's weights: as many runs at the same time as there are contexts. On several GPUs,
/// where collectives of two contexts could wait for each other, a run waits until those of the session's other contexts
/// are over; two sessions that exchange over the same GPUs must not run at the same time.
pub struct Context {
    session: Session,
    ranks: Ranks,
}

/// What a context has for its ranks.
enum Ranks {
    /// By rank.
    Virtual(Vec<DeviceMemory>),
    Cuda(CudaContext),
}

impl Session {
    /// Opens, verifies and loads the plan at `path`.
    ///
    /// # Errors
    /// [`RuntimeError::Plan`] for a file that is no plan, damaged or not readable, [`RuntimeError::Memory`]. On GPUs also
    /// whatever of driver, libraries, GPUs and their memory does not do for the plan.
    pub fn load(path: &Path, devices: Devices) -> Result<Self, RuntimeError> {
        Self::load_file(PlanFile::open(path)?, devices, |_| {})
    }

    /// Loads an open plan. `progress` is told, now and then, how many bytes of weight arenas are in place.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_file(file: PlanFile, devices: Devices, progress: impl FnMut(u64)) -> Result<Self, RuntimeError> {
        Self::load_with(file, devices, false, progress)
    }

    /// As [`Self::load_file`]; libraries of other versions than the plan records are refused before weights are loaded.
    ///
    /// # Errors
    /// As [`Self::load_file`]; [`RuntimeError::OtherVersion`].
    pub fn load_file_strictly(
        file: PlanFile,
        devices: Devices,
        progress: impl FnMut(u64),
    ) -> Result<Self, RuntimeError> {
        Self::load_with(file, devices, true, progress)
    }

    fn load_with(
        file: PlanFile,
        devices: Devices,
        strict: bool,
        progress: impl FnMut(u64),
    ) -> Result<Self, RuntimeError> {
        let memory = match devices {
            Devices::Virtual => Memory::Virtual(weight_arenas(&file, progress)?),
            Devices::Cuda { ordinals } => {
                Memory::Cuda(Arc::new(CudaSession::load(&file, ordinals.as_deref(), strict, progress)?))
            }
        };
        Ok(Self { loaded: Arc::new(Loaded { plan: Arc::new(file.into_plan()), memory }) })
    }

    /// Libraries of other versions than the plan records. Their choices, and so times and last bits, may differ.
    pub fn other_versions(&self) -> &[OtherVersion] {
        match &self.loaded.memory {
            Memory::Virtual(_) => &[],
            Memory::Cuda(session) => session.other_versions(),
        }
    }

    /// Whether the ranks are GPUs.
    pub fn is_on_gpus(&self) -> bool {
        matches!(self.loaded.memory, Memory::Cuda(_))
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
    /// [`RuntimeError::Memory`], [`RuntimeError::Threads`], [`RuntimeError::TooManyThreads`].
    pub fn context(&self) -> Result<Context, RuntimeError> {
        self.context_with_threads(self.default_threads())
    }

    /// The machine's cores over the ranks, at least one.
    pub fn default_threads(&self) -> NonZero<usize> {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        NonZero::new(cores / self.plan().manifest.ranks.max(1) as usize).unwrap_or(NonZero::<usize>::MIN)
    }

    /// As [`Self::context`], with a number of threads for each virtual device. It has no influence on results, nor on
    /// GPUs.
    ///
    /// # Errors
    /// As [`Self::context`].
    pub fn context_with_threads(&self, threads: NonZero<usize>) -> Result<Context, RuntimeError> {
        let plan = self.plan();
        if let Memory::Cuda(session) = &self.loaded.memory {
            let ranks = Ranks::Cuda(CudaContext::new(Arc::clone(&self.loaded.plan), session)?);
            return Ok(Context { session: self.clone(), ranks });
        }
        let ranks = plan.manifest.ranks;
        if (ranks as usize).saturating_mul(threads.get()) > MAX_THREADS {
            return Err(RuntimeError::TooManyThreads { ranks, threads: threads.get(), limit: MAX_THREADS });
        }
        let devices = (0..ranks)
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
        Ok(Context { session: self.clone(), ranks: Ranks::Virtual(devices) })
    }

    fn entry_number(&self, name: &str) -> Result<usize, RuntimeError> {
        let entry = self.entry(name)?;
        Ok(self.entries().iter().position(|other| std::ptr::eq(other, entry)).unwrap_or(0))
    }
}

impl Context {
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Threads that share the work of each virtual device's steps; 1 on GPUs.
    pub fn threads_per_device(&self) -> usize {
        match &self.ranks {
            Ranks::Virtual(devices) => devices.first().map_or(1, |device| device.pool.current_num_threads()),
            Ranks::Cuda(_) => 1,
        }
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

    /// As [`Self::run`]; `observe` is told how long each step took, on virtual devices by all ranks' threads. On GPUs,
    /// steps are called and waited for one by one: [`Self::time_steps`] is nearer to what they take in a graph. `observe`
    /// must not run another context of the session.
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
        let Loaded { plan, memory } = &*self.session.loaded;
        let number = self.session.entry_number(entry)?;
        let entry = self.session.entry(entry)?;
        let inputs = arrange(entry, inputs)?;
        let outputs = match (&mut self.ranks, memory) {
            (Ranks::Virtual(devices), Memory::Virtual(weights)) => {
                run_entry(plan, entry, &inputs, devices, weights, observe)?
            }
            (Ranks::Cuda(context), _) => match observe {
                None => context.run(number, &inputs)?,
                Some(observe) => context.run_told(number, &inputs, false, &mut |told| {
                    if let Told::Time(StepDuration { rank, program, step, us }) = told {
                        observe(StepTime { rank, program, step, duration: Duration::from_secs_f64(us * 1e-6) });
                    }
                })?,
            },
            (Ranks::Virtual(_), Memory::Cuda(_)) => return Err(RuntimeError::Broken),
        };
        Ok(named(entry, outputs))
    }

    /// Runs an entry on GPUs step by step; `observe` gets each rank's steps with the tensors that they read and wrote.
    /// Steps of different ranks come in any order, those of one rank in the plan's. `observe` must not run another context
    /// of the session.
    ///
    /// # Errors
    /// As [`Self::run`]; [`RuntimeError::OnlyOnGpus`].
    pub fn run_recorded(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
        observe: &mut dyn FnMut(StepRecord),
    ) -> Result<Vec<(String, Tensor)>, RuntimeError> {
        let session = self.session.clone();
        let (context, number, entry, inputs) = self.on_gpus(&session, "a record of each step", entry, inputs)?;
        let outputs = context.run_told(number, &inputs, true, &mut |told| {
            if let Told::Record(record) = told {
                observe(record);
            }
        })?;
        Ok(named(entry, outputs))
    }

    /// Microseconds of each of `runs` runs of the entry's CUDA graph, by events, inputs on the GPUs: of the rank that
    /// takes longest.
    ///
    /// # Errors
    /// As [`Self::run`]; [`RuntimeError::OnlyOnGpus`].
    pub fn time_graph(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
        runs: u32,
    ) -> Result<Vec<f64>, RuntimeError> {
        let session = self.session.clone();
        let (context, number, _, inputs) = self.on_gpus(&session, "timing a graph", entry, inputs)?;
        context.time(number, &inputs, runs)
    }

    /// What each rank takes of its GPU's memory now, beside what the plan predicts, by rank.
    ///
    /// # Errors
    /// [`RuntimeError::OnlyOnGpus`], or what the driver says.
    pub fn device_memory(&mut self) -> Result<Vec<DeviceMemoryReport>, RuntimeError> {
        match &mut self.ranks {
            Ranks::Cuda(context) => context.device_memory(),
            Ranks::Virtual(_) => Err(RuntimeError::OnlyOnGpus { what: "memory as the driver counts it" }),
        }
    }

    /// How long each step takes on each rank, alone: `repeats` times in a CUDA graph, the median of `samples` graphs.
    ///
    /// # Errors
    /// As [`Self::run`]; [`RuntimeError::OnlyOnGpus`].
    pub fn time_steps(
        &mut self,
        entry: &str,
        inputs: &BTreeMap<String, Tensor>,
        repeats: u32,
        samples: u32,
    ) -> Result<Vec<StepDuration>, RuntimeError> {
        let session = self.session.clone();
        let (context, number, _, inputs) = self.on_gpus(&session, "timing steps alone", entry, inputs)?;
        context.time_steps(number, &inputs, (repeats, samples))
    }

    fn on_gpus<'a>(
        &'a mut self,
        session: &'a Session,
        what: &'static str,
        entry: &str,
        inputs: &'a BTreeMap<String, Tensor>,
    ) -> Result<(&'a mut CudaContext, usize, &'a PlanEntry, Vec<&'a Tensor>), RuntimeError> {
        let number = session.entry_number(entry)?;
        let entry = session.entry(entry)?;
        let inputs = arrange(entry, inputs)?;
        match &mut self.ranks {
            Ranks::Cuda(context) => Ok((context, number, entry, inputs)),
            Ranks::Virtual(_) => Err(RuntimeError::OnlyOnGpus { what }),
        }
    }
}

fn named(entry: &PlanEntry, outputs: Vec<Tensor>) -> Vec<(String, Tensor)> {
    entry.outputs.iter().map(|port| port.name.clone()).zip(outputs).collect()
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
