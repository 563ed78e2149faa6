//! Products of floating-point matrices: blocks that fit in caches, packed, and tiles of the result in parallel.
#![expect(unsafe_code, reason = "threads write to disjoint rectangles of one result, which slices cannot express")]

use rayon::prelude::*;

use super::microkernel::{Offsets, Tile, Tiled};
use super::{Left, Matrix, RightPanels};
use crate::panels::{COLUMNS as PANEL, ROWS};

/// Depth of a block: a tile's panel of `b` stays in the first cache level.
pub(super) const DEPTH: usize = 256;
/// Columns of a block of `b`: `DEPTH` × `COLUMNS` elements stay in the second cache level.
const COLUMNS: usize = 1024;
/// Rows of `a` that are packed at once: whole tiles, and with [`DEPTH`] a part of the second cache level.
pub(super) const BLOCK_ROWS: usize = 240;
/// Fewer multiply-adds than this are not worth another thread.
pub(super) const WORTH_A_THREAD: usize = 1 << 16;

/// The right side of a product: packs itself by panels.
pub(crate) trait Right<T>: Send + Sync {
    /// Writes rows `depth` and columns `columns` as panels `[columns / width, depth, width]`; positions beyond the
    /// last column may have any value.
    fn pack(&self, depth: std::ops::Range<usize>, columns: std::ops::Range<usize>, width: usize, panels: &mut [T]);

    /// Elements from the given column of the first row on, and the distance of rows, where a product with so many rows
    /// reads them where they are rather than pack them.
    fn in_place(&self, column: usize, rows: usize) -> Option<(&[T], usize)>;

    /// Whether whole tiles may be read at the last columns, too.
    fn is_padded(&self) -> bool {
        false
    }
}

impl<T: Copy + Send + Sync> Right<T> for Matrix<'_, T> {
    fn pack(&self, depth: std::ops::Range<usize>, columns: std::ops::Range<usize>, width: usize, panels: &mut [T]) {
        pack_rows(&self.transposed(), &columns, &depth, width, panels);
    }

    fn in_place(&self, column: usize, rows: usize) -> Option<(&[T], usize)> {
        (self.columns == 1 && rows <= FEW_ROWS).then(|| (self.data.get(column..).unwrap_or_default(), self.rows))
    }
}

/// A product with more rows than this reads its right side often enough to pack it.
pub(crate) const FEW_ROWS: usize = 24;

impl<T: Copy + Send + Sync> Right<T> for RightPanels<'_, T> {
    fn pack(&self, depth: std::ops::Range<usize>, columns: std::ops::Range<usize>, width: usize, panels: &mut [T]) {
        for (panel, first) in panels.chunks_exact_mut(depth.len() * width).zip(columns.step_by(width)) {
            for (row, depth) in panel.chunks_exact_mut(width).zip(depth.clone()) {
                for (column, to) in (first..).zip(row) {
                    let from = (column / PANEL * self.depth + depth) * PANEL + column % PANEL;
                    // Beyond the last panel there is nothing to copy.
                    if let Some(&from) = self.data.get(from) {
                        *to = from;
                    }
                }
            }
        }
    }

    fn in_place(&self, column: usize, _: usize) -> Option<(&[T], usize)> {
        let start = column / PANEL * self.depth * PANEL + column % PANEL;
        Some((self.data.get(start..).unwrap_or_default(), PANEL))
    }

    fn is_padded(&self) -> bool {
        true
    }
}

/// One of several products of the same size.
pub(crate) struct Job<'a, T, R> {
    pub(crate) a: Left<'a, T>,
    pub(crate) b: R,
    /// Rows `[m, n]`, one after the other.
    pub(crate) c: &'a mut [T],
}

/// A result that several threads write to, each its own rectangle.
pub(super) struct Shared<T>(pub(super) *mut T);

// SAFETY: threads write to disjoint elements only, see `multiply_all`.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

/// For each job `c = a · b`, `size` being `[m, n, k]`, none of them 0; rows of `c` are `n` long.
///
/// How the work is divided among the current pool's threads has no influence on the results: each element is summed in
/// order of depth.
pub(crate) fn multiply_all<T: Tiled, R: Right<T>>(size: [usize; 3], jobs: &mut [Job<'_, T, R>]) {
    let [m, n, k] = size;
    let threads = rayon::current_num_threads();
    let work = m.saturating_mul(n).saturating_mul(k);
    let wanted = threads.min(work.saturating_mul(jobs.len()) / WORTH_A_THREAD).max(1);
    let (across, down) = grid(m, n, wanted.div_ceil(jobs.len()), T::rows(), T::columns());
    for job in &*jobs {
        assert!(job.c.len() >= m * n, "a result of {m} × {n} elements has {}", job.c.len());
    }
    let (wide, tall) =
        (n.div_ceil(across).next_multiple_of(T::columns()), m.div_ceil(down).next_multiple_of(T::rows()));
    let pieces: Vec<(usize, usize, usize)> = (0..jobs.len())
        .flat_map(|job| (0..m).step_by(tall).map(move |row| (job, row)))
        .flat_map(|(job, row)| (0..n).step_by(wide).map(move |column| (job, row, column)))
        .collect();
    let results: Vec<Shared<T>> = jobs.iter_mut().map(|job| Shared(job.c.as_mut_ptr())).collect();
    let jobs = &*jobs;
    let run = |&(job, row, column): &(usize, usize, usize)| {
        let (rows, columns) = (row..m.min(row + tall), column..n.min(column + wide));
        // SAFETY: pieces are disjoint rectangles of results that are borrowed mutably until all threads are done, and
        // each has its length checked above.
        unsafe { piece(&jobs[job].a, &jobs[job].b, results[job].0, n, rows, columns, k) };
    };
    if wanted == 1 {
        pieces.iter().for_each(run);
    } else {
        pieces.par_iter().for_each(run);
    }
}

/// Pieces side by side and above each other, at least `wanted` where sizes permit: columns first, since what a piece
/// repeats then is the packing of the rows, the smaller side where it matters.
pub(super) fn grid(m: usize, n: usize, wanted: usize, tile_rows: usize, tile_columns: usize) -> (usize, usize) {
    let (most_across, most_down) = (n.div_ceil(tile_columns), m.div_ceil(tile_rows));
    let best = (1..=wanted.min(most_across))
        .map(|across| (across, wanted.div_ceil(across).min(most_down)))
        // The slowest thread's share of the result first, then the elements that are packed more than once.
        .min_by_key(|&(across, down)| {
            let share =
                n.div_ceil(across).next_multiple_of(tile_columns) * m.div_ceil(down).next_multiple_of(tile_rows);
            (share, across * m + down * n)
        });
    best.unwrap_or((1, 1))
}

/// Computes a rectangle of a result whose rows are `n` apart.
///
/// # Safety
/// `c` must be valid for reads and writes of all elements of the rectangle, which nobody else accesses meanwhile.
unsafe fn piece<T: Tiled, R: Right<T>>(
    a: &Left<'_, T>,
    b: &R,
    c: *mut T,
    n: usize,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    k: usize,
) {
    let (tile_rows, tile_columns) = (T::rows(), T::columns());
    let direct = b.in_place(0, rows.len()).map(|(_, step)| step);
    let whole_tiles = |width: usize| width == tile_columns || b.is_padded();
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut edge = vec![T::ZERO; tile_rows * tile_columns];
    // Starts of consecutive rows: in a packed panel, and where they are read in place.
    let starts = |step: usize| (0..k.min(DEPTH)).map(|depth| depth * step).collect::<Vec<_>>();
    let (packed, in_place) = (starts(tile_columns), starts(direct.unwrap_or(0)));
    for first in columns.clone().step_by(COLUMNS) {
        let block = first..columns.end.min(first + COLUMNS);
        for from in (0..k).step_by(DEPTH) {
            let depth = from..k.min(from + DEPTH);
            let add = from > 0;
            if direct.is_none() {
                right.resize(depth.len() * block.len().next_multiple_of(tile_columns), T::ZERO);
                b.pack(depth.clone(), block.clone(), tile_columns, &mut right);
            }
            let (packed, in_place) = (Offsets::new(&packed[..depth.len()]), Offsets::new(&in_place[..depth.len()]));
            for first in rows.clone().step_by(BLOCK_ROWS) {
                let rows_of_block = first..rows.end.min(first + BLOCK_ROWS);
                let left = left_block(a, &rows_of_block, &depth, tile_rows, columns.len(), &mut left);
                // The right side of a tile stays in the first cache level for all rows.
                for column in block.clone().step_by(tile_columns) {
                    let width = tile_columns.min(block.end - column);
                    let (b, b_rows) = match b.in_place(column, rows.len()) {
                        Some((data, step)) if whole_tiles(width) => (&data[depth.start * step..], in_place),
                        // The last columns of rows that are read where they are.
                        Some(_) => {
                            right.resize(depth.len() * tile_columns, T::ZERO);
                            b.pack(depth.clone(), column..block.end, tile_columns, &mut right);
                            (&right[..], packed)
                        }
                        None => (&right[(column - block.start) * depth.len()..], packed),
                    };
                    for row in rows_of_block.clone().step_by(tile_rows) {
                        let count = tile_rows.min(rows_of_block.end - row);
                        let (a, a_rows, a_columns) = left.tile(row);
                        let tile = Tile { a, a_rows, a_columns, b, b_rows, rows: count };
                        // SAFETY: the tile lies within the rectangle, as do these columns of each row of it.
                        let c = unsafe { c.add(row * n + column) };
                        if width == tile_columns {
                            // SAFETY: as above.
                            unsafe { T::tile(tile, c, n, add) };
                            continue;
                        }
                        // SAFETY: `edge` has the size of a whole tile.
                        unsafe { T::tile(tile, edge.as_mut_ptr(), tile_columns, false) };
                        for (row, sums) in edge.chunks_exact(tile_columns).take(count).enumerate() {
                            // SAFETY: as above.
                            T::merge(unsafe { std::slice::from_raw_parts_mut(c.add(row * n), width) }, sums, add);
                        }
                    }
                }
            }
        }
    }
}

/// Rows of the left side for some steps of depth, where tiles find them.
pub(super) enum LeftBlock<'a, T> {
    /// In panels of one tile each, from the given row on.
    Packed { panels: &'a [T], first: usize, depth: usize, width: usize },
    /// Where they are: the matrix from the block's first step of depth on.
    InPlace(Matrix<'a, T>),
    /// In the panels of a packed weight, from the block's first step of depth on.
    Panels { data: &'a [T], depth: usize },
}

impl<'a, T> LeftBlock<'a, T> {
    /// Elements from the tile's first one on, the distance of its rows, and that of its columns.
    pub(super) fn tile(&self, row: usize) -> (&'a [T], usize, usize) {
        match *self {
            Self::Packed { panels, first, depth, width } => (&panels[(row - first) * depth..], 1, width),
            Self::InPlace(Matrix { data, rows, columns }) => (&data[row * rows..], rows, columns),
            // Tiles do not reach across panels: a panel is as high as whole tiles.
            Self::Panels { data, depth } => (&data[row / ROWS * depth * ROWS + row % ROWS..], 1, ROWS),
        }
    }
}

/// Brings rows where tiles find them; what is read for few columns stays where it is.
pub(super) fn left_block<'a, T: Tiled>(
    a: &Left<'a, T>,
    rows: &std::ops::Range<usize>,
    depth: &std::ops::Range<usize>,
    width: usize,
    columns: usize,
    panels: &'a mut Vec<T>,
) -> LeftBlock<'a, T> {
    match *a {
        Left::Panels { data, depth: depths } => LeftBlock::Panels { data: &data[depth.start * ROWS..], depth: depths },
        Left::Matrix(Matrix { data, rows, columns: 1 }) if columns <= 4 * T::columns() => {
            LeftBlock::InPlace(Matrix { data: &data[depth.start..], rows, columns: 1 })
        }
        Left::Matrix(matrix) => {
            panels.resize(depth.len() * rows.len().next_multiple_of(width), T::ZERO);
            pack_rows(&matrix, rows, depth, width, panels);
            LeftBlock::Packed { panels, first: rows.start, depth: depth.len(), width }
        }
    }
}

/// Rows as panels `[rows / width, depth, width]`; positions beyond the last row have any value.
fn pack_rows<T: Copy>(
    a: &Matrix<'_, T>,
    rows: &std::ops::Range<usize>,
    depth: &std::ops::Range<usize>,
    width: usize,
    panels: &mut [T],
) {
    for (panel, first) in panels.chunks_exact_mut(depth.len() * width).zip(rows.clone().step_by(width)) {
        let count = width.min(rows.end - first);
        if a.rows == 1 {
            for (to, depth) in panel.chunks_exact_mut(width).zip(depth.clone()) {
                to[..count].copy_from_slice(&a.data[depth * a.columns + first..][..count]);
            }
            continue;
        }
        for row in 0..count {
            let from = &a.data[(first + row) * a.rows + depth.start * a.columns..];
            for (position, to) in panel.iter_mut().skip(row).step_by(width).enumerate() {
                *to = from[position * a.columns];
            }
        }
    }
}
