//! What can go wrong when a plan is loaded or run.

use cpu::CpuError;
use planfile::TensorType;
use planfile::error::PlanError;
use planfile::frozen::FrozenSummary;
use planfile::text::{count, few};

use cuda::{CudaError, LibraryName};

/// Why a plan could not be loaded or run: what, where, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the plan has no entry `{name}`; its entries are {}", few(known))]
    UnknownEntry { name: String, known: Vec<String> },
    #[error("input `{name}` ({ty}) is missing; entry `{entry}` expects {}", few(expected))]
    MissingInput { entry: String, name: String, ty: TensorType, expected: Vec<String> },
    #[error("entry `{entry}` has no input `{name}`; it expects {}", few(expected))]
    UnknownInput { entry: String, name: String, expected: Vec<String> },
    #[error("input `{name}` must be {expected}, given is {given}; convert its elements")]
    InputDType { name: String, expected: TensorType, given: TensorType },
    #[error("input `{name}` must be {expected}, given is {given}; reshape it, or compile the model for that shape")]
    InputShape { name: String, expected: TensorType, given: TensorType },
    #[error(
        "input `{}` is frozen at {}: the plan was compiled for that value, which {} for a shape or a branch; given is \
         {given}: give the frozen value, leave the input out, or compile with `--like` for this one",
        frozen.input, frozen.value, frozen.reader()
    )]
    FrozenInput { frozen: Box<FrozenSummary>, given: String },
    #[error("{what} takes {bytes} bytes, more than there is memory; use a machine with more of it, or more devices")]
    Memory { what: String, bytes: u64 },
    #[error("the threads of rank {rank} could not be started; use fewer with --threads: {source}")]
    Threads { rank: u32, source: rayon::ThreadPoolBuildError },
    #[error("{ranks} virtual devices with {threads} threads each are more than {limit} threads; use fewer")]
    TooManyThreads { ranks: u32, threads: usize, limit: usize },
    #[error("rank {rank}, program {program}, step {step}{}: {source}", origin_of(origin))]
    Step { rank: u32, program: usize, step: usize, origin: Vec<String>, source: StepError },
    #[error("the plan contradicts itself: {what}; this is a bug of the compiler that wrote it, report it")]
    Contradiction { what: String },
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error("rank {rank}: {source}")]
    Rank { rank: u32, source: CudaError },
    #[error("the plan is compiled for `{architecture}`, not for GPUs: run it with `--devices cpu`, or compile it anew")]
    NotForGpus { architecture: String },
    #[error(
        "the plan needs {}, this process may use {found}; compile it for fewer with --gpus, look at \
         CUDA_VISIBLE_DEVICES, or replay it on the CPU with `--devices cpu`",
        count(u64::from(*ranks), "GPU")
    )]
    TooFewGpus { ranks: u32, found: u32 },
    #[error(
        "the plan has {}, and {given} GPU{} given; give one for each rank",
        count(u64::from(*ranks), "rank"),
        if *given == 1 { " is" } else { "s are" }
    )]
    GpuCount { ranks: u32, given: usize },
    #[error("there is no GPU {ordinal}: this process may use {found}, counted from 0; `plan doctor` lists them")]
    NoSuchGpu { ordinal: u32, found: u32 },
    #[error("GPU {ordinal} is given twice; each rank needs one of its own")]
    SameGpu { ordinal: u32 },
    #[error(
        "the plan is compiled for {architecture}, which GPU {ordinal} ({name}, compute capability {}.{}) cannot run; \
         compile it for this GPU", capability.0, capability.1
    )]
    Architecture { ordinal: u32, name: String, capability: (u32, u32), architecture: String },
    #[error(
        "rank {rank} needs {needed} bytes on GPU {ordinal}, of whose {total} bytes {free} are free: {} are missing; \
         another process may hold them (`nvidia-smi` shows which), or compile the plan for more GPUs",
        needed.saturating_sub(*free)
    )]
    GpuMemory { rank: u32, ordinal: u32, needed: u64, free: u64, total: u64 },
    #[error(
        "the plan was made with {library} {recorded}, this machine has {found}: install that version, compile the plan \
         anew, or accept other choices and last bits by leaving out --strict"
    )]
    OtherVersion { library: LibraryName, recorded: String, found: String },
    #[error("an earlier run of this context failed; make a new one")]
    Broken,
    #[error("{what} is for plans on GPUs")]
    OnlyOnGpus { what: &'static str },
    #[error("the thread of rank {rank} could not be started: {source}; raise `ulimit -v` or `ulimit -u`")]
    Thread { rank: u32, source: std::io::Error },
    #[error("rank {rank} stopped in an unforeseen way; this is a bug, report it with the plan")]
    Panicked { rank: u32 },
}

/// Why one rank could not execute a step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error("{what} is not executed on virtual devices; compile for the target `cpu`")]
    Unsupported { what: &'static str },
    #[error("{what} is not executed on GPUs; replay the plan on the CPU with `--devices cpu`")]
    UnsupportedOnGpu { what: &'static str },
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(
        "an index that it reads is out of range; `plan check`, or `plan run --devices cpu` on the same inputs, names the \
         index: correct the inputs, or the model"
    )]
    OutOfRange,
    #[error(
        "a value inside of its kernel takes {bytes} bytes, more than there is memory; use a machine with more of it"
    )]
    Memory { bytes: usize },
    #[error("{what}; this is a bug of the compiler that wrote the plan, report it")]
    Contradiction { what: String },
    #[error("another rank failed")]
    Abandoned,
}

fn origin_of(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!(" (from {})", few(names)),
    }
}
