//! Kernels: their specs' types, what executes them, and what steps have to give them.

use super::code::Files;
use super::{Report, sound_bytes};
use crate::architecture::Architecture;
use crate::expr::RankScalar;
use crate::op::Op;
use crate::plan::{Call, Implementation, Kernel, LaunchShape, Library, Plan};
use crate::types::TensorType;

/// What steps need to know of a kernel.
pub(super) struct Facts {
    pub(super) results: Vec<TensorType>,
    /// The length of its per-rank tables, if it has any.
    pub(super) ranks: Option<usize>,
    /// What its result may take the place of.
    pub(super) in_place: InPlace,
    /// How its code is launched; `None` of what is no code of ours.
    pub(super) launch: Option<Launch>,
}

/// What follows from a kernel's rule and specification.
pub(super) struct Launch {
    pub(super) shape: LaunchShape,
    pub(super) scalars: Vec<RankScalar>,
    /// Whether a fault word comes last.
    pub(super) checks: bool,
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
    let mut files = Files::read(plan, report);
    let architecture = &plan.manifest.target.architecture;
    let on_host = architecture.parse() == Ok(Architecture::Cpu);
    for (index, kernel) in plan.kernels.iter().enumerate() {
        let at = format_args!("kernel {index} (`{}`)", kernel.name);
        let is_reference = matches!(kernel.implementation, Implementation::Reference);
        report.require(is_reference == on_host, at, || match is_reference {
            true => format!("has no code for {architecture}"),
            false => format!("is for GPUs, the plan is for {architecture}"),
        });
        let checked = check_spec(kernel).and_then(|facts| {
            let launch = check_implementation(&mut files, kernel)?;
            Ok(Facts { launch, ..facts })
        });
        match checked {
            Ok(fact) => facts.push(fact),
            Err(what) => report.add(at, what),
        }
    }
    facts
}

fn check_implementation<'a>(files: &mut Files<'a>, kernel: &'a Kernel) -> Result<Option<Launch>, String> {
    let spec = &kernel.spec;
    match &kernel.implementation {
        Implementation::Cuda { code, symbol, rule } => {
            let shape = files.check((*code, symbol), rule, spec)?;
            Ok(Some(Launch { shape, scalars: spec.rank_scalars(), checks: spec.checks_indices() }))
        }
        Implementation::Library { library, call, .. } => {
            let has_it = matches!(
                (library, call),
                (Library::CublasLt, Call::Matmul(_)) | (Library::Cudnn, Call::Convolution(_))
            );
            if !has_it {
                return Err(format!("{library} has no such call"));
            }
            call.check(&spec.inputs, &spec.result_types()?).map(|()| None)
        }
        Implementation::Reference => Ok(None),
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
    let mut tables = spec.nodes.iter().flat_map(|node| node.op.rank_scalars()).filter_map(|scalar| match scalar {
        RankScalar::ByRank(table) => Some(table.len()),
        RankScalar::Uniform(_) => None,
    });
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
    Ok(Facts { results, ranks, in_place, launch: None })
}
