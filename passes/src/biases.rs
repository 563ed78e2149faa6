//! Rounds biases to the half type of the product that they are added to, where a library then adds them.
//!
//! before  %h: f16[8, 64] = dot %x, %w              after  %c: f16[64] = weight         # cast of %b's recipe
//!         %b: f32[64] = weight                            %h: f16[8, 64] = dot %x, %w
//!         %y = pointwise %h, %b                           %y = pointwise %h, %c
//!           {f16(f32($0) + $1)}                             {f16(f32($0) + f32($1))}
//!
//! Libraries for CUDA devices take a bias in the type of the result alone. The sum is still made in `f32`, and the product
//! is not rounded before it any more, so results are nearer to those in `f32` than with a kernel of its own.

use std::collections::HashMap;

use ir::{Derived, Node, Old, ValueDef, Weight, WeightId};
use kernels::cuda::{self, CudaTarget};
use planfile::{DType, Dim, Expr, ExprOp, Op, Spec, SpecNode, TensorType};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::precision::cast::convert;
use crate::settings::Settings;

/// Rounds the biases of every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Sharded(mut module): Sharded, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    let Some(target) = settings.cuda() else { return Ok(Sharded(module)) };
    let mut rounded = Derived::new(&mut module.weights);
    for graph in &mut module.graphs {
        *graph = graph.rewrite(|edit, node| {
            let Some(Bias { operand, weight, op, ty }) = bias(edit.old(), node, &target) else {
                return edit.keep(node);
            };
            let new = rounded.get(weight, ty.dtype, |weight| cast(weight, ty.dtype).map_err(|why| edit.fault(why)))?;
            let mut operands = edit.operands(node)?;
            let shard = edit.old().value(node.operands[operand]).shard.clone();
            operands[operand] = edit.add_placed_source(ty, ValueDef::Weight(new), shard);
            edit.add(op, &operands, &node.origin)
        })?;
    }
    Ok(Sharded(module.without_unread_weights()))
}

/// An operand that would be taken along if it were rounded.
struct Bias {
    operand: usize,
    weight: WeightId,
    /// Its type on a rank once it is.
    ty: TensorType,
    /// The node's operation then.
    op: Op,
}

fn bias(graph: Old<'_>, node: &Node, target: &CudaTarget) -> Option<Bias> {
    let Op::Pointwise { expr, dims } = &node.op else { return None };
    let dtype = graph.ty(*node.results.first()?).dtype;
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return None;
    }
    let product = node.operands.iter().find_map(|&operand| {
        let producer = graph.producer(operand)?;
        // What others read is stored, so that nothing is added to it on the way.
        let alone = graph.reads(operand) == 1;
        (alone && matches!(producer.op, Op::Dot { .. } | Op::Conv { .. })).then_some((operand, producer))
    })?;
    let (operand, weight) = node.operands.iter().enumerate().find_map(|(operand, &value)| {
        let ValueDef::Weight(weight) = graph.value(value).def else { return None };
        let small = graph.ty(value).elements() < graph.ty(product.0).elements();
        (graph.ty(value).dtype == DType::F32 && small).then_some((operand, weight))
    })?;
    let mut ops = Vec::with_capacity(expr.ops.len() + 1);
    for op in &expr.ops {
        ops.push(op.clone());
        if *op == ExprOp::Operand(operand as u16) {
            ops.push(ExprOp::Cast(DType::F32));
        }
    }
    let op = Op::Pointwise { expr: Expr { ops }, dims: dims.clone() };
    // The product and what follows it, as one kernel would see them.
    let ty = graph.ty(node.operands[operand]).with_dtype(dtype);
    let mut inputs: Vec<TensorType> = product.1.operands.iter().map(|&value| graph.ty(value).clone()).collect();
    let own = inputs.len() as u32;
    let others = node.operands.iter().enumerate().filter(|(_, value)| **value != product.0);
    let numbered: HashMap<usize, u32> = others.clone().map(|(position, _)| position).zip(own..).collect();
    inputs.extend(others.map(|(at, &value)| if at == operand { ty.clone() } else { graph.ty(value).clone() }));
    let made = inputs.len() as u32;
    let operands = (0..node.operands.len()).map(|position| numbered.get(&position).copied().unwrap_or(made)).collect();
    let product = SpecNode { op: product.1.op.clone(), operands: (0..own).collect() };
    let nodes = vec![product, SpecNode { op: op.clone(), operands }];
    let spec = Spec { inputs, nodes, results: vec![made + 1] };
    spec.types().ok()?;
    cuda::takes_along(&spec, target).then_some(Bias { operand, weight, ty, op })
}

/// The weight, an `f32`, rounded to a half type.
fn cast(weight: &Weight, dtype: DType) -> Result<Weight, String> {
    let dims = weight.ty.sizes().into_iter().map(Dim::Static).collect();
    let op = Op::Pointwise { expr: convert(DType::F32, dtype, dtype == DType::F16), dims };
    let recipe = weight.recipe.clone().then(op)?;
    Ok(Weight { name: weight.name.clone(), ty: weight.ty.with_dtype(dtype), recipe })
}

#[cfg(test)]
mod tests {
    use crate::harness::{CPU, Case, H200};

    /// Twice the distance between neighbours of a half type.
    const ROUNDED: f64 = 2e-3;

    const PRODUCT: &str = "%x: f16[8, 32]
        %w: f16[32, 64] = weight file 1 at 0
        %b: f32[64] = weight file 0 at 4096
        %h: f16[8, 64] = dot %x, %w {contract [1]x[0]}";

    #[track_caller]
    fn check_unchanged(rest: &str) {
        Case::new(super::run, H200).check_unchanged(&format!("{PRODUCT}\n{rest}"));
    }

    #[test]
    fn a_bias_of_a_product_is_rounded() {
        let before = format!("{PRODUCT}\n%y = pointwise %h, %b {{f16(f32($0) + $1)}}\nreturn %y");
        let rounded = "%b: f16[64] = weight recipe {
            %0: f32[64] = file 0 at 4096
            %1: f16[64] = pointwise %0 {f16(select(is_inf((t0 := $0)), t0, min(max(t0, -65504.0), 65504.0)))}
            return %1
        }";
        let after = before.replace("%b: f32[64] = weight file 0 at 4096", rounded).replace("+ $1", "+ f32($1)");
        Case::new(super::run, H200).within(ROUNDED).check(&before, &after);
        Case::new(super::run, CPU).check_unchanged(&before);
    }

    #[test]
    fn a_product_that_others_read_keeps_its_bias() {
        check_unchanged("%y = pointwise %h, %b {f16(f32($0) + $1)}\nreturn %y, %h");
    }

    #[test]
    fn a_scale_stays_what_it_is() {
        check_unchanged("%y = pointwise %h, %b {f16(f32($0) * $1)}\nreturn %y");
    }
}
