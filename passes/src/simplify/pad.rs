//! Padding by nothing is dropped; padding that only crops is a slice.
//!
//! before  %y = pad %x {low [0, -1], high [0, 0]}     after  %y = slice %x [0:, 1:]

use std::sync::Arc;

use planfile::{Op, RankScalar};

use super::sweep::{Call, Step, Sweep};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let Op::Pad { low, high, .. } = &call.op else { return Ok(None) };
    let Some(&x) = call.operands.first() else { return Ok(None) };
    let ty = sweep.ty(x);
    let mut amounts = low.iter().chain(high);
    if amounts.any(|&amount| amount > 0) || ty.dims.iter().any(|dim| dim.fixed().is_none()) {
        return Ok(None);
    }
    let cropped = ty
        .sizes()
        .into_iter()
        .zip(low)
        .zip(high)
        .map(|((size, low), high)| size.checked_sub(low.unsigned_abs())?.checked_sub(high.unsigned_abs()));
    // More cropped than there is: the verifier's to report.
    let Some(sizes) = cropped.collect::<Option<Vec<u64>>>() else { return Ok(None) };
    let starts = low.iter().map(|amount| RankScalar::Uniform(-amount)).collect();
    let op = Op::Slice { starts, steps: vec![1; sizes.len()], sizes };
    Ok(Some(Step::Call(Call { op, operands: vec![x], origin: Arc::clone(&call.origin) })))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn by_nothing_is_the_operand() {
        check(
            "%x: f32[2, 3]
             %v: f32[]
             %a = pad %x, %v {low [0, 0], high [0, 0]}
             %y = pointwise %a {exp($0)}
             return %y",
            "%x: f32[2, 3]
             %v: f32[]
             %y = pointwise %x {exp($0)}
             return %y",
        );
    }

    #[test]
    fn cropping_is_a_slice() {
        check(
            "%x: f32[2, 5]
             %a = pad %x {low [0, -1], high [0, -2], edge}
             return %a",
            "%x: f32[2, 5]
             %a: f32[2, 2] = slice %x {starts [0, 1]}
             return %a",
        );
    }

    #[test]
    fn padding_stays() {
        check_unchanged(
            "%x: f32[2, 5]
             %a = pad %x {low [0, -1], high [0, 2], edge}
             return %a",
        );
    }
}
