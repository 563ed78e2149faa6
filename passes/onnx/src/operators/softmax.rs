//! Softmax and its relatives.
//!
//! Before opset 13 they work on the matrix that flattening at `axis` gives; from 13 on along `axis` alone.

use ir::ValueId;
use planfile::op::ReduceKind;
use planfile::{Compare, Dim, Expr, Op};

use super::{Operator, row};
use crate::context::{Context, OpError, number};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Softmax",    1, |ctx| along_axis(ctx, |ctx, x, axis| softmax(ctx, x, axis, false))),
    row("LogSoftmax", 1, |ctx| along_axis(ctx, |ctx, x, axis| softmax(ctx, x, axis, true))),
    row("Hardmax",    1, |ctx| along_axis(ctx, hardmax)),
];

/// Works on one value along one axis.
type Along = fn(&mut Context<'_>, ValueId, u8) -> Result<ValueId, OpError>;

fn along_axis(ctx: &mut Context<'_>, along: Along) -> Result<Vec<ValueId>, OpError> {
    let x = ctx.operand(0)?;
    let sizes = ctx.sizes(x);
    let flattens = ctx.opset() < 13;
    let axis = ctx.axis(ctx.int("axis", if flattens { 1 } else { -1 })?, sizes.len())?;
    let (rows, columns) = sizes.split_at(usize::from(axis));
    if !flattens || columns[1..].iter().all(|&size| size == 1) {
        return Ok(vec![along(ctx, x, axis)?]);
    }
    let matrix = ctx.reshape(x, &[ctx.count(rows)?, ctx.count(columns)?])?;
    let y = along(ctx, matrix, 1)?;
    Ok(vec![ctx.reshape(y, &sizes)?])
}

fn softmax(ctx: &mut Context<'_>, x: ValueId, axis: u8, log: bool) -> Result<ValueId, OpError> {
    ctx.emit(Op::Softmax { axis, log }, &[x])
}

/// 1 at the first largest element, 0 elsewhere.
fn hardmax(ctx: &mut Context<'_>, x: ValueId, axis: u8) -> Result<ValueId, OpError> {
    let dtype = ctx.dtype(x);
    let kind = ReduceKind::ArgMax { last: false };
    let largest = ctx.emit(Op::Reduce { kind, axes: vec![axis], keep: true }, &[x])?;
    let here = Expr::index(axis).compare(Compare::Eq, Expr::operand(0));
    let expr = here.select(number(dtype, 1.0), number(dtype, 0.0));
    let dims = ctx.sizes(x).into_iter().map(Dim::Static).collect();
    ctx.emit(Op::Pointwise { expr, dims }, &[largest])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn old_versions_flatten() {
        let x = || tensor(&[1, 2, 2], &[0f32; 4]);
        assert_close(&Case::new("Softmax", 11).input(x()).one(), &[1, 2, 2], &[0.25; 4]);
        assert_close(&Case::new("Softmax", 13).input(x()).one(), &[1, 2, 2], &[0.5; 4]);
        let log = Case::new("LogSoftmax", 13).int("axis", 1).input(x());
        assert_close(&log.one(), &[1, 2, 2], &[0.5f32.ln(); 4]);
    }

    #[test]
    fn the_first_of_equals_is_the_hard_maximum() {
        let x = tensor(&[2, 3], &[1f32, 2.0, 2.0, 9.0, 0.0, 0.0]);
        let expected = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0];
        assert_close(&Case::new("Hardmax", 13).input(x).one(), &[2, 3], &expected);
    }
}
