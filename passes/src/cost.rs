//! Predicted times: measured where the target has a measurement, the roofline of its device elsewhere.

use ir::{Graph, Node, ValueId};
use kernels::work;
use planfile::plan::StepCost;
use planfile::target::CollectiveTiming;
use planfile::{DType, Op, Spec, Target, TensorType, infer};

use crate::phase::Execution;

/// Cost of a node on one rank, at the sizes that its graph says.
pub fn node(graph: &Graph, node: &Node, target: &Target) -> StepCost {
    let types = |values: &[ValueId]| values.iter().map(|&value| graph.ty(value)).collect::<Vec<_>>();
    op(&node.op, &types(&node.operands), &types(&node.results), target)
}

/// Cost of a step: the operations of all its nodes, and the bytes that go in and out of it.
///
/// # Errors
/// What does not fit in the specification.
pub fn step(spec: &Spec, execution: &Execution, target: &Target) -> Result<StepCost, String> {
    let types = spec.types()?;
    let mut first = spec.inputs.len();
    let mut parts = Vec::with_capacity(spec.nodes.len());
    for node in &spec.nodes {
        let operands: Vec<&TensorType> = node.operands.iter().map(|&operand| &types[operand as usize]).collect();
        let count = infer(&node.op, &operands)?.len();
        let results: Vec<&TensorType> = types[first..first + count].iter().collect();
        first += count;
        parts.push(op(&node.op, &operands, &results, target));
    }
    let Some((&last, inner)) = parts.split_last() else { return Ok(StepCost::default()) };
    // What the host undoes of a weight's layout costs nothing.
    if inner.is_empty() || matches!(execution, Execution::Reference) {
        return Ok(last);
    }
    let results = spec.results.iter().map(|&result| &types[result as usize]);
    let memory_bytes = spec.inputs.iter().chain(results).filter_map(TensorType::bytes).fold(0, u64::saturating_add);
    // The slowest part, none of whose operands and results that stay inside are stored, but never faster than memory.
    let slowest = parts.iter().map(|part| part.predicted_ns).max().unwrap_or(0);
    Ok(StepCost {
        predicted_ns: slowest.max(memory_ns(memory_bytes, target)),
        operations: parts.iter().map(|part| part.operations).fold(0, u64::saturating_add),
        memory_bytes,
        link_bytes: 0,
    })
}

/// Cost of the same bytes elsewhere on the device.
pub fn copy(bytes: u64, target: &Target) -> StepCost {
    let memory_bytes = bytes.saturating_mul(2);
    StepCost { predicted_ns: memory_ns(memory_bytes, target), memory_bytes, ..StepCost::default() }
}

/// Time of a kernel that does nothing but read and write so many bytes.
fn memory_ns(bytes: u64, target: &Target) -> u64 {
    (bytes as f64 * 1e9 / target.device.memory_bytes_per_second + target.device.launch_ns).round() as u64
}

/// Cost of an operation on operands and results of these types.
pub fn op(op: &Op, operands: &[&TensorType], results: &[&TensorType], target: &Target) -> StepCost {
    let work = work(op, operands, results);
    let bytes = |types: &[&TensorType]| types.iter().filter_map(|ty| ty.bytes()).sum::<u64>();
    let predicted = if op.is_collective() {
        collective_ns(op, bytes(operands).max(bytes(results)), target)
    } else {
        let dtype = operands.first().map_or(DType::F32, |operand| operand.dtype);
        let matrix = matches!(op, Op::Dot { .. } | Op::Conv { .. } | Op::Attention { .. });
        let rate = operations_per_second(target, dtype, matrix);
        let compute = work.operations as f64 / rate;
        let memory = work.memory_bytes as f64 / target.device.memory_bytes_per_second;
        compute.max(memory).mul_add(1e9, target.device.launch_ns * waits(op, operands, target))
    };
    StepCost {
        predicted_ns: predicted.round() as u64,
        operations: work.operations,
        memory_bytes: work.memory_bytes,
        link_bytes: work.link_bytes,
    }
}

/// What attention of few query rows waits for on GPUs besides bytes, in launches: keys, values, then other blocks' parts.
/// Measured on an H100, 2026-11-27: 5 µs more than its bytes take, from 2 to 130 MB.
const WAITS_OF_FEW_QUERIES: f64 = 6.0;

/// How often all of the device waits for itself, the launch included: each step of a recurrence needs the one before.
fn waits(op: &Op, operands: &[&TensorType], target: &Target) -> f64 {
    let Some(first) = operands.first() else { return 1.0 };
    let is_gpu = !target.device.architecture.is_host();
    match op {
        Op::Recurrence { .. } => 1.0 + first.size(0) as f64,
        Op::Attention { .. } if is_gpu && first.size(2) <= kernels::cuda::FEW_QUERIES => WAITS_OF_FEW_QUERIES,
        _ => 1.0,
    }
}

/// Operations a second on this element type; `matrix` for products, which may have units of their own.
fn operations_per_second(target: &Target, dtype: DType, matrix: bool) -> f64 {
    let device = &target.device;
    let listed = device.matrix_operations_per_second.iter().find(|rate| matrix && rate.0 == dtype);
    listed.map_or(device.vector_operations_per_second, |rate| rate.1)
}

/// Time of a collective that moves tensors of `bytes` on each rank.
fn collective_ns(op: &Op, bytes: u64, target: &Target) -> f64 {
    let ranks = op.groups().map_or(2, |groups| groups.first().map_or(1, Vec::len) as u32);
    if ranks < 2 {
        return target.device.launch_ns;
    }
    let measured = |timing: &&CollectiveTiming| timing.collective == op.name() && timing.ranks == ranks;
    let mut points: Vec<(u64, f64)> =
        target.collectives.iter().filter(measured).map(|timing| (timing.bytes, timing.ns)).collect();
    points.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    points.dedup_by_key(|point| point.0);
    interpolate(&points, bytes).unwrap_or_else(|| modelled_ns(op, bytes, ranks, target))
}

/// Between the two nearest measured sizes in proportion; below the smallest its time, above the largest its rate.
fn interpolate(points: &[(u64, f64)], bytes: u64) -> Option<f64> {
    let (first, last) = (points.first()?, points.last()?);
    if bytes <= first.0 {
        return Some(first.1);
    }
    if bytes >= last.0 {
        return Some(last.1 * bytes as f64 / last.0 as f64);
    }
    let upper = points.iter().position(|point| point.0 >= bytes)?;
    let (a, b) = (points[upper - 1], points[upper]);
    let share = (bytes - a.0) as f64 / (b.0 - a.0) as f64;
    Some(share.mul_add(b.1 - a.1, a.1))
}

/// Ring algorithms over the slowest link: bytes that each rank sends, and a latency per step.
fn modelled_ns(op: &Op, bytes: u64, ranks: u32, target: &Target) -> f64 {
    let slowest = target.links.iter().min_by(|a, b| a.bytes_per_second.total_cmp(&b.bytes_per_second));
    let Some(link) = slowest else { return target.device.launch_ns };
    let (ranks, bytes) = (f64::from(ranks), bytes as f64);
    let (sent, steps) = match op {
        Op::AllReduce { .. } => (2.0 * bytes * (ranks - 1.0) / ranks, 2.0 * (ranks - 1.0)),
        Op::AllGather { .. } | Op::ReduceScatter { .. } | Op::AllToAll { .. } => {
            (bytes * (ranks - 1.0) / ranks, ranks - 1.0)
        }
        _ => (bytes, 1.0),
    };
    (sent / link.bytes_per_second).mul_add(1e9, steps.mul_add(link.latency_ns, target.device.launch_ns))
}

#[cfg(test)]
mod tests {
    use planfile::op::Real;

    use super::*;

    #[test]
    fn steps_of_a_recurrence_wait_for_each_other() {
        let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
        let cost = |steps: u64| {
            let ty = |sizes: &[u64]| TensorType::new(DType::F32, sizes);
            let operands = [ty(&[steps, 1, 1, 8]), ty(&[1, 8, 8]), ty(&[1, 1, 8])];
            let recurrence = Op::Recurrence {
                cell: planfile::op::Cell::Rnn,
                reverse: vec![false],
                functions: vec![planfile::Expr::operand(0)],
                bias: false,
                peepholes: false,
                lengths: false,
            };
            let operands: Vec<&TensorType> = operands.iter().collect();
            let results = infer(&recurrence, &operands).unwrap();
            op(&recurrence, &operands, &results.iter().collect::<Vec<_>>(), &target).predicted_ns as f64
        };
        assert!(cost(1000) > 1000.0 * target.device.launch_ns && cost(0) < 2.0 * target.device.launch_ns);
    }

    #[test]
    fn attention_of_few_queries_is_waiting_and_of_many_keys_reading() {
        let cost = |target: &Target, batch: u64, queries: u64| {
            let ty = |heads: u64, rows: u64| TensorType::new(DType::BF16, &[batch, heads, rows, 128]);
            let operands = [ty(32, queries), ty(8, 2048), ty(8, 2048)];
            let attention = Op::Attention { scale: Real(0.1), causal: None, softcap: Real(0.0), mask: false };
            op(&attention, &operands.each_ref(), &[&ty(32, queries)], target).predicted_ns
        };
        let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
        let bytes_ns =
            |batch: u64| (batch * 2 * 8 * 2048 * 128 * 2) as f64 * 1e9 / target.device.memory_bytes_per_second;
        // 7 µs of which 5 are no bytes, and hardly more than the bytes at batch 16.
        assert!((6_000..9_000).contains(&cost(&target, 1, 1)), "{}", cost(&target, 1, 1));
        assert!((cost(&target, 16, 1) as f64) < 1.2 * bytes_ns(16) && cost(&target, 16, 1) as f64 > bytes_ns(16));
        assert!(cost(&target, 1, 17) < cost(&target, 1, 16));
        let host = Target::from_json(include_str!("../../fixtures/targets/cpu.json")).unwrap();
        assert!(cost(&host, 1, 1) <= cost(&host, 1, 17));
    }

    #[test]
    fn collectives_interpolate_between_measured_sizes() {
        let points = [(1000, 10.0), (3000, 30.0)];
        assert_eq!(interpolate(&points, 500), Some(10.0));
        assert_eq!(interpolate(&points, 2000), Some(20.0));
        assert_eq!(interpolate(&points, 6000), Some(60.0));
        assert_eq!(interpolate(&[], 1), None);
    }
}
