//! What later nodes ask of a dimension: units that must stay together and segments that are split alike.
//!
//! Computed backward: a reshape of `[.., 64]` into four heads of 16 asks for units of 16; slices that take a
//! dimension apart ask for a segment each. A projection that is split by columns follows its hint. Dimensions that a
//! reader needs whole, such as the one a norm goes over, are marked too.

use std::collections::{BTreeMap, BTreeSet};

use ir::{Graph, Segment, SubAxes, ValueId};
use planfile::{Op, RankScalar};

use super::factors::{Assignment, Kind, factors};
use super::reshape::through_reshape;

/// For each value and dimension, the segments asked for; a missing entry means one segment of unit 1.
#[derive(Debug, Default)]
pub(crate) struct Hints {
    asked: BTreeMap<(ValueId, usize), Vec<Segment>>,
    whole: BTreeSet<(ValueId, usize)>,
}

impl Hints {
    /// Segments to split this dimension by.
    pub(crate) fn segments(&self, value: ValueId, dim: usize, size: u64) -> Vec<Segment> {
        self.asked.get(&(value, dim)).cloned().unwrap_or_else(|| vec![Segment { size, unit: 1 }])
    }

    /// Whether a reader needs all of this dimension on each rank.
    pub(crate) fn is_whole(&self, value: ValueId, dim: usize) -> bool {
        self.whole.contains(&(value, dim))
    }

    /// Passes the mark on from a result to an operand.
    fn pass_whole(&mut self, result: (ValueId, usize), operand: (ValueId, usize)) {
        if self.whole.contains(&result) {
            self.whole.insert(operand);
        }
    }

    /// Merges what two readers ask: the finer cut into segments, units that suit both.
    fn ask(&mut self, value: ValueId, dim: usize, segments: Vec<Segment>) {
        let merged = match self.asked.get(&(value, dim)) {
            None => segments,
            Some(known) if known.len() == segments.len() => {
                let pairs = known.iter().zip(&segments);
                pairs.map(|(a, b)| if a.size == b.size { finer(*a, *b) } else { *a }).collect()
            }
            Some(known) if known.len() > segments.len() => known.clone(),
            Some(_) => segments,
        };
        self.asked.insert((value, dim), merged);
    }
}

/// The smallest unit that both units divide, if it still divides the segment.
fn finer(a: Segment, b: Segment) -> Segment {
    let (mut x, mut y) = (a.unit, b.unit);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    let unit = a.unit / x.max(1) * b.unit;
    if a.size.is_multiple_of(unit) { Segment { unit, ..a } } else { a }
}

/// A slice of a dimension: its start and size, and the value it makes.
type Part = (u64, u64, ValueId);

/// Hints of every value of the graph.
pub(crate) fn hints(graph: &Graph) -> Hints {
    let mut hints = Hints::default();
    let mut slices: BTreeMap<(ValueId, usize), Vec<Part>> = BTreeMap::new();
    for node in graph.nodes().iter().rev() {
        // Readers of these results have been seen: what slices took apart becomes segments.
        for &result in &node.results {
            for (dim, &size) in graph.ty(result).sizes().iter().enumerate() {
                if let Some(parts) = slices.remove(&(result, dim)) {
                    ask_by_slices(&mut hints, result, dim, size, parts);
                }
            }
        }
        match &node.op {
            Op::Reshape { .. } => through(&mut hints, graph, node.operands[0], node.results[0]),
            Op::Slice { starts, steps, sizes } => {
                let operand = graph.ty(node.operands[0]).sizes();
                for dim in 0..sizes.len() {
                    let RankScalar::Uniform(start) = starts[dim] else { continue };
                    if sizes[dim] == operand[dim] {
                        copy(&mut hints, (node.results[0], dim), (node.operands[0], dim));
                        hints.pass_whole((node.results[0], dim), (node.operands[0], dim));
                    } else if steps[dim] == 1 {
                        let part = (start.unsigned_abs(), sizes[dim], node.results[0]);
                        slices.entry((node.operands[0], dim)).or_default().push(part);
                    }
                }
            }
            Op::Concat { axis } => {
                for &operand in &node.operands {
                    for dim in (0..graph.ty(operand).rank()).filter(|&dim| dim != usize::from(*axis)) {
                        copy(&mut hints, (node.results[0], dim), (operand, dim));
                        hints.pass_whole((node.results[0], dim), (operand, dim));
                    }
                }
            }
            _ => by_factors(&mut hints, graph, node),
        }
    }
    hints
}

fn copy(hints: &mut Hints, from: (ValueId, usize), to: (ValueId, usize)) {
    if let Some(segments) = hints.asked.get(&from).cloned() {
        hints.ask(to.0, to.1, segments);
    }
}

/// Operand dimensions ask what the result dimension of their factor was asked.
fn by_factors(hints: &mut Hints, graph: &Graph, node: &ir::Node) {
    let types = |values: &[ValueId]| values.iter().map(|&value| graph.ty(value)).collect::<Vec<_>>();
    let table = factors(&node.op, &types(&node.operands), &types(&node.results));
    for (&operand, dims) in node.operands.iter().zip(&table.operands) {
        for (dim, along) in dims.iter().enumerate() {
            let Some(along) = along else { continue };
            if table.factors[along.factor].kind == Kind::Whole {
                hints.whole.insert((operand, dim));
            }
            for (&result, dims) in node.results.iter().zip(&table.results) {
                for (of, other) in dims.iter().enumerate() {
                    if other.is_some_and(|other| other.factor == along.factor) {
                        hints.pass_whole((result, of), (operand, dim));
                    }
                }
            }
        }
    }
    for (&result, dims) in node.results.iter().zip(&table.results) {
        for (dim, along) in dims.iter().enumerate() {
            let Some(along) = along else { continue };
            let Some(segments) = hints.asked.get(&(result, dim)).cloned() else { continue };
            let split = ir::Split { dim: dim as u8, over: SubAxes::NONE, segments };
            let Some(assignment) = Assignment::from_split(&split, along.scale) else { continue };
            for (&operand, dims) in node.operands.iter().zip(&table.operands) {
                for (dim, other) in dims.iter().enumerate() {
                    if let Some(other) = other
                        && other.factor == along.factor
                    {
                        hints.ask(operand, dim, assignment.split(dim, other.scale).segments);
                    }
                }
            }
        }
    }
}

/// A reshape asks that splits of its result's dimensions can be said before it.
fn through(hints: &mut Hints, graph: &Graph, operand: ValueId, result: ValueId) {
    let (from, to) = (graph.ty(operand).sizes(), graph.ty(result).sizes());
    for (dim, &size) in to.iter().enumerate() {
        if size < 2 {
            continue;
        }
        // A dimension that the reshape leaves as it is passes the mark on.
        let same = |other: &usize| from[*other] == size && product(&from[..*other]) == product(&to[..dim]);
        if let Some(other) = (0..from.len()).find(same) {
            hints.pass_whole((result, dim), (operand, other));
        }
        let segments = hints.segments(result, dim, size);
        // A dimension that readers take apart index by index (query, key, value) is no candidate itself.
        if segments.len() > 1 && segments.iter().all(|segment| segment.size == segment.unit) {
            continue;
        }
        let split = ir::Split { dim: dim as u8, over: SubAxes::NONE, segments };
        let Some(mapped) = through_reshape(&split, &to, &from) else { continue };
        // Of several result dimensions in one operand dimension the outermost, the coarsest, is the natural one.
        let plain = mapped.segments.len() == 1 && mapped.segments[0].unit == 1;
        let known = hints.asked.contains_key(&(operand, usize::from(mapped.dim)));
        if !plain && !known {
            hints.ask(operand, usize::from(mapped.dim), mapped.segments);
        }
    }
}

fn product(sizes: &[u64]) -> u64 {
    sizes.iter().product()
}

/// Slices that take a dimension apart without gaps ask for a segment each.
fn ask_by_slices(hints: &mut Hints, value: ValueId, dim: usize, size: u64, mut parts: Vec<Part>) {
    parts.sort_unstable();
    parts.dedup_by_key(|part| (part.0, part.1));
    let mut at = 0;
    let mut segments = Vec::new();
    for (start, len, part) in parts {
        if start != at {
            return;
        }
        segments.extend(hints.segments(part, dim, len));
        at += len;
    }
    if at == size {
        hints.ask(value, dim, segments);
    }
}
