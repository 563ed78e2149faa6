//! Comparisons, and choice by a condition.

use ir::ValueId;
use planfile::{Compare, Expr};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Equal",          7,  |ctx| compare(ctx, Compare::Eq)),
    row("Greater",        7,  |ctx| compare(ctx, Compare::Gt)),
    row("GreaterOrEqual", 12, |ctx| compare(ctx, Compare::Ge)),
    row("Less",           7,  |ctx| compare(ctx, Compare::Lt)),
    row("LessOrEqual",    12, |ctx| compare(ctx, Compare::Le)),
    row("Where",          9,  select),
];

fn compare(ctx: &mut Context<'_>, op: Compare) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    Ok(vec![ctx.pointwise(Expr::operand(0).compare(op, Expr::operand(1)), &[a, b])?])
}

fn select(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let operands = [ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?];
    Ok(vec![ctx.pointwise(Expr::operand(0).select(Expr::operand(1), Expr::operand(2)), &operands)?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, bools, tensor};

    #[test]
    fn compares_and_broadcasts() {
        let case = |op| Case::new(op, 16).input(tensor(&[3], &[1f32, 2.0, 3.0])).input(tensor(&[], &[2f32]));
        for (op, expected) in [
            ("Equal", [false, true, false]),
            ("Greater", [false, false, true]),
            ("GreaterOrEqual", [false, true, true]),
            ("Less", [true, false, false]),
            ("LessOrEqual", [true, true, false]),
        ] {
            assert_eq!(case(op).one(), bools(&[3], &expected), "{op}");
        }
        let mixed = Case::new("Equal", 13).input(tensor(&[1], &[1f32])).input(tensor(&[1], &[1i64]));
        assert!(mixed.error().contains("(`A`) is f32 and input 1 (`B`) is i64"), "{}", mixed.error());
    }

    #[test]
    fn chooses_by_a_condition() {
        let case = Case::new("Where", 16)
            .input(bools(&[2, 1], &[true, false]))
            .input(tensor(&[2], &[1f32, 2.0]))
            .constant(tensor(&[], &[f32::NEG_INFINITY]));
        assert_close(&case.one(), &[2, 2], &[1.0, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    }
}
