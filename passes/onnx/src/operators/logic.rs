//! Logic on booleans, and on the bits of integers.

use ir::ValueId;
use planfile::{Binary, DType, Expr, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("And",        7,  |ctx| logical(ctx, Binary::And)),
    row("BitShift",   11, shift),
    row("BitwiseAnd", 18, |ctx| bitwise(ctx, Binary::And)),
    row("BitwiseNot", 18, |ctx| not(ctx, false)),
    row("BitwiseOr",  18, |ctx| bitwise(ctx, Binary::Or)),
    row("BitwiseXor", 18, |ctx| bitwise(ctx, Binary::Xor)),
    row("Not",        1,  |ctx| not(ctx, true)),
    row("Or",         7,  |ctx| logical(ctx, Binary::Or)),
    row("Xor",        7,  |ctx| logical(ctx, Binary::Xor)),
];

fn require(ctx: &Context<'_>, value: ValueId, boolean: bool) -> Result<(), OpError> {
    let dtype = ctx.dtype(value);
    match (boolean, dtype == DType::Bool) {
        (true, false) => Err(ctx.invalid(&format!("operand is {dtype}, expected bool"))),
        (false, true) => Err(ctx.invalid("operand is bool, expected an integer")),
        (true, true) | (false, false) => Ok(()),
    }
}

fn two(ctx: &mut Context<'_>, op: Binary, boolean: bool) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    require(ctx, a, boolean)?;
    Ok(vec![ctx.pointwise(Expr::operand(0).binary(op, Expr::operand(1)), &[a, b])?])
}

fn logical(ctx: &mut Context<'_>, op: Binary) -> Result<Vec<ValueId>, OpError> {
    two(ctx, op, true)
}

fn bitwise(ctx: &mut Context<'_>, op: Binary) -> Result<Vec<ValueId>, OpError> {
    two(ctx, op, false)
}

fn not(ctx: &mut Context<'_>, boolean: bool) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    require(ctx, x, boolean)?;
    Ok(vec![ctx.pointwise(Expr::operand(0).unary(Unary::Not), &[x])?])
}

fn shift(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    match ctx.string("direction", "")?.as_str() {
        "LEFT" => bitwise(ctx, Binary::ShiftLeft),
        "RIGHT" => bitwise(ctx, Binary::ShiftRight),
        other => Err(ctx.invalid(&format!("attribute `direction` is `{other}`, not `LEFT` or `RIGHT`"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, bools, tensor};

    #[test]
    fn logic_on_booleans() {
        let case = |op| {
            let [a, b] = [[false, false, true, true], [false, true, false, true]];
            Case::new(op, 7).input(bools(&[4], &a)).input(bools(&[4], &b))
        };
        assert_eq!(case("And").one(), bools(&[4], &[false, false, false, true]));
        assert_eq!(case("Or").one(), bools(&[4], &[false, true, true, true]));
        assert_eq!(case("Xor").one(), bools(&[4], &[false, true, true, false]));
        assert_eq!(Case::new("Not", 7).input(bools(&[2], &[true, false])).one(), bools(&[2], &[false, true]));
        assert!(Case::new("Not", 7).input(tensor(&[1], &[1i64])).error().contains("expected bool"));
    }

    #[test]
    fn logic_on_bits() {
        let case = |op| Case::new(op, 18).input(tensor(&[2], &[0b1100u8, 0b1010])).input(tensor(&[1], &[0b0110u8]));
        assert_eq!(case("BitwiseAnd").one(), tensor(&[2], &[0b0100u8, 0b0010]));
        assert_eq!(case("BitwiseOr").one(), tensor(&[2], &[0b1110u8, 0b1110]));
        assert_eq!(case("BitwiseXor").one(), tensor(&[2], &[0b1010u8, 0b1100]));
        let not = Case::new("BitwiseNot", 18).input(tensor(&[1], &[0b1111_0000u8])).one();
        assert_eq!(not, tensor(&[1], &[0b0000_1111u8]));
    }

    #[test]
    fn shifts_both_ways() {
        let case = Case::new("BitShift", 11).input(tensor(&[2], &[16u32, 5])).input(tensor(&[2], &[2u32, 1]));
        assert_eq!(case.clone().string("direction", "RIGHT").one(), tensor(&[2], &[4u32, 2]));
        assert_eq!(case.clone().string("direction", "LEFT").one(), tensor(&[2], &[64u32, 10]));
        assert!(case.error().contains("direction"));
    }
}
