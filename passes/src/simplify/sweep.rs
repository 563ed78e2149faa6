//! Rebuilds a graph node by node, each in its simplest form, and equal nodes once.
//!
//! before  %a = dot %x, %w    after  %a = dot %x, %w      # origins of both
//!         %b = dot %x, %w           %y = add %a, %a
//!         %y = add %a, %b

use std::collections::HashMap;
use std::sync::Arc;

use ir::{Graph, Node, NodeId, Origin, Output, Value, ValueDef, ValueId, WeightId, joined_origin};
use planfile::{Op, TensorType, infer};

use super::affine::{self, Affine};
use super::weights::Weights;
use super::{NAME, RULES};
use crate::error::PassError;

/// A node before it is built: operands are values of the new graph.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub op: Op,
    pub operands: Vec<ValueId>,
    pub origin: Origin,
}

/// What a rule makes of a call.
pub(super) enum Step {
    /// Another call, which rules see again.
    Call(Call),
    /// Values that exist already.
    Values(Vec<ValueId>),
}

/// A simpler form for some calls; `None` where it does not apply.
pub(super) struct Rule {
    pub name: &'static str,
    pub apply: fn(&mut Sweep<'_, '_>, &Call) -> Result<Option<Step>, PassError>,
}

/// Rewrites of one node, in a row; more of them mean rules that undo each other.
const MAX_STEPS: usize = 256;

/// The graph under construction.
pub(super) struct Sweep<'a, 'b> {
    graph: Graph,
    pub weights: &'a mut Weights<'b>,
    renamed: &'a [WeightId],
    sources: HashMap<(u8, u32), ValueId>,
    known: HashMap<(Op, Vec<ValueId>), NodeId>,
    /// For each value of the new graph, how its elements follow from their indices, where that is known.
    affine: Vec<Option<Affine>>,
}

impl<'a, 'b> Sweep<'a, 'b> {
    /// `renamed`: for each weight of the old module, the one in the table.
    pub(super) fn new(old: &Graph, weights: &'a mut Weights<'b>, renamed: &'a [WeightId]) -> Self {
        let graph = Graph { ranks: old.ranks.clone(), ..Graph::new(&old.name) };
        Self { graph, weights, renamed, sources: HashMap::new(), known: HashMap::new(), affine: Vec::new() }
    }

    /// The new graph; nodes that lost their readers are still in it.
    pub(super) fn run(mut self, old: &Graph) -> Result<Graph, PassError> {
        let mut replacements: Vec<Option<ValueId>> = vec![None; old.values.len()];
        for node in &old.nodes {
            let operands = self.replaced(old, &mut replacements, node.operands.iter().copied())?;
            let results = self.emit(Call { op: node.op.clone(), operands, origin: Arc::clone(&node.origin) })?;
            for (&before, after) in node.results.iter().zip(results) {
                replacements[before.index()] = Some(after);
            }
        }
        for &Output { position, value } in &old.outputs {
            let value = self.replaced(old, &mut replacements, [value])?[0];
            self.graph.outputs.push(Output { position, value });
        }
        Ok(self.graph)
    }

    fn replaced(
        &mut self,
        old: &Graph,
        replacements: &mut [Option<ValueId>],
        values: impl IntoIterator<Item = ValueId>,
    ) -> Result<Vec<ValueId>, PassError> {
        let mut found = Vec::new();
        for value in values {
            let replacement = match (replacements[value.index()], old.value(value)) {
                (Some(replacement), _) => replacement,
                (None, Value { def: ValueDef::Node(..), .. }) => {
                    return Err(PassError::Invalid { pass: NAME, why: format!("{value} is read before it is made") });
                }
                (None, Value { def: ValueDef::Weight(id), .. }) => self.weight(self.renamed[id.index()])?,
                (None, Value { def, ty, .. }) => self.source(ty.clone(), *def)?,
            };
            replacements[value.index()] = Some(replacement);
            found.push(replacement);
        }
        Ok(found)
    }

    /// The value of a weight.
    pub(super) fn weight(&mut self, id: WeightId) -> Result<ValueId, PassError> {
        let ty = self.weights.get(id).ty.clone();
        self.source(ty, ValueDef::Weight(id))
    }

    fn source(&mut self, ty: TensorType, def: ValueDef) -> Result<ValueId, PassError> {
        let key = match def {
            ValueDef::Input(position) => (0, position),
            ValueDef::Weight(id) => (1, id.0),
            ValueDef::State(id) => (2, id.0),
            ValueDef::Node(id, _) => {
                return Err(PassError::Invalid { pass: NAME, why: format!("node {id} is no source") });
            }
        };
        if let Some(&value) = self.sources.get(&key) {
            return Ok(value);
        }
        let affine = match def {
            ValueDef::Weight(id) if affine::is_index_type(&ty) => match self.weights.read(id)? {
                Some(tensor) => tensor.to_i64s().and_then(|elements| Affine::fit(&ty.sizes(), &elements)),
                None => None,
            },
            _ => None,
        };
        let value = self.push(ty, def, affine);
        self.sources.insert(key, value);
        Ok(value)
    }

    fn push(&mut self, ty: TensorType, def: ValueDef, affine: Option<Affine>) -> ValueId {
        self.graph.values.push(Value { ty, def, shard: None });
        self.affine.push(affine);
        ValueId(self.graph.values.len() as u32 - 1)
    }

    pub(super) fn ty(&self, value: ValueId) -> &TensorType {
        self.graph.ty(value)
    }

    /// The node of the new graph that defines the value.
    pub(super) fn producer(&self, value: ValueId) -> Option<&Node> {
        self.graph.producer(value)
    }

    pub(super) fn as_weight(&self, value: ValueId) -> Option<WeightId> {
        match self.graph.value(value).def {
            ValueDef::Weight(id) => Some(id),
            ValueDef::Input(_) | ValueDef::State(_) | ValueDef::Node(..) => None,
        }
    }

    pub(super) fn affine(&self, value: ValueId) -> Option<&Affine> {
        self.affine[value.index()].as_ref()
    }

    /// Builds a node that has one result, in its simplest form.
    pub(super) fn emit_one(&mut self, op: Op, operand: ValueId, origin: &Origin) -> Result<ValueId, PassError> {
        let results = self.emit(Call { op, operands: vec![operand], origin: Arc::clone(origin) })?;
        let missing = || PassError::Invalid { pass: NAME, why: "a primitive has no result".to_owned() };
        results.first().copied().ok_or_else(missing)
    }

    /// Builds a node in its simplest form, or finds values that equal its results.
    pub(super) fn emit(&mut self, call: Call) -> Result<Vec<ValueId>, PassError> {
        let mut call = call;
        let mut last = "";
        'steps: for _ in 0..MAX_STEPS {
            for rule in RULES {
                match (rule.apply)(self, &call)? {
                    None => {}
                    Some(Step::Values(values)) => return Ok(values),
                    Some(Step::Call(next)) => {
                        call = next;
                        last = rule.name;
                        continue 'steps;
                    }
                }
            }
            return self.build(call);
        }
        Err(PassError::Invalid { pass: NAME, why: format!("rule `{last}` does not settle on {:?}", call.op) })
    }

    fn build(&mut self, call: Call) -> Result<Vec<ValueId>, PassError> {
        let Call { op, operands, origin } = call;
        // What has effects beyond its results happens as often as it was written.
        let mergeable = !op.is_collective() && !matches!(op, Op::Append { .. });
        let key = (op, operands);
        if let Some(&known) = self.known.get(&key).filter(|_| mergeable) {
            let node = &mut self.graph.nodes[known.index()];
            node.origin = union(&node.origin, &origin);
            return Ok(node.results.clone());
        }
        let types: Vec<&TensorType> = key.1.iter().map(|&operand| self.graph.ty(operand)).collect();
        let inferred = infer(&key.0, &types).map_err(|why| {
            let from = origin.first().map_or("", |name| name);
            PassError::Invalid { pass: NAME, why: format!("{} (from `{from}`): {why}", key.0.name()) }
        })?;
        let affine = affine::of(self, &key.0, &key.1);
        let id = NodeId(self.graph.nodes.len() as u32);
        let mut results = Vec::new();
        for (position, ty) in (0u32..).zip(inferred) {
            let affine = affine.clone().filter(|_| affine::is_index_type(&ty));
            results.push(self.push(ty, ValueDef::Node(id, position), affine));
        }
        let (op, operands) = key.clone();
        self.graph.nodes.push(Node { op, operands, results: results.clone(), origin });
        if mergeable {
            self.known.insert(key, id);
        }
        Ok(results)
    }
}

/// Names of both.
pub(super) fn union(first: &Origin, second: &Origin) -> Origin {
    joined_origin([first, second])
}
