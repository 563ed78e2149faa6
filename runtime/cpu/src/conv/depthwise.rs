//! One channel to one channel: a row of the output at a time, straight from rows of the input.

use crate::number::Number;
use crate::simd::vectorised;
use crate::window::Sliding;

/// Input rows with their padding, each taken apart by position modulo the stride: what neighbouring outputs read
/// through one tap then lies next to each other.
pub(super) struct Rows<T> {
    elements: Vec<T>,
    /// Elements of one phase of one row.
    phase: usize,
}

impl<T: Number> Rows<T> {
    pub(super) fn new() -> Self {
        Self { elements: Vec::new(), phase: 0 }
    }

    fn fill(&mut self, sliding: &Sliding, x: &[T]) {
        let last = sliding.last();
        let reach = (last.taps - 1) * last.dilation / last.stride + 1;
        self.phase = last.output + reach;
        let row = last.stride * self.phase;
        self.elements.clear();
        self.elements.resize(x.len() / last.input * row, T::ZERO);
        for (row, x) in self.elements.chunks_exact_mut(row).zip(x.chunks_exact(last.input)) {
            for (phase, row) in row.chunks_exact_mut(self.phase).enumerate() {
                // The first element of this phase that is no padding: positions count from the padding's start.
                let skip = (last.low.cast_unsigned() as usize).saturating_sub(phase).div_ceil(last.stride);
                let first = (phase + skip * last.stride) - last.low.cast_unsigned() as usize;
                let from = x.get(first..).unwrap_or_default().iter().step_by(last.stride);
                row.iter_mut().skip(skip).zip(from).for_each(|(to, &from)| *to = from);
            }
        }
    }
}

vectorised! {
    /// `y = x * w` for one plane each, in the window's order of taps. The window must be [`Sliding::is_compact`].
    pub(super) fn depthwise<T: Number>(sliding: &Sliding, rows: &mut Rows<T>, x: &[T], w: &[T], y: &mut [T]) {
        rows.fill(sliding, x);
        let last = sliding.last();
        let row_size = last.stride * rows.phase;
        let tap_offset = |tap: usize| {
            let position = tap * last.dilation;
            position % last.stride * rows.phase + position / last.stride
        };
        let offsets: Vec<usize> = (0..last.taps).map(tap_offset).collect();
        for (row, y) in y.chunks_exact_mut(last.output).enumerate() {
            y.fill(T::ZERO);
            for (outer, w) in w.chunks_exact(last.taps).enumerate() {
                let Some(input) = sliding.source_row(row, outer) else { continue };
                let x = &rows.elements[input / last.input * row_size..];
                let row_of = |offset: usize| &x[offset..][..last.output];
                let (mut offsets, mut w) = (offsets.as_slice(), w);
                // Three taps at once touch the output a third as often.
                while let ([o0, o1, o2, more_offsets @ ..], [w0, w1, w2, more_w @ ..]) = (offsets, w) {
                    let taps = row_of(*o0).iter().zip(row_of(*o1)).zip(row_of(*o2));
                    for (y, ((x0, x1), x2)) in y.iter_mut().zip(taps) {
                        *y = y.add(x0.mul(*w0)).add(x1.mul(*w1)).add(x2.mul(*w2));
                    }
                    (offsets, w) = (more_offsets, more_w);
                }
                for (&offset, &weight) in offsets.iter().zip(w) {
                    for (y, x) in y.iter_mut().zip(row_of(offset)) {
                        *y = y.add(x.mul(weight));
                    }
                }
            }
        }
    }
}
