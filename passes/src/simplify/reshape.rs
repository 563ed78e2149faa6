//! Reshapes: one in a row, none that change nothing.
//!
//! before  %a = reshape %x [6, 4]       after  %y = reshape %x [2, 12]
//!         %y = reshape %a [2, 12]
//!
//! before  %a = reshape %x [16, 32, 8]     # %x: [2, 8, 32, 8]     after  %y = transpose %x [0, 1, 3, 2]
//!         %t = transpose %a [0, 2, 1]
//!         %y = reshape %t [2, 8, 8, 32]
//!
//! Exporters merge the batch and the heads around a transpose; neither could be split over devices then. Splitting the
//! dimensions before the transpose instead of after it lets the two reshapes meet.

use std::ops::Range;
use std::sync::Arc;

use ir::ValueId;
use planfile::{Dim, Op};

use super::sweep::{Call, Step, Sweep, union};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let (Op::Reshape { dims }, &[x]) = (&call.op, call.operands.as_slice()) else { return Ok(None) };
    if sweep.ty(x).dims == *dims {
        return Ok(Some(Step::Values(vec![x])));
    }
    if let Some(node) = sweep.producer(x).filter(|node| matches!(node.op, Op::Reshape { .. })) {
        let origin = union(&node.origin, &call.origin);
        return Ok(Some(Step::Call(Call { op: call.op.clone(), operands: node.operands.clone(), origin })));
    }
    split_before_transpose(sweep, call, x, dims)
}

/// `reshape (transpose (reshape x))` with the last one's splits moved into the first.
fn split_before_transpose(
    sweep: &mut Sweep<'_, '_, '_>,
    call: &Call,
    x: ValueId,
    dims: &[Dim],
) -> Result<Option<Step>, PassError> {
    let Some(node) = sweep.producer(x) else { return Ok(None) };
    let (Op::Transpose { permutation }, &[inner]) = (&node.op, node.operands.as_slice()) else { return Ok(None) };
    let reshaped = sweep.producer(inner).is_some_and(|node| matches!(node.op, Op::Reshape { .. }));
    let Some(groups) = splits(&sweep.ty(x).dims, dims).filter(|_| reshaped) else { return Ok(None) };
    // The runs in the order of the dimensions before the transpose, and where each starts.
    let (mut split, mut starts) = (Vec::new(), vec![0; permutation.len()]);
    for (axis, start) in starts.iter_mut().enumerate() {
        let to = permutation.iter().position(|&from| usize::from(from) == axis).unwrap_or(axis);
        *start = split.len();
        split.extend_from_slice(&dims[groups[to].clone()]);
    }
    let moved = permutation.iter().zip(&groups);
    let moved = moved.flat_map(|(&from, group)| (0..group.len()).map(move |offset| (usize::from(from), offset)));
    let permutation = moved.map(|(from, offset)| (starts[from] + offset) as u8).collect();
    let origin = union(&node.origin, &call.origin);
    let value = sweep.emit_one(Op::Reshape { dims: split }, inner, &call.origin)?;
    Ok(Some(Step::Call(Call { op: Op::Transpose { permutation }, operands: vec![value], origin })))
}

/// For each dimension of `from`, the run of `to` that it is split into; `None` when some are merged.
fn splits(from: &[Dim], to: &[Dim]) -> Option<Vec<Range<usize>>> {
    let (mut next, mut groups) = (0, Vec::new());
    for (axis, dim) in from.iter().enumerate() {
        let (first, size) = (next, dim.fixed().filter(|&size| size > 0)?);
        let mut product = 1;
        while product < size {
            product *= to.get(next)?.fixed()?;
            next += 1;
        }
        let last = axis + 1 == from.len();
        while to.get(next) == Some(&Dim::Static(1)) && (last || next == first) {
            next += 1;
        }
        (product == size).then_some(())?;
        groups.push(first..next);
    }
    (next == to.len()).then_some(groups)
}

/// The operand of a reshape that only puts dimensions of size 1 in front, which broadcasting does by itself.
pub(super) fn behind_leading_ones(sweep: &Sweep<'_, '_, '_>, value: ValueId) -> Option<ValueId> {
    let node = sweep.producer(value).filter(|node| matches!(node.op, Op::Reshape { .. }))?;
    let &[x] = node.operands.as_slice() else { return None };
    let (inner, outer) = (&sweep.ty(x).dims, &sweep.ty(value).dims);
    let added = outer.len().checked_sub(inner.len())?;
    let only_ones = added > 0 && outer[added..] == inner[..] && outer[..added].iter().all(|dim| *dim == Dim::Static(1));
    only_ones.then_some(x)
}

/// A reshape of `x` in place of a call.
pub(super) fn instead(call: &Call, x: ValueId, dims: Vec<Dim>) -> Step {
    Step::Call(Call { op: Op::Reshape { dims }, operands: vec![x], origin: Arc::clone(&call.origin) })
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn two_in_a_row_are_one() {
        check(
            "%x: f32[6, 4]
             %a: f32[24] = reshape %x     # a
             %b: f32[2, 12] = reshape %a  # b
             return %b",
            "%x: f32[6, 4]
             %b: f32[2, 12] = reshape %x  # a + b
             return %b",
        );
    }

    #[test]
    fn there_and_back_is_nothing() {
        check(
            "%x: f32[6, 4]
             %a: f32[24] = reshape %x
             %b: f32[6, 4] = reshape %a
             %y = pointwise %b {exp($0)}
             return %y",
            "%x: f32[6, 4]
             %y = pointwise %x {exp($0)}
             return %y",
        );
    }

    #[test]
    fn a_first_one_with_other_readers_stays() {
        check(
            "%x: f32[6, 4]
             %a: f32[24] = reshape %x
             %b: f32[2, 12] = reshape %a
             return %a, %b",
            "%x: f32[6, 4]
             %a: f32[24] = reshape %x
             %b: f32[2, 12] = reshape %x
             return %a, %b",
        );
    }

    #[test]
    fn dimensions_are_split_before_a_transpose() {
        check(
            "%x: f32[2, 4, 6, 3]
             %a: f32[8, 6, 3] = reshape %x
             %t = transpose %a [0, 2, 1]
             %y: f32[2, 4, 3, 6] = reshape %t
             return %y",
            "%x: f32[2, 4, 6, 3]
             %y = transpose %x [0, 1, 3, 2]
             return %y",
        );
    }

    #[test]
    fn dimensions_of_size_1_come_along() {
        check(
            "%x: f32[6, 4]
             %a: f32[2, 3, 4] = reshape %x
             %t = transpose %a [2, 0, 1]
             %y: f32[1, 2, 2, 2, 1, 3, 1] = reshape %t
             return %y",
            "%x: f32[6, 4]
             %a: f32[2, 1, 3, 1, 1, 2, 2] = reshape %x
             %y = transpose %a [4, 5, 6, 0, 1, 2, 3]
             return %y",
        );
    }

    #[test]
    fn merging_after_a_transpose_stays() {
        check_unchanged(
            "%x: f32[24]
             %a: f32[2, 3, 4] = reshape %x
             %t = transpose %a [1, 0, 2]
             %y: f32[3, 8] = reshape %t
             return %y",
        );
    }

    #[test]
    fn one_alone_stays() {
        check_unchanged(
            "%x: f32[6, 4]
             %a: f32[24] = reshape %x
             return %a",
        );
    }
}
