//! The largest or smallest elements along an axis.

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
    let shape = [outer, length, inner, k];
    with_number!(x.ty.dtype, T => {
        let x = read::<T>(x)?;
        let rank = |at: usize| {
            let rank = Number::rank(x[at]);
            if largest { !rank } else { rank }
        };
        select(shape, &rank, indices);
        write(values, |values| {
            pick::<T>(shape, &x, indices, values);
            Ok(())
        })
    })
}

/// Indices of the elements of least rank. By rank, since sorting is much code to have for each type.
fn select([outer, length, inner, k]: [usize; 4], rank: &dyn Fn(usize) -> i64, indices: &mut [i64]) {
    let mut row: Vec<(i64, usize)> = Vec::with_capacity(length);
    for block in 0..outer {
        for column in 0..inner {
            row.clear();
            row.extend((0..length).map(|position| (rank((block * length + position) * inner + column), position)));
            if k < length {
                row.select_nth_unstable(k);
            }
            let best = &mut row[..k];
            best.sort_unstable();
            for (position, &(_, index)) in best.iter().enumerate() {
                indices[(block * k + position) * inner + column] = index as i64;
            }
        }
    }
}

/// The elements at these indices.
fn pick<T: Copy>([outer, length, inner, k]: [usize; 4], x: &[T], indices: &[i64], values: &mut [T]) {
    for block in 0..outer {
        for position in 0..k {
            for column in 0..inner {
                let at = (block * k + position) * inner + column;
                values[at] = x[(block * length + indices[at] as usize) * inner + column];
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
        let x = Tensor::from_elements(&[5], &[0.0f64, -0.0, f64::NEG_INFINITY, 5e-324, -5e-324]).unwrap();
        assert_eq!(run::<f64>(0, 5, false, &x).1, [2, 4, 0, 1, 3]);
        let x = Tensor::from_elements(&[3], &[0u64, u64::MAX, 1 << 63]).unwrap();
        assert_eq!(run(0, 3, true, &x), (vec![u64::MAX, 1 << 63, 0], vec![1, 2, 0]));
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
