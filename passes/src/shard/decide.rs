//! Which way a node is split, chosen by hand: follow the operands' splits; on the tensor axis split products by
//! columns when the activation is whole, by rows when it is split along the contraction.

use ir::{Graph, Mesh, Node, Placement, Segment, Split, SubAxes, ValueDef, ValueId};
use planfile::{Op, RankScalar};

use super::factors::{Assignment, Factors, Kind, factors};
use super::hints::Hints;
use super::reshape::{reshape, whole_segments};

/// What one node is to do.
#[derive(Debug)]
pub(crate) struct Decision {
    /// What its operands must be placed like.
    pub(crate) operands: Vec<Placement>,
    pub(crate) results: Vec<Placement>,
    pub(crate) table: Factors,
    /// For each factor of the table.
    pub(crate) assigned: Vec<Option<Assignment>>,
    pub(crate) form: Form,
}

/// Nodes that become more than themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Plain,
    /// A table whose rows are split: look up one's own rows, zero elsewhere.
    SplitTable,
    /// Attention whose key and value heads must be repeated to match the query heads before they are split.
    RepeatedHeads,
}

/// What decisions are based on.
pub(crate) struct Policy<'a> {
    pub(crate) mesh: &'a Mesh,
    /// Sub-axes that products are split over.
    pub(crate) tensor: SubAxes,
    pub(crate) hints: Hints,
    /// Look-up tables of at least this size are split by rows.
    pub(crate) split_table_bytes: u64,
}

impl Policy<'_> {
    /// The first of the sub-axes, as many as leave each rank with the least; uneven splits allowed.
    pub(crate) fn fit(&self, available: SubAxes, segments: &[Segment]) -> SubAxes {
        let mut best = (segments.iter().map(|segment| segment.size).sum::<u64>(), SubAxes::NONE);
        let mut prefix = SubAxes::NONE;
        for sub_axis in available.iter() {
            prefix = prefix.union(SubAxes::of(sub_axis));
            let chunks = self.mesh.chunks(prefix);
            let local = segments.iter().map(|segment| segment.local(chunks)).sum();
            let filled = segments.iter().all(|segment| segment.size / segment.unit.max(1) >= chunks);
            if filled && local < best.0 {
                best = (local, prefix);
            }
        }
        best.1
    }

    /// Decides for one node. `homes`: the placements of operands that nodes or inputs define; `None` for weights,
    /// which come placed as asked.
    pub(crate) fn decide(&self, graph: &Graph, node: &Node, homes: &[Option<Placement>]) -> Decision {
        match &node.op {
            Op::Reshape { .. } => self.decide_reshape(graph, node, homes),
            Op::Slice { starts, steps, sizes } => decide_slice(graph, node, homes, starts, steps, sizes),
            Op::Concat { axis } => self.decide_concat(graph, node, homes, usize::from(*axis)),
            _ => self.decide_by_factors(graph, node, homes),
        }
    }

    /// Where a result that was just split by columns is better made whole at once: its readers need it so.
    pub(crate) fn settled(&self, node: &Node, result: usize, placement: &Placement) -> Placement {
        let mut settled = placement.clone();
        if matches!(node.op, Op::Dot { .. } | Op::Conv { .. }) {
            let value = node.results[result];
            settled.splits.retain(|split| {
                let tensor = !split.over.intersection(self.tensor).is_empty();
                !(tensor && self.hints.is_whole(value, usize::from(split.dim)))
            });
        }
        settled
    }

    fn decide_by_factors(&self, graph: &Graph, node: &Node, homes: &[Option<Placement>]) -> Decision {
        let types = |values: &[ValueId]| values.iter().map(|&value| graph.ty(value)).collect::<Vec<_>>();
        let table = factors(&node.op, &types(&node.operands), &types(&node.results));
        let mut assigned = self.follow(graph, node, homes, &table);
        let used = assigned.iter().flatten().fold(SubAxes::NONE, |used, assignment| used.union(assignment.over));
        let mut form = Form::Plain;
        if used.intersection(self.tensor).is_empty() {
            form = self.split_weights(graph, node, &table, &mut assigned, self.tensor);
        }
        let place = |dims: &[Option<super::factors::Along>]| Placement {
            splits: dims
                .iter()
                .enumerate()
                .filter_map(|(dim, along)| {
                    along.and_then(|along| Some(assigned[along.factor].as_ref()?.split(dim, along.scale)))
                })
                .collect(),
            partial: None,
        };
        let mut operands: Vec<Placement> = table.operands.iter().map(|dims| place(dims)).collect();
        let mut results: Vec<Placement> = table.results.iter().map(|dims| place(dims)).collect();
        if let Op::Attention { .. } = &node.op {
            form = self.place_heads(graph, node, &mut operands);
        }
        // Splits of reduced factors leave partial results.
        let reduced = table.factors.iter().zip(&assigned).filter_map(|(factor, assignment)| match factor.kind {
            Kind::Reduce(combine) => Some((combine, assignment.as_ref()?.over)),
            Kind::Parallel | Kind::Whole => None,
        });
        let partial = reduced.reduce(|a, b| (a.0, a.1.union(b.1)));
        let partial = if form == Form::SplitTable {
            let over = operands[0].splits.iter().fold(SubAxes::NONE, |over, split| over.union(split.over));
            Some((planfile::Combine::Sum, over.intersection(self.tensor)))
        } else {
            partial
        };
        for result in &mut results {
            result.partial = partial;
        }
        if let (Op::Transpose { .. }, Some(Some(home))) = (&node.op, homes.first()) {
            operands[0].partial = home.partial;
            results[0].partial = home.partial;
        }
        Decision { operands, results, table, assigned, form }
    }

    /// Gives factors the splits that operands already have.
    fn follow(
        &self,
        graph: &Graph,
        node: &Node,
        homes: &[Option<Placement>],
        table: &Factors,
    ) -> Vec<Option<Assignment>> {
        let mut votes: Vec<(u64, u64, usize, Assignment)> = Vec::new();
        for ((home, dims), &operand) in homes.iter().zip(&table.operands).zip(&node.operands) {
            let Some(home) = home else { continue };
            for split in &home.splits {
                let Some(Some(along)) = dims.get(usize::from(split.dim)) else { continue };
                let factor = &table.factors[along.factor];
                let Some(assignment) = Assignment::from_split(split, along.scale) else { continue };
                let segments_fine = factor.segmentable || assignment.segments.len() == 1;
                if factor.kind != Kind::Whole && segments_fine {
                    let bytes = graph.ty(operand).bytes().unwrap_or(0);
                    votes.push((self.mesh.chunks(split.over), bytes, along.factor, assignment));
                }
            }
        }
        // Most chunks first, then the largest operand: moving that one would cost the most.
        votes.sort_by_key(|vote| std::cmp::Reverse((vote.0, vote.1)));
        let mut assigned: Vec<Option<Assignment>> = vec![None; table.factors.len()];
        let mut used = SubAxes::NONE;
        for (_, _, factor, assignment) in votes {
            if assigned[factor].is_none() && used.intersection(assignment.over).is_empty() {
                used = used.union(assignment.over);
                assigned[factor] = Some(assignment);
            }
        }
        // Two combinations cannot be pending at once.
        let mut pending = None;
        for (factor, assignment) in table.factors.iter().zip(&mut assigned) {
            if let (Kind::Reduce(combine), Some(_)) = (factor.kind, &assignment) {
                if pending.is_some_and(|other| other != combine) {
                    *assignment = None;
                }
                pending = pending.or(Some(combine));
            }
        }
        assigned
    }

    /// Splits the columns of products with a weight, and the rows of large look-up tables, over free sub-axes.
    fn split_weights(
        &self,
        graph: &Graph,
        node: &Node,
        table: &Factors,
        assigned: &mut [Option<Assignment>],
        free: SubAxes,
    ) -> Form {
        let is_weight = |operand: usize| {
            let value = node.operands.get(operand).map(|&value| graph.value(value));
            value.is_some_and(|value| matches!(value.def, ValueDef::Weight(_)))
        };
        match &node.op {
            Op::Dot { .. } | Op::Conv { .. } => {
                let Some(weight) = [1, 0].into_iter().find(|&operand| is_weight(operand)) else { return Form::Plain };
                if is_weight(0) && is_weight(1) {
                    return Form::Plain;
                }
                let columns = table.operands[weight].iter().flatten().filter(|along| {
                    table.factors[along.factor].kind == Kind::Parallel && assigned[along.factor].is_none()
                });
                let Some(column) = columns.max_by_key(|along| table.factors[along.factor].size) else {
                    return Form::Plain;
                };
                let result = table.results[0].iter().enumerate().find_map(|(dim, along)| {
                    along.filter(|along| along.factor == column.factor).map(|along| (dim, along.scale))
                });
                let Some((dim, scale)) = result else { return Form::Plain };
                let size = graph.ty(node.results[0]).size(dim);
                let segments = self.hints.segments(node.results[0], dim, size);
                let asked = Split { dim: dim as u8, over: SubAxes::NONE, segments };
                let whole = || vec![Segment { size: size / scale, unit: 1 }];
                let segments =
                    Assignment::from_split(&asked, scale).map_or_else(whole, |assignment| assignment.segments);
                let over = self.fit(free, &segments);
                if !over.is_empty() {
                    assigned[column.factor] = Some(Assignment { over, segments });
                }
                Form::Plain
            }
            Op::Gather { axis } => {
                let ty = graph.ty(node.operands[0]);
                let large = ty.bytes().unwrap_or(0) >= self.split_table_bytes;
                let rows = vec![Segment { size: ty.size(usize::from(*axis)), unit: 1 }];
                let over = self.fit(free, &rows);
                let numbers = ty.dtype.is_float() && graph.ty(node.operands[1]).rank() > 0;
                if !(is_weight(0) && large && numbers) || over.is_empty() {
                    return Form::Plain;
                }
                if let Some(along) = table.operands[0][usize::from(*axis)] {
                    assigned[along.factor] = Some(Assignment { over, segments: rows });
                }
                Form::SplitTable
            }
            _ => Form::Plain,
        }
    }

    /// Key and value heads of grouped attention: split over the first of the query heads' sub-axes as far as there
    /// are heads, replicated over the rest, so that each rank has the heads that its queries read.
    fn place_heads(&self, graph: &Graph, node: &Node, operands: &mut [Placement]) -> Form {
        let (heads, groups) = (graph.ty(node.operands[0]).size(1), graph.ty(node.operands[1]).size(1));
        let Some(split) = operands[0].split(1).cloned() else { return Form::Plain };
        if heads == groups {
            return Form::Plain;
        }
        let mut over = SubAxes::NONE;
        for sub_axis in split.over.iter() {
            let wider = over.union(SubAxes::of(sub_axis));
            if groups.is_multiple_of(self.mesh.chunks(wider)) {
                over = wider;
            } else {
                break;
            }
        }
        let single = groups / self.mesh.chunks(over) == 1 || over == split.over;
        let even = split.segments.len() == 1 && !split.is_padded(self.mesh);
        let fits = even && single && heads.is_multiple_of(self.mesh.chunks(split.over));
        for operand in &mut operands[1..3] {
            operand.splits.retain(|split| split.dim != 1);
            if fits && !over.is_empty() {
                operand.splits.push(Split::simple(1, over, groups, 1));
                operand.splits.sort_by_key(|split| split.dim);
            }
        }
        if fits { Form::Plain } else { Form::RepeatedHeads }
    }

    fn decide_reshape(&self, graph: &Graph, node: &Node, homes: &[Option<Placement>]) -> Decision {
        let home = homes[0].clone().unwrap_or_default();
        let (from, to) = (graph.ty(node.operands[0]).sizes(), graph.ty(node.results[0]).sizes());
        let (kept, result) = reshape(self.mesh, &home, &from, &to);
        plain(vec![kept], vec![result])
    }

    fn decide_concat(&self, graph: &Graph, node: &Node, homes: &[Option<Placement>], axis: usize) -> Decision {
        let homes_known: Vec<&Placement> = homes.iter().flatten().collect();
        let bytes = |position: usize| graph.ty(node.operands[position]).bytes().unwrap_or(0);
        // The most split operand leads: the others are cut locally, or arrive as inputs already cut.
        let chunks = |position: usize| homes[position].as_ref().map(|home| self.mesh.chunks(home.used()));
        let largest = (0..homes.len())
            .filter(|&position| homes[position].is_some())
            .max_by_key(|&position| (chunks(position), bytes(position)));
        let leader = largest.and_then(|position| homes[position].clone()).unwrap_or_default();
        let mut common = Placement { splits: leader.splits.clone(), partial: None };
        common.splits.retain(|split| usize::from(split.dim) != axis);
        let along = leader.split(axis).map(|split| split.over);
        let alike = along.filter(|&over| {
            let same = |home: &&Placement| home.split(axis).is_some_and(|split| split.over == over);
            homes_known.len() == homes.len() && homes_known.iter().all(same)
        });
        let mut operands = vec![common.clone(); node.operands.len()];
        let mut result = common;
        if let Some(over) = alike {
            let mut segments = Vec::new();
            for (operand, home) in operands.iter_mut().zip(&homes_known) {
                let own = home.split(axis).map(|split| split.segments.clone()).unwrap_or_default();
                segments.extend_from_slice(&own);
                operand.splits.push(Split { dim: axis as u8, over, segments: own });
                operand.splits.sort_by_key(|split| split.dim);
            }
            result.splits.push(Split { dim: axis as u8, over, segments });
            result.splits.sort_by_key(|split| split.dim);
        }
        plain(operands, vec![result])
    }
}

fn plain(operands: Vec<Placement>, results: Vec<Placement>) -> Decision {
    Decision { operands, results, table: Factors::default(), assigned: Vec::new(), form: Form::Plain }
}

fn decide_slice(
    graph: &Graph,
    node: &Node,
    homes: &[Option<Placement>],
    starts: &[RankScalar],
    steps: &[i64],
    sizes: &[u64],
) -> Decision {
    let home = homes[0].clone().unwrap_or_default();
    let from = graph.ty(node.operands[0]).sizes();
    let (mut kept, mut result) = (Placement { splits: vec![], ..home }, Placement { splits: vec![], ..home });
    for split in &home.splits {
        let dim = usize::from(split.dim);
        let start = starts[dim].get(0).map_or(0, i64::unsigned_abs);
        if sizes[dim] == from[dim] && steps[dim] == 1 {
            kept.splits.push(split.clone());
            result.splits.push(split.clone());
        } else if steps[dim] == 1
            && let Some((_, segments)) = whole_segments(split, start, sizes[dim])
        {
            kept.splits.push(split.clone());
            result.splits.push(Split { segments, ..split.clone() });
        }
    }
    plain(vec![kept], vec![result])
}
