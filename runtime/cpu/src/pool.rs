//! Pooling: row by row for each tap of the window, so that inner loops run over consecutive positions.

use planfile::op::{IndexOrder, PoolKind, Window};

use crate::error::CpuError;
use crate::number::{Float, Number, with_float, with_number};
use crate::view::{View, ViewMut, product, read, sizes, slice_mut, write};
use crate::window::Sliding;

/// Values, and for `Max` the flat indices of where they came from.
pub(crate) fn pool(
    kind: PoolKind,
    window: &Window,
    order: Option<IndexOrder>,
    x: &View<'_>,
    result: &mut ViewMut<'_>,
    indices: Option<&mut ViewMut<'_>>,
) -> Result<(), CpuError> {
    let (x_sizes, y_sizes) = (sizes(x.ty), sizes(result.ty));
    let sliding = Sliding::new(window, &x_sizes[2..], &y_sizes[2..]);
    match kind {
        PoolKind::Max => with_number!(x.ty.dtype, T => {
            let x = read::<T>(x)?;
            let indices = match indices {
                Some(view) => Some(slice_mut::<i64>(view.bytes, view.ty.dtype)?),
                None => None,
            };
            let spatial = &x_sizes[2..];
            let column_major = order == Some(IndexOrder::ColumnMajor);
            write(result, |y| {
                max(&sliding, &x, y, indices, column_major.then_some(spatial));
                Ok(())
            })
        }),
        PoolKind::Average { count_pads } => with_float!("pool", x.ty.dtype, T => {
            let x = read::<T>(x)?;
            let counts = sliding.counts(count_pads);
            write(result, |y: &mut [T]| {
                sum(&sliding, &x, y, |x| x.to_sum(), |sum, position| sum / counts[position] as f64);
                Ok(())
            })
        }),
        PoolKind::Lp { p } => with_float!("pool", x.ty.dtype, T => {
            let x = read::<T>(x)?;
            let p = p as f64;
            write(result, |y: &mut [T]| {
                match p {
                    1.0 => sum(&sliding, &x, y, |x| x.to_sum().abs(), |sum, _| sum),
                    2.0 => sum(&sliding, &x, y, |x| x.to_sum() * x.to_sum(), |sum, _| sum.sqrt()),
                    _ => sum(&sliding, &x, y, |x| x.to_sum().abs().powf(p), |sum, _| sum.powf(1.0 / p)),
                }
                Ok(())
            })
        }),
    }
}

/// NaN is passed over, like in ONNX Runtime; a window without any number gives negative infinity or the smallest
/// integer, and the index of its first element inside of the
/// input, or -1 in an input without elements.
fn max<T: Number>(
    sliding: &Sliding,
    x: &[T],
    y: &mut [T],
    mut indices: Option<&mut [i64]>,
    column_major: Option<&[usize]>,
) {
    let (input, output, step) = (sliding.input(), sliding.output(), sliding.step());
    y.fill(T::LOWEST);
    if let Some(indices) = &mut indices {
        indices.fill(-1);
    }
    if output == 0 || input == 0 {
        return;
    }
    for (plane, y) in y.chunks_exact_mut(output).enumerate() {
        let x = &x[plane * input..][..input];
        let Some(indices) = &mut indices else {
            sliding.for_each_run(|run| {
                let y = &mut y[run.output..][..run.length];
                for (y, &x) in y.iter_mut().zip(x[run.input..].iter().step_by(step)) {
                    *y = if x > *y { x } else { *y };
                }
            });
            continue;
        };
        let found = &mut indices[plane * output..][..output];
        sliding.for_each_run(|run| {
            for position in 0..run.length {
                let (at, from) = (run.output + position, run.input + position * step);
                if x[from] > y[at] || found[at] < 0 {
                    found[at] = from as i64;
                    y[at] = if x[from] > y[at] { x[from] } else { y[at] };
                }
            }
        });
        let base = (plane * input) as i64;
        for index in found {
            let within = usize::try_from(*index).unwrap_or(0);
            *index = base + column_major.map_or(within, |sizes| transpose_index(within, sizes)) as i64;
        }
    }
}

/// The column-major flat index of a row-major one.
fn transpose_index(mut index: usize, sizes: &[usize]) -> usize {
    let mut stride = product(sizes);
    let mut result = 0;
    // The last dimension has the largest stride in column-major order.
    for &size in sizes.iter().rev() {
        stride /= size;
        result += index % size * stride;
        index /= size;
    }
    result
}

/// `finish(sum of term(x) over the window)`, summed in `f64`.
fn sum<T: Float>(sliding: &Sliding, x: &[T], y: &mut [T], term: impl Fn(T) -> f64, finish: impl Fn(f64, usize) -> f64) {
    let (input, output, step) = (sliding.input(), sliding.output(), sliding.step());
    if output == 0 {
        return;
    }
    let mut sums = vec![0f64; output];
    for (plane, y) in y.chunks_exact_mut(output).enumerate() {
        let x = &x[plane * input..][..input];
        sums.fill(0.0);
        sliding.for_each_run(|run| {
            let sums = &mut sums[run.output..][..run.length];
            for (sum, &x) in sums.iter_mut().zip(x[run.input..].iter().step_by(step)) {
                *sum += term(x);
            }
        });
        for (position, (y, &sum)) in y.iter_mut().zip(&sums).enumerate() {
            *y = T::from_f64(finish(sum, position));
        }
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::{IndexOrder, PoolKind, Window};
    use planfile::{Op, Tensor};

    use crate::evaluate;

    fn op(kind: PoolKind, size: u64, stride: u64, pads: (i64, i64), ceil: bool) -> Op {
        let window = Window { sizes: vec![size], strides: vec![stride], dilations: vec![1], pads: vec![pads] };
        Op::Pool { kind, window, ceil, indices: None }
    }

    fn row(elements: &[f32]) -> Tensor {
        Tensor::from_elements(&[1, 1, elements.len() as u64], elements).unwrap()
    }

    fn run(op: &Op, x: &[f32]) -> Vec<f32> {
        evaluate(op, &[&row(x)]).unwrap()[0].elements::<f32>().unwrap().to_vec()
    }

    #[test]
    fn averages_with_and_without_padding() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0];
        let average = |count_pads, ceil| op(PoolKind::Average { count_pads }, 3, 2, (1, 0), ceil);
        assert_eq!(run(&average(false, false), &x), [1.5, 3.0]);
        assert_eq!(run(&average(true, false), &x), [1.0, 3.0]);
        // The window that ends outside divides by what it covers of input and padding, in either case.
        assert_eq!(run(&average(false, true), &x), [1.5, 3.0, 4.5]);
        assert_eq!(run(&average(true, true), &x), [1.0, 3.0, 4.5]);
    }

    #[test]
    fn maxima_pass_over_nan() {
        let max = op(PoolKind::Max, 2, 2, (0, 0), false);
        let y = run(&max, &[1.0, f32::NAN, f32::NAN, 3.0, f32::NAN, f32::NAN, -5.0, -4.0]);
        assert_eq!(y, [1.0, 3.0, f32::NEG_INFINITY, -4.0]);
    }

    #[test]
    fn norms_of_windows() {
        assert_eq!(run(&op(PoolKind::Lp { p: 2 }, 2, 2, (0, 0), false), &[3.0, -4.0, 5.0, 12.0]), [5.0, 13.0]);
        assert_eq!(run(&op(PoolKind::Lp { p: 1 }, 2, 2, (0, 0), false), &[3.0, -4.0, 5.0, 12.0]), [7.0, 17.0]);
        let cubic = run(&op(PoolKind::Lp { p: 3 }, 2, 2, (0, 0), false), &[3.0, -4.0, 0.0, -2.0]);
        assert!((cubic[0] - 91f32.cbrt()).abs() < 1e-5 && (cubic[1] - 2.0).abs() < 1e-6);
    }

    #[test]
    fn indices_in_both_orders() {
        let x = Tensor::from_elements(&[1, 2, 2, 3], &[1i8, 5, 2, 9, 4, 9, 0, 0, 0, 0, 7, 0]).unwrap();
        let pool = |order| {
            let window =
                Window { sizes: vec![2, 3], strides: vec![1, 1], dilations: vec![1, 1], pads: vec![(0, 0), (0, 0)] };
            let op = Op::Pool { kind: PoolKind::Max, window, ceil: false, indices: Some(order) };
            let results = evaluate(&op, &[&x]).unwrap();
            (results[0].elements::<i8>().unwrap().to_vec(), results[1].elements::<i64>().unwrap().to_vec())
        };
        assert_eq!(pool(IndexOrder::RowMajor), (vec![9, 7], vec![3, 6 + 4]));
        assert_eq!(pool(IndexOrder::ColumnMajor), (vec![9, 7], vec![1, 6 + 3]));
    }
}
