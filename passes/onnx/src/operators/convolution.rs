//! Convolutions, plain and transposed, and their integer forms.

use ir::ValueId;
use planfile::op::Window;
use planfile::{Binary, Compare, DType, Dim, Expr, Op, Scalar};

use super::pooling::{AutoPad, lists, window};
use super::quantization::{requantize, shifted};
use super::reshape::unsigned;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Col2Im",        18, col2im),
    row("Conv",          1,  conv),
    row("ConvTranspose", 1,  conv_transpose),
    row("ConvInteger",   10, conv_integer),
    row("QLinearConv",   10, qlinear_conv),
];

fn conv(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
    let y = convolve(ctx, x, w)?;
    let bias = ctx.optional(2);
    Ok(vec![add_bias(ctx, y, bias)?])
}

fn convolve(ctx: &mut Context<'_>, x: ValueId, w: ValueId) -> Result<ValueId, OpError> {
    let kernel = kernel(ctx, x, w)?;
    let window = window(ctx, &ctx.sizes(x), kernel)?;
    let output_pads = vec![0; window.sizes.len()];
    ctx.emit(Op::Conv { window, groups: groups(ctx)?, transposed: false, output_pads }, &[x, w])
}

fn groups(ctx: &Context<'_>) -> Result<u64, OpError> {
    let groups = ctx.int("group", 1)?;
    u64::try_from(groups).map_err(|_| ctx.invalid(&format!("{groups} groups")))
}

/// Spatial sizes of the weights, which `kernel_shape` repeats if present.
fn kernel(ctx: &Context<'_>, x: ValueId, w: ValueId) -> Result<Vec<u64>, OpError> {
    let sizes = ctx.sizes(w);
    if ctx.rank(x) != sizes.len() || ctx.rank(x) < 2 || ctx.dtype(x) != ctx.dtype(w) {
        return Err(ctx.invalid(&format!("weights {} do not fit the input {}", ctx.ty(w), ctx.ty(x))));
    }
    let kernel = sizes[2..].to_vec();
    let stated = ctx.ints("kernel_shape")?.filter(|stated| !stated.is_empty());
    let agrees = stated.as_ref().is_none_or(|stated| stated.iter().map(|&n| n as u64).eq(kernel.iter().copied()));
    if !agrees {
        return Err(ctx.invalid(&format!("`kernel_shape` {stated:?} is not that of the weights {}", ctx.ty(w))));
    }
    Ok(kernel)
}

/// A number per channel, shaped to broadcast to a tensor of `rank` with the channels in dimension 1.
fn by_channel(ctx: &mut Context<'_>, parameter: ValueId, rank: usize) -> Result<ValueId, OpError> {
    let channels = ctx.count(&ctx.sizes(parameter))?;
    ctx.reshape(parameter, &[&[channels], vec![1; rank.saturating_sub(2)].as_slice()].concat())
}

pub(super) fn add_bias(ctx: &mut Context<'_>, y: ValueId, bias: Option<ValueId>) -> Result<ValueId, OpError> {
    let Some(bias) = bias else { return Ok(y) };
    if ctx.sizes(bias) != ctx.sizes(y)[1..2] {
        return Err(ctx.invalid(&format!("bias {} for a result of {}", ctx.ty(bias), ctx.ty(y))));
    }
    let bias = by_channel(ctx, bias, ctx.rank(y))?;
    ctx.pointwise(Expr::operand(0).binary(Binary::Add, Expr::operand(1)), &[y, bias])
}

fn conv_transpose(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
    let sizes = kernel(ctx, x, w)?;
    let spatial = sizes.len();
    let lists = lists(ctx, spatial)?;
    let mut output_pads: Vec<u64> = match ctx.ints("output_padding")?.filter(|pads| !pads.is_empty()) {
        None => vec![0; spatial],
        Some(pads) => {
            let pads: Result<Vec<u64>, _> = pads.iter().map(|&pad| u64::try_from(pad)).collect();
            let pads = pads.ok().filter(|pads| pads.len() == spatial);
            pads.ok_or_else(|| ctx.invalid("`output_padding` must have one size per spatial dimension"))?
        }
    };
    let input = ctx.sizes(x)[2..].to_vec();
    let mut pads = lists.pads;
    if let Some(wanted) = wanted_sizes(ctx, &input, &lists.strides)? {
        for axis in 0..spatial {
            let extent = i128::from(lists.dilations[axis]) * (i128::from(sizes[axis]) - 1) + 1;
            let stretched = i128::from(lists.strides[axis]) * (i128::from(input[axis]) - 1);
            let surplus = stretched + extent + i128::from(output_pads[axis]) - i128::from(wanted[axis]);
            let out_of_range = || ctx.invalid(&format!("`output_shape` {wanted:?} is out of reach"));
            if surplus < 0 {
                // Nothing reaches the end of the result: as if it had been padded there.
                output_pads[axis] += u64::try_from(-surplus).map_err(|_| out_of_range())?;
                pads[axis] = (0, 0);
            } else {
                let surplus = i64::try_from(surplus).map_err(|_| out_of_range())?;
                let (small, large) = (surplus / 2, surplus - surplus / 2);
                pads[axis] = if lists.auto == AutoPad::SameUpper { (small, large) } else { (large, small) };
            }
        }
    }
    let window = Window { sizes, strides: lists.strides, dilations: lists.dilations, pads };
    let y = ctx.emit(Op::Conv { window, groups: groups(ctx)?, transposed: true, output_pads }, &[x, w])?;
    let bias = ctx.optional(2);
    Ok(vec![add_bias(ctx, y, bias)?])
}

/// Spatial sizes that the result must have, if they determine the padding.
fn wanted_sizes(ctx: &Context<'_>, input: &[u64], strides: &[u64]) -> Result<Option<Vec<u64>>, OpError> {
    if let Some(shape) = ctx.ints("output_shape")?.filter(|shape| !shape.is_empty()) {
        // Older exporters include batch and channels.
        let first = if shape.len() == input.len() + 2 { 2 } else { 0 };
        let sizes: Option<Vec<u64>> = shape[first..].iter().map(|&size| u64::try_from(size).ok()).collect();
        let sizes = sizes.filter(|sizes| sizes.len() == input.len());
        return sizes.map(Some).ok_or_else(|| ctx.invalid(&format!("`output_shape` is {shape:?}")));
    }
    match AutoPad::of(ctx)? {
        AutoPad::Explicit | AutoPad::Valid => Ok(None),
        AutoPad::SameUpper | AutoPad::SameLower => {
            let sizes = input.iter().zip(strides).map(|(&size, &stride)| ctx.count(&[size, stride]));
            sizes.collect::<Result<_, _>>().map(Some)
        }
    }
}

/// Exact in `i32`: padding stands for the zero point, which is 0 after the shift.
fn conv_integer(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
    let (x_zero, w_zero) = (ctx.optional(2), ctx.optional(3));
    Ok(vec![integer_convolution(ctx, x, x_zero, w, w_zero)?])
}

fn integer_convolution(
    ctx: &mut Context<'_>,
    x: ValueId,
    x_zero: Option<ValueId>,
    w: ValueId,
    w_zero: Option<ValueId>,
) -> Result<ValueId, OpError> {
    let x_zero = x_zero.map(|zero| ctx.reshape(zero, &[])).transpose()?;
    // A number per output channel, which is dimension 0 of the weights.
    let w_zero = w_zero.map(|zero| by_channel(ctx, zero, ctx.rank(w) + 1)).transpose()?;
    let x = shifted(ctx, x, x_zero, DType::I32)?;
    let w = shifted(ctx, w, w_zero, DType::I32)?;
    convolve(ctx, x, w)
}

fn qlinear_conv(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w) = (ctx.operand(0)?, ctx.operand(3)?);
    let (x_zero, w_zero) = (ctx.operand(2)?, ctx.operand(5)?);
    let sum = integer_convolution(ctx, x, Some(x_zero), w, Some(w_zero))?;
    let bias = ctx.optional(8);
    let sum = add_bias(ctx, sum, bias)?;
    let (x_scale, w_scale) = (ctx.operand(1)?, ctx.operand(4)?);
    let x_scale = ctx.reshape(x_scale, &[])?;
    let w_scale = by_channel(ctx, w_scale, ctx.rank(sum))?;
    let (y_scale, y_zero) = (ctx.operand(6)?, ctx.operand(7)?);
    let y_scale = ctx.reshape(y_scale, &[])?;
    let y_zero = ctx.reshape(y_zero, &[])?;
    Ok(vec![requantize(ctx, sum, x_scale, w_scale, y_scale, y_zero)?])
}

/// Adds up overlapping blocks: a transposed convolution whose filters each have a single 1.
fn col2im(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, image, block) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let (image, block) = (ctx.constant_i64s(image)?, ctx.constant_i64s(block)?);
    let (image, block) = (unsigned(ctx, &image)?, unsigned(ctx, &block)?);
    let lists = lists(ctx, block.len())?;
    let taps = ctx.count(&block)?;
    let (&[batch, rows, positions], true) = (&ctx.sizes(x)[..], image.len() == block.len() && taps > 0) else {
        return Err(ctx.invalid(&format!("{} for blocks {block:?} of {image:?}", ctx.ty(x))));
    };
    let (mut blocks, mut output_pads) = (Vec::new(), Vec::new());
    for axis in 0..block.len() {
        let (low, high) = lists.pads[axis];
        let extent = i128::from(lists.dilations[axis]) * (i128::from(block[axis]) - 1) + 1;
        let room = i128::from(image[axis]) + i128::from(low) + i128::from(high) - extent;
        let stride = i128::from(lists.strides[axis]);
        let Ok(room) = u64::try_from(room) else {
            return Err(ctx.invalid(&format!("a block of {block:?} does not fit in {image:?}")));
        };
        blocks.push(room / stride as u64 + 1);
        // What no block reaches at the end.
        output_pads.push(room % stride as u64);
    }
    let channels = rows / taps;
    if ctx.count(&blocks)? != positions || channels * taps != rows {
        return Err(ctx.invalid(&format!("{} holds not {blocks:?} blocks of {block:?}", ctx.ty(x))));
    }
    let dtype = ctx.dtype(x);
    let x = ctx.reshape(x, &[&[batch, rows], &blocks[..]].concat())?;
    let own = Expr::index(0).binary(Binary::Rem, Expr::constant(Scalar::i64(taps.cast_signed())));
    let one = own.compare(Compare::Eq, Expr::index(2)).select(number(dtype, 1.0), number(dtype, 0.0));
    let dims = [rows, 1, taps].into_iter().map(Dim::Static).collect();
    let filters = ctx.emit(Op::Pointwise { expr: one, dims }, &[])?;
    let filters = ctx.reshape(filters, &[&[rows, 1], &block[..]].concat())?;
    let window = Window { sizes: block, strides: lists.strides, dilations: lists.dilations, pads: lists.pads };
    Ok(vec![ctx.emit(Op::Conv { window, groups: channels, transposed: true, output_pads }, &[x, filters])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn pads_strides_and_adds_the_bias() {
        let x = tensor(&[1, 1, 4], &[1f32, 2.0, 3.0, 4.0]);
        let case = Case::new("Conv", 11).ints("pads", &[1, 0]).ints("strides", &[2]).input(x);
        let case = case.constant(tensor(&[1, 1, 2], &[1f32, 10.0])).constant(tensor(&[1], &[100f32]));
        assert_close(&case.one(), &[1, 1, 2], &[110.0, 132.0]);
    }

    #[test]
    fn same_padding_keeps_the_size() {
        let case = |auto: &str| {
            let x = tensor(&[1, 1, 3], &[1f32, 2.0, 3.0]);
            Case::new("Conv", 11).string("auto_pad", auto).input(x).constant(tensor(&[1, 1, 2], &[1f32, 10.0]))
        };
        assert_close(&case("SAME_UPPER").one(), &[1, 1, 3], &[21.0, 32.0, 3.0]);
        assert_close(&case("SAME_LOWER").one(), &[1, 1, 3], &[10.0, 21.0, 32.0]);
        assert_close(&case("VALID").one(), &[1, 1, 2], &[21.0, 32.0]);
    }

    fn transposed() -> Case {
        let x = tensor(&[1, 1, 2], &[1f32, 2.0]);
        Case::new("ConvTranspose", 11).ints("strides", &[2]).input(x).constant(tensor(&[1, 1, 3], &[1f32, 10.0, 100.0]))
    }

    #[test]
    fn transposed_convolutions_find_their_padding() {
        assert_close(&transposed().one(), &[1, 1, 5], &[1.0, 10.0, 102.0, 20.0, 200.0]);
        assert_close(&transposed().ints("pads", &[1, 0]).one(), &[1, 1, 4], &[10.0, 102.0, 20.0, 200.0]);
        let padded = transposed().ints("output_padding", &[1]);
        assert_close(&padded.one(), &[1, 1, 6], &[1.0, 10.0, 102.0, 20.0, 200.0, 0.0]);
        let upper = transposed().string("auto_pad", "SAME_UPPER");
        assert_close(&upper.one(), &[1, 1, 4], &[1.0, 10.0, 102.0, 20.0]);
        let shaped = transposed().ints("output_shape", &[4]);
        assert_close(&shaped.one(), &[1, 1, 4], &[10.0, 102.0, 20.0, 200.0]);
        let larger = transposed().ints("output_shape", &[7]);
        assert_close(&larger.one(), &[1, 1, 7], &[1.0, 10.0, 102.0, 20.0, 200.0, 0.0, 0.0]);
    }

    #[test]
    fn integer_padding_stands_for_the_zero_point() {
        let case = Case::new("ConvInteger", 10).ints("pads", &[1, 0]).input(tensor(&[1, 1, 2], &[5u8, 7]));
        let case = case.constant(tensor(&[1, 1, 2], &[3u8, 4])).constant(tensor(&[], &[5u8]));
        assert_eq!(case.one(), tensor(&[1, 1, 2], &[0i32, 8]));
    }

    #[test]
    fn refuses_a_kernel_shape_other_than_the_weights() {
        let case = Case::new("Conv", 11).ints("kernel_shape", &[2]).input(tensor(&[1, 1, 3], &[1f32, 2.0, 3.0]));
        let error = case.constant(tensor(&[1, 1, 1], &[1f32])).error();
        assert!(error.contains("not that of the weights"), "{error}");
    }

    #[test]
    fn overlapping_blocks_add_up() {
        let case = Case::new("Col2Im", 18).input(tensor(&[1, 2, 2], &[1f32, 2.0, 10.0, 20.0]));
        let case = case.constant(tensor(&[1], &[3i64])).constant(tensor(&[1], &[2i64]));
        assert_eq!(case.one(), tensor(&[1, 1, 3], &[1f32, 12.0, 20.0]));
    }
}
