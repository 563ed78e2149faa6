//! Matrix products: blocked and in parallel for floats, plain loops that wrap for integers.

mod blocked;
mod microkernel;
mod windows;

pub(crate) use blocked::{FEW_ROWS, Job, Right};
pub(crate) use windows::{WindowJob, Windows};

use rayon::prelude::*;

use crate::number::Number;
use crate::panels::ROWS;
use crate::simd::vectorised;

/// A matrix in a slice: element `(i, j)` is at `i * rows + j * columns`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a, T> {
    pub(crate) data: &'a [T],
    /// Distance between rows.
    pub(crate) rows: usize,
    /// Distance between columns.
    pub(crate) columns: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows of `width` elements, one after the other.
    pub(crate) fn packed(data: &'a [T], width: usize) -> Self {
        Self { data, rows: width, columns: 1 }
    }

    /// Rows and columns exchanged.
    pub(crate) fn transposed(self) -> Self {
        Self { data: self.data, rows: self.columns, columns: self.rows }
    }
}

/// The left side of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Left<'a, T> {
    Matrix(Matrix<'a, T>),
    /// Panels `[rows / ROWS, depth, ROWS]`, see [`crate::panels`].
    Panels {
        data: &'a [T],
        depth: usize,
    },
}

impl<T: Copy> Left<'_, T> {
    fn at(&self, row: usize, depth: usize) -> T {
        match self {
            Self::Matrix(matrix) => matrix.data[row * matrix.rows + depth * matrix.columns],
            Self::Panels { data, depth: depths } => data[(row / ROWS * depths + depth) * ROWS + row % ROWS],
        }
    }
}

/// The right side of a product as panels `[columns / COLUMNS, depth, COLUMNS]`, see [`crate::panels`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RightPanels<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) depth: usize,
}

/// Types that have a matrix product. It is accumulated in the type itself.
pub(crate) trait Product: Number {
    /// For each job `c = a · b`, with `a: [m, k]`, `b: [k, n]`, `c: [m, n]` and `size` `[m, n, k]`. An empty
    /// contraction gives zeros.
    fn multiply<R: Right<Self>>(size: [usize; 3], jobs: &mut [Job<'_, Self, R>]);
    /// The product over windows, for types that have one.
    fn windows() -> Option<WindowProduct<Self>>;
}

/// A product with what windows that move by one read.
pub(crate) struct WindowProduct<T> {
    /// Elements that must be readable behind the padded input.
    pub(crate) margin: usize,
    /// For each job `c[i, row, column] = sum over d of a[i, d] · x[offsets[d] + row * pitch + column]`, for as many rows
    /// `i` as the first argument says.
    pub(crate) multiply: fn(usize, &Windows, &mut [WindowJob<'_, T>]),
}

/// Handles sizes of 0, for which there is nothing to multiply; true if the products are done.
fn trivial<T: Number, R>([m, n, k]: [usize; 3], jobs: &mut [Job<'_, T, R>]) -> bool {
    if k == 0 {
        jobs.iter_mut().for_each(|job| job.c.fill(T::ZERO));
    }
    m == 0 || n == 0 || k == 0 || jobs.is_empty()
}

macro_rules! float_product {
    ($($float:ty),*) => {
        $(impl Product for $float {
            fn multiply<R: Right<Self>>(size: [usize; 3], jobs: &mut [Job<'_, Self, R>]) {
                if !trivial(size, jobs) {
                    blocked::multiply_all(size, jobs);
                }
            }

            fn windows() -> Option<WindowProduct<Self>> {
                let margin = <$float as microkernel::Tiled>::columns();
                Some(WindowProduct { margin, multiply: windows::multiply_windows })
            }
        })*
    };
}
float_product!(f32, f64);

macro_rules! integer_products {
    ($($int:ty),*) => {
        $(impl Product for $int {
            fn multiply<R: Right<Self>>(size: [usize; 3], jobs: &mut [Job<'_, Self, R>]) {
                if !trivial(size, jobs) {
                    jobs.par_iter_mut().for_each(|job| integer_product(size, job));
                }
            }

            fn windows() -> Option<WindowProduct<Self>> {
                None
            }
        })*
    };
}
integer_products!(u8, u16, u32, u64, i8, i16, i32, i64);

/// Elements of the right side that are gathered at once.
const INTEGER_BLOCK: usize = 1 << 16;

/// Block by block of rows of the right side: sums of integers wrap, so their order does not matter.
fn integer_product<T: Number, R: Right<T>>([m, n, k]: [usize; 3], job: &mut Job<'_, T, R>) {
    let Job { a, b, c } = job;
    c.fill(T::ZERO);
    let (width, depth) = (n.min(INTEGER_BLOCK), (INTEGER_BLOCK / n).clamp(1, k));
    let mut block = Vec::new();
    for column in (0..n).step_by(width) {
        let columns = column..n.min(column + width);
        for from in (0..k).step_by(depth) {
            let depth = from..k.min(from + depth);
            block.resize(depth.len() * columns.len(), T::ZERO);
            // Rows of one whole panel: elements next to each other make the innermost loop one over slices.
            b.pack(depth.clone(), columns.clone(), columns.len(), &mut block);
            let rows =
                c.par_chunks_exact_mut(n).take(m).enumerate().with_min_len(INTEGER_BLOCK / block.len().max(1) + 1);
            rows.for_each_init(Vec::new, |left, (row, c)| {
                left.clear();
                left.extend(depth.clone().map(|depth| a.at(row, depth)));
                integer_row(&mut c[columns.clone()], left, &block);
            });
        }
    }
}

vectorised! {
    /// `c += a · b` for one row.
    fn integer_row<T: Number>(c: &mut [T], a: &[T], b: &[T]) {
        for (&left, b) in a.iter().zip(b.chunks_exact(c.len())) {
            for (c, &right) in c.iter_mut().zip(b) {
                *c = c.add(left.mul(right));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn multiply<T: Product>(size: [usize; 3], a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
        let mut c = vec![T::ONE; size[0] * size[1]];
        T::multiply(size, &mut [Job { a: Left::Matrix(a), b, c: &mut c }]);
        c
    }

    fn check<T: Product + std::fmt::Debug>(of: impl Fn(i32) -> T) {
        // [2, 3] · [3, 2], with the right side stored by columns.
        let a = [1, 2, 3, 4, 5, 6].map(&of);
        let b = [7, 9, 11, 8, 10, 12].map(&of);
        let (a, b) = (Matrix::packed(&a, 3), Matrix::packed(&b, 3).transposed());
        assert_eq!(multiply([2, 2, 3], a, b), [58, 64, 139, 154].map(&of));
        assert_eq!(multiply([1, 2, 0], a, b), [0, 0].map(&of));
        assert!(multiply([0, 2, 3], a, b).is_empty());
    }

    #[test]
    fn multiplies_with_strides() {
        check(|i| i as f32);
        check(f64::from);
        check(|i| i);
        check(|i| i as i8);
        check(|i| i as u8);
        check(i64::from);
    }

    /// Small integers, whose sums `f32` holds exactly in any order.
    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| (i * step % 7) as f32 - 3.0).collect()
    }

    proptest! {
        /// Across the borders of tiles, panels and blocks, with either side stored by rows or by columns.
        #[test]
        fn matches_the_sum_it_stands_for(
            m in prop_oneof![1usize..40, 140usize..150], n in prop_oneof![1usize..80, 1020usize..1060],
            k in prop_oneof![1usize..20, 250usize..260], by_columns in any::<[bool; 2]>(), threads in 1usize..4,
        ) {
            let (a, b) = (numbers(m * k, 3), numbers(k * n, 5));
            let matrix = |data, rows: usize, columns: usize, by_columns| {
                if by_columns { Matrix::packed(data, rows).transposed() } else { Matrix::packed(data, columns) }
            };
            let (a, b) = (matrix(&a, m, k, by_columns[0]), matrix(&b, k, n, by_columns[1]));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let c = pool.install(|| multiply([m, n, k], a, b));
            // A sample of the elements: all would take longer than the product.
            for at in (0..m * n).step_by(1 + m * n / 500).chain([m * n - 1]) {
                let (row, column) = (at / n, at % n);
                let expected: f32 = (0..k)
                    .map(|d| a.data[row * a.rows + d * a.columns] * b.data[d * b.rows + column * b.columns])
                    .sum();
                prop_assert_eq!(c[at], expected, "row {} column {}", row, column);
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let numbers = |count: usize| (0..count).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
        let (a, b) = (numbers(100 * 600), numbers(600 * 300));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| multiply([100, 300, 600], Matrix::packed(&a, 600), Matrix::packed(&b, 300)))
        };
        let alone = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == alone));
    }
}
