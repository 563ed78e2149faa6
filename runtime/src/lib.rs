//! Loads and executes plans.
//!
//! A [`Session`] holds a verified plan and the weight arenas of its ranks; [`Context`]s run its entries, each with
//! activation arenas of its own over the same weights:
//!
//! ```no_run
//! # fn main() -> Result<(), runtime::RuntimeError> {
//! let session = runtime::Session::load("model.plan".as_ref(), runtime::Devices::Virtual)?;
//! let mut context = session.context()?;
//! let inputs = runtime::random_inputs(&session.plan().manifest.entries[0], 7)?;
//! for (name, tensor) in context.run("main", &inputs)? {
//!     println!("{name}: {}", tensor.ty);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Virtual devices are threads on the CPU, one per rank, which execute what each step's kernel says it computes, at the
//! planned offsets, with real exchanges between them.
//!
//! With [`Devices::Cuda`], ranks are GPUs: each entry is one CUDA graph per rank and program, collectives included, and
//! the same call to [`Context::run`] copies inputs and outputs through page-locked memory. The driver, cuBLASLt, cuDNN
//! and NCCL are opened where a plan needs them; see [`gpus`]. [`Devices::of`] is what a plan was compiled for.

pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod compare;
mod error;
mod exchange;
pub mod gpus;
pub mod image;
mod memory;
pub mod npz;
mod pieces;
mod ports;
mod random;
pub mod refit;
pub mod rounding;
mod session;
mod signature;
mod spec;
pub mod tensor_file;
pub mod tensor_proto;
mod virtual_devices;

pub use error::{RuntimeError, StepError};
pub use random::random_inputs;
pub use session::{Context, Devices, Session};
pub use virtual_devices::StepTime;
