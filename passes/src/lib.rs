//! The pipeline from a module to a plan.

pub mod biases;
pub mod compile;
pub mod cost;
pub mod error;
pub mod exchange;
pub mod fuse;
#[cfg(test)]
mod harness;
pub mod layout;
pub mod lower;
pub mod merge;
pub mod narrow;
pub mod panels;
pub mod phase;
pub mod pipeline;
pub mod precision;
pub mod recognise;
pub mod schedule;
pub mod select;
pub mod settings;
pub mod shard;
pub mod simplify;
