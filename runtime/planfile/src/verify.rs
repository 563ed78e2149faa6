//! Proves that a plan is sound before anything is done with it: run by the writer and by the reader.
//!
//! The proof is from the plan alone. Every number that is an index, an offset or a size is in range; kernels and
//! collectives get the types that they are made for; machine code is what its kernels say of it, and is launched as
//! follows from their specifications; and from each program's own happens-before order follows that
//! every byte was written before it is read, that no two unordered steps touch the same bytes unless both read, and
//! that no rank waits for ever. A plan that passes may compute the wrong thing, but it cannot leave its memory, race or
//! hang, if the machine code computes no more than its specification: what is taken on trust is listed by
//! [`crate::trust`].
//!
//! Phases: manifest and kernels, then programs step by step, then order and memory. A phase may rely on what the ones
//! before it found sound, so findings of a phase end the proof.

mod bounds;
mod clock;
mod code;
mod exchange;
mod faults;
mod intervals;
mod kernels;
mod manifest;
mod memory;
mod persistent;
mod placed;
mod programs;
mod splits;
mod steps;
mod texts;

use std::fmt;

use crate::infer::MAX_RANK;
use crate::plan::Plan;
use crate::printable::printable;
use crate::types::TensorType;

/// Alignment of tensors in every arena, in bytes.
pub const ARENA_ALIGN: u64 = 256;
/// Most devices of a plan.
pub const MAX_RANKS: u32 = 1 << 16;
/// Most streams of a program.
pub const MAX_STREAMS: u32 = 64;
/// Most steps of a program.
pub const MAX_STEPS: usize = 1 << 20;
/// Most entries of a table of clocks: steps times streams, or tasks times blocks.
const MAX_CLOCKS: usize = 1 << 24;
/// Findings after which looking for more is pointless.
const MAX_FINDINGS: usize = 64;

/// A contradiction in a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Such as ``program 0, step #3`` or ``weight `w` ``.
    pub at: String,
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.what)
    }
}

/// Checks everything that this module's documentation names.
///
/// # Errors
/// What contradicts, at most a few dozen findings.
pub fn verify(plan: &Plan) -> Result<(), Vec<Finding>> {
    let mut report = Report::default();
    texts::check(plan, &mut report);
    manifest::check(plan, &mut report);
    let stages = programs::check_stages(plan, &mut report);
    report.end_phase()?;
    placed::check(plan, &stages, &mut report);
    let facts = kernels::check(plan, &mut report);
    programs::check_bindings(plan, &mut report);
    report.end_phase()?;
    for index in 0..plan.programs.len() {
        steps::check(plan, index, &facts, &mut report);
    }
    programs::check_predictions(plan, &mut report);
    report.end_phase()?;
    for index in 0..plan.programs.len() {
        memory::check(plan, index, &mut report);
    }
    exchange::check_links(plan, &mut report);
    for entry in &plan.manifest.entries {
        exchange::check(plan, entry, &mut report);
    }
    report.end_phase().map(|_| ())
}

/// Findings so far.
#[derive(Default)]
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, at: impl fmt::Display, what: impl Into<String>) {
        if self.findings.len() < MAX_FINDINGS {
            // Names are part of both, and may be of a plan that is refused for its names.
            let [at, what] = [at.to_string(), what.into()].map(|text| printable(&text).into_owned());
            self.findings.push(Finding { at, what });
        }
    }

    /// Adds a finding unless `fine`.
    fn require(&mut self, fine: bool, at: impl fmt::Display, what: impl FnOnce() -> String) {
        if !fine {
            self.add(at, what());
        }
    }

    fn check(&mut self, at: impl fmt::Display, result: Result<(), String>) {
        if let Err(what) = result {
            self.add(at, what);
        }
    }

    fn end_phase(&mut self) -> Result<(), Vec<Finding>> {
        match self.findings.is_empty() {
            true => Ok(()),
            false => Err(std::mem::take(&mut self.findings)),
        }
    }
}

/// A program, or a step of it, in findings.
#[derive(Clone, Copy)]
struct At {
    program: usize,
    step: Option<usize>,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Some(step) => write!(f, "program {}, step #{step}", self.program),
            None => write!(f, "program {}", self.program),
        }
    }
}

/// Bytes of a tensor whose type came from outside.
fn sound_bytes(ty: &TensorType) -> Result<u64, String> {
    if ty.rank() > MAX_RANK {
        return Err(format!("rank {} exceeds {MAX_RANK}", ty.rank()));
    }
    ty.bytes().ok_or_else(|| format!("{ty} overflows 63 bits of bytes"))
}

/// The first value that occurs twice.
fn duplicate<'a, T: Ord>(values: impl Iterator<Item = &'a T>) -> Option<&'a T> {
    let mut seen = std::collections::BTreeSet::new();
    values.into_iter().find(|&value| !seen.insert(value))
}

#[cfg(test)]
mod tests;
