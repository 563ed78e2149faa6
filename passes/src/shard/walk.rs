//! Builds the per-rank graphs: walks the logical graph once, decides for each node, moves operands to where the
//! decision wants them and emits the node at its local sizes.

use std::collections::BTreeMap;

use ir::{Graph, Module, Node, Origin, Placement, Segment, Shard, Split, ValueDef, ValueId, WeightId};
use planfile::expr::ExprOp;
use planfile::{Binary, Combine, Compare, DType, Dim, Expr, Op, Recipe, Scalar, Source, Tensor, TensorType};

use super::decide::{Decision, Form, Policy};
use super::factors::{Kind, indexed_axes};
use super::reshape::whole_segments;
use super::reshard::{Local, Stage, reshape, zero_tensor};
use crate::error::PassError;

/// Weights that sharding adds to the module, in order; the first has number `first`.
#[derive(Debug)]
pub(crate) struct AddedWeights {
    pub(crate) first: u32,
    pub(crate) zeros: Vec<Tensor>,
}

impl AddedWeights {
    fn zero(&mut self, dtype: DType) -> (WeightId, TensorType) {
        let ty = TensorType::new(dtype, &[]);
        let known = self.zeros.iter().position(|tensor| tensor.ty == ty);
        let index = known.unwrap_or_else(|| {
            self.zeros.extend(zero_tensor(dtype));
            self.zeros.len() - 1
        });
        (WeightId(self.first + index as u32), ty)
    }

    /// Appends them to the module's weights.
    pub(crate) fn finish(self, module: &mut Module) {
        for tensor in self.zeros {
            let recipe = Recipe::source(tensor.ty.clone(), Source::Inline(tensor.data));
            module.weights.push(ir::Weight { name: format!("zero.{}", tensor.ty.dtype), ty: tensor.ty, recipe });
        }
    }
}

/// One entry on its way from a logical graph to a graph per stage.
pub(crate) struct Walk<'a> {
    pub(crate) source: &'a Graph,
    pub(crate) policy: &'a Policy<'a>,
    /// The stage of each node.
    pub(crate) stage_of: &'a [usize],
    /// For each of the entry's inputs.
    pub(crate) inputs: Vec<Placement>,
    pub(crate) stages: Vec<Graph>,
    pub(crate) weights: &'a mut AddedWeights,
    /// Where node results are at home.
    homes: BTreeMap<ValueId, (usize, Placement)>,
    located: BTreeMap<(usize, ValueId, Placement), ValueId>,
    channels: u32,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(
        source: &'a Graph,
        policy: &'a Policy<'a>,
        stage_of: &'a [usize],
        inputs: Vec<Placement>,
        stages: Vec<Graph>,
        weights: &'a mut AddedWeights,
    ) -> Self {
        let (homes, located) = (BTreeMap::new(), BTreeMap::new());
        Self { source, policy, stage_of, inputs, stages, weights, homes, located, channels: 0 }
    }

    /// The graphs of the stages.
    pub(crate) fn run(mut self) -> Result<Vec<Graph>, PassError> {
        let source = self.source;
        for (index, node) in source.nodes().iter().enumerate() {
            self.node(node, self.stage_of[index])?;
        }
        for output in source.outputs() {
            let (stage, placement) = match self.home(output.value) {
                Some((stage, placement)) => (stage, Placement { partial: None, ..placement }),
                None => (self.stages.len() - 1, Placement::replicated()),
            };
            let local = self.locate(stage, output.value, &placement, &ir::origin(""))?;
            self.stages[stage].add_output(output.position, local.value);
        }
        Ok(self.stages)
    }

    /// Where a value is at home; `None` for weights, which come placed as asked.
    fn home(&self, value: ValueId) -> Option<(usize, Placement)> {
        match self.source.value(value).def {
            ValueDef::Weight(_) | ValueDef::State(_) => None,
            ValueDef::Input(input) => self.inputs.get(input as usize).map(|placement| (0, placement.clone())),
            ValueDef::Node(..) => self.homes.get(&value).cloned(),
        }
    }

    /// Runs `work` on a stage's graph with the mesh at hand.
    fn on_stage<T>(
        &mut self,
        stage: usize,
        work: impl FnOnce(&mut Stage<'_>) -> Result<T, ir::IrError>,
    ) -> Result<T, PassError> {
        let graph = std::mem::take(&mut self.stages[stage]);
        let weights = &mut *self.weights;
        let mut zero = |dtype| weights.zero(dtype);
        let mut place = Stage { mesh: self.policy.mesh, graph, zero: &mut zero };
        let result = work(&mut place);
        self.stages[stage] = place.graph;
        result.map_err(|error| PassError::invalid("shard", error))
    }

    /// The local value of `value` on a stage, placed as asked.
    fn locate(&mut self, stage: usize, value: ValueId, to: &Placement, origin: &Origin) -> Result<Local, PassError> {
        let global = self.source.ty(value).sizes();
        if let Some(&known) = self.located.get(&(stage, value, to.clone())) {
            return Ok(Local { value: known, global, placement: to.clone() });
        }
        let def = self.source.value(value).def;
        let local = match def {
            ValueDef::Weight(_) | ValueDef::Input(_) if to.partial.is_none() => {
                let ty = TensorType::new(self.source.ty(value).dtype, &to.local_sizes(self.policy.mesh, &global));
                // Replicated values are no shards.
                let split = *to != Placement::replicated();
                let shard = split.then(|| Shard { global: global.clone(), placement: to.clone() });
                let value = self.on_stage(stage, |place| Ok(place.graph.add_placed_source(ty, def, shard)))?;
                Local { value, global, placement: to.clone() }
            }
            _ => {
                let Some((at, home)) = self.home(value) else {
                    return Err(PassError::invalid("shard", format!("{value} is used before it is defined")));
                };
                // Terms are combined once, where they are made, and stay at hand for other readers.
                let scattered = home.partial.is_some_and(|(_, over)| to.splits.iter().any(|split| split.over == over));
                let rest = Placement { partial: None, ..home.clone() };
                let from = if at != stage {
                    self.transfer(at, stage, value, &rest, origin)?
                } else if home.partial.is_some() && to.partial.is_none() && !scattered && rest != *to {
                    self.locate(stage, value, &rest, origin)?
                } else {
                    let Some(&known) = self.located.get(&(at, value, home.clone())) else {
                        return Err(PassError::invalid("shard", format!("{value} is not at home")));
                    };
                    Local { value: known, global, placement: home }
                };
                self.on_stage(stage, |place| place.reshard(from, to, origin))?
            }
        };
        self.located.insert((stage, value, to.clone()), local.value);
        Ok(local)
    }

    /// Sends a value from the stage where it is at home to another, rank by rank.
    fn transfer(
        &mut self,
        from: usize,
        to: usize,
        value: ValueId,
        placement: &Placement,
        origin: &Origin,
    ) -> Result<Local, PassError> {
        let global = self.source.ty(value).sizes();
        if let Some(&known) = self.located.get(&(to, value, placement.clone())) {
            return Ok(Local { value: known, global, placement: placement.clone() });
        }
        let sent = self.locate(from, value, placement, origin)?;
        let channel = self.channels;
        self.channels += 1;
        let (senders, receivers) = (self.stages[from].ranks().to_vec(), self.stages[to].ranks().to_vec());
        let ty = self.stages[from].ty(sent.value).clone();
        self.on_stage(from, |place| {
            place.graph.add(Op::Send { channel, peers: receivers }, &[sent.value], origin).map(|_| ())
        })?;
        let shard = Shard { global, placement: placement.clone() };
        let local =
            self.on_stage(to, |place| place.emit(Op::Recv { channel, peers: senders, ty }, &[], origin, shard))?;
        self.located.insert((to, value, placement.clone()), local.value);
        Ok(local)
    }

    fn node(&mut self, node: &Node, stage: usize) -> Result<(), PassError> {
        // Only movement passes partial terms on, and only within a stage: for the others they are combined first, and
        // what is sent to another stage is whole.
        let movement = matches!(node.op, Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. });
        let seen = |(at, home): (usize, Placement)| Placement {
            partial: home.partial.filter(|_| movement && at == stage),
            splits: home.splits,
        };
        let homes: Vec<Option<Placement>> = node.operands.iter().map(|&operand| self.home(operand).map(seen)).collect();
        let decision = self.policy.decide(self.source, node, &homes);
        let mut operands = Vec::new();
        for (position, (&operand, placement)) in node.operands.iter().zip(&decision.operands).enumerate() {
            let local = if decision.form == Form::RepeatedHeads && (position == 1 || position == 2) {
                self.repeat_heads(stage, node, operand, &decision)?
            } else {
                self.locate(stage, operand, placement, &node.origin)?
            };
            operands.push(self.mask(stage, node, position, local, &decision)?.value);
        }
        let results = if decision.form == Form::SplitTable {
            vec![self.split_table(stage, node, &operands, &decision)?]
        } else {
            let op = self.localise(stage, node, &decision)?;
            self.on_stage(stage, |place| place.graph.add(op, &operands, &node.origin))?
        };
        for ((&value, local), placement) in node.results.iter().zip(results).zip(decision.results) {
            let shard = Shard { global: self.source.ty(value).sizes(), placement };
            self.on_stage(stage, |place| place.annotate(local, &shard))?;
            self.located.insert((stage, value, shard.placement.clone()), local);
            self.homes.insert(value, (stage, shard.placement));
        }
        for (position, &value) in node.results.iter().enumerate() {
            let Some((_, home)) = self.homes.get(&value).cloned() else { continue };
            let settled = self.policy.settled(node, position, &home);
            if settled != home {
                self.locate(stage, value, &settled, &node.origin)?;
                self.homes.insert(value, (stage, settled));
            }
        }
        Ok(())
    }

    /// The operation at its local sizes.
    fn localise(&mut self, stage: usize, node: &Node, decision: &Decision) -> Result<Op, PassError> {
        let mesh = self.policy.mesh;
        let local_dims = |result: usize| -> Vec<Dim> {
            let global = self.source.ty(node.results[result]).sizes();
            decision.results[result].local_sizes(mesh, &global).into_iter().map(Dim::Static).collect()
        };
        let mut op = node.op.clone();
        match &mut op {
            Op::Pointwise { expr, dims } => {
                *dims = local_dims(0);
                if indexed_axes(expr).any(|axis| decision.results[0].split(axis).is_some()) {
                    let ranks = self.stages[stage].ranks().to_vec();
                    rebase(expr, &decision.results[0], |split| {
                        ranks.iter().map(|&rank| first(split.pieces(mesh, rank))).collect()
                    });
                }
            }
            Op::Broadcast { dims } | Op::Reshape { dims } => *dims = local_dims(0),
            Op::Resize { sizes, .. } => *sizes = local_dims(0).iter().map(|dim| dim.capacity()).collect(),
            Op::Conv { groups, .. } if *groups > 1 => {
                if let Some(assignment) = decision.assigned.get(1).and_then(Option::as_ref) {
                    *groups = assignment.split(0, 1).local_size(mesh);
                }
            }
            Op::Slice { starts, steps, sizes } => {
                let from = self.source.ty(node.operands[0]).sizes();
                for split in &decision.operands[0].splits {
                    let dim = usize::from(split.dim);
                    let start = starts[dim].get(0).map_or(0, i64::unsigned_abs);
                    if sizes[dim] == from[dim] && steps[dim] == 1 {
                        continue;
                    }
                    let Some((index, _)) = whole_segments(split, start, sizes[dim]) else {
                        return Err(PassError::invalid(
                            "shard",
                            format!("slice of {} cuts a segment", node.operands[0]),
                        ));
                    };
                    let chunks = mesh.chunks(split.over);
                    let before: u64 = split.segments[..index].iter().map(|segment| segment.local(chunks)).sum();
                    starts[dim] = before.cast_signed().into();
                }
                *sizes = local_dims(0).iter().map(|dim| dim.capacity()).collect();
            }
            _ => {}
        }
        Ok(op)
    }

    /// Neutral values in place of padding, where a dimension with padding is reduced or holds indices to look up.
    fn mask(
        &mut self,
        stage: usize,
        node: &Node,
        position: usize,
        local: Local,
        decision: &Decision,
    ) -> Result<Local, PassError> {
        let value = node.operands[position];
        let is_weight = matches!(self.source.value(value).def, ValueDef::Weight(_));
        let looked_up =
            position == 1 && matches!(node.op, Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. });
        let mesh = self.policy.mesh;
        let dims = decision.table.operands.get(position).cloned().unwrap_or_default();
        let mut masked: Vec<(Split, Combine)> = Vec::new();
        for split in &local.placement.splits {
            let along = dims.get(usize::from(split.dim)).copied().flatten();
            let kind = along.map(|along| decision.table.factors[along.factor].kind);
            let combine = match kind {
                // A product with a weight's zero padding is zero only where the other operand is finite.
                Some(Kind::Reduce(combine)) if !is_weight => combine,
                Some(_) if looked_up => Combine::Sum,
                _ => continue,
            };
            if split.is_padded(mesh) {
                masked.push((split.clone(), combine));
            }
        }
        if masked.is_empty() {
            return Ok(local);
        }
        let ty = self.stages[stage].ty(local.value).clone();
        let mut expr = Expr::operand(0);
        for (split, combine) in &masked {
            let valid = self.valid(stage, split);
            expr = valid.select(expr, Expr::constant(neutral(*combine, ty.dtype)));
        }
        let op = Op::Pointwise { expr, dims: ty.dims };
        let shard = Shard { global: local.global, placement: local.placement };
        self.on_stage(stage, |place| place.emit(op, &[local.value], &node.origin, shard))
    }

    /// Whether the local index along a split dimension is of an element that exists.
    fn valid(&self, stage: usize, split: &Split) -> Expr {
        let mesh = self.policy.mesh;
        let pieces: Vec<Vec<ir::Piece>> =
            self.stages[stage].ranks().iter().map(|&rank| split.pieces(mesh, rank)).collect();
        let zero = || Expr::constant(Scalar::i64(0));
        let mut whole: Option<Expr> = None;
        for segment in 0..split.segments.len() {
            let beyond = |piece: &ir::Piece| -(piece.local + piece.len).cast_signed();
            let ends = pieces.iter().map(|pieces| beyond(&pieces[segment])).collect();
            let mut inside = based_index(split.dim, ends).compare(Compare::Lt, zero());
            if segment > 0 {
                let starts = pieces.iter().map(|pieces| -pieces[segment].local.cast_signed()).collect();
                let after = based_index(split.dim, starts).compare(Compare::Ge, zero());
                inside = inside.binary(Binary::And, after);
            }
            whole = Some(match whole {
                None => inside,
                Some(before) => before.binary(Binary::Or, inside),
            });
        }
        whole.unwrap_or_else(|| Expr::constant(Scalar::bool(true)))
    }

    /// Looks up the rank's own rows; the others contribute zero, so that the sum over ranks is the look-up. An index that is
    /// out of range of the whole table stays as it is, and so out of range of the part: it is found out when it is used.
    fn split_table(
        &mut self,
        stage: usize,
        node: &Node,
        operands: &[ValueId],
        decision: &Decision,
    ) -> Result<ValueId, PassError> {
        let Op::Gather { axis } = node.op else {
            return Err(PassError::invalid("shard", "only look-ups have split tables"));
        };
        let mesh = self.policy.mesh;
        let Some(split) = decision.operands[0].split(usize::from(axis)).cloned() else {
            return Err(PassError::invalid("shard", "the table of a split look-up is whole"));
        };
        let rows = split.local_size(mesh).cast_signed();
        let total = self.source.ty(node.operands[0]).size(usize::from(axis)).cast_signed();
        let first_row: Vec<i64> = self.stages[stage]
            .ranks()
            .iter()
            .map(|&rank| -(mesh.chunk(split.over, rank).cast_signed() * rows))
            .collect();
        let result = Shard { global: self.source.ty(node.results[0]).sizes(), placement: decision.results[0].clone() };
        let origin = &node.origin;
        self.on_stage(stage, |place| {
            let indices = place.graph.ty(operands[1]).clone();
            let integer = |value: i64| Expr::constant(Scalar::i64(value));
            let index = || Expr::operand(0).cast(DType::I64);
            let positive =
                index().compare(Compare::Lt, integer(0)).select(index().binary(Binary::Add, integer(total)), index());
            // The difference of two indexes along one axis is the rank's offset alone.
            let offset = based_index(0, first_row).binary(Binary::Sub, Expr::index(0));
            let own = positive.binary(Binary::Add, offset);
            let op = Op::Pointwise { expr: own, dims: indices.dims.clone() };
            let own = place.graph.add_one(op, &[operands[1]], origin)?;
            let clamped = Expr::operand(0).binary(Binary::Max, integer(0)).binary(Binary::Min, integer(rows - 1));
            let given = || Expr::operand(1).cast(DType::I64);
            let inside = given().compare(Compare::Ge, integer(-total));
            let inside = inside.binary(Binary::And, given().compare(Compare::Lt, integer(total)));
            let local = inside.select(clamped, given());
            let op = Op::Pointwise { expr: local, dims: indices.dims.clone() };
            let local = place.graph.add_one(op, &[own, operands[1]], origin)?;
            let found = place.graph.add_one(Op::Gather { axis }, &[operands[0], local], origin)?;
            // The index of each result element stands beside it.
            let ty = place.graph.ty(found).clone();
            let lead = usize::from(axis);
            let mut beside = vec![1; ty.rank()];
            beside[lead..lead + indices.rank()].copy_from_slice(&indices.sizes());
            let own = place.graph.add_one(reshape(&beside), &[own], origin)?;
            let at_least = Expr::operand(1).compare(Compare::Ge, integer(0));
            let below = Expr::operand(1).compare(Compare::Lt, integer(rows));
            let zero = Expr::constant(Scalar::from_i64(ty.dtype, 0));
            let expr = at_least.binary(Binary::And, below).select(Expr::operand(0), zero);
            place.emit(Op::Pointwise { expr, dims: ty.dims }, &[found, own], origin, result)
        })
        .map(|local| local.value)
    }

    /// Key or value heads repeated for each query head of their group, then split like the query heads.
    fn repeat_heads(
        &mut self,
        stage: usize,
        node: &Node,
        operand: ValueId,
        decision: &Decision,
    ) -> Result<Local, PassError> {
        let mut whole = decision.operands[1].clone();
        whole.splits.retain(|split| split.dim != 1);
        let local = self.locate(stage, operand, &whole, &node.origin)?;
        let heads = self.source.ty(node.operands[0]).size(1);
        let global = self.source.ty(operand).sizes();
        let Some(split) = decision.operands[0].split(1).cloned() else {
            return Err(PassError::invalid("shard", "repeated heads without a split of the query heads"));
        };
        let origin = &node.origin;
        self.on_stage(stage, |place| {
            let sizes = place.graph.ty(local.value).sizes();
            let apart =
                place.graph.add_one(reshape(&[sizes[0], sizes[1], 1, sizes[2], sizes[3]]), &[local.value], origin)?;
            let dims = [sizes[0], sizes[1], heads / sizes[1], sizes[2], sizes[3]].map(Dim::Static).to_vec();
            let repeated = place.graph.add_one(Op::Broadcast { dims }, &[apart], origin)?;
            let shard = Shard { global: vec![global[0], heads, global[2], global[3]], placement: whole.clone() };
            let joined = place.emit(reshape(&[sizes[0], heads, sizes[2], sizes[3]]), &[repeated], origin, shard)?;
            whole.splits.push(split);
            whole.splits.sort_by_key(|split| split.dim);
            place.reshard(joined, &whole, origin)
        })
    }
}

/// The first whole-tensor index that a rank holds, less its local index.
fn first(pieces: Vec<ir::Piece>) -> i64 {
    pieces.first().map_or(0, |piece| piece.global.cast_signed() - piece.local.cast_signed())
}

fn based_index(axis: u8, bases: Vec<i64>) -> Expr {
    Expr { ops: vec![ExprOp::Index { axis, base: planfile::RankScalar::from_table(bases) }] }
}

/// Moves the bases of indexes along split axes to where each rank's part begins.
fn rebase(expr: &mut Expr, placement: &Placement, firsts: impl Fn(&Split) -> Vec<i64>) {
    for op in &mut expr.ops {
        let ExprOp::Index { axis, base } = op else { continue };
        let Some(split) = placement.split(usize::from(*axis)) else { continue };
        let table = firsts(split).into_iter().enumerate();
        *base =
            planfile::RankScalar::from_table(table.map(|(rank, first)| base.get(rank).unwrap_or(0) + first).collect());
    }
}

/// The value that changes nothing in a combination.
fn neutral(combine: Combine, dtype: DType) -> Scalar {
    match combine {
        Combine::Sum => Scalar::from_i64(dtype, 0),
        Combine::Prod => Scalar::from_i64(dtype, 1),
        Combine::Max if dtype.is_float() => Scalar::from_f64(dtype, f64::NEG_INFINITY),
        Combine::Min if dtype.is_float() => Scalar::from_f64(dtype, f64::INFINITY),
        Combine::Max => {
            Scalar::from_i64(dtype, if dtype.is_signed_integer() { i64::MIN >> (64 - 8 * dtype.bytes()) } else { 0 })
        }
        Combine::Min if dtype.is_signed_integer() => Scalar::from_i64(dtype, i64::MAX >> (64 - 8 * dtype.bytes())),
        Combine::Min => Scalar::from_i64(dtype, -1),
    }
}

/// One segment over everything.
pub(crate) fn single(size: u64) -> Vec<Segment> {
    vec![Segment { size, unit: 1 }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neutral_integers_are_the_type_s_own_extremes() {
        assert_eq!(neutral(Combine::Max, DType::I8).to_i64(), Some(-128));
        assert_eq!(neutral(Combine::Min, DType::I32).to_i64(), Some(i64::from(i32::MAX)));
        assert_eq!(neutral(Combine::Min, DType::U16).to_i64(), Some(0xffff));
    }
}
