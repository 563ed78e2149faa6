//! Errors of the pipeline.

use cpu::recipe::RecipeError;
use ir::IrError;
use thiserror::Error;

/// Why a module was not compiled, and whose fault it is.
#[derive(Debug, Error)]
pub enum PassError {
    /// A pass did something wrong. Never the user's fault.
    #[error("internal error in pass `{pass}`: {why}; please report this with the model")]
    Invalid { pass: &'static str, why: String },
    /// The model needs something that is not there yet.
    #[error("{op} (from `{node}`) is not supported: {hint}")]
    Unsupported { node: String, op: String, hint: String },
    /// Nodes that no kernel of the target takes: all of them.
    #[error("{}", no_kernels(.0))]
    NoKernels(Vec<NoKernel>),
    /// The verifier refused what came in; errors after a pass are [`Self::Invalid`].
    #[error(transparent)]
    Ir(#[from] IrError),
    #[error("there is no pass `{name}`; passes are {known}")]
    UnknownPass { name: String, known: String },
    /// A weight could not be read or made.
    #[error("weight `{weight}`: {source}")]
    Weights { weight: String, source: RecipeError },
    /// Kernels were not made machine code: no compiler for it, or it refused.
    #[error("kernels were not compiled: {why}")]
    Assemble { why: String },
}

/// A node that no kernel of the target takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoKernel {
    /// Names of the model's nodes that it comes from.
    pub origin: Vec<String>,
    pub op: String,
    pub why: String,
}

fn no_kernels(nodes: &[NoKernel]) -> String {
    let one = |NoKernel { origin, op, why }: &NoKernel| format!("{op} (from `{}`): {why}", origin.join("`, `"));
    let lines: Vec<String> = nodes.iter().map(one).collect();
    let what = if lines.len() == 1 { "a step has no kernel" } else { "steps have no kernel" };
    format!("{what}:\n  {}\ncompile for `--target cpu`, or change the model", lines.join("\n  "))
}

impl PassError {
    /// A broken invariant, noticed in `pass`.
    pub fn invalid(pass: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Invalid { pass, why: why.to_string() }
    }
}
