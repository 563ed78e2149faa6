//! Plans on GPUs, by what the crate `cuda` has of them.
//!
//! One thread per rank lives as long as its context; each entry becomes one CUDA graph per rank and program, with the
//! collectives in it.

mod context;
mod faults;
mod fellowship;
mod memory_report;
mod prepare;
mod rank;
mod session;
mod thread;
mod transfer;
mod work;

pub use context::{StepDuration, StepRecord};
pub use memory_report::DeviceMemoryReport;
pub use session::OtherVersion;

pub(crate) use context::CudaContext;
pub(crate) use rank::Told;
pub(crate) use session::CudaSession;
