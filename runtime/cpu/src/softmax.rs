//! Softmax and its logarithm.

use planfile::op::Combine;
use rayon::prelude::*;

use crate::error::CpuError;
use crate::number::{Float, sum, with_float};
use crate::reduce::extremum;
use crate::simd::vectorised;
use crate::view::{View, ViewMut, read, sizes, split_at_axis, write};

/// `exp(x - max) / sum exp(x - max)` along `axis`; the sum in `f64`. NaN, or nothing but negative infinity, gives NaN.
pub(crate) fn softmax(axis: usize, log: bool, x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let (_, length, inner) = split_at_axis(&sizes(x.ty), axis);
    with_float!("softmax", x.ty.dtype, T => {
        let x = read::<T>(x)?;
        write(result, |y| {
            if inner == 1 {
                let rows = y.par_chunks_exact_mut(length).zip(x.par_chunks_exact(length));
                rows.with_min_len(ROWS).for_each(|(y, x)| {
                    y.copy_from_slice(x);
                    normalise(log, y);
                });
                return Ok(());
            }
            let blocks = y.par_chunks_exact_mut(length * inner).zip(x.par_chunks_exact(length * inner));
            blocks.for_each(|(y, x)| {
                let mut row = vec![0.0; length];
                for column in 0..inner {
                    row.iter_mut().zip(x[column..].iter().step_by(inner)).for_each(|(to, &from)| *to = from);
                    normalise(log, &mut row);
                    y[column..].iter_mut().step_by(inner).zip(&row).for_each(|(to, &from)| *to = from);
                }
            });
            Ok(())
        })
    })
}

/// Rows that a thread takes at least.
const ROWS: usize = 16;

vectorised! {
    fn normalise<T: Float>(log: bool, row: &mut [T]) {
        let max = extremum(Combine::Max, row);
        if log {
            let log_sum = T::from_f64(sum(row, |x| (x - max).exp().to_sum()).ln());
            row.iter_mut().for_each(|x| *x = *x - max - log_sum);
            return;
        }
        row.iter_mut().for_each(|x| *x = (*x - max).exp());
        let scale = 1.0 / sum(row, |x| x.to_sum());
        row.iter_mut().for_each(|x| *x = T::from_f64(x.to_sum() * scale));
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use planfile::{Op, Tensor};

    use crate::evaluate;

    #[test]
    fn columns_sum_to_one() {
        let x = Tensor::from_elements(&[2, 2], &[0.0f32, 1000.0, 0.0, 1000.0 + 3f32.ln()]).unwrap();
        let y = evaluate(&Op::Softmax { axis: 0, log: false }, &[&x]).unwrap();
        let y = y[0].elements::<f32>().unwrap();
        let close = |a: f32, b: f32| (a - b).abs() < 1e-4;
        assert!(close(y[0], 0.5) && close(y[1], 0.25) && close(y[2], 0.5) && close(y[3], 0.75), "{y:?}");
        let y = evaluate(&Op::Softmax { axis: 1, log: true }, &[&x]).unwrap();
        let y = y[0].elements::<f32>().unwrap();
        assert_eq!(y[..2], [-1000.0, 0.0]);
    }

    #[test]
    fn masked_elements_get_nothing() {
        let x = [f16::NEG_INFINITY, f16::ONE, f16::ONE, f16::NEG_INFINITY];
        let y = evaluate(&Op::Softmax { axis: 0, log: false }, &[&Tensor::from_elements(&[4], &x).unwrap()]).unwrap();
        assert_eq!(
            y[0].elements::<f16>().unwrap().iter().map(|y| y.to_f32()).collect::<Vec<_>>(),
            [0.0, 0.5, 0.5, 0.0]
        );
    }
}
