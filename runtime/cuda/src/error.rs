//! What can go wrong between this program and the CUDA libraries.

use std::fmt;

use crate::library::LibraryName;

/// Why a CUDA library could not be used, or refused what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("{library} was not found: looked for {}{}; {}", names.join(", "), Looked { folders, refused }, library.advice())]
    Absent {
        library: LibraryName,
        /// File names that the loader was asked for.
        names: Vec<String>,
        /// Folders that were searched besides.
        folders: Vec<String>,
        /// Files that are there but could not be opened, with the loader's reason.
        refused: Vec<String>,
    },
    #[error(
        "{library} was not found: {} names {path}, and no other file was tried ({reason}); correct or unset the variable, \
         or {}",
        library.variable(), library.advice()
    )]
    GivenAbsent { library: LibraryName, path: String, reason: String },
    #[error(
        "{path} has no function `{symbol}`, so it is too old or no {library}; {}, or name another file in {}",
        library.advice(), library.variable()
    )]
    Symbol { library: LibraryName, path: String, symbol: &'static str },
    #[error("{call} failed: {status}; {next}")]
    Call { call: &'static str, status: String, next: &'static str },
    #[error("{what} is not possible with {library}; {next}")]
    Refused { library: LibraryName, what: String, next: &'static str },
    #[error("kernel source `{name}` does not compile for {architecture}; this is a bug, report it:\n{log}")]
    Compile { name: String, architecture: String, log: String },
    #[error("another rank failed")]
    Abandoned,
    #[error("{what}; this is a bug of the compiler that wrote the plan, report it")]
    Contradiction { what: String },
}

impl CudaError {
    /// What would be a bug of the compiler.
    pub fn contradiction(what: impl Into<String>) -> Self {
        Self::Contradiction { what: what.into() }
    }
}

/// The end of the sentence about where a library was looked for.
struct Looked<'a> {
    folders: &'a [String],
    refused: &'a [String],
}

impl fmt::Display for Looked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" where the loader looks")?;
        if !self.folders.is_empty() {
            write!(f, " and in {}", self.folders.join(", "))?;
        }
        if !self.refused.is_empty() {
            write!(f, " (found, but not opened: {})", self.refused.join("; "))?;
        }
        Ok(())
    }
}
