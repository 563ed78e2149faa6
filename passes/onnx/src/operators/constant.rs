//! Tensors made from shapes and positions alone.

use ir::ValueId;
use planfile::{Binary, Compare, DType, Dim, Expr, Op, Scalar, Tensor, TensorType};

use super::cast::element_type;
use super::reshape::unsigned;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("ConstantOfShape", 9,  constant_of_shape),
    row("EyeLike",         9,  eye_like),
    row("NonZero",         9,  non_zero),
    row("OneHot",          9,  one_hot),
    row("Range",           11, range),
    row("Trilu",           14, trilu),
];

fn constant_of_shape(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let shape = ctx.operand(0)?;
    let sizes = ctx.constant_i64s(shape)?;
    let sizes = unsigned(ctx, &sizes)?;
    let value = match ctx.tensor_attribute("value")? {
        None => ctx.scalar(DType::F32, 0.0),
        Some(value) if value.ty.elements() == Some(1) => {
            let ty = TensorType::new(value.ty.dtype, &[]);
            ctx.literal(Tensor { ty, data: value.data })
        }
        Some(value) => return Err(ctx.invalid(&format!("attribute `value` is {}, not one element", value.ty))),
    };
    Ok(vec![ctx.broadcast(value, &sizes)?])
}

/// `column - row`, of the output's last two axes.
fn diagonal(rank: usize) -> Expr {
    let axis = |from_end: usize| Expr::index((rank - from_end) as u8);
    axis(1).binary(Binary::Sub, axis(2))
}

fn eye_like(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    if ctx.rank(x) != 2 {
        return Err(ctx.invalid(&format!("operand is {}, expected a matrix", ctx.ty(x))));
    }
    let dtype = if ctx.has("dtype") { element_type(ctx, ctx.required_int("dtype")?)? } else { ctx.dtype(x) };
    let offset = Expr::constant(Scalar::i64(ctx.int("k", 0)?));
    let expr = diagonal(2).compare(Compare::Eq, offset).select(number(dtype, 1.0), number(dtype, 0.0));
    let dims = ctx.sizes(x).into_iter().map(Dim::Static).collect();
    Ok(vec![ctx.emit(Op::Pointwise { expr, dims }, &[])?])
}

/// Keeps one side of the `k`-th diagonal, which included.
fn trilu(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    if ctx.rank(x) < 2 {
        return Err(ctx.invalid(&format!("operand is {}, expected matrices", ctx.ty(x))));
    }
    let k = match ctx.optional(1) {
        Some(k) => ctx.constant_i64(k)?,
        None => 0,
    };
    let kept = if ctx.flag("upper", true)? { Compare::Ge } else { Compare::Le };
    let zero = number(ctx.dtype(x), 0.0);
    let expr = diagonal(ctx.rank(x)).compare(kept, Expr::constant(Scalar::i64(k))).select(Expr::operand(0), zero);
    Ok(vec![ctx.pointwise(expr, &[x])?])
}

/// `start + i * delta` below (or, for a negative delta, above) `limit`.
fn range(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (start, limit, delta) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let dtype = ctx.dtype(start);
    let count = if dtype.is_float() {
        let [start, limit, delta] = [start, limit, delta].map(|value| ctx.constant_f64s(value));
        let [Some(start), Some(limit), Some(delta)] = [&start?[..], &limit?[..], &delta?[..]].map(only) else {
            return Err(ctx.invalid("start, limit and delta must be scalars"));
        };
        ((limit - start) / delta).ceil().max(0.0)
    } else {
        let (start, limit, delta) = (ctx.constant_i64(start)?, ctx.constant_i64(limit)?, ctx.constant_i64(delta)?);
        let (distance, delta) = (i128::from(limit) - i128::from(start), i128::from(delta));
        let count = distance
            .checked_div(delta)
            .map(|count| count + i128::from(distance % delta != 0 && (distance > 0) == (delta > 0)));
        count.map_or(f64::NAN, |count| count.max(0) as f64)
    };
    // Exact up to 2^53, which no tensor reaches.
    if count.is_nan() || count >= 9.0e15 {
        return Err(ctx.invalid("delta is 0, or the range is too long"));
    }
    // The scalars are operands, so that the value of a range is theirs to the last bit.
    let through = match dtype {
        DType::F16 | DType::BF16 => element_type(ctx, ctx.int("stash_type", 1)?)?,
        _ => dtype,
    };
    let converted = |expr: Expr, from, to| if from == to { expr } else { expr.cast(to) };
    let operand = |index| converted(Expr::operand(index), dtype, through);
    let index = Expr::index(0).cast(through);
    let expr = operand(0).binary(Binary::Add, index.binary(Binary::Mul, operand(1)));
    let expr = converted(expr, through, dtype);
    let (start, delta) = (ctx.reshape(start, &[])?, ctx.reshape(delta, &[])?);
    Ok(vec![ctx.emit(Op::Pointwise { expr, dims: vec![Dim::Static(count as u64)] }, &[start, delta])?])
}

fn only(elements: &[f64]) -> Option<f64> {
    match elements {
        [element] => Some(*element),
        _ => None,
    }
}

/// `on` where the new axis' position equals the index, `off` elsewhere; negative indices count from the end, others out
/// of range give a row of `off`.
fn one_hot(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (indices, depth, values) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let depth = match ctx.constant_f64s(depth)?.as_slice() {
        [depth] if *depth >= 0.0 && *depth < 9.0e15 => *depth as i64,
        _ => return Err(ctx.invalid("depth is not one number from 0 up")),
    };
    let axis = ctx.axis(ctx.int("axis", -1)?, ctx.rank(indices) + 1)?;
    let indices = ctx.unsqueeze(indices, &[axis])?;
    let mut sizes = ctx.sizes(indices);
    sizes[usize::from(axis)] = depth.cast_unsigned();
    let off = ctx.slice_axis(values, 0, 0, 1)?;
    let on = ctx.slice_axis(values, 0, 1, 1)?;
    let (off, on) = (ctx.reshape(off, &[])?, ctx.reshape(on, &[])?);
    let number = |value| Expr::constant(Scalar::i64(value));
    let index = || Expr::operand(0).cast(DType::I64);
    let wrapped = index().compare(Compare::Lt, number(0)).select(index().binary(Binary::Add, number(depth)), index());
    let expr = wrapped.compare(Compare::Eq, Expr::index(axis)).select(Expr::operand(1), Expr::operand(2));
    let dims = sizes.into_iter().map(Dim::Static).collect();
    Ok(vec![ctx.emit(Op::Pointwise { expr, dims }, &[indices, on, off])?])
}

/// Coordinates of the elements that are not 0, a row per axis. Their number is part of the result's shape, so the operand
/// must be known.
fn non_zero(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let sizes = ctx.sizes(x);
    let strides = planfile::types::strides(&sizes);
    let elements = ctx.constant_f64s(x)?;
    let found: Vec<u64> = elements.iter().zip(0u64..).filter(|(value, _)| **value != 0.0).map(|(_, i)| i).collect();
    let coordinates = sizes
        .iter()
        .zip(&strides)
        .flat_map(|(&size, &stride)| found.iter().map(move |&flat| (flat / stride.max(1) % size.max(1)).cast_signed()));
    let coordinates: Vec<i64> = coordinates.collect();
    let flat = ctx.literal_i64s(&coordinates);
    Ok(vec![ctx.reshape(flat, &[sizes.len() as u64, found.len() as u64])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, bools, tensor};

    #[test]
    fn fills_a_shape() {
        let case = Case::new("ConstantOfShape", 9).constant(tensor(&[2], &[2i64, 1]));
        assert_eq!(case.one(), tensor(&[2, 1], &[0f32, 0.]));
        assert_eq!(case.tensor("value", &tensor(&[1], &[7i64])).one(), tensor(&[2, 1], &[7i64, 7]));
        let scalar = Case::new("ConstantOfShape", 9).constant(tensor(&[0], &[0i64; 0]));
        assert_eq!(scalar.one(), tensor(&[], &[0f32]));
        assert!(Case::new("ConstantOfShape", 9).constant(tensor(&[1], &[-1i64])).error().contains("negative"));
    }

    #[test]
    fn counts_in_both_directions_and_types() {
        let case = |a: i64, b: i64, c: i64| {
            Case::new("Range", 11).constant(tensor(&[], &[a])).constant(tensor(&[], &[b])).constant(tensor(&[], &[c]))
        };
        assert_eq!(case(1, 8, 3).one(), tensor(&[3], &[1i64, 4, 7]));
        assert_eq!(case(1, 7, 3).one(), tensor(&[2], &[1i64, 4]));
        assert_eq!(case(5, 0, -2).one(), tensor(&[3], &[5i64, 3, 1]));
        assert_eq!(case(5, 0, 2).one(), tensor(&[0], &[0i64; 0]));
        assert!(case(5, 0, 0).error().contains("delta is 0"));
        let scalar = |value: f32| tensor(&[], &[value]);
        let floats = Case::new("Range", 11).constant(scalar(0.5)).constant(scalar(2.0)).constant(scalar(0.5));
        assert_eq!(floats.one(), tensor(&[3], &[0.5f32, 1.0, 1.5]));
    }

    #[test]
    fn ranges_of_half_types_are_counted_in_single_precision() {
        let halves = |sizes: &[u64], values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_bits().to_be_bytes()[..2].to_vec()).collect();
            let little: Vec<u8> = bytes.chunks(2).flat_map(|pair| [pair[1], pair[0]]).collect();
            planfile::Tensor::from_bytes(planfile::TensorType::new(planfile::DType::BF16, sizes), &little).unwrap()
        };
        let scalar = |value| halves(&[], &[value]);
        let range = Case::new("Range", 27).constant(scalar(-100.0)).constant(scalar(60.0)).constant(scalar(0.5));
        let element = |case: &Case| case.one().data.bytes()[2 * 303..2 * 304].to_vec();
        // 303 is no bf16: counted in that type, this element is 52.
        assert_eq!(element(&range), halves(&[1], &[51.5]).data.bytes());
        assert_eq!(element(&range.int("stash_type", 16)), halves(&[1], &[52.0]).data.bytes());
    }

    #[test]
    fn identity_matrices_and_triangles() {
        let x = tensor(&[2, 3], &[1f32, 2., 3., 4., 5., 6.]);
        let eye = Case::new("EyeLike", 9).input(x.clone()).int("k", 1).int("dtype", 7);
        assert_eq!(eye.one(), tensor(&[2, 3], &[0i64, 1, 0, 0, 0, 1]));
        let upper = Case::new("Trilu", 14).input(x.clone());
        assert_eq!(upper.one(), tensor(&[2, 3], &[1f32, 2., 3., 0., 5., 6.]));
        let lower = Case::new("Trilu", 14).input(x).constant(tensor(&[], &[-1i64])).int("upper", 0);
        assert_eq!(lower.one(), tensor(&[2, 3], &[0f32, 0., 0., 4., 0., 0.]));
    }

    #[test]
    fn one_hot_rows_on_any_axis() {
        let case = Case::new("OneHot", 11)
            .input(tensor(&[3], &[1i64, -1, 5]))
            .constant(tensor(&[], &[3i64]))
            .constant(tensor(&[2], &[2f32, 9.]));
        assert_eq!(case.one(), tensor(&[3, 3], &[2f32, 9., 2., 2., 2., 9., 2., 2., 2.]));
        assert_eq!(case.int("axis", 0).one(), tensor(&[3, 3], &[2f32, 2., 2., 9., 2., 2., 2., 9., 2.]));
    }

    #[test]
    fn non_zeros_of_a_constant() {
        let case = Case::new("NonZero", 13).constant(bools(&[2, 2], &[true, false, true, true]));
        assert_eq!(case.one(), tensor(&[2, 3], &[0i64, 1, 1, 0, 0, 1]));
        let data = Case::new("NonZero", 13).input(tensor(&[1], &[1f32]));
        assert!(data.error().contains("input `x0`"));
    }
}
