//! Softmax and its logarithm.

use planfile::op::Combine;

use crate::error::CpuError;
use crate::number::{Float, with_float};
use crate::reduce::extremum;
use crate::view::{View, ViewMut, read, sizes, split_at_axis, write};

/// `exp(x - max) / sum exp(x - max)` along `axis`; the sum in `f64`. NaN, or nothing but negative infinity, gives NaN.
pub(crate) fn softmax(axis: usize, log: bool, x: &View<'_>, result: &mut ViewMut<'_>) -> Result<(), CpuError> {
    let (_, length, inner) = split_at_axis(&sizes(x.ty), axis);
    with_float!("softmax", x.ty.dtype, T => {
        let x = read::<T>(x)?;
        write(result, |y| {
            y.copy_from_slice(&x);
            if inner == 1 {
                y.chunks_exact_mut(length).for_each(|row| normalise(log, row));
                return Ok(());
            }
            let mut row = vec![0.0; length];
            for block in y.chunks_exact_mut(length * inner) {
                for column in 0..inner {
                    row.iter_mut().zip(block[column..].iter().step_by(inner)).for_each(|(to, &from)| *to = from);
                    normalise(log, &mut row);
                    block[column..].iter_mut().step_by(inner).zip(&row).for_each(|(to, &from)| *to = from);
                }
            }
            Ok(())
        })
    })
}

fn normalise<T: Float>(log: bool, row: &mut [T]) {
    let max = extremum(Combine::Max, row);
    if log {
        let sum: f64 = row.iter().map(|&x| (x - max).exp().to_sum()).sum();
        let log_sum = T::from_f64(sum.ln());
        row.iter_mut().for_each(|x| *x = *x - max - log_sum);
        return;
    }
    let mut sum = 0.0;
    for x in row.iter_mut() {
        *x = (*x - max).exp();
        sum += x.to_sum();
    }
    let scale = 1.0 / sum;
    row.iter_mut().for_each(|x| *x = T::from_f64(x.to_sum() * scale));
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
