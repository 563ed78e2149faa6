//! Convolutions as matrix products over columns that a window sees; depthwise ones directly.

use planfile::op::Window;

use crate::error::CpuError;
use crate::number::with_number;
use crate::product::{Matrix, Product};
use crate::view::{View, ViewMut, product, read, sizes, write};
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
    let (x_sizes, y_sizes) = (sizes(x.ty), sizes(result.ty));
    // The transposed convolution is the other one with the roles of input and output exchanged.
    let sliding = if transposed {
        Sliding::new(window, &y_sizes[2..], &x_sizes[2..])
    } else {
        Sliding::new(window, &x_sizes[2..], &y_sizes[2..])
    };
    let groups = usize::try_from(groups).unwrap_or(usize::MAX);
    let shape = Shape {
        inputs: x_sizes[1] / groups,
        outputs: y_sizes[1] / groups,
        input_plane: product(&x_sizes[2..]),
        output_plane: product(&y_sizes[2..]),
        sliding,
    };
    with_number!(x.ty.dtype, T => {
        let (x, w) = (read::<T>(x)?, read::<T>(w)?);
        write(result, |y: &mut [T]| {
            run(&shape, groups, transposed, &x, &w, y);
            Ok(())
        })
    })
}

/// Sizes of one group of channels of one image.
struct Shape {
    inputs: usize,
    outputs: usize,
    input_plane: usize,
    output_plane: usize,
    sliding: Sliding,
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
    let mut columns = Vec::new();
    for (position, y) in y.chunks_exact_mut(y_size).enumerate() {
        let x = &x[position * x_size..][..x_size];
        let w = &w[position % groups * w_size..][..w_size];
        if transposed {
            scatter(shape, x, w, y, &mut columns);
        } else if shape.inputs == 1 {
            direct(shape, x, w, y);
        } else {
            gather(shape, x, w, y, &mut columns);
        }
    }
}

/// One input channel: adds a scaled row of the input for each tap.
fn direct<T: Product>(shape: &Shape, x: &[T], w: &[T], y: &mut [T]) {
    let step = shape.sliding.step();
    for (y, w) in y.chunks_exact_mut(shape.output_plane).zip(w.chunks_exact(shape.sliding.taps())) {
        y.fill(T::ZERO);
        shape.sliding.for_each_run(|run| {
            let (y, weight) = (&mut y[run.output..][..run.length], w[run.tap]);
            if step == 1 {
                for (y, &x) in y.iter_mut().zip(&x[run.input..][..run.length]) {
                    *y = y.add(x.mul(weight));
                }
            } else {
                for (y, &x) in y.iter_mut().zip(x[run.input..].iter().step_by(step)) {
                    *y = y.add(x.mul(weight));
                }
            }
        });
    }
}

/// Columns `[channels · taps, positions]` of what the window sees, then `y = w · columns`.
fn gather<T: Product>(shape: &Shape, x: &[T], w: &[T], y: &mut [T], columns: &mut Vec<T>) {
    let depth = shape.inputs * shape.sliding.taps();
    let size = [shape.outputs, shape.output_plane, depth];
    let w = Matrix::packed(w, depth);
    if shape.sliding.is_identity() {
        T::multiply(size, y, shape.output_plane, w, Matrix::packed(x, shape.input_plane), false);
        return;
    }
    columns.clear();
    columns.resize(depth * shape.output_plane, T::ZERO);
    let step = shape.sliding.step();
    let channels = columns.chunks_exact_mut(shape.sliding.taps() * shape.output_plane);
    for (columns, x) in channels.zip(x.chunks_exact(shape.input_plane)) {
        shape.sliding.for_each_run(|run| {
            let columns = &mut columns[run.tap * shape.output_plane + run.output..][..run.length];
            if step == 1 {
                columns.copy_from_slice(&x[run.input..][..run.length]);
            } else {
                for (column, &x) in columns.iter_mut().zip(x[run.input..].iter().step_by(step)) {
                    *column = x;
                }
            }
        });
    }
    T::multiply(size, y, shape.output_plane, w, Matrix::packed(columns, shape.output_plane), false);
}

/// `columns = wᵀ · x`, then each column is added where its window writes.
fn scatter<T: Product>(shape: &Shape, x: &[T], w: &[T], y: &mut [T], columns: &mut Vec<T>) {
    let rows = shape.outputs * shape.sliding.taps();
    columns.clear();
    columns.resize(rows * shape.input_plane, T::ZERO);
    let size = [rows, shape.input_plane, shape.inputs];
    let (w, x) = (Matrix::packed(w, rows).transposed(), Matrix::packed(x, shape.input_plane));
    T::multiply(size, columns, shape.input_plane, w, x, false);
    let step = shape.sliding.step();
    let channels = columns.chunks_exact(shape.sliding.taps() * shape.input_plane);
    for (columns, y) in channels.zip(y.chunks_exact_mut(shape.output_plane)) {
        y.fill(T::ZERO);
        shape.sliding.for_each_run(|run| {
            let columns = &columns[run.tap * shape.input_plane + run.output..][..run.length];
            for (y, &column) in y[run.input..].iter_mut().step_by(step).zip(columns) {
                *y = y.add(column);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use planfile::op::Window;
    use planfile::{Op, Tensor};
    use proptest::prelude::*;

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
