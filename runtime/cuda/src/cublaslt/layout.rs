//! Matrices of a plan as cuBLASLt sees them: column by column.
//!
//! A row-major `[m, n]` is, column by column, its transpose `[n, m]`. So `D = A · B` is asked for as `Dᵀ = Bᵀ · Aᵀ`:
//! the right matrix comes first, and a bias of `n` elements is one for each row, as the epilogue wants it.

use cudarc::cublaslt::sys::cublasLtEpilogue_t;
use planfile::plan::{Activation, Matmul, Matrix};

use crate::error::CudaError;

/// A product by columns: `result = op(left) · op(right)`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) left: ColumnMajor,
    pub(super) right: ColumnMajor,
    pub(super) result: ColumnMajor,
}

/// A matrix whose columns lie one after the other, `leading` elements apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ColumnMajor {
    pub(super) operand: u32,
    /// In elements, as all strides here.
    pub(super) offset: u64,
    /// As it lies in memory, before it is transposed.
    pub(super) rows: u64,
    pub(super) columns: u64,
    pub(super) leading: u64,
    pub(super) batch_stride: u64,
    pub(super) transposed: bool,
}

impl ColumnMajor {
    /// `rows` and `columns` are what the product reads; either stride is 1.
    fn new(matrix: &Matrix, (rows, row_stride): (u64, u64), (columns, column_stride): (u64, u64)) -> Option<Self> {
        let &Matrix { operand, offset, batch_stride, .. } = matrix;
        // A single column may lie however it likes: nothing steps from it.
        let fits = |rows: u64, row_stride: u64, columns: u64, leading: u64| {
            (row_stride == 1 || rows == 1) && (leading >= rows || columns == 1)
        };
        let made = |rows: u64, columns: u64, leading: u64, transposed| {
            let leading = leading.max(rows).max(1);
            Some(Self { operand, offset, rows, columns, leading, batch_stride, transposed })
        };
        if fits(rows, row_stride, columns, column_stride) {
            made(rows, columns, column_stride, false)
        } else if fits(columns, column_stride, rows, row_stride) {
            made(columns, rows, row_stride, true)
        } else {
            None
        }
    }

    /// How the product reads it, as cuBLASLt numbers it.
    pub(super) fn operation(&self) -> i32 {
        i32::from(self.transposed)
    }
}

impl Product {
    pub(super) fn new(matmul: &Matmul) -> Result<Self, CudaError> {
        let Matmul { m, n, k, a, b, result, .. } = matmul;
        let by_columns = |matrix: &Matrix, rows: u64, columns: u64| {
            ColumnMajor::new(matrix, (rows, matrix.row_stride), (columns, matrix.column_stride))
        };
        let by_rows = |matrix: &Matrix, rows: u64, columns: u64| {
            ColumnMajor::new(matrix, (columns, matrix.column_stride), (rows, matrix.row_stride))
        };
        let overlapping = || CudaError::contradiction("a matrix of a product overlaps itself");
        let rows = by_rows(result, *m, *n).ok_or_else(overlapping)?;
        let (left, right, result) = if rows.transposed {
            // The result lies by columns already.
            if matmul.bias.is_some() {
                return Err(CudaError::contradiction("a bias is added to a product that lies by columns"));
            }
            (by_columns(a, *m, *k), by_columns(b, *k, *n), by_columns(result, *m, *n).ok_or_else(overlapping)?)
        } else {
            (by_rows(b, *k, *n), by_rows(a, *m, *k), rows)
        };
        Ok(Self { left: left.ok_or_else(overlapping)?, right: right.ok_or_else(overlapping)?, result })
    }
}

/// What is done to a product before it is stored, as cuBLASLt numbers it.
pub(super) fn epilogue(matmul: &Matmul) -> u32 {
    let epilogue = match (matmul.activation, matmul.bias.is_some()) {
        (Activation::None, false) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        (Activation::None, true) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
        (Activation::Relu, false) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU,
        (Activation::Relu, true) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS,
        (Activation::GeluTanh, false) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU,
        (Activation::GeluTanh, true) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
    };
    epilogue as u32
}

#[cfg(test)]
mod tests {
    use planfile::Real;

    use super::*;

    fn matrix(operand: u32, row_stride: u64, column_stride: u64) -> Matrix {
        Matrix { operand, offset: 0, row_stride, column_stride, batch_stride: 0 }
    }

    fn matmul([m, n, k]: [u64; 3], a: Matrix, b: Matrix, result: Matrix) -> Matmul {
        Matmul {
            m,
            n,
            k,
            batch: 1,
            a,
            b,
            result,
            scale: Real(1.0),
            bias: None,
            residual: None,
            activation: Activation::None,
            allow_tf32: false,
        }
    }

    /// What cuBLASLt would write, by its own definition of a layout.
    fn compute(matmul: &Matmul, operands: &[Vec<f64>], result: &mut [f64]) {
        let product = Product::new(matmul).unwrap();
        let read = |matrix: &ColumnMajor, row: u64, column: u64| {
            let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
            assert!(row < matrix.rows && column < matrix.columns && matrix.leading >= matrix.rows);
            operands[matrix.operand as usize][(matrix.offset + row + column * matrix.leading) as usize]
        };
        let inner = if product.left.transposed { product.left.rows } else { product.left.columns };
        assert!(!product.result.transposed);
        for row in 0..product.result.rows {
            for column in 0..product.result.columns {
                let sum = (0..inner).map(|k| read(&product.left, row, k) * read(&product.right, k, column)).sum();
                result[(product.result.offset + row + column * product.result.leading) as usize] = sum;
            }
        }
    }

    #[test]
    fn every_layout_gives_the_product_of_the_plan() {
        for [m, n, k] in [[2, 3, 4], [1, 3, 4], [2, 1, 4], [2, 3, 1], [1, 1, 1]] {
            for layouts in 0..8 {
                // Rows of padded length, by rows or by columns.
                let strides = |bit: u32, rows: u64, columns: u64| {
                    if layouts >> bit & 1 == 0 { (columns + 1, 1) } else { (1, rows + 2) }
                };
                let [a, b, d] = [(0, m, k), (1, k, n), (2, m, n)].map(|(bit, rows, columns)| {
                    let (row_stride, column_stride) = strides(bit, rows, columns);
                    Matrix { offset: u64::from(bit), ..matrix(bit % 2, row_stride, column_stride) }
                });
                let operands: Vec<Vec<f64>> =
                    [7.0, 11.0].map(|prime| (0..64).map(|i| f64::from(i) % prime).collect()).to_vec();
                let mut result = vec![-1.0; 64];
                compute(&matmul([m, n, k], a, b, d), &operands, &mut result);
                let at = |matrix: &Matrix, row: u64, column: u64| {
                    (matrix.offset + row * matrix.row_stride + column * matrix.column_stride) as usize
                };
                for row in 0..m {
                    for column in 0..n {
                        let expected: f64 =
                            (0..k).map(|i| operands[0][at(&a, row, i)] * operands[1][at(&b, i, column)]).sum();
                        assert_eq!(result[at(&d, row, column)], expected, "{m} {n} {k} layouts {layouts:03b}");
                    }
                }
                let written = result.iter().filter(|&&value| value >= 0.0).count() as u64;
                assert_eq!(written, m * n);
            }
        }
    }

    #[test]
    fn a_bias_belongs_to_the_columns_of_rows() {
        let biased = |result| Matmul { bias: Some(2), ..matmul([2, 3, 4], matrix(0, 4, 1), matrix(1, 3, 1), result) };
        assert_eq!(Product::new(&biased(matrix(0, 3, 1))).unwrap().result.rows, 3);
        assert!(Product::new(&biased(matrix(0, 1, 2))).is_err());
        assert_eq!(epilogue(&biased(matrix(0, 3, 1))), 4);
        assert_eq!(epilogue(&Matmul { activation: Activation::GeluTanh, ..biased(matrix(0, 3, 1)) }), 36);
    }

    #[test]
    fn matrices_that_overlap_themselves_are_refused() {
        assert!(Product::new(&matmul([2, 3, 4], matrix(0, 2, 1), matrix(1, 3, 1), matrix(0, 3, 1))).is_err());
    }
}
