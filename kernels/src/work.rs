//! Operations and bytes of each primitive, from its types alone.

use planfile::expr::ExprOp;
use planfile::{Op, TensorType};

/// Work of one primitive on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Arithmetic operations; a multiply-add counts two.
    pub operations: u64,
    /// Device memory read and written, each operand and result once.
    pub memory_bytes: u64,
    /// Sent over links by each rank, by a ring where all ranks exchange.
    pub link_bytes: u64,
}

/// The work of `op` on operands and results of these types. Saturates where counts leave 64 bits.
pub fn work(op: &Op, operands: &[&TensorType], results: &[&TensorType]) -> Work {
    let elements = |ty: &TensorType| ty.elements().unwrap_or(u64::MAX);
    let bytes =
        |types: &[&TensorType]| types.iter().fold(0u64, |sum, ty| sum.saturating_add(ty.bytes().unwrap_or(u64::MAX)));
    let first = results.first().map_or(0, |result| elements(result));
    let input = operands.first().map_or(0, |operand| elements(operand));
    let all = bytes(operands).saturating_add(bytes(results));
    let group = |groups: &[Vec<u32>]| groups.first().map_or(1, Vec::len).max(1) as u64;
    let mut work = Work { operations: first, memory_bytes: all, link_bytes: 0 };
    match op {
        Op::Pointwise { expr, .. } => {
            let counted =
                |op: &&ExprOp| matches!(op, ExprOp::Unary(_) | ExprOp::Binary(_) | ExprOp::Compare(_) | ExprOp::Select);
            work.operations = first.saturating_mul(expr.ops.iter().filter(counted).count() as u64);
        }
        Op::Dot { contract, .. } => {
            let depth = contract.iter().fold(1u64, |n, pair| n.saturating_mul(operands[0].size(usize::from(pair.0))));
            work.operations = first.saturating_mul(depth).saturating_mul(2);
        }
        Op::Conv { transposed, .. } => {
            // Each weight of an output channel (or input channel, transposed) meets each output (input) element.
            let taps: u64 = operands[1].sizes()[1..].iter().fold(1, |n, &size| n.saturating_mul(size));
            let meets = if *transposed { input } else { first };
            work.operations = meets.saturating_mul(taps).saturating_mul(2);
        }
        Op::Pool { window, .. } => {
            work.operations = window.sizes.iter().fold(first, |n, &size| n.saturating_mul(size));
        }
        Op::Reduce { .. } | Op::Scan { .. } => work.operations = input,
        Op::Softmax { .. } | Op::Norm { .. } => work.operations = input.saturating_mul(5),
        Op::Attention { .. } => {
            let (q, v) = (operands[0], operands[2]);
            let scores = elements(q) / q.size(3).max(1);
            let depth = q.size(3).saturating_add(v.size(3));
            work.operations = scores.saturating_mul(v.size(2)).saturating_mul(depth).saturating_mul(2);
        }
        // Each row of the weights meets each sample in each step; the gates' functions count little beside.
        Op::Recurrence { .. } => {
            let width = operands[2].size(2);
            work.operations = input.saturating_mul(width.saturating_mul(2).saturating_add(8));
        }
        Op::Rotary { .. } => work.operations = input.saturating_mul(3),
        Op::Resize { .. } => work.operations = first.saturating_mul(8),
        Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => {
            work.operations = 0;
            let indices = operands.get(1).map_or(0, |indices| indices.bytes().unwrap_or(0));
            work.memory_bytes = bytes(results).saturating_mul(2).saturating_add(indices);
        }
        Op::Slice { .. } => (work.operations, work.memory_bytes) = (0, bytes(results).saturating_mul(2)),
        Op::Reshape { .. } => (work.operations, work.memory_bytes) = (0, 0),
        Op::Transpose { .. } | Op::Pad { .. } | Op::Concat { .. } | Op::Broadcast { .. } => work.operations = 0,
        Op::TopK { .. } => work.operations = input.saturating_mul(4),
        Op::ScatterElements { .. } | Op::ScatterNd { .. } | Op::Append { .. } => {}
        Op::AllReduce { groups, .. } => {
            let ranks = group(groups);
            work.link_bytes = all / 2 * 2 * (ranks - 1) / ranks;
        }
        Op::AllGather { groups, .. } => {
            work.operations = 0;
            work.link_bytes = bytes(operands).saturating_mul(group(groups) - 1);
        }
        Op::ReduceScatter { groups, .. } => {
            work.link_bytes = bytes(results).saturating_mul(group(groups) - 1);
        }
        Op::AllToAll { groups, .. } => {
            let ranks = group(groups);
            (work.operations, work.link_bytes) = (0, bytes(operands) / ranks * (ranks - 1));
        }
        Op::Send { .. } => (work.operations, work.link_bytes) = (0, bytes(operands)),
        Op::Recv { .. } => work.operations = 0,
    }
    work
}

#[cfg(test)]
mod tests {
    use planfile::DType;

    use super::*;

    #[test]
    fn a_product_counts_two_operations_for_each_multiply_add() {
        let op = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: DType::F32 };
        let [a, b] = [[8, 64], [64, 32]].map(|sizes| TensorType::new(DType::F32, &sizes));
        let y = TensorType::new(DType::F32, &[8, 32]);
        let work = work(&op, &[&a, &b], &[&y]);
        assert_eq!(work.operations, 2 * 8 * 64 * 32);
        assert_eq!(work.memory_bytes, 4 * (8 * 64 + 64 * 32 + 8 * 32));
    }

    #[test]
    fn a_recurrence_multiplies_its_weights_with_each_state() {
        let [t, b, d, h] = [7, 3, 2, 64];
        let cell = planfile::op::Cell::Gru { resets_late: false };
        let functions = vec![planfile::Expr::operand(0); 4];
        let reverse = vec![false, true];
        let op = Op::Recurrence { cell, reverse, functions, bias: false, peepholes: false, lengths: false };
        let ty = |sizes: &[u64]| TensorType::new(DType::F32, sizes);
        let operands = [ty(&[t, b, d, 3 * h]), ty(&[d, 3 * h, h]), ty(&[d, b, h])];
        let operands: Vec<&TensorType> = operands.iter().collect();
        let results = planfile::infer(&op, &operands).unwrap();
        let work = work(&op, &operands, &results.iter().collect::<Vec<_>>());
        assert_eq!(work.operations, t * b * d * 3 * h * (2 * h + 8));
        assert_eq!(work.memory_bytes, 4 * (t * b * d * 3 * h + d * 3 * h * h + t * d * b * h + 2 * d * b * h));
    }

    #[test]
    fn a_ring_all_reduce_sends_almost_twice_the_tensor() {
        let op = Op::AllReduce { combine: planfile::Combine::Sum, groups: vec![vec![0, 1, 2, 3]] };
        let x = TensorType::new(DType::F32, &[1024]);
        assert_eq!(work(&op, &[&x], &[&x]).link_bytes, 2 * 4096 * 3 / 4);
    }
}
