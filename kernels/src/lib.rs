//! What every primitive costs in work; the CUDA kernels and their descriptors will live here.
//!
//! This crate states operations and bytes; times are stated by `passes::cost` from a target's rates.

mod work;

pub use work::{Work, work};
