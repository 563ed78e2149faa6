//! The one way to change a graph: it is built anew, and a closure says for each node what becomes of it.
//!
//! ```
//! use planfile::Op;
//! # let module = ir::text::parse_lines("
//! #     %x: f32[2, 3]
//! #     %t = transpose %x [0, 1]
//! #     %y = pointwise %t {exp($0)}
//! #     return %y
//! # ")?;
//! # let graph = &module.graphs[0];
//!
//! // Without transpositions that move nothing.
//! let graph = graph.rewrite(|edit, node| match &node.op {
//!     Op::Transpose { permutation } if permutation.is_sorted() => edit.operands(node),
//!     _ => edit.keep(node),
//! })?;
//! # assert_eq!(graph.nodes().len(), 1);
//! # Ok::<_, ir::IrError>(())
//! ```
//!
//! It returns the values of the new graph that stand for the node's results:
//!
//! | to      | it                                                                                      |
//! | ------- | --------------------------------------------------------------------------------------- |
//! | keep    | returns [`Edit::keep`]                                                                  |
//! | replace | adds nodes, or finds values that are there already, and returns a value for each result |
//! | insert  | adds nodes and keeps the node, on them where it [`Edit::set`]s what its operands become |
//! | drop    | returns nothing; nobody may read the results then                                       |
//!
//! The rest follows: types are inferred, operands and outputs are those that stand for the old ones, what stands for a
//! shard is the same shard, and what nobody reads in the end is gone. A rewriting that reads outputs in a way of its own,
//! or keeps values in more than one form, is a [`Rewrite`].

mod derived;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::ops::Deref;
use std::sync::Arc;

use planfile::{Op, TensorType};

use crate::error::IrError;
use crate::ids::{NodeId, ValueId, WeightId};
use crate::module::{Graph, Module, Node, Origin, Output, Shard, ValueDef, joined_origin};

pub use derived::Derived;

/// What becomes of each part of a graph.
pub trait Rewrite {
    type Error: From<IrError>;

    /// The values that stand for the node's results: one for each, or none where nobody reads them any more.
    ///
    /// # Errors
    /// Whatever the rewriting reports.
    fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, Self::Error>;

    /// The value that leaves the graph in place of an output's.
    ///
    /// # Errors
    /// Whatever the rewriting reports.
    fn output(&mut self, edit: &mut Edit<'_>, output: Output) -> Result<ValueId, Self::Error> {
        Ok(edit.value(output.value)?)
    }
}

/// A closure that sees nodes.
struct Nodes<F>(F);

impl<E: From<IrError>, F: FnMut(&mut Edit<'_>, &Node) -> Result<Vec<ValueId>, E>> Rewrite for Nodes<F> {
    type Error = E;

    fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, E> {
        (self.0)(edit, node)
    }
}

/// The graph as it was, and how often its values are read.
#[derive(Clone, Copy, Debug)]
pub struct Old<'a> {
    graph: &'a Graph,
    reads: &'a [u32],
}

impl<'a> Old<'a> {
    /// How often a value is read: by nodes, and as an output.
    pub fn reads(&self, value: ValueId) -> u32 {
        self.reads[value.index()]
    }

    /// The node that defines the value, if one does.
    pub fn producer(&self, value: ValueId) -> Option<&'a Node> {
        self.graph.producer(value)
    }

    /// The node that makes a value which is read once.
    pub fn private(&self, value: ValueId) -> Option<&'a Node> {
        self.producer(value).filter(|_| self.reads(value) == 1)
    }
}

impl Deref for Old<'_> {
    type Target = Graph;

    fn deref(&self) -> &Graph {
        self.graph
    }
}

/// A graph on its way from what it was to what it becomes.
#[derive(Debug)]
pub struct Edit<'a> {
    old: Old<'a>,
    new: Graph,
    /// For each old value the new one that stands for it.
    values: Vec<Option<ValueId>>,
    /// For each new value, as far as asked, whether it stands for an old one.
    taken: Vec<bool>,
}

impl<'a> Edit<'a> {
    fn new(old: Old<'a>) -> Self {
        let new = Graph { ranks: old.ranks.clone(), ..Graph::new(&old.name) };
        Self { old, new, values: vec![None; old.graph.values.len()], taken: Vec::new() }
    }

    /// The graph as it was.
    pub fn old(&self) -> Old<'a> {
        self.old
    }

    /// The graph as far as it is built.
    pub fn new_graph(&self) -> &Graph {
        &self.new
    }

    /// What stands for an old value by now.
    pub fn get(&self, old: ValueId) -> Option<ValueId> {
        self.values[old.index()]
    }

    /// What stands for an old value; inputs, weights and states are what they were unless said otherwise.
    ///
    /// # Errors
    /// [`IrError::Graph`] where its node was not seen yet, or dropped.
    pub fn value(&mut self, old: ValueId) -> Result<ValueId, IrError> {
        if let Some(known) = self.get(old) {
            return Ok(known);
        }
        let value = self.old.graph.value(old);
        if matches!(value.def, ValueDef::Node(..)) {
            return Err(self.fault(format!("{old} is read, but nothing stands for it")));
        }
        let new = self.new.add_placed_source(value.ty.clone(), value.def, value.shard.clone());
        self.set(old, new);
        Ok(new)
    }

    /// From now on the new value stands for the old one. A node's result is the shard of what it stands for first.
    pub fn set(&mut self, old: ValueId, new: ValueId) {
        self.values[old.index()] = Some(new);
        self.taken.resize(self.new.values.len(), false);
        let taken = std::mem::replace(&mut self.taken[new.index()], true);
        let (was, is) = (self.old.graph.value(old), &mut self.new.values[new.index()]);
        let free = !taken && is.shard.is_none() && matches!(is.def, ValueDef::Node(..));
        if free && has_sizes_of(&is.ty, &was.ty) {
            is.shard.clone_from(&was.shard);
        }
    }

    /// What stands for the node's operands.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub fn operands(&mut self, node: &Node) -> Result<Vec<ValueId>, IrError> {
        node.operands.iter().map(|&operand| self.value(operand)).collect()
    }

    /// The same node on what stands for its operands.
    ///
    /// # Errors
    /// As [`Self::value`], and [`IrError::Type`] where the operands do not fit any more.
    pub fn keep(&mut self, node: &Node) -> Result<Vec<ValueId>, IrError> {
        let operands = self.operands(node)?;
        let old = self.old.graph;
        if operands.iter().zip(&node.operands).any(|(&is, &was)| self.new.ty(is) != old.ty(was)) {
            return self.new.add(node.op.clone(), &operands, &node.origin);
        }
        // Types follow from the operands', which are what they were.
        let result = |&result: &ValueId| (old.ty(result).clone(), old.value(result).shard.clone());
        let results = node.results.iter().map(result).collect();
        Ok(self.new.push(node.op.clone(), operands, results, &node.origin))
    }

    /// Appends a node and its results, see [`Graph::add`].
    ///
    /// # Errors
    /// [`IrError::Type`] where the operands do not fit.
    pub fn add(&mut self, op: Op, operands: &[ValueId], origin: &Origin) -> Result<Vec<ValueId>, IrError> {
        self.new.add(op, operands, origin)
    }

    /// Appends a node that has one result.
    ///
    /// # Errors
    /// [`IrError::Type`] where the operands do not fit, or the operation has another number of results.
    pub fn add_one(&mut self, op: Op, operands: &[ValueId], origin: &Origin) -> Result<ValueId, IrError> {
        self.new.add_one(op, operands, origin)
    }

    /// Adds a value that no node defines, see [`Graph::add_source`].
    pub fn add_source(&mut self, ty: TensorType, def: ValueDef) -> ValueId {
        self.new.add_source(ty, def)
    }

    /// The same with a shard, see [`Graph::add_placed_source`].
    pub fn add_placed_source(&mut self, ty: TensorType, def: ValueDef, shard: Option<Shard>) -> ValueId {
        self.new.add_placed_source(ty, def, shard)
    }

    /// Adds names to the origin of the node that makes a new value; inputs, weights and states have none.
    pub fn also_from(&mut self, new: ValueId, origin: &Origin) {
        if let ValueDef::Node(node, _) = self.new.value(new).def {
            let node = &mut self.new.nodes[node.index()];
            node.origin = joined_origin([&node.origin, origin]);
        }
    }

    /// Empties the node that makes a new value which nobody will read. It would go at the end all the same; a rewriting that
    /// takes nodes into others, over and over, needs the memory before.
    pub fn empty(&mut self, new: ValueId) {
        if let ValueDef::Node(node, _) = self.new.value(new).def {
            let node = &mut self.new.nodes[node.index()];
            (node.op, node.operands, node.origin) = (Op::Reshape { dims: Vec::new() }, Vec::new(), Arc::from([]));
        }
    }

    /// Something that should not be, in this graph.
    pub fn fault(&self, why: impl Display) -> IrError {
        IrError::Graph { graph: self.new.name.clone(), why: why.to_string() }
    }

    /// That a value is one of the new graph, as far as its number tells.
    fn check(&self, new: ValueId) -> Result<(), IrError> {
        let known = new.index() < self.new.values.len();
        known.then_some(()).ok_or_else(|| self.fault(format!("{new} is no value of the new graph")))
    }

    /// Has a node seen, and notes what stands for its results.
    fn visit<R: Rewrite>(&mut self, node: &Node, rewrite: &mut R) -> Result<(), R::Error> {
        let made = rewrite.node(self, node)?;
        if !made.is_empty() && made.len() != node.results.len() {
            let (made, results) = (made.len(), node.results.len());
            return Err(self.fault(format!("{made} values stand for {results} results of {}", node.op.name())).into());
        }
        for (&old, new) in node.results.iter().zip(made) {
            self.check(new)?;
            let (was, is) = (self.old.graph.ty(old), self.new.ty(new));
            if !has_sizes_of(is, was) {
                return Err(self.fault(format!("{is} stands for {was}, a result of {}", node.op.name())).into());
            }
            self.set(old, new);
        }
        Ok(())
    }
}

fn has_sizes_of(ty: &TensorType, other: &TensorType) -> bool {
    ty.dims == other.dims || ty.sizes() == other.sizes()
}

impl Graph {
    /// The graph with each node as the closure makes it, see [`crate::rewrite`].
    ///
    /// # Errors
    /// What the closure reports, and [`IrError::Graph`] where what it returns does not stand for a node's results.
    pub fn rewrite<E: From<IrError>>(
        &self,
        node: impl FnMut(&mut Edit<'_>, &Node) -> Result<Vec<ValueId>, E>,
    ) -> Result<Self, E> {
        self.rewrite_with(&mut Nodes(node))
    }

    /// The graph as a [`Rewrite`] makes it.
    ///
    /// # Errors
    /// As [`Self::rewrite`].
    pub fn rewrite_with<R: Rewrite>(&self, rewrite: &mut R) -> Result<Self, R::Error> {
        let reads = self.read_counts();
        let mut edit = Edit::new(Old { graph: self, reads: &reads });
        for node in &self.nodes {
            edit.visit(node, rewrite)?;
        }
        for &output in &self.outputs {
            let value = rewrite.output(&mut edit, output)?;
            edit.check(value)?;
            edit.new.outputs.push(Output { position: output.position, value });
        }
        Ok(edit.new.compacted())
    }

    /// Without nodes and values that nobody reads; values are numbered in order of use.
    #[must_use]
    pub fn compacted(self) -> Self {
        let kept = self.live_nodes();
        if kept.iter().all(|&kept| kept) && self.is_numbered_by_use() {
            return self;
        }
        let Self { name, values, nodes, outputs, ranks, .. } = self;
        let mut values: Vec<_> = values.into_iter().map(Some).collect();
        let mut compacted = Self { ranks, ..Self::new(&name) };
        let mut numbers: Vec<Option<ValueId>> = vec![None; values.len()];
        let mut moved = |compacted: &mut Self, old: ValueId, def: Option<ValueDef>| {
            *numbers[old.index()].get_or_insert_with(|| {
                // Each is moved once: it has a number from then on.
                compacted.values.extend(values[old.index()].take());
                let new = ValueId(compacted.values.len() as u32 - 1);
                if let Some(def) = def {
                    compacted.values[new.index()].def = def;
                }
                new
            })
        };
        for (mut node, _) in nodes.into_iter().zip(kept).filter(|(_, kept)| *kept) {
            let id = NodeId(compacted.nodes.len() as u32);
            node.operands.iter_mut().for_each(|operand| *operand = moved(&mut compacted, *operand, None));
            for (position, result) in (0u32..).zip(&mut node.results) {
                *result = moved(&mut compacted, *result, Some(ValueDef::Node(id, position)));
            }
            compacted.nodes.push(node);
        }
        for Output { position, value } in outputs {
            let value = moved(&mut compacted, value, None);
            compacted.outputs.push(Output { position, value });
        }
        compacted
    }

    /// Whether values are numbered as they are met, without one that nobody meets.
    fn is_numbered_by_use(&self) -> bool {
        let met = self.nodes.iter().flat_map(|node| node.operands.iter().chain(&node.results).copied());
        let mut next = 0;
        for value in met.chain(self.outputs.iter().map(|output| output.value)) {
            match value.index() {
                known if known < next => {}
                index if index == next => next += 1,
                _ => return false,
            }
        }
        next == self.values.len()
    }

    /// For each node, whether it has effects or anyone reads a result.
    fn live_nodes(&self) -> Vec<bool> {
        let mut read = vec![false; self.values.len()];
        self.outputs.iter().for_each(|output| read[output.value.index()] = true);
        let mut live = vec![false; self.nodes.len()];
        for (node, live) in self.nodes.iter().zip(&mut live).rev() {
            *live = has_effects(&node.op) || node.results.iter().any(|result| read[result.index()]);
            if *live {
                node.operands.iter().for_each(|operand| read[operand.index()] = true);
            }
        }
        live
    }
}

/// Whether a node does more than make its results.
fn has_effects(op: &Op) -> bool {
    op.is_collective() || matches!(op, Op::Append { .. })
}

impl Module {
    /// Every graph as the closure makes it, see [`crate::rewrite`], and no weights that nobody reads.
    ///
    /// # Errors
    /// As [`Graph::rewrite`].
    pub fn rewrite<E: From<IrError>>(
        mut self,
        mut node: impl FnMut(&mut Edit<'_>, &Node) -> Result<Vec<ValueId>, E>,
    ) -> Result<Self, E> {
        for graph in &mut self.graphs {
            *graph = graph.rewrite(&mut node)?;
        }
        Ok(self.without_unread_weights())
    }

    /// Without nodes, values and weights that nobody reads. Ports of entries, files and states stay.
    #[must_use]
    pub fn compacted(mut self) -> Self {
        self.graphs = self.graphs.into_iter().map(Graph::compacted).collect();
        self.without_unread_weights()
    }

    /// Without weights that no graph has as a value.
    #[must_use]
    pub fn without_unread_weights(mut self) -> Self {
        let mut read = vec![false; self.weights.len()];
        for value in self.graphs.iter().flat_map(|graph| &graph.values) {
            if let ValueDef::Weight(id) = value.def {
                read[id.index()] = true;
            }
        }
        let mut numbers = Vec::with_capacity(read.len());
        let mut next = 0;
        for &read in &read {
            numbers.push(WeightId(next));
            next += u32::from(read);
        }
        let mut read = read.into_iter();
        self.weights.retain(|_| read.next().unwrap_or(true));
        for value in self.graphs.iter_mut().flat_map(|graph| &mut graph.values) {
            if let ValueDef::Weight(id) = &mut value.def {
                *id = numbers[id.index()];
            }
        }
        self
    }
}
