//! Errors of the pipeline.

use std::collections::HashMap;

use cpu::recipe::RecipeError;
use ir::IrError;
use planfile::text::few;
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

/// A line for each reason, so many that a reader still reads them.
fn no_kernels(steps: &[NoKernel]) -> String {
    const SHOWN: usize = 20;
    let mut places: HashMap<(&str, &str), usize> = HashMap::new();
    let mut lines: Vec<(&NoKernel, Vec<&String>)> = Vec::new();
    for step in steps {
        let place = *places.entry((&step.op, &step.why)).or_insert(lines.len());
        match lines.get_mut(place) {
            Some((_, names)) => names.extend(&step.origin),
            None => lines.push((step, step.origin.iter().collect())),
        }
    }
    let one = |(NoKernel { op, why, .. }, names): &(&NoKernel, Vec<&String>)| {
        format!("\n  {op} (from {}): {why}", few(names.iter().map(|name| format!("`{name}`"))))
    };
    let shown: String = lines.iter().take(SHOWN).map(one).collect();
    let more = match lines.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("\n  and {more} more; --check-support lists all"),
    };
    let what = if steps.len() == 1 { "a step has no kernel" } else { "steps have no kernel" };
    format!("{what}:{shown}{more}\ncompile for `--target cpu`, or change the model")
}

impl PassError {
    /// A broken invariant, noticed in `pass`.
    pub fn invalid(pass: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Invalid { pass, why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn very_many_steps_without_kernels_are_few_lines() {
        let step = |number: usize, why: String| NoKernel { origin: vec![format!("n{number}")], op: "sort".into(), why };
        let same = PassError::NoKernels((0..8000).map(|number| step(number, "too wide".to_owned())).collect());
        assert_eq!(
            same.to_string(),
            "steps have no kernel:\n  sort (from `n0`, `n1`, `n2`, `n3`, `n4`, `n5`, `n6`, `n7`, … and 7992 more): too wide\n\
             compile for `--target cpu`, or change the model"
        );
        let each = PassError::NoKernels((0..8000).map(|number| step(number, number.to_string())).collect()).to_string();
        assert_eq!(each.lines().count(), 23, "{each}");
        assert!(each.contains("\n  and 7980 more; --check-support lists all\n"), "{each}");
        let one = PassError::NoKernels(vec![step(1, "too wide".to_owned())]).to_string();
        assert!(one.starts_with("a step has no kernel:\n  sort (from `n1`): too wide\n"), "{one}");
    }
}
