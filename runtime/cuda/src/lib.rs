//! GPUs: the CUDA driver, cuBLASLt, cuDNN and NCCL; and NVRTC, for those who compile plans.
//!
//! Nothing is linked. A library is opened where it is first needed, and its absence is an error that says how to get it.
//! What is here knows one GPU at a time, and of a plan nothing but the calls that it asks for: a process may hold any of
//! a plan's ranks.

pub mod cublaslt;
pub mod cudnn;
mod doctor;
pub mod driver;
mod error;
mod library;
pub mod nccl;
pub mod nvrtc;

pub use doctor::{LibraryReport, gpus, libraries, peers};
pub use driver::GpuInfo;
pub use error::CudaError;
pub use library::LibraryName;
