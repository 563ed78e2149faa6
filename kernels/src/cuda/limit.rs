//! Which size of a specification is too large for every kernel, and up to where there is one.

use planfile::{Op, Spec, TensorType};

/// The size for which no kernel takes the specification, and the largest one that `takes` holds for; `None` where a size
/// is not why.
pub(super) fn too_large(spec: &Spec, takes: &dyn Fn(&Spec) -> bool) -> Option<String> {
    let [node] = spec.nodes.as_slice() else { return None };
    let operand = |number: usize| spec.inputs.get(*node.operands.get(number)? as usize);
    let (what, size, with): (&str, u64, &dyn Fn(u64) -> Option<Spec>) = match node.op {
        Op::Recurrence { .. } => ("hidden units", operand(2)?.size(2), &|units| of_units(spec, units)),
        Op::TopK { axis, .. } => {
            ("elements to choose from", operand(0)?.size(usize::from(axis)), &|length| of_length(spec, length))
        }
        _ => return None,
    };
    let fits = |size| with(size).is_some_and(|spec| takes(&spec));
    if size == 0 || !fits(1) {
        return None;
    }
    // Larger sizes need more of what there is too little of.
    let (mut largest, mut refused) = (1, size);
    while refused - largest > 1 {
        let middle = largest + (refused - largest) / 2;
        if fits(middle) {
            largest = middle;
        } else {
            refused = middle;
        }
    }
    Some(format!("its {size} {what} are more than the {largest} that a kernel takes on this architecture"))
}

/// The recurrent layer with so many hidden units.
fn of_units(spec: &Spec, units: u64) -> Option<Spec> {
    let node = spec.nodes.first()?;
    let hidden = spec.inputs.get(*node.operands.get(2)? as usize)?.size(2);
    let mut operands = Vec::new();
    for (position, &operand) in node.operands.iter().enumerate() {
        let ty = spec.inputs.get(operand as usize)?;
        let mut sizes = ty.sizes();
        // Lengths have one dimension, the batch; all else ends with units, or with units for each gate.
        let last = sizes.len().checked_sub(1).filter(|&last| last > 0);
        for axis in last.into_iter().chain((position == 1).then_some(1)) {
            let size = sizes.get_mut(axis)?;
            *size = (*size / hidden).checked_mul(units)?;
        }
        operands.push(TensorType::new(ty.dtype, &sizes));
    }
    Spec::of(node.op.clone(), operands).ok()
}

/// The choice among so many elements.
fn of_length(spec: &Spec, length: u64) -> Option<Spec> {
    let node = spec.nodes.first()?;
    let Op::TopK { axis, k, largest, sorted } = node.op else { return None };
    let x = spec.inputs.get(*node.operands.first()? as usize)?;
    let mut sizes = x.sizes();
    *sizes.get_mut(usize::from(axis))? = length;
    Spec::of(Op::TopK { axis, k: k.min(length), largest, sorted }, vec![TensorType::new(x.dtype, &sizes)]).ok()
}

#[cfg(test)]
mod tests {
    use planfile::op::Cell;
    use planfile::{DType, Expr, Unary};

    use super::super::{CudaTarget, select};
    use super::*;

    fn why(spec: &Spec, architecture: &str) -> String {
        select(spec, &CudaTarget { architecture: architecture.parse().unwrap(), allow_tf32: false })
            .map(drop)
            .unwrap_err()
    }

    fn gru(hidden: u64) -> Spec {
        let cell = Cell::Gru { resets_late: false };
        let functions = vec![Expr::operand(0).unary(Unary::Tanh); 2];
        let op =
            Op::Recurrence { cell, reverse: vec![false], functions, bias: false, peepholes: false, lengths: false };
        let ty = |sizes: &[u64]| TensorType::new(DType::F32, sizes);
        let operands = vec![ty(&[5, 2, 1, 3 * hidden]), ty(&[1, 3 * hidden, hidden]), ty(&[1, 2, hidden])];
        Spec::of(op, operands).unwrap()
    }

    #[test]
    fn a_layer_that_is_too_wide_is_told_how_wide_it_may_be() {
        for architecture in ["sm_90a", "sm_80"] {
            let text = why(&gru(40_000), architecture);
            assert!(text.contains("its 40000 hidden units are more than the "), "{text}");
            let limit: u64 = text.rsplit_once("more than the ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
            let target = CudaTarget { architecture: architecture.parse().unwrap(), allow_tf32: false };
            assert!(select(&gru(limit), &target).is_ok(), "{text}");
            assert!(select(&gru(limit + 1), &target).is_err(), "{text}");
        }
    }

    #[test]
    fn a_choice_among_too_many_is_told_among_how_many() {
        let op = Op::TopK { axis: 0, k: 5, largest: true, sorted: true };
        let text = why(&Spec::of(op, vec![TensorType::new(DType::F32, &[1 << 32])]).unwrap(), "sm_90a");
        assert!(text.contains("its 4294967296 elements to choose from are more than the 2147483647"), "{text}");
    }
}
