//! Fourier transforms and what goes with them: windows, frames and mel filters.
//!
//! A transform is a product with the matrix of its roots of unity, which is an expression of the positions.

use ir::ValueId;
use planfile::{Binary, Buffer, DType, Dim, Expr, Op, Scalar, Tensor, TensorType, Unary};

use super::activation::{add, mul, sub};
use super::cast::element_type;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("BlackmanWindow",  17, |ctx| window(ctx, [0.42, -0.5, 0.08])),
    row("DFT",             17, dft),
    row("HammingWindow",   17, |ctx| window(ctx, [25.0 / 46.0, -21.0 / 46.0, 0.0])),
    row("HannWindow",      17, |ctx| window(ctx, [0.5, -0.5, 0.0])),
    row("MelWeightMatrix", 17, mel_weight_matrix),
    row("STFT",            17, stft),
];

/// Longest transform: its matrix has four numbers for each pair of positions.
const LENGTH_MAX: u64 = 4096;
/// Elements of a matrix of filters, which becomes a constant of the plan.
const FILTER_ELEMENTS_MAX: usize = 1 << 22;

#[derive(Clone, Copy)]
struct Transform {
    length: u64,
    inverse: bool,
    /// Forward: the first half of the result. Inverse: the first half of the operand, of which the rest follows.
    onesided: bool,
}

/// A number from 0 up, known now.
fn known_size(ctx: &mut Context<'_>, value: ValueId) -> Result<u64, OpError> {
    let size = ctx.constant_i64(value)?;
    u64::try_from(size).map_err(|_| ctx.invalid(&format!("{size} is no size")))
}

fn dft(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axis = match ctx.optional(2) {
        Some(axis) => ctx.constant_i64(axis)?,
        None if ctx.opset() < 20 => ctx.int("axis", 1)?,
        None => -2,
    };
    let axis = ctx.axis(axis, ctx.rank(x))?;
    if usize::from(axis) + 1 >= ctx.rank(x) {
        return Err(ctx.invalid(&format!("axis {axis} of {} holds real and imaginary parts", ctx.ty(x))));
    }
    let (inverse, onesided) = (ctx.flag("inverse", false)?, ctx.flag("onesided", false)?);
    let size = ctx.sizes(x)[usize::from(axis)];
    let length = match ctx.optional(1) {
        Some(length) => known_size(ctx, length)?,
        None if inverse && onesided => size.saturating_sub(1) * 2,
        None => size,
    };
    Ok(vec![transform(ctx, x, axis, Transform { length, inverse, onesided })?])
}

/// The transform along `axis` of `[…, 1 or 2]`, real or complex.
fn transform(ctx: &mut Context<'_>, x: ValueId, axis: u8, of: Transform) -> Result<ValueId, OpError> {
    let Transform { length, inverse, onesided } = of;
    let (rank, dtype) = (ctx.rank(x), ctx.dtype(x));
    let (size, parts) = (ctx.sizes(x)[usize::from(axis)], ctx.sizes(x)[rank - 1]);
    if length == 0 || length > LENGTH_MAX {
        return Err(ctx.unsupported(&format!("a transform of length {length}; the limit is {LENGTH_MAX}")));
    }
    if !(1..=2).contains(&parts) || !dtype.is_float() {
        return Err(ctx.invalid(&format!("{} is neither real nor complex", ctx.ty(x))));
    }
    let half = length / 2 + 1;
    let real = inverse && onesided;
    // What is beyond the length is cut off; what is missing is 0.
    let read = size.min(if real { half } else { length });
    let written = if onesided && !inverse { half } else { length };
    let x = ctx.slice_axis(x, axis, 0, read)?;
    let roots = roots(ctx, of, [read, parts, written, if real { 1 } else { 2 }])?;
    let roots = ctx.cast(roots, dtype)?;
    let contract = vec![(axis, 0), (rank as u8 - 1, 1)];
    let y = ctx.emit(Op::Dot { batch: vec![], contract, accumulate: dtype.accumulator(), out: dtype }, &[x, roots])?;
    // The positions come after all other dimensions, and belong at `axis`.
    let (at, last) = (usize::from(axis), rank - 2);
    let order = (0..at).chain([last]).chain(at..last).chain([rank - 1]);
    let permutation: Vec<u8> = order.map(|axis| axis as u8).collect();
    ctx.transpose(y, &permutation)
}

/// `[position, part, frequency, part]`, in `f64`. Real and imaginary parts are a quarter turn apart: with the angle `a` of a
/// position and a frequency, `cos(a + quarter (to - from))` is what part `from` contributes to part `to`.
fn roots(ctx: &mut Context<'_>, of: Transform, sizes: [u64; 4]) -> Result<ValueId, OpError> {
    let length = of.length as i64;
    let integer = |value| Expr::constant(Scalar::i64(value));
    let real = |value| number(DType::F64, value);
    // Whole turns are taken off while the number is exact.
    let turn = mul(Expr::index(0), Expr::index(2)).binary(Binary::Rem, integer(length)).cast(DType::F64);
    let step = 2.0 * std::f64::consts::PI / of.length as f64;
    let angle = mul(turn, real(if of.inverse { -step } else { step }));
    let quarters = sub(Expr::index(3), Expr::index(1)).cast(DType::F64);
    let mut root = add(angle, mul(quarters, real(std::f64::consts::FRAC_PI_2))).unary(Unary::Cos);
    if of.inverse {
        root = mul(root, real(1.0 / of.length as f64));
    }
    if of.inverse && of.onesided {
        // All but the first, and the middle of an even length, stand for two.
        let alone = |position| Expr::index(0).compare(planfile::Compare::Eq, integer(position));
        let middle = if length % 2 == 0 { length / 2 } else { 0 };
        let single = alone(0).binary(Binary::Or, alone(middle));
        root = mul(root, single.select(real(1.0), real(2.0)));
    }
    let dims = sizes.into_iter().map(Dim::Static).collect();
    ctx.emit(Op::Pointwise { expr: root, dims }, &[])
}

/// Transforms of overlapping frames: `[batch, length, 1 or 2]` → `[batch, frames, frequencies, 2]`.
fn stft(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (signal, step) = (ctx.operand(0)?, ctx.operand(1)?);
    let step = known_size(ctx, step)?;
    let window = ctx.optional(2);
    let &[batch, samples, parts] = &ctx.sizes(signal)[..] else {
        return Err(ctx.invalid(&format!("signal is {}, expected batch, samples and parts", ctx.ty(signal))));
    };
    let length = match (ctx.optional(3), window) {
        (Some(length), _) => known_size(ctx, length)?,
        (None, Some(window)) => ctx.count(&ctx.sizes(window))?,
        (None, None) => return Err(ctx.invalid("neither a window nor the length of a frame is given")),
    };
    let frames = samples.checked_sub(length).and_then(|rest| rest.checked_div(step)).map(|rest| rest + 1);
    let Some(frames) = frames else {
        return Err(ctx.invalid(&format!("frames of {length} by {step} in {samples} samples")));
    };
    let place = add(mul(Expr::index(0), Expr::constant(Scalar::i64(step as i64))), Expr::index(1));
    let dims = [frames, length].into_iter().map(Dim::Static).collect();
    let places = ctx.emit(Op::Pointwise { expr: place, dims }, &[])?;
    let mut x = ctx.emit(Op::Gather { axis: 1 }, &[signal, places])?;
    if let Some(window) = window {
        let window = ctx.reshape(window, &[length, 1])?;
        x = ctx.pointwise(mul(Expr::operand(0), Expr::operand(1)), &[x, window])?;
    }
    debug_assert_eq!(ctx.sizes(x), [batch, frames, length, parts]);
    let of = Transform { length, inverse: false, onesided: ctx.flag("onesided", true)? };
    Ok(vec![transform(ctx, x, 2, of)?])
}

/// `a + b cos(t) + c cos(2 t)`, a full turn over the window.
fn window(ctx: &mut Context<'_>, [a, b, c]: [f64; 3]) -> Result<Vec<ValueId>, OpError> {
    let size = ctx.operand(0)?;
    let size = known_size(ctx, size)?;
    let dtype = element_type(ctx, ctx.int("output_datatype", 1)?)?;
    let turn = if ctx.flag("periodic", true)? { size } else { size.saturating_sub(1) };
    let real = |value| number(DType::F64, value);
    let angle = |turns: f64| {
        let step = turns * 2.0 * std::f64::consts::PI / turn.max(1) as f64;
        mul(Expr::index(0).cast(DType::F64), real(step)).unary(Unary::Cos)
    };
    let expr = add(add(real(a), mul(real(b), angle(1.0))), mul(real(c), angle(2.0))).cast(dtype);
    Ok(vec![ctx.emit(Op::Pointwise { expr, dims: vec![Dim::Static(size)] }, &[])?])
}

/// Triangular filters, evenly spaced in mel: `[frequencies, filters]`.
fn mel_weight_matrix(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let operands = ctx.variadic()?;
    let mut numbers = Vec::new();
    for operand in operands {
        match ctx.constant_f64s(operand)?.as_slice() {
            [value] => numbers.push(*value),
            values => return Err(ctx.invalid(&format!("expected one element, found {}", values.len()))),
        }
    }
    let &[filters, length, rate, low, high] = numbers.as_slice() else {
        return Err(ctx.invalid("expected five inputs"));
    };
    let dtype = element_type(ctx, ctx.int("output_datatype", 1)?)?;
    let in_range = |size: f64| (0.0..1e6).contains(&size);
    if !(in_range(filters) && in_range(length) && rate > 0.0 && 0.0 <= low && low <= high) {
        return Err(ctx.invalid(&format!("{filters} filters from {low} to {high} at {rate}, of length {length}")));
    }
    let (rows, columns) = ((length / 2.0).floor() as usize + 1, filters as usize);
    if rows.saturating_mul(columns) > FILTER_ELEMENTS_MAX {
        let hint = format!("a matrix of {rows} x {columns}; the limit is {FILTER_ELEMENTS_MAX} elements");
        return Err(ctx.unsupported(&hint));
    }
    let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
    let step = (mel(high) - mel(low)) / (filters + 2.0);
    let bin = |index: usize| {
        let hertz = 700.0 * (10f64.powf((index as f64 * step + mel(low)) / 2595.0) - 1.0);
        ((length + 1.0) * hertz / rate).floor()
    };
    let mut matrix = Vec::with_capacity(rows * columns * dtype.bytes());
    for row in 0..rows {
        for column in 0..columns {
            let (left, center, right) = (bin(column), bin(column + 1), bin(column + 2));
            let row = row as f64;
            let weight = match row {
                _ if row == center => 1.0,
                _ if left <= row && row < center => (row - left) / (center - left),
                _ if center < row && row < right => (right - row) / (right - center),
                _ => 0.0,
            };
            matrix.extend(Scalar::from_f64(dtype, weight).to_bytes());
        }
    }
    let ty = TensorType::new(dtype, &[rows as u64, columns as u64]);
    Ok(vec![ctx.literal(Tensor { ty, data: Buffer::from_bytes(&matrix) })])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn transforms_and_their_inverse() {
        let x = tensor(&[1, 4, 1], &[1f32, 2.0, 3.0, 4.0]);
        let whole = [10f32, 0.0, -2.0, 2.0, -2.0, 0.0, -2.0, -2.0];
        let forward = Case::new("DFT", 20).input(x.clone());
        assert_close(&forward.one(), &[1, 4, 2], &whole);
        assert_close(&forward.int("onesided", 1).one(), &[1, 3, 2], &whole[..6]);
        let back = Case::new("DFT", 20).input(tensor(&[1, 4, 2], &whole)).int("inverse", 1);
        assert_close(&back.one(), &[1, 4, 2], &[1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 4.0, 0.0]);
        let half = Case::new("DFT", 20).input(tensor(&[1, 3, 2], &whole[..6])).int("inverse", 1).int("onesided", 1);
        assert_close(&half.one(), &[1, 4, 1], &[1.0, 2.0, 3.0, 4.0]);
        let padded = Case::new("DFT", 20).input(x).constant(tensor(&[], &[8i64])).int("onesided", 1);
        assert_eq!(padded.one().ty.sizes(), [1, 5, 2]);
    }

    #[test]
    fn frames_are_windowed() {
        let case = Case::new("STFT", 17).input(tensor(&[1, 4, 1], &[1f32, 2.0, 3.0, 4.0]));
        let case = case.constant(tensor(&[], &[2i64])).constant(tensor(&[2], &[1f32, 10.0]));
        assert_close(&case.one(), &[1, 2, 2, 2], &[21.0, 0.0, -19.0, 0.0, 43.0, 0.0, -37.0, 0.0]);
    }

    #[test]
    fn matrices_of_filters_are_bounded() {
        let [filters, length, rate] = [999_999i64, 999_999, 16_000].map(|number| tensor(&[], &[number]));
        let case = Case::new("MelWeightMatrix", 17).constant(filters).constant(length).constant(rate);
        let case = case.constant(tensor(&[], &[0f32])).constant(tensor(&[], &[8000f32]));
        assert!(case.error().contains("the limit is"), "{}", case.error());
    }

    #[test]
    fn windows() {
        let case = Case::new("HannWindow", 17).constant(tensor(&[], &[4i64]));
        assert_close(&case.one(), &[4], &[0.0, 0.5, 1.0, 0.5]);
        assert_close(&case.int("periodic", 0).one(), &[4], &[0.0, 0.75, 0.75, 0.0]);
    }
}
