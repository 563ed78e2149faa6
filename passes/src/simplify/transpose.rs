//! Transposes: one in a row, none that change nothing; those that only move dimensions of size 1 are reshapes.
//!
//! before  %a = transpose %x [1, 0, 2]       after  %y = transpose %x [2, 0, 1]
//!         %y = transpose %a [2, 1, 0]

use planfile::{Dim, Op};

use super::reshape;
use super::sweep::{Call, Step, Sweep, union};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let (Op::Transpose { permutation }, &[x]) = (&call.op, call.operands.as_slice()) else { return Ok(None) };
    if permutation.iter().enumerate().all(|(axis, &from)| axis == usize::from(from)) {
        return Ok(Some(Step::Values(vec![x])));
    }
    if let Some(node) = sweep.producer(x)
        && let Op::Transpose { permutation: inner } = &node.op
    {
        let permutation = permutation.iter().map(|&axis| inner[usize::from(axis)]).collect();
        let (operands, origin) = (node.operands.clone(), union(&node.origin, &call.origin));
        return Ok(Some(Step::Call(Call { op: Op::Transpose { permutation }, operands, origin })));
    }
    let dims = &sweep.ty(x).dims;
    let wide: Vec<u8> = permutation.iter().copied().filter(|&axis| dims[usize::from(axis)] != Dim::Static(1)).collect();
    let dims = permutation.iter().map(|&axis| dims[usize::from(axis)]).collect();
    Ok(wide.is_sorted().then(|| reshape::instead(call, x, dims)))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn two_in_a_row_are_one() {
        check(
            "%x: f32[2, 3, 4]
             %a = transpose %x [1, 0, 2]
             %b = transpose %a [2, 1, 0]
             return %b",
            "%x: f32[2, 3, 4]
             %b = transpose %x [2, 0, 1]
             return %b",
        );
    }

    #[test]
    fn there_and_back_is_nothing() {
        check(
            "%x: f32[2, 3, 4]
             %a = transpose %x [1, 2, 0]
             %b = transpose %a [2, 0, 1]
             %y = pointwise %b {exp($0)}
             return %y",
            "%x: f32[2, 3, 4]
             %y = pointwise %x {exp($0)}
             return %y",
        );
    }

    #[test]
    fn moving_ones_is_a_reshape() {
        check(
            "%x: f32[2, 1, 4]
             %a = transpose %x [1, 0, 2]
             return %a",
            "%x: f32[2, 1, 4]
             %a: f32[1, 2, 4] = reshape %x
             return %a",
        );
    }

    #[test]
    fn moving_more_stays() {
        check_unchanged(
            "%x: f32[2, 1, 4]
             %a = transpose %x [2, 1, 0]
             return %a",
        );
    }
}
