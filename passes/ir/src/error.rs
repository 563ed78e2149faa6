//! Errors of the intermediate representation.

use thiserror::Error;

/// What is wrong with a module. All but parse errors are bugs of the pass that made it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IrError {
    #[error("graph `{graph}`: {op} (from `{origin}`): {why}")]
    Type { graph: String, op: &'static str, origin: String, why: String },
    #[error("graph `{graph}`: {why}")]
    Graph { graph: String, why: String },
    #[error("module `{module}`: {why}")]
    Module { module: String, why: String },
    #[error("line {line}, column {column}: {why}")]
    Parse { line: usize, column: usize, why: String },
}
