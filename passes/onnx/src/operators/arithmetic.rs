//! Arithmetic of two or more values that broadcast to each other.

use ir::ValueId;
use planfile::{Binary, DType, Expr};

use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Add",  7,  |ctx| binary(ctx, Binary::Add)),
    row("Div",  7,  |ctx| binary(ctx, Binary::Div)),
    row("Max",  6,  |ctx| variadic(ctx, Binary::Max)),
    row("Mean", 6,  mean),
    row("Min",  6,  |ctx| variadic(ctx, Binary::Min)),
    row("Mod",  10, modulo),
    row("Mul",  7,  |ctx| binary(ctx, Binary::Mul)),
    row("Pow",  7,  pow),
    row("Sub",  7,  |ctx| binary(ctx, Binary::Sub)),
    row("Sum",  6,  |ctx| variadic(ctx, Binary::Add)),
];

/// Operands of one expression of a variadic operator; more are taken in several steps.
const OPERANDS_PER_STEP: usize = 64;

fn binary(ctx: &mut Context<'_>, op: Binary) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    Ok(vec![ctx.pointwise(Expr::operand(0).binary(op, Expr::operand(1)), &[a, b])?])
}

fn variadic(ctx: &mut Context<'_>, op: Binary) -> Result<Vec<ValueId>, OpError> {
    Ok(vec![fold(ctx, op)?])
}

/// All operands combined from left to right.
fn fold(ctx: &mut Context<'_>, op: Binary) -> Result<ValueId, OpError> {
    let operands = ctx.variadic()?;
    let (mut result, mut rest) = (operands[0], &operands[1..]);
    while !rest.is_empty() {
        let (step, later) = rest.split_at(rest.len().min(OPERANDS_PER_STEP));
        let expr = (1..=step.len()).fold(Expr::operand(0), |expr, i| expr.binary(op, Expr::operand(i as u16)));
        result = ctx.pointwise(expr, &[&[result], step].concat())?;
        rest = later;
    }
    Ok(result)
}

fn mean(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let sum = fold(ctx, Binary::Add)?;
    let count = number(ctx.dtype(sum), ctx.operands().len() as f64);
    Ok(vec![ctx.pointwise(Expr::operand(0).binary(Binary::Div, count), &[sum])?])
}

/// Floating-point operands of `fmod` = 0 are of opset 28; before, ONNX's reference divides them so, too.
fn modulo(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let fmod = ctx.flag("fmod", false)?;
    binary(ctx, if fmod { Binary::Rem } else { Binary::Mod })
}

/// The exponent's type may differ; the result has the base's.
fn pow(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (base, exponent) = (ctx.operand(0)?, ctx.operand(1)?);
    let (result, other) = (ctx.dtype(base), ctx.dtype(exponent));
    // An integer to a fractional power is computed in f64.
    let through = if result.is_integer() && other.is_float() { DType::F64 } else { result };
    let operand = |index, dtype| {
        let operand = Expr::operand(index);
        if dtype == through { operand } else { operand.cast(through) }
    };
    let power = operand(0, result).binary(Binary::Pow, operand(1, other));
    let expr = if through == result { power } else { power.cast(result) };
    Ok(vec![ctx.pointwise(expr, &[base, exponent])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn operands_broadcast() {
        let case = |op| Case::new(op, 14).input(tensor(&[2, 1], &[6f32, 8.0])).input(tensor(&[2], &[2f32, 4.0]));
        assert_close(&case("Add").one(), &[2, 2], &[8.0, 10.0, 10.0, 12.0]);
        assert_close(&case("Sub").one(), &[2, 2], &[4.0, 2.0, 6.0, 4.0]);
        assert_close(&case("Mul").one(), &[2, 2], &[12.0, 24.0, 16.0, 32.0]);
        assert_close(&case("Div").one(), &[2, 2], &[3.0, 1.5, 4.0, 2.0]);
        assert_close(&case("Max").one(), &[2, 2], &[6.0, 6.0, 8.0, 8.0]);
        assert_close(&case("Min").one(), &[2, 2], &[2.0, 4.0, 2.0, 4.0]);
        assert_close(&case("Mean").one(), &[2, 2], &[4.0, 5.0, 5.0, 6.0]);
        let wrong = Case::new("Add", 14).input(tensor(&[2], &[6f32, 8.0])).input(tensor(&[3], &[0f32; 3]));
        assert!(wrong.error().contains("f32[2] and f32[3] do not broadcast"), "{}", wrong.error());
    }

    #[test]
    fn integers_divide_toward_zero() {
        let case = |op| Case::new(op, 14).input(tensor(&[3], &[7i64, -7, 7])).input(tensor(&[3], &[2i64, 2, -2]));
        assert_eq!(case("Div").one(), tensor(&[3], &[3i64, -3, -3]));
        assert_eq!(case("Mod").one(), tensor(&[3], &[1i64, 1, -1]));
        assert_eq!(case("Mod").int("fmod", 1).one(), tensor(&[3], &[1i64, -1, 1]));
    }

    #[test]
    fn remainders_of_floats_have_the_sign_of_either() {
        let (a, b) = ([7f32, -7.5, 7.5, -6.0, 1.0, -1.0], [2f32, 2.0, -2.0, 2.0, f32::NEG_INFINITY, 0.5]);
        for opset in [10, 13, 28] {
            let case = || Case::new("Mod", opset).input(tensor(&[6], &a)).input(tensor(&[6], &b));
            let floor = case().one();
            assert_close(&floor, &[6], &[1.0, 0.5, -0.5, 0.0, f32::NEG_INFINITY, 0.0]);
            // A zero has the sign of the divisor.
            assert!(floor.elements::<f32>().unwrap()[3].is_sign_positive());
            let truncated = case().int("fmod", 1).one();
            assert_close(&truncated, &[6], &[1.0, -1.5, 1.5, 0.0, 1.0, 0.0]);
        }
    }

    #[test]
    fn powers_of_mixed_types_have_the_type_of_the_base() {
        let floats = Case::new("Pow", 13).input(tensor(&[2], &[1.5f32, -2.0])).constant(tensor(&[], &[2i64]));
        assert_close(&floats.one(), &[2], &[2.25, 4.0]);
        let integers = Case::new("Pow", 13).input(tensor(&[2], &[9i32, 4])).constant(tensor(&[], &[0.5f32]));
        assert_eq!(integers.one(), tensor(&[2], &[3i32, 2]));
    }

    #[test]
    fn sums_of_one_and_of_many_operands() {
        assert_close(&Case::new("Sum", 13).input(tensor(&[1], &[3f32])).one(), &[1], &[3.0]);
        let many = (0..200).fold(Case::new("Sum", 13), |case, i| case.input(tensor(&[1], &[i as f32])));
        assert_close(&many.one(), &[1], &[19_900.0]);
        assert!(Case::new("Sum", 13).error().contains("input 0 (`data_0`) is missing"));
    }
}
