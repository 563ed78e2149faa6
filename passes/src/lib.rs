//! The pipeline from a module to a plan.

pub mod compile;
pub mod cost;
pub mod error;
pub mod lower;
pub mod pipeline;
pub mod schedule;
pub mod shard;
pub mod simplify;
