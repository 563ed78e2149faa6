//! Convolutions as matrix products with columns of what windows see; depthwise ones directly.

mod columns;
mod depthwise;
mod padded;

use planfile::op::Window;
use planfile::{DType, TensorType};
use rayon::prelude::*;

use self::columns::Columns;
use self::depthwise::{Rows, depthwise};
use crate::error::CpuError;
use crate::number::with_wrapping;
use crate::product::{Job, Left, Matrix, Product};
use crate::view::{View, ViewMut, product, read, sizes, slice, slice_mut, write};
use crate::window::Sliding;

/// `x: [N, C, spatial…]`, `w: [M, C / groups, window…]`, or `[C, M / groups, window…]` when transposed. Accumulates in
/// the type that the elements are computed in.
pub(crate) fn conv(
    window: &Window,
    groups: u64,
    transposed: bool,
    x: &View<'_>,
    w: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    if w.ty.dtype != x.ty.dtype {
        return Err(CpuError::Type(format!("conv: weights {} for {}", w.ty, x.ty)));
    }
    let groups = usize::try_from(groups).unwrap_or(usize::MAX);
    let shape = Shape::new(window, groups, transposed, x.ty, result.ty);
    with_wrapping!(x.ty.dtype, T => {
        let (x, w) = (read::<T>(x)?, read::<T>(w)?);
        write(result, |y: &mut [T]| {
            run(&shape, groups, transposed, &x, &w, y);
            Ok(())
        })
    })
}

/// As [`conv`] in `f32` with one group and not transposed, with weights in panels.
pub(crate) fn conv_panels(
    window: &Window,
    x: &View<'_>,
    panels: &View<'_>,
    result: &mut ViewMut<'_>,
) -> Result<(), CpuError> {
    let shape = Shape::new(window, 1, false, x.ty, result.ty);
    let (x, data) = (slice::<f32>(x.bytes, DType::F32)?, slice(panels.bytes, DType::F32)?);
    let y: &mut [f32] = slice_mut(result.bytes, DType::F32)?;
    let depth = shape.inputs * shape.sliding.taps();
    // Nothing to convolve gives zeros; there is something to write, which was checked.
    if x.is_empty() {
        y.fill(0.0);
    } else {
        multiply(&shape, x, |_| Left::Panels { data, depth }, y);
    }
    Ok(())
}

/// Sizes of one group of channels of one image.
struct Shape {
    inputs: usize,
    outputs: usize,
    input_plane: usize,
    output_plane: usize,
    sliding: Sliding,
}

impl Shape {
    fn new(window: &Window, groups: usize, transposed: bool, x: &TensorType, y: &TensorType) -> Self {
        let (x_sizes, y_sizes) = (sizes(x), sizes(y));
        // The transposed convolution is the other one with the roles of input and output exchanged.
        let sliding = if transposed {
            Sliding::new(window, &y_sizes[2..], &x_sizes[2..])
        } else {
            Sliding::new(window, &x_sizes[2..], &y_sizes[2..])
        };
        Self {
            inputs: x_sizes[1] / groups,
            outputs: y_sizes[1] / groups,
            input_plane: product(&x_sizes[2..]),
            output_plane: product(&y_sizes[2..]),
            sliding,
        }
    }
}

fn run<T: Product>(shape: &Shape, groups: usize, transposed: bool, x: &[T], w: &[T], y: &mut [T]) {
    let (x_size, y_size) = (shape.inputs * shape.input_plane, shape.outputs * shape.output_plane);
    let w_size = shape.inputs * shape.outputs * shape.sliding.taps();
    if y_size == 0 {
        return;
    }
    if x_size == 0 {
        y.fill(T::ZERO);
        return;
    }
    let parts = |position: usize| (&x[position * x_size..][..x_size], &w[position % groups * w_size..][..w_size]);
    if transposed {
        y.par_chunks_exact_mut(y_size).enumerate().for_each(|(position, y)| {
            let (x, w) = parts(position);
            scatter(shape, x, w, y);
        });
    } else if shape.inputs == 1 && shape.outputs < FEW_OUTPUTS && shape.sliding.is_compact() {
        y.par_chunks_exact_mut(shape.output_plane).enumerate().for_each_init(Rows::new, |rows, (plane, y)| {
            let (x, w) = parts(plane / shape.outputs);
            let taps = shape.sliding.taps();
            depthwise(&shape.sliding, rows, x, &w[plane % shape.outputs * taps..][..taps], y);
        });
    } else {
        let depth = shape.inputs * shape.sliding.taps();
        multiply(shape, x, |position| Left::Matrix(Matrix::packed(parts(position).1, depth)), y);
    }
}

/// As a matrix product, with the weights for each image and group.
fn multiply<'a, T: Product>(shape: &Shape, x: &'a [T], weights: impl Fn(usize) -> Left<'a, T>, y: &mut [T]) {
    if padded::convolve(shape, x, &weights, y) {
        return;
    }
    let (x_size, y_size) = (shape.inputs * shape.input_plane, shape.outputs * shape.output_plane);
    let jobs = x.chunks_exact(x_size).zip(y.chunks_exact_mut(y_size)).enumerate();
    let mut jobs: Vec<Job<'_, T, Columns<'_, T>>> =
        jobs.map(|(position, (x, c))| Job { a: weights(position), b: Columns { shape, x }, c }).collect();
    T::multiply([shape.outputs, shape.output_plane, shape.inputs * shape.sliding.taps()], &mut jobs);
}

/// With one input channel and fewer output channels than this, products have too little depth to pay.
const FEW_OUTPUTS: usize = 8;

/// `columns = wᵀ · x`, then each column is added where its window writes.
fn scatter<T: Product>(shape: &Shape, x: &[T], w: &[T], y: &mut [T]) {
    let rows = shape.outputs * shape.sliding.taps();
    let mut columns = vec![T::ZERO; rows * shape.input_plane];
    let size = [rows, shape.input_plane, shape.inputs];
    let (a, b) = (Matrix::packed(w, rows).transposed(), Matrix::packed(x, shape.input_plane));
    T::multiply(size, &mut [Job { a: Left::Matrix(a), b, c: &mut columns }]);
    let step = shape.sliding.step();
    let channels = columns.par_chunks_exact(shape.sliding.taps() * shape.input_plane);
    channels.zip(y.par_chunks_exact_mut(shape.output_plane)).for_each(|(columns, y)| {
        y.fill(T::ZERO);
        shape.sliding.for_each_run(|run| {
            let columns = &columns[run.tap * shape.input_plane + run.output..][..run.length];
            for (y, &column) in y[run.input..].iter_mut().step_by(step).zip(columns) {
                *y = y.add(column);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use planfile::{Op, Tensor};
    use proptest::prelude::*;

    use super::*;
    use crate::evaluate;

    /// One spatial dimension of a random convolution.
    #[derive(Clone, Debug)]
    struct Axis {
        size: u64,
        taps: u64,
        stride: u64,
        dilation: u64,
        pads: (i64, i64),
        output_pad: u64,
    }

    fn axis() -> impl Strategy<Value = Axis> {
        (1u64..7, 1u64..4, 1u64..4, 1u64..3, 0i64..3, 0i64..3, 0u64..2).prop_map(
            |(size, taps, stride, dilation, low, high, output_pad)| Axis {
                size,
                taps,
                stride,
                dilation,
                pads: (low, high),
                output_pad,
            },
        )
    }

    fn op(axes: &[Axis], groups: u64, transposed: bool) -> Op {
        let window = Window {
            sizes: axes.iter().map(|axis| axis.taps).collect(),
            strides: axes.iter().map(|axis| axis.stride).collect(),
            dilations: axes.iter().map(|axis| axis.dilation).collect(),
            pads: axes.iter().map(|axis| axis.pads).collect(),
        };
        let output_pads = axes.iter().map(|axis| if transposed { axis.output_pad } else { 0 }).collect();
        Op::Conv { window, groups, transposed, output_pads }
    }

    fn fill(sizes: &[u64], step: i32) -> Tensor {
        let count: u64 = sizes.iter().product();
        Tensor::from_elements(sizes, &(0..count as i32).map(|i| (i * step % 11 - 5) as f32).collect::<Vec<_>>())
            .unwrap()
    }

    /// Index digits of a linear position.
    fn digits(mut linear: u64, sizes: &[u64]) -> Vec<u64> {
        let mut digits: Vec<u64> = sizes
            .iter()
            .rev()
            .map(|&size| {
                let digit = linear % size;
                linear /= size;
                digit
            })
            .collect();
        digits.reverse();
        digits
    }

    fn linear(digits: &[u64], sizes: &[u64]) -> usize {
        digits.iter().zip(sizes).fold(0, |linear, (digit, size)| linear * size + digit) as usize
    }

    /// Sizes across tiles and blocks: every way of convolving against one product over gathered columns.
    #[test]
    fn large_sizes_match_the_gathered_product() {
        let numbers = |count: usize, step: usize| (0..count).map(|i| (i * step % 9) as f32 - 4.0).collect::<Vec<_>>();
        for (groups, inputs, outputs, taps, stride, dilation, pad) in [
            (1, 35, 50, 3, 1, 1, 1),
            (1, 35, 13, 3, 1, 2, 0),
            (2, 20, 30, 2, 2, 1, 1),
            (6, 1, 2, 5, 1, 1, 2),
            (6, 1, 1, 3, 2, 1, 1),
        ] {
            let window = Window {
                sizes: vec![taps; 2],
                strides: vec![stride; 2],
                dilations: vec![dilation; 2],
                pads: vec![(pad, pad); 2],
            };
            let (x_sizes, w_sizes) = ([2, groups * inputs, 21, 45], [groups * outputs, inputs, taps, taps]);
            let count = |sizes: &[u64]| sizes.iter().product::<u64>() as usize;
            let (x, w) = (numbers(count(&x_sizes), 5), numbers(count(&w_sizes), 7));
            let (x, w) = (Tensor::from_elements(&x_sizes, &x).unwrap(), Tensor::from_elements(&w_sizes, &w).unwrap());
            let op = Op::Conv { window: window.clone(), groups, transposed: false, output_pads: vec![0; 2] };
            let y = evaluate(&op, &[&x, &w]).unwrap().remove(0);
            let shape = Shape::new(&window, groups as usize, false, &x.ty, &y.ty);
            let mut expected = vec![0f32; y.ty.elements().unwrap() as usize];
            let depth = shape.inputs * shape.sliding.taps();
            let (x, w) = (x.elements::<f32>().unwrap(), w.elements::<f32>().unwrap());
            let planes = x.chunks_exact(shape.inputs * shape.input_plane);
            let jobs = planes.zip(expected.chunks_exact_mut(shape.outputs * shape.output_plane)).enumerate();
            for (position, (x, c)) in jobs {
                let w = &w[position % groups as usize * shape.outputs * depth..][..shape.outputs * depth];
                let job = Job { a: Left::Matrix(Matrix::packed(w, depth)), b: Columns { shape: &shape, x }, c };
                f32::multiply([shape.outputs, shape.output_plane, depth], &mut [job]);
            }
            assert_eq!(y.elements::<f32>().unwrap(), &expected, "{window:?}");
        }
    }

    /// Such sizes pass the type check, and must not take memory in proportion to their product.
    #[test]
    fn wide_steps_and_wide_padding_take_little_memory() {
        let window = |taps: u64, strides: [u64; 2], dilation: u64, pads: (i64, i64)| Window {
            sizes: vec![taps; 2],
            strides: strides.to_vec(),
            dilations: vec![dilation; 2],
            pads: vec![pads; 2],
        };
        let run = |window: Window, x: &[u64], w: &[u64]| {
            let ones = |sizes: &[u64]| {
                Tensor::from_elements(sizes, &vec![1f32; sizes.iter().product::<u64>() as usize]).unwrap()
            };
            let op = Op::Conv { window, groups: 1, transposed: false, output_pads: vec![0; 2] };
            let y = evaluate(&op, &[&ones(x), &ones(w)]).unwrap().remove(0);
            (y.ty.sizes(), y.elements::<f32>().unwrap()[0])
        };
        let far = window(1, [1, (1 << 31) - 1], 1, (0, 0));
        assert_eq!(run(far, &[1, 1, 1000, 4], &[1, 1, 1, 1]), (vec![1, 1, 1000, 1], 1.0));
        // One of four taps meets each channel's only element: padded planes would be thousands of times as large.
        let padded = window(2, [1, 1], 67, (67, 0));
        assert_eq!(run(padded, &[1, 4096, 1, 1], &[1, 4096, 2, 2]), (vec![1, 1, 1, 1], 4096.0));
    }

    proptest! {
        #[test]
        fn matches_the_sum_it_stands_for(
            axes in prop::collection::vec(axis(), 0..4),
            groups in 1u64..3, inputs in 1u64..3, outputs in 1u64..3, batch in 0u64..3, transposed in any::<bool>(),
        ) {
            let sizes = |first: u64, second: u64, pick: fn(&Axis) -> u64| {
                [first, second].into_iter().chain(axes.iter().map(pick)).collect::<Vec<u64>>()
            };
            let x_sizes = sizes(batch, inputs * groups, |axis| axis.size);
            let w_sizes = if transposed {
                sizes(inputs * groups, outputs, |axis| axis.taps)
            } else {
                sizes(outputs * groups, inputs, |axis| axis.taps)
            };
            let (x, w) = (fill(&x_sizes, 7), fill(&w_sizes, 3));
            let Ok(y) = evaluate(&op(&axes, groups, transposed), &[&x, &w]) else { return Ok(()) };
            let y_sizes = y[0].ty.sizes();
            let mut expected = vec![0f32; y[0].ty.elements().unwrap() as usize];
            let (x, w) = (x.elements::<f32>().unwrap(), w.elements::<f32>().unwrap());
            // Each product of an input element with a weight, added to the output it belongs to.
            for (at, &x) in x.iter().enumerate() {
                let x_index = digits(at as u64, &x_sizes);
                for (at, &w) in w.iter().enumerate() {
                    let w_index = digits(at as u64, &w_sizes);
                    let group = x_index[1] / inputs;
                    let (input, output) = if transposed {
                        (w_index[0], group * outputs + w_index[1])
                    } else {
                        (w_index[0] / outputs * inputs + w_index[1], w_index[0])
                    };
                    if input != x_index[1] { continue; }
                    let mut y_index = vec![x_index[0], output];
                    for (position, axis) in axes.iter().enumerate() {
                        let (from, tap) = (x_index[position + 2] as i64, (w_index[position + 2] * axis.dilation) as i64);
                        let stride = axis.stride as i64;
                        let at = if transposed { from * stride + tap - axis.pads.0 } else { from + axis.pads.0 - tap };
                        if !transposed && at % stride != 0 { break; }
                        let at = if transposed { at } else { at / stride };
                        if at < 0 || at >= y_sizes[position + 2] as i64 { break; }
                        y_index.push(at as u64);
                    }
                    if y_index.len() == y_sizes.len() {
                        expected[linear(&y_index, &y_sizes)] += x * w;
                    }
                }
            }
            prop_assert_eq!(y[0].elements::<f32>().unwrap(), &expected);
        }
    }
}
