//! Reductions over axes.
//!
//! Axes are an attribute or an input, by version; both forms are read alike. Reductions made of several steps run in
//! the accumulation type: `f32` for half types, `f64` for integers that pass through a root or a logarithm.

use ir::ValueId;
use planfile::op::ReduceKind;
use planfile::{Binary, Combine, DType, Expr, Op, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("ReduceSum",       1, |ctx| combine(ctx, Combine::Sum)),
    row("ReduceProd",      1, |ctx| combine(ctx, Combine::Prod)),
    row("ReduceMax",       1, |ctx| combine(ctx, Combine::Max)),
    row("ReduceMin",       1, |ctx| combine(ctx, Combine::Min)),
    row("ReduceMean",      1, mean),
    row("ReduceL1",        1, |ctx| norm(ctx, 1)),
    row("ReduceL2",        1, |ctx| norm(ctx, 2)),
    row("ReduceSumSquare", 1, sum_square),
    row("ReduceLogSum",    1, log_sum),
    row("ReduceLogSumExp", 1, log_sum_exp),
    row("ArgMax",          1, |ctx| extremum(ctx, true)),
    row("ArgMin",          1, |ctx| extremum(ctx, false)),
];

/// The input, the axes to reduce and whether they stay.
fn arguments(ctx: &mut Context<'_>) -> Result<(ValueId, Vec<u8>, bool), OpError> {
    let x = ctx.operand(0)?;
    let rank = ctx.rank(x);
    let stated = match ctx.optional(1) {
        Some(axes) => ctx.constant_i64s(axes)?,
        None => ctx.ints("axes")?.unwrap_or_default(),
    };
    let axes = if stated.is_empty() && !ctx.flag("noop_with_empty_axes", false)? {
        (0..rank).map(|axis| axis as u8).collect()
    } else {
        let mut axes = ctx.axes(&stated, rank)?;
        axes.sort_unstable();
        axes
    };
    Ok((x, axes, ctx.flag("keepdims", true)?))
}

/// No node where there is nothing to reduce.
fn reduce(ctx: &mut Context<'_>, x: ValueId, kind: ReduceKind, axes: Vec<u8>, keep: bool) -> Result<ValueId, OpError> {
    if axes.is_empty() {
        return Ok(x);
    }
    ctx.emit(Op::Reduce { kind, axes, keep }, &[x])
}

fn combine(ctx: &mut Context<'_>, combine: Combine) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    let kind = ReduceKind::Combine(combine);
    // The order of booleans is that of the numbers 0 and 1.
    let bytes = ctx.dtype(x) == DType::Bool;
    let x = if bytes { ctx.cast(x, DType::U8)? } else { x };
    let y = reduce(ctx, x, kind, axes, keep)?;
    Ok(vec![if bytes { ctx.cast(y, DType::Bool)? } else { y }])
}

fn mean(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    Ok(vec![reduce(ctx, x, ReduceKind::Mean, axes, keep)?])
}

fn norm(ctx: &mut Context<'_>, p: u64) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    Ok(vec![norm_of(ctx, x, p, axes, keep)?])
}

/// `(sum |x|^p)^(1/p)` over `axes`, in the type of `x`.
pub(super) fn norm_of(
    ctx: &mut Context<'_>,
    x: ValueId,
    p: u64,
    axes: Vec<u8>,
    keep: bool,
) -> Result<ValueId, OpError> {
    let dtype = ctx.dtype(x);
    let wide = if p == 1 { dtype.accumulator() } else { real(dtype) };
    let value = Expr::operand(0).cast(wide);
    let unsigned = wide.is_integer() && !wide.is_signed_integer();
    let power = match p {
        1 if unsigned => value,
        1 => value.unary(Unary::Abs),
        2 => square(0, wide),
        _ => value.unary(Unary::Abs).binary(Binary::Pow, number(wide, p as f64)),
    };
    let powers = ctx.pointwise(power, &[x])?;
    let sum = reduce(ctx, powers, ReduceKind::Combine(Combine::Sum), axes, keep)?;
    let root = match p {
        1 => return ctx.cast(sum, dtype),
        2 => Expr::operand(0).unary(Unary::Sqrt),
        _ => Expr::operand(0).binary(Binary::Pow, number(wide, 1.0 / p as f64)),
    };
    ctx.pointwise(root.cast(dtype), &[sum])
}

/// The floating-point type that steps on values of `dtype` run in.
fn real(dtype: DType) -> DType {
    if dtype.is_float() { dtype.accumulator() } else { DType::F64 }
}

fn square(operand: u16, wide: DType) -> Expr {
    Expr::operand(operand).cast(wide).binary(Binary::Mul, Expr::operand(operand).cast(wide))
}

fn sum_square(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    let dtype = ctx.dtype(x);
    let squares = ctx.pointwise(square(0, dtype.accumulator()), &[x])?;
    let sum = reduce(ctx, squares, ReduceKind::Combine(Combine::Sum), axes, keep)?;
    Ok(vec![ctx.cast(sum, dtype)?])
}

fn log_sum(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    let dtype = ctx.dtype(x);
    let x = ctx.cast(x, real(dtype))?;
    let sum = reduce(ctx, x, ReduceKind::Combine(Combine::Sum), axes, keep)?;
    Ok(vec![ctx.pointwise(Expr::operand(0).unary(Unary::Log).cast(dtype), &[sum])?])
}

/// `log(sum(exp(x - m))) + m` with the largest element `m`, so that nothing overflows.
fn log_sum_exp(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, axes, keep) = arguments(ctx)?;
    let dtype = ctx.dtype(x);
    let wide = real(dtype);
    let x = ctx.cast(x, wide)?;
    let largest = reduce(ctx, x, ReduceKind::Combine(Combine::Max), axes.clone(), true)?;
    // An infinite maximum shifts nothing: the difference would be NaN.
    let shift = Expr::operand(0).unary(Unary::IsInf).select(number(wide, 0.0), Expr::operand(0));
    let shift = ctx.pointwise(shift, &[largest])?;
    let powers = Expr::operand(0).binary(Binary::Sub, Expr::operand(1)).unary(Unary::Exp);
    let powers = ctx.pointwise(powers, &[x, shift])?;
    let sum = reduce(ctx, powers, ReduceKind::Combine(Combine::Sum), axes, keep)?;
    let shift = ctx.reshape(shift, &ctx.sizes(sum))?;
    let result = Expr::operand(0).unary(Unary::Log).binary(Binary::Add, Expr::operand(1)).cast(dtype);
    Ok(vec![ctx.pointwise(result, &[sum, shift])?])
}

fn extremum(ctx: &mut Context<'_>, largest: bool) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axis = ctx.axis(ctx.int("axis", 0)?, ctx.rank(x))?;
    let last = ctx.flag("select_last_index", false)?;
    let kind = if largest { ReduceKind::ArgMax { last } } else { ReduceKind::ArgMin { last } };
    let keep = ctx.flag("keepdims", true)?;
    Ok(vec![ctx.emit(Op::Reduce { kind, axes: vec![axis], keep }, &[x])?])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, assert_close, bools, tensor};

    fn x() -> Tensor {
        tensor(&[2, 2], &[1f32, -2.0, 3.0, 4.0])
    }

    #[test]
    fn axes_are_an_attribute_or_an_input() {
        let attribute = Case::new("ReduceSum", 11).ints("axes", &[-1]).int("keepdims", 0).input(x());
        assert_close(&attribute.one(), &[2], &[-1.0, 7.0]);
        let input = Case::new("ReduceSum", 13).int("keepdims", 0).input(x()).constant(tensor(&[1], &[0i64]));
        assert_close(&input.one(), &[2], &[4.0, 2.0]);
        assert_close(&Case::new("ReduceSum", 13).input(x()).one(), &[1, 1], &[6.0]);
    }

    #[test]
    fn without_axes_the_other_steps_remain() {
        let case = |op: &str| Case::new(op, 18).int("noop_with_empty_axes", 1).input(x());
        assert_close(&case("ReduceSum").one(), &[2, 2], &[1.0, -2.0, 3.0, 4.0]);
        assert_close(&case("ReduceSumSquare").one(), &[2, 2], &[1.0, 4.0, 9.0, 16.0]);
    }

    #[test]
    fn composite_reductions() {
        let case = |op: &str| Case::new(op, 13).ints("axes", &[1]).int("keepdims", 0).input(x()).one();
        assert_close(&case("ReduceMean"), &[2], &[-0.5, 3.5]);
        assert_close(&case("ReduceProd"), &[2], &[-2.0, 12.0]);
        assert_close(&case("ReduceL1"), &[2], &[3.0, 7.0]);
        assert_close(&case("ReduceL2"), &[2], &[5f32.sqrt(), 5.0]);
        let expected = [(1f32.exp() + (-2f32).exp()).ln(), (3f32.exp() + 4f32.exp()).ln()];
        assert_close(&case("ReduceLogSumExp"), &[2], &expected);
        assert_close(&case("ReduceMax"), &[2], &[1.0, 4.0]);
    }

    #[test]
    fn large_exponents_do_not_overflow() {
        let x = tensor(&[2], &[1000f32, f32::NEG_INFINITY]);
        assert_close(&Case::new("ReduceLogSumExp", 18).input(x).one(), &[1], &[1000.0]);
        let nothing = tensor(&[2], &[f32::NEG_INFINITY; 2]);
        assert_close(&Case::new("ReduceLogSumExp", 18).input(nothing).one(), &[1], &[f32::NEG_INFINITY]);
    }

    #[test]
    fn roots_of_integers_are_taken_in_floating_point() {
        let case = Case::new("ReduceL2", 18).input(tensor(&[2], &[3i32, 4]));
        assert_eq!(case.one(), tensor(&[1], &[5i32]));
    }

    #[test]
    fn booleans_have_a_maximum() {
        let case = Case::new("ReduceMax", 20).input(bools(&[2], &[false, true]));
        assert_eq!(case.one(), bools(&[1], &[true]));
    }

    #[test]
    fn equal_extrema_are_told_apart() {
        let case = |last| {
            let x = tensor(&[1, 3], &[5i32, 7, 7]);
            Case::new("ArgMax", 13).int("axis", 1).int("keepdims", 0).int("select_last_index", last).input(x).one()
        };
        assert_eq!(case(0), tensor(&[1], &[1i64]));
        assert_eq!(case(1), tensor(&[1], &[2i64]));
    }
}
