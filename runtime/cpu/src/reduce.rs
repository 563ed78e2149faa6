//! Reductions: sums, products and means of floats are accumulated in `f64`.

use std::borrow::Cow;

use planfile::op::{Combine, ReduceKind};

use crate::combine::{accumulate, logical};
use crate::error::CpuError;
use crate::number::{Number, with_number};
use crate::strided::{Layout, copy, strides};
use crate::view::{View, ViewMut, product, read, sizes, slice_mut, write};

/// Combines over `axes`. Extrema are NaN if any element is; no elements give 0, 1, the lowest or the highest value, a
/// float mean of none is NaN. The arguments of extrema take NaN for the extremum, like NumPy.
pub(crate) fn reduce(kind: ReduceKind, axes: &[u8], x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let (sizes, dtype) = (sizes(x.ty), x.ty.dtype);
    with_number!(dtype, T => {
        let (x, shape) = arrange(read::<T>(x)?, &sizes, axes);
        match kind {
            ReduceKind::Combine(combine) => write(result, |y| {
                reduce_values::<T>(logical(combine, dtype), shape, &x, y);
                Ok(())
            }),
            ReduceKind::Mean => write(result, |y| {
                let mut sums = vec![<<T as Number>::Sum as Number>::ZERO; y.len()];
                fold::<T>(Combine::Sum, shape, &x, &mut sums);
                for (y, &sum) in y.iter_mut().zip(&sums) {
                    *y = <T as Number>::mean(sum, shape[1]);
                }
                Ok(())
            }),
            ReduceKind::ArgMax { last } => arg(shape, &x, slice_mut(result.bytes, result.ty.dtype)?, last, |a, b| a > b),
            ReduceKind::ArgMin { last } => arg(shape, &x, slice_mut(result.bytes, result.ty.dtype)?, last, |a, b| a < b),
        }
    })
}

/// The elements with the reduced dimensions between those before and after; packed where others lie between them.
fn arrange<'a, T: Number>(x: Cow<'a, [T]>, sizes: &[usize], axes: &[u8]) -> (Cow<'a, [T]>, [usize; 3]) {
    let is_reduced = |axis: &usize| axes.iter().any(|&own| usize::from(own) == *axis);
    let mut reduced: Vec<usize> = (0..sizes.len()).filter(is_reduced).collect();
    let size_of = |axes: &[usize]| product(&axes.iter().map(|&axis| sizes[axis]).collect::<Vec<_>>());
    reduced.sort_unstable();
    let (Some(&first), Some(&last)) = (reduced.first(), reduced.last()) else {
        return (x, [product(sizes), 1, 1]);
    };
    let between_is_one = (first..=last).all(|axis| sizes[axis] == 1 || is_reduced(&axis));
    if between_is_one {
        return (x, [product(&sizes[..first]), size_of(&reduced), product(&sizes[last + 1..])]);
    }
    let kept: Vec<usize> = (0..sizes.len()).filter(|axis| !is_reduced(axis)).collect();
    let shape = [size_of(&kept), size_of(&reduced), 1];
    let order = [kept, reduced].concat();
    let packed = strides(sizes);
    let to_sizes: Vec<usize> = order.iter().map(|&axis| sizes[axis]).collect();
    let from = Layout { offset: 0, strides: order.iter().map(|&axis| packed[axis]).collect() };
    let to = Layout { offset: 0, strides: strides(&to_sizes) };
    let mut copied = vec![T::ZERO; x.len()];
    copy(&to_sizes, &mut copied, &to, &x, &from);
    (Cow::Owned(copied), shape)
}

fn reduce_values<T: Number>(combine: Combine, shape: [usize; 3], x: &[T], y: &mut [T]) {
    match combine {
        Combine::Sum | Combine::Prod => {
            let mut sums = vec![<T::Sum as Number>::ZERO; y.len()];
            fold::<T>(combine, shape, x, &mut sums);
            for (y, &sum) in y.iter_mut().zip(&sums) {
                *y = T::from_sum(sum);
            }
        }
        Combine::Max | Combine::Min => {
            y.fill(T::identity(combine));
            let [_, length, inner] = shape;
            if x.is_empty() {
                return;
            }
            if inner == 1 {
                for (y, row) in y.iter_mut().zip(x.chunks_exact(length)) {
                    *y = extremum(combine, row);
                }
                return;
            }
            for (y, block) in y.chunks_exact_mut(inner).zip(x.chunks_exact(length * inner)) {
                for row in block.chunks_exact(inner) {
                    accumulate(combine, y, row);
                }
            }
        }
    }
}

/// Independent partial results, so that consecutive elements need not wait for each other.
const PARTS: usize = 8;

/// The largest or smallest of a row.
#[inline(always)]
pub(crate) fn extremum<T: Number>(combine: Combine, row: &[T]) -> T {
    let mut parts = [T::identity(combine); PARTS];
    let chunks = row.chunks_exact(PARTS);
    let rest = chunks.remainder();
    for chunk in chunks {
        accumulate(combine, &mut parts, chunk);
    }
    accumulate(combine, &mut parts, rest);
    parts.into_iter().fold(T::identity(combine), |best, part| best.combine(combine, part))
}

/// Sums or products in the accumulator's type.
fn fold<T: Number>(combine: Combine, [_, length, inner]: [usize; 3], x: &[T], sums: &mut [T::Sum]) {
    let identity = <T::Sum as Number>::identity(combine);
    sums.fill(identity);
    if x.is_empty() {
        return;
    }
    let step = |sum: T::Sum, x: T| if combine == Combine::Prod { sum.mul(x.to_sum()) } else { sum.add(x.to_sum()) };
    if inner == 1 {
        for (sum, row) in sums.iter_mut().zip(x.chunks_exact(length)) {
            let mut parts = [identity; PARTS];
            let chunks = row.chunks_exact(PARTS);
            let rest = chunks.remainder();
            for chunk in chunks {
                for (part, &x) in parts.iter_mut().zip(chunk) {
                    *part = step(*part, x);
                }
            }
            for (part, &x) in parts.iter_mut().zip(rest) {
                *part = step(*part, x);
            }
            *sum = parts.into_iter().fold(identity, |sum, part| sum.combine(combine, part));
        }
        return;
    }
    for (sums, block) in sums.chunks_exact_mut(inner).zip(x.chunks_exact(length * inner)) {
        for row in block.chunks_exact(inner) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum = step(*sum, x);
            }
        }
    }
}

/// Positions along the reduced dimension. `better`: whether the first is preferred to the second, which it differs from.
fn arg<T: Number>(
    [outer, length, inner]: [usize; 3],
    x: &[T],
    y: &mut [i64],
    last: bool,
    better: impl Fn(T, T) -> bool,
) -> Result<(), CpuError> {
    if length == 0 {
        return Err(CpuError::Index { op: "reduce", axis: 0, index: 0, bound: 0 });
    }
    for block in 0..outer {
        for column in 0..inner {
            let at = |position: usize| x[(block * length + position) * inner + column];
            let mut best = 0;
            for position in 1..length {
                let (old, new) = (at(best), at(position));
                let equal = new == old || (new.is_nan() && old.is_nan());
                let wins = if equal { last } else { !old.is_nan() && (new.is_nan() || better(new, old)) };
                if wins {
                    best = position;
                }
            }
            y[block * inner + column] = best as i64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::f16;
    use planfile::op::{Combine, ReduceKind};
    use planfile::{DType, Element, Op, Tensor, TensorType};
    use proptest::prelude::*;

    use crate::evaluate;

    fn run<T: Element>(kind: ReduceKind, axes: &[u8], x: &Tensor) -> Vec<T> {
        let op = Op::Reduce { kind, axes: axes.to_vec(), keep: false };
        evaluate(&op, &[x]).unwrap()[0].elements::<T>().unwrap().to_vec()
    }

    fn vector<T: Element>(elements: &[T]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    #[test]
    fn nothing_gives_the_identity() {
        let x = Tensor::from_elements::<f32>(&[0, 2], &[]).unwrap();
        let of = |combine| run::<f32>(ReduceKind::Combine(combine), &[0], &x);
        assert_eq!(of(Combine::Sum), [0.0; 2]);
        assert_eq!(of(Combine::Prod), [1.0; 2]);
        assert_eq!(of(Combine::Max), [f32::NEG_INFINITY; 2]);
        assert_eq!(of(Combine::Min), [f32::INFINITY; 2]);
        assert!(run::<f32>(ReduceKind::Mean, &[0], &x)[0].is_nan());
        let x = Tensor::from_elements::<i8>(&[0, 2], &[]).unwrap();
        assert_eq!(run::<i8>(ReduceKind::Combine(Combine::Max), &[0], &x), [i8::MIN; 2]);
        assert_eq!(run::<i8>(ReduceKind::Mean, &[0], &x), [0; 2]);
        let op = Op::Reduce { kind: ReduceKind::ArgMax { last: false }, axes: vec![0], keep: false };
        assert!(evaluate(&op, &[&x]).is_err());
        let x = Tensor::from_bytes(TensorType::new(DType::Bool, &[0, 1]), &[]).unwrap();
        for (combine, expected) in [(Combine::Sum, 0), (Combine::Prod, 1), (Combine::Max, 0), (Combine::Min, 1)] {
            let op = Op::Reduce { kind: ReduceKind::Combine(combine), axes: vec![0], keep: false };
            assert_eq!(evaluate(&op, &[&x]).unwrap()[0].data.bytes(), [expected], "{combine:?}");
        }
    }

    #[test]
    fn sums_of_halves_and_small_integers() {
        let ones = vector(&[f16::ONE; 4096]);
        assert_eq!(run::<f16>(ReduceKind::Combine(Combine::Sum), &[0], &ones)[0].to_f32(), 4096.0);
        assert_eq!(run::<u8>(ReduceKind::Combine(Combine::Sum), &[0], &vector(&[200u8, 100])), [44]);
        assert_eq!(run::<i32>(ReduceKind::Mean, &[0], &vector(&[-3i32, -4])), [-3]);
        let mixed = vector(&[1e8f32, 1.0, -1e8, 1.0]);
        assert_eq!(run::<f32>(ReduceKind::Combine(Combine::Sum), &[0], &mixed), [2.0]);
    }

    #[test]
    fn nan_is_the_extremum() {
        let mut x = [1.0f32; 20];
        x[13] = f32::NAN;
        assert!(run::<f32>(ReduceKind::Combine(Combine::Max), &[0], &vector(&x))[0].is_nan());
        assert_eq!(run::<i64>(ReduceKind::ArgMax { last: false }, &[0], &vector(&x)), [13]);
        assert_eq!(run::<i64>(ReduceKind::ArgMin { last: true }, &[0], &vector(&x)), [13]);
    }

    #[test]
    fn arguments_of_equals() {
        let x = Tensor::from_elements(&[3, 2], &[1, 5, 3, 5, 3, 0]).unwrap();
        assert_eq!(run::<i64>(ReduceKind::ArgMax { last: false }, &[0], &x), [1, 0]);
        assert_eq!(run::<i64>(ReduceKind::ArgMax { last: true }, &[0], &x), [2, 1]);
        assert_eq!(run::<i64>(ReduceKind::ArgMin { last: true }, &[1], &x), [0, 0, 1]);
    }

    proptest! {
        #[test]
        fn any_axes_match_the_definition(
            sizes in prop::collection::vec(0u64..5, 1..5), mask in any::<u8>(),
        ) {
            let axes: Vec<u8> = (0..sizes.len() as u8).filter(|axis| mask >> axis & 1 == 1).collect();
            let count: u64 = sizes.iter().product();
            let data: Vec<i32> = (0..count as i32).map(|i| i * 37 % 101 - 50).collect();
            let x = Tensor::from_elements(&sizes, &data).unwrap();
            let kept: Vec<usize> = (0..sizes.len()).filter(|&axis| !axes.contains(&(axis as u8))).collect();
            let groups: u64 = kept.iter().map(|&axis| sizes[axis]).product();
            for combine in [Combine::Sum, Combine::Prod, Combine::Max, Combine::Min] {
                let identity = match combine {
                    Combine::Sum => 0,
                    Combine::Prod => 1,
                    Combine::Max => i32::MIN,
                    Combine::Min => i32::MAX,
                };
                let mut expected = vec![identity; groups as usize];
                for (linear, &value) in data.iter().enumerate() {
                    let mut rest = linear as u64;
                    let mut index = vec![0; sizes.len()];
                    for axis in (0..sizes.len()).rev() {
                        index[axis] = rest % sizes[axis];
                        rest /= sizes[axis];
                    }
                    let group = kept.iter().fold(0, |group, &axis| group * sizes[axis] + index[axis]) as usize;
                    let old = expected[group];
                    expected[group] = match combine {
                        Combine::Sum => old.wrapping_add(value),
                        Combine::Prod => old.wrapping_mul(value),
                        Combine::Max => old.max(value),
                        Combine::Min => old.min(value),
                    };
                }
                prop_assert_eq!(run::<i32>(ReduceKind::Combine(combine), &axes, &x), expected);
            }
        }
    }
}
