//! Builds a graph anew with each value in the type that is chosen for it.

use std::collections::HashMap;

use ir::{Edit, Graph, Node, Output, Rewrite, ValueDef, ValueId};
use planfile::expr::MAX_EXPR_OPS;
use planfile::{DType, Op};

use super::NAME;
use super::cast::{convert, free_slot, has_large_constant, in_single, store};
use super::demand::{Class, Demand, class, converts, demands};
use super::weights::Weights;
use crate::error::PassError;

/// Instructions that storing as a half type may add.
const STORE_OPS: usize = 16;

pub(super) struct Rebuild<'a, 'b> {
    old: &'a Graph,
    /// Types that the entry states for its outputs.
    outputs: &'a [DType],
    weights: &'a mut Weights<'b>,
    dtype: DType,
    demands: Vec<Demand>,
    /// Conversions: of a new value, to a type, saturating.
    casts: HashMap<(ValueId, DType, bool), ValueId>,
}

impl Rewrite for Rebuild<'_, '_> {
    type Error = PassError;

    fn node(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, PassError> {
        let (op, operands) = self.converted(edit, node)?;
        Ok(edit.add(op, &operands, &node.origin)?)
    }

    fn output(&mut self, edit: &mut Edit<'_>, Output { position, value }: Output) -> Result<ValueId, PassError> {
        let stated = self.outputs.get(position as usize).copied();
        self.value_as(edit, value, stated.unwrap_or_else(|| self.old.ty(value).dtype), false)
    }
}

impl<'a, 'b> Rebuild<'a, 'b> {
    pub(super) fn new(old: &'a Graph, outputs: &'a [DType], weights: &'a mut Weights<'b>, dtype: DType) -> Self {
        Self { old, outputs, weights, dtype, demands: demands(old, outputs, dtype), casts: HashMap::new() }
    }

    fn is_weight(&self, value: ValueId) -> bool {
        matches!(self.old.value(value).def, ValueDef::Weight(_))
    }

    /// Whether its type is chosen here.
    fn is_converted(&self, value: ValueId) -> bool {
        converts(self.old.ty(value).dtype)
    }

    /// The type that the value has by now; another half type than that converted to counts as `f32`.
    fn dtype_of(&self, edit: &Edit<'_>, value: ValueId) -> DType {
        if !self.is_converted(value) {
            return self.old.ty(value).dtype;
        }
        let dtype = match self.old.value(value).def {
            ValueDef::Weight(id) => return self.weights.of_expression(id),
            ValueDef::Node(..) => edit.get(value).map(|new| edit.new_graph().ty(new).dtype),
            ValueDef::Input(_) | ValueDef::State(_) => None,
        };
        match dtype.unwrap_or_else(|| self.old.ty(value).dtype) {
            dtype if dtype == self.dtype => dtype,
            _ => DType::F32,
        }
    }

    /// The value in a type; weights by their recipe, others by a node where they have another one.
    fn value_as(
        &mut self,
        edit: &mut Edit<'_>,
        value: ValueId,
        dtype: DType,
        saturate: bool,
    ) -> Result<ValueId, PassError> {
        let old = self.old.value(value);
        if let ValueDef::Weight(id) = old.def {
            let dtype = if converts(old.ty.dtype) { dtype } else { old.ty.dtype };
            let (id, ty) = self.weights.get(id, dtype);
            return Ok(edit.add_source(ty, ValueDef::Weight(id)));
        }
        let new = edit.value(value)?;
        let from = edit.new_graph().ty(new).dtype;
        if !converts(old.ty.dtype) || from == dtype {
            return Ok(new);
        }
        if let Some(&cast) = self.casts.get(&(new, dtype, saturate)) {
            return Ok(cast);
        }
        let op = Op::Pointwise { expr: convert(from, dtype, saturate), dims: old.ty.dims.clone() };
        let origin = self.old.producer(value).map_or_else(|| [].into(), |node| node.origin.clone());
        let cast = edit.add_one(op, &[new], &origin)?;
        self.casts.insert((new, dtype, saturate), cast);
        Ok(cast)
    }

    /// Whether it is a weight, or a weight that was only moved.
    fn is_constant(&self, value: ValueId) -> bool {
        let mut value = value;
        while let Some(node) = self.old.producer(value) {
            let (Class::Movement, Some(&source)) = (class(&node.op), node.operands.first()) else { return false };
            value = source;
        }
        self.is_weight(value)
    }

    fn demand(&self, node: &Node) -> Demand {
        node.results.first().map_or(Demand::Either, |result| self.demands[result.index()])
    }

    /// The operation and its operands in the types chosen for it.
    fn converted(&mut self, edit: &mut Edit<'_>, node: &Node) -> Result<(Op, Vec<ValueId>), PassError> {
        let floats: Vec<ValueId> =
            node.operands.iter().copied().filter(|&operand| self.is_converted(operand)).collect();
        let dtype = match class(&node.op) {
            Class::Expression => return self.expression(edit, node, &floats),
            Class::Product => self.dtype,
            Class::Statistic => DType::F32,
            // What is appended becomes part of the state, whose type stays.
            Class::Movement if matches!(node.op, Op::Append { .. }) => {
                node.operands.first().map_or(DType::F32, |&state| self.old.ty(state).dtype)
            }
            Class::Normalisation | Class::Movement => match floats.first() {
                Some(&first) if self.is_weight(first) => self.of_constants(node),
                Some(&first) => self.dtype_of(edit, first),
                None => DType::F32,
            },
            Class::Joining => {
                let others: Vec<ValueId> =
                    floats.iter().copied().filter(|&operand| !self.is_constant(operand)).collect();
                let single = others.iter().any(|&operand| self.dtype_of(edit, operand) == DType::F32);
                match self.demand(node) {
                    Demand::Half => self.dtype,
                    Demand::Single | Demand::Either if single => DType::F32,
                    Demand::Single | Demand::Either if others.is_empty() => self.of_constants(node),
                    Demand::Single | Demand::Either => self.dtype,
                }
            }
        };
        let mut op = node.op.clone();
        if let Op::Dot { accumulate, out, .. } = &mut op {
            let single = |dtype: DType| if converts(dtype) { DType::F32 } else { dtype };
            *accumulate = single(*accumulate);
            let half = !floats.is_empty() && self.demand(node) != Demand::Single;
            *out = if converts(*out) && half { self.dtype } else { single(*out) };
        }
        // A mask that is added: what stands for nothing must not become infinite, or rows without a key would be NaN.
        let is_mask = |position: usize| matches!(op, Op::Attention { .. }) && position == 3;
        let operands = node.operands.iter().enumerate();
        let operands: Vec<ValueId> = operands
            .map(|(position, &operand)| self.value_as(edit, operand, dtype, is_mask(position)))
            .collect::<Result<_, _>>()?;
        Ok((op, operands))
    }

    /// The type for what only moves constants, such as a look-up in a table.
    fn of_constants(&self, node: &Node) -> DType {
        let looks_up = matches!(node.op, Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. });
        match self.demand(node) {
            Demand::Half => self.dtype,
            Demand::Either if looks_up => self.dtype,
            Demand::Single | Demand::Either => DType::F32,
        }
    }

    fn expression(
        &mut self,
        edit: &mut Edit<'_>,
        node: &Node,
        floats: &[ValueId],
    ) -> Result<(Op, Vec<ValueId>), PassError> {
        let Op::Pointwise { expr, dims } = &node.op else {
            return Err(PassError::invalid(NAME, "an expression is expected"));
        };
        let large = has_large_constant(expr, self.dtype) || floats.iter().any(|&operand| self.is_large(operand));
        let result = node.results.first().is_some_and(|&result| self.is_converted(result));
        let half = result && self.stores_half(edit, node, floats, large);
        let mut dtypes: Vec<DType> = node.operands.iter().map(|&operand| self.dtype_of(edit, operand)).collect();
        let mut converted = in_single(expr, &dtypes);
        let room = converted.ops.len() + STORE_OPS <= MAX_EXPR_OPS && free_slot(expr).is_some();
        if !room {
            // Conversions take nodes of their own.
            dtypes = dtypes.into_iter().map(|dtype| if converts(dtype) { DType::F32 } else { dtype }).collect();
            converted = in_single(expr, &dtypes);
        } else if half && self.dtype != DType::F32 {
            converted = store(converted, self.dtype, large);
        }
        let mut operands = Vec::new();
        for (&operand, dtype) in node.operands.iter().zip(dtypes) {
            operands.push(self.value_as(edit, operand, dtype, false)?);
        }
        Ok((Op::Pointwise { expr: converted, dims: dims.clone() }, operands))
    }

    /// Whether an expression's result is stored as the half type.
    fn stores_half(&self, edit: &Edit<'_>, node: &Node, floats: &[ValueId], large: bool) -> bool {
        let mut others = floats.iter().copied().filter(|&operand| !self.is_weight(operand)).collect::<Vec<_>>();
        let tables =
            floats.iter().any(|&operand| self.is_weight(operand) && self.dtype_of(edit, operand) == self.dtype);
        match self.demand(node) {
            Demand::Half => true,
            Demand::Single => false,
            Demand::Either => {
                let constant = others.is_empty() && !tables;
                others.retain(|&operand| self.dtype_of(edit, operand) == DType::F32);
                !large && !constant && others.is_empty()
            }
        }
    }

    fn is_large(&self, value: ValueId) -> bool {
        match self.old.value(value).def {
            ValueDef::Weight(id) => self.weights.exceeds(id),
            ValueDef::Node(..) | ValueDef::Input(_) | ValueDef::State(_) => false,
        }
    }
}
