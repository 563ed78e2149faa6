//! Scatters: copies of an operand with updates where indices point.

use bytemuck::Pod;
use planfile::op::Combine;

use crate::combine::{logical, with_combine};
use crate::error::CpuError;
use crate::gather::{element_offsets, read_indices, slice_positions};
use crate::number::{with_number, with_width};
use crate::view::{View, ViewMut, read, sizes, slice, slice_mut, write};

/// Element-wise along `axis`.
pub(crate) fn scatter_elements(
    axis: usize,
    combine: Option<Combine>,
    operands: &[View<'_>],
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let [x, indices, updates] = [&operands[0], &operands[1], &operands[2]];
    let values = read_indices(indices)?;
    let offsets = element_offsets("scatter_elements", axis, &sizes(x.ty), &sizes(indices.ty), &values)?;
    apply(combine, x, &offsets, 1, updates, result)
}

/// Slices at the positions in the last dimension of the indices.
pub(crate) fn scatter_nd(
    combine: Option<Combine>,
    operands: &[View<'_>],
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let [x, indices, updates] = [&operands[0], &operands[1], &operands[2]];
    let values = read_indices(indices)?;
    let (positions, length) = slice_positions("scatter_nd", 0, &sizes(x.ty), &sizes(indices.ty), &values)?;
    apply(combine, x, &positions, length, updates, result)
}

/// The result is `x`; then row `i` of the updates goes to row `positions[i]`, in order. Half types are combined in
/// `f32` and rounded once.
fn apply(
    combine: Option<Combine>,
    x: &View<'_>,
    positions: &[usize],
    length: usize,
    updates: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let dtype = x.ty.dtype;
    let Some(combine) = combine else {
        result.bytes.copy_from_slice(x.bytes);
        with_width!(dtype, T => {
            let (to, from) = (slice_mut::<T>(result.bytes, dtype)?, slice(updates.bytes, dtype)?);
            each(positions, length, to, from, |_, update| update);
        });
        return Ok(());
    };
    let combine = logical(combine, dtype);
    with_number!(dtype, T => {
        let (x, updates) = (read::<T>(x)?, read::<T>(updates)?);
        write(result, |y| {
            y.copy_from_slice(&x);
            with_combine!(combine, T, f => each(positions, length, y, &updates, f));
            Ok(())
        })
    })
}

fn each<T: Pod>(positions: &[usize], length: usize, to: &mut [T], from: &[T], f: impl Fn(T, T) -> T) {
    if from.is_empty() {
        return;
    }
    for (&position, from) in positions.iter().zip(from.chunks_exact(length)) {
        for (to, &from) in to[position * length..][..length].iter_mut().zip(from) {
            *to = f(*to, from);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use planfile::op::Combine;
    use planfile::{Element, Op, Tensor};

    use crate::{CpuError, evaluate};

    fn tensor<T: Element>(sizes: &[u64], elements: &[T]) -> Tensor {
        Tensor::from_elements(sizes, elements).unwrap()
    }

    #[test]
    fn the_last_of_equals_wins() {
        let (x, at, new) = (tensor(&[4], &[1, 2, 3, 4]), tensor(&[3], &[1i64, -1, 1]), tensor(&[3], &[7, 8, 9]));
        let run = |combine| {
            let y = evaluate(&Op::ScatterElements { axis: 0, combine }, &[&x, &at, &new]).unwrap();
            y[0].elements::<i32>().unwrap().to_vec()
        };
        assert_eq!(run(None), [1, 9, 3, 8]);
        assert_eq!(run(Some(Combine::Sum)), [1, 18, 3, 12]);
        assert_eq!(run(Some(Combine::Prod)), [1, 126, 3, 32]);
        assert_eq!(run(Some(Combine::Max)), [1, 9, 3, 8]);
        assert_eq!(run(Some(Combine::Min)), [1, 2, 3, 4]);
    }

    #[test]
    fn scatters_slices() {
        let x = tensor(&[2, 2, 2], &[0.0f32; 8]);
        let new = tensor(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0]);
        let y = evaluate(&Op::ScatterNd { combine: None }, &[&x, &tensor(&[2, 2], &[1i64, 0, 0, -1]), &new]).unwrap();
        assert_eq!(y[0].elements::<f32>().unwrap(), [0.0, 0.0, 3.0, 4.0, 1.0, 2.0, 0.0, 0.0]);
        let outside = evaluate(&Op::ScatterNd { combine: None }, &[&x, &tensor(&[2, 2], &[1i64, 0, 2, 0]), &new]);
        assert!(matches!(outside, Err(CpuError::Index { op: "scatter_nd", axis: 0, index: 2, bound: 2 })));
    }

    #[test]
    fn halves_are_added_without_rounding_between() {
        let x = tensor(&[1], &[f16::from_f32(2048.0)]);
        let op = Op::ScatterElements { axis: 0, combine: Some(Combine::Sum) };
        let y = evaluate(&op, &[&x, &tensor(&[2], &[0i32, 0]), &tensor(&[2], &[f16::ONE; 2])]).unwrap();
        assert_eq!(y[0].elements::<f16>().unwrap()[0].to_f32(), 2050.0);
    }

    #[test]
    fn no_updates_change_nothing() {
        let x = tensor(&[2], &[1u8, 2]);
        let op = Op::ScatterElements { axis: 0, combine: None };
        let y = evaluate(&op, &[&x, &tensor::<i64>(&[0], &[]), &tensor::<u8>(&[0], &[])]).unwrap();
        assert_eq!(y[0], x);
    }
}
