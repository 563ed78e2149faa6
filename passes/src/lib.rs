//! The pipeline from a module to a plan: its files, and the table of its passes.

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

use phase::{Fused, Logical, Scheduled, Selected, Sharded};
use pipeline::Pass;

/// On whole tensors.
pub const LOGICAL: &[Pass<Logical>] = &[
    Pass { name: "simplify", run: simplify::run },
    Pass { name: "recognise", run: recognise::run },
    Pass { name: "precision", run: precision::run },
];
/// To what each rank computes.
pub const SHARD: Pass<Logical, Sharded> = Pass { name: "shard", run: shard::run };
/// On each rank's graph.
pub const SHARDED: &[Pass<Sharded>] = &[
    Pass { name: "merge", run: merge::run },
    Pass { name: "biases", run: biases::run },
    Pass { name: "layout", run: layout::run },
    Pass { name: "exchange", run: exchange::run },
    Pass { name: "narrow", run: narrow::run },
    Pass { name: "panels", run: panels::run },
];
/// To steps.
pub const FUSE: Pass<Sharded, Fused> = Pass { name: "fuse", run: fuse::run };
/// To what executes them.
pub const SELECT: Pass<Fused, Selected> = Pass { name: "select", run: select::run };
/// To when, and where in memory.
pub const SCHEDULE: Pass<Selected, Scheduled> = Pass { name: "schedule", run: schedule::run };
