//! Puts channels last in images of half types, as tensor cores read them.
//!
//! before  %y = conv %x, %w             after  %v = transpose %x [0, 2, 3, 1]
//!         %z = pointwise %y, %b {…}           %u = transpose %v [0, 3, 1, 2]
//!                                             %f = transpose %w2 [0, 3, 1, 2]        # %w2: the recipe transposes
//!                                             %c = conv %u, %f
//!                                             %y = transpose %c [0, 2, 3, 1]
//!                                             %z = pointwise %y, %b2 {…}             # channels last, like %y
//!
//! A convolution that cuts an image of few channels into patches side by side becomes a product of its rows instead.
//! Otherwise the transpositions around a convolution become part of its kernel, see [`crate::regions`]: it reads and writes images
//! whose channels are last. So do pools; element-wise nodes, concatenations, padding and reductions between them follow
//! the layout that their operands already have. What wants channels first again gets a transposition of its own.

use std::collections::HashMap;
use std::sync::Arc;

use ir::{Graph, Module, Node, NodeId, Origin, Placement, Value, ValueDef, ValueId, Weight, WeightId};
use kernels::cuda::{channels_first, channels_last};
use planfile::op::Window;
use planfile::{DType, Dim, ExprOp, Op, TensorType};

use crate::error::PassError;
use crate::lower;
use crate::pipeline::Settings;
use crate::simplify::dead;

const NAME: &str = "layout";

/// Lays out the images of every graph, for a CUDA device.
///
/// # Errors
/// [`PassError::Invalid`] if a type does not follow.
pub fn run(mut module: Module, settings: &Settings<'_>) -> Result<Module, PassError> {
    if settings.target.device.architecture == lower::CPU {
        return Ok(module);
    }
    let Module { graphs, weights, .. } = &mut module;
    for graph in graphs.iter_mut() {
        let wants = |node: &Node| wants_channels_last(graph, node, settings.options.allow_tf32);
        if graph.nodes.iter().any(wants) {
            let rebuilt = Rebuild::new(graph, weights, settings.options.allow_tf32).run();
            *graph = rebuilt.map_err(|why| PassError::invalid(NAME, why))?;
        }
    }
    Ok(dead::run(&module))
}

/// Whether the node is a convolution that is faster with channels last.
fn wants_channels_last(graph: &Graph, node: &Node, allow_tf32: bool) -> bool {
    let (Op::Conv { transposed: false, window, .. }, &[x, w]) = (&node.op, node.operands.as_slice()) else {
        return false;
    };
    let fast = match graph.ty(x).dtype {
        DType::F16 | DType::BF16 => true,
        DType::F32 => allow_tf32,
        _ => false,
    };
    let weight = graph.value(w);
    let whole = weight.shard.as_ref().is_none_or(|shard| shard.placement == Placement::replicated());
    let even = window.pads.iter().all(|pads| pads.0 == pads.1 && pads.0 >= 0);
    fast && whole && even && graph.ty(x).rank() == 4 && matches!(weight.def, ValueDef::Weight(_))
}

/// Fewer input channels than tensor cores read at a time.
const FEW_CHANNELS: u64 = 16;

/// Whether windows of few channels lie side by side and cover the image.
fn is_patches(window: &Window, image: &TensorType) -> bool {
    let whole = |dim: usize| image.size(dim + 2).is_multiple_of(window.sizes[dim].max(1));
    image.size(1) < FEW_CHANNELS
        && window.sizes == window.strides
        && window.dilations.iter().all(|&dilation| dilation == 1)
        && window.pads.iter().all(|&pads| pads == (0, 0))
        && (0..2).all(whole)
}

/// Images have four dimensions here.
const RANK: usize = 4;

/// A node's result: channels last, or in its own order.
enum Made {
    Last(ValueId),
    First(ValueId),
}

/// A graph that is built anew, and where the old values are in it.
struct Rebuild<'a> {
    old: &'a Graph,
    weights: &'a mut Vec<Weight>,
    allow_tf32: bool,
    new: Graph,
    /// The same elements in the same order.
    first: HashMap<ValueId, ValueId>,
    /// Channels last.
    last: HashMap<ValueId, ValueId>,
    /// Filters with channels last.
    filters: HashMap<WeightId, WeightId>,
    to_last: Vec<u8>,
    from_last: Vec<u8>,
}

impl<'a> Rebuild<'a> {
    fn new(old: &'a Graph, weights: &'a mut Vec<Weight>, allow_tf32: bool) -> Self {
        let new = Graph { ranks: old.ranks.clone(), ..Graph::new(&old.name) };
        let permutation = |made: Option<Vec<u8>>| made.unwrap_or_default();
        Self {
            old,
            weights,
            allow_tf32,
            new,
            first: HashMap::new(),
            last: HashMap::new(),
            filters: HashMap::new(),
            to_last: permutation(channels_last(RANK)),
            from_last: permutation(channels_first(RANK)),
        }
    }

    fn run(mut self) -> Result<Graph, String> {
        for (index, value) in self.old.values.iter().enumerate() {
            if !matches!(value.def, ValueDef::Node(..)) {
                self.new.values.push(value.clone());
                self.first.insert(ValueId(index as u32), ValueId(self.new.values.len() as u32 - 1));
            }
        }
        for node in &self.old.nodes {
            match self.with_channels_last(node)? {
                Some(Made::Last(image)) => {
                    self.last.insert(node.results[0], image);
                }
                Some(Made::First(value)) => {
                    self.first.insert(node.results[0], value);
                }
                None => self.as_it_was(node)?,
            }
        }
        for output in &self.old.outputs {
            let origin = self.old.producer(output.value).map(|node| Arc::clone(&node.origin)).unwrap_or_default();
            let value = self.channels_first(output.value, &origin)?;
            // What leaves the graph is placed as it was.
            self.new.values[value.index()].shard.clone_from(&self.old.value(output.value).shard);
            self.new.outputs.push(ir::Output { position: output.position, value });
        }
        Ok(self.new)
    }

    fn emit(&mut self, op: Op, operands: &[ValueId], origin: &Origin) -> Result<ValueId, String> {
        let made = self.new.add(op, operands, origin).map_err(|error| error.to_string())?;
        made.first().copied().ok_or_else(|| "a node without results".to_owned())
    }

    /// The value in its own order.
    fn channels_first(&mut self, value: ValueId, origin: &Origin) -> Result<ValueId, String> {
        if let Some(&known) = self.first.get(&value) {
            return Ok(known);
        }
        let image = self.last.get(&value).copied().ok_or_else(|| format!("{value} is read before it is made"))?;
        let made = self.emit(Op::Transpose { permutation: self.from_last.clone() }, &[image], origin)?;
        self.first.insert(value, made);
        Ok(made)
    }

    /// The image with its channels last.
    fn channels_last(&mut self, value: ValueId, origin: &Origin) -> Result<ValueId, String> {
        if let Some(&known) = self.last.get(&value) {
            return Ok(known);
        }
        let first = self.channels_first(value, origin)?;
        let made = self.emit(Op::Transpose { permutation: self.to_last.clone() }, &[first], origin)?;
        self.last.insert(value, made);
        Ok(made)
    }

    fn as_it_was(&mut self, node: &Node) -> Result<(), String> {
        let mut operands = Vec::with_capacity(node.operands.len());
        for &operand in &node.operands {
            operands.push(self.channels_first(operand, &node.origin)?);
        }
        let id = NodeId(self.new.nodes.len() as u32);
        let mut results = Vec::with_capacity(node.results.len());
        for (position, &result) in (0u32..).zip(&node.results) {
            let old = self.old.value(result);
            let def = ValueDef::Node(id, position);
            self.new.values.push(Value { ty: old.ty.clone(), def, shard: old.shard.clone() });
            let made = ValueId(self.new.values.len() as u32 - 1);
            results.push(made);
            self.first.insert(result, made);
        }
        self.new.nodes.push(Node { op: node.op.clone(), operands, results, origin: Arc::clone(&node.origin) });
        Ok(())
    }

    /// The node on images with channels last, where that is how it should be.
    fn with_channels_last(&mut self, node: &Node) -> Result<Option<Made>, String> {
        let ([_], Some(&x)) = (node.results.as_slice(), node.operands.first()) else { return Ok(None) };
        let follows = self.last.contains_key(&x) && self.old.ty(x).rank() == RANK;
        let to_last = self.to_last.clone();
        let moved = |list: &[u8]| -> Vec<u8> {
            let at = |axis: &u8| to_last.iter().position(|from| from == axis).unwrap_or_default() as u8;
            list.iter().map(at).collect()
        };
        let image = match &node.op {
            Op::Conv { window, groups: 1, .. }
                if wants_channels_last(self.old, node, self.allow_tf32) && is_patches(window, self.old.ty(x)) =>
            {
                self.patches(node, window)
            }
            Op::Conv { .. } if wants_channels_last(self.old, node, self.allow_tf32) => {
                let filter = self.filter(node.operands[1])?;
                let back = Op::Transpose { permutation: self.from_last.clone() };
                let filter = self.emit(back, &[filter], &node.origin)?;
                self.between(node, x, &[filter])
            }
            Op::Pool { .. } if follows => self.between(node, x, &[]),
            Op::Pointwise { expr, dims } if dims.len() == RANK => {
                let is_image = |value: &ValueId| self.last.contains_key(value) && self.old.ty(*value).dims == *dims;
                if !node.operands.iter().any(is_image) {
                    return Ok(None);
                }
                let mut operands = Vec::with_capacity(node.operands.len());
                for &operand in &node.operands {
                    let Some(made) = self.broadcast(operand, dims, &node.origin)? else { return Ok(None) };
                    operands.push(made);
                }
                let mut expr = expr.clone();
                for op in &mut expr.ops {
                    if let ExprOp::Index { axis, .. } = op {
                        *axis = moved(&[*axis])[0];
                    }
                }
                let dims = self.to_last.iter().map(|&from| dims[usize::from(from)]).collect();
                self.emit(Op::Pointwise { expr, dims }, &operands, &node.origin)
            }
            Op::Reduce { kind, axes, keep: true } if follows => {
                let mut axes = moved(axes);
                axes.sort_unstable();
                let x = self.channels_last(x, &node.origin)?;
                self.emit(Op::Reduce { kind: *kind, axes, keep: true }, &[x], &node.origin)
            }
            Op::Reduce { kind, axes, keep: false } if follows && axes.as_slice() == [2, 3] => {
                // What is left has the order that it had.
                let x = self.channels_last(x, &node.origin)?;
                let op = Op::Reduce { kind: *kind, axes: vec![1, 2], keep: false };
                return self.emit(op, &[x], &node.origin).map(|made| Some(Made::First(made)));
            }
            Op::Concat { axis } if node.operands.iter().all(|operand| self.last.contains_key(operand)) => {
                let operands: Vec<ValueId> = node.operands.iter().map(|operand| self.last[operand]).collect();
                self.emit(Op::Concat { axis: moved(&[*axis])[0] }, &operands, &node.origin)
            }
            _ => return Ok(None),
        };
        image.map(|image| Some(Made::Last(image)))
    }

    /// A convolution whose windows lie side by side, as a product: each patch is a row of the left matrix, and the result
    /// has its channels last.
    fn patches(&mut self, node: &Node, window: &Window) -> Result<ValueId, String> {
        let &[x, w] = node.operands.as_slice() else { return Err("a convolution has two operands".to_owned()) };
        let origin = &node.origin;
        let (sizes, filter) = (self.old.ty(x).sizes(), self.old.ty(w).sizes());
        let [rows, columns] = [0, 1].map(|dim| (sizes[dim + 2] / window.sizes[dim], window.sizes[dim]));
        let elements: u64 = filter[1..].iter().product();
        let dims = |sizes: &[u64]| Op::Reshape { dims: sizes.iter().copied().map(Dim::Static).collect() };
        let image = self.channels_first(x, origin)?;
        let cut = self.emit(dims(&[sizes[0], sizes[1], rows.0, rows.1, columns.0, columns.1]), &[image], origin)?;
        let moved = self.emit(Op::Transpose { permutation: vec![0, 2, 4, 1, 3, 5] }, &[cut], origin)?;
        let left = self.emit(dims(&[sizes[0], rows.0, columns.0, elements]), &[moved], origin)?;
        let filters = self.channels_first(w, origin)?;
        let right = self.emit(dims(&[filter[0], elements]), &[filters], origin)?;
        let out = self.old.ty(x).dtype;
        let product = Op::Dot { batch: vec![], contract: vec![(3, 1)], accumulate: out.accumulator(), out };
        self.emit(product, &[left, right], origin)
    }

    /// The node on `x` between transpositions that its kernel takes along.
    fn between(&mut self, node: &Node, x: ValueId, others: &[ValueId]) -> Result<ValueId, String> {
        let image = self.channels_last(x, &node.origin)?;
        let back = Op::Transpose { permutation: self.from_last.clone() };
        let seen = self.emit(back, &[image], &node.origin)?;
        let made = self.emit(node.op.clone(), &[&[seen], others].concat(), &node.origin)?;
        self.emit(Op::Transpose { permutation: self.to_last.clone() }, &[made], &node.origin)
    }

    /// An operand of an element-wise node over an image of these dimensions, with its channels last.
    fn broadcast(&mut self, operand: ValueId, dims: &[Dim], origin: &Origin) -> Result<Option<ValueId>, String> {
        let ty = self.old.ty(operand).clone();
        if ty.dims == dims {
            return self.channels_last(operand, origin).map(Some);
        }
        if ty.elements() == Some(1) || ty.rank() == 0 {
            return self.channels_first(operand, origin).map(Some);
        }
        // One element for each channel, or another shape that broadcasts: padded with ones, then in the other order.
        let missing = RANK.saturating_sub(ty.rank());
        let padded = [vec![Dim::Static(1); missing], ty.dims.clone()].concat();
        let wide = padded.iter().filter(|dim| **dim != Dim::Static(1)).count();
        let moved: Vec<Dim> = self.to_last.iter().map(|&from| padded[usize::from(from)]).collect();
        let first = self.channels_first(operand, origin)?;
        if wide <= 1 {
            return self.emit(Op::Reshape { dims: moved }, &[first], origin).map(Some);
        }
        let whole = self.emit(Op::Reshape { dims: padded }, &[first], origin)?;
        self.emit(Op::Transpose { permutation: self.to_last.clone() }, &[whole], origin).map(Some)
    }

    /// A filter whose recipe puts its channels last.
    fn filter(&mut self, value: ValueId) -> Result<ValueId, String> {
        let ValueDef::Weight(id) = self.old.value(value).def else { return Err(format!("{value} is no weight")) };
        let new = match self.filters.get(&id) {
            Some(&known) => known,
            None => {
                let weight = transposed(&self.weights[id.index()], &self.to_last)?;
                self.weights.push(weight);
                let new = WeightId(self.weights.len() as u32 - 1);
                self.filters.insert(id, new);
                new
            }
        };
        let ty = self.weights[new.index()].ty.clone();
        Ok(self.new.add_source(ty, ValueDef::Weight(new)))
    }
}

/// The weight, its dimensions in another order.
fn transposed(weight: &Weight, permutation: &[u8]) -> Result<Weight, String> {
    let recipe = weight.recipe.clone().then(Op::Transpose { permutation: permutation.to_vec() })?;
    let ty: TensorType = recipe.spec.result_types()?.remove(0);
    Ok(Weight { name: weight.name.clone(), ty, recipe })
}

#[cfg(test)]
mod tests {
    use cpu::recipe::NoFiles;
    use ir::Mesh;
    use ir::text::{graph_text, parse_lines};
    use ir::verify::verify;
    use planfile::{SourceFile, Target};

    use super::*;
    use crate::pipeline::Options;
    use crate::shard::{MeshChoice, SPLIT_TABLE_BYTES, ShardOptions};

    const H200: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/targets/h200x4.json"));

    fn laid_out(text: &str) -> Module {
        let target = Target::from_json(H200).unwrap();
        let mesh = MeshChoice::Fixed(Mesh::default());
        let shard = ShardOptions { mesh, split_table_bytes: SPLIT_TABLE_BYTES, batch_dim: 0 };
        let settings = Settings { weights: &NoFiles, options: Options::default(), shard, target: &target };
        let files = vec![SourceFile { name: "model.onnx".to_owned(), bytes: 1 << 30 }];
        let module = run(Module { files, ..parse_lines(text).unwrap() }, &settings).unwrap();
        verify(&module).unwrap_or_else(|error| panic!("{error}\n{module}"));
        module
    }

    #[track_caller]
    fn check(before: &str, expected: &[&str]) {
        let module = laid_out(before);
        let names: Vec<&str> = module.graphs[0].nodes.iter().map(|node| node.op.name()).collect();
        assert_eq!(names, expected, "{}", graph_text(&module, &module.graphs[0]));
    }

    #[test]
    fn images_stay_in_their_layout_between_convolutions() {
        check(
            "%x: f16[1, 16, 8, 8]
             %w: f16[32, 16, 3, 3] = weight file 0 at 0
             %b: f16[32, 1, 1] = weight file 0 at 9216
             %v: f16[16, 32, 1, 1] = weight file 0 at 9280
             %c: f16[1, 32, 8, 8] = conv %x, %w {window [3, 3], strides [1, 1], dilations [1, 1], pads [(1, 1), (1, 1)], groups 1}
             %y = pointwise %c, %b {max($0 + $1, f16(0.0))}
             %z: f16[1, 16, 8, 8] = conv %y, %v {window [1, 1], strides [1, 1], dilations [1, 1], pads [(0, 0), (0, 0)], groups 1}
             return %z",
            &[
                "transpose", "transpose", "transpose", "conv", "transpose", // the input, then the first convolution
                "reshape", "pointwise", // the bias has its channels last
                "transpose", "transpose", "conv", "transpose", // the second
                "transpose", // the output has its channels where the model wants them
            ],
        );
    }

    #[test]
    fn patches_are_rows_of_a_product() {
        check(
            "%x: f16[2, 3, 32, 32]
             %w: f16[64, 3, 16, 16] = weight file 0 at 0
             %y: f16[2, 64, 2, 2] = conv %x, %w {window [16, 16], strides [16, 16], pads [(0, 0), (0, 0)]}
             return %y",
            &["reshape", "transpose", "reshape", "reshape", "dot", "transpose"],
        );
    }

    #[test]
    fn full_precision_is_left_alone() {
        check(
            "%x: f32[1, 16, 8, 8]
             %w: f32[32, 16, 1, 1] = weight file 0 at 0
             %c: f32[1, 32, 8, 8] = conv %x, %w {window [1, 1], strides [1, 1], dilations [1, 1], pads [(0, 0), (0, 0)], groups 1}
             return %c",
            &["conv"],
        );
    }
}
