//! Matrix products.
//!
//! A product whose right side is one matrix becomes a `Dot` without batch dimensions: all leading dimensions of the
//! left side stay free, so sharding and kernels see one large product.

use ir::ValueId;
use planfile::{Binary, DType, Expr, Op};

use super::quantization::{per_column, per_row, requantize, shifted};
use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Det",           11, determinant),
    row("MatMul",        1,  matmul),
    row("Gemm",          7,  gemm),
    row("MatMulInteger", 10, matmul_integer),
    row("QLinearMatMul", 10, qlinear_matmul),
];

fn matmul(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    Ok(vec![product(ctx, a, b)?])
}

/// NumPy's `matmul` of two values of one element type.
pub(super) fn product(ctx: &mut Context<'_>, a: ValueId, b: ValueId) -> Result<ValueId, OpError> {
    let (left, right) = (ctx.sizes(a), ctx.sizes(b));
    if left.is_empty() || right.is_empty() {
        return Err(ctx.invalid("a scalar has no matrix product; use Mul"));
    }
    match (left.len(), right.len()) {
        (rows, 1 | 2) => dot(ctx, a, b, &[], (rows - 1, 0)),
        (1, columns) => dot(ctx, a, b, &[], (0, columns - 2)),
        (rows, columns) => {
            let (left_batch, m) = (&left[..rows - 2], &left[rows - 2..]);
            let (right_batch, n) = (&right[..columns - 2], &right[columns - 2..]);
            let batch = batch_sizes(ctx, left_batch, right_batch)?;
            let result = [&batch[..], &[m[0], n[1]]].concat();
            if right_batch.iter().all(|&size| size == 1) {
                let b = ctx.reshape(b, n)?;
                let y = dot(ctx, a, b, &[], (rows - 1, 0))?;
                return ctx.reshape(y, &result);
            }
            if left_batch.iter().all(|&size| size == 1) {
                return one_by_many(ctx, a, b, &result);
            }
            let a = ctx.broadcast(a, &[&batch, m].concat())?;
            let b = ctx.broadcast(b, &[&batch, n].concat())?;
            let pairs: Vec<usize> = (0..batch.len()).collect();
            dot(ctx, a, b, &pairs, (batch.len() + 1, batch.len()))
        }
    }
}

/// One matrix times a batch of them: the batch is free in `b`, and moves in front of the rows afterwards.
fn one_by_many(ctx: &mut Context<'_>, a: ValueId, b: ValueId, result: &[u64]) -> Result<ValueId, OpError> {
    let (left, right) = (ctx.sizes(a), ctx.rank(b));
    let a = ctx.reshape(a, &left[left.len() - 2..])?;
    let y = dot(ctx, a, b, &[], (1, right - 2))?;
    let batch = 1..right - 1;
    let permutation: Vec<u8> = batch.chain([0, right - 1]).map(|axis| axis as u8).collect();
    let y = ctx.transpose(y, &permutation)?;
    ctx.reshape(y, result)
}

fn batch_sizes(ctx: &Context<'_>, left: &[u64], right: &[u64]) -> Result<Vec<u64>, OpError> {
    let rank = left.len().max(right.len());
    let size = |sizes: &[u64], axis: usize| (axis + sizes.len()).checked_sub(rank).map_or(1, |axis| sizes[axis]);
    let merged = (0..rank).map(|axis| match (size(left, axis), size(right, axis)) {
        (1, n) | (n, 1) => Ok(n),
        (n, m) if n == m => Ok(n),
        _ => Err(ctx.invalid(&format!("batch dimensions {left:?} and {right:?} do not broadcast to each other"))),
    });
    merged.collect()
}

/// `Dot` with the same batch axes on both sides and one pair of contracted axes.
fn dot(
    ctx: &mut Context<'_>,
    a: ValueId,
    b: ValueId,
    batch: &[usize],
    contract: (usize, usize),
) -> Result<ValueId, OpError> {
    let dtype = ctx.dtype(a);
    let op = Op::Dot {
        batch: batch.iter().map(|&axis| (axis as u8, axis as u8)).collect(),
        contract: vec![(contract.0 as u8, contract.1 as u8)],
        accumulate: dtype.accumulator(),
        out: dtype,
    };
    same_types(ctx, a, b)?;
    ctx.emit(op, &[a, b])
}

fn same_types(ctx: &Context<'_>, a: ValueId, b: ValueId) -> Result<(), OpError> {
    let same = ctx.dtype(a) == ctx.dtype(b);
    same.then_some(()).ok_or_else(|| ctx.invalid(&format!("operands are {} and {}", ctx.ty(a), ctx.ty(b))))
}

/// `alpha * a' * b' + beta * c`, where `'` transposes if asked: told by the contracted axes, never by a `Transpose`.
fn gemm(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    if ctx.rank(a) != 2 || ctx.rank(b) != 2 {
        return Err(ctx.invalid(&format!("operands are {} and {}, expected matrices", ctx.ty(a), ctx.ty(b))));
    }
    let contract = (usize::from(!ctx.flag("transA", false)?), usize::from(ctx.flag("transB", false)?));
    let (alpha, beta) = (ctx.float("alpha", 1.0)?, ctx.float("beta", 1.0)?);
    let y = dot(ctx, a, b, &[], contract)?;
    let dtype = ctx.dtype(y);
    if !dtype.is_float() && (alpha.fract() != 0.0 || beta.fract() != 0.0) {
        return Err(ctx.unsupported("fractional `alpha` or `beta` of integers; scale a floating-point result instead"));
    }
    let scaled = |operand: u16, factor: f32| match factor {
        1.0 => Expr::operand(operand),
        _ => Expr::operand(operand).binary(Binary::Mul, number(dtype, f64::from(factor))),
    };
    let Some(c) = ctx.optional(2).filter(|_| beta != 0.0) else {
        return Ok(vec![if alpha == 1.0 { y } else { ctx.pointwise(scaled(0, alpha), &[y])? }]);
    };
    let sum = ctx.pointwise(scaled(0, alpha).binary(Binary::Add, scaled(1, beta)), &[y, c])?;
    if ctx.sizes(sum) != ctx.sizes(y) {
        return Err(ctx.invalid(&format!("C is {}, which does not broadcast to the product {}", ctx.ty(c), ctx.ty(y))));
    }
    Ok(vec![sum])
}

/// Exact in `i32`, as the specification asks.
fn matmul_integer(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(1)?);
    let (a_zero, b_zero) = (ctx.optional(2), ctx.optional(3));
    Ok(vec![integer_product(ctx, a, a_zero, b, b_zero)?])
}

fn integer_product(
    ctx: &mut Context<'_>,
    a: ValueId,
    a_zero: Option<ValueId>,
    b: ValueId,
    b_zero: Option<ValueId>,
) -> Result<ValueId, OpError> {
    let a_zero = a_zero.map(|zero| per_row(ctx, zero)).transpose()?;
    let b_zero = b_zero.map(|zero| per_column(ctx, zero)).transpose()?;
    let a = shifted(ctx, a, a_zero, DType::I32)?;
    let b = shifted(ctx, b, b_zero, DType::I32)?;
    product(ctx, a, b)
}

fn qlinear_matmul(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (a, b) = (ctx.operand(0)?, ctx.operand(3)?);
    let (a_zero, b_zero) = (ctx.operand(2)?, ctx.operand(5)?);
    let y = integer_product(ctx, a, Some(a_zero), b, Some(b_zero))?;
    let (a_scale, b_scale) = (ctx.operand(1)?, ctx.operand(4)?);
    let a_scale = per_row(ctx, a_scale)?;
    let b_scale = per_column(ctx, b_scale)?;
    let (y_scale, y_zero) = (ctx.operand(6)?, ctx.operand(7)?);
    Ok(vec![requantize(ctx, y, a_scale, b_scale, y_scale, y_zero)?])
}

/// Largest matrix whose determinant is written out.
const DETERMINANT_MAX: u64 = 4;

/// Of each matrix in the last two dimensions, written out along the first row.
fn determinant(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let sizes = ctx.sizes(x);
    let [batch @ .., rows, columns] = &sizes[..] else {
        return Err(ctx.invalid(&format!("{} is no matrix", ctx.ty(x))));
    };
    if rows != columns || *rows == 0 {
        return Err(ctx.invalid(&format!("{} is not square", ctx.ty(x))));
    }
    if *rows > DETERMINANT_MAX {
        let hint = format!("determinants of {rows} rows; the limit is {DETERMINANT_MAX}");
        return Err(ctx.unsupported(&hint));
    }
    let size = *rows as usize;
    let last = sizes.len() as u8 - 1;
    let mut elements = Vec::new();
    for position in 0..size * size {
        let row = ctx.slice_axis(x, last - 1, (position / size) as u64, 1)?;
        let element = ctx.slice_axis(row, last, (position % size) as u64, 1)?;
        elements.push(ctx.reshape(element, batch)?);
    }
    let all: Vec<usize> = (0..size).collect();
    Ok(vec![ctx.pointwise(minor(0, &all, size), &elements)?])
}

/// The determinant of the rows from `row` on, in these columns.
fn minor(row: usize, columns: &[usize], size: usize) -> Expr {
    let mut sum: Option<Expr> = None;
    for (position, &column) in columns.iter().enumerate() {
        let element = Expr::operand((row * size + column) as u16);
        let others: Vec<usize> = columns.iter().copied().filter(|&other| other != column).collect();
        let term = if others.is_empty() { element } else { element.binary(Binary::Mul, minor(row + 1, &others, size)) };
        let sign = if position % 2 == 0 { Binary::Add } else { Binary::Sub };
        sum = Some(match sum {
            None => term,
            Some(sum) => sum.binary(sign, term),
        });
    }
    // There is at least one column.
    sum.unwrap_or_else(|| Expr::operand(0))
}

#[cfg(test)]
mod tests {
    use planfile::Op;

    use crate::harness::{Case, assert_close, tensor};

    fn names(case: &Case) -> Vec<&'static str> {
        case.import().unwrap().graphs[0].nodes().iter().map(|node| node.op.name()).collect()
    }

    #[test]
    fn one_matrix_on_the_right_needs_no_batch_dimensions() {
        let a = tensor(&[2, 1, 2], &[1f32, 2.0, 3.0, 4.0]);
        let case = Case::new("MatMul", 13).input(a).input(tensor(&[2, 2], &[1f32, 10.0, 2.0, 20.0]));
        assert_close(&case.one(), &[2, 1, 2], &[5.0, 50.0, 11.0, 110.0]);
        let module = case.import().unwrap();
        let [node] = module.graphs[0].nodes() else { panic!("{:?}", names(&case)) };
        assert!(matches!(&node.op, Op::Dot { batch, .. } if batch.is_empty()), "{:?}", node.op);
    }

    #[test]
    fn one_matrix_on_the_left_meets_a_batch() {
        let b = tensor(&[2, 2, 1], &[1f32, 2.0, 3.0, 4.0]);
        let case = Case::new("MatMul", 13).input(tensor(&[2, 2], &[1f32, 10.0, 2.0, 20.0])).input(b);
        assert_close(&case.one(), &[2, 2, 1], &[21.0, 42.0, 43.0, 86.0]);
    }

    #[test]
    fn batches_broadcast_both_ways() {
        let a = tensor(&[2, 1, 1, 1], &[2f32, 3.0]);
        let b = tensor(&[2, 1, 1], &[5f32, 7.0]);
        assert_close(&Case::new("MatMul", 13).input(a).input(b).one(), &[2, 2, 1, 1], &[10.0, 14.0, 15.0, 21.0]);
    }

    #[test]
    fn vectors_lose_their_dimension() {
        let v = || tensor(&[2], &[1f32, 2.0]);
        assert_close(&Case::new("MatMul", 13).input(v()).input(v()).one(), &[], &[5.0]);
        let b = tensor(&[2, 2, 1], &[1f32, 2.0, 3.0, 4.0]);
        assert_close(&Case::new("MatMul", 13).input(v()).input(b).one(), &[2, 1], &[5.0, 11.0]);
    }

    #[test]
    fn gemm_transposes_by_contraction() {
        let a = tensor(&[1, 2], &[1f32, 2.0]);
        let b = tensor(&[3, 2], &[1f32, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let plain = Case::new("Gemm", 13).int("transB", 1).input(a).input(b);
        assert_close(&plain.one(), &[1, 3], &[1.0, 2.0, 3.0]);
        assert_eq!(names(&plain), ["dot"]);
        let scaled = plain.float("alpha", 2.0).float("beta", 0.5).input(tensor(&[3], &[10f32, 20.0, 30.0]));
        assert_close(&scaled.one(), &[1, 3], &[7.0, 14.0, 21.0]);
        assert_eq!(names(&scaled), ["dot", "pointwise"]);
    }

    #[test]
    fn gemm_refuses_a_wider_bias() {
        let one = || tensor(&[1, 1], &[1f32]);
        let case = Case::new("Gemm", 13).input(one()).input(one()).input(tensor(&[2], &[1f32, 2.0]));
        assert!(case.error().contains("does not broadcast to the product"), "{}", case.error());
    }

    #[test]
    fn integers_multiply_exactly_after_their_zero_points() {
        let a = tensor(&[1, 2], &[200u8, 3]);
        let b = tensor(&[2, 2], &[250u8, 1, 2, 7]);
        let case = Case::new("MatMulInteger", 10).input(a).input(b);
        let case = case.constant(tensor(&[], &[3u8])).constant(tensor(&[2], &[0u8, 1]));
        assert_eq!(case.one(), tensor(&[1, 2], &[197 * 250, 0i32]));
    }

    #[test]
    fn quantised_products_saturate() {
        let scale = |value: f32| tensor(&[], &[value]);
        let byte = |value: u8| tensor(&[], &[value]);
        let case =
            Case::new("QLinearMatMul", 10).input(tensor(&[1, 1], &[10u8])).constant(scale(0.5)).constant(byte(0));
        let case = case.input(tensor(&[1, 2], &[7u8, 200])).constant(scale(0.5)).constant(byte(2));
        let case = case.constant(scale(2.0)).constant(byte(5));
        // 10 * 5 * 0.25 / 2 = 6.25 and 247.5: rounded, shifted by 5, cut at 255.
        assert_eq!(case.one(), tensor(&[1, 2], &[11u8, 253]));
    }

    #[test]
    fn determinants() {
        let case = |sizes: &[u64], x: &[f32]| Case::new("Det", 11).input(tensor(sizes, x)).one();
        assert_close(&case(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0]), &[1], &[-2.0]);
        assert_close(&case(&[3, 3], &[2.0, 0.0, 1.0, 1.0, 3.0, 0.0, 0.0, 1.0, 4.0]), &[], &[25.0]);
    }
}
