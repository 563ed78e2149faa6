//! Broadcasts: one in a row; those that repeat nothing are reshapes.
//!
//! before  %a = broadcast %x [1, 4]          after  %y = broadcast %x [8, 4]
//!         %y = broadcast %a [8, 4]
//!
//! Those that only element-wise nodes read disappear on the other side, in `pointwise`.

use ir::ValueId;
use planfile::Op;

use super::reshape;
use super::sweep::{Call, Step, Sweep, union};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let (Op::Broadcast { dims }, &[x]) = (&call.op, call.operands.as_slice()) else { return Ok(None) };
    let ty = sweep.ty(x);
    // Sizes differ from 1 to something else only, so as many elements mean the same elements.
    let repeats = ty.dims.iter().rev().zip(dims.iter().rev()).any(|(from, to)| from != to)
        || dims[..dims.len() - ty.rank()].iter().any(|dim| dim.fixed() != Some(1));
    if !repeats {
        return Ok(Some(reshape::instead(call, x, dims.clone())));
    }
    if let Some(behind) = behind(sweep, x) {
        let inner = sweep.producer(x).map_or_else(|| call.origin.clone(), |node| node.origin.clone());
        let (op, origin) = (call.op.clone(), union(&inner, &call.origin));
        return Ok(Some(Step::Call(Call { op, operands: vec![behind], origin })));
    }
    Ok(None)
}

/// The value that broadcasts to the same as `value` does.
pub(super) fn behind(sweep: &Sweep<'_, '_, '_>, value: ValueId) -> Option<ValueId> {
    let broadcast = sweep.producer(value).filter(|node| matches!(node.op, Op::Broadcast { .. }));
    let source = broadcast.and_then(|node| node.operands.first().copied());
    source.or_else(|| reshape::behind_leading_ones(sweep, value))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn two_in_a_row_are_one() {
        check(
            "%x: f32[4]
             %a: f32[2, 4] = broadcast %x
             %b: f32[3, 2, 4] = broadcast %a
             return %b",
            "%x: f32[4]
             %b: f32[3, 2, 4] = broadcast %x
             return %b",
        );
    }

    #[test]
    fn repeating_nothing_is_a_reshape() {
        check(
            "%x: f32[4]
             %a: f32[1, 4] = broadcast %x
             return %a",
            "%x: f32[4]
             %a: f32[1, 4] = reshape %x
             return %a",
        );
    }

    #[test]
    fn one_that_a_product_reads_stays() {
        check_unchanged(
            "%x: f32[1, 4]
             %w: f32[2, 4]
             %a: f32[3, 4] = broadcast %x
             %y = dot %a, %w {contract [1]x[1]}
             return %y",
        );
    }
}
