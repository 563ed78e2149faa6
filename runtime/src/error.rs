//! What can go wrong when a plan is loaded or run.

use cpu::CpuError;
use planfile::TensorType;
use planfile::error::PlanError;

/// Why a plan could not be loaded or run: what, where, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the plan has no entry `{name}`; its entries are {}", known.join(", "))]
    UnknownEntry { name: String, known: Vec<String> },
    #[error("input `{name}` ({ty}) is missing; entry `{entry}` expects {}", expected.join(", "))]
    MissingInput { entry: String, name: String, ty: TensorType, expected: Vec<String> },
    #[error("entry `{entry}` has no input `{name}`; it expects {}", expected.join(", "))]
    UnknownInput { entry: String, name: String, expected: Vec<String> },
    #[error("input `{name}` must be {expected}, given is {given}; convert its elements")]
    InputDType { name: String, expected: TensorType, given: TensorType },
    #[error("input `{name}` must be {expected}, given is {given}; reshape it, or compile the model for that shape")]
    InputShape { name: String, expected: TensorType, given: TensorType },
    #[error(
        "input `{name}` was bound to other values when the plan was compiled, because shapes depend on it; \
         give the same values, or compile for these"
    )]
    PinnedInput { name: String },
    #[error("{what} takes {bytes} bytes, more than there is memory; use a machine with more of it, or more devices")]
    Memory { what: String, bytes: u64 },
    #[error("the threads of rank {rank} could not be started; use fewer with --threads: {source}")]
    Threads { rank: u32, source: rayon::ThreadPoolBuildError },
    #[error("rank {rank}, program {program}, step {step}{}: {source}", origin_of(origin))]
    Step { rank: u32, program: usize, step: usize, origin: Vec<String>, source: StepError },
    #[error("the plan contradicts itself: {what}; this is a bug of the compiler that wrote it, report it")]
    Contradiction { what: String },
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
        names => format!(" (from {})", names.join(", ")),
    }
}
