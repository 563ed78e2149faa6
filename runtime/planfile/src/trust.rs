//! What a plan that verifies still asks to be believed: nothing but a signature can vouch for it.

use std::fmt;

use serde::Serialize;

use crate::plan::{Action, Implementation, Library, Plan};
use crate::text::{count, few};

/// Something that [`crate::verify()`] does not prove.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Trusted {
    /// Instructions of machine code: that they compute what kernels specify, and touch nothing else.
    Code { code: usize, kernels: Vec<String>, bytes: usize },
    /// Calls into a library: that they compute what kernels specify.
    Calls { library: Library, kernels: Vec<String> },
    /// An algorithm that a step asks a library for, in the library's own bytes.
    Algorithm { program: usize, step: usize, bytes: usize },
    /// Predicted times and amounts of work. Nothing that runs depends on them.
    Predictions,
}

/// All of it, for a plan that verifies.
pub fn trusted(plan: &Plan) -> Vec<Trusted> {
    let mut trusted = Vec::new();
    let names = |of: &dyn Fn(&Implementation) -> bool| -> Vec<String> {
        let kernels = plan.kernels.iter().filter(|kernel| of(&kernel.implementation));
        kernels.map(|kernel| kernel.name.clone()).collect()
    };
    let mut users = vec![Vec::new(); plan.code.len()];
    for kernel in &plan.kernels {
        if let Implementation::Cuda { code, .. } = &kernel.implementation
            && let Some(users) = users.get_mut(*code as usize)
        {
            users.push(kernel.name.clone());
        }
    }
    for (code, kernels) in users.into_iter().enumerate() {
        trusted.push(Trusted::Code { code, kernels, bytes: plan.code[code].cubin.len() });
    }
    for wanted in [Library::CublasLt, Library::Cudnn] {
        let kernels = names(&|of| matches!(of, Implementation::Library { library, .. } if *library == wanted));
        if !kernels.is_empty() {
            trusted.push(Trusted::Calls { library: wanted, kernels });
        }
    }
    for (program, steps) in plan.programs.iter().map(|program| &program.steps).enumerate() {
        for (step, described) in steps.iter().enumerate() {
            if let Action::Library { algorithm, .. } = &described.action
                && !algorithm.is_empty()
            {
                trusted.push(Trusted::Algorithm { program, step, bytes: algorithm.len() });
            }
        }
    }
    trusted.push(Trusted::Predictions);
    trusted
}

impl fmt::Display for Trusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code { code, kernels, bytes } => {
                let of = if kernels.is_empty() { "of no kernel".to_owned() } else { few(kernels) };
                write!(f, "the instructions in code {code} ({}): {of}", count(*bytes as u64, "byte"))
            }
            Self::Calls { library, kernels } => write!(f, "{library}'s results: {}", few(kernels)),
            Self::Algorithm { program, step, bytes } => {
                write!(f, "the algorithm ({}) of program {program}, step #{step}", count(*bytes as u64, "byte"))
            }
            Self::Predictions => f.write_str("predicted times and amounts of work, on which nothing that runs depends"),
        }
    }
}
