//! What models are made of: attention with grouped heads, gated feed-forward layers, normalised residuals.

use planfile::op::{Causal, NormKind};
use planfile::{Binary, Dim, Expr, Op, Real, Unary};

use super::modules::{Drawing, Known};
use super::operations::{dot, product, range, reshape};

/// Appends a random one.
pub(crate) fn draw(drawing: &mut Drawing) -> Option<Known> {
    match drawing.below(4) {
        0 | 1 => attention(drawing),
        2 => gated(drawing),
        _ => norm(drawing),
    }
}

fn pointwise(drawing: &mut Drawing, expr: Expr, operands: &[Known], like: Known, range: f64) -> Option<Known> {
    let dims = drawing.sizes(operands[0]).into_iter().map(Dim::Static).collect();
    let ids: Vec<ir::ValueId> = operands.iter().map(|operand| operand.id).collect();
    drawing.value(Op::Pointwise { expr, dims }, &ids, like, range)
}

/// A value of rank 3; one of rank 2 gets a dimension.
fn sequence(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let sizes = drawing.sizes(x);
    match sizes.len() {
        2 => drawing.value(reshape(&[sizes[0], 1, sizes[1]]), &[x.id], x, x.range),
        3 => Some(x),
        _ => None,
    }
}

fn norm(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let sizes = drawing.sizes(x);
    let axis = sizes.len() - 1 - drawing.axis(2).min(sizes.len() - 2);
    let kind = drawing.pick(&[NormKind::Layer, NormKind::Rms]);
    let (scale, bias) = (drawing.weight(&sizes[axis..]), drawing.weight(&sizes[axis..]));
    let op = Op::Norm { kind, axis: axis as u8, epsilon: Real(0.1), scale: true, bias: true };
    let like = Known { exact: false, positive: false, ..x };
    drawing.value(op, &[x.id, scale.id, bias.id], like, 12.0)
}

/// `down(silu(gate(x)) · up(x))`, gate and up merged in one product or apart.
fn gated(drawing: &mut Drawing) -> Option<Known> {
    let x = drawing.any_of_rank(2)?;
    let axis = drawing.sizes(x).len() - 1;
    let (features, inner) = (drawing.sizes(x)[axis], drawing.size());
    let (gate, up) = if drawing.flag() {
        let both = product(drawing, x, axis, 2 * inner)?;
        let sizes = drawing.sizes(both);
        let last = sizes.len() - 1;
        let half =
            |drawing: &mut Drawing, at| drawing.value(range(&sizes, last, at, inner), &[both.id], both, both.range);
        (half(drawing, 0)?, half(drawing, inner)?)
    } else {
        (product(drawing, x, axis, inner)?, product(drawing, x, axis, inner)?)
    };
    let silu = Expr::operand(0).unary(Unary::Sigmoid).binary(Binary::Mul, Expr::operand(0));
    let expr = silu.binary(Binary::Mul, Expr::operand(1));
    let like = Known { exact: false, positive: false, ..gate };
    let gated = pointwise(drawing, expr, &[gate, up], like, gate.range * up.range)?;
    let down = product(drawing, gated, axis, features)?;
    residual(drawing, x, down)
}

fn residual(drawing: &mut Drawing, x: Known, y: Known) -> Option<Known> {
    if drawing.sizes(x) != drawing.sizes(y) || drawing.flag() {
        return Some(y);
    }
    let expr = Expr::operand(0).binary(Binary::Add, Expr::operand(1));
    let like = Known { exact: x.exact && y.exact, positive: false, ..x };
    pointwise(drawing, expr, &[x, y], like, x.range + y.range)
}

/// Features to heads: `[B, S, H · D]` → `[B, H, S, D]`.
fn heads(drawing: &mut Drawing, x: Known, count: u64) -> Option<Known> {
    let sizes = drawing.sizes(x);
    let apart = drawing.value(reshape(&[sizes[0], sizes[1], count, sizes[2] / count]), &[x.id], x, x.range)?;
    drawing.value(Op::Transpose { permutation: vec![0, 2, 1, 3] }, &[apart.id], x, x.range)
}

/// Attention from projections, merged or apart, with fewer key and value heads than query heads; fused or spelled out.
fn attention(drawing: &mut Drawing) -> Option<Known> {
    let x = sequence(drawing)?;
    let sizes = drawing.sizes(x);
    let (queries, groups) =
        drawing.pick(&[(4, 4), (6, 6), (4, 2), (8, 2), (6, 3), (6, 2), (6, 1), (3, 3), (12, 4), (5, 1)]);
    let depth = drawing.pick(&[1, 2, 3, 4]);
    let counts = [queries, groups, groups];
    let projected: Vec<Known> = if drawing.flag() {
        let merged = product(drawing, x, 2, counts.iter().sum::<u64>() * depth)?;
        let sizes = drawing.sizes(merged);
        let mut at = 0;
        let mut next = |count: u64| {
            let part = drawing.value(range(&sizes, 2, at * depth, count * depth), &[merged.id], merged, merged.range);
            at += count;
            part
        };
        counts.into_iter().map(&mut next).collect::<Option<_>>()?
    } else {
        counts.into_iter().map(|count| product(drawing, x, 2, count * depth)).collect::<Option<_>>()?
    };
    let [q, k, v] = [0, 1, 2].map(|part| heads(drawing, projected[part], counts[part]));
    let (q, k, v) = (q?, k?, v?);
    let like = Known { exact: false, positive: false, ..v };
    let spelled = queries == groups && drawing.flag();
    let mixed = if spelled {
        let scores =
            drawing.value(dot(&[(0, 0), (1, 1)], &[(3, 3)]), &[q.id, k.id], like, q.range * k.range * depth as f64)?;
        let weights = drawing.value(Op::Softmax { axis: 3, log: false }, &[scores.id], like, 1.0)?;
        drawing.value(dot(&[(0, 0), (1, 1)], &[(3, 2)]), &[weights.id, v.id], like, v.range)?
    } else {
        let mask = drawing.below(3) == 0;
        let causal = drawing.pick(&[None, Some(Causal::FromStart)]);
        let op = Op::Attention { scale: Real(0.125), causal, softcap: Real(0.0), mask };
        let mut operands = vec![q.id, k.id, v.id];
        if mask {
            let lead = drawing.pick(&[[1, 1], [sizes[0], 1], [1, queries]]);
            operands.push(drawing.weight(&[lead[0], lead[1], sizes[1], sizes[1]]).id);
        }
        drawing.value(op, &operands, like, v.range)?
    };
    let back = drawing.value(Op::Transpose { permutation: vec![0, 2, 1, 3] }, &[mixed.id], mixed, mixed.range)?;
    let flat = drawing.value(reshape(&[sizes[0], sizes[1], queries * depth]), &[back.id], back, back.range)?;
    let out = product(drawing, flat, 2, sizes[2])?;
    residual(drawing, x, out)
}
