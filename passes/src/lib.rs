//! The pipeline from a module to a plan.

pub mod compile;
pub mod cost;
pub mod error;
pub mod fuse;
pub mod lower;
pub mod pipeline;
pub mod precision;
pub mod schedule;
pub mod select;
pub mod shard;
pub mod simplify;
