//! Element-wise nodes: broadcasts before them, constants, and operands without use go into the expression or away.
//!
//! before  %h = broadcast %half [8, 4]      after  %y = pointwise %x { x0 * 0.5 }
//!         %y = mul %x, %h
//!
//! Operands are broadcast by the node itself, so a broadcast in front of it only costs memory.

use std::sync::Arc;

use ir::ValueId;
use planfile::{DType, Expr, ExprOp, Op, Scalar};

use super::sweep::{Call, Step, Sweep};
use super::{broadcast, expr};
use crate::error::PassError;

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let Op::Pointwise { expr, dims } = &call.op else { return Ok(None) };
    let mut operands: Vec<ValueId> = Vec::new();
    let mut ops = Vec::new();
    for op in &expr.ops {
        let ExprOp::Operand(index) = op else {
            ops.push(op.clone());
            continue;
        };
        let Some(&operand) = call.operands.get(usize::from(*index)) else { return Ok(None) };
        let operand = source(sweep, operand);
        if let Some(value) = uniform(sweep, operand)? {
            ops.push(ExprOp::Const(value));
            continue;
        }
        // Numbered by first use.
        let position = operands.iter().position(|&known| known == operand).unwrap_or_else(|| {
            operands.push(operand);
            operands.len() - 1
        });
        ops.push(ExprOp::Operand(position as u16));
    }
    let dtypes: Vec<DType> = operands.iter().map(|&operand| sweep.ty(operand).dtype).collect();
    let next = Expr { ops };
    if let Some(folded) = expr::fold(&next, &dtypes, dims) {
        // Read again, since operands may have lost their last use.
        let op = Op::Pointwise { expr: folded, dims: dims.clone() };
        return Ok(Some(Step::Call(Call { op, operands, origin: Arc::clone(&call.origin) })));
    }
    if let (&[ExprOp::Operand(0)], &[x]) = (next.ops.as_slice(), operands.as_slice()) {
        if sweep.ty(x).dims == *dims {
            return Ok(Some(Step::Values(vec![x])));
        }
        let (op, origin) = (Op::Broadcast { dims: dims.clone() }, Arc::clone(&call.origin));
        return Ok(Some(Step::Call(Call { op, operands, origin })));
    }
    if next == *expr && operands == call.operands {
        return Ok(None);
    }
    let (op, origin) = (Op::Pointwise { expr: next, dims: dims.clone() }, Arc::clone(&call.origin));
    Ok(Some(Step::Call(Call { op, operands, origin })))
}

/// The value behind broadcasts, which has the same element wherever it is read.
fn source(sweep: &Sweep<'_, '_, '_>, value: ValueId) -> ValueId {
    let mut value = value;
    while let Some(behind) = broadcast::behind(sweep, value) {
        value = behind;
    }
    value
}

/// The element of a constant that has only one, or the same everywhere.
///
/// Weights of several elements that come from files are left alone, so that what happens does not depend on training.
fn uniform(sweep: &mut Sweep<'_, '_, '_>, value: ValueId) -> Result<Option<Scalar>, PassError> {
    if let Some(node) = sweep.producer(value) {
        let constant = match &node.op {
            Op::Pointwise { expr: Expr { ops }, .. } => match ops.as_slice() {
                [ExprOp::Const(scalar)] => Some(*scalar),
                _ => None,
            },
            _ => None,
        };
        return Ok(constant);
    }
    let Some(weight) = sweep.as_weight(value) else { return Ok(None) };
    let ty = sweep.ty(value).clone();
    if ty.elements() != Some(1) && !sweep.weights.is_inline(weight) {
        return Ok(None);
    }
    let Some(tensor) = sweep.weights.read(weight)? else { return Ok(None) };
    let mut elements = tensor.data.bytes().chunks_exact(ty.dtype.bytes());
    let Some(first) = elements.next() else { return Ok(None) };
    let same = elements.all(|element| element == first);
    Ok(Scalar::from_bytes(ty.dtype, first).filter(|_| same))
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn broadcasts_in_front_are_read_through() {
        check(
            "%x: f32[3, 4]
             %b: f32[4]
             %r: f32[1, 4] = reshape %b
             %e: f32[3, 4] = broadcast %r
             %y = pointwise %x, %e {$0 + $1}
             return %y",
            "%x: f32[3, 4]
             %b: f32[4]
             %y = pointwise %x, %b {$0 + $1}
             return %y",
        );
    }

    #[test]
    fn a_reshape_that_moves_a_dimension_stays() {
        check_unchanged(
            "%x: f32[4, 4]
             %b: f32[4]
             %r: f32[4, 1] = reshape %b
             %y = pointwise %x, %r {$0 + $1}
             return %y",
        );
    }

    #[test]
    fn scalars_become_constants_of_the_expression() {
        check(
            "%x: f32[3]
             %half: f32[1] = weight [0.5]
             %four: f32[2, 2] = weight [4, 4, 4, 4]
             %root = pointwise %four {sqrt($0)}
             %some: f32[2, 3] = broadcast %x
             %two: f32[] = weight [2]
             %y: f32[2, 3] = pointwise %some, %half, %two {$0 * $1 + $2}
             return %y",
            "%x: f32[3]
             %y: f32[2, 3] = pointwise %x {$0 * 0.5 + 2.0}
             return %y",
        );
    }

    #[test]
    fn a_weight_of_a_file_is_no_constant() {
        check_unchanged(
            "%x: f32[3]
             %w: f32[3] = weight file 0 at 0
             %y = pointwise %x, %w {$0 * $1}
             return %y",
        );
    }

    #[test]
    fn operands_are_numbered_by_use_and_read_once() {
        check(
            "%x: f32[3]
             %z: f32[3]
             %y = pointwise %x, %z, %x {$2 - $1 * $0}
             %u = pointwise %x, %z {tanh($1)}
             return %y, %u",
            "%x: f32[3]
             %z: f32[3]
             %y = pointwise %x, %z {$0 - $1 * $0}
             %u = pointwise %z {tanh($0)}
             return %y, %u",
        );
    }

    #[test]
    fn doing_nothing_is_the_operand_or_a_broadcast() {
        check(
            "%x: f32[3]
             %a = pointwise %x {f32($0)}
             %b: f32[2, 3] = pointwise %a {$0}
             %y = dot %b, %x {contract [1]x[0]}
             return %y",
            "%x: f32[3]
             %b: f32[2, 3] = broadcast %x
             %y = dot %b, %x {contract [1]x[0]}
             return %y",
        );
    }
}
