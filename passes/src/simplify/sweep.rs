//! Rebuilds a graph node by node, each in its simplest form, and equal nodes once.
//!
//! before  %a = dot %x, %w    after  %a = dot %x, %w      # origins of both
//!         %b = dot %x, %w           %y = add %a, %a
//!         %y = add %a, %b

use std::collections::HashMap;
use std::sync::Arc;

use ir::{Edit, Node, Origin, Output, Rewrite, ValueDef, ValueId, WeightId, joined_origin};
use planfile::{Op, TensorType};

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
    pub apply: fn(&mut Sweep<'_, '_, '_>, &Call) -> Result<Option<Step>, PassError>,
}

/// Rewrites of one node, in a row; more of them mean rules that undo each other.
const MAX_STEPS: usize = 256;

/// The rules, applied to each node of a graph.
pub(super) struct Simplest<'w, 'b> {
    weights: &'w mut Weights<'b>,
    /// For each weight of the old module, the one in the table.
    renamed: &'w [WeightId],
    facts: Facts,
}

/// What is known of the graph under construction.
#[derive(Default)]
struct Facts {
    /// The results of each node.
    nodes: HashMap<(Op, Vec<ValueId>), Vec<ValueId>>,
    /// How elements follow from their indices; none where they do not.
    affine: HashMap<ValueId, Option<Affine>>,
}

/// The graph under construction, as rules see it.
pub(super) struct Sweep<'e, 'g, 'b> {
    edit: &'e mut Edit<'g>,
    pub weights: &'e mut Weights<'b>,
    facts: &'e mut Facts,
}

impl<'w, 'b> Simplest<'w, 'b> {
    pub(super) fn new(weights: &'w mut Weights<'b>, renamed: &'w [WeightId]) -> Self {
        Self { weights, renamed, facts: Facts::default() }
    }

    fn sweep<'e, 'g>(&'e mut self, edit: &'e mut Edit<'g>) -> Sweep<'e, 'g, 'b> {
        Sweep { edit, weights: self.weights, facts: &mut self.facts }
    }

    fn value(&mut self, edit: &mut Edit<'_>, old: ValueId) -> Result<ValueId, PassError> {
        if let (None, ValueDef::Weight(id)) = (edit.get(old), edit.old().value(old).def) {
            let id = self.renamed[id.index()];
            let new = self.sweep(edit).weight(id)?;
            edit.set(old, new);
        }
        Ok(edit.value(old)?)
    }
}

impl Rewrite for Simplest<'_, '_> {
    type Error = PassError;

    fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, PassError> {
        let operands = node.operands.iter().map(|&operand| self.value(edit, operand)).collect::<Result<_, _>>()?;
        self.sweep(edit).emit(Call { op: node.op.clone(), operands, origin: Arc::clone(&node.origin) })
    }

    fn output(&mut self, edit: &mut Edit<'_>, output: Output) -> Result<ValueId, PassError> {
        self.value(edit, output.value)
    }
}

impl Sweep<'_, '_, '_> {
    /// The value of a weight.
    pub(super) fn weight(&mut self, id: WeightId) -> Result<ValueId, PassError> {
        let ty = self.weights.get(id).ty.clone();
        let value = self.edit.add_source(ty.clone(), ValueDef::Weight(id));
        if affine::is_index_type(&ty) && !self.facts.affine.contains_key(&value) {
            let tensor = self.weights.read(id)?;
            let affine = tensor.and_then(|tensor| Affine::fit(&ty.sizes(), &tensor.to_i64s()?));
            self.facts.affine.insert(value, affine);
        }
        Ok(value)
    }

    pub(super) fn ty(&self, value: ValueId) -> &TensorType {
        self.edit.new_graph().ty(value)
    }

    /// The node of the new graph that defines the value.
    pub(super) fn producer(&self, value: ValueId) -> Option<&Node> {
        self.edit.new_graph().producer(value)
    }

    pub(super) fn as_weight(&self, value: ValueId) -> Option<WeightId> {
        match self.edit.new_graph().value(value).def {
            ValueDef::Weight(id) => Some(id),
            ValueDef::Input(_) | ValueDef::State(_) | ValueDef::Node(..) => None,
        }
    }

    pub(super) fn affine(&self, value: ValueId) -> Option<&Affine> {
        self.facts.affine.get(&value)?.as_ref()
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
        if let Some(known) = self.facts.nodes.get(&key).filter(|_| mergeable) {
            known.iter().take(1).for_each(|&result| self.edit.also_from(result, &origin));
            return Ok(known.clone());
        }
        let affine = affine::of(self, &key.0, &key.1);
        let results = self.edit.add(key.0.clone(), &key.1, &origin)?;
        for &result in results.iter().filter(|_| affine.is_some()) {
            if affine::is_index_type(self.edit.new_graph().ty(result)) {
                self.facts.affine.insert(result, affine.clone());
            }
        }
        if mergeable {
            self.facts.nodes.insert(key, results.clone());
        }
        Ok(results)
    }
}

/// Names of both.
pub(super) fn union(first: &Origin, second: &Origin) -> Origin {
    joined_origin([first, second])
}
