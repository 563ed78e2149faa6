//! CUDA kernels: one descriptor per source in `cuda/`, and what every primitive costs in work.
//!
//! Kernels state operations and bytes; times are stated by `passes::cost` from a target's rates.

mod work;

pub use work::{Work, work};
