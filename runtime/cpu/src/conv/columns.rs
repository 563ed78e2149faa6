//! What windows see, gathered for a matrix product.

use std::ops::Range;

use super::Shape;
use crate::product::{FEW_ROWS, Matrix, Product, Right};

/// What windows see, as a matrix `[channels · taps, positions]` that is never all in memory.
pub(super) struct Columns<'a, T> {
    pub(super) shape: &'a Shape,
    /// The channels of one group.
    pub(super) x: &'a [T],
}

impl<T: Product> Right<T> for Columns<'_, T> {
    fn pack(&self, depth: Range<usize>, columns: Range<usize>, width: usize, panels: &mut [T]) {
        let sliding = &self.shape.sliding;
        if sliding.is_identity() {
            return Matrix::packed(self.x, self.shape.input_plane).pack(depth, columns, width, panels);
        }
        let (taps, step) = (sliding.taps(), sliding.step());
        let mut row = vec![T::ZERO; columns.len()];
        for (position, depth_index) in depth.clone().enumerate() {
            let x = &self.x[depth_index / taps * self.shape.input_plane..][..self.shape.input_plane];
            row.fill(T::ZERO);
            sliding.for_each_run_within(depth_index % taps, columns.clone(), |run| {
                let row = &mut row[run.first..run.end];
                if step == 1 {
                    row.copy_from_slice(&x[run.input..][..row.len()]);
                } else {
                    row.iter_mut().zip(x[run.input..].iter().step_by(step)).for_each(|(to, &from)| *to = from);
                }
            });
            let panels = panels.chunks_exact_mut(depth.len() * width);
            for (panel, row) in panels.zip(row.chunks(width)) {
                panel[position * width..][..row.len()].copy_from_slice(row);
            }
        }
    }

    fn in_place(&self, column: usize, rows: usize) -> Option<(&[T], usize)> {
        let in_place = self.shape.sliding.is_identity() && rows <= FEW_ROWS;
        in_place.then(|| (self.x.get(column..).unwrap_or_default(), self.shape.input_plane))
    }
}
