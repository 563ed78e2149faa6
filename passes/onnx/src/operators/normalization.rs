//! Normalisations.
//!
//! Those over trailing dimensions become `Norm`. Numbers per channel are combined as vectors first, so that constant
//! folding merges what inference leaves of batch normalisation into one scale and one offset.

use ir::ValueId;
use planfile::op::{NormKind, PoolKind, ReduceKind, Window};
use planfile::{Binary, Compare, DType, Expr, Op, Real, Unary};

use super::quantization::element_type;
use super::reduction::norm_of;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("BatchNormalization",        7,  batch),
    row("InstanceNormalization",     6,  instance),
    row("GroupNormalization",        18, group),
    row("LayerNormalization",        17, layer),
    row("RMSNormalization",          23, rms),
    row("LpNormalization",           1,  lp),
    row("MeanVarianceNormalization", 9,  mean_variance),
    row("LRN",                       1,  local_response),
];

fn product(left: Expr, right: Expr) -> Expr {
    left.binary(Binary::Mul, right)
}

fn sum(left: Expr, right: Expr) -> Expr {
    left.binary(Binary::Add, right)
}

fn difference(left: Expr, right: Expr) -> Expr {
    left.binary(Binary::Sub, right)
}

/// `epsilon`, in the precision the file has it in.
fn epsilon(ctx: &Context<'_>) -> Result<f64, OpError> {
    ctx.float("epsilon", 1e-5).map(f64::from)
}

/// Inference: `x * k + (bias - mean * k)` with `k = scale / sqrt(variance + epsilon)`.
fn batch(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    if ctx.flag("training_mode", false)? || (1..5).any(|output| ctx.wants(output)) {
        return Err(ctx.unsupported("batch statistics of training; export the model for inference"));
    }
    let x = ctx.operand(0)?;
    let (scale, bias, mean, variance) = (ctx.operand(1)?, ctx.operand(2)?, ctx.operand(3)?, ctx.operand(4)?);
    let (dtype, sizes) = (ctx.dtype(x), ctx.sizes(x));
    let wide = dtype.accumulator();
    let [scale, bias, mean, variance] =
        [ctx.cast(scale, wide)?, ctx.cast(bias, wide)?, ctx.cast(mean, wide)?, ctx.cast(variance, wide)?];
    let deviation = sum(Expr::operand(1), number(wide, epsilon(ctx)?)).unary(Unary::Sqrt);
    let factor = ctx.pointwise(Expr::operand(0).binary(Binary::Div, deviation), &[scale, variance])?;
    let offset = difference(Expr::operand(0), product(Expr::operand(1), Expr::operand(2)));
    let offset = ctx.pointwise(offset, &[bias, mean, factor])?;
    // Old versions may have numbers per channel and place.
    let shape = if ctx.flag("spatial", true)? {
        by_channel(ctx, factor, &sizes)?
    } else {
        sizes.get(1..).unwrap_or_default().to_vec()
    };
    let factor = ctx.reshape(factor, &shape)?;
    let offset = ctx.reshape(offset, &shape)?;
    let result = sum(product(Expr::operand(0).cast(wide), Expr::operand(1)), Expr::operand(2)).cast(dtype);
    Ok(vec![ctx.pointwise(result, &[x, factor, offset])?])
}

/// `[C, 1, …]` for a vector of numbers per channel of a tensor with these sizes.
fn by_channel(ctx: &Context<'_>, parameter: ValueId, sizes: &[u64]) -> Result<Vec<u64>, OpError> {
    let channels = sizes.get(1).copied().unwrap_or(1);
    if ctx.sizes(parameter) != [channels] {
        return Err(ctx.invalid(&format!("{} for {channels} channels", ctx.ty(parameter))));
    }
    Ok([&[channels], vec![1; sizes.len().saturating_sub(2)].as_slice()].concat())
}

fn instance(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, scale, bias) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let sizes = ctx.sizes(x);
    if sizes.len() < 2 {
        return Err(ctx.invalid(&format!("{} has no channels", ctx.ty(x))));
    }
    // Without spatial dimensions each element is an instance of its own.
    let spread = if sizes.len() == 2 { ctx.unsqueeze(x, &[2])? } else { x };
    let normalized = plain_norm(ctx, spread, NormKind::Layer, 2)?;
    let normalized = ctx.reshape(normalized, &sizes)?;
    Ok(vec![scale_channels(ctx, normalized, scale, bias)?])
}

/// `Norm` without scale and bias.
fn plain_norm(ctx: &mut Context<'_>, x: ValueId, kind: NormKind, axis: u8) -> Result<ValueId, OpError> {
    let epsilon = Real(epsilon(ctx)?);
    ctx.emit(Op::Norm { kind, axis, epsilon, scale: false, bias: false }, &[x])
}

/// `x * scale + bias`, numbers per channel in dimension 1.
fn scale_channels(ctx: &mut Context<'_>, x: ValueId, scale: ValueId, bias: ValueId) -> Result<ValueId, OpError> {
    let sizes = ctx.sizes(x);
    let scale = ctx.reshape(scale, &by_channel(ctx, scale, &sizes)?)?;
    let bias = ctx.reshape(bias, &by_channel(ctx, bias, &sizes)?)?;
    let result = sum(product(Expr::operand(0), Expr::operand(1)), Expr::operand(2));
    ctx.pointwise(result, &[x, scale, bias])
}

/// Scale and bias are per group in opset 18 and per channel from 21 on; their length tells.
fn group(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, scale, bias) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let sizes = ctx.sizes(x);
    let groups = u64::try_from(ctx.required_int("num_groups")?).unwrap_or(0);
    let channels = sizes.get(1).copied().unwrap_or(0);
    if groups == 0 || !channels.is_multiple_of(groups) {
        return Err(ctx.invalid(&format!("{groups} groups do not divide the {channels} channels")));
    }
    let grouped = [&[sizes[0], groups, channels / groups], &sizes[2..]].concat();
    let folded = ctx.reshape(x, &grouped)?;
    let normalized = plain_norm(ctx, folded, NormKind::Layer, 2)?;
    if ctx.sizes(scale) == [channels] {
        let normalized = ctx.reshape(normalized, &sizes)?;
        return Ok(vec![scale_channels(ctx, normalized, scale, bias)?]);
    }
    let scaled = scale_channels(ctx, normalized, scale, bias)?;
    Ok(vec![ctx.reshape(scaled, &sizes)?])
}

fn layer(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, axis, y) = trailing(ctx, NormKind::Layer)?;
    if !ctx.wants(1) && !ctx.wants(2) {
        return Ok(vec![y]);
    }
    let stash = element_type(ctx, "stash_type")?.unwrap_or(DType::F32);
    let wide = stash.accumulator();
    let axes: Vec<u8> = (usize::from(axis)..ctx.rank(x)).map(|axis| axis as u8).collect();
    let x = ctx.cast(x, wide)?;
    let (mean, variance) = moments(ctx, x, &axes)?;
    let inverse = sum(Expr::operand(0), number(wide, epsilon(ctx)?)).unary(Unary::Sqrt).unary(Unary::Reciprocal);
    let inverse = ctx.pointwise(inverse.cast(stash), &[variance])?;
    Ok(vec![y, ctx.cast(mean, stash)?, inverse])
}

fn rms(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (_, _, y) = trailing(ctx, NormKind::Rms)?;
    Ok(vec![y])
}

/// Normalises over the dimensions from attribute `axis` on: input, axis and result. Statistics are at least as precise
/// as any `stash_type` asks for.
fn trailing(ctx: &mut Context<'_>, kind: NormKind) -> Result<(ValueId, u8, ValueId), OpError> {
    let (x, scale, bias) = (ctx.operand(0)?, ctx.operand(1)?, ctx.optional(2));
    let dtype = ctx.dtype(x);
    let axis = ctx.axis(ctx.int("axis", -1)?, ctx.rank(x))?;
    let epsilon = Real(epsilon(ctx)?);
    let scale = ctx.cast(scale, dtype)?;
    let bias = bias.map(|bias| ctx.cast(bias, dtype)).transpose()?;
    let tail = ctx.rank(x) - usize::from(axis);
    let parameters: Vec<ValueId> = [Some(scale), bias].into_iter().flatten().collect();
    if parameters.iter().all(|&parameter| ctx.rank(parameter) <= tail) {
        let operands = [&[x], &parameters[..]].concat();
        let y = ctx.emit(Op::Norm { kind, axis, epsilon, scale: true, bias: bias.is_some() }, &operands)?;
        return Ok((x, axis, y));
    }
    // A scale that also differs along the leading dimensions.
    let normalized = plain_norm(ctx, x, kind, axis)?;
    let scaled = product(Expr::operand(0), Expr::operand(1));
    let result = if bias.is_some() { sum(scaled, Expr::operand(2)) } else { scaled };
    let y = ctx.pointwise(result, &[&[normalized], &parameters[..]].concat())?;
    Ok((x, axis, y))
}

/// Mean and variance over `axes`, which stay with size 1.
fn moments(ctx: &mut Context<'_>, x: ValueId, axes: &[u8]) -> Result<(ValueId, ValueId), OpError> {
    let mean = ctx.emit(Op::Reduce { kind: ReduceKind::Mean, axes: axes.to_vec(), keep: true }, &[x])?;
    let apart = || difference(Expr::operand(0), Expr::operand(1));
    let squares = ctx.pointwise(product(apart(), apart()), &[x, mean])?;
    let variance = ctx.emit(Op::Reduce { kind: ReduceKind::Mean, axes: axes.to_vec(), keep: true }, &[squares])?;
    Ok((mean, variance))
}

/// `x / norm`, and 0 where the norm is 0.
fn lp(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let dtype = ctx.dtype(x);
    let axis = ctx.axis(ctx.int("axis", -1)?, ctx.rank(x))?;
    let p = match ctx.int("p", 2)? {
        p @ (1 | 2) => p.unsigned_abs(),
        p => return Err(ctx.invalid(&format!("`p` is {p}, expected 1 or 2"))),
    };
    let norm = norm_of(ctx, x, p, vec![axis], true)?;
    let empty = Expr::operand(1).compare(Compare::Eq, number(dtype, 0.0));
    let result = empty.select(number(dtype, 0.0), Expr::operand(0).binary(Binary::Div, Expr::operand(1)));
    Ok(vec![ctx.pointwise(result, &[x, norm])?])
}

/// `(x - mean) / (deviation + 1e-9)`, the constant being the specification's.
fn mean_variance(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let dtype = ctx.dtype(x);
    let wide = dtype.accumulator();
    let axes = ctx.ints("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    let mut axes = ctx.axes(&axes, ctx.rank(x))?;
    axes.sort_unstable();
    let x = ctx.cast(x, wide)?;
    let (mean, variance) = moments(ctx, x, &axes)?;
    let deviation = sum(Expr::operand(2).unary(Unary::Sqrt), number(wide, 1e-9));
    let result = difference(Expr::operand(0), Expr::operand(1)).binary(Binary::Div, deviation).cast(dtype);
    Ok(vec![ctx.pointwise(result, &[x, mean, variance])?])
}

/// `x / (bias + alpha / size * s)^beta`, `s` the sum of squares over a window of `size` channels.
///
/// An average over a window that counts its padding is `s / size`; channels become the pool's spatial dimension.
fn local_response(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (dtype, sizes) = (ctx.dtype(x), ctx.sizes(x));
    let wide = dtype.accumulator();
    let size = ctx.required_int("size")?;
    if sizes.len() < 2 || !(1..1 << 31).contains(&size) {
        return Err(ctx.invalid(&format!("`size` is {size} for {}", ctx.ty(x))));
    }
    let value = || Expr::operand(0).cast(wide);
    let squares = ctx.pointwise(product(value(), value()), &[x])?;
    let places = ctx.count(&sizes[2..])?;
    let squares = ctx.reshape(squares, &[sizes[0], 1, sizes[1], places])?;
    let window = Window {
        sizes: vec![size.unsigned_abs(), 1],
        strides: vec![1, 1],
        dilations: vec![1, 1],
        pads: vec![((size - 1) / 2, size / 2), (0, 0)],
    };
    let kind = PoolKind::Average { count_pads: true };
    let mean = ctx.emit(Op::Pool { kind, window, ceil: false, indices: None }, &[squares])?;
    let mean = ctx.reshape(mean, &sizes)?;
    let attribute = |name: &str, default: f32| Ok::<_, OpError>(number(wide, f64::from(ctx.float(name, default)?)));
    let (alpha, beta, bias) = (attribute("alpha", 1e-4)?, attribute("beta", 0.75)?, attribute("bias", 1.0)?);
    let base = sum(bias, product(alpha, Expr::operand(1)));
    let result = value().binary(Binary::Div, base.binary(Binary::Pow, beta)).cast(dtype);
    Ok(vec![ctx.pointwise(result, &[x, mean])?])
}

#[cfg(test)]
mod tests {
    use planfile::Tensor;

    use crate::harness::{Case, assert_close, tensor};

    fn ones(count: u64) -> Tensor {
        tensor(&[count], &vec![1f32; count as usize])
    }

    #[test]
    fn batch_statistics_become_a_scale_and_an_offset() {
        let x = tensor(&[1, 2, 2], &[1f32, 2.0, 3.0, 4.0]);
        let case =
            Case::new("BatchNormalization", 15).float("epsilon", 0.0).input(x).constant(tensor(&[2], &[2f32, 4.0]));
        let case = case.constant(tensor(&[2], &[0f32, 10.0])).constant(tensor(&[2], &[1f32, 3.0]));
        let case = case.constant(tensor(&[2], &[4f32, 16.0]));
        assert_close(&case.one(), &[1, 2, 2], &[0.0, 1.0, 10.0, 11.0]);
        let training = case.int("training_mode", 1).error();
        assert!(training.contains("export the model for inference"), "{training}");
    }

    #[test]
    fn layers_give_their_statistics_when_wanted() {
        let x = tensor(&[1, 2], &[1f32, 5.0]);
        let case = Case::new("LayerNormalization", 17).float("epsilon", 0.0).outputs(3).input(x);
        let results = case.constant(tensor(&[2], &[1f32, 2.0])).constant(ones(2)).run();
        assert_close(&results[0], &[1, 2], &[0.0, 3.0]);
        assert_close(&results[1], &[1, 1], &[3.0]);
        assert_close(&results[2], &[1, 1], &[0.5]);
    }

    #[test]
    fn a_scale_may_vary_along_leading_dimensions() {
        let x = tensor(&[2, 2], &[1f32, 5.0, 1.0, 5.0]);
        let case = Case::new("LayerNormalization", 17).float("epsilon", 0.0).input(x);
        let case = case.constant(tensor(&[2, 1], &[1f32, 3.0]));
        assert_close(&case.one(), &[2, 2], &[-1.0, 1.0, -3.0, 3.0]);
    }

    #[test]
    fn root_mean_square_keeps_the_mean() {
        let case = Case::new("RMSNormalization", 23).float("epsilon", 0.0).input(tensor(&[1, 2], &[1f32, 7.0]));
        assert_close(&case.constant(ones(2)).one(), &[1, 2], &[0.2, 1.4]);
    }

    #[test]
    fn groups_are_scaled_per_group_or_per_channel() {
        let x = tensor(&[1, 4], &[1f32, 3.0, 10.0, 30.0]);
        let case =
            |opset| Case::new("GroupNormalization", opset).int("num_groups", 2).float("epsilon", 0.0).input(x.clone());
        let per_group = case(18).constant(tensor(&[2], &[1f32, 2.0])).constant(tensor(&[2], &[0f32, 5.0]));
        assert_close(&per_group.one(), &[1, 4], &[-1.0, 1.0, 3.0, 7.0]);
        let per_channel = case(21).constant(tensor(&[4], &[1f32, 2.0, 3.0, 4.0])).constant(tensor(&[4], &[0f32; 4]));
        assert_close(&per_channel.one(), &[1, 4], &[-1.0, 2.0, -3.0, 4.0]);
    }

    #[test]
    fn instances_are_normalised_one_by_one() {
        let x = tensor(&[1, 2, 2], &[1f32, 3.0, 10.0, 30.0]);
        let case = Case::new("InstanceNormalization", 7).float("epsilon", 0.0).input(x).constant(ones(2));
        assert_close(&case.constant(ones(2)).one(), &[1, 2, 2], &[0.0, 2.0, 0.0, 2.0]);
    }

    #[test]
    fn nothing_normalises_to_nothing() {
        let x = || tensor(&[2, 2], &[3f32, 4.0, 0.0, 0.0]);
        assert_close(&Case::new("LpNormalization", 22).input(x()).one(), &[2, 2], &[0.6, 0.8, 0.0, 0.0]);
        let first = Case::new("LpNormalization", 22).int("p", 1).input(x());
        assert_close(&first.one(), &[2, 2], &[3.0 / 7.0, 4.0 / 7.0, 0.0, 0.0]);
    }

    #[test]
    fn deviations_are_over_the_stated_axes() {
        let case = Case::new("MeanVarianceNormalization", 13).ints("axes", &[1]).input(tensor(&[1, 2], &[1f32, 5.0]));
        assert_close(&case.one(), &[1, 2], &[-1.0, 1.0]);
    }

    #[test]
    fn an_even_channel_window_reaches_further_up() {
        let x = tensor(&[1, 3, 1], &[1f32, 2.0, 3.0]);
        let case =
            Case::new("LRN", 13).int("size", 2).float("alpha", 2.0).float("beta", 1.0).float("bias", 0.0).input(x);
        // Sums of squares over channels c and c + 1: 5, 13 and 9.
        assert_close(&case.one(), &[1, 3, 1], &[1.0 / 5.0, 2.0 / 13.0, 3.0 / 9.0]);
    }
}
