//! The innermost loop of matrix products: one tile of the result in registers.
#![expect(unsafe_code, reason = "vector loads through pointers, with bounds checked once per tile")]

use crate::number::Number;
use crate::simd::{Isa, isa};

/// The operands of a tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, T> {
    /// Element `(row, depth)` is at `row * a_rows + depth * a_columns`.
    pub(super) a: &'a [T],
    pub(super) a_rows: usize,
    pub(super) a_columns: usize,
    pub(super) b: &'a [T],
    pub(super) b_rows: Offsets<'a>,
    /// At most [`Tiled::rows`].
    pub(super) rows: usize,
}

/// Where rows of [`Tiled::columns`] elements start, one for each step of depth.
#[derive(Clone, Copy)]
pub(super) struct Offsets<'a> {
    starts: &'a [usize],
    last: usize,
}

impl<'a> Offsets<'a> {
    pub(super) fn new(starts: &'a [usize]) -> Self {
        Self { starts, last: starts.iter().copied().max().unwrap_or(0) }
    }
}

/// A floating-point type with a tile product.
pub(crate) trait Tiled: Number {
    /// Rows of a tile.
    fn rows() -> usize;
    /// Columns of a tile.
    fn columns() -> usize;
    /// `c = a · b`, or `c += a · b`, with rows of `c` at `c_rows` from each other. Products are added in order of depth.
    ///
    /// # Safety
    /// `c` must be valid for reads and writes of `tile.rows` rows of [`Self::columns`] elements.
    unsafe fn tile(tile: Tile<'_, Self>, c: *mut Self, c_rows: usize, add: bool);
    /// `c = sums`, or `c += sums`, for the columns that `c` has.
    fn merge(c: &mut [Self], sums: &[Self], add: bool);
}

/// Panics unless all that the tile reads is there.
fn check<T>(tile: &Tile<'_, T>, columns: usize) {
    let last = |count: usize, step: usize| (count - 1).checked_mul(step);
    let within = |parts: [Option<usize>; 2], count: usize, len: usize| {
        let [Some(first), Some(second)] = parts else { return false };
        first.checked_add(second).and_then(|last| last.checked_add(count)).is_some_and(|end| end <= len)
    };
    let depth = tile.b_rows.starts.len();
    assert!(tile.rows > 0 && depth > 0, "a tile is empty");
    assert!(
        within([last(tile.rows, tile.a_rows), last(depth, tile.a_columns)], 1, tile.a.len())
            && within([Some(tile.b_rows.last), Some(0)], columns, tile.b.len()),
        "a tile of a product reaches beyond its operands"
    );
}

/// A tile of `$rows` rows and two vectors of columns in the machine's vector instructions.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_tile {
    ($name:ident, $features:literal, $float:ty, $lanes:literal, $most:literal, [$($rows:literal),*],
     $zero:ident, $load:ident, $store:ident, $set:ident, $fma:ident, $add:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(tile: Tile<'_, $float>, c: *mut $float, c_rows: usize, add: bool) {
            use std::arch::x86_64::*;

            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn rows<const ROWS: usize, const PACKED: bool>(tile: Tile<'_, $float>, c: *mut $float, c_rows: usize, add: bool) {
                let mut a = tile.a.as_ptr();
                let mut sums = [[$zero(); 2]; ROWS];
                // SAFETY: `check` has found every element that is read here within the slices; the caller vouches for `c`.
                unsafe {
                    for &start in tile.b_rows.starts {
                        let b = tile.b.as_ptr().add(start);
                        let (b0, b1) = ($load(b), $load(b.add($lanes)));
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let left = $set(*a.add(if PACKED { row } else { row * tile.a_rows }));
                            sums[0] = $fma(left, b0, sums[0]);
                            sums[1] = $fma(left, b1, sums[1]);
                        }
                        // Wrapping: after the last round it may point beyond the slice.
                        a = a.wrapping_add(tile.a_columns);
                    }
                    for (row, sums) in sums.iter().enumerate() {
                        let c = c.add(row * c_rows);
                        for (half, &sum) in sums.iter().enumerate() {
                            let c = c.add(half * $lanes);
                            $store(c, if add { $add($load(c), sum) } else { sum });
                        }
                    }
                }
            }

            check(&tile, 2 * $lanes);
            match tile.rows {
                // SAFETY: operands were just checked; the caller vouches for `c`.
                $($rows if tile.a_rows == 1 => unsafe { rows::<$rows, true>(tile, c, c_rows, add) },)*
                // SAFETY: as above.
                $($rows => unsafe { rows::<$rows, false>(tile, c, c_rows, add) },)*
                other => unreachable!("a tile has {other} rows, at most {}", $most),
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector_tile!(
    f32_avx512,
    "avx512f,avx2,fma",
    f32,
    16,
    12,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps
);
#[cfg(target_arch = "x86_64")]
vector_tile!(
    f32_avx2,
    "avx2,fma",
    f32,
    8,
    6,
    [1, 2, 3, 4, 5, 6],
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps
);

/// A tile of four rows and eight columns, for machines and types without one of their own.
///
/// # Safety
/// As [`Tiled::tile`].
unsafe fn plain<T: Number>(tile: Tile<'_, T>, c: *mut T, c_rows: usize, add: bool) {
    check(&tile, PLAIN_COLUMNS);
    for row in 0..tile.rows {
        // SAFETY: the caller vouches for this row.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(row * c_rows), PLAIN_COLUMNS) };
        let mut sums = [T::ZERO; PLAIN_COLUMNS];
        for (depth, &start) in tile.b_rows.starts.iter().enumerate() {
            let a = tile.a[row * tile.a_rows + depth * tile.a_columns];
            for (sum, &b) in sums.iter_mut().zip(&tile.b[start..][..PLAIN_COLUMNS]) {
                *sum = sum.add(a.mul(b));
            }
        }
        plain_merge(c, &sums, add);
    }
}

#[inline(always)]
fn plain_merge<T: Number>(c: &mut [T], sums: &[T], add: bool) {
    for (c, &sum) in c.iter_mut().zip(sums) {
        *c = if add { c.add(sum) } else { sum };
    }
}

const PLAIN_ROWS: usize = 4;
const PLAIN_COLUMNS: usize = 8;

impl Tiled for f32 {
    fn rows() -> usize {
        match isa() {
            Isa::Avx512 => 12,
            Isa::Avx2 => 6,
            Isa::Baseline => PLAIN_ROWS,
        }
    }

    fn columns() -> usize {
        match isa() {
            Isa::Avx512 => 32,
            Isa::Avx2 => 16,
            Isa::Baseline => PLAIN_COLUMNS,
        }
    }

    unsafe fn tile(tile: Tile<'_, Self>, c: *mut Self, c_rows: usize, add: bool) {
        #[cfg(target_arch = "x86_64")]
        match isa() {
            // SAFETY: the machine was found to have these instructions; the caller vouches for `c`.
            Isa::Avx512 => return unsafe { f32_avx512(tile, c, c_rows, add) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { f32_avx2(tile, c, c_rows, add) },
            Isa::Baseline => {}
        }
        // SAFETY: the caller vouches for `c`.
        unsafe { plain(tile, c, c_rows, add) };
    }

    fn merge(c: &mut [Self], sums: &[Self], add: bool) {
        plain_merge(c, sums, add);
    }
}

impl Tiled for f64 {
    fn rows() -> usize {
        PLAIN_ROWS
    }

    fn columns() -> usize {
        PLAIN_COLUMNS
    }

    unsafe fn tile(tile: Tile<'_, Self>, c: *mut Self, c_rows: usize, add: bool) {
        // SAFETY: the caller vouches for `c`.
        unsafe { plain(tile, c, c_rows, add) };
    }

    fn merge(c: &mut [Self], sums: &[Self], add: bool) {
        plain_merge(c, sums, add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Kernel = unsafe fn(Tile<'_, f32>, *mut f32, usize, bool);

    /// Kernels that this machine can run, with their most rows and their columns.
    fn kernels() -> Vec<(&'static str, Kernel, usize, usize)> {
        let mut kernels: Vec<(&'static str, Kernel, usize, usize)> =
            vec![("plain", plain::<f32>, PLAIN_ROWS, PLAIN_COLUMNS)];
        #[cfg(target_arch = "x86_64")]
        {
            if isa() >= Isa::Avx2 {
                // SAFETY: the machine has these instructions; the caller vouches for `c`.
                let kernel: Kernel = |tile, c, rows, add| unsafe { f32_avx2(tile, c, rows, add) };
                kernels.push(("avx2", kernel, 6, 16));
            }
            if isa() >= Isa::Avx512 {
                // SAFETY: as above.
                let kernel: Kernel = |tile, c, rows, add| unsafe { f32_avx512(tile, c, rows, add) };
                kernels.push(("avx512", kernel, 12, 32));
            }
        }
        kernels
    }

    #[test]
    fn every_instruction_set_computes_every_tile() {
        // Rows of `b` and the left side's panels are as wide as those of packed weights, wider than some tiles.
        let (depth, wide, tall) = (7, 40, 12);
        let number = |i: usize, step: usize| (i * step % 11) as f32 - 5.0;
        let a: Vec<f32> = (0..depth * tall).map(|i| number(i, 3)).collect();
        let b: Vec<f32> = (0..depth * wide).map(|i| number(i, 7)).collect();
        let starts: Vec<usize> = (0..depth).rev().map(|d| d * wide + d % 3).collect();
        for (name, kernel, most, columns) in kernels() {
            for rows in 1..=most {
                // Rows next to each other, as in panels, and apart.
                for (a_rows, a_columns) in [(1, tall), (depth, 1)] {
                    for add in [false, true] {
                        let b_rows = Offsets::new(&starts);
                        let tile = Tile { a: &a, a_rows, a_columns, b: &b, b_rows, rows };
                        let mut c = vec![100.0; most * (columns + 1)];
                        // SAFETY: `c` has as many rows as the largest tile.
                        unsafe { kernel(tile, c.as_mut_ptr(), columns + 1, add) };
                        for (row, c) in c.chunks_exact(columns + 1).enumerate() {
                            for (column, &c) in c.iter().enumerate() {
                                let product = |d: usize| a[row * a_rows + d * a_columns] * b[starts[d] + column];
                                let sum = || (0..depth).map(product).sum::<f32>() + if add { 100.0 } else { 0.0 };
                                let expected = if row < rows && column < columns { sum() } else { 100.0 };
                                assert_eq!(c, expected, "{name}: {rows} rows, row {row}, column {column}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "beyond its operands")]
    fn a_tile_beyond_its_operands_is_refused() {
        let (a, b, starts) = ([1.0f32; 3], [1.0f32; 64], [0, 48]);
        let tile = Tile { a: &a, a_rows: 1, a_columns: 1, b: &b, b_rows: Offsets::new(&starts), rows: 3 };
        // SAFETY: `c` has the size of the largest tile.
        unsafe { <f32 as Tiled>::tile(tile, [0.0f32; 12 * 32].as_mut_ptr(), 32, false) };
    }
}
