//! Matrix products: floats through the `gemm` crate, integers by plain loops that wrap.
#![expect(unsafe_code, reason = "the gemm crate takes raw pointers; this is the one place that calls it")]

use crate::number::Number;

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

/// Types that have a matrix product. It is accumulated in the type itself.
pub(crate) trait Product: Number {
    /// `dst = a · b`, or `dst += a · b`, with `a: [m, k]`, `b: [k, n]` and rows of `dst: [m, n]` at `dst_rows` from
    /// each other. `size` is `[m, n, k]`. An empty contraction gives zeros.
    fn multiply(
        size: [usize; 3],
        dst: &mut [Self],
        dst_rows: usize,
        a: Matrix<'_, Self>,
        b: Matrix<'_, Self>,
        add: bool,
    );
}

/// The part of the slice from the first to the last element of an `[m, n]` matrix, neither of them 0.
fn extent<T>(matrix: Matrix<'_, T>, m: usize, n: usize) -> &[T] {
    &matrix.data[..(m - 1) * matrix.rows + (n - 1) * matrix.columns + 1]
}

/// Handles sizes of 0, for which there is nothing to multiply; true if the product is done.
fn trivial<T: Number>([m, n, k]: [usize; 3], dst: &mut [T], dst_rows: usize, add: bool) -> bool {
    if m == 0 || n == 0 {
        return true;
    }
    if k == 0 && !add {
        for row in 0..m {
            dst[row * dst_rows..][..n].fill(T::ZERO);
        }
    }
    k == 0
}

macro_rules! float_product {
    ($($float:ty),*) => {
        $(impl Product for $float {
            fn multiply(
                size: [usize; 3],
                dst: &mut [Self],
                dst_rows: usize,
                a: Matrix<'_, Self>,
                b: Matrix<'_, Self>,
                add: bool,
            ) {
                if trivial(size, dst, dst_rows, add) {
                    return;
                }
                let [m, n, k] = size;
                let dst = &mut dst[..(m - 1) * dst_rows + n];
                // Rows that overlap would be written twice.
                let dst_rows = if m == 1 { n } else { dst_rows };
                assert!(dst_rows >= n, "rows of {n} elements are {dst_rows} apart");
                let (lhs, rhs) = (extent(a, m, k), extent(b, k, n));
                // SAFETY: all elements that the sizes and strides reach lie between the first and the last one of
                // each matrix, which the slices above contain; strides are not negative; `dst` is borrowed mutably,
                // so it overlaps with neither operand, and its rows do not overlap with each other.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        dst.as_mut_ptr(),
                        1,
                        dst_rows.cast_signed(),
                        add,
                        lhs.as_ptr(),
                        a.columns.cast_signed(),
                        a.rows.cast_signed(),
                        rhs.as_ptr(),
                        b.columns.cast_signed(),
                        b.rows.cast_signed(),
                        1.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
            }
        })*
    };
}
float_product!(f32, f64);

macro_rules! integer_product {
    ($($int:ty),*) => {
        $(impl Product for $int {
            fn multiply(
                size: [usize; 3],
                dst: &mut [Self],
                dst_rows: usize,
                a: Matrix<'_, Self>,
                b: Matrix<'_, Self>,
                add: bool,
            ) {
                if trivial(size, dst, dst_rows, add) {
                    return;
                }
                let [m, n, k] = size;
                // Consecutive columns make the innermost loop one over slices.
                let mut packed = Vec::new();
                let b = if b.columns == 1 || n == 1 {
                    b
                } else {
                    packed.reserve(k * n);
                    for depth in 0..k {
                        packed.extend((0..n).map(|column| b.data[depth * b.rows + column * b.columns]));
                    }
                    Matrix::packed(&packed, n)
                };
                for row in 0..m {
                    let dst = &mut dst[row * dst_rows..][..n];
                    if !add {
                        dst.fill(0);
                    }
                    for depth in 0..k {
                        let left = a.data[row * a.rows + depth * a.columns];
                        for (dst, &right) in dst.iter_mut().zip(&b.data[depth * b.rows..][..n]) {
                            *dst = dst.wrapping_add(left.wrapping_mul(right));
                        }
                    }
                }
            }
        })*
    };
}
integer_product!(u8, u16, u32, u64, i8, i16, i32, i64);

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Product + std::fmt::Debug>(of: impl Fn(i32) -> T) {
        // [2, 3] · [3, 2], with the right side stored by columns and gaps between rows of the result.
        let a = [1, 2, 3, 4, 5, 6].map(&of);
        let b = [7, 9, 11, 8, 10, 12].map(&of);
        let (a, b) = (Matrix::packed(&a, 3), Matrix::packed(&b, 3).transposed());
        let mut dst = [0; 6].map(&of);
        T::multiply([2, 2, 3], &mut dst, 4, a, b, false);
        assert_eq!(dst, [58, 64, 0, 0, 139, 154].map(&of));
        T::multiply([2, 2, 1], &mut dst, 4, a, b, true);
        assert_eq!(dst[..2], [58 + 7, 64 + 8].map(&of));
        T::multiply([1, 2, 0], &mut dst, 4, a, b, true);
        assert_eq!(dst[..2], [58 + 7, 64 + 8].map(&of));
        T::multiply([1, 2, 0], &mut dst, 4, a, b, false);
        assert_eq!(dst[..2], [0, 0].map(&of));
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
}
