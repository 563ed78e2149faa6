//! Result types of primitives from operand types: the one place that states what is legal.

mod recurrence;
mod window;

use crate::dtype::DType;
use crate::op::{Cell, Groups, Op, PadMode, PoolKind, Real, ReduceKind, ResizeMode};
use crate::types::{Dim, TensorType};
use recurrence::infer_recurrence;
use window::{infer_conv, infer_pool};

type Inferred = Result<Vec<TensorType>, String>;

/// Types of the results of `op` on operands of these types.
///
/// # Errors
/// A sentence that says which operand or attribute does not fit.
pub fn infer(op: &Op, operands: &[&TensorType]) -> Inferred {
    let count = operand_count(op);
    if let Some(count) = count
        && operands.len() != count
    {
        return Err(format!("takes {count} operands, not {}", operands.len()));
    }
    let results = infer_counted(op, operands)?;
    for result in &results {
        if result.bytes().is_none() {
            return Err(format!("result of {} dimensions overflows 63 bits of bytes", result.rank()));
        }
        if result.rank() > MAX_RANK {
            return Err(format!("rank {} exceeds {MAX_RANK}", result.rank()));
        }
    }
    Ok(results)
}

/// Largest rank of a tensor.
pub const MAX_RANK: usize = 64;

/// Number of operands, where the attributes fix it.
fn operand_count(op: &Op) -> Option<usize> {
    Some(match op {
        Op::Pointwise { .. } | Op::Concat { .. } => return None,
        Op::Recv { .. } => 0,
        Op::Dot { .. }
        | Op::Conv { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::Append { .. } => 2,
        Op::ScatterElements { .. } | Op::ScatterNd { .. } | Op::Rotary { .. } => 3,
        Op::Pad { mode, .. } => 1 + usize::from(*mode == PadMode::Constant),
        Op::Norm { scale, bias, .. } => 1 + usize::from(*scale) + usize::from(*bias),
        Op::Attention { mask, .. } => 3 + usize::from(*mask),
        Op::Recurrence { cell, bias, peepholes, lengths, .. } => {
            let lstm = matches!(cell, Cell::Lstm { .. });
            3 + [lstm, *bias, *peepholes, *lengths].into_iter().map(usize::from).sum::<usize>()
        }
        Op::Pool { .. }
        | Op::Reduce { .. }
        | Op::Scan { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Broadcast { .. }
        | Op::Resize { .. }
        | Op::TopK { .. }
        | Op::Softmax { .. }
        | Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. } => 1,
    })
}

/// Operand counts were checked by the caller.
fn infer_counted(op: &Op, operands: &[&TensorType]) -> Inferred {
    let one = |ty: TensorType| Ok(vec![ty]);
    match op {
        Op::Pointwise { expr, dims } => {
            let ty = TensorType { dtype: DType::Bool, dims: dims.clone() };
            for (position, operand) in operands.iter().enumerate() {
                broadcastable(operand, &ty).map_err(|why| format!("operand {position}: {why}"))?;
            }
            let dtypes: Vec<DType> = operands.iter().map(|operand| operand.dtype).collect();
            one(ty.with_dtype(expr.check(&dtypes, dims.len())?))
        }
        Op::Dot { batch, contract, out, .. } => one(infer_dot(operands[0], operands[1], batch, contract, *out)?),
        Op::Conv { window, groups, transposed, output_pads } => {
            one(infer_conv(operands[0], operands[1], window, *groups, *transposed, output_pads)?)
        }
        Op::Pool { kind, window, ceil, indices } => {
            let ty = infer_pool(operands[0], window, *ceil)?;
            if indices.is_some() && *kind != PoolKind::Max {
                return Err("only max pooling has indices".to_owned());
            }
            let second = indices.map(|_| ty.with_dtype(DType::I64));
            Ok([Some(ty), second].into_iter().flatten().collect())
        }
        Op::Reduce { kind, axes, keep } => one(infer_reduce(operands[0], *kind, axes, *keep)?),
        Op::Scan { axis, .. } | Op::Softmax { axis, .. } => {
            check_axis(operands[0], *axis)?;
            one(operands[0].clone())
        }
        Op::Gather { axis } => {
            let (x, indices) = (operands[0], operands[1]);
            check_axis(x, *axis)?;
            check_indices(indices)?;
            let axis = usize::from(*axis);
            let dims = [&x.dims[..axis], &indices.dims, &x.dims[axis + 1..]].concat();
            one(TensorType { dtype: x.dtype, dims })
        }
        Op::GatherElements { axis } => {
            check_axis(operands[0], *axis)?;
            check_indices(operands[1])?;
            check_elements(operands[0], operands[1], *axis)?;
            one(operands[1].with_dtype(operands[0].dtype))
        }
        Op::GatherNd { batch } => one(infer_gather_nd(operands[0], operands[1], usize::from(*batch))?),
        Op::ScatterElements { axis, .. } => {
            check_axis(operands[0], *axis)?;
            check_indices(operands[1])?;
            check_elements(operands[0], operands[1], *axis)?;
            if operands[1].dims != operands[2].dims || operands[2].dtype != operands[0].dtype {
                return Err(format!("updates {} for indices {} into {}", operands[2], operands[1], operands[0]));
            }
            one(operands[0].clone())
        }
        Op::ScatterNd { .. } => {
            let updates = infer_gather_nd(operands[0], operands[1], 0)?;
            if updates != *operands[2] {
                return Err(format!("updates are {}, expected {updates}", operands[2]));
            }
            one(operands[0].clone())
        }
        Op::Reshape { dims } => {
            let ty = TensorType { dtype: operands[0].dtype, dims: dims.clone() };
            if ty.elements().is_none() || ty.elements() != operands[0].elements() {
                return Err(format!("{} has another number of elements than {ty}", operands[0]));
            }
            one(ty)
        }
        Op::Transpose { permutation } => one(infer_transpose(operands[0], permutation)?),
        Op::Slice { starts, steps, sizes } => {
            check_slice(operands[0], starts, steps, sizes)?;
            one(TensorType::new(operands[0].dtype, sizes))
        }
        Op::Pad { low, high, mode } => one(infer_pad(operands, low, high, *mode)?),
        Op::Concat { axis } => one(infer_concat(operands, *axis)?),
        Op::Broadcast { dims } => {
            let ty = TensorType { dtype: operands[0].dtype, dims: dims.clone() };
            broadcastable(operands[0], &ty)?;
            one(ty)
        }
        Op::Resize { mode, scales, region, sizes, .. } => {
            let rank = operands[0].rank();
            if [scales.len(), region.len(), sizes.len()] != [rank; 3] {
                return Err(format!("needs {rank} scales, regions and sizes"));
            }
            check_scales(operands[0], *mode, scales, sizes)?;
            one(TensorType::new(operands[0].dtype, sizes))
        }
        Op::TopK { axis, k, .. } => {
            check_axis(operands[0], *axis)?;
            let mut values = operands[0].clone();
            if *k > values.size(usize::from(*axis)) {
                return Err(format!("k = {k} exceeds axis {axis} of {values}"));
            }
            values.dims[usize::from(*axis)] = Dim::Static(*k);
            let indices = values.with_dtype(DType::I64);
            Ok(vec![values, indices])
        }
        Op::Append { axis } => {
            check_axis(operands[0], *axis)?;
            same_rank(operands[0], operands[1])?;
            one(operands[0].clone())
        }
        Op::Norm { axis, scale, .. } => {
            check_axis(operands[0], *axis)?;
            require_float(operands[0])?;
            let tail = TensorType { dtype: operands[0].dtype, dims: operands[0].dims[usize::from(*axis)..].to_vec() };
            for (position, operand) in operands.iter().enumerate().skip(1) {
                let what = if *scale && position == 1 { "scale" } else { "bias" };
                broadcastable(operand, &tail).map_err(|why| format!("{what}: {why}"))?;
            }
            one(operands[0].clone())
        }
        Op::Attention { mask, .. } => one(infer_attention(operands, *mask)?),
        Op::Rotary { rotary, .. } => {
            infer_rotary(operands, *rotary)?;
            one(operands[0].clone())
        }
        Op::Recurrence { .. } => infer_recurrence(op, operands),
        Op::AllReduce { groups, .. } => {
            group_size(groups)?;
            one(operands[0].clone())
        }
        Op::AllGather { axis, groups } => one(scale_axis(operands[0], *axis, group_size(groups)?, 1)?),
        Op::ReduceScatter { axis, groups, .. } => one(scale_axis(operands[0], *axis, 1, group_size(groups)?)?),
        Op::AllToAll { split, concat, groups } => {
            let size = group_size(groups)?;
            let scattered = scale_axis(operands[0], *split, 1, size)?;
            one(scale_axis(&scattered, *concat, size, 1)?)
        }
        Op::Send { .. } => Ok(vec![]),
        Op::Recv { ty, .. } => one(ty.clone()),
    }
}

fn check_axis(ty: &TensorType, axis: u8) -> Result<(), String> {
    (usize::from(axis) < ty.rank()).then_some(()).ok_or_else(|| format!("axis {axis} of {ty}"))
}

fn check_indices(ty: &TensorType) -> Result<(), String> {
    let fine = matches!(ty.dtype, DType::I32 | DType::I64);
    fine.then_some(()).ok_or_else(|| format!("indices are {ty}, expected i32 or i64"))
}

/// Whether element-wise indices along `axis` stay inside of `x` on the other axes, where they name their own position.
fn check_elements(x: &TensorType, indices: &TensorType, axis: u8) -> Result<(), String> {
    same_rank(x, indices)?;
    let inside = |position: usize| position == usize::from(axis) || indices.size(position) <= x.size(position);
    let fine = (0..x.rank()).all(inside);
    fine.then_some(()).ok_or_else(|| format!("indices {indices} reach outside of {x} on another axis than {axis}"))
}

fn require_float(ty: &TensorType) -> Result<(), String> {
    ty.dtype.is_float().then_some(()).ok_or_else(|| format!("{ty} is not of a floating-point type"))
}

fn same_rank(a: &TensorType, b: &TensorType) -> Result<(), String> {
    (a.rank() == b.rank()).then_some(()).ok_or_else(|| format!("{a} and {b} differ in rank"))
}

/// Whether `from` expands to `to` under NumPy's rules.
fn broadcastable(from: &TensorType, to: &TensorType) -> Result<(), String> {
    let aligned = from.dims.iter().rev().zip(to.dims.iter().rev());
    let fits = from.rank() <= to.rank() && aligned.into_iter().all(|(a, b)| a == b || *a == Dim::Static(1));
    fits.then_some(()).ok_or_else(|| format!("{from} does not broadcast to dimensions of {to}"))
}

/// Distinct axes below the rank, marked in a table.
fn mark_axes(rank: usize, axes: impl Iterator<Item = u8>) -> Result<Vec<bool>, String> {
    let mut marked = vec![false; rank];
    for axis in axes {
        match marked.get_mut(usize::from(axis)) {
            Some(mark) if !*mark => *mark = true,
            _ => return Err(format!("axis {axis} is out of range or named twice at rank {rank}")),
        }
    }
    Ok(marked)
}

fn infer_dot(
    a: &TensorType,
    b: &TensorType,
    batch: &[(u8, u8)],
    contract: &[(u8, u8)],
    out: DType,
) -> Result<TensorType, String> {
    let pairs = || batch.iter().chain(contract);
    let a_used = mark_axes(a.rank(), pairs().map(|pair| pair.0))?;
    let b_used = mark_axes(b.rank(), pairs().map(|pair| pair.1))?;
    for &(x, y) in pairs() {
        if a.dims[usize::from(x)] != b.dims[usize::from(y)] {
            return Err(format!("axis {x} of {a} and axis {y} of {b} differ"));
        }
    }
    let free = |ty: &TensorType, used: &[bool]| -> Vec<Dim> {
        ty.dims.iter().zip(used).filter(|(_, used)| !**used).map(|(dim, _)| *dim).collect()
    };
    let batch_dims: Vec<Dim> = batch.iter().map(|pair| a.dims[usize::from(pair.0)]).collect();
    Ok(TensorType { dtype: out, dims: [batch_dims, free(a, &a_used), free(b, &b_used)].concat() })
}

fn infer_reduce(x: &TensorType, kind: ReduceKind, axes: &[u8], keep: bool) -> Result<TensorType, String> {
    let reduced = mark_axes(x.rank(), axes.iter().copied())?;
    let dtype = match kind {
        ReduceKind::ArgMax { .. } | ReduceKind::ArgMin { .. } if axes.len() != 1 => {
            return Err("arg-reductions take one axis".to_owned());
        }
        ReduceKind::ArgMax { .. } | ReduceKind::ArgMin { .. } => DType::I64,
        ReduceKind::Combine(_) | ReduceKind::Mean => x.dtype,
    };
    let dims = x.dims.iter().zip(&reduced).filter(|(_, gone)| keep || !**gone);
    let dims = dims.map(|(dim, gone)| if *gone { Dim::Static(1) } else { *dim }).collect();
    Ok(TensorType { dtype, dims })
}

fn infer_gather_nd(x: &TensorType, indices: &TensorType, batch: usize) -> Result<TensorType, String> {
    check_indices(indices)?;
    let depth = indices.dims.last().ok_or("indices need a last dimension")?.capacity();
    let depth = usize::try_from(depth).unwrap_or(usize::MAX);
    let fits = batch < indices.rank() && batch.saturating_add(depth) <= x.rank();
    if !fits || x.dims[..batch] != indices.dims[..batch] {
        return Err(format!("indices {indices} into {x} with {batch} batch dimensions"));
    }
    let dims = [&indices.dims[..indices.rank() - 1], &x.dims[batch + depth..]].concat();
    Ok(TensorType { dtype: x.dtype, dims })
}

fn infer_transpose(x: &TensorType, permutation: &[u8]) -> Result<TensorType, String> {
    mark_axes(x.rank(), permutation.iter().copied())?;
    if permutation.len() != x.rank() {
        return Err(format!("{} axes for {x}", permutation.len()));
    }
    let dims = permutation.iter().map(|&axis| x.dims[usize::from(axis)]).collect();
    Ok(TensorType { dtype: x.dtype, dims })
}

fn check_slice(x: &TensorType, starts: &[crate::expr::RankScalar], steps: &[i64], sizes: &[u64]) -> Result<(), String> {
    if [starts.len(), steps.len(), sizes.len()] != [x.rank(); 3] {
        return Err(format!("needs {} starts, steps and sizes", x.rank()));
    }
    for (axis, start) in starts.iter().enumerate() {
        let ranks = match start {
            crate::expr::RankScalar::Uniform(_) => 1,
            crate::expr::RankScalar::ByRank(table) => table.len(),
        };
        for first in (0..ranks).filter_map(|rank| start.get(rank)) {
            let last = i128::from(first) + i128::from(steps[axis]) * (i128::from(sizes[axis]) - 1);
            let bound = i128::from(x.size(axis));
            let inside = i128::from(first) >= 0 && i128::from(first) < bound && last >= 0 && last < bound;
            if sizes[axis] > 0 && (!inside || steps[axis] == 0) {
                return Err(format!("axis {axis}: {} from {first} by {} leaves {x}", sizes[axis], steps[axis]));
            }
        }
    }
    Ok(())
}

/// A filter that goes with the scale widens as it shrinks: the scale must be that of the sizes, up to rounding, or each
/// of many positions would be made from all of the input.
fn check_scales(x: &TensorType, mode: ResizeMode, scales: &[Real], sizes: &[u64]) -> Result<(), String> {
    let (ResizeMode::Linear { antialias: true } | ResizeMode::Cubic { antialias: true, .. }) = mode else {
        return Ok(());
    };
    for (axis, (scale, &size)) in scales.iter().zip(sizes).enumerate() {
        let implied = 2.0 * scale.0 * x.size(axis) as f64;
        if implied.is_nan() || implied < size as f64 {
            return Err(format!("a scale of {} does not make {size} of axis {axis} of {x}", scale.0));
        }
    }
    Ok(())
}

fn infer_pad(operands: &[&TensorType], low: &[i64], high: &[i64], mode: PadMode) -> Result<TensorType, String> {
    let x = operands[0];
    if [low.len(), high.len()] != [x.rank(); 2] {
        return Err(format!("needs {} amounts on each side", x.rank()));
    }
    if mode == PadMode::Constant && (operands[1].rank() != 0 || operands[1].dtype != x.dtype) {
        return Err(format!("value is {}, expected a scalar of {}", operands[1], x.dtype));
    }
    let mut sizes = x.sizes();
    for (axis, size) in sizes.iter_mut().enumerate() {
        let total = i128::from(*size) + i128::from(low[axis]) + i128::from(high[axis]);
        let empty = *size == 0 && mode != PadMode::Constant && total > 0;
        *size = match u64::try_from(total) {
            Ok(size) if !empty => size,
            _ => return Err(format!("padding axis {axis} of {x} gives {total} elements")),
        };
    }
    Ok(TensorType::new(x.dtype, &sizes))
}

fn infer_concat(operands: &[&TensorType], axis: u8) -> Result<TensorType, String> {
    let (first, rest) = operands.split_first().ok_or("takes at least one operand")?;
    check_axis(first, axis)?;
    let axis = usize::from(axis);
    let mut result = (*first).clone();
    for operand in rest {
        let mut expected = (*operand).clone();
        if operand.rank() == first.rank() {
            expected.dims[axis] = first.dims[axis];
        }
        if expected != **first {
            return Err(format!("{operand} beside {first} on axis {axis}"));
        }
        let total = result.size(axis).checked_add(operand.size(axis)).ok_or("the sizes overflow")?;
        result.dims[axis] = Dim::Static(total);
    }
    Ok(result)
}

fn infer_attention(operands: &[&TensorType], mask: bool) -> Result<TensorType, String> {
    let (q, k, v) = (operands[0], operands[1], operands[2]);
    require_float(q)?;
    if [q.rank(), k.rank(), v.rank()] != [4; 3] || k.dtype != q.dtype || v.dtype != q.dtype {
        return Err(format!("q {q}, k {k}, v {v}: expected rank 4 and one type"));
    }
    let batch = q.dims[0] == k.dims[0] && k.dims[0] == v.dims[0];
    let keys = k.dims[1] == v.dims[1] && k.dims[2] == v.dims[2] && k.dims[3] == q.dims[3];
    if !batch || !keys || k.size(1) == 0 || !q.size(1).is_multiple_of(k.size(1)) {
        return Err(format!("q {q}, k {k}, v {v} do not fit together"));
    }
    if mask {
        let scores = TensorType { dtype: q.dtype, dims: vec![q.dims[0], q.dims[1], q.dims[2], k.dims[2]] };
        broadcastable(operands[3], &scores).map_err(|why| format!("mask: {why}"))?;
        if operands[3].dtype != DType::Bool && operands[3].dtype != q.dtype {
            return Err(format!("mask is {}, expected bool or {}", operands[3], q.dtype));
        }
    }
    Ok(TensorType { dtype: q.dtype, dims: vec![q.dims[0], q.dims[1], q.dims[2], v.dims[3]] })
}

fn infer_rotary(operands: &[&TensorType], rotary: u64) -> Result<(), String> {
    let (x, cos, sin) = (operands[0], operands[1], operands[2]);
    require_float(x)?;
    if x.rank() != 4 || cos.rank() != 3 || cos != sin || cos.dtype != x.dtype {
        return Err(format!("x {x}, cos {cos}, sin {sin}: expected [B, H, S, D] and twice [B, S, R / 2]"));
    }
    let table = [cos.dims[1], cos.dims[2]] == [x.dims[2], Dim::Static(rotary / 2)];
    let batch = cos.dims[0] == x.dims[0] || cos.dims[0] == Dim::Static(1);
    let fits = table && batch && rotary.is_multiple_of(2) && rotary <= x.size(3);
    fits.then_some(()).ok_or_else(|| format!("x {x}, cos {cos}, {rotary} rotated features do not fit together"))
}

/// Size of the groups: all alike, not empty, no rank twice.
fn group_size(groups: &Groups) -> Result<u64, String> {
    let size = groups.first().map_or(0, Vec::len);
    let mut ranks: Vec<u32> = groups.iter().flatten().copied().collect();
    ranks.sort_unstable();
    ranks.dedup();
    let fine = size > 0 && groups.iter().all(|group| group.len() == size) && ranks.len() == size * groups.len();
    fine.then_some(size as u64).ok_or_else(|| "groups must be disjoint, of one size and not empty".to_owned())
}

/// Multiplies and divides the size of one axis, exactly.
fn scale_axis(ty: &TensorType, axis: u8, times: u64, divided_by: u64) -> Result<TensorType, String> {
    check_axis(ty, axis)?;
    let size = ty.size(usize::from(axis));
    let scaled = size.checked_mul(times).filter(|size| size.is_multiple_of(divided_by));
    let scaled = scaled.ok_or_else(|| format!("axis {axis} of {ty} is not divisible by {divided_by}"))?;
    let mut result = ty.clone();
    result.dims[usize::from(axis)] = Dim::Static(scaled / divided_by);
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Coordinates;

    #[test]
    fn widening_filters_have_the_scale_of_their_sizes() {
        let resize = |antialias, scale| {
            let op = Op::Resize {
                mode: ResizeMode::Linear { antialias },
                coordinates: Coordinates::HalfPixel,
                scales: vec![Real(scale)],
                region: vec![(Real(0.0), Real(1.0))],
                sizes: vec![3],
            };
            infer(&op, &[&TensorType::new(DType::F32, &[7])])
        };
        assert!(resize(true, 3.0 / 7.0).is_ok() && resize(true, 0.5).is_ok());
        assert!(resize(true, 1e-30).unwrap_err().contains("does not make 3 of axis 0"));
        assert!(resize(true, f64::NAN).is_err() && resize(true, -1.0).is_err());
        assert!(resize(false, 1e-30).is_ok());
    }

    #[test]
    fn indices_of_elements_stay_inside_on_other_axes() {
        let ty = |dtype, sizes: &[u64]| TensorType::new(dtype, sizes);
        let x = ty(DType::F32, &[2, 3]);
        for (sizes, fine) in [([2, 9], true), ([1, 0], true), ([3, 3], false), ([1 << 40, 0], false)] {
            let indices = ty(DType::I64, &sizes);
            let updates = ty(DType::F32, &sizes);
            assert_eq!(infer(&Op::GatherElements { axis: 1 }, &[&x, &indices]).is_ok(), fine, "{sizes:?}");
            let scatter = Op::ScatterElements { axis: 1, combine: None };
            assert_eq!(infer(&scatter, &[&x, &indices, &updates]).is_ok(), fine, "{sizes:?}");
        }
    }
}
