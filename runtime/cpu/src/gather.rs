//! Gathers: copies of what indices point at.

use bytemuck::Pod;
use planfile::DType;

use crate::error::CpuError;
use crate::number::with_width;
use crate::strided::{for_each_offset, strides};
use crate::view::{View, ViewMut, product, sizes, slice, slice_mut, split_at_axis};

/// Indices as `i64`, whichever type they have.
pub(crate) fn read_indices(view: &View<'_>) -> Result<Vec<i64>, CpuError> {
    match view.ty.dtype {
        DType::I32 => Ok(slice::<i32>(view.bytes, DType::I32)?.iter().map(|&index| i64::from(index)).collect()),
        _ => Ok(slice::<i64>(view.bytes, DType::I64)?.to_vec()),
    }
}

/// The position an index means: from the end where negative.
pub(crate) fn resolve(op: &'static str, axis: usize, index: i64, bound: usize) -> Result<usize, CpuError> {
    let wrapped = if index < 0 { index.saturating_add_unsigned(bound as u64) } else { index };
    match usize::try_from(wrapped) {
        Ok(position) if position < bound => Ok(position),
        _ => Err(CpuError::Index { op, axis, index, bound: bound as u64 }),
    }
}

/// `result[outer, indices.., inner] = x[outer, index, inner]`.
pub(crate) fn gather(axis: usize, x: &View<'_>, indices: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let (_, bound, inner) = split_at_axis(&sizes(x.ty), axis);
    let indices = read_indices(indices)?;
    let positions: Vec<usize> =
        indices.iter().map(|&index| resolve("gather", axis, index, bound)).collect::<Result<_, _>>()?;
    // Neither is empty: the result is not.
    let row = inner * x.ty.dtype.bytes();
    let (from, to) = (x.bytes.chunks_exact(bound * row), result.bytes.chunks_exact_mut(positions.len() * row));
    for (from, to) in from.zip(to) {
        for (&position, to) in positions.iter().zip(to.chunks_exact_mut(row)) {
            to.copy_from_slice(&from[position * row..][..row]);
        }
    }
    Ok(())
}

/// Offsets into a tensor of `x` sizes of the elements that `indices`, of `own` sizes, point at along `axis`; in order.
pub(crate) fn element_offsets(
    op: &'static str,
    axis: usize,
    x: &[usize],
    own: &[usize],
    indices: &[i64],
) -> Result<Vec<usize>, CpuError> {
    if let Some(other) = (0..x.len()).find(|&other| other != axis && own[other] > x[other]) {
        return Err(CpuError::Type(format!(
            "{op}: dimension {other} of the indices is {}, beyond {} of the operand",
            own[other], x[other]
        )));
    }
    let packed = strides(x);
    let (stride, bound) = (packed[axis].cast_unsigned(), x[axis]);
    let walk: Vec<isize> =
        packed.iter().enumerate().map(|(own, &stride)| if own == axis { 0 } else { stride }).collect();
    let mut offsets = Vec::with_capacity(indices.len());
    for_each_offset(own, &walk, |offset| offsets.push(offset.cast_unsigned()));
    for (offset, &index) in offsets.iter_mut().zip(indices) {
        *offset += stride * resolve(op, axis, index, bound)?;
    }
    Ok(offsets)
}

/// `result[i, j, k] = x[i, indices[i, j, k], k]` for the middle axis.
pub(crate) fn gather_elements(
    axis: usize,
    x: &View<'_>,
    indices: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let values = read_indices(indices)?;
    let offsets = element_offsets("gather_elements", axis, &sizes(x.ty), &sizes(indices.ty), &values)?;
    let dtype = x.ty.dtype;
    with_width!(dtype, T => {
        pick::<T>(&offsets, slice(x.bytes, dtype)?, slice_mut(result.bytes, dtype)?);
    });
    Ok(())
}

fn pick<T: Pod>(offsets: &[usize], from: &[T], to: &mut [T]) {
    for (to, &offset) in to.iter_mut().zip(offsets) {
        *to = from[offset];
    }
}

/// Numbers of the slices of `x` (all dimensions beyond `batch` and the depth of the indices) that `indices` point at,
/// and the elements of one slice.
pub(crate) fn slice_positions(
    op: &'static str,
    batch: usize,
    x: &[usize],
    own: &[usize],
    indices: &[i64],
) -> Result<(Vec<usize>, usize), CpuError> {
    let depth = own.last().copied().unwrap_or(0);
    let bounds = &x[batch..batch + depth];
    let batches = product(&x[..batch]);
    let count = product(&own[..own.len().saturating_sub(1)]);
    // Without batches there is nothing to point at.
    let per_batch = count.checked_div(batches).unwrap_or(0);
    let mut positions = Vec::with_capacity(count);
    for row in 0..count {
        let mut position = row.checked_div(per_batch).unwrap_or(0);
        for (level, &bound) in bounds.iter().enumerate() {
            position = position * bound + resolve(op, batch + level, indices[row * depth + level], bound)?;
        }
        positions.push(position);
    }
    Ok((positions, product(&x[batch + depth..])))
}

/// `result[b.., i.., ..] = x[b.., indices[b.., i.., ..], ..]`.
pub(crate) fn gather_nd(
    batch: usize,
    x: &View<'_>,
    indices: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let values = read_indices(indices)?;
    let (positions, length) = slice_positions("gather_nd", batch, &sizes(x.ty), &sizes(indices.ty), &values)?;
    let row = length * x.ty.dtype.bytes();
    for (to, &position) in result.bytes.chunks_exact_mut(row).zip(&positions) {
        to.copy_from_slice(&x.bytes[position * row..][..row]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use planfile::{DType, Op, Tensor, TensorType};

    use crate::{CpuError, evaluate};

    fn run(op: &Op, x: &Tensor, indices: &Tensor) -> Result<Vec<i32>, CpuError> {
        Ok(evaluate(op, &[x, indices])?[0].elements::<i32>().unwrap().to_vec())
    }

    fn grid() -> Tensor {
        Tensor::from_elements(&[2, 3], &[0, 1, 2, 3, 4, 5]).unwrap()
    }

    fn indices(sizes: &[u64], values: &[i64]) -> Tensor {
        Tensor::from_elements(sizes, values).unwrap()
    }

    #[test]
    fn gathers_along_each_axis() {
        let at = indices(&[2], &[-1, 0]);
        assert_eq!(run(&Op::Gather { axis: 0 }, &grid(), &at).unwrap(), [3, 4, 5, 0, 1, 2]);
        assert_eq!(run(&Op::Gather { axis: 1 }, &grid(), &at).unwrap(), [2, 0, 5, 3]);
        let narrow = Tensor::from_elements(&[], &[1i32]).unwrap();
        assert_eq!(run(&Op::Gather { axis: 1 }, &grid(), &narrow).unwrap(), [1, 4]);
    }

    #[test]
    fn every_width_is_gathered() {
        for dtype in DType::ALL {
            let bytes: Vec<u8> = (0..3 * dtype.bytes() as u8).collect();
            let x = Tensor::from_bytes(TensorType::new(dtype, &[3]), &bytes).unwrap();
            for op in [Op::Gather { axis: 0 }, Op::GatherElements { axis: 0 }] {
                let y = evaluate(&op, &[&x, &indices(&[1], &[2])]).unwrap();
                assert_eq!(y[0].data.bytes(), &bytes[2 * dtype.bytes()..], "{dtype}");
            }
        }
    }

    #[test]
    fn indices_outside_are_named() {
        for index in [3, -4, i64::MIN, i64::MAX] {
            let error = run(&Op::Gather { axis: 1 }, &grid(), &indices(&[1], &[index])).unwrap_err();
            assert_eq!(error, CpuError::Index { op: "gather", axis: 1, index, bound: 3 });
        }
        let error = run(&Op::GatherNd { batch: 0 }, &grid(), &indices(&[1, 2], &[0, 7])).unwrap_err();
        assert!(matches!(error, CpuError::Index { axis: 1, index: 7, bound: 3, .. }));
        let error = run(&Op::GatherElements { axis: 0 }, &grid(), &indices(&[1, 3], &[0, 1, 2])).unwrap_err();
        assert!(matches!(error, CpuError::Index { axis: 0, index: 2, bound: 2, .. }));
    }

    #[test]
    fn gathers_elements() {
        let at = indices(&[2, 2], &[2, 0, -2, 1]);
        assert_eq!(run(&Op::GatherElements { axis: 1 }, &grid(), &at).unwrap(), [2, 0, 4, 4]);
        let at = indices(&[1, 3], &[1, 0, -1]);
        assert_eq!(run(&Op::GatherElements { axis: 0 }, &grid(), &at).unwrap(), [3, 1, 5]);
        let wide = run(&Op::GatherElements { axis: 0 }, &grid(), &indices(&[1, 4], &[0; 4])).unwrap_err();
        assert!(matches!(wide, CpuError::Type(why) if why.contains("another axis than 0")));
    }

    #[test]
    fn gathers_slices_with_batches() {
        let x = Tensor::from_elements(&[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert_eq!(run(&Op::GatherNd { batch: 0 }, &x, &indices(&[2, 2], &[0, 1, -1, 0])).unwrap(), [2, 3, 4, 5]);
        assert_eq!(run(&Op::GatherNd { batch: 1 }, &x, &indices(&[2, 1], &[1, 0])).unwrap(), [2, 3, 4, 5]);
        assert_eq!(run(&Op::GatherNd { batch: 2 }, &x, &indices(&[2, 2, 1], &[1, 0, 0, 1])).unwrap(), [1, 2, 4, 7]);
        assert_eq!(run(&Op::GatherNd { batch: 0 }, &x, &indices(&[1, 0], &[])).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
