//! Cumulative sums, products and extrema.

use planfile::op::Combine;

use crate::combine::{logical, with_combine};
use crate::error::CpuError;
use crate::number::{Number, with_number};
use crate::view::{View, ViewMut, read, sizes, split_at_axis, write};

/// Each result combines all elements before it along `axis`, itself included unless `exclusive`; those after it where
/// `reverse`. Floats are accumulated in `f64`.
pub(crate) fn scan(
    combine: Combine,
    axis: usize,
    exclusive: bool,
    reverse: bool,
    x: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let (_, length, inner) = split_at_axis(&sizes(x.ty), axis);
    let combine = logical(combine, x.ty.dtype);
    with_number!(x.ty.dtype, T => {
        let x = read::<T>(x)?;
        write(result, |y| {
            with_combine!(combine, <T as Number>::Sum, f => {
                let identity = <<T as Number>::Sum as Number>::identity(combine);
                scan_with::<T>([length, inner], exclusive, reverse, &x, y, identity, f);
            });
            Ok(())
        })
    })
}

fn scan_with<T: Number>(
    [length, inner]: [usize; 2],
    exclusive: bool,
    reverse: bool,
    x: &[T],
    y: &mut [T],
    identity: T::Sum,
    f: impl Fn(T::Sum, T::Sum) -> T::Sum,
) {
    let mut sums = vec![identity; inner];
    let block = length * inner;
    for (x, y) in x.chunks_exact(block).zip(y.chunks_exact_mut(block)) {
        sums.fill(identity);
        for step in 0..length {
            let row = if reverse { length - 1 - step } else { step } * inner;
            let (x, y) = (&x[row..row + inner], &mut y[row..row + inner]);
            for ((sum, &x), y) in sums.iter_mut().zip(x).zip(y) {
                let next = f(*sum, x.to_sum());
                *y = T::from_sum(if exclusive { *sum } else { next });
                *sum = next;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::Combine;
    use planfile::{Op, Tensor};

    use crate::evaluate;

    fn run(combine: Combine, axis: u8, exclusive: bool, reverse: bool) -> Vec<i32> {
        let x = Tensor::from_elements(&[2, 3], &[1, 2, 3, 4, 5, 6]).unwrap();
        let op = Op::Scan { combine, axis, exclusive, reverse };
        evaluate(&op, &[&x]).unwrap()[0].elements::<i32>().unwrap().to_vec()
    }

    #[test]
    fn all_directions() {
        assert_eq!(run(Combine::Sum, 1, false, false), [1, 3, 6, 4, 9, 15]);
        assert_eq!(run(Combine::Sum, 1, true, false), [0, 1, 3, 0, 4, 9]);
        assert_eq!(run(Combine::Sum, 1, false, true), [6, 5, 3, 15, 11, 6]);
        assert_eq!(run(Combine::Sum, 1, true, true), [5, 3, 0, 11, 6, 0]);
        assert_eq!(run(Combine::Prod, 0, false, false), [1, 2, 3, 4, 10, 18]);
        assert_eq!(run(Combine::Max, 1, true, false), [i32::MIN, 1, 2, i32::MIN, 4, 5]);
        assert_eq!(run(Combine::Min, 0, false, true), [1, 2, 3, 4, 5, 6]);
    }
}
