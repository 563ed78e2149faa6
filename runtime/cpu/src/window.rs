//! Windows that slide over the spatial dimensions of convolutions and pools.

use std::ops::Range;

use planfile::op::Window;

/// A window, the sizes it slides over and the positions it takes, per spatial dimension. At least one dimension: a
/// tensor without any has one of size 1.
#[derive(Clone, Debug)]
pub(crate) struct Sliding {
    axes: Vec<SlidingAxis>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct SlidingAxis {
    /// Elements that the window slides over.
    pub(crate) input: usize,
    /// Positions of the window.
    pub(crate) output: usize,
    pub(crate) taps: usize,
    pub(crate) stride: usize,
    pub(crate) dilation: usize,
    /// Padding before.
    pub(crate) low: i64,
    /// Padding after.
    pub(crate) high: i64,
}

impl SlidingAxis {
    /// Input position, possibly outside, of a tap at an output position.
    fn source(&self, output: usize, tap: usize) -> i64 {
        output as i64 * self.stride as i64 + tap as i64 * self.dilation as i64 - self.low
    }

    /// Output positions at which a tap lies inside of the input: first and one past the last.
    fn inside(&self, tap: usize) -> (usize, usize) {
        let first = self.source(0, tap);
        let stride = self.stride as i64;
        let below = |bound: i64| -> usize {
            // Number of positions whose source is below the bound.
            let count = if bound <= first { 0 } else { (bound - first - 1) / stride + 1 };
            usize::try_from(count).unwrap_or(0).min(self.output)
        };
        (below(0), below(self.input as i64))
    }

    /// Taps at an output position that lie inside of the input, padded or not.
    fn counted(&self, output: usize, pads: bool) -> usize {
        let (from, to) = if pads { (-self.low, self.input as i64 + self.high) } else { (0, self.input as i64) };
        (0..self.taps).filter(|&tap| (from..to).contains(&self.source(output, tap))).count()
    }
}

/// A run of output positions along the last dimension that one tap contributes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Flat index of the tap.
    pub(crate) tap: usize,
    /// Flat index of the first output position.
    pub(crate) output: usize,
    /// Flat index of the input element that the first one reads.
    pub(crate) input: usize,
    /// Number of positions.
    pub(crate) length: usize,
}

/// A run of positions along a row of the output whose source lies inside of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// First position, counted from the start of what was asked for.
    pub(crate) first: usize,
    /// One past the last position.
    pub(crate) end: usize,
    /// Flat index of the input element that the first one reads.
    pub(crate) input: usize,
}

/// Sizes are below 2^31 where the type check bounds them, or those of tensors in memory.
impl Sliding {
    /// `input` and `output`: sizes of the spatial dimensions.
    pub(crate) fn new(window: &Window, input: &[usize], output: &[usize]) -> Self {
        let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let mut axes: Vec<SlidingAxis> = (0..input.len())
            .map(|axis| SlidingAxis {
                input: input[axis],
                output: output[axis],
                taps: size(window.sizes[axis]),
                stride: size(window.strides[axis]),
                dilation: size(window.dilations[axis]),
                low: window.pads[axis].0,
                high: window.pads[axis].1,
            })
            .collect();
        if axes.is_empty() {
            axes.push(SlidingAxis { input: 1, output: 1, taps: 1, stride: 1, dilation: 1, low: 0, high: 0 });
        }
        Self { axes }
    }

    /// Elements of one input plane.
    pub(crate) fn input(&self) -> usize {
        self.axes.iter().map(|axis| axis.input).product()
    }

    /// Elements of one output plane.
    pub(crate) fn output(&self) -> usize {
        self.axes.iter().map(|axis| axis.output).product()
    }

    /// Elements of the window.
    pub(crate) fn taps(&self) -> usize {
        self.axes.iter().fold(1, |taps, axis| axis.taps.saturating_mul(taps))
    }

    /// Distance of input elements that neighbouring output positions of a [`Run`] read.
    pub(crate) fn step(&self) -> usize {
        self.axes.last().map_or(1, |axis| axis.stride)
    }

    /// Whether the output reads the input as it is: one tap, no strides, no padding.
    pub(crate) fn is_identity(&self) -> bool {
        self.axes.iter().all(|axis| {
            axis.taps == 1 && axis.stride == 1 && axis.low == 0 && axis.high == 0 && axis.input == axis.output
        })
    }

    /// Every pair of a tap and an output position that meets the input, in runs: tap by tap in row-major order, and
    /// for each tap the rows of the output.
    pub(crate) fn for_each_run(&self, mut visit: impl FnMut(Run)) {
        if self.output() == 0 || self.input() == 0 {
            return;
        }
        let Some((last, outer)) = self.axes.split_last() else { return };
        let mut taps = vec![0; self.axes.len()];
        let mut row = vec![0; outer.len()];
        for tap in 0..self.taps() {
            let mut rest = tap;
            for (index, axis) in taps.iter_mut().zip(&self.axes).rev() {
                *index = rest % axis.taps;
                rest /= axis.taps;
            }
            let (first, end) = last.inside(taps[outer.len()]);
            if first >= end {
                continue;
            }
            let inner_source = last.source(first, taps[outer.len()]);
            let ranges: Vec<(usize, usize)> = outer.iter().zip(&taps).map(|(axis, &tap)| axis.inside(tap)).collect();
            if ranges.iter().any(|range| range.0 >= range.1) {
                continue;
            }
            for (index, range) in row.iter_mut().zip(&ranges) {
                *index = range.0;
            }
            'rows: loop {
                let (mut input, mut output) = (0, 0);
                for ((axis, &index), &tap) in outer.iter().zip(&row).zip(&taps) {
                    // Inside of the input, so not negative.
                    input = input * axis.input + axis.source(index, tap).cast_unsigned() as usize;
                    output = output * axis.output + index;
                }
                visit(Run {
                    tap,
                    output: output * last.output + first,
                    input: input * last.input + inner_source.cast_unsigned() as usize,
                    length: end - first,
                });
                for (index, range) in row.iter_mut().zip(&ranges).rev() {
                    *index += 1;
                    if *index < range.1 {
                        continue 'rows;
                    }
                    *index = range.0;
                }
                break;
            }
        }
    }

    /// The innermost dimension.
    pub(crate) fn last(&self) -> SlidingAxis {
        let none = SlidingAxis { input: 1, output: 1, taps: 1, stride: 1, dilation: 1, low: 0, high: 0 };
        self.axes.last().copied().unwrap_or(none)
    }

    /// All dimensions, at least one.
    pub(crate) fn axes(&self) -> &[SlidingAxis] {
        &self.axes
    }

    /// Whether one input plane with its padding takes little more memory than without: no padding below zero, not much
    /// of it, and neither the window with its gaps nor a step of it is longer than what it slides over.
    pub(crate) fn is_compact(&self) -> bool {
        let fits = |axis: &SlidingAxis| {
            let padded = axis.input as i64 + axis.low + axis.high;
            let window = (axis.taps as i64 - 1).saturating_mul(axis.dilation as i64).saturating_add(1);
            axis.low >= 0 && axis.high >= 0 && window <= padded && axis.stride as i64 <= padded
        };
        let padded = self.axes.iter().map(|axis| axis.input as f64 + axis.low as f64 + axis.high as f64);
        self.axes.iter().all(fits) && padded.product::<f64>() <= 4.0 * self.input() as f64 + 1024.0
    }

    /// Flat index of the first input element of the row that a row of the output reads through a tap, if there is one.
    #[inline(always)]
    pub(crate) fn source_row(&self, row: usize, tap: usize) -> Option<usize> {
        let (mut row, mut tap, mut size, mut input) = (row, tap, self.axes.last()?.input, 0);
        for axis in self.axes.iter().rev().skip(1) {
            let source = axis.source(row % axis.output, tap % axis.taps);
            let source = usize::try_from(source).ok().filter(|&source| source < axis.input)?;
            input += source * size;
            size *= axis.input;
            row /= axis.output;
            tap /= axis.taps;
        }
        Some(input)
    }

    /// The parts of a range of flat output positions that meet the input through one tap.
    #[inline(always)]
    pub(crate) fn for_each_run_within(&self, tap: usize, positions: Range<usize>, mut visit: impl FnMut(Stretch)) {
        let Some(last) = self.axes.last().filter(|last| last.output > 0) else { return };
        let (outer, inner) = (tap / last.taps, tap % last.taps);
        let (first, end) = last.inside(inner);
        let mut start = positions.start;
        while start < positions.end {
            let row = start / last.output;
            let row_start = row * last.output;
            let next = positions.end.min(row_start + last.output);
            let (from, to) = (start.max(row_start + first), next.min(row_start + end));
            if from < to
                && let Some(input) = self.source_row(row, outer)
            {
                // Inside of the input, so not negative.
                let input = input + last.source(from - row_start, inner).cast_unsigned() as usize;
                visit(Stretch { first: from - positions.start, end: to - positions.start, input });
            }
            start = next;
        }
    }

    /// Number of taps that meet the input at each output position; with `pads`, the padding counts as input.
    pub(crate) fn counts(&self, pads: bool) -> Vec<usize> {
        let mut counts = vec![1];
        for axis in &self.axes {
            let own: Vec<usize> = (0..axis.output).map(|position| axis.counted(position, pads)).collect();
            counts = counts.iter().flat_map(|&outer| own.iter().map(move |&inner| outer * inner)).collect();
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_what_lies_inside() {
        let window =
            Window { sizes: vec![2, 3], strides: vec![1, 2], dilations: vec![1, 1], pads: vec![(0, 1), (1, 1)] };
        let sliding = Sliding::new(&window, &[3, 4], &[3, 2]);
        let mut pairs = Vec::new();
        sliding.for_each_run(|run| {
            for i in 0..run.length {
                pairs.push((run.tap, run.output + i, run.input + i * sliding.step()));
            }
        });
        let mut expected = Vec::new();
        for tap in 0..6usize {
            for output in 0..6usize {
                let row = output / 2 + tap / 3;
                let column = (output % 2 * 2 + tap % 3) as i64 - 1;
                if row < 3 && (0..4).contains(&column) {
                    expected.push((tap, output, row * 4 + column as usize));
                }
            }
        }
        assert_eq!(pairs, expected);
        assert_eq!(sliding.counts(false), [4, 6, 4, 6, 2, 3]);
        assert_eq!(sliding.counts(true), [6; 6]);
    }

    /// Runs within ranges name the same pairs of taps and positions as whole runs do.
    #[test]
    fn runs_within_ranges_agree_with_whole_ones() {
        let window = Window {
            sizes: vec![2, 2, 3],
            strides: vec![1, 2, 2],
            dilations: vec![2, 1, 1],
            pads: vec![(1, 0), (0, 1), (2, 1)],
        };
        let sliding = Sliding::new(&window, &[4, 5, 6], &[3, 3, 4]);
        let (mut runs, mut parts) = (Vec::new(), Vec::new());
        sliding.for_each_run(|run| {
            runs.extend((0..run.length).map(|i| (run.tap, run.output + i, run.input + i * sliding.step())));
        });
        for tap in 0..sliding.taps() {
            for start in (0..sliding.output()).step_by(7) {
                sliding.for_each_run_within(tap, start..sliding.output().min(start + 7), |run| {
                    let positions = (run.first..run.end).enumerate();
                    parts.extend(positions.map(|(i, at)| (tap, start + at, run.input + i * sliding.step())));
                });
            }
        }
        runs.sort_unstable();
        assert!(runs.len() > 100);
        assert_eq!(parts, runs);
    }

    #[test]
    fn cropping_pads_and_large_dilations_reach_nothing_outside() {
        let window = Window { sizes: vec![2], strides: vec![1], dilations: vec![9], pads: vec![(-1, 6)] };
        let sliding = Sliding::new(&window, &[6], &[2]);
        let mut runs = Vec::new();
        sliding.for_each_run(|run| runs.push((run.tap, run.output, run.input, run.length)));
        assert_eq!(runs, [(0, 0, 1, 2)]);
    }
}
