//! Slices: one in a row, none that take everything, and straight from the part of a concatenation that they take.
//!
//! before  %c = concat %a, %b {axis 0}            after  %y = slice %b [1:3]
//!         %y = slice %c [5:7]     # %a: f32[4]

use std::sync::Arc;

use ir::ValueId;
use planfile::{Op, RankScalar};

use super::sweep::{Call, Step, Sweep, union};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let Op::Slice { starts, steps, sizes } = &call.op else { return Ok(None) };
    let &[x] = call.operands.as_slice() else { return Ok(None) };
    let Some(starts) = uniform(starts) else { return Ok(None) };
    let slice = |starts: Vec<i64>, steps: Vec<i64>, operand: ValueId, origin| {
        let starts = starts.into_iter().map(RankScalar::Uniform).collect();
        Step::Call(Call { op: Op::Slice { starts, steps, sizes: sizes.clone() }, operands: vec![operand], origin })
    };
    // A step between fewer than two elements means nothing, nor does the start of none.
    let canonical_steps: Vec<i64> =
        steps.iter().zip(sizes).map(|(&step, &size)| if size < 2 { 1 } else { step }).collect();
    let canonical_starts: Vec<i64> =
        starts.iter().zip(sizes).map(|(&start, &size)| if size == 0 { 0 } else { start }).collect();
    if canonical_steps != *steps || canonical_starts != starts {
        return Ok(Some(slice(canonical_starts, canonical_steps, x, Arc::clone(&call.origin))));
    }
    let ty = sweep.ty(x);
    let all = ty.dims.iter().zip(sizes).all(|(dim, &size)| dim.fixed() == Some(size));
    if all && starts.iter().all(|&start| start == 0) && steps.iter().all(|&step| step == 1) {
        return Ok(Some(Step::Values(vec![x])));
    }
    let Some(node) = sweep.producer(x) else { return Ok(None) };
    match &node.op {
        Op::Slice { starts: inner, steps: strides, .. } => {
            let Some(inner) = uniform(inner) else { return Ok(None) };
            // Both slices lie within their operands, so no product or sum leaves 63 bits.
            let merged = inner.iter().zip(strides).zip(&starts).map(|((first, stride), start)| first + stride * start);
            let strides = strides.iter().zip(steps).map(|(stride, step)| stride * step).collect();
            let operand = node.operands[0];
            Ok(Some(slice(merged.collect(), strides, operand, union(&node.origin, &call.origin))))
        }
        Op::Concat { axis } => {
            let axis = usize::from(*axis);
            if sizes[axis] == 0 {
                return Ok(None);
            }
            let last = starts[axis] + steps[axis] * (sizes[axis] as i64 - 1);
            let (low, high) = (starts[axis].min(last), starts[axis].max(last));
            let mut offset = 0i64;
            for &operand in &node.operands {
                let size = sweep.ty(operand).size(axis) as i64;
                if low >= offset && high < offset + size {
                    let mut starts = starts;
                    starts[axis] -= offset;
                    return Ok(Some(slice(starts, steps.clone(), operand, union(&node.origin, &call.origin))));
                }
                offset += size;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Starts that are the same on every rank.
fn uniform(starts: &[RankScalar]) -> Option<Vec<i64>> {
    let starts = starts.iter().map(|start| match start {
        RankScalar::Uniform(start) => Some(*start),
        RankScalar::ByRank(_) => None,
    });
    starts.collect()
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn two_in_a_row_are_one() {
        check(
            "%x: f32[20, 3]
             %a: f32[6, 3] = slice %x {starts [2, 0], steps [3, 1]}
             %b: f32[3, 2] = slice %a {starts [5, 1], steps [-2, 1]}
             return %b",
            "%x: f32[20, 3]
             %b: f32[3, 2] = slice %x {starts [17, 1], steps [-6, 1]}
             return %b",
        );
    }

    #[test]
    fn everything_is_the_operand() {
        check(
            "%x: f32[4, 1]
             %a: f32[4, 1] = slice %x {starts [0, 0], steps [1, -1]}
             %y = pointwise %a {exp($0)}
             return %y",
            "%x: f32[4, 1]
             %y = pointwise %x {exp($0)}
             return %y",
        );
    }

    #[test]
    fn a_part_of_a_concatenation_is_taken_from_its_operand() {
        check(
            "%a: f32[4]
             %b: f32[5]
             %c = concat %a, %b {axis 0}
             %y: f32[2] = slice %c {starts [5]}
             %z: f32[5] = slice %c {starts [4]}
             return %y, %z",
            "%a: f32[4]
             %b: f32[5]
             %y: f32[2] = slice %b {starts [1]}
             return %y, %b",
        );
    }

    #[test]
    fn parts_of_two_operands_stay() {
        check_unchanged(
            "%a: f32[4]
             %b: f32[5]
             %c = concat %a, %b {axis 0}
             %y: f32[2] = slice %c {starts [3]}
             return %y",
        );
    }

    #[test]
    fn backwards_stays() {
        check_unchanged(
            "%a: f32[4]
             %y: f32[4] = slice %a {starts [3], steps [-1]}
             return %y",
        );
    }
}
