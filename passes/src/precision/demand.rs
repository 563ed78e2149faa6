//! What is wanted of each value: the half type, `f32`, or either.
//!
//! One sweep backward over the graph, before anything is converted.

use ir::{Graph, ValueId};
use planfile::{DType, ExprOp, Op, Unary};

/// Which type serves all readers of a value best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// Every reader takes the half type.
    Half,
    /// Every reader takes `f32`.
    Single,
    /// Readers differ, or take what they are given.
    Either,
}

/// How an operation treats floating-point operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Reads the half type, accumulates in `f32`.
    Product,
    /// Reads and gives `f32`.
    Statistic,
    /// Computes in `f32` whatever it reads.
    Expression,
    /// Computes in `f32` inside, and gives the type of its first operand.
    Normalisation,
    /// Gives the type of its first operand.
    Movement,
    /// Gives the type that all its operands have.
    Joining,
}

pub(super) const fn class(op: &Op) -> Class {
    match op {
        Op::Dot { .. } | Op::Conv { .. } | Op::Attention { .. } | Op::Recurrence { .. } => Class::Product,
        Op::Reduce { .. } | Op::Scan { .. } | Op::TopK { .. } => Class::Statistic,
        Op::Pointwise { .. } => Class::Expression,
        Op::Softmax { .. } | Op::Norm { .. } => Class::Normalisation,
        Op::Concat { .. } | Op::ScatterElements { .. } | Op::ScatterNd { .. } => Class::Joining,
        Op::Pool { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Broadcast { .. }
        | Op::Resize { .. }
        | Op::Append { .. }
        | Op::Rotary { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. }
        | Op::Recv { .. } => Class::Movement,
    }
}

fn reads_bits(op: &Op) -> bool {
    matches!(op, Op::Pointwise { expr, .. } if expr.ops.contains(&ExprOp::Unary(Unary::Bits)))
}

/// Whether values of this type are converted at all.
pub(super) const fn converts(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32)
}

/// The demand of each value of the graph. `outputs`: types that the entry states; `half`: the type to convert to.
pub(super) fn demands(graph: &Graph, outputs: &[DType], half: DType) -> Vec<Demand> {
    let mut demands: Vec<Option<Demand>> = vec![None; graph.values().len()];
    let note = |demands: &mut Vec<Option<Demand>>, value: ValueId, demand: Demand| {
        let known = &mut demands[value.index()];
        *known = Some(known.map_or(demand, |known| if known == demand { demand } else { Demand::Either }));
    };
    for output in graph.outputs() {
        let stated = outputs.get(output.position as usize).copied();
        let demand = match stated {
            Some(DType::F32) => Demand::Single,
            Some(dtype) if dtype == half => Demand::Half,
            Some(_) | None => Demand::Either,
        };
        note(&mut demands, output.value, demand);
    }
    for node in graph.nodes().iter().rev() {
        let result = node.results.first().and_then(|result| demands[result.index()]).unwrap_or(Demand::Either);
        // Only `f32` is handed on through arithmetic: a half type in front of it would round once more.
        let single = if result == Demand::Single { Demand::Single } else { Demand::Either };
        for (position, &operand) in node.operands.iter().enumerate() {
            let demand = match class(&node.op) {
                Class::Product => Demand::Half,
                Class::Statistic => Demand::Single,
                // The bits of a number that was rounded would be others.
                Class::Expression if reads_bits(&node.op) => Demand::Single,
                Class::Expression => single,
                Class::Normalisation if position == 0 => single,
                Class::Movement if position == 0 => result,
                Class::Joining => result,
                Class::Normalisation | Class::Movement => Demand::Either,
            };
            note(&mut demands, operand, demand);
        }
    }
    demands.into_iter().map(|demand| demand.unwrap_or(Demand::Either)).collect()
}
