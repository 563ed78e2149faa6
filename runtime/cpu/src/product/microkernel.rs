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
