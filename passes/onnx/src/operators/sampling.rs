//! Reading pictures between their pixels: at places that are computed, with weights by distance.
//!
//! A place is a coordinate per spatial dimension. Each of the pixels around it is a gather from the flattened picture,
//! and the result their weighted sum.

use ir::ValueId;
use planfile::op::ReduceKind;
use planfile::{Binary, Combine, Compare, DType, Dim, Expr, Op, Scalar, Unary};

use super::activation::{add, max, min, mul, sub};
use super::convolution::add_bias;
use super::pooling::lists;
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("AffineGrid", 20, affine_grid),
    row("DeformConv", 19, deform_conv),
    row("GridSample", 16, grid_sample),
    row("RoiAlign",   10, roi_align),
];

/// Coordinates and weights are computed in it.
const REAL: DType = DType::F32;

fn real(value: f64) -> Expr {
    number(REAL, value)
}

fn integer(value: u64) -> Expr {
    Expr::constant(Scalar::i64(value.cast_signed()))
}

/// What is beyond the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beyond {
    Zeros,
    Border,
    /// Mirrored at the edge, or at the centres of the outer pixels.
    Reflection {
        centres: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

impl Mode {
    /// Pixels around a coordinate, from the one below it on.
    const fn offsets(self) -> &'static [i8] {
        match self {
            Self::Nearest => &[0],
            Self::Linear => &[0, 1],
            Self::Cubic => &[-1, 0, 1, 2],
        }
    }

    /// Weight of the pixel at `offset` when the coordinate is `t`, from 0 to 1, past the one below it.
    fn weight(self, offset: i8, t: Expr) -> Expr {
        match self {
            Self::Nearest => real(1.0),
            Self::Linear if offset == 0 => sub(real(1.0), t),
            Self::Linear => t,
            Self::Cubic => {
                // Keys' convolution with a = -0.75; the distance is below 1 for the inner two pixels.
                let a = -0.75;
                let d = sub(t, real(f64::from(offset))).unary(Unary::Abs);
                let horner = |factors: [f64; 4]| {
                    let [third, second, first, zeroth] = factors.map(real);
                    let inner = add(mul(third, d.clone()), second);
                    add(mul(add(mul(inner, d.clone()), first), d.clone()), zeroth)
                };
                if matches!(offset, 0 | 1) {
                    horner([a + 2.0, -(a + 3.0), 0.0, 1.0])
                } else {
                    horner([a, -5.0 * a, 8.0 * a, -4.0 * a])
                }
            }
        }
    }
}

/// `x` mirrored into the range between the edges.
fn reflect(x: Expr, size: u64, centres: bool) -> Expr {
    let (low, high) = if centres { (0.0, size as f64 - 1.0) } else { (-0.5, size as f64 - 0.5) };
    let range = high - low;
    if range <= 0.0 {
        return real(low.max(0.0));
    }
    // A triangle wave of twice the range.
    let phase = sub(x, real(low)).binary(Binary::Mod, real(2.0 * range));
    let folded = sub(real(range), sub(phase, real(range)).unary(Unary::Abs));
    add(folded, real(low))
}

/// Pixels of `x: [batch, channels, spatial…]` at `places`, one `[batch, 1, points]` per spatial dimension;
/// `[batch, channels, points]`.
fn sample(
    ctx: &mut Context<'_>,
    x: ValueId,
    places: &[ValueId],
    mode: Mode,
    beyond: Beyond,
) -> Result<ValueId, OpError> {
    let sizes = ctx.sizes(x);
    let (dtype, spatial) = (ctx.dtype(x), sizes[2..].to_vec());
    if ctx.count(&spatial)? == 0 {
        return Err(ctx.invalid(&format!("{} has no pixels", ctx.ty(x))));
    }
    let flat = ctx.reshape(x, &[sizes[0], sizes[1], ctx.count(&spatial)?])?;
    let points = ctx.sizes(places[0])[2];
    let corners = mode.offsets().len().pow(spatial.len() as u32);
    let mut total = None;
    for corner in 0..corners {
        let (mut index, mut weight) = (integer(0), real(1.0));
        let mut digits = corner;
        for (axis, &size) in spatial.iter().enumerate() {
            let offset = mode.offsets()[digits % mode.offsets().len()];
            digits /= mode.offsets().len();
            let place = || moved(Expr::operand(axis as u16), size, mode, beyond);
            let below = || place().unary(if mode == Mode::Nearest { Unary::Round } else { Unary::Floor });
            let pixel = || add(below(), real(f64::from(offset)));
            let last = || real(size as f64 - 1.0);
            let inside = match beyond {
                Beyond::Reflection { centres } => reflect(pixel(), size, centres).unary(Unary::Trunc),
                Beyond::Zeros | Beyond::Border => pixel(),
            };
            let inside = max(real(0.0), min(last(), inside)).cast(DType::I64);
            index = add(mul(index, integer(size)), inside);
            weight = mul(weight, mode.weight(offset, sub(place(), below())));
            if beyond == Beyond::Zeros {
                let seen =
                    pixel().compare(Compare::Ge, real(0.0)).binary(Binary::And, pixel().compare(Compare::Le, last()));
                weight = seen.select(weight, real(0.0));
            }
        }
        let index = ctx.pointwise(index, places)?;
        let index = ctx.broadcast(index, &[sizes[0], sizes[1], points])?;
        let weight = ctx.pointwise(weight, places)?;
        let pixels = ctx.emit(Op::GatherElements { axis: 2 }, &[flat, index])?;
        let share = mul(Expr::operand(0).cast(REAL), Expr::operand(1));
        total = Some(match total {
            None => ctx.pointwise(share, &[pixels, weight])?,
            Some(total) => ctx.pointwise(add(Expr::operand(2), share), &[pixels, weight, total])?,
        });
    }
    let Some(total) = total else { return Err(ctx.invalid("there are no spatial dimensions")) };
    ctx.cast(total, dtype)
}

/// Where a coordinate beyond the edge is read.
fn moved(place: Expr, size: u64, mode: Mode, beyond: Beyond) -> Expr {
    // The nearest pixel is found before the edge is looked at.
    let place = if mode == Mode::Nearest { place.unary(Unary::Round) } else { place };
    match beyond {
        Beyond::Zeros => place,
        Beyond::Border => max(real(0.0), min(real(size as f64 - 1.0), place)),
        Beyond::Reflection { centres } => reflect(place, size, centres),
    }
}

fn grid_sample(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, grid) = (ctx.operand(0)?, ctx.operand(1)?);
    let (sizes, grid_sizes) = (ctx.sizes(x), ctx.sizes(grid));
    let rank = sizes.len();
    if rank < 3 || grid_sizes.len() != rank || grid_sizes[0] != sizes[0] || grid_sizes[rank - 1] != rank as u64 - 2 {
        return Err(ctx.invalid(&format!("grid {} for {}", ctx.ty(grid), ctx.ty(x))));
    }
    let mode = match ctx.string("mode", "linear")?.as_str() {
        "nearest" => Mode::Nearest,
        "linear" | "bilinear" => Mode::Linear,
        "cubic" | "bicubic" => Mode::Cubic,
        other => return Err(ctx.invalid(&format!("`mode` is `{other}`"))),
    };
    let corners = ctx.flag("align_corners", false)?;
    let beyond = match ctx.string("padding_mode", "zeros")?.as_str() {
        "zeros" => Beyond::Zeros,
        "border" => Beyond::Border,
        "reflection" => Beyond::Reflection { centres: corners },
        other => return Err(ctx.invalid(&format!("`padding_mode` is `{other}`"))),
    };
    let points = ctx.count(&grid_sizes[1..rank - 1])?;
    let mut places = Vec::new();
    for (axis, &size) in sizes[2..].iter().enumerate() {
        // The grid lists coordinates from the last dimension to the first.
        let place = ctx.slice_axis(grid, rank as u8 - 1, (rank - 3 - axis) as u64, 1)?;
        let place = ctx.reshape(place, &[sizes[0], 1, points])?;
        // -1 and 1 are the centres of the outer pixels, or their outer edges.
        let (factor, shift) = if corners { (size as f64 - 1.0, 0.0) } else { (size as f64, -0.5) };
        let scaled = mul(add(Expr::operand(0).cast(REAL), real(1.0)), real(factor / 2.0));
        places.push(ctx.pointwise(add(scaled, real(shift)), &[place])?);
    }
    let y = sample(ctx, x, &places, mode, beyond)?;
    let result = [&sizes[..2], &grid_sizes[1..rank - 1]].concat();
    Ok(vec![ctx.reshape(y, &result)?])
}

/// Coordinates from -1 to 1, last dimension first, after an affine map: `[batch, spatial…, dimensions]`.
fn affine_grid(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (theta, size) = (ctx.operand(0)?, ctx.operand(1)?);
    let size = ctx.constant_i64s(size)?;
    let size = super::reshape::unsigned(ctx, &size)?;
    let corners = ctx.flag("align_corners", false)?;
    let Some(spatial) = size.get(2..).filter(|spatial| !spatial.is_empty()) else {
        return Err(ctx.invalid(&format!("size {size:?} has no spatial dimensions")));
    };
    let count = spatial.len();
    if ctx.sizes(theta) != [size[0], count as u64, count as u64 + 1] {
        return Err(ctx.invalid(&format!("{} for size {size:?}", ctx.ty(theta))));
    }
    let dtype = ctx.dtype(theta);
    // `[dimensions + 1, spatial…]`, the last row all ones.
    let mut base = real(1.0);
    for (axis, &size) in spatial.iter().enumerate() {
        let index = Expr::index(axis as u8 + 1).cast(REAL);
        let place = match size {
            _ if !corners => sub(mul(add(index, real(0.5)), real(2.0 / size.max(1) as f64)), real(1.0)),
            0 | 1 => real(-1.0),
            _ => sub(mul(index, real(2.0 / (size as f64 - 1.0))), real(1.0)),
        };
        let own = Expr::index(0).compare(Compare::Eq, integer((count - 1 - axis) as u64));
        base = own.select(place, base);
    }
    let dims = std::iter::once(count as u64 + 1).chain(spatial.iter().copied()).map(Dim::Static).collect();
    let base = ctx.emit(Op::Pointwise { expr: base.cast(dtype), dims }, &[])?;
    let op = Op::Dot { batch: vec![], contract: vec![(2, 0)], accumulate: dtype.accumulator(), out: dtype };
    let grid = ctx.emit(op, &[theta, base])?;
    let permutation: Vec<u8> = [0].into_iter().chain(2..count as u8 + 2).chain([1]).collect();
    Ok(vec![ctx.transpose(grid, &permutation)?])
}

/// A convolution whose window is bent: each of its elements reads at its place plus an offset.
fn deform_conv(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, w, offset) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let (&[batch, channels, _, _], &[filters, inner, height, width], &[_, _, rows, columns]) =
        (&ctx.sizes(x)[..], &ctx.sizes(w)[..], &ctx.sizes(offset)[..])
    else {
        return Err(ctx.unsupported("only pictures of two dimensions can be convolved with offsets"));
    };
    let positive = |name| ctx.int(name, 1).map(|count| u64::try_from(count).ok().filter(|&count| count > 0));
    let (Some(groups), Some(bends)) = (positive("group")?, positive("offset_group")?) else {
        return Err(ctx.invalid("numbers of groups must be positive"));
    };
    let (taps, points) = (ctx.count(&[height, width])?, ctx.count(&[rows, columns])?);
    let fits = inner.checked_mul(groups) == Some(channels) && filters % groups == 0 && channels % bends == 0;
    if !fits || ctx.sizes(offset)[..2] != [batch, ctx.count(&[bends, taps, 2])?] {
        return Err(ctx.invalid(&format!("weights {} and offsets {} for {}", ctx.ty(w), ctx.ty(offset), ctx.ty(x))));
    }
    let lists = lists(ctx, 2)?;
    // Each group of channels that share offsets is a picture of its own.
    let pictures = ctx.count(&[batch, bends])?;
    let spatial = ctx.sizes(x)[2..].to_vec();
    let split = ctx.reshape(x, &[pictures, channels / bends, spatial[0], spatial[1]])?;
    let offsets = ctx.reshape(offset, &[pictures, height, width, 2, rows, columns])?;
    let mut places = Vec::new();
    for axis in 0..2u8 {
        let at = usize::from(axis);
        let own = ctx.slice_axis(offsets, 3, u64::from(axis), 1)?;
        let own = ctx.reshape(own, &[pictures, height, width, rows, columns])?;
        let first = mul(Expr::index(3 + axis), integer(lists.strides[at]));
        let tap = mul(Expr::index(1 + axis), integer(lists.dilations[at]));
        let start = Expr::constant(Scalar::i64(lists.pads[at].0));
        let place = add(sub(add(first, tap), start).cast(REAL), Expr::operand(0).cast(REAL));
        let place = ctx.pointwise(place, &[own])?;
        places.push(ctx.reshape(place, &[pictures, 1, ctx.count(&[taps, points])?])?);
    }
    let mut pixels = sample(ctx, split, &places, Mode::Linear, Beyond::Zeros)?;
    if let Some(mask) = ctx.optional(4) {
        let mask = ctx.reshape(mask, &[pictures, 1, ctx.count(&[taps, points])?])?;
        pixels = ctx.pointwise(mul(Expr::operand(0), Expr::operand(1)), &[pixels, mask])?;
    }
    let depth = ctx.count(&[inner, taps])?;
    let pixels = ctx.reshape(pixels, &[batch, groups, depth, points])?;
    let weights = ctx.reshape(w, &[groups, filters / groups, depth])?;
    let dtype = ctx.dtype(x);
    let batched = vec![(0, 1)];
    let op = Op::Dot { batch: batched, contract: vec![(2, 2)], accumulate: dtype.accumulator(), out: dtype };
    // `[group, filter, batch, point]`
    let y = ctx.emit(op, &[weights, pixels])?;
    let y = ctx.transpose(y, &[2, 0, 1, 3])?;
    let y = ctx.reshape(y, &[batch, filters, rows, columns])?;
    let bias = ctx.optional(3);
    Ok(vec![add_bias(ctx, y, bias)?])
}

/// Pools each region of interest to one size: `[regions, channels, height, width]`.
fn roi_align(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, rois, batches) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let (&[_, channels, height, width], &[regions, 4]) = (&ctx.sizes(x)[..], &ctx.sizes(rois)[..]) else {
        return Err(ctx.invalid(&format!("regions {} of {}", ctx.ty(rois), ctx.ty(x))));
    };
    let positive = |name| ctx.int(name, 1).map(|size| u64::try_from(size).ok().filter(|&size| size > 0));
    let (Some(rows), Some(columns)) = (positive("output_height")?, positive("output_width")?) else {
        return Err(ctx.invalid("the size of the result must be positive"));
    };
    let Some(ratio) = u64::try_from(ctx.int("sampling_ratio", 0)?).ok().filter(|&ratio| ratio > 0) else {
        return Err(ctx.unsupported("a number of samples that depends on the regions; set `sampling_ratio`"));
    };
    let largest = match ctx.string("mode", "avg")?.as_str() {
        "avg" => false,
        "max" => true,
        other => return Err(ctx.invalid(&format!("`mode` is `{other}`"))),
    };
    let default = if ctx.opset() < 16 { "output_half_pixel" } else { "half_pixel" };
    let half_pixel = ctx.string("coordinate_transformation_mode", default)? == "half_pixel";
    let scale = f64::from(ctx.float("spatial_scale", 1.0)?);
    let dtype = ctx.dtype(x);
    let pictures = ctx.emit(Op::Gather { axis: 0 }, &[x, batches])?;
    let (grid_rows, grid_columns) = (ctx.count(&[rows, ratio])?, ctx.count(&[columns, ratio])?);
    // Coordinates along each axis; where there is no picture at all, weight 0.
    let mut places = Vec::new();
    for (axis, bins, size) in [(1u64, rows, height), (0, columns, width)] {
        let start = ctx.slice_axis(rois, 1, axis, 1)?;
        let end = ctx.slice_axis(rois, 1, axis + 2, 1)?;
        let (start, end) = (ctx.reshape(start, &[regions, 1, 1])?, ctx.reshape(end, &[regions, 1, 1])?);
        let shift = if half_pixel { 0.5 } else { 0.0 };
        let edge = |operand: u16| sub(mul(Expr::operand(operand).cast(REAL), real(scale)), real(shift));
        let length = sub(edge(1), edge(0));
        let length = if half_pixel { length } else { max(length, real(1.0)) };
        let index = if axis == 1 { 1u8 } else { 2 };
        let sampled = mul(add(Expr::index(index).cast(REAL), real(0.5)), real(1.0 / (bins * ratio) as f64));
        let place = add(edge(0), mul(length, sampled));
        let dims = [regions, grid_rows, grid_columns].into_iter().map(Dim::Static).collect();
        let place = ctx.emit(Op::Pointwise { expr: place, dims }, &[start, end])?;
        places.push((ctx.reshape(place, &[regions, 1, ctx.count(&[grid_rows, grid_columns])?])?, size));
    }
    let seen = |operand: u16, size: u64| {
        let above = Expr::operand(operand).compare(Compare::Ge, real(-1.0));
        above.binary(Binary::And, Expr::operand(operand).compare(Compare::Le, real(size as f64)))
    };
    let seen = seen(0, height).binary(Binary::And, seen(1, width)).cast(REAL);
    let both = [places[0].0, places[1].0];
    let seen = ctx.pointwise(seen, &both)?;
    let pixels = if largest {
        largest_share(ctx, pictures, &both)?
    } else {
        sample(ctx, pictures, &both, Mode::Linear, Beyond::Border)?
    };
    let pixels = ctx.pointwise(mul(Expr::operand(0), Expr::operand(1).cast(dtype)), &[pixels, seen])?;
    let bins = ctx.reshape(pixels, &[regions, channels, rows, ratio, columns, ratio])?;
    let kind = if largest { ReduceKind::Combine(Combine::Max) } else { ReduceKind::Mean };
    Ok(vec![ctx.emit(Op::Reduce { kind, axes: vec![3, 5], keep: false }, &[bins])?])
}

/// The largest of the four weighted pixels around a place: what ONNX pools in mode `max`.
fn largest_share(ctx: &mut Context<'_>, x: ValueId, places: &[ValueId; 2]) -> Result<ValueId, OpError> {
    let sizes = ctx.sizes(x);
    let (dtype, points) = (ctx.dtype(x), ctx.sizes(places[0])[2]);
    let flat = ctx.reshape(x, &[sizes[0], sizes[1], ctx.count(&sizes[2..])?])?;
    let mut largest = None;
    for corner in 0..4u8 {
        let (mut index, mut weight) = (integer(0), real(1.0));
        for (axis, offset) in [(0u16, corner / 2), (1, corner % 2)] {
            let size = sizes[usize::from(axis) + 2];
            let last = || real(size as f64 - 1.0);
            let place = || max(real(0.0), min(last(), Expr::operand(axis)));
            let below = || place().unary(Unary::Floor);
            let pixel = min(last(), add(below(), real(f64::from(offset)))).cast(DType::I64);
            index = add(mul(index, integer(size)), pixel);
            weight = mul(weight, Mode::Linear.weight(offset as i8, sub(place(), below())));
        }
        let index = ctx.pointwise(index, places)?;
        let index = ctx.broadcast(index, &[sizes[0], sizes[1], points])?;
        let weight = ctx.pointwise(weight, places)?;
        let pixels = ctx.emit(Op::GatherElements { axis: 2 }, &[flat, index])?;
        let share = mul(Expr::operand(0), Expr::operand(1).cast(dtype));
        largest = Some(match largest {
            None => ctx.pointwise(share, &[pixels, weight])?,
            Some(known) => ctx.pointwise(max(Expr::operand(2), share), &[pixels, weight, known])?,
        });
    }
    largest.ok_or_else(|| ctx.invalid("there are no pixels"))
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    fn line(mode: &str, padding: &str, places: &[f32]) -> Case {
        let case = Case::new("GridSample", 20).string("mode", mode).string("padding_mode", padding);
        let case = case.int("align_corners", 1).input(tensor(&[1, 1, 3], &[10f32, 20.0, 40.0]));
        case.input(tensor(&[1, places.len() as u64, 1], places))
    }

    #[test]
    fn reads_between_pixels() {
        assert_close(&line("linear", "zeros", &[-1.0, -0.5, 0.5]).one(), &[1, 1, 3], &[10.0, 15.0, 30.0]);
        assert_close(&line("nearest", "zeros", &[-0.9, 0.9]).one(), &[1, 1, 2], &[10.0, 40.0]);
        assert_close(&line("cubic", "border", &[0.0, 1.0]).one(), &[1, 1, 2], &[20.0, 40.0]);
    }

    #[test]
    fn reads_beyond_the_edge() {
        assert_close(&line("linear", "zeros", &[1.5, 3.0]).one(), &[1, 1, 2], &[20.0, 0.0]);
        assert_close(&line("linear", "border", &[1.5, -9.0]).one(), &[1, 1, 2], &[40.0, 10.0]);
        assert_close(&line("linear", "reflection", &[1.5, -2.0]).one(), &[1, 1, 2], &[30.0, 20.0]);
    }

    #[test]
    fn the_identity_makes_a_plain_grid() {
        let case = Case::new("AffineGrid", 20).input(tensor(&[1, 2, 3], &[1f32, 0.0, 0.0, 0.0, 1.0, 0.5]));
        let case = case.constant(tensor(&[4], &[1i64, 1, 1, 2])).int("align_corners", 0);
        assert_close(&case.one(), &[1, 1, 2, 2], &[-0.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn offsets_move_the_window() {
        let case = Case::new("DeformConv", 19).input(tensor(&[1, 1, 1, 3], &[1f32, 3.0, 7.0]));
        let case = case.constant(tensor(&[1, 1, 1, 1], &[2f32]));
        let offsets = tensor(&[1, 2, 1, 3], &[0f32, 0.0, 0.0, 0.0, 0.5, 1.0]);
        assert_close(&case.input(offsets).one(), &[1, 1, 1, 3], &[2.0, 10.0, 0.0]);
    }

    #[test]
    fn regions_are_averaged() {
        let case = Case::new("RoiAlign", 16).input(tensor(&[1, 1, 2, 2], &[1f32, 2.0, 3.0, 4.0]));
        let case = case.input(tensor(&[1, 4], &[0f32, 0.0, 2.0, 2.0])).constant(tensor(&[1], &[0i64]));
        assert_close(&case.clone().int("sampling_ratio", 2).one(), &[1, 1, 1, 1], &[2.5]);
        assert!(case.error().contains("sampling_ratio"));
    }
}
