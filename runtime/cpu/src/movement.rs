//! Primitives that move elements without looking at them: transpose, slice, pad, concatenate, broadcast.

use planfile::RankScalar;
use planfile::op::PadMode;

use crate::error::CpuError;
use crate::number::with_width;
use crate::strided::{Layout, broadcast_strides, copy, strides};
use crate::view::{View, ViewMut, product, sizes, slice as elements, slice_mut as elements_mut};

/// Copies into the whole result, which is read from the operand through `from`.
fn fill_from(x: &View<'_>, from: &Layout, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let dtype = result.ty.dtype;
    let sizes = sizes(result.ty);
    let to = Layout { offset: 0, strides: strides(&sizes) };
    with_width!(dtype, T => {
        copy::<T>(&sizes, elements_mut(result.bytes, dtype)?, &to, elements(x.bytes, dtype)?, from);
    });
    Ok(())
}

/// Result dimension `i` is operand dimension `permutation[i]`.
pub(crate) fn transpose(permutation: &[u8], x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let packed = strides(&sizes(x.ty));
    let strides = permutation.iter().map(|&axis| packed[usize::from(axis)]).collect();
    fill_from(x, &Layout { offset: 0, strides }, result)
}

/// Elements from `starts` by `steps` on each axis.
pub(crate) fn slice(
    starts: &[RankScalar],
    steps: &[i64],
    rank: usize,
    x: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let mut layout = Layout { offset: 0, strides: strides(&sizes(x.ty)) };
    for (axis, stride) in layout.strides.iter_mut().enumerate() {
        let start = starts[axis].get(rank).ok_or_else(|| {
            CpuError::Type(format!("slice: no start of axis {axis} for rank {rank} in {}", starts[axis]))
        })?;
        // In range: starts and the product of steps and sizes were checked against the operand's dimensions.
        layout.offset += start as isize * *stride;
        *stride *= if result.ty.size(axis) == 1 { 0 } else { steps[axis] as isize };
    }
    fill_from(x, &layout, result)
}

/// To the result's dimensions, like NumPy.
pub(crate) fn broadcast(x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let strides = broadcast_strides(&sizes(x.ty), result.ty.rank());
    fill_from(x, &Layout { offset: 0, strides }, result)
}

/// Operands one after the other along `axis`.
pub(crate) fn concat(axis: usize, operands: &[View<'_>], result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let bytes_below = |ty| product(&sizes(ty)[axis..]).saturating_mul(result.ty.dtype.bytes());
    let row = bytes_below(result.ty);
    let mut start = 0;
    for operand in operands {
        let chunk = bytes_below(operand.ty);
        if operand.bytes.is_empty() {
            continue;
        }
        for (to, from) in result.bytes.chunks_exact_mut(row).zip(operand.bytes.chunks_exact(chunk)) {
            to[start..start + chunk].copy_from_slice(from);
        }
        start += chunk;
    }
    Ok(())
}

/// Adds elements before and after, or removes them, on each axis.
pub(crate) fn pad(low: &[i64], mode: PadMode, operands: &[View<'_>], result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let x = &operands[0];
    let dtype = result.ty.dtype;
    let (from_sizes, to_sizes) = (sizes(x.ty), sizes(result.ty));
    if mode == PadMode::Constant {
        // Fill, then copy the part of the operand that remains.
        let (mut to, mut from) = (strided_from_start(&to_sizes), strided_from_start(&from_sizes));
        let mut kept = Vec::with_capacity(low.len());
        for (axis, &low) in low.iter().enumerate() {
            // Amounts below the size of a tensor that fits in memory, up to cropping all of it.
            let low = isize::try_from(low).unwrap_or(isize::MIN);
            let first = low.saturating_neg().max(0);
            let into = low.max(0);
            let left = from_sizes[axis].cast_signed().saturating_sub(first);
            let room = to_sizes[axis].cast_signed().saturating_sub(into);
            kept.push(usize::try_from(left.min(room)).unwrap_or(0));
            to.offset = to.offset.saturating_add(into.saturating_mul(to.strides[axis]));
            from.offset = from.offset.saturating_add(first.saturating_mul(from.strides[axis]));
        }
        let value = operands[1].bytes;
        with_width!(dtype, T => {
            let to_elements: &mut [T] = elements_mut(result.bytes, dtype)?;
            to_elements.fill(elements::<T>(value, dtype)?[0]);
            copy(&kept, to_elements, &to, elements(x.bytes, dtype)?, &from);
        });
        return Ok(());
    }
    // Where each position of the result reads, per axis; then a gather over the product of these tables.
    let packed = strides(&from_sizes);
    let mut tables: Vec<Vec<usize>> = Vec::with_capacity(low.len());
    for (axis, &low) in low.iter().enumerate() {
        let stride = packed[axis].cast_unsigned();
        let table = (0..to_sizes[axis])
            .map(|position| stride * source(mode, i128::from(position as u64) - i128::from(low), from_sizes[axis]));
        tables.push(table.collect());
    }
    with_width!(dtype, T => {
        gather_product::<T>(&tables, elements_mut(result.bytes, dtype)?, elements(x.bytes, dtype)?);
    });
    Ok(())
}

fn strided_from_start(sizes: &[usize]) -> Layout {
    Layout { offset: 0, strides: strides(sizes) }
}

/// The position below `size`, which is not 0, that a padded position repeats.
fn source(mode: PadMode, position: i128, size: usize) -> usize {
    let length = i128::from(size as u64);
    let inside = match mode {
        PadMode::Constant | PadMode::Edge => position.clamp(0, length - 1),
        PadMode::Wrap => position.rem_euclid(length),
        PadMode::Reflect => {
            let period = (2 * (length - 1)).max(1);
            let phase = position.rem_euclid(period);
            phase.min(period - phase).min(length - 1)
        }
    };
    usize::try_from(inside).unwrap_or(0)
}

/// `to[i, j, …] = from[tables[0][i] + tables[1][j] + …]`.
pub(crate) fn gather_product<T: Copy>(tables: &[Vec<usize>], to: &mut [T], from: &[T]) {
    let Some((inner, outer)) = tables.split_last() else {
        to.copy_from_slice(from);
        return;
    };
    if to.is_empty() {
        return;
    }
    let mut index = vec![0; outer.len()];
    for row in to.chunks_exact_mut(inner.len()) {
        let base: usize = index.iter().zip(outer).map(|(&position, table)| table[position]).sum();
        for (to, &offset) in row.iter_mut().zip(inner) {
            *to = from[base + offset];
        }
        for (position, table) in index.iter_mut().zip(outer).rev() {
            *position += 1;
            if *position < table.len() {
                break;
            }
            *position = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::PadMode;
    use planfile::{DType, Op, RankScalar, Tensor, TensorType};
    use proptest::prelude::*;

    use crate::{CpuError, View, ViewMut, evaluate, execute};

    fn iota(sizes: &[u64]) -> Tensor {
        let count: u64 = sizes.iter().product();
        Tensor::from_elements(sizes, &(0..count as i32).collect::<Vec<_>>()).unwrap()
    }

    fn run(op: &Op, operands: &[&Tensor]) -> Vec<i32> {
        evaluate(op, operands).unwrap()[0].elements::<i32>().unwrap().to_vec()
    }

    fn pad(low: &[i64], high: &[i64], mode: PadMode) -> Op {
        Op::Pad { low: low.to_vec(), high: high.to_vec(), mode }
    }

    #[test]
    fn transposes_each_width() {
        for dtype in DType::ALL {
            let bytes: Vec<u8> = (0..6 * dtype.bytes() as u8).collect();
            let x = Tensor::from_bytes(TensorType::new(dtype, &[2, 3]), &bytes).unwrap();
            let y = evaluate(&Op::Transpose { permutation: vec![1, 0] }, &[&x]).unwrap();
            let expected: Vec<u8> =
                [0, 3, 1, 4, 2, 5].iter().flat_map(|&i| bytes[i * dtype.bytes()..][..dtype.bytes()].to_vec()).collect();
            assert_eq!(y[0].data.bytes(), expected, "{dtype}");
        }
    }

    #[test]
    fn slices_backwards_and_by_rank() {
        let x = iota(&[3, 4]);
        let op =
            Op::Slice { starts: vec![RankScalar::ByRank(vec![0, 1]), 3.into()], steps: vec![1, -2], sizes: vec![2, 2] };
        assert_eq!(run(&op, &[&x]), [3, 1, 7, 5]);
        let mut y = Tensor::zeroed(TensorType::new(DType::I32, &[2, 2])).unwrap();
        execute(&op, 1, &[View::from(&x)], &mut [ViewMut::from(&mut y)]).unwrap();
        assert_eq!(y.elements::<i32>().unwrap(), [7, 5, 11, 9]);
        let beyond = execute(&op, 2, &[View::from(&x)], &mut [ViewMut::from(&mut y)]).unwrap_err();
        assert!(matches!(beyond, CpuError::Type(why) if why.contains("rank 2")));
    }

    #[test]
    fn pads_in_every_mode() {
        let x = iota(&[3]);
        let value = Tensor::from_elements(&[], &[9i32]).unwrap();
        assert_eq!(run(&pad(&[1], &[2], PadMode::Constant), &[&x, &value]), [9, 0, 1, 2, 9, 9]);
        assert_eq!(run(&pad(&[-1], &[2], PadMode::Constant), &[&x, &value]), [1, 2, 9, 9]);
        assert_eq!(run(&pad(&[4], &[-5], PadMode::Constant), &[&x, &value]), [9, 9]);
        assert_eq!(run(&pad(&[-4], &[4], PadMode::Constant), &[&x, &value]), [9, 9, 9]);
        assert_eq!(run(&pad(&[2], &[2], PadMode::Reflect), &[&x]), [2, 1, 0, 1, 2, 1, 0]);
        assert_eq!(run(&pad(&[2], &[1], PadMode::Edge), &[&x]), [0, 0, 0, 1, 2, 2]);
        assert_eq!(run(&pad(&[2], &[2], PadMode::Wrap), &[&x]), [1, 2, 0, 1, 2, 0, 1]);
        assert_eq!(run(&pad(&[2], &[-2], PadMode::Reflect), &[&x]), [2, 1, 0]);
        let grid = iota(&[2, 2]);
        assert_eq!(run(&pad(&[1, 0], &[0, 1], PadMode::Edge), &[&grid]), [0, 1, 1, 0, 1, 1, 2, 3, 3]);
        assert_eq!(run(&pad(&[1, 0], &[0, 1], PadMode::Constant), &[&grid, &value]), [9, 9, 9, 0, 1, 9, 2, 3, 9]);
    }

    #[test]
    fn concatenates_around_an_empty_operand() {
        let (a, b, c) = (iota(&[2, 1]), iota(&[2, 0]), iota(&[2, 2]));
        assert_eq!(run(&Op::Concat { axis: 1 }, &[&a, &b, &c]), [0, 0, 1, 1, 2, 3]);
        assert_eq!(run(&Op::Concat { axis: 1 }, &[&b, &b]), [0i32; 0]);
    }

    #[test]
    fn broadcasts_a_column() {
        let op = Op::Broadcast { dims: vec![2.into(), 2.into(), 3.into()] };
        assert_eq!(run(&op, &[&iota(&[2, 1])]), [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn misaligned_bytes_are_an_error() {
        let x = iota(&[3]);
        let ty = TensorType::new(DType::I32, &[2]);
        let mut y = Tensor::zeroed(ty.clone()).unwrap();
        let view = View { ty: &ty, bytes: &x.data.bytes()[1..9] };
        let op = Op::Broadcast { dims: ty.dims.clone() };
        let error = execute(&op, 0, &[view], &mut [ViewMut::from(&mut y)]).unwrap_err();
        assert_eq!(error, CpuError::Alignment { dtype: DType::I32 });
        let short = View { ty: &ty, bytes: &x.data.bytes()[..4] };
        let error = execute(&op, 0, &[short], &mut [ViewMut::from(&mut y)]).unwrap_err();
        assert!(matches!(error, CpuError::Length { expected: 8, actual: 4, .. }));
    }

    proptest! {
        #[test]
        fn transposing_back_restores(sizes in prop::collection::vec(0u64..7, 0..5), seed in any::<u64>()) {
            let mut permutation: Vec<u8> = (0..sizes.len() as u8).collect();
            for i in (1..permutation.len()).rev() {
                permutation.swap(i, (seed.rotate_left(i as u32 * 7) % (i as u64 + 1)) as usize);
            }
            let mut inverse = permutation.clone();
            for (i, &axis) in permutation.iter().enumerate() {
                inverse[usize::from(axis)] = i as u8;
            }
            let x = iota(&sizes);
            let y = evaluate(&Op::Transpose { permutation }, &[&x]).unwrap();
            let back = evaluate(&Op::Transpose { permutation: inverse }, &[&y[0]]).unwrap();
            prop_assert_eq!(&back[0], &x);
        }

        #[test]
        fn slices_of_a_concatenation_are_its_parts(before in 0u64..4, left in 0u64..5, right in 0u64..5, after in 0u64..4) {
            let (a, b) = (iota(&[before, left, after]), iota(&[before, right, after]));
            let whole = evaluate(&Op::Concat { axis: 1 }, &[&a, &b]).unwrap();
            for (part, start) in [(&a, 0), (&b, left as i64)] {
                let op = Op::Slice {
                    starts: vec![0.into(), start.into(), 0.into()],
                    steps: vec![1; 3],
                    sizes: part.ty.sizes(),
                };
                prop_assert_eq!(&evaluate(&op, &[&whole[0]]).unwrap()[0], part);
            }
        }
    }
}
