//! Recognises attention that is spelled as two products around a softmax, for devices that have a kernel for the whole.
//!
//! before  %a = pointwise %q {$0 * 0.25}                after  %t = transpose %k [0, 1, 3, 2]
//!         %s = dot %a, %k {batch, contract [3]x[2]}           %y = attention %q, %t, %v, %mask {scale 0.25}
//!         %m = pointwise %s, %mask {$0 + $1}
//!         %p = softmax %m {axis 3}
//!         %y = dot %p, %v {batch, contract [3]x[2]}
//!
//! Scores then never leave the chip. They are kept in `f32` where a half type was stored between, so results come nearer
//! to those in `f32`. The host executes products faster one by one, so its modules stay as they are.

use ir::{Edit, IrError, Node, Old, Origin, ValueId, joined_origin};
use planfile::{Binary, DType, Expr, ExprOp, Op, Real, Unary};

use crate::error::PassError;
use crate::phase::Logical;
use crate::settings::Settings;

/// Rewrites every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Logical(module): Logical, settings: &Settings<'_>) -> Result<Logical, PassError> {
    if settings.target.device.architecture.is_host() {
        return Ok(Logical(module));
    }
    Ok(Logical(module.rewrite(recognised)?))
}

/// What the node replaces by zero where it is not a number, and reads alone; with the node that tests it, where that is
/// another one.
fn guarded<'a>(graph: Old<'a>, guard: &'a Node) -> Option<(ValueId, Option<&'a Node>)> {
    let Op::Pointwise { expr, .. } = &guard.op else { return None };
    match *guard.operands.as_slice() {
        [value] if is_guard(expr) && graph.reads(value) == 1 => Some((value, None)),
        [first, second] => {
            let test = [first, second].into_iter().find_map(|operand| {
                let test = graph.private(operand)?;
                let Op::Pointwise { expr, .. } = &test.op else { return None };
                let is_test = expr.ops == [ExprOp::Operand(0), ExprOp::Unary(Unary::IsNan)];
                is_test.then_some((operand, test))
            })?;
            let (value, numbers) = if test.0 == first { (second, [0, 1]) } else { (first, [1, 0]) };
            let [ExprOp::Operand(a), ExprOp::Const(zero), ExprOp::Operand(b), ExprOp::Select] = expr.ops.as_slice()
            else {
                return None;
            };
            // Read by the test and by the choice.
            let alone = test.1.operands == [value] && graph.reads(value) == 2;
            ([*a, *b] == numbers && zero.to_f64() == 0.0 && alone).then_some((value, Some(test.1)))
        }
        _ => None,
    }
}

/// What an attention is made of.
struct Found {
    q: ValueId,
    /// `[B, H, T, D]`, or `[B, H, D, T]` where `transposed`.
    k: ValueId,
    transposed: bool,
    v: ValueId,
    mask: Option<ValueId>,
    scale: f64,
    origin: Origin,
}

/// A product of heads: `[B, H, _, _]`, contracted over the last dimension of the left side and `right` of the right one.
fn is_product_of_heads(op: &Op, right: u8) -> bool {
    let Op::Dot { batch, contract, accumulate: DType::F32, .. } = op else { return false };
    batch.as_slice() == [(0, 0), (1, 1)] && contract.as_slice() == [(3, right)]
}

fn found(graph: Old<'_>, node: &Node) -> Option<Found> {
    let &[probabilities, v] = node.operands.as_slice() else { return None };
    let half_or_single = matches!(graph.ty(v).dtype, DType::F16 | DType::BF16 | DType::F32);
    if !is_product_of_heads(&node.op, 2) || !half_or_single || graph.ty(v).rank() != 4 {
        return None;
    }
    let mut parts = vec![node];
    let mut softmax = graph.private(probabilities);
    // A guard against rows that see nothing: they are zero anyway.
    if let Some(guard) = softmax
        && let Some((guarded, test)) = guarded(graph, guard)
    {
        parts.extend([guard].into_iter().chain(test));
        softmax = graph.producer(guarded);
    }
    let softmax = softmax.filter(|node| matches!(node.op, Op::Softmax { axis: 3, log: false }))?;
    parts.push(softmax);
    let mut scores = graph.private(*softmax.operands.first()?)?;
    let (mut scale, mut mask) = (1.0, None);
    if let Op::Pointwise { expr, .. } = &scores.op {
        let product = scores
            .operands
            .iter()
            .position(|&operand| graph.producer(operand).is_some_and(|node| matches!(node.op, Op::Dot { .. })))?;
        let masked = scaled(expr, product as u16)?;
        scale = masked.0;
        mask = masked.1.map(|operand| scores.operands[usize::from(operand)]);
        parts.push(scores);
        scores = graph.private(scores.operands[product])?;
    }
    parts.push(scores);
    let transposed = is_product_of_heads(&scores.op, 2);
    if !transposed && !is_product_of_heads(&scores.op, 3) {
        return None;
    }
    let &[q, k] = scores.operands.as_slice() else { return None };
    let mut side = |value: ValueId| {
        // A side that is multiplied by a number: so are the scores.
        let Some(node) = graph.private(value) else { return value };
        let Op::Pointwise { expr, .. } = &node.op else { return value };
        let (&[operand], Some((factor, None))) = (node.operands.as_slice(), scaled(expr, 0)) else { return value };
        if graph.ty(operand) != graph.ty(value) {
            return value;
        }
        scale *= factor;
        parts.push(node);
        operand
    };
    let (q, k) = (side(q), side(k));
    let origin = joined_origin(parts.iter().rev().map(|node| &node.origin));
    let rows = graph.ty(*node.results.first()?);
    let fits = |value: ValueId| graph.ty(value).rank() == 4 && graph.ty(value).dtype == rows.dtype;
    (fits(q) && fits(k) && fits(v)).then_some(Found { q, k, transposed, v, mask, scale, origin })
}

/// `select(is_nan($0), 0, $0)`.
fn is_guard(expr: &Expr) -> bool {
    let [first, ExprOp::Unary(Unary::IsNan), ExprOp::Const(zero), last, ExprOp::Select] = expr.ops.as_slice() else {
        return false;
    };
    *first == ExprOp::Operand(0) && *last == ExprOp::Operand(0) && zero.to_f64() == 0.0
}

/// Reads `$product * factor + $mask`, either part absent: the factor, and the operand that is added.
fn scaled(expr: &Expr, product: u16) -> Option<(f64, Option<u16>)> {
    enum Term {
        Product(f64, Option<u16>),
        Operand(u16),
        Number(f64),
    }
    let mut stack = Vec::new();
    for op in &expr.ops {
        let term = match op {
            ExprOp::Operand(index) if *index == product => Term::Product(1.0, None),
            ExprOp::Operand(index) => Term::Operand(*index),
            ExprOp::Const(scalar) => Term::Number(scalar.to_f64()),
            ExprOp::Binary(binary) => {
                let (right, left) = (stack.pop()?, stack.pop()?);
                match (binary, left, right) {
                    (Binary::Mul, Term::Product(factor, None), Term::Number(number))
                    | (Binary::Mul, Term::Number(number), Term::Product(factor, None)) => {
                        Term::Product(factor * number, None)
                    }
                    (Binary::Div, Term::Product(factor, None), Term::Number(number)) => {
                        Term::Product(factor / number, None)
                    }
                    // A mask of nothing.
                    (Binary::Add, Term::Product(factor, None), Term::Number(0.0))
                    | (Binary::Add, Term::Number(0.0), Term::Product(factor, None)) => Term::Product(factor, None),
                    (Binary::Add, Term::Product(factor, None), Term::Operand(mask))
                    | (Binary::Add, Term::Operand(mask), Term::Product(factor, None)) => {
                        Term::Product(factor, Some(mask))
                    }
                    _ => return None,
                }
            }
            _ => return None,
        };
        stack.push(term);
    }
    match stack.as_slice() {
        [Term::Product(factor, mask)] => Some((*factor, *mask)),
        _ => None,
    }
}

/// The attention that ends with this node, or the node.
fn recognised(edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
    let old = edit.old();
    let Some(Found { q, k, transposed, v, mask, scale, origin }) = found(old, node) else { return edit.keep(node) };
    let k = if transposed { swapped(edit, k, &origin)? } else { edit.value(k)? };
    let op = Op::Attention { scale: Real(scale), causal: None, softcap: Real(0.0), mask: mask.is_some() };
    let mut operands = vec![edit.value(q)?, k, edit.value(v)?];
    if let Some(mask) = mask {
        operands.push(edit.value(mask)?);
    }
    let types: Vec<_> = operands.iter().map(|&operand| edit.new_graph().ty(operand)).collect();
    // A mask of another rank or type, or heads that are grouped otherwise, stay what they are.
    if planfile::infer(&op, &types).is_ok_and(|made| made.first() == Some(old.ty(node.results[0]))) {
        edit.add(op, &operands, &origin)
    } else {
        edit.keep(node)
    }
}

/// The keys with their last two dimensions swapped: by the transposition that is there already, if there is one.
fn swapped(edit: &mut Edit<'_>, k: ValueId, origin: &Origin) -> Result<ValueId, IrError> {
    let (source, permutation) = match edit.old().producer(k) {
        Some(Node { op: Op::Transpose { permutation }, operands, .. }) => {
            (operands[0], vec![permutation[0], permutation[1], permutation[3], permutation[2]])
        }
        _ => (k, vec![0, 1, 3, 2]),
    };
    let source = edit.value(source)?;
    edit.add_one(Op::Transpose { permutation }, &[source], origin)
}

#[cfg(test)]
mod tests {
    use crate::harness::{CPU, Case, H200};

    #[track_caller]
    fn check(before: &str, after: &str) {
        Case::new(super::run, H200).within(1e-5).check(before, after);
        Case::new(super::run, CPU).check_unchanged(before);
    }

    const SPELLED: &str = "%x: f32[2, 16, 4, 8]
        %y: f32[2, 16, 4, 8]
        %v: f32[2, 4, 16, 8]
        %mask: f32[2, 1, 1, 16]
        %t = transpose %x [0, 2, 1, 3]
        %q = pointwise %t {$0 * 0.5}
        %u = transpose %y [0, 2, 3, 1]
        %k = pointwise %u {$0 * 0.5}
        %s = dot %q, %k {batch [0, 1]x[0, 1], contract [3]x[2]}
        %m = pointwise %s, %mask {$0 + $1}
        %p = softmax %m {axis 3}
        %o = dot %p, %v {batch [0, 1]x[0, 1], contract [3]x[2]}";

    #[test]
    fn products_around_a_softmax_are_attention() {
        check(
            &format!("{SPELLED}\nreturn %o"),
            "%x: f32[2, 16, 4, 8]
             %y: f32[2, 16, 4, 8]
             %v: f32[2, 4, 16, 8]
             %mask: f32[2, 1, 1, 16]
             %q = transpose %x [0, 2, 1, 3]
             %k = transpose %y [0, 2, 1, 3]
             %o = attention %q, %k, %v, %mask {scale 0.25, mask}
             return %o",
        );
    }

    #[test]
    fn probabilities_that_others_read_are_computed() {
        Case::new(super::run, H200).check_unchanged(&format!("{SPELLED}\nreturn %o, %p"));
    }

    #[test]
    fn a_guard_against_rows_without_keys_is_part_of_it() {
        check(
            "%q: f32[2, 4, 16, 8]
             %k: f32[2, 4, 16, 8]
             %v: f32[2, 4, 16, 8]
             %s = dot %q, %k {batch [0, 1]x[0, 1], contract [3]x[3]}
             %p = softmax %s {axis 3}
             %g = pointwise %p {select(is_nan($0), 0.0, $0)}
             %o = dot %g, %v {batch [0, 1]x[0, 1], contract [3]x[2]}
             return %o",
            "%q: f32[2, 4, 16, 8]
             %k: f32[2, 4, 16, 8]
             %v: f32[2, 4, 16, 8]
             %t = transpose %k [0, 1, 3, 2]
             %o = attention %q, %k, %v {scale 1.0}
             return %o",
        );
        // As exporters spell it.
        check(
            "%q: f32[2, 4, 16, 8]
             %k: f32[2, 4, 16, 8]
             %v: f32[2, 4, 16, 8]
             %s = dot %q, %k {batch [0, 1]x[0, 1], contract [3]x[3]}
             %m = pointwise %s {$0 + 0.0}
             %p = softmax %m {axis 3}
             %n: bool[2, 4, 16, 16] = pointwise %p {is_nan($0)}
             %g = pointwise %n, %p {select($0, 0.0, $1)}
             %o = dot %g, %v {batch [0, 1]x[0, 1], contract [3]x[2]}
             return %o",
            "%q: f32[2, 4, 16, 8]
             %k: f32[2, 4, 16, 8]
             %v: f32[2, 4, 16, 8]
             %t = transpose %k [0, 1, 3, 2]
             %o = attention %q, %k, %v {scale 1.0}
             return %o",
        );
    }
}
