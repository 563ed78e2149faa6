//! Named factors of each primitive: which dimensions of operands and results run over the same index.
//!
//! A matrix product has factors b, m, n and k; giving a factor some sub-axes of the mesh splits every dimension that
//! runs over it. A factor that no result has is reduced, and splitting it leaves partial results.

use ir::{Segment, Split, SubAxes};
use planfile::expr::ExprOp;
use planfile::op::{Cell, ReduceKind};
use planfile::{Combine, Expr, Op, TensorType};

/// What splitting a factor means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Each rank computes its own part of the results.
    Parallel,
    /// Each rank computes a term of the results.
    Reduce(Combine),
    /// Must be whole on every rank.
    Whole,
}

/// One index that dimensions run over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor {
    pub(crate) size: u64,
    pub(crate) kind: Kind,
    /// Can be split in several segments: no index arithmetic depends on positions in it.
    pub(crate) segmentable: bool,
}

/// A dimension's factor; the dimension holds `scale` elements for each index of the factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Along {
    pub(crate) factor: usize,
    pub(crate) scale: u64,
}

/// Factors of one node; `None` marks dimensions that stay whole without constraining others (broadcast ones).
#[derive(Clone, Debug, Default)]
pub(crate) struct Factors {
    pub(crate) factors: Vec<Factor>,
    pub(crate) operands: Vec<Vec<Option<Along>>>,
    pub(crate) results: Vec<Vec<Option<Along>>>,
}

/// How a factor is split: sub-axes, and segments in units of the factor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) over: SubAxes,
    pub(crate) segments: Vec<Segment>,
}

impl Assignment {
    /// The split of a dimension that runs along the factor.
    pub(crate) fn split(&self, dim: usize, scale: u64) -> Split {
        let scaled = |segment: &Segment| Segment { size: segment.size * scale, unit: segment.unit * scale };
        Split { dim: dim as u8, over: self.over, segments: self.segments.iter().map(scaled).collect() }
    }

    /// The assignment that gives a dimension this split; `None` where segments cut across `scale`.
    pub(crate) fn from_split(split: &Split, scale: u64) -> Option<Self> {
        let fits = |segment: &Segment| segment.size.is_multiple_of(scale) && segment.unit.is_multiple_of(scale);
        let divided = |segment: &Segment| Segment { size: segment.size / scale, unit: segment.unit / scale };
        let segments = split.segments.iter().map(divided).collect();
        split.segments.iter().all(fits).then_some(Self { over: split.over, segments })
    }
}

impl Factors {
    fn add(&mut self, size: u64, kind: Kind) -> Option<Along> {
        self.factors.push(Factor { size, kind, segmentable: true });
        Some(Along { factor: self.factors.len() - 1, scale: 1 })
    }

    /// A factor per dimension.
    fn dims(&mut self, ty: &TensorType, kind: impl Fn(usize) -> Kind) -> Vec<Option<Along>> {
        ty.sizes().iter().enumerate().map(|(dim, &size)| self.add(size, kind(dim))).collect()
    }
}

/// Right-aligned broadcasting: the operand's dimensions of size 1 stay whole.
fn aligned(operand: &TensorType, result: &[Option<Along>]) -> Vec<Option<Along>> {
    let lead = result.len() - operand.rank();
    operand.sizes().iter().zip(&result[lead..]).map(|(&size, along)| if size == 1 { None } else { *along }).collect()
}

/// The factors of `op`. Operations without an entry of their own are whole in every dimension.
pub(crate) fn factors(op: &Op, operands: &[&TensorType], results: &[&TensorType]) -> Factors {
    let mut table = Factors::default();
    let only = |whole: &[usize]| {
        let whole = whole.to_vec();
        move |dim: usize| if whole.contains(&dim) { Kind::Whole } else { Kind::Parallel }
    };
    match op {
        Op::Pointwise { expr, .. } => {
            let dims = table.dims(results[0], |_| Kind::Parallel);
            for axis in indexed_axes(expr) {
                table.factors[axis].segmentable = false;
            }
            table.operands = operands.iter().map(|operand| aligned(operand, &dims)).collect();
            table.results = vec![dims];
        }
        Op::Broadcast { .. } => {
            let dims = table.dims(results[0], |_| Kind::Parallel);
            table.operands = vec![aligned(operands[0], &dims)];
            table.results = vec![dims];
        }
        Op::Dot { batch, contract, .. } => dot(&mut table, operands, batch, contract),
        Op::Conv { groups, transposed, .. } => conv(&mut table, operands, results[0], *groups, *transposed),
        Op::Pool { .. } | Op::Resize { .. } => {
            let kept: Vec<bool> = operands[0].sizes().iter().zip(results[0].sizes()).map(|(a, b)| *a == b).collect();
            let free = matches!(op, Op::Pool { indices: None, .. } | Op::Resize { .. });
            let dims =
                table.dims(operands[0], |dim| if dim < 2 && kept[dim] && free { Kind::Parallel } else { Kind::Whole });
            let result: Vec<Option<Along>> =
                dims.iter().enumerate().map(|(dim, along)| along.filter(|_| dim < 2)).collect();
            table.results = vec![result; results.len()];
            table.operands = vec![dims];
        }
        Op::Reduce { kind, axes, keep } => reduce(&mut table, operands[0], *kind, axes, *keep),
        Op::Scan { axis, .. } | Op::Softmax { axis, .. } | Op::TopK { axis, .. } => {
            let dims = table.dims(operands[0], only(&[usize::from(*axis)]));
            table.results = vec![dims.clone(); results.len()];
            table.operands = vec![dims];
        }
        Op::Norm { axis, .. } => {
            let axis = usize::from(*axis);
            let dims = table.dims(operands[0], |dim| if dim < axis { Kind::Parallel } else { Kind::Whole });
            table.operands = operands.iter().map(|operand| aligned(operand, &dims)).collect();
            table.results = vec![dims];
        }
        Op::Gather { axis } => {
            let axis = usize::from(*axis);
            let table_dims = table.dims(operands[0], only(&[axis]));
            let index_dims = table.dims(operands[1], |_| Kind::Parallel);
            let result = [&table_dims[..axis], &index_dims, &table_dims[axis + 1..]].concat();
            table.operands = vec![table_dims, index_dims];
            table.results = vec![result];
        }
        Op::GatherElements { axis } => {
            let (x, indices) = (operands[0].sizes(), operands[1].sizes());
            let differs: Vec<usize> = (0..x.len()).filter(|&dim| x[dim] != indices[dim]).collect();
            let mut whole = differs;
            whole.push(usize::from(*axis));
            let dims = table.dims(operands[0], only(&whole));
            table.operands = vec![dims.clone(), dims.clone()];
            table.results = vec![dims];
        }
        Op::GatherNd { batch } => {
            let batch = usize::from(*batch);
            let depth = operands[1].sizes().last().map_or(0, |&depth| depth as usize);
            let x = table.dims(operands[0], |dim| {
                if (batch..batch + depth).contains(&dim) { Kind::Whole } else { Kind::Parallel }
            });
            let last = operands[1].rank() - 1;
            let mut indices = x[..batch].to_vec();
            for (dim, &size) in operands[1].sizes().iter().enumerate().skip(batch) {
                indices.push(table.add(size, if dim == last { Kind::Whole } else { Kind::Parallel }));
            }
            table.results = vec![[&indices[..last], &x[batch + depth..]].concat()];
            table.operands = vec![x, indices];
        }
        Op::Transpose { permutation } => {
            let dims = table.dims(operands[0], |_| Kind::Parallel);
            table.results = vec![permutation.iter().map(|&axis| dims[usize::from(axis)]).collect()];
            table.operands = vec![dims];
        }
        Op::Pad { low, high, .. } => {
            let padded: Vec<usize> = (0..low.len()).filter(|&dim| low[dim] != 0 || high[dim] != 0).collect();
            let dims = table.dims(operands[0], only(&padded));
            table.operands = vec![dims.clone()];
            table.operands.resize(operands.len(), Vec::new());
            table.results = vec![dims];
        }
        Op::Rotary { .. } => {
            let dims = table.dims(operands[0], only(&[2, 3]));
            let batch = if operands[1].size(0) == 1 { None } else { dims[0] };
            let tables = vec![batch, None, None];
            table.operands = vec![dims.clone(), tables.clone(), tables];
            table.results = vec![dims];
        }
        Op::Attention { mask, .. } => {
            let [q, k] = [operands[0], operands[1]];
            let dims = table.dims(q, |dim| if dim < 2 { Kind::Parallel } else { Kind::Whole });
            let heads = if k.size(1) == q.size(1) { dims[1] } else { None };
            let keys = vec![dims[0], heads, None, None];
            table.operands = vec![dims.clone(), keys.clone(), keys];
            if *mask {
                table.operands.push(aligned(operands[3], &[dims[0], dims[1], None, None]));
            }
            table.results = vec![vec![dims[0], dims[1], None, None]];
        }
        Op::Recurrence { cell, bias, peepholes, lengths, .. } => {
            // Each step needs the whole state of a sample; samples do not see each other.
            let batch = table.add(operands[0].size(1), Kind::Parallel);
            let state = vec![None, batch, None];
            table.operands = vec![vec![None, batch, None, None], vec![None; 3], state.clone()];
            table.results = vec![vec![None, None, batch, None], state.clone()];
            if matches!(cell, Cell::Lstm { .. }) {
                table.operands.push(state.clone());
                table.results.push(state);
            }
            for _ in [bias, peepholes].into_iter().filter(|present| **present) {
                table.operands.push(vec![None; 2]);
            }
            if *lengths {
                table.operands.push(vec![batch]);
            }
        }
        // Reshape, Slice and Concat map splits by rules of their own.
        Op::Reshape { .. }
        | Op::Slice { .. }
        | Op::Concat { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Append { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. }
        | Op::Recv { .. } => {
            table.operands = operands.iter().map(|operand| vec![None; operand.rank()]).collect();
            table.results = results.iter().map(|result| vec![None; result.rank()]).collect();
        }
    }
    table
}

/// Axes whose index the expression reads.
pub(crate) fn indexed_axes(expr: &Expr) -> impl Iterator<Item = usize> {
    expr.ops.iter().filter_map(|op| match op {
        ExprOp::Index { axis, .. } => Some(usize::from(*axis)),
        _ => None,
    })
}

fn dot(table: &mut Factors, operands: &[&TensorType], batch: &[(u8, u8)], contract: &[(u8, u8)]) {
    let (a, b) = (operands[0], operands[1]);
    let (mut a_dims, mut b_dims) = (vec![None; a.rank()], vec![None; b.rank()]);
    let mut result = Vec::new();
    for &(x, y) in batch {
        let along = table.add(a.size(usize::from(x)), Kind::Parallel);
        (a_dims[usize::from(x)], b_dims[usize::from(y)]) = (along, along);
        result.push(along);
    }
    for &(x, y) in contract {
        let along = table.add(a.size(usize::from(x)), Kind::Reduce(Combine::Sum));
        (a_dims[usize::from(x)], b_dims[usize::from(y)]) = (along, along);
    }
    for (operand, dims) in [(a, &mut a_dims), (b, &mut b_dims)] {
        for (dim, along) in dims.iter_mut().enumerate() {
            if along.is_none() {
                *along = table.add(operand.size(dim), Kind::Parallel);
                result.push(*along);
            }
        }
    }
    table.operands = vec![a_dims, b_dims];
    table.results = vec![result];
}

fn conv(table: &mut Factors, operands: &[&TensorType], result: &TensorType, groups: u64, transposed: bool) {
    let (x, w) = (operands[0], operands[1]);
    let spatial = vec![None; x.rank() - 2];
    let batch = table.add(x.size(0), Kind::Parallel);
    let [inputs, outputs, w0, w1] = if groups == 1 {
        let inputs = table.add(x.size(1), Kind::Reduce(Combine::Sum));
        let outputs = table.add(result.size(1), Kind::Parallel);
        if transposed { [inputs, outputs, inputs, outputs] } else { [inputs, outputs, outputs, inputs] }
    } else {
        let along = table.add(groups, Kind::Parallel);
        let scaled = |size: u64| along.map(|along| Along { scale: size / groups, ..along });
        [scaled(x.size(1)), scaled(result.size(1)), scaled(w.size(0)), None]
    };
    let with_spatial = |a, b| [vec![a, b], spatial.clone()].concat();
    table.operands = vec![with_spatial(batch, inputs), with_spatial(w0, w1)];
    table.results = vec![with_spatial(batch, outputs)];
}

fn reduce(table: &mut Factors, x: &TensorType, kind: ReduceKind, axes: &[u8], keep: bool) {
    let reduced = |dim: usize| axes.iter().any(|&axis| usize::from(axis) == dim);
    let dims = table.dims(x, |dim| match kind {
        _ if !reduced(dim) => Kind::Parallel,
        ReduceKind::Combine(combine @ (Combine::Sum | Combine::Max | Combine::Min)) => Kind::Reduce(combine),
        ReduceKind::Combine(Combine::Prod) | ReduceKind::Mean => Kind::Whole,
        ReduceKind::ArgMax { .. } | ReduceKind::ArgMin { .. } => Kind::Whole,
    });
    let result = dims.iter().enumerate().filter(|(dim, _)| keep || !reduced(*dim));
    table.results = vec![result.map(|(dim, along)| if reduced(dim) { None } else { *along }).collect()];
    table.operands = vec![dims];
}

#[cfg(test)]
mod tests {
    use planfile::{DType, infer};

    use super::*;

    #[test]
    fn samples_of_a_recurrent_layer_are_its_only_factor() {
        let [steps, batch, directions, width] = [7, 6, 2, 5];
        let ty = |sizes: &[u64]| TensorType::new(DType::F32, sizes);
        let state = ty(&[directions, batch, width]);
        let operands = [
            ty(&[steps, batch, directions, 4 * width]),
            ty(&[directions, 4 * width, width]),
            state.clone(),
            state,
            ty(&[directions, 3 * width]),
            TensorType::new(DType::I64, &[batch]),
        ];
        let op = Op::Recurrence {
            cell: Cell::Lstm { coupled: false },
            reverse: vec![false, true],
            functions: vec![Expr::operand(0); 6],
            bias: false,
            peepholes: true,
            lengths: true,
        };
        let operands: Vec<&TensorType> = operands.iter().collect();
        let results = infer(&op, &operands).unwrap();
        let results: Vec<&TensorType> = results.iter().collect();
        let table = factors(&op, &operands, &results);
        assert_eq!(table.factors.len(), 1);
        assert_eq!((table.factors[0].size, table.factors[0].kind), (batch, Kind::Parallel));
        let split = |dims: &[Vec<Option<Along>>]| -> Vec<(usize, Vec<usize>)> {
            let along = |dims: &Vec<Option<Along>>| (0..dims.len()).filter(|&dim| dims[dim].is_some()).collect();
            dims.iter().map(|dims| (dims.len(), along(dims))).collect()
        };
        let (state, none) = ((3, vec![1]), vec![]);
        let expected = [(4, vec![1]), (3, none.clone()), state.clone(), state.clone(), (2, none), (1, vec![0])];
        assert_eq!(split(&table.operands), expected);
        assert_eq!(split(&table.results), [(4, vec![2]), state.clone(), state]);
    }
}
