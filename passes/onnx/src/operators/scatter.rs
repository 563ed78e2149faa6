//! Writing elements at computed places.

use ir::ValueId;
use planfile::{Binary, Combine, DType, Dim, Expr, Op, Scalar};

use super::{Operator, row};
use crate::context::{Context, OpError};

#[rustfmt::skip]
pub(super) const OPERATORS: &[Operator] = &[
    row("Scatter",         9,  scatter_elements),
    row("ScatterElements", 11, scatter_elements),
    row("ScatterND",       11, scatter_nd),
    row("TensorScatter",   24, tensor_scatter),
];

/// How an update meets what is there; `None` replaces it.
fn reduction(ctx: &Context<'_>) -> Result<Option<Combine>, OpError> {
    match ctx.string("reduction", "none")?.as_str() {
        "none" => Ok(None),
        "add" => Ok(Some(Combine::Sum)),
        "mul" => Ok(Some(Combine::Prod)),
        "max" => Ok(Some(Combine::Max)),
        "min" => Ok(Some(Combine::Min)),
        other => Err(ctx.invalid(&format!("`reduction` is `{other}`"))),
    }
}

fn scatter_elements(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices, updates) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let axis = ctx.axis(ctx.int("axis", 0)?, ctx.rank(x))?;
    let combine = reduction(ctx)?;
    Ok(vec![ctx.emit(Op::ScatterElements { axis, combine }, &[x, indices, updates])?])
}

fn scatter_nd(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (x, indices, updates) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
    let combine = reduction(ctx)?;
    Ok(vec![ctx.emit(Op::ScatterNd { combine }, &[x, indices, updates])?])
}

/// Each sample's `update` goes to consecutive places of `axis`, from the sample's write index on.
fn tensor_scatter(ctx: &mut Context<'_>) -> Result<Vec<ValueId>, OpError> {
    let (cache, update) = (ctx.operand(0)?, ctx.operand(1)?);
    let axis = ctx.axis(ctx.int("axis", -2)?, ctx.rank(cache))?;
    let circular = match ctx.string("mode", "linear")?.as_str() {
        "linear" => false,
        "circular" => true,
        other => return Err(ctx.invalid(&format!("`mode` is `{other}`"))),
    };
    let sizes = ctx.sizes(update);
    let capacity = ctx.sizes(cache)[usize::from(axis)] as i64;
    let mut place = Expr::index(axis);
    let mut operands = Vec::new();
    if let Some(first) = ctx.optional(2) {
        let mut by_sample = vec![1; sizes.len()];
        by_sample[0] = ctx.count(&ctx.sizes(first))?;
        operands.push(ctx.reshape(first, &by_sample)?);
        place = place.binary(Binary::Add, Expr::operand(0).cast(DType::I64));
    }
    if circular {
        place = place.binary(Binary::Mod, Expr::constant(Scalar::i64(capacity)));
    }
    let dims = sizes.into_iter().map(Dim::Static).collect();
    let indices = ctx.emit(Op::Pointwise { expr: place, dims }, &operands)?;
    Ok(vec![ctx.emit(Op::ScatterElements { axis, combine: None }, &[cache, indices, update])?])
}

#[cfg(test)]
mod tests {
    use crate::harness::{Case, assert_close, tensor};

    #[test]
    fn elements_are_replaced_or_combined() {
        let case = |op: &str, opset| {
            let case = Case::new(op, opset).input(tensor(&[3], &[1f32, 2.0, 3.0]));
            case.constant(tensor(&[2], &[-1i64, 0])).input(tensor(&[2], &[10f32, 20.0]))
        };
        assert_close(&case("Scatter", 9).one(), &[3], &[20.0, 2.0, 10.0]);
        assert_close(&case("ScatterElements", 18).string("reduction", "add").one(), &[3], &[21.0, 2.0, 13.0]);
        assert_close(&case("ScatterElements", 18).string("reduction", "max").one(), &[3], &[20.0, 2.0, 10.0]);
    }

    #[test]
    fn rows_are_addressed_by_prefixes() {
        let case = Case::new("ScatterND", 16).string("reduction", "mul").input(tensor(&[2, 2], &[1f32, 2.0, 3.0, 4.0]));
        let case = case.constant(tensor(&[1, 1], &[1i64])).input(tensor(&[1, 2], &[10f32, 100.0]));
        assert_close(&case.one(), &[2, 2], &[1.0, 2.0, 30.0, 400.0]);
    }

    #[test]
    fn caches_are_written_from_each_samples_place() {
        let case = |mode: &str| {
            let case = Case::new("TensorScatter", 24).string("mode", mode).input(tensor(&[2, 3, 1], &[0f32; 6]));
            case.input(tensor(&[2, 2, 1], &[1f32, 2.0, 3.0, 4.0]))
        };
        assert_close(&case("linear").one(), &[2, 3, 1], &[1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
        let places = tensor(&[2], &[1i64, 2]);
        assert_close(&case("circular").input(places).one(), &[2, 3, 1], &[0.0, 1.0, 2.0, 4.0, 0.0, 3.0]);
    }
}
