//! Pooling, and the sliding windows that it shares with convolutions.

use ir::ValueId;
use planfile::op::{IndexOrder, PadMode, PoolKind, ReduceKind, Window};
use planfile::{Combine, Op};

use super::reduction::norm_of;
use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("MaxUnpool",         9, max_unpool),
    row("MaxPool",           1, max_pool),
    row("AveragePool",       1, average_pool),
    row("LpPool",            2, lp_pool),
    row("GlobalMaxPool",     1, global_max_pool),
    row("GlobalAveragePool", 1, global_average_pool),
    row("GlobalLpPool",      2, global_lp_pool),
];

/// How `auto_pad` says that padding is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AutoPad {
    Explicit,
    Valid,
    SameUpper,
    SameLower,
}

impl AutoPad {
    pub(super) fn of(ctx: &Context<'_>) -> Result<Self, OpError> {
        match ctx.string("auto_pad", "NOTSET")?.as_str() {
            "NOTSET" | "" => Ok(Self::Explicit),
            "VALID" => Ok(Self::Valid),
            "SAME_UPPER" => Ok(Self::SameUpper),
            "SAME_LOWER" => Ok(Self::SameLower),
            other => Err(ctx.invalid(&format!("`auto_pad` is `{other}`"))),
        }
    }
}

/// Attributes of a window, defaults filled in, one entry per spatial dimension.
pub(super) struct Lists {
    pub(super) strides: Vec<u64>,
    pub(super) dilations: Vec<u64>,
    /// As stated; zeros unless `auto` is explicit.
    pub(super) pads: Vec<(i64, i64)>,
    pub(super) auto: AutoPad,
}

pub(super) fn lists(ctx: &Context<'_>, spatial: usize) -> Result<Lists, OpError> {
    let auto = AutoPad::of(ctx)?;
    let pads = match ctx.ints("pads")?.filter(|pads| !pads.is_empty() && auto == AutoPad::Explicit) {
        None => vec![(0, 0); spatial],
        Some(pads) if pads.len() == 2 * spatial => {
            pads[..spatial].iter().zip(&pads[spatial..]).map(|(&low, &high)| (low, high)).collect()
        }
        Some(pads) => return Err(ctx.invalid(&format!("`pads` {pads:?} for {spatial} spatial dimensions"))),
    };
    Ok(Lists {
        strides: positive(ctx, "strides", spatial)?,
        dilations: positive(ctx, "dilations", spatial)?,
        pads,
        auto,
    })
}

/// A list of positive numbers, all 1 when absent. Bounded, so that products with sizes stay far from overflow.
fn positive(ctx: &Context<'_>, name: &str, spatial: usize) -> Result<Vec<u64>, OpError> {
    let Some(values) = ctx.ints(name)?.filter(|values| !values.is_empty()) else { return Ok(vec![1; spatial]) };
    let fits = values.len() == spatial && values.iter().all(|&value| 0 < value && value < 1 << 31);
    let values = fits.then(|| values.iter().map(|value| value.unsigned_abs()).collect());
    values.ok_or_else(|| ctx.invalid(&format!("`{name}` must be {spatial} positive numbers below 2^31")))
}

/// Padding that yields `ceil(size / stride)` positions; `None` if the numbers overflow.
fn same_pads(size: u64, kernel: u64, stride: u64, dilation: u64, upper: bool) -> Option<(i64, i64)> {
    let extent = kernel.checked_sub(1)?.checked_mul(dilation)?.checked_add(1)?;
    let reach = size.div_ceil(stride).saturating_sub(1).checked_mul(stride)?.checked_add(extent)?;
    let total = i64::try_from(reach.saturating_sub(size)).ok()?;
    let (small, large) = (total / 2, total - total / 2);
    Some(if upper { (small, large) } else { (large, small) })
}

/// The window over an input of these sizes.
pub(super) fn window(ctx: &Context<'_>, input: &[u64], kernel: Vec<u64>) -> Result<Window, OpError> {
    let Lists { strides, dilations, mut pads, auto } = lists(ctx, kernel.len())?;
    if let AutoPad::SameUpper | AutoPad::SameLower = auto {
        for (axis, pad) in pads.iter_mut().enumerate() {
            let upper = auto == AutoPad::SameUpper;
            let found = same_pads(input[axis + 2], kernel[axis], strides[axis], dilations[axis], upper);
            *pad = found.ok_or_else(|| ctx.invalid(&format!("a window of {kernel:?} over {input:?} overflows")))?;
        }
    }
    Ok(Window { sizes: kernel, strides, dilations, pads })
}

/// The window of a pooling operator, and whether it may end outside.
fn pool_window(ctx: &Context<'_>, x: ValueId) -> Result<(Window, bool), OpError> {
    let sizes = ctx.sizes(x);
    let Some(spatial) = sizes.len().checked_sub(2) else {
        return Err(ctx.invalid(&format!("{} has no channels", ctx.ty(x))));
    };
    if !ctx.has("kernel_shape") {
        return Err(ctx.invalid("attribute `kernel_shape` is missing"));
    }
    let mut window = window(ctx, &sizes, positive(ctx, "kernel_shape", spatial)?)?;
    let ceil = ctx.flag("ceil_mode", false)?;
    if ceil {
        for (axis, &size) in sizes[2..].iter().enumerate() {
            shorten(&mut window, axis, size);
        }
    }
    Ok((window, ceil))
}

/// Shortens a window that is longer than the padded picture and, rounded up, takes one position all the same: taps
/// behind the padding meet nothing and count for nothing. Exporters state windows of thousands for a global pool.
fn shorten(window: &mut Window, axis: usize, size: u64) {
    let (low, high) = window.pads[axis];
    let (from, padded) = (i128::from(size) + i128::from(low), i128::from(size) + i128::from(low) + i128::from(high));
    let dilation = i128::from(window.dilations[axis]);
    let beyond = dilation * (i128::from(window.sizes[axis]) - 1) + 1 - padded;
    let takes_one = 0 < beyond && beyond < i128::from(window.strides[axis]);
    if let (true, true, Ok(stride)) = (takes_one, from > 0, u64::try_from(padded))
        && let Some(last) = stride.checked_sub(1)
    {
        window.sizes[axis] = last / window.dilations[axis] + 1;
        // So that the shorter window has no second position either.
        window.strides[axis] = stride;
    }
}

fn max_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (window, ceil) = pool_window(ctx, x)?;
    let order = if ctx.flag("storage_order", false)? { IndexOrder::ColumnMajor } else { IndexOrder::RowMajor };
    let indices = ctx.wants(1).then_some(order);
    ctx.emit_all(Op::Pool { kind: PoolKind::Max, window, ceil, indices }, &[x])
}

fn average_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let kind = PoolKind::Average { count_pads: ctx.flag("count_include_pad", false)? };
    pool(ctx, kind)
}

fn lp_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let kind = PoolKind::Lp { p: order(ctx)? };
    pool(ctx, kind)
}

fn pool(ctx: &mut Context<'_>, kind: PoolKind) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let (window, ceil) = pool_window(ctx, x)?;
    ctx.emit_all(Op::Pool { kind, window, ceil, indices: None }, &[x])
}

/// Attribute `p`: which norm.
fn order(ctx: &Context<'_>) -> Result<u64, OpError> {
    let p = ctx.int("p", 2)?;
    u64::try_from(p).ok().filter(|&p| p > 0).ok_or_else(|| ctx.invalid(&format!("`p` is {p}, expected at least 1")))
}

/// All spatial axes.
fn spatial_axes(ctx: &Context<'_>, x: ValueId) -> Vec<u8> {
    (2..ctx.rank(x)).map(|axis| axis as u8).collect()
}

fn global(ctx: &mut Context<'_>, kind: ReduceKind) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let axes = spatial_axes(ctx, x);
    Ok(vec![ctx.emit(Op::Reduce { kind, axes, keep: true }, &[x])?])
}

fn global_max_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    global(ctx, ReduceKind::Combine(Combine::Max))
}

fn global_average_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    global(ctx, ReduceKind::Mean)
}

fn global_lp_pool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, p) = (ctx.operand(0)?, order(ctx)?);
    let axes = spatial_axes(ctx, x);
    Ok(vec![norm_of(ctx, x, p, axes, true)?])
}

/// Puts maxima back to where they were found; 0 elsewhere.
fn max_unpool(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices) = (ctx.operand(0)?, ctx.operand(1)?);
    let (window, _) = pool_window(ctx, x)?;
    let mut sizes = ctx.sizes(x);
    let mut high = vec![0; sizes.len()];
    for axis in 0..window.sizes.len() {
        let size = i128::from(sizes[axis + 2]);
        let (low, end) = window.pads[axis];
        let whole = (size - 1) * i128::from(window.strides[axis]) + i128::from(window.sizes[axis]);
        let whole = u64::try_from(whole - i128::from(low) - i128::from(end));
        sizes[axis + 2] = whole.map_err(|_| ctx.invalid("the padding is larger than the result"))?;
    }
    if let Some(shape) = ctx.optional(2) {
        let shape = ctx.constant_i64s(shape)?;
        let more = |(&wanted, &size): (&i64, &u64)| wanted.checked_sub(i64::try_from(size).ok()?).filter(|&m| m >= 0);
        let more: Option<Vec<i64>> = shape.iter().zip(&sizes).map(more).collect();
        let more = more.filter(|more| more.len() == sizes.len());
        high = more.ok_or_else(|| ctx.invalid(&format!("`output_shape` {shape:?} is below {sizes:?}")))?;
    }
    let dtype = ctx.dtype(x);
    let zero = ctx.scalar(dtype, 0.0);
    // Indices count through the whole result, batches and channels included.
    let (count, found) = (ctx.count(&sizes)?, ctx.count(&ctx.sizes(x))?);
    let empty = ctx.broadcast(zero, &[count])?;
    let (flat, places) = (ctx.reshape(x, &[found])?, ctx.reshape(indices, &[found])?);
    let y = ctx.emit(Op::ScatterElements { axis: 0, combine: None }, &[empty, places, flat])?;
    let y = ctx.reshape(y, &sizes)?;
    if high.iter().all(|&more| more == 0) {
        return Ok(vec![y]);
    }
    let low = vec![0; high.len()];
    Ok(vec![ctx.emit(Op::Pad { low, high, mode: PadMode::Constant }, &[y, zero])?])
}

#[cfg(test)]
mod tests {
    use super::same_pads;
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn same_padding_puts_the_odd_element_where_asked() {
        assert_eq!(same_pads(5, 2, 1, 1, true), Some((0, 1)));
        assert_eq!(same_pads(5, 2, 1, 1, false), Some((1, 0)));
        // Three positions by 2 with a window of 3 dilated to 5 reach from 0 to 9.
        assert_eq!(same_pads(6, 3, 2, 2, true), Some((1, 2)));
        assert_eq!(same_pads(6, 1, 3, 1, true), Some((0, 0)));
    }

    fn ramp() -> planfile::Tensor {
        tensor(&[1, 1, 5], &[1f32, 2.0, 3.0, 4.0, 9.0])
    }

    #[test]
    fn the_rounded_up_window_may_end_outside() {
        let case =
            |ceil| Case::new("MaxPool", 12).ints("kernel_shape", &[2]).ints("strides", &[2]).int("ceil_mode", ceil);
        assert_close(&case(0).input(ramp()).one(), &[1, 1, 2], &[2.0, 4.0]);
        assert_close(&case(1).input(ramp()).one(), &[1, 1, 3], &[2.0, 4.0, 9.0]);
    }

    #[test]
    fn a_window_larger_than_the_picture_has_one_position_when_rounded_up() {
        let case = |op: &str, kernel: i64, stride: i64| {
            Case::new(op, 22).ints("kernel_shape", &[kernel]).ints("strides", &[stride]).int("ceil_mode", 1)
        };
        assert_close(&case("AveragePool", 2560, 2560).input(ramp()).one(), &[1, 1, 1], &[3.8]);
        assert_close(&case("AveragePool", 6, 2).input(ramp()).one(), &[1, 1, 1], &[3.8]);
        assert_close(&case("LpPool", 7, 3).int("p", 1).input(ramp()).one(), &[1, 1, 1], &[19.0]);
        let maxima = case("MaxPool", 9, 9).outputs(2).input(ramp()).run();
        assert_close(&maxima[0], &[1, 1, 1], &[9.0]);
        assert_eq!(maxima[1], tensor(&[1, 1, 1], &[4i64]));
        // At 0 and 4 only; from 1 of padding on, at 1 and 5.
        assert_close(&case("MaxPool", 3, 7).ints("dilations", &[4]).input(ramp()).one(), &[1, 1, 1], &[9.0]);
        let dilated = case("AveragePool", 3, 7).ints("dilations", &[4]).ints("pads", &[1, 0]).input(ramp());
        assert_close(&dilated.clone().one(), &[1, 1, 1], &[4.0]);
        assert_close(&dilated.int("count_include_pad", 1).one(), &[1, 1, 1], &[2.0]);
        let padded = case("AveragePool", 9, 9).ints("pads", &[1, 2]).input(ramp());
        assert_close(&padded.clone().one(), &[1, 1, 1], &[3.8]);
        assert_close(&padded.int("count_include_pad", 1).one(), &[1, 1, 1], &[19.0 / 8.0]);
        // By a whole stride too large: no position.
        let error = case("MaxPool", 7, 2).input(ramp()).error();
        assert!(error.contains("a window of extent 7 does not fit in 5"), "{error}");
        let error = Case::new("MaxPool", 22).ints("kernel_shape", &[6]).ints("strides", &[6]).input(ramp()).error();
        assert!(error.contains("a window of extent 6 does not fit in 5"), "{error}");
    }

    #[test]
    fn indices_follow_the_storage_order() {
        let x = tensor(&[1, 1, 2, 2], &[1f32, 9.0, 2.0, 3.0]);
        let case =
            |order| Case::new("MaxPool", 12).ints("kernel_shape", &[2, 2]).int("storage_order", order).outputs(2);
        assert_eq!(case(0).input(x.clone()).run()[1], tensor(&[1, 1, 1, 1], &[1i64]));
        assert_eq!(case(1).input(x).run()[1], tensor(&[1, 1, 1, 1], &[2i64]));
    }

    #[test]
    fn padding_counts_only_if_asked() {
        let case = |count| {
            Case::new("AveragePool", 11)
                .ints("kernel_shape", &[3])
                .ints("pads", &[1, 1])
                .int("count_include_pad", count)
        };
        assert_close(&case(0).input(ramp()).one(), &[1, 1, 5], &[1.5, 2.0, 3.0, 16.0 / 3.0, 6.5]);
        assert_close(&case(1).input(ramp()).one(), &[1, 1, 5], &[1.0, 2.0, 3.0, 16.0 / 3.0, 13.0 / 3.0]);
    }

    #[test]
    fn global_pools_reduce_all_spatial_dimensions() {
        let x = || tensor(&[1, 2, 1, 2], &[3f32, 4.0, -6.0, 8.0]);
        assert_close(&Case::new("GlobalMaxPool", 13).input(x()).one(), &[1, 2, 1, 1], &[4.0, 8.0]);
        assert_close(&Case::new("GlobalAveragePool", 13).input(x()).one(), &[1, 2, 1, 1], &[3.5, 1.0]);
        assert_close(&Case::new("GlobalLpPool", 13).input(x()).one(), &[1, 2, 1, 1], &[5.0, 10.0]);
        let norm = Case::new("LpPool", 11).ints("kernel_shape", &[1, 2]).input(x());
        assert_close(&norm.one(), &[1, 2, 1, 1], &[5.0, 10.0]);
    }

    #[test]
    fn refuses_pads_of_another_rank() {
        let error = Case::new("MaxPool", 12).ints("kernel_shape", &[2]).ints("pads", &[1]).input(ramp()).error();
        assert!(error.contains("`pads` [1]"), "{error}");
    }

    #[test]
    fn unpooling_puts_maxima_back() {
        let case = Case::new("MaxUnpool", 11).ints("kernel_shape", &[2]).ints("strides", &[2]);
        let case = case.input(tensor(&[1, 1, 2], &[5f32, 7.0])).input(tensor(&[1, 1, 2], &[1i64, 2]));
        assert_eq!(case.one(), tensor(&[1, 1, 4], &[0f32, 5.0, 7.0, 0.0]));
        let larger = case.constant(tensor(&[3], &[1i64, 1, 5])).one();
        assert_eq!(larger, tensor(&[1, 1, 5], &[0f32, 5.0, 7.0, 0.0, 0.0]));
    }
}
