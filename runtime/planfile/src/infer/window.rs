//! Result types of what slides a window over spatial dimensions: convolutions and pools.

use super::same_rank;
use crate::op::Window;
use crate::types::TensorType;

fn check_window(window: &Window, spatial: usize) -> Result<(), String> {
    let Window { sizes, strides, dilations, pads } = window;
    if [sizes.len(), strides.len(), dilations.len(), pads.len()] != [spatial; 4] {
        return Err(format!("the window must have {spatial} spatial dimensions"));
    }
    let positive = sizes.iter().chain(strides).chain(dilations).all(|&n| n > 0 && n < 1 << 31);
    let bounded = pads.iter().all(|pad| pad.0.unsigned_abs() < 1 << 31 && pad.1.unsigned_abs() < 1 << 31);
    (positive && bounded).then_some(()).ok_or_else(|| "window, strides and dilations must be positive".to_owned())
}

/// Elements of a window that slides over anything.
const FREE_TAPS: u64 = 1 << 12;

/// Whether a pooling window is in proportion to what it slides over. A convolution's has weights, which take memory; a
/// pool's costs nothing to state, but work at each of its positions.
fn check_taps(x: &TensorType, window: &Window) -> Result<(), String> {
    let taps = window.sizes.iter().try_fold(1u64, |taps, &size| taps.checked_mul(size));
    // With paddings, a window may be twice as long as its input in every dimension.
    let extents = x.dims.iter().skip(2).map(|dim| dim.capacity().saturating_mul(2));
    let most = extents.fold(1u64, u64::saturating_mul).max(FREE_TAPS);
    taps.filter(|&taps| taps <= most)
        .map(drop)
        .ok_or_else(|| format!("a window of {:?} is out of proportion to {x}", window.sizes))
}

/// Positions of a window along a dimension of `size`; arithmetic in `i128` cannot overflow for 63-bit sizes.
fn window_positions(size: u64, window: &Window, axis: usize, ceil: bool) -> Result<u64, String> {
    let extent = i128::from(window.dilations[axis]) * (i128::from(window.sizes[axis]) - 1) + 1;
    let (low, high) = window.pads[axis];
    let span = i128::from(size) + i128::from(low) + i128::from(high) - extent;
    if span < 0 {
        return Err(format!("a window of extent {extent} does not fit in {size} padded by ({low}, {high})"));
    }
    let stride = i128::from(window.strides[axis]);
    let mut positions = span / stride + 1;
    // The rounded-up window must start inside the input or the low padding.
    if ceil && span % stride != 0 && positions * stride < i128::from(size) + i128::from(low) {
        positions += 1;
    }
    u64::try_from(positions).map_err(|_| "the window has too many positions".to_owned())
}

pub(super) fn infer_conv(
    x: &TensorType,
    w: &TensorType,
    window: &Window,
    groups: u64,
    transposed: bool,
    output_pads: &[u64],
) -> Result<TensorType, String> {
    same_rank(x, w)?;
    if x.rank() < 2 {
        return Err(format!("{x} has no channels"));
    }
    let spatial = x.rank() - 2;
    check_window(window, spatial)?;
    if output_pads.len() != spatial || window.sizes != w.sizes()[2..] {
        return Err(format!("the window does not match the weights {w}"));
    }
    let (inputs, rows, columns) = (x.size(1), w.size(0), w.size(1));
    let channels_fit = groups > 0
        && if transposed { rows == inputs } else { columns.checked_mul(groups) == Some(inputs) }
        && rows.is_multiple_of(groups);
    if !channels_fit {
        return Err(format!("{groups} groups do not divide the channels of {x} and {w}"));
    }
    let outputs = if transposed { columns.checked_mul(groups) } else { Some(rows) };
    let mut sizes = vec![x.size(0), outputs.ok_or("too many channels")?];
    for (axis, &output_pad) in output_pads.iter().enumerate() {
        let size = x.size(axis + 2);
        sizes.push(if transposed {
            let extent = i128::from(window.dilations[axis]) * (i128::from(window.sizes[axis]) - 1) + 1;
            let (low, high) = window.pads[axis];
            let stretched = i128::from(window.strides[axis]) * (i128::from(size) - 1);
            let total = stretched + extent + i128::from(output_pad) - i128::from(low) - i128::from(high);
            u64::try_from(total).map_err(|_| format!("axis {axis} of the result has size {total}"))?
        } else {
            window_positions(size, window, axis, false)?
        });
    }
    Ok(TensorType::new(x.dtype, &sizes))
}

pub(super) fn infer_pool(x: &TensorType, window: &Window, ceil: bool) -> Result<TensorType, String> {
    if x.rank() < 2 {
        return Err(format!("{x} has no channels"));
    }
    check_window(window, x.rank() - 2)?;
    check_taps(x, window)?;
    let mut sizes = x.sizes();
    for axis in 0..x.rank() - 2 {
        sizes[axis + 2] = window_positions(x.size(axis + 2), window, axis, ceil)?;
    }
    Ok(TensorType::new(x.dtype, &sizes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn pool(input: &[u64], sizes: &[u64], pad: i64) -> Result<TensorType, String> {
        let spatial = sizes.len();
        let window = Window {
            sizes: sizes.to_vec(),
            strides: vec![1; spatial],
            dilations: vec![1; spatial],
            pads: vec![(pad, pad); spatial],
        };
        infer_pool(&TensorType::new(DType::F32, input), &window, false)
    }

    #[test]
    fn windows_of_a_pool_are_in_proportion_to_its_input() {
        let global = pool(&[1, 2, 4096, 4096], &[4096, 4096], 0).unwrap();
        assert_eq!(global.sizes(), [1, 2, 1, 1]);
        assert_eq!(pool(&[1, 2, 1, 1], &[7, 7], 3).unwrap().sizes(), [1, 2, 1, 1]);
        for (sizes, pad) in [([(1 << 31) - 1; 2], 1 << 30), ([1 << 20, 1], 1 << 19), ([1 << 16; 2], 1 << 15)] {
            let error = pool(&[1, 1, 3, 3], &sizes, pad).unwrap_err();
            assert!(error.contains("out of proportion"), "{error}");
        }
    }
}
