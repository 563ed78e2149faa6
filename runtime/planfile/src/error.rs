//! What can be wrong with a plan file: what, where, what next.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::replace::{ReplaceError, advice};
use crate::text::count;
use crate::verify::Finding;

/// A plan that could not be written, read or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a regular file; name a plan, or copy it into a file first", path.display())]
    NotAFile { path: PathBuf },
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    #[error("{what} takes {bytes} bytes, more than there is memory; use a machine with more of it")]
    Memory { what: &'static str, bytes: u64 },
    #[error("this is not a plan: it does not begin with the mark of one; compile the model to get a plan")]
    NotAPlan,
    #[error("the plan has format version {found}, this program reads version {ours}; {}", version_advice(*found, *ours))]
    Version { found: u32, ours: u32 },
    #[error("the plan is cut: it has {} of {expected}; copy it again", count(*actual, "byte"))]
    Cut { expected: u64, actual: u64 },
    #[error("the plan is followed by {}, not part of it; copy it again", count(*extra, "byte"))]
    Trailing { extra: u64 },
    #[error("header at byte {offset}: {what}; the file is damaged, copy it again")]
    Header { offset: u64, what: String },
    #[error("bytes {first}..{end} do not match their hash ({what}); the file is damaged, copy it again")]
    Damaged { first: u64, end: u64, what: &'static str },
    #[error("section {section} at byte {offset}: {what}; the file was not written by this compiler, compile again")]
    Decode { section: &'static str, offset: u64, what: String },
    #[error("section {section} has {bytes} bytes, limit {limit}; split the model")]
    TooLarge { section: &'static str, bytes: u64, limit: u64 },
    #[error("bytes {first}..{end} of the weights section are asked for, it has {bytes}; this is a bug of the caller")]
    OutsideWeights { first: u64, end: u64, bytes: u64 },
    #[error("weights: {what}; this is a bug of the compiler, report it")]
    Weights { what: String },
    #[error("the plan contradicts itself; this is a bug of the compiler that wrote it, report it\n{}", Findings(.0))]
    Invalid(Vec<Finding>),
}

fn version_advice(found: u32, ours: u32) -> &'static str {
    if found > ours { "update this program" } else { "compile the model again with this program" }
}

/// One finding a line, so many that a reader still reads them.
struct Findings<'a>(&'a [Finding]);

impl fmt::Display for Findings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        for (position, finding) in self.0.iter().take(SHOWN).enumerate() {
            let newline = if position == 0 { "" } else { "\n" };
            write!(f, "{newline}  {finding}")?;
        }
        if self.0.len() > SHOWN {
            write!(f, "\n  and {} more", self.0.len() - SHOWN)?;
        }
        Ok(())
    }
}
