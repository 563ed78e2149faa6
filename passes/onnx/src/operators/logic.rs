//! Logic on booleans, and on the bits of integers: ONNX's types for each operator keep the two apart.

use ir::ValueId;
use planfile::{Binary, Expr, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("And",        7,  |ctx| two(ctx, Binary::And)),
    row("BitShift",   11, shift),
    row("BitwiseAnd", 18, |ctx| two(ctx, Binary::And)),
    row("BitwiseNot", 18, not),
    row("BitwiseOr",  18, |ctx| two(ctx, Binary::Or)),
    row("BitwiseXor", 18, |ctx| two(ctx, Binary::Xor)),
    row("Not",        1,  not),
    row("Or",         7,  |ctx| two(ctx, Binary::Or)),
    row("Xor",        7,  |ctx| two(ctx, Binary::Xor)),
];

fn two(ctx: &mut Context<'_>, op: Binary) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    Ok(vec![ctx.pointwise(Expr::operand(0).binary(op, Expr::operand(1)), &[a, b])?])
}

fn not(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    Ok(vec![ctx.pointwise(Expr::operand(0).unary(Unary::Not), &[x])?])
}

fn shift(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    match ctx.string("direction", "")?.as_str() {
        "LEFT" => two(ctx, Binary::ShiftLeft),
        "RIGHT" => two(ctx, Binary::ShiftRight),
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
        assert!(Case::new("Not", 7).input(tensor(&[1], &[1i64])).error().contains("is i64; allowed: bool"));
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
        let signed =
            Case::new("BitShift", 28).input(tensor(&[3], &[-8i32, -8, 5])).input(tensor(&[3], &[1i32, -1, 40]));
        assert_eq!(signed.clone().string("direction", "RIGHT").one(), tensor(&[3], &[-4i32, -1, 0]));
        assert_eq!(signed.string("direction", "LEFT").one(), tensor(&[3], &[-16i32, 0, 0]));
    }
}
