//! Windows that move by one: products that read a padded copy of the input in place.
//!
//! With padding around every plane, what a tap reads at consecutive positions lies next to each other, across rows of
//! the output, too: the row of a tap in the matrix of columns is the padded input itself, from the tap's offset on.
//! Nothing is gathered; a few positions between rows are computed for nothing and left out.

use rayon::prelude::*;

use super::Shape;
use crate::product::{Left, Product, WindowJob, Windows};
use crate::window::SlidingAxis;

/// True if the convolution was of this kind and is done.
pub(super) fn convolve<'a, T: Product>(
    shape: &Shape,
    x: &[T],
    weights: &impl Fn(usize) -> Left<'a, T>,
    y: &mut [T],
) -> bool {
    let axes = shape.sliding.axes();
    let flat = SlidingAxis { input: 1, output: 1, taps: 1, stride: 1, dilation: 1, low: 0, high: 0 };
    let [rows, columns] = match axes {
        [columns] => [flat, *columns],
        [rows, columns] => [*rows, *columns],
        _ => return false,
    };
    let Some(product) = T::windows() else { return false };
    let simple = axes.iter().all(|axis| axis.stride == 1) && shape.sliding.is_compact();
    if !simple || shape.sliding.is_identity() {
        return false;
    }
    // Padding on both sides is not negative: the window is compact.
    let padded = |axis: &SlidingAxis| axis.input + (axis.low + axis.high).cast_unsigned() as usize;
    let (height, pitch) = (padded(&rows), padded(&columns));
    // Small planes under wide padding: more would be copied and computed for nothing than gathered.
    if height * pitch > 3 * shape.input_plane || pitch > 2 * columns.output {
        return false;
    }
    let (top, left) = (rows.low.cast_unsigned() as usize, columns.low.cast_unsigned() as usize);
    let plane = height * pitch;
    let planes = x.len() / shape.input_plane;
    // Tiles may read on beyond the last position.
    let mut copy = vec![T::ZERO; planes * plane + product.margin];
    copy.par_chunks_exact_mut(plane).zip(x.par_chunks_exact(shape.input_plane)).for_each(|(to, from)| {
        for (row, from) in from.chunks_exact(columns.input).enumerate() {
            to[(top + row) * pitch + left..][..columns.input].copy_from_slice(from);
        }
    });
    let taps = |channel: usize| {
        let row = move |tap: usize| channel * plane + tap * rows.dilation * pitch;
        (0..rows.taps).flat_map(move |tap| (0..columns.taps).map(move |column| row(tap) + column * columns.dilation))
    };
    let windows = Windows {
        offsets: (0..shape.inputs).flat_map(taps).collect(),
        rows: rows.output,
        columns: columns.output,
        pitch,
    };
    let x_size = shape.inputs * plane;
    let jobs = y.chunks_exact_mut(shape.outputs * shape.output_plane).enumerate();
    let mut jobs: Vec<WindowJob<'_, T>> =
        jobs.map(|(position, c)| WindowJob { a: weights(position), x: &copy[position * x_size..], c }).collect();
    (product.multiply)(shape.outputs, &windows, &mut jobs);
    true
}
