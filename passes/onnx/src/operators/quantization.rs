//! Integer quantisation, written out as arithmetic: scales and zero points per tensor, per axis or per block.

use ir::ValueId;
use planfile::op::ReduceKind;
use planfile::{Binary, Combine, Compare, DType, Expr, Op, Unary};

use super::{Operator, row};
use crate::context::{Context, OpError, number};
use crate::tensor_data::ElemType;

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("QuantizeLinear",        10, quantize),
    row("DequantizeLinear",      10, dequantize),
    row("DynamicQuantizeLinear", 11, dynamic_quantize),
];

/// `saturate(round(x / scale) + zero)`. The division is in the type of the scale, or in `precision`.
fn quantize(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, scale) = (ctx.operand(0)?, ctx.operand(1)?);
    let precision = element_type(ctx, "precision")?.unwrap_or(ctx.dtype(scale));
    let zero = ctx.optional(2);
    let out = match (element_type(ctx, "output_dtype")?, zero) {
        (Some(dtype), _) => dtype,
        (None, Some(zero)) => ctx.dtype(zero),
        (None, None) => DType::U8,
    };
    if !out.is_integer() {
        return Err(ctx.unsupported(&format!("quantisation to {out}; quantise to an integer type")));
    }
    let scale = spread(ctx, x, scale)?;
    let wide = wide(precision);
    let ratio = Expr::operand(0).cast(precision).binary(Binary::Div, Expr::operand(1).cast(precision));
    let rounded = ratio.cast(wide).unary(Unary::Round);
    let (expr, operands) = match zero {
        None => (rounded, vec![x, scale]),
        Some(zero) => {
            let zero = spread(ctx, x, zero)?;
            (rounded.binary(Binary::Add, Expr::operand(2).cast(wide)), vec![x, scale, zero])
        }
    };
    Ok(vec![ctx.pointwise(expr.cast(out), &operands)?])
}

/// `(x - zero) * scale`, the difference exact in `i32`.
fn dequantize(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, scale) = (ctx.operand(0)?, ctx.operand(1)?);
    if !ctx.dtype(x).is_integer() {
        return Err(ctx.unsupported(&format!("dequantisation of {}; quantise to an integer type", ctx.dtype(x))));
    }
    let out = element_type(ctx, "output_dtype")?.unwrap_or(ctx.dtype(scale));
    let wide = wide(out);
    let scale = spread(ctx, x, scale)?;
    let value = Expr::operand(0).cast(DType::I32);
    let (value, operands) = match ctx.optional(2) {
        None => (value, vec![x, scale]),
        Some(zero) => {
            let zero = spread(ctx, x, zero)?;
            (value.binary(Binary::Sub, Expr::operand(2).cast(DType::I32)), vec![x, scale, zero])
        }
    };
    let product = value.cast(wide).binary(Binary::Mul, Expr::operand(1).cast(wide));
    Ok(vec![ctx.pointwise(product.cast(out), &operands)?])
}

/// Scale and zero point from the range of the values, which always includes 0.
fn dynamic_quantize(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let dtype = ctx.dtype(x);
    let axes: Vec<u8> = (0..ctx.rank(x)).map(|axis| axis as u8).collect();
    let mut extremum = |combine| {
        let op = Op::Reduce { kind: ReduceKind::Combine(combine), axes: axes.clone(), keep: false };
        ctx.emit(op, &[x])
    };
    let (low, high) = (extremum(Combine::Min)?, extremum(Combine::Max)?);
    let zero = || number(dtype, 0.0);
    let low_expr = |operand| Expr::operand(operand).binary(Binary::Min, zero());
    let high_expr = |operand| Expr::operand(operand).binary(Binary::Max, zero());
    let range = || high_expr(1).binary(Binary::Sub, low_expr(0));
    // Nothing but zeros: any scale will do.
    let range = range().compare(Compare::Eq, zero()).select(number(dtype, 1.0), range());
    let scale = ctx.pointwise(range.binary(Binary::Div, number(dtype, 255.0)), &[low, high])?;
    let offset = low_expr(0).unary(Unary::Neg).binary(Binary::Div, Expr::operand(1)).unary(Unary::Round);
    let zero_point = ctx.pointwise(offset.cast(DType::U8), &[low, scale])?;
    let ratio = Expr::operand(0).binary(Binary::Div, Expr::operand(1)).unary(Unary::Round);
    let quantized = ratio.binary(Binary::Add, Expr::operand(2).cast(dtype)).cast(DType::U8);
    Ok(vec![ctx.pointwise(quantized, &[x, scale, zero_point])?, scale, zero_point])
}

/// The type that arithmetic with values of `dtype` and 16-bit integers is exact enough in.
fn wide(dtype: DType) -> DType {
    dtype.accumulator()
}

/// An attribute that names an element type; 0 and absence mean none.
pub(super) fn element_type(ctx: &Context<'_>, name: &str) -> Result<Option<DType>, OpError> {
    match ctx.int(name, 0)? {
        0 => Ok(None),
        number => {
            let dtype = ElemType(i32::try_from(number).unwrap_or(-1)).dtype();
            dtype.map(Some).map_err(|problem| ctx.unsupported(&format!("attribute `{name}`: {problem}")))
        }
    }
}

/// A scale or zero point shaped so that it broadcasts to `x`.
fn spread(ctx: &mut Context<'_>, x: ValueId, parameter: ValueId) -> Result<ValueId, OpError> {
    let (sizes, shape) = (ctx.sizes(x), ctx.sizes(parameter));
    let block = ctx.int("block_size", 0)?;
    let axis = |ctx: &Context<'_>| ctx.int("axis", 1).and_then(|axis| ctx.axis(axis, sizes.len()));
    match shape.as_slice() {
        [] | [1] => ctx.reshape(parameter, &[]),
        [count] if block == 0 => {
            let axis = if sizes.len() == 1 { 0 } else { axis(ctx)? };
            let mut target = vec![1; sizes.len()];
            target[usize::from(axis)] = *count;
            ctx.reshape(parameter, &target)
        }
        _ if block > 0 && shape.len() == sizes.len() => {
            let axis = axis(ctx)?;
            repeat(ctx, parameter, axis, block as u64, sizes[usize::from(axis)])
        }
        _ => Err(ctx.invalid(&format!("scale or zero point {} for {}", ctx.ty(parameter), ctx.ty(x)))),
    }
}

/// Every element `times` times along `axis`, cut to `size`.
fn repeat(ctx: &mut Context<'_>, value: ValueId, axis: u8, times: u64, size: u64) -> Result<ValueId, OpError> {
    let position = usize::from(axis);
    let mut sizes = ctx.sizes(value);
    let expanded = ctx.unsqueeze(value, &[axis + 1])?;
    let mut target = ctx.sizes(expanded);
    target[position + 1] = times;
    let expanded = ctx.broadcast(expanded, &target)?;
    sizes[position] = ctx.count(&[sizes[position], times])?;
    if sizes[position] < size {
        return Err(ctx.invalid(&format!("{} elements in blocks of {times} do not cover {size}", ctx.ty(value))));
    }
    let merged = ctx.reshape(expanded, &sizes)?;
    ctx.slice_axis(merged, axis, 0, size)
}

/// `x - zero` as `dtype`; the zero point broadcasts to `x`.
pub(super) fn shifted(
    ctx: &mut Context<'_>,
    x: ValueId,
    zero: Option<ValueId>,
    dtype: DType,
) -> Result<ValueId, OpError> {
    let Some(zero) = zero else { return ctx.cast(x, dtype) };
    let difference = Expr::operand(0).cast(dtype).binary(Binary::Sub, Expr::operand(1).cast(dtype));
    let result = ctx.pointwise(difference, &[x, zero])?;
    if ctx.sizes(result) != ctx.sizes(x) {
        return Err(ctx.invalid(&format!("zero point {} does not broadcast to {}", ctx.ty(zero), ctx.ty(x))));
    }
    Ok(result)
}

/// A parameter of the left side of a matrix product: a vector holds one number per row.
pub(super) fn per_row(ctx: &mut Context<'_>, parameter: ValueId) -> Result<ValueId, OpError> {
    match ctx.sizes(parameter).as_slice() {
        [1] => ctx.reshape(parameter, &[]),
        &[rows] => ctx.reshape(parameter, &[rows, 1]),
        _ => Ok(parameter),
    }
}

/// A parameter of the right side of a matrix product: a vector holds one number per column.
pub(super) fn per_column(ctx: &mut Context<'_>, parameter: ValueId) -> Result<ValueId, OpError> {
    match ctx.sizes(parameter).as_slice() {
        [1] => ctx.reshape(parameter, &[]),
        _ => Ok(parameter),
    }
}

/// `saturate(round(sum * (left_scale * right_scale / scale)) + zero)` in the type of `zero`; computed in `f32`.
pub(super) fn requantize(
    ctx: &mut Context<'_>,
    sum: ValueId,
    left_scale: ValueId,
    right_scale: ValueId,
    scale: ValueId,
    zero: ValueId,
) -> Result<ValueId, OpError> {
    let out = ctx.dtype(zero);
    let scale = per_row(ctx, scale)?;
    let zero = per_row(ctx, zero)?;
    let real = |operand| Expr::operand(operand).cast(DType::F32);
    let factor = real(1).binary(Binary::Mul, real(2)).binary(Binary::Div, real(3));
    let scaled = real(0).binary(Binary::Mul, factor).unary(Unary::Round);
    let shifted = scaled.binary(Binary::Add, real(4));
    let result = ctx.pointwise(shifted.cast(out), &[sum, left_scale, right_scale, scale, zero])?;
    if ctx.sizes(result) != ctx.sizes(sum) {
        return Err(ctx.invalid(&format!("scales or zero points do not broadcast to the result {}", ctx.ty(sum))));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn rounds_half_to_even_and_saturates() {
        let x = tensor(&[5], &[0.5f32, 1.5, -3.0, 600.0, -600.0]);
        let case = Case::new("QuantizeLinear", 13).input(x).constant(tensor(&[], &[1f32]));
        assert_eq!(case.one(), tensor(&[5], &[0u8, 2, 0, 255, 0]));
        let shifted = case.constant(tensor(&[], &[10i8]));
        assert_eq!(shifted.one(), tensor(&[5], &[10i8, 12, 7, 127, -128]));
    }

    #[test]
    fn scales_are_per_axis_or_per_block() {
        let x = || tensor(&[2, 3], &[1i8, 2, 3, 4, 5, 6]);
        let axis = Case::new("DequantizeLinear", 13).int("axis", 0).input(x()).constant(tensor(&[2], &[1f32, 10.0]));
        assert_close(&axis.constant(tensor(&[2], &[1i8, 0])).one(), &[2, 3], &[0.0, 1.0, 2.0, 40.0, 50.0, 60.0]);
        let block = Case::new("DequantizeLinear", 21).int("axis", 1).int("block_size", 2).input(x());
        let block = block.constant(tensor(&[2, 2], &[1f32, 2.0, 10.0, 100.0]));
        assert_close(&block.one(), &[2, 3], &[1.0, 2.0, 6.0, 40.0, 50.0, 600.0]);
    }

    #[test]
    fn the_range_always_includes_zero() {
        let case = Case::new("DynamicQuantizeLinear", 11).outputs(3);
        let results = case.clone().input(tensor(&[2], &[-1f32, 254.0])).run();
        assert_eq!(results[0], tensor(&[2], &[0u8, 255]));
        assert_close(&results[1], &[], &[1.0]);
        assert_eq!(results[2], tensor(&[], &[1u8]));
        let zeros = case.input(tensor(&[2], &[0f32, 0.0])).run();
        assert_eq!(zeros[0], tensor(&[2], &[0u8, 0]));
    }

    #[test]
    fn refuses_types_without_a_number() {
        let case = Case::new("QuantizeLinear", 21).int("output_dtype", 17).input(tensor(&[1], &[1f32]));
        let error = case.constant(tensor(&[], &[1f32])).error();
        assert!(error.contains("float8e4m3fn"), "{error}");
    }
}
