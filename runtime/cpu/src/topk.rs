//! The largest or smallest elements along an axis.

use std::cmp::Ordering;

use crate::error::CpuError;
use crate::number::{Number, with_number};
use crate::view::{View, ViewMut, read, sizes, slice_mut, split_at_axis, write};

/// Values and indices, in order. Equal elements come by lower index first; NaN counts as larger than any number, and
/// as equal to NaN.
pub(crate) fn topk(
    axis: usize,
    largest: bool,
    x: &View<'_>,
    values: &mut ViewMut<'_>,
    indices: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let (outer, length, inner) = split_at_axis(&sizes(x.ty), axis);
    let k = sizes(values.ty)[axis];
    let indices = slice_mut(indices.bytes, indices.ty.dtype)?;
    with_number!(x.ty.dtype, T => {
        let x = read::<T>(x)?;
        write(values, |values| {
            if largest {
                select::<T>([outer, length, inner, k], &x, values, indices, |a, b| ascending(b, a));
            } else {
                select::<T>([outer, length, inner, k], &x, values, indices, ascending);
            }
            Ok(())
        })
    })
}

fn ascending<T: Number>(a: T, b: T) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

fn select<T: Number>(
    [outer, length, inner, k]: [usize; 4],
    x: &[T],
    values: &mut [T],
    indices: &mut [i64],
    order: impl Fn(T, T) -> Ordering,
) {
    let mut row: Vec<(T, usize)> = Vec::with_capacity(length);
    let by_rank = |a: &(T, usize), b: &(T, usize)| order(a.0, b.0).then(a.1.cmp(&b.1));
    for block in 0..outer {
        for column in 0..inner {
            row.clear();
            row.extend((0..length).map(|position| (x[(block * length + position) * inner + column], position)));
            if k < length {
                row.select_nth_unstable_by(k, by_rank);
            }
            let best = &mut row[..k];
            best.sort_unstable_by(by_rank);
            for (position, &(value, index)) in best.iter().enumerate() {
                let at = (block * k + position) * inner + column;
                values[at] = value;
                indices[at] = index as i64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use planfile::{Element, Op, Tensor};
    use proptest::prelude::*;

    use crate::evaluate;

    fn run<T: Element>(axis: u8, k: u64, largest: bool, x: &Tensor) -> (Vec<T>, Vec<i64>) {
        let results = evaluate(&Op::TopK { axis, k, largest, sorted: true }, &[x]).unwrap();
        (results[0].elements::<T>().unwrap().to_vec(), results[1].elements::<i64>().unwrap().to_vec())
    }

    #[test]
    fn ties_nan_and_columns() {
        let x = Tensor::from_elements(&[5], &[2, 3, 1, 3, 2]).unwrap();
        assert_eq!(run(0, 3, true, &x), (vec![3, 3, 2], vec![1, 3, 0]));
        assert_eq!(run(0, 3, false, &x), (vec![1, 2, 2], vec![2, 0, 4]));
        let x = Tensor::from_elements(&[4], &[1.0f32, f32::NAN, f32::INFINITY, f32::NAN]).unwrap();
        assert_eq!(run::<f32>(0, 3, true, &x).1, [1, 3, 2]);
        assert_eq!(run::<f32>(0, 3, false, &x).1, [0, 2, 1]);
        let x = Tensor::from_elements(&[2, 2], &[1u8, 9, 5, 3]).unwrap();
        assert_eq!(run(0, 1, true, &x), (vec![5u8, 9], vec![1, 0]));
    }

    proptest! {
        #[test]
        fn is_a_prefix_of_the_stable_sort(data in prop::collection::vec(-5i8..5, 1..40), k in 0u64..40) {
            let k = k.min(data.len() as u64);
            let x = Tensor::from_elements(&[data.len() as u64], &data).unwrap();
            let mut expected: Vec<i64> = (0..data.len() as i64).collect();
            expected.sort_by_key(|&index| std::cmp::Reverse(data[index as usize]));
            let (values, indices) = run::<i8>(0, k, true, &x);
            prop_assert_eq!(&indices, &expected[..k as usize]);
            prop_assert!(values.iter().zip(&indices).all(|(&value, &index)| value == data[index as usize]));
        }
    }
}
