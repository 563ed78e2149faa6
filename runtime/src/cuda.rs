//! GPUs: plans executed by the CUDA driver, cuBLASLt, cuDNN and NCCL; and NVRTC, for those who compile plans.
//!
//! Nothing is linked. A library is opened where a plan first needs it, and its absence is an error that says how to get
//! it. One thread per rank lives as long as its context; each entry becomes one CUDA graph per rank and program, with
//! the collectives in it.

mod context;
mod cublaslt;
mod cudnn;
mod doctor;
mod driver;
mod error;
mod faults;
mod fellowship;
mod library;
mod memory;
mod nccl;
pub mod nvrtc;
mod prepare;
mod rank;
mod session;
mod thread;
mod transfer;
mod work;

pub use context::{StepDuration, StepRecord};
pub use doctor::{LibraryReport, gpus, libraries, peers};
pub use driver::GpuInfo;
pub use error::CudaError;
pub use library::LibraryName;
pub use memory::DeviceMemoryReport;
pub use session::OtherVersion;

pub(crate) use context::CudaContext;
pub(crate) use rank::Told;
pub(crate) use session::CudaSession;
