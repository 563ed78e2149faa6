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

use ir::{Graph, Module, Node, Value, ValueDef, ValueId, Weight, WeightId};
use kernels::cuda::{self, Options};
use planfile::{DType, Dim, Expr, ExprOp, Op, Spec, SpecNode, TensorType};

use crate::error::PassError;
use crate::lower;
use crate::pipeline::Settings;
use crate::precision::cast::convert;
use crate::simplify::dead;

const NAME: &str = "biases";

/// Rounds the biases of every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Invalid`] if a type does not follow.
pub fn run(mut module: Module, settings: &Settings<'_>) -> Result<Module, PassError> {
    let architecture = &settings.target.device.architecture;
    if architecture == lower::CPU {
        return Ok(module);
    }
    let options = Options { architecture: architecture.clone(), allow_tf32: settings.options.allow_tf32 };
    let mut rounded: HashMap<(WeightId, DType), WeightId> = HashMap::new();
    let Module { graphs, weights, .. } = &mut module;
    for graph in graphs.iter_mut() {
        let reads = graph.read_counts();
        for index in 0..graph.nodes.len() {
            let found = bias(graph, &graph.nodes[index], &reads, &options);
            let Some(Bias { operand, weight, ty, expr }) = found else { continue };
            let new = match rounded.get(&(weight, ty.dtype)) {
                Some(&known) => known,
                None => {
                    let made = cast(&weights[weight.index()], ty.dtype).map_err(|why| PassError::invalid(NAME, why))?;
                    weights.push(made);
                    let new = WeightId(weights.len() as u32 - 1);
                    rounded.insert((weight, ty.dtype), new);
                    new
                }
            };
            let old = graph.nodes[index].operands[operand];
            let shard = graph.value(old).shard.clone();
            graph.values.push(Value { ty, def: ValueDef::Weight(new), shard });
            let value = ValueId(graph.values.len() as u32 - 1);
            let node = &mut graph.nodes[index];
            node.operands[operand] = value;
            if let Op::Pointwise { expr: old, .. } = &mut node.op {
                *old = expr;
            }
        }
    }
    Ok(dead::run(&module))
}

/// An operand that would be taken along if it were rounded.
struct Bias {
    operand: usize,
    weight: WeightId,
    /// Its type on a rank once it is.
    ty: TensorType,
    /// The node's expression then.
    expr: Expr,
}

fn bias(graph: &Graph, node: &Node, reads: &[u32], options: &Options) -> Option<Bias> {
    let Op::Pointwise { expr, dims } = &node.op else { return None };
    let dtype = graph.ty(*node.results.first()?).dtype;
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return None;
    }
    let product = node.operands.iter().find_map(|&operand| {
        let producer = graph.producer(operand)?;
        // What others read is stored, so that nothing is added to it on the way.
        let alone = reads[operand.index()] == 1;
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
    let expr = Expr { ops };
    // The product and what follows it, as one kernel would see them.
    let ty = graph.ty(node.operands[operand]).with_dtype(dtype);
    let mut inputs: Vec<TensorType> = product.1.operands.iter().map(|&value| graph.ty(value).clone()).collect();
    let own = inputs.len() as u32;
    let others = node.operands.iter().enumerate().filter(|(_, value)| **value != product.0);
    let numbered: HashMap<usize, u32> = others.clone().map(|(position, _)| position).zip(own..).collect();
    inputs.extend(others.map(|(at, &value)| if at == operand { ty.clone() } else { graph.ty(value).clone() }));
    let made = inputs.len() as u32;
    let operands = (0..node.operands.len()).map(|position| numbered.get(&position).copied().unwrap_or(made)).collect();
    let pointwise = Op::Pointwise { expr: expr.clone(), dims: dims.clone() };
    let nodes =
        vec![SpecNode { op: product.1.op.clone(), operands: (0..own).collect() }, SpecNode { op: pointwise, operands }];
    let spec = Spec { inputs, nodes, results: vec![made + 1] };
    spec.types().ok()?;
    cuda::takes_along(&spec, options).then_some(Bias { operand, weight, ty, expr })
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
    use cpu::recipe::NoFiles;
    use ir::Mesh;
    use ir::text::parse_lines;
    use ir::verify::verify;
    use planfile::{SourceFile, Target};

    use super::*;
    use crate::pipeline::Options;
    use crate::shard::{MeshChoice, SPLIT_TABLE_BYTES, ShardOptions};

    const H200: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/targets/h200x4.json"));

    /// Types of the weights after the pass.
    fn weights(text: &str) -> Vec<String> {
        let target = Target::from_json(H200).unwrap();
        let mesh = MeshChoice::Fixed(Mesh::default());
        let shard = ShardOptions { mesh, split_table_bytes: SPLIT_TABLE_BYTES, batch_dim: 0 };
        let settings = Settings { weights: &NoFiles, options: Options::default(), shard, target: &target };
        let files = vec![SourceFile { name: "model.onnx".to_owned(), bytes: 1 << 30 }];
        let module = run(Module { files, ..parse_lines(text).unwrap() }, &settings).unwrap();
        verify(&module).unwrap_or_else(|error| panic!("{error}\n{module}"));
        module.weights.iter().map(|weight| weight.ty.to_string()).collect()
    }

    #[test]
    fn a_bias_of_a_product_is_rounded() {
        let text = "%x: f16[8, 32]
             %w: f16[32, 64] = weight file 0 at 0
             %b: f32[64] = weight file 0 at 4096
             %h: f16[8, 64] = dot %x, %w {contract [1]x[0]}
             %y = pointwise %h, %b {f16(f32($0) + $1)}
             return %y";
        assert_eq!(weights(text), ["f16[32, 64]", "f16[64]"]);
    }

    #[test]
    fn a_product_that_others_read_keeps_its_bias() {
        let text = "%x: f16[8, 32]
             %w: f16[32, 64] = weight file 0 at 0
             %b: f32[64] = weight file 0 at 4096
             %h: f16[8, 64] = dot %x, %w {contract [1]x[0]}
             %y = pointwise %h, %b {f16(f32($0) + $1)}
             return %y, %h";
        assert_eq!(weights(text), ["f16[32, 64]", "f32[64]"]);
    }

    #[test]
    fn a_scale_stays_what_it_is() {
        let text = "%x: f16[8, 32]
             %w: f16[32, 64] = weight file 0 at 0
             %b: f32[64] = weight file 0 at 4096
             %h: f16[8, 64] = dot %x, %w {contract [1]x[0]}
             %y = pointwise %h, %b {f16(f32($0) * $1)}
             return %y";
        assert_eq!(weights(text), ["f16[32, 64]", "f32[64]"]);
    }
}
