//! A plan on GPUs: each rank's GPU, its weights and its machine code. Contexts share it.
#![expect(unsafe_code, reason = "copies weights to GPUs")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use planfile::plan::{Action, Implementation, Library, PlacedWeight, Plan};
use planfile::{Architecture, PlanFile};

use crate::error::{RuntimeError, StepError};
use cuda::CudaError;
use cuda::LibraryName;
use cuda::cublaslt::CublasLt;
use cuda::cudnn::Cudnn;
use cuda::driver::{DeviceMemory, Driver, Gpu, Module, Pinned, Stream};
use cuda::nccl::Nccl;

/// Bytes that are read at once, hashes checked, while those before are copied.
const CHUNK_BYTES: usize = 32 << 20;

/// A library of another version than the plan was made with: its choices, and so times and last bits, may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherVersion {
    pub library: LibraryName,
    /// What the plan was made with.
    pub recorded: String,
    /// What this machine has.
    pub found: String,
    /// The file it is in.
    pub path: String,
}

pub(crate) struct CudaSession {
    /// By rank, as all lists here.
    gpus: Vec<Arc<Gpu>>,
    weights: Vec<DeviceMemory>,
    /// By number of the plan's code.
    modules: Vec<BTreeMap<u32, Module>>,
    /// By kernel, the most dynamic shared memory of its launches.
    shared_bytes: Vec<u32>,
    other_versions: Vec<OtherVersion>,
    /// Free bytes by rank before anything was loaded.
    free_before: Vec<u64>,
    /// Held by the context whose ranks are at work, where two could wait for each other.
    turn: Mutex<()>,
    exchanges: bool,
}

impl CudaSession {
    /// Checks the machine against the plan, then loads weights and machine code. `ordinals` are by rank; `None` takes
    /// the first GPUs, and `strict` refuses libraries of other versions than the plan records. `progress` is told how many
    /// bytes of weight arenas are in place.
    pub(crate) fn load(
        file: &PlanFile,
        ordinals: Option<&[u32]>,
        strict: bool,
        progress: impl FnMut(u64),
    ) -> Result<Self, RuntimeError> {
        let plan = file.plan();
        let ordinals = choose(plan.manifest.ranks, ordinals, || Ok(Driver::ready()?.count()?))?;
        let architecture = plan.manifest.target.architecture.as_str();
        let device = architecture.parse::<Architecture>().ok().and_then(Architecture::cuda);
        let device = device.ok_or_else(|| RuntimeError::NotForGpus { architecture: architecture.to_owned() })?;
        let driver = Driver::ready()?;
        for &ordinal in &ordinals {
            let info = driver.describe(ordinal)?;
            if !device.runs_on(info.capability) {
                let (name, capability, architecture) = (info.name, info.capability, architecture.to_owned());
                return Err(RuntimeError::Architecture { ordinal, name, capability, architecture });
            }
        }
        let other_versions = open_libraries(plan)?;
        if let (true, Some(other)) = (strict, other_versions.first()) {
            let OtherVersion { library, recorded, found, .. } = other.clone();
            return Err(RuntimeError::OtherVersion { library, recorded, found });
        }
        let gpus = ordinals.iter().map(|&ordinal| Gpu::open(ordinal)).collect::<Result<Vec<_>, _>>()?;
        let check = |(rank, gpu): (u32, &Arc<Gpu>)| check_memory(plan, rank, gpu);
        let free_before = (0u32..).zip(&gpus).map(check).collect::<Result<Vec<_>, _>>()?;
        let mut modules = Vec::with_capacity(gpus.len());
        for (rank, gpu) in (0u32..).zip(&gpus) {
            let load = |number: u32| {
                let code = plan.code.get(number as usize).ok_or_else(|| RuntimeError::Contradiction {
                    what: format!("a kernel names machine code {number}, which is not there"),
                })?;
                let loaded = Module::load(gpu, &code.cubin).map_err(|source| RuntimeError::Rank { rank, source })?;
                Ok::<_, RuntimeError>((number, loaded))
            };
            modules.push(code_of(plan, rank).into_iter().map(load).collect::<Result<BTreeMap<_, _>, _>>()?);
        }
        let weights = load_weights(file, &gpus, progress)?;
        let (shared_bytes, exchanges) = (shared_bytes(plan), plan.manifest.ranks > 1 && exchanges(plan));
        let turn = Mutex::default();
        Ok(Self { shared_bytes, gpus, weights, modules, other_versions, free_before, turn, exchanges })
    }

    /// Waits until no other context's ranks are at work, if collectives of two could wait for each other.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        // Nothing is behind the lock that a panic could leave half done.
        self.exchanges.then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether ranks exchange anything.
    pub(super) fn exchanges(&self) -> bool {
        self.exchanges
    }

    pub(super) fn free_before(&self, rank: u32) -> u64 {
        self.free_before.get(rank as usize).copied().unwrap_or(0)
    }

    pub(crate) fn other_versions(&self) -> &[OtherVersion] {
        &self.other_versions
    }

    /// The GPUs by rank.
    pub(super) fn gpus(&self) -> &[Arc<Gpu>] {
        &self.gpus
    }

    pub(super) fn weights(&self, rank: u32) -> Result<&DeviceMemory, StepError> {
        let found = self.weights.get(rank as usize);
        found.ok_or_else(|| StepError::Contradiction { what: format!("rank {rank} has no weights") })
    }

    pub(super) fn module(&self, rank: u32, code: u32) -> Result<&Module, StepError> {
        let found = self.modules.get(rank as usize).and_then(|modules| modules.get(&code));
        found.ok_or_else(|| StepError::Contradiction { what: format!("machine code {code} is not in the plan") })
    }

    pub(super) fn shared_bytes(&self, kernel: u32) -> u32 {
        self.shared_bytes.get(kernel as usize).copied().unwrap_or(0)
    }
}

/// The GPUs that ranks run on: as many as there are ranks, none twice, all there.
fn choose(
    ranks: u32,
    given: Option<&[u32]>,
    count: impl FnOnce() -> Result<u32, RuntimeError>,
) -> Result<Vec<u32>, RuntimeError> {
    let ordinals: Vec<u32> = match given {
        Some(given) => given.to_vec(),
        None => (0..ranks).collect(),
    };
    let mut seen = BTreeSet::new();
    if let Some(&ordinal) = ordinals.iter().find(|&&ordinal| !seen.insert(ordinal)) {
        return Err(RuntimeError::SameGpu { ordinal });
    }
    if ordinals.len() != ranks as usize {
        return Err(RuntimeError::GpuCount { ranks, given: ordinals.len() });
    }
    let found = count()?;
    if found < ranks {
        return Err(RuntimeError::TooFewGpus { ranks, found });
    }
    match ordinals.iter().find(|&&ordinal| ordinal >= found) {
        Some(&ordinal) => Err(RuntimeError::NoSuchGpu { ordinal, found }),
        None => Ok(ordinals),
    }
}

/// Opens what the plan needs, and nothing else; libraries of other versions than it records.
fn open_libraries(plan: &Plan) -> Result<Vec<OtherVersion>, RuntimeError> {
    let mut others = Vec::new();
    for kernel in &plan.kernels {
        let Implementation::Library { library, version, .. } = &kernel.implementation else { continue };
        let (library, found) = match library {
            Library::CublasLt => {
                let library = CublasLt::get()?;
                (LibraryName::CublasLt, (library.version(), library.path()))
            }
            Library::Cudnn => {
                let library = Cudnn::ready()?;
                (LibraryName::Cudnn, (library.version(), library.path()))
            }
        };
        let (found, path) = (found.0, found.1.to_owned());
        let other = OtherVersion { library, recorded: version.clone(), found, path };
        if !version.is_empty() && other.recorded != other.found && !others.contains(&other) {
            others.push(other);
        }
    }
    if plan.manifest.ranks > 1 && exchanges(plan) {
        Nccl::ready()?;
    }
    Ok(others)
}

/// Whether any step is a collective.
fn exchanges(plan: &Plan) -> bool {
    let steps = plan.programs.iter().flat_map(|program| &program.steps);
    steps.into_iter().any(|step| matches!(step.action, Action::Collective { .. }))
}

/// Bytes of the largest activation arena that a rank needs.
pub(super) fn arena_bytes(plan: &Plan, rank: u32) -> u64 {
    let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
    programs.map(|program| program.arena_bytes).max().unwrap_or(0)
}

/// Weights and one context must fit into what is free; how much that is.
fn check_memory(plan: &Plan, rank: u32, gpu: &Gpu) -> Result<u64, RuntimeError> {
    let (free, total) = gpu.memory().map_err(|source| RuntimeError::Rank { rank, source })?;
    let weights = plan.manifest.weight_arena_bytes.get(rank as usize).copied().unwrap_or(0);
    let needed = weights.saturating_add(arena_bytes(plan, rank));
    if needed > free {
        return Err(RuntimeError::GpuMemory { rank, ordinal: gpu.info.ordinal, needed, free, total });
    }
    Ok(free)
}

/// Machine code that a rank's programs use.
fn code_of(plan: &Plan, rank: u32) -> BTreeSet<u32> {
    let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
    let launched = programs.flat_map(|program| &program.steps).filter_map(|step| match &step.action {
        Action::Launch { kernel, .. } => plan.kernels.get(*kernel as usize),
        Action::Library { .. } | Action::Collective { .. } | Action::Copy { .. } | Action::Persistent { .. } => None,
    });
    let code = launched.filter_map(|kernel| match &kernel.implementation {
        Implementation::Cuda { code, .. } => Some(*code),
        Implementation::Reference | Implementation::Library { .. } => None,
    });
    code.collect()
}

fn shared_bytes(plan: &Plan) -> Vec<u32> {
    let mut most = vec![0; plan.kernels.len()];
    for step in plan.programs.iter().flat_map(|program| &program.steps) {
        if let Action::Launch { kernel, launch: Some(launch), .. } = &step.action
            && let Some(most) = most.get_mut(*kernel as usize)
        {
            *most = launch.shared_bytes.max(*most);
        }
    }
    most
}

/// Two buffers take turns: one is read from the file while the other is copied.
struct Uploads<'a> {
    buffers: [Pinned; 2],
    /// Ranks that copy from each.
    users: [Vec<usize>; 2],
    streams: &'a [Stream],
    turn: usize,
}

impl Uploads<'_> {
    /// The next buffer, once nobody copies from it.
    fn next(&mut self) -> Result<&mut Pinned, CudaError> {
        self.turn = 1 - self.turn;
        for rank in self.users[self.turn].drain(..) {
            self.streams[rank].wait()?;
        }
        Ok(&mut self.buffers[self.turn])
    }

    fn finish(&mut self) -> Result<(), CudaError> {
        self.streams.iter().try_for_each(Stream::wait)
    }
}

fn load_weights(
    file: &PlanFile,
    gpus: &[Arc<Gpu>],
    mut progress: impl FnMut(u64),
) -> Result<Vec<DeviceMemory>, RuntimeError> {
    let manifest = &file.plan().manifest;
    if manifest.weight_arena_bytes.len() != gpus.len() {
        let what = format!("{} weight arenas for {} ranks", manifest.weight_arena_bytes.len(), gpus.len());
        return Err(RuntimeError::Contradiction { what });
    }
    let mut arenas = Vec::with_capacity(gpus.len());
    let mut streams = Vec::with_capacity(gpus.len());
    for ((rank, gpu), &bytes) in (0u32..).zip(gpus).zip(&manifest.weight_arena_bytes) {
        let at = |source| RuntimeError::Rank { rank, source };
        arenas.push(DeviceMemory::allocate(gpu, bytes).map_err(at)?);
        streams.push(Stream::new(gpu).map_err(at)?);
    }
    let (Some(first), true) = (gpus.first(), manifest.placed.iter().any(|placed| placed.ty.bytes() != Some(0))) else {
        return Ok(arenas);
    };
    let buffers = [Pinned::zeroed(first, CHUNK_BYTES)?, Pinned::zeroed(first, CHUNK_BYTES)?];
    let mut uploads = Uploads { buffers, users: [vec![], vec![]], streams: &streams, turn: 0 };
    let mut done = 0;
    for placed in &manifest.placed {
        let copied = load_weight(file, placed, &arenas, &mut uploads);
        if copied.is_err() {
            // Buffers are not freed under copies.
            let _ = uploads.finish();
        }
        done += copied?;
        progress(done);
    }
    uploads.finish()?;
    Ok(arenas)
}

/// Copies a weight to all ranks that hold it, each distinct image read once; the bytes copied.
fn load_weight(
    file: &PlanFile,
    placed: &PlacedWeight,
    arenas: &[DeviceMemory],
    uploads: &mut Uploads<'_>,
) -> Result<u64, RuntimeError> {
    let outside = || {
        let weight = file.plan().manifest.weights.get(placed.weight as usize);
        let name = weight.map_or("?", |weight| weight.name.as_str());
        RuntimeError::Contradiction { what: format!("weight `{name}` is placed outside of a rank's arena") }
    };
    let bytes = placed.ty.bytes().ok_or_else(outside)?;
    let end = placed.arena_offset.checked_add(bytes).ok_or_else(outside)?;
    let mut ranks_of: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (&rank, &image) in placed.ranks.iter().zip(&placed.images) {
        let arena = arenas.get(rank as usize).ok_or_else(outside)?;
        if end > arena.bytes {
            return Err(outside());
        }
        ranks_of.entry(image).or_default().push(rank as usize);
    }
    let mut copied = 0;
    for (image, ranks) in ranks_of {
        let mut first = 0;
        while first < bytes {
            let len = (bytes - first).min(CHUNK_BYTES as u64) as usize;
            let buffer = uploads.next()?;
            file.read_weights(image.saturating_add(first), &mut buffer.bytes_mut()[..len])?;
            let turn = uploads.turn;
            for &rank in &ranks {
                let to = arenas[rank].address + placed.arena_offset + first;
                let stream = &uploads.streams[rank];
                // SAFETY: within the arena, as checked above; the buffer is next written after the stream was waited
                // for.
                unsafe { uploads.buffers[turn].upload(0..len, to, stream) }?;
                uploads.users[turn].push(rank);
            }
            copied += len as u64 * ranks.len() as u64;
            first += len as u64;
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_get_gpus_of_their_own() {
        let of = |given: Option<&[u32]>, ranks, found| choose(ranks, given, || Ok(found));
        assert_eq!(of(None, 2, 4).unwrap(), [0, 1]);
        assert_eq!(of(Some(&[3, 1]), 2, 4).unwrap(), [3, 1]);
        let message = |given: Option<&[u32]>, ranks, found| of(given, ranks, found).unwrap_err().to_string();
        assert!(message(Some(&[1, 1]), 2, 4).contains("GPU 1 is given twice"));
        assert!(message(Some(&[0]), 2, 4).contains("has 2 ranks, and 1 GPU"), "{}", message(Some(&[0]), 2, 4));
        assert!(message(None, 4, 2).contains("needs 4 GPUs, this process may use 2"), "{}", message(None, 4, 2));
        assert!(message(Some(&[0, 7]), 2, 4).contains("no GPU 7"), "{}", message(Some(&[0, 7]), 2, 4));
    }
}
