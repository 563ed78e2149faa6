//! Concatenations: operands without elements are left out, and one of one operand is that operand.
//!
//! before  %y = concat %a, %empty, %b {axis 1}     after  %y = concat %a, %b {axis 1}

use std::sync::Arc;

use ir::ValueId;
use planfile::Op;

use super::sweep::{Call, Step, Sweep};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let Op::Concat { axis } = call.op else { return Ok(None) };
    if let &[x] = call.operands.as_slice() {
        return Ok(Some(Step::Values(vec![x])));
    }
    let adds = |value: &ValueId| sweep.ty(*value).dims[usize::from(axis)].fixed() != Some(0);
    let operands: Vec<ValueId> = call.operands.iter().copied().filter(adds).collect();
    let fewer = operands.len() < call.operands.len() && !operands.is_empty();
    let (op, origin) = (call.op.clone(), Arc::clone(&call.origin));
    Ok(fewer.then_some(Step::Call(Call { op, operands, origin })))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn empty_operands_are_left_out() {
        check(
            "%x: f32[2, 3]
             %e: f32[2, 0]
             %a = concat %x, %e, %x {axis 1}
             %b = concat %e, %x {axis 1}
             %y = pointwise %b {exp($0)}
             return %a, %y",
            "%x: f32[2, 3]
             %e: f32[2, 0]
             %a = concat %x, %x {axis 1}
             %y = pointwise %x {exp($0)}
             return %a, %y",
        );
    }

    #[test]
    fn only_empty_operands_stay_empty() {
        check_unchanged(
            "%d: f32[0, 3]
             %e: f32[0, 3]
             %a = concat %d, %e {axis 1}
             return %a",
        );
    }
}
