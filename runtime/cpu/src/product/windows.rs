//! Products with the columns of windows that move by one, read from a padded input in place.
#![expect(unsafe_code, reason = "threads write to disjoint rectangles of one result, which slices cannot express")]

use std::ops::Range;

use rayon::prelude::*;

use super::Left;
use super::blocked::{BLOCK_ROWS, DEPTH, Shared, WORTH_A_THREAD, grid, left_block};
use super::microkernel::{Offsets, Tile, Tiled};

/// What windows read: the element for step `d` of depth at row `i` and column `j` of the output is at
/// `offsets[d] + i * pitch + j` of the padded input.
pub(crate) struct Windows {
    pub(crate) offsets: Vec<usize>,
    /// Rows of the output.
    pub(crate) rows: usize,
    /// Columns of the output.
    pub(crate) columns: usize,
    /// Distance of rows in the padded input.
    pub(crate) pitch: usize,
}

/// One of several convolutions of the same size.
pub(crate) struct WindowJob<'a, T> {
    /// `[m, depth]`.
    pub(crate) a: Left<'a, T>,
    /// The padded input, and at least as many elements behind it as a tile has columns.
    pub(crate) x: &'a [T],
    /// `[m, rows, columns]`.
    pub(crate) c: &'a mut [T],
}

/// Computes all jobs; neither `m` nor any size of the windows is 0. How the work is divided has no influence on results.
pub(super) fn multiply_windows<T: Tiled>(m: usize, windows: &Windows, jobs: &mut [WindowJob<'_, T>]) {
    let size = windows.rows * windows.columns;
    let threads = rayon::current_num_threads();
    let work = m.saturating_mul(windows.rows * windows.pitch).saturating_mul(windows.offsets.len());
    let wanted = threads.min(work.saturating_mul(jobs.len()) / WORTH_A_THREAD).max(1);
    // Bands of whole rows of the output: their columns count with what lies between them.
    let (across, down) = grid(m, windows.rows * windows.pitch, wanted.div_ceil(jobs.len()), T::rows(), windows.pitch);
    let (band, tall) = (windows.rows.div_ceil(across), m.div_ceil(down).next_multiple_of(T::rows()));
    for job in &*jobs {
        assert!(job.c.len() >= m * size, "a result of {m} × {size} elements has {}", job.c.len());
    }
    let pieces: Vec<(usize, usize, usize)> = (0..jobs.len())
        .flat_map(|job| (0..m).step_by(tall).map(move |first| (job, first)))
        .flat_map(|(job, first)| (0..windows.rows).step_by(band).map(move |row| (job, first, row)))
        .collect();
    let results: Vec<Shared<T>> = jobs.iter_mut().map(|job| Shared(job.c.as_mut_ptr())).collect();
    let jobs = &*jobs;
    let run = |&(job, first, row): &(usize, usize, usize)| {
        let (range, rows) = (first..m.min(first + tall), row..windows.rows.min(row + band));
        // SAFETY: pieces are disjoint parts of results that are borrowed mutably until all threads are done, and each
        // has its length checked above.
        unsafe { piece(&jobs[job].a, jobs[job].x, windows, results[job].0, range, rows) };
    };
    if wanted == 1 {
        pieces.iter().for_each(run);
    } else {
        pieces.par_iter().for_each(run);
    }
}

/// Computes rows `rows` of the output's channels `channels`.
///
/// # Safety
/// `c` must be valid for reads and writes of these elements, which nobody else accesses meanwhile.
unsafe fn piece<T: Tiled>(
    a: &Left<'_, T>,
    x: &[T],
    windows: &Windows,
    c: *mut T,
    channels: Range<usize>,
    rows: Range<usize>,
) {
    let (tile_rows, tile_columns) = (T::rows(), T::columns());
    let size = windows.rows * windows.columns;
    let mut left = Vec::new();
    let mut sums = vec![T::ZERO; tile_rows * tile_columns];
    // Positions count on through what lies between rows.
    let positions = rows.start * windows.pitch..(rows.end - 1) * windows.pitch + windows.columns;
    for from in (0..windows.offsets.len()).step_by(DEPTH) {
        let depth = from..windows.offsets.len().min(from + DEPTH);
        let b_rows = Offsets::new(&windows.offsets[depth.clone()]);
        for block in channels.clone().step_by(BLOCK_ROWS) {
            let block = block..channels.end.min(block + BLOCK_ROWS);
            let left = left_block(a, &block, &depth, tile_rows, positions.len(), &mut left);
            for position in positions.clone().step_by(tile_columns) {
                for channel in block.clone().step_by(tile_rows) {
                    let count = tile_rows.min(block.end - channel);
                    let (a, a_rows, a_columns) = left.tile(channel);
                    let tile = Tile { a, a_rows, a_columns, b: &x[position..], b_rows, rows: count };
                    // SAFETY: `sums` has the size of a whole tile.
                    unsafe { T::tile(tile, sums.as_mut_ptr(), tile_columns, false) };
                    for (row, first, end) in runs(windows, position..positions.end.min(position + tile_columns)) {
                        for (channel, sums) in (channel..).zip(sums.chunks_exact(tile_columns)).take(count) {
                            let start = row * windows.pitch;
                            let sums = &sums[start + first - position..start + end - position];
                            // SAFETY: these columns of a row of a channel are part of the piece.
                            let c = unsafe {
                                let c = c.add(channel * size + row * windows.columns + first);
                                std::slice::from_raw_parts_mut(c, end - first)
                            };
                            T::merge(c, sums, from > 0);
                        }
                    }
                }
            }
        }
    }
}

/// The columns of each row of the output among consecutive positions: row, first column, one past the last.
fn runs(windows: &Windows, positions: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let (pitch, columns) = (windows.pitch, windows.columns);
    let rows = positions.start / pitch..=(positions.end - 1) / pitch;
    rows.filter_map(move |row| {
        let start = row * pitch;
        let first = positions.start.saturating_sub(start);
        let end = columns.min(positions.end - start);
        (first < end).then_some((row, first, end))
    })
}
