//! Modules and graphs.

use std::collections::HashMap;
use std::sync::Arc;

use planfile::{ExtentId, FrozenInput, Op, Recipe, SourceFile, TensorType, infer};

use crate::error::IrError;
use crate::ids::{GraphId, NodeId, StateId, ValueId, WeightId};
use crate::mesh::{Mesh, Placement};

/// A model: its entry points, graphs, weights and states, and the mesh it is placed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    pub mesh: Mesh,
    /// Files that weight recipes read.
    pub files: Vec<SourceFile>,
    pub weights: Vec<Weight>,
    pub states: Vec<State>,
    pub graphs: Vec<Graph>,
    pub entries: Vec<Entry>,
}

/// A constant tensor of the model. Types are of the whole tensor, never of a rank's part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    pub name: String,
    pub ty: TensorType,
    pub recipe: Recipe,
}

/// Memory that lives from run to run: a pair of a model input and a model output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub name: String,
    pub ty: TensorType,
    /// Where the current length of the bounded dimension is.
    pub extent: ExtentId,
}

/// A way into the model: a signature and the graphs that compute it, one per stage (one before sharding).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub inputs: Vec<Port>,
    pub outputs: Vec<Port>,
    /// Inputs whose values were bound at compile time, because shapes or branches depend on them.
    pub frozen: Vec<FrozenInput>,
    pub stages: Vec<GraphId>,
}

/// A named input or output of an entry; the type is of the whole tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    pub ty: TensorType,
}

/// A straight list of nodes in topological order. It grows by [`Graph::add`] and its like, and is changed by
/// [`crate::rewrite`] alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    pub(crate) name: String,
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<Output>,
    /// Ranks that run this graph, ascending; empty before sharding.
    pub(crate) ranks: Vec<u32>,
    /// Finds sources again; no part of what the graph says.
    pub(crate) sources: SourceIndex,
}

/// Values of a graph that no node defines, by what they are: [`Graph::add_source`] looks them up in constant time.
///
/// Values may be added and changed without it; what it finds is checked. All indexes are equal.
#[derive(Clone, Debug, Default)]
pub struct SourceIndex {
    known: HashMap<(ValueDef, TensorType, Option<Shard>), ValueId>,
    /// Number of values that were looked at.
    seen: usize,
}

impl PartialEq for SourceIndex {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for SourceIndex {}

/// A value that leaves the graph as the entry's output number `position`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    pub position: u32,
    pub value: ValueId,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Before sharding the whole tensor's; after it, what each rank holds.
    pub ty: TensorType,
    pub def: ValueDef,
    /// After sharding: what this is a shard of.
    pub shard: Option<Shard>,
}

/// A rank's part: of which sizes, placed how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    pub global: Vec<u64>,
    pub placement: Placement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ValueDef {
    /// The entry's input number so-and-so.
    Input(u32),
    Weight(WeightId),
    State(StateId),
    /// A node's result, by position.
    Node(NodeId, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub op: Op,
    pub operands: Vec<ValueId>,
    pub results: Vec<ValueId>,
    /// Names of the ONNX nodes it came from.
    pub origin: Origin,
}

/// Names of ONNX nodes, shared between the nodes that came from them.
pub type Origin = Arc<[Arc<str>]>;

/// Names that an origin holds at most. Chains and equal nodes hand their names on to what becomes of them: without a
/// limit, names would grow with the square of a model.
pub const MAX_ORIGIN_NAMES: usize = 256;

/// Last of the names of an origin that left some out.
const OTHERS: &str = "…";

/// Names of all, each once, in order; where there are more than [`MAX_ORIGIN_NAMES`], `…` stands for the others.
pub fn joined_origin<'a>(origins: impl IntoIterator<Item = &'a Origin>) -> Origin {
    let mut origins = origins.into_iter();
    let Some(first) = origins.next() else { return Arc::from([]) };
    let is_full =
        |names: &[Arc<str>]| names.len() >= MAX_ORIGIN_NAMES && names.last().is_some_and(|last| **last == *OTHERS);
    if is_full(first) {
        return Arc::clone(first);
    }
    let mut names: Vec<Arc<str>> = first.to_vec();
    for name in origins.flat_map(|origin| origin.iter()) {
        if names.len() >= MAX_ORIGIN_NAMES {
            if is_full(&names) {
                break;
            }
            if !names.contains(name) {
                names.truncate(MAX_ORIGIN_NAMES - 1);
                names.push(Arc::from(OTHERS));
            }
        } else if !names.contains(name) {
            names.push(Arc::clone(name));
        }
    }
    // Shared where nothing came to it.
    if names[..] == first[..] { Arc::clone(first) } else { Arc::from(names) }
}

/// An origin of one name.
pub fn origin(name: &str) -> Origin {
    Arc::from([Arc::from(name)])
}

impl Graph {
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// A graph that these ranks run, ascending.
    pub fn on_ranks(name: &str, ranks: Vec<u32>) -> Self {
        Self { ranks, ..Self::new(name) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// In topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Ranks that run this graph, ascending; empty before sharding.
    pub fn ranks(&self) -> &[u32] {
        &self.ranks
    }

    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    pub fn ty(&self, id: ValueId) -> &TensorType {
        &self.value(id).ty
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The node that defines the value, if one does.
    pub fn producer(&self, id: ValueId) -> Option<&Node> {
        match self.value(id).def {
            ValueDef::Node(node, _) => Some(self.node(node)),
            ValueDef::Input(_) | ValueDef::Weight(_) | ValueDef::State(_) => None,
        }
    }

    /// For each value, how often it is read: by nodes, and as an output.
    pub fn read_counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.values.len()];
        let outputs = self.outputs.iter().map(|output| output.value);
        for value in self.nodes.iter().flat_map(|node| node.operands.iter().copied()).chain(outputs) {
            counts[value.index()] += 1;
        }
        counts
    }

    /// Adds a value that no node defines. The same input, weight or state of the same type is added once.
    pub fn add_source(&mut self, ty: TensorType, def: ValueDef) -> ValueId {
        self.add_placed_source(ty, def, None)
    }

    /// Adds a value that no node defines, as a shard of the whole where one is given. The same is added once.
    pub fn add_placed_source(&mut self, ty: TensorType, def: ValueDef, shard: Option<Shard>) -> ValueId {
        let SourceIndex { known, seen } = &mut self.sources;
        for (index, value) in self.values.iter().enumerate().skip(*seen) {
            if !matches!(value.def, ValueDef::Node(..)) {
                let key = (value.def, value.ty.clone(), value.shard.clone());
                known.entry(key).or_insert(ValueId(index as u32));
            }
        }
        *seen = self.values.len();
        let key = (def, ty, shard);
        let found = known.get(&key).copied().filter(|id| {
            let same = |value: &Value| (value.def, &value.ty, &value.shard) == (key.0, &key.1, &key.2);
            self.values.get(id.index()).is_some_and(same)
        });
        if let Some(id) = found {
            return id;
        }
        let id = ValueId(self.values.len() as u32);
        self.values.push(Value { ty: key.1.clone(), def, shard: key.2.clone() });
        *seen += 1;
        known.insert(key, id);
        id
    }

    /// Appends a node and its results, whose types follow from the operands'.
    ///
    /// # Errors
    /// [`IrError::Type`] when the operands do not fit the operation.
    pub fn add(&mut self, op: Op, operands: &[ValueId], origin: &Origin) -> Result<Vec<ValueId>, IrError> {
        let types: Vec<&TensorType> = operands.iter().map(|&operand| self.ty(operand)).collect();
        let types = infer(&op, &types).map_err(|why| IrError::Type {
            graph: self.name.clone(),
            op: op.name(),
            origin: origin.first().map(|name| name.to_string()).unwrap_or_default(),
            why,
        })?;
        let results = types.into_iter().map(|ty| (ty, None)).collect();
        Ok(self.push(op, operands.to_vec(), results, origin))
    }

    /// Appends a node whose results are known.
    pub(crate) fn push(
        &mut self,
        op: Op,
        operands: Vec<ValueId>,
        results: Vec<(TensorType, Option<Shard>)>,
        origin: &Origin,
    ) -> Vec<ValueId> {
        let (node, first) = (NodeId(self.nodes.len() as u32), self.values.len() as u32);
        for ((ty, shard), position) in results.into_iter().zip(0u32..) {
            self.values.push(Value { ty, def: ValueDef::Node(node, position), shard });
        }
        let results: Vec<ValueId> = (first..self.values.len() as u32).map(ValueId).collect();
        self.nodes.push(Node { op, operands, results: results.clone(), origin: Arc::clone(origin) });
        results
    }

    /// Has the value leave the graph as the entry's output number `position`.
    pub fn add_output(&mut self, position: u32, value: ValueId) {
        self.outputs.push(Output { position, value });
    }

    /// Says what a node's result is a shard of; none where every rank has the whole.
    pub fn set_shard(&mut self, value: ValueId, shard: Option<Shard>) {
        self.values[value.index()].shard = shard;
    }

    /// Appends a node that has one result.
    ///
    /// # Errors
    /// As [`Self::add`], and when the operation has another number of results.
    pub fn add_one(&mut self, op: Op, operands: &[ValueId], origin: &Origin) -> Result<ValueId, IrError> {
        let name = op.name();
        match self.add(op, operands, origin)?.as_slice() {
            [result] => Ok(*result),
            results => Err(IrError::Type {
                graph: self.name.clone(),
                op: name,
                origin: origin.first().map(|name| name.to_string()).unwrap_or_default(),
                why: format!("has {} results where one is expected", results.len()),
            }),
        }
    }
}

impl Module {
    pub fn graph(&self, id: GraphId) -> &Graph {
        &self.graphs[id.index()]
    }

    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.index()]
    }
}

#[cfg(test)]
mod tests {
    use planfile::DType;

    use super::*;

    #[test]
    fn a_source_is_added_once_whoever_added_it() {
        let (ty, other) = (TensorType::new(DType::F32, &[2]), TensorType::new(DType::F16, &[2]));
        let def = |number| ValueDef::Weight(WeightId(number));
        let mut graph = Graph::new("g");
        let first = graph.add_source(ty.clone(), def(0));
        graph.values.push(Value { ty: ty.clone(), def: def(1), shard: None });
        assert_eq!(graph.add_source(ty.clone(), def(0)), first);
        assert_eq!(graph.add_source(ty.clone(), def(1)), ValueId(1));
        assert_eq!(graph.add_source(other, def(0)), ValueId(2));
        // What was changed meanwhile is not found under what it was.
        graph.values[0].def = def(7);
        assert_eq!(graph.add_source(ty.clone(), def(0)), ValueId(3));
        assert_eq!(graph.add_source(ty, def(0)), ValueId(3));
    }
}
