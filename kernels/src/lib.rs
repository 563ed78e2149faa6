//! CUDA kernels with their descriptors, and what every primitive costs in work.
//!
//! This crate states sources, launch shapes, operations and bytes; times are stated by `passes::cost` from a target's
//! rates, and machine code is made by whoever holds a compiler.

pub mod cuda;
pub mod samples;
mod work;

pub use work::{Work, work};
