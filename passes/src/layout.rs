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
//! Otherwise the transpositions around a convolution become part of its kernel, see [`crate::fuse`]: it reads and writes images
//! whose channels are last. So do pools; element-wise nodes, concatenations, padding and reductions between them follow
//! the layout that their operands already have. What wants channels first again gets a transposition of its own.

use std::collections::HashMap;

use ir::{Derived, Edit, Graph, IrError, Node, Origin, Output, Placement, Rewrite, ValueDef, ValueId, Weight};
use kernels::cuda::{channels_first, channels_last};
use planfile::op::Window;
use planfile::{DType, Dim, ExprOp, Op, TensorType};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::settings::Settings;

/// Lays out the images of every graph, for a CUDA device.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Sharded(mut module): Sharded, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    if settings.target.device.architecture.is_host() {
        return Ok(Sharded(module));
    }
    let mut filters = Derived::new(&mut module.weights);
    for graph in &mut module.graphs {
        *graph = graph.rewrite_with(&mut Layout::new(&mut filters, settings.options.allow_tf32))?;
    }
    Ok(Sharded(module.without_unread_weights()))
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

/// Where images are whose channels are last.
struct Layout<'f, 'w> {
    /// Filters with channels last.
    filters: &'f mut Derived<'w, ()>,
    allow_tf32: bool,
    /// By the old value; what stands for it in the graph has its own order, and may not be there.
    last: HashMap<ValueId, ValueId>,
    to_last: Vec<u8>,
    from_last: Vec<u8>,
}

impl Rewrite for Layout<'_, '_> {
    type Error = IrError;

    fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
        if let Some(image) = self.image(edit, node)? {
            self.last.insert(node.results[0], image);
            return Ok(vec![]);
        }
        if let Some(means) = self.means(edit, node)? {
            return Ok(vec![means]);
        }
        for &operand in &node.operands {
            self.channels_first(edit, operand, &node.origin)?;
        }
        edit.keep(node)
    }

    fn output(&mut self, edit: &mut Edit<'_>, output: Output) -> Result<ValueId, IrError> {
        let origin = edit.old().producer(output.value).map(|node| node.origin.clone()).unwrap_or_default();
        self.channels_first(edit, output.value, &origin)
    }
}

impl<'f, 'w> Layout<'f, 'w> {
    fn new(filters: &'f mut Derived<'w, ()>, allow_tf32: bool) -> Self {
        let permutation = |made: Option<Vec<u8>>| made.unwrap_or_default();
        Self {
            filters,
            allow_tf32,
            last: HashMap::new(),
            to_last: permutation(channels_last(RANK)),
            from_last: permutation(channels_first(RANK)),
        }
    }

    /// The value in its own order.
    fn channels_first(&self, edit: &mut Edit<'_>, value: ValueId, origin: &Origin) -> Result<ValueId, IrError> {
        let (None, Some(&image)) = (edit.get(value), self.last.get(&value)) else { return edit.value(value) };
        let made = edit.add_one(self.back(), &[image], origin)?;
        edit.set(value, made);
        Ok(made)
    }

    /// The image with its channels last.
    fn channels_last(&mut self, edit: &mut Edit<'_>, value: ValueId, origin: &Origin) -> Result<ValueId, IrError> {
        if let Some(&known) = self.last.get(&value) {
            return Ok(known);
        }
        let first = edit.value(value)?;
        let made = edit.add_one(self.forth(), &[first], origin)?;
        self.last.insert(value, made);
        Ok(made)
    }

    /// Puts channels last.
    fn forth(&self) -> Op {
        Op::Transpose { permutation: self.to_last.clone() }
    }

    /// Puts channels where they were.
    fn back(&self) -> Op {
        Op::Transpose { permutation: self.from_last.clone() }
    }

    /// Where an axis is once channels are last.
    fn axis(&self, axis: u8) -> u8 {
        self.to_last.iter().position(|&from| from == axis).unwrap_or_default() as u8
    }

    /// What is said of each dimension, in the order of dimensions once channels are last.
    fn moved<T: Clone>(&self, each: &[T]) -> Vec<T> {
        self.to_last.iter().map(|&from| each[usize::from(from)].clone()).collect()
    }

    /// Whether the node reads an image whose channels are last first.
    fn follows(&self, edit: &Edit<'_>, node: &Node) -> bool {
        node.operands.first().is_some_and(|x| self.last.contains_key(x) && edit.old().ty(*x).rank() == RANK)
    }

    /// What is left of images with channels last when rows and columns are reduced: it has the order that it had.
    fn means(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Option<ValueId>, IrError> {
        match &node.op {
            Op::Reduce { kind, axes, keep: false } if axes.as_slice() == [2, 3] && self.follows(edit, node) => {
                let x = self.channels_last(edit, node.operands[0], &node.origin)?;
                let op = Op::Reduce { kind: *kind, axes: vec![1, 2], keep: false };
                edit.add_one(op, &[x], &node.origin).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The node's result with channels last, where that is how it should be.
    fn image(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Option<ValueId>, IrError> {
        let ([_], Some(&x)) = (node.results.as_slice(), node.operands.first()) else { return Ok(None) };
        let (old, origin) = (edit.old(), &node.origin);
        let follows = self.follows(edit, node);
        let image = match &node.op {
            Op::Conv { window, groups, .. } if wants_channels_last(&old, node, self.allow_tf32) => {
                if *groups == 1 && is_patches(window, old.ty(x)) {
                    self.patches(edit, node, window)?
                } else {
                    let filter = self.filter(edit, node.operands[1])?;
                    let filter = edit.add_one(self.back(), &[filter], origin)?;
                    self.between(edit, node, &[filter])?
                }
            }
            Op::Pool { .. } if follows => self.between(edit, node, &[])?,
            Op::Pointwise { expr, dims } if dims.len() == RANK => {
                let is_image = |value: &ValueId| self.last.contains_key(value) && old.ty(*value).dims == *dims;
                if !node.operands.iter().any(is_image) {
                    return Ok(None);
                }
                let mut operands = Vec::with_capacity(node.operands.len());
                for &operand in &node.operands {
                    operands.push(self.broadcast(edit, operand, dims, origin)?);
                }
                let mut expr = expr.clone();
                for op in &mut expr.ops {
                    if let ExprOp::Index { axis, .. } = op {
                        *axis = self.axis(*axis);
                    }
                }
                edit.add_one(Op::Pointwise { expr, dims: self.moved(dims) }, &operands, origin)?
            }
            Op::Reduce { kind, axes, keep: true } if follows => {
                let mut axes: Vec<u8> = axes.iter().map(|&axis| self.axis(axis)).collect();
                axes.sort_unstable();
                let x = self.channels_last(edit, x, origin)?;
                edit.add_one(Op::Reduce { kind: *kind, axes, keep: true }, &[x], origin)?
            }
            Op::Pad { low, high, mode } if follows => {
                // What it is padded with has no dimensions.
                let mut operands = vec![self.channels_last(edit, x, origin)?];
                for &other in &node.operands[1..] {
                    operands.push(self.channels_first(edit, other, origin)?);
                }
                let op = Op::Pad { low: self.moved(low), high: self.moved(high), mode: *mode };
                edit.add_one(op, &operands, origin)?
            }
            Op::Concat { axis } if node.operands.iter().all(|operand| self.last.contains_key(operand)) => {
                let operands: Vec<ValueId> = node.operands.iter().map(|operand| self.last[operand]).collect();
                edit.add_one(Op::Concat { axis: self.axis(*axis) }, &operands, origin)?
            }
            _ => return Ok(None),
        };
        Ok(Some(image))
    }

    /// A convolution whose windows lie side by side, as a product: each patch is a row of the left matrix, and the result
    /// has its channels last.
    fn patches(&mut self, edit: &mut Edit<'_>, node: &Node, window: &Window) -> Result<ValueId, IrError> {
        let &[x, w] = node.operands.as_slice() else { return Err(edit.fault("a convolution has two operands")) };
        let (old, origin) = (edit.old(), &node.origin);
        let (sizes, filter) = (old.ty(x).sizes(), old.ty(w).sizes());
        let [rows, columns] = [0, 1].map(|dim| (sizes[dim + 2] / window.sizes[dim], window.sizes[dim]));
        let elements: u64 = filter[1..].iter().product();
        let dims = |sizes: &[u64]| Op::Reshape { dims: sizes.iter().copied().map(Dim::Static).collect() };
        let image = self.channels_first(edit, x, origin)?;
        let cut = [sizes[0], sizes[1], rows.0, rows.1, columns.0, columns.1];
        let cut = edit.add_one(dims(&cut), &[image], origin)?;
        let moved = edit.add_one(Op::Transpose { permutation: vec![0, 2, 4, 1, 3, 5] }, &[cut], origin)?;
        let left = edit.add_one(dims(&[sizes[0], rows.0, columns.0, elements]), &[moved], origin)?;
        let filters = self.channels_first(edit, w, origin)?;
        let right = edit.add_one(dims(&[filter[0], elements]), &[filters], origin)?;
        let out = old.ty(x).dtype;
        let product = Op::Dot { batch: vec![], contract: vec![(3, 1)], accumulate: out.accumulator(), out };
        edit.add_one(product, &[left, right], origin)
    }

    /// The node on its first operand between transpositions that its kernel takes along.
    fn between(&mut self, edit: &mut Edit<'_>, node: &Node, others: &[ValueId]) -> Result<ValueId, IrError> {
        let image = self.channels_last(edit, node.operands[0], &node.origin)?;
        let seen = edit.add_one(self.back(), &[image], &node.origin)?;
        let made = edit.add_one(node.op.clone(), &[&[seen], others].concat(), &node.origin)?;
        edit.add_one(self.forth(), &[made], &node.origin)
    }

    /// An operand of an element-wise node over an image of these dimensions, with its channels last.
    fn broadcast(
        &mut self,
        edit: &mut Edit<'_>,
        operand: ValueId,
        dims: &[Dim],
        origin: &Origin,
    ) -> Result<ValueId, IrError> {
        let ty = edit.old().ty(operand).clone();
        if ty.dims == dims {
            return self.channels_last(edit, operand, origin);
        }
        let first = self.channels_first(edit, operand, origin)?;
        if ty.elements() == Some(1) || ty.rank() == 0 {
            return Ok(first);
        }
        // One element for each channel, or another shape that broadcasts: padded with ones, then in the other order.
        let missing = RANK.saturating_sub(ty.rank());
        let padded = [vec![Dim::Static(1); missing], ty.dims].concat();
        let wide = padded.iter().filter(|dim| **dim != Dim::Static(1)).count();
        if wide <= 1 {
            return edit.add_one(Op::Reshape { dims: self.moved(&padded) }, &[first], origin);
        }
        let whole = edit.add_one(Op::Reshape { dims: padded }, &[first], origin)?;
        edit.add_one(self.forth(), &[whole], origin)
    }

    /// A filter whose recipe puts its channels last.
    fn filter(&mut self, edit: &mut Edit<'_>, value: ValueId) -> Result<ValueId, IrError> {
        let ValueDef::Weight(id) = edit.old().value(value).def else {
            return Err(edit.fault(format!("{value} is no weight")));
        };
        let last = |weight: &Weight| transposed(weight, &self.to_last).map_err(|why| edit.fault(why));
        let new = self.filters.get(id, (), last)?;
        Ok(edit.add_source(self.filters.weight(new).ty.clone(), ValueDef::Weight(new)))
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
    use crate::harness::{CPU, Case, H200};

    /// Sums come in another order.
    const ROUNDED: f64 = 2e-3;

    #[track_caller]
    fn check(before: &str, after: &str) {
        Case::new(super::run, H200).within(ROUNDED).check(before, after);
        Case::new(super::run, CPU).check_unchanged(before);
    }

    #[test]
    fn images_stay_in_their_layout_between_convolutions() {
        check(
            "%x: f16[1, 16, 8, 8]
             %w: f16[32, 16, 3, 3] = weight file 1 at 0
             %b: f16[32, 1, 1] = weight file 1 at 9216
             %v: f16[16, 32, 1, 1] = weight file 1 at 9280
             %c: f16[1, 32, 8, 8] = conv %x, %w {window [3, 3], pads [(1, 1), (1, 1)]}
             %y = pointwise %c, %b {max($0 + $1, f16(0.0))}
             %z: f16[1, 16, 8, 8] = conv %y, %v {window [1, 1]}
             return %z",
            "%x: f16[1, 16, 8, 8]
             %w: f16[32, 3, 3, 16] = weight recipe {
               %0: f16[32, 16, 3, 3] = file 1 at 0
               %1: f16[32, 3, 3, 16] = transpose %0 [0, 2, 3, 1]
               return %1
             }
             %f = transpose %w [0, 3, 1, 2]
             %l = transpose %x [0, 2, 3, 1]
             %i = transpose %l [0, 3, 1, 2]
             %c: f16[1, 32, 8, 8] = conv %i, %f {window [3, 3], pads [(1, 1), (1, 1)]}
             %d = transpose %c [0, 2, 3, 1]
             %b: f16[32, 1, 1] = weight file 1 at 9216
             %e: f16[1, 1, 1, 32] = reshape %b
             %y = pointwise %d, %e {max($0 + $1, f16(0.0))}
             %v: f16[16, 1, 1, 32] = weight recipe {
               %0: f16[16, 32, 1, 1] = file 1 at 9280
               %1: f16[16, 1, 1, 32] = transpose %0 [0, 2, 3, 1]
               return %1
             }
             %g = transpose %v [0, 3, 1, 2]
             %j = transpose %y [0, 3, 1, 2]
             %k: f16[1, 16, 8, 8] = conv %j, %g {window [1, 1]}
             %m = transpose %k [0, 2, 3, 1]
             %z = transpose %m [0, 3, 1, 2]
             return %z",
        );
    }

    #[test]
    fn patches_are_rows_of_a_product() {
        check(
            "%x: f16[2, 3, 32, 32]
             %w: f16[64, 3, 16, 16] = weight file 1 at 0
             %y: f16[2, 64, 2, 2] = conv %x, %w {window [16, 16], strides [16, 16]}
             return %y",
            "%x: f16[2, 3, 32, 32]
             %c: f16[2, 3, 2, 16, 2, 16] = reshape %x
             %t = transpose %c [0, 2, 4, 1, 3, 5]
             %p: f16[2, 2, 2, 768] = reshape %t
             %w: f16[64, 3, 16, 16] = weight file 1 at 0
             %f: f16[64, 768] = reshape %w
             %l = dot %p, %f {contract [3]x[1]}
             %y = transpose %l [0, 3, 1, 2]
             return %y",
        );
    }

    #[test]
    fn padding_and_reductions_follow() {
        check(
            "%x: f16[1, 16, 4, 4]
             %w: f16[32, 16, 1, 1] = weight file 1 at 0
             %zero: f16[]
             %c: f16[1, 32, 4, 4] = conv %x, %w {window [1, 1]}
             %p: f16[1, 32, 5, 7] = pad %c, %zero {low [0, 0, 1, 0], high [0, 0, 0, 3], constant}
             %m: f16[1, 32] = reduce %p {max [2, 3]}
             return %m",
            "%x: f16[1, 16, 4, 4]
             %zero: f16[]
             %w: f16[32, 1, 1, 16] = weight recipe {
               %0: f16[32, 16, 1, 1] = file 1 at 0
               %1: f16[32, 1, 1, 16] = transpose %0 [0, 2, 3, 1]
               return %1
             }
             %f = transpose %w [0, 3, 1, 2]
             %l = transpose %x [0, 2, 3, 1]
             %i = transpose %l [0, 3, 1, 2]
             %c: f16[1, 32, 4, 4] = conv %i, %f {window [1, 1]}
             %d = transpose %c [0, 2, 3, 1]
             %p: f16[1, 5, 7, 32] = pad %d, %zero {low [0, 1, 0, 0], high [0, 0, 3, 0], constant}
             %m: f16[1, 32] = reduce %p {max [1, 2]}
             return %m",
        );
    }

    #[test]
    fn full_precision_is_left_alone() {
        let text = "%x: f32[1, 16, 8, 8]
             %w: f32[32, 16, 1, 1] = weight file 0 at 0
             %c: f32[1, 32, 8, 8] = conv %x, %w {window [1, 1]}
             return %c";
        Case::new(super::run, H200).check_unchanged(text);
    }
}
