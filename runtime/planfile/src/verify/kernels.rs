//! Kernels: their specs' types, and where their code is.

use super::manifest::table_lengths;
use super::{Report, sound_bytes};
use crate::op::Op;
use crate::plan::{Call, Implementation, Kernel, Library, Plan};
use crate::types::TensorType;

/// What steps need to know of a kernel.
pub(super) struct Facts {
    pub(super) results: Vec<TensorType>,
    /// The length of its per-rank tables, if it has any.
    pub(super) ranks: Option<usize>,
    /// What its result may take the place of.
    pub(super) in_place: InPlace,
}

/// Which operands a result may overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InPlace {
    Never,
    /// Element by element: any operand with the result's dimensions and element size.
    Any,
    /// The state that is appended to.
    First,
}

/// One per kernel. After a finding, a kernel's facts are of no use.
pub(super) fn check(plan: &Plan, report: &mut Report) -> Vec<Facts> {
    let mut facts = Vec::with_capacity(plan.kernels.len());
    for (index, kernel) in plan.kernels.iter().enumerate() {
        let at = format_args!("kernel {index} (`{}`)", kernel.name);
        report.check(at, check_implementation(plan, kernel));
        match check_spec(kernel) {
            Ok(fact) => facts.push(fact),
            Err(what) => report.add(at, what),
        }
    }
    for (index, code) in plan.code.iter().enumerate() {
        let target = &plan.manifest.target.architecture;
        report.require(code.architecture == *target, format_args!("code {index}"), || {
            format!("is for {}, the plan is for {target}", code.architecture)
        });
    }
    facts
}

fn check_implementation(plan: &Plan, kernel: &Kernel) -> Result<(), String> {
    match &kernel.implementation {
        Implementation::Cuda { code, symbol } => {
            let code = plan.code.get(*code as usize).ok_or_else(|| format!("code {code} of {}", plan.code.len()))?;
            let fine = !symbol.is_empty() && !symbol.contains('\0') && !code.cubin.is_empty();
            fine.then_some(()).ok_or_else(|| format!("symbol `{symbol}` in {} bytes of code", code.cubin.len()))
        }
        Implementation::Library { library, call, .. } => {
            let has_it = matches!(
                (library, call),
                (Library::CublasLt, Call::Matmul(_)) | (Library::Cudnn, Call::Convolution(_))
            );
            if !has_it {
                return Err(format!("{library} has no such call"));
            }
            call.check(&kernel.spec.inputs, &kernel.spec.result_types()?)
        }
        Implementation::Reference => Ok(()),
    }
}

fn check_spec(kernel: &Kernel) -> Result<Facts, String> {
    let spec = &kernel.spec;
    for input in &spec.inputs {
        sound_bytes(input)?;
    }
    if let Some(node) = spec.nodes.iter().find(|node| node.op.is_collective()) {
        return Err(format!("{} inside a kernel", node.op.name()));
    }
    let results = spec.result_types()?;
    let mut tables = spec.nodes.iter().flat_map(|node| table_lengths(&node.op));
    let ranks = tables.next();
    if tables.any(|length| Some(length) != ranks) {
        return Err("has per-rank tables of different lengths".to_owned());
    }
    let one = spec.results.as_slice() == [spec.inputs.len() as u32];
    let in_place = match spec.nodes.as_slice() {
        [node] if one => match node.op {
            Op::Pointwise { .. } => InPlace::Any,
            Op::Append { .. } if node.operands.first() == Some(&0) => InPlace::First,
            _ => InPlace::Never,
        },
        _ => InPlace::Never,
    };
    Ok(Facts { results, ranks, in_place })
}
