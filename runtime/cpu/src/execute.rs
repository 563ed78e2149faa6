//! Entry points: checks a primitive against its operands and results, then hands it to its family.

use planfile::text::few;
use planfile::{Op, Tensor, TensorType, infer};

use crate::error::CpuError;
use crate::view::{View, ViewMut};
use crate::{
    attention, conv, dot, gather, movement, norm, pointwise, pool, recurrence, reduce, resize, rotary, scan, scatter,
    softmax, topk,
};

/// Executes one primitive. `rank`: position among the stage's ranks, for attributes that differ by rank.
///
/// Operand and result types are compared with what [`planfile::infer`] says, byte lengths with the types.
///
/// # Errors
/// [`CpuError`]; results may then be partly written.
pub fn execute(op: &Op, rank: usize, operands: &[View<'_>], results: &mut [ViewMut<'_>]) -> Result<(), CpuError> {
    if op.is_collective() {
        return Err(CpuError::Collective { op: op.name() });
    }
    let types: Vec<&TensorType> = operands.iter().map(|operand| operand.ty).collect();
    let expected = infer(op, &types).map_err(|why| CpuError::Type(format!("{}: {why}", op.name())))?;
    if !expected.iter().eq(results.iter().map(|result| result.ty)) {
        let (given, expected) = (few(results.iter().map(|result| result.ty)), few(&expected));
        return Err(CpuError::Type(format!("{}: results are {given}, expected {expected}", op.name())));
    }
    for (position, operand) in operands.iter().enumerate() {
        check_length(op, "operand", position, operand.ty, operand.bytes.len())?;
    }
    for (position, result) in results.iter().enumerate() {
        check_length(op, "result", position, result.ty, result.bytes.len())?;
    }
    // Nothing to write; and the families need not consider sizes whose product with zero alone fits in memory.
    if results.iter().all(|result| result.bytes.is_empty()) {
        return Ok(());
    }
    dispatch(op, rank, operands, results)
}

fn check_length(op: &Op, what: &str, position: usize, ty: &TensorType, actual: usize) -> Result<(), CpuError> {
    let length =
        |expected| CpuError::Length { what: format!("{}: {what} {position} ({ty})", op.name()), expected, actual };
    match ty.bytes() {
        Some(expected) if expected == actual as u64 => Ok(()),
        expected => Err(length(expected.unwrap_or(u64::MAX))),
    }
}

/// Operand and result counts follow from the types, which were checked.
fn dispatch(op: &Op, rank: usize, operands: &[View<'_>], results: &mut [ViewMut<'_>]) -> Result<(), CpuError> {
    let (first, rest) = results.split_first_mut().ok_or_else(|| CpuError::Type(format!("{}: no result", op.name())))?;
    match op {
        Op::Pointwise { expr, dims: _ } => pointwise::pointwise(expr, rank, operands, first),
        Op::Dot { batch, contract, accumulate, out: _ } => {
            dot::dot(batch, contract, *accumulate, &operands[0], &operands[1], first)
        }
        Op::Conv { window, groups, transposed, output_pads: _ } => {
            conv::conv(window, *groups, *transposed, &operands[0], &operands[1], first)
        }
        Op::Pool { kind, window, ceil: _, indices } => {
            pool::pool(*kind, window, *indices, &operands[0], first, rest.first_mut())
        }
        Op::Reduce { kind, axes, keep: _ } => reduce::reduce(*kind, axes, &operands[0], first),
        Op::Scan { combine, axis, exclusive, reverse } => {
            scan::scan(*combine, usize::from(*axis), *exclusive, *reverse, &operands[0], first)
        }
        Op::Gather { axis } => gather::gather(usize::from(*axis), &operands[0], &operands[1], first),
        Op::GatherElements { axis } => gather::gather_elements(usize::from(*axis), &operands[0], &operands[1], first),
        Op::GatherNd { batch } => gather::gather_nd(usize::from(*batch), &operands[0], &operands[1], first),
        Op::ScatterElements { axis, combine } => {
            scatter::scatter_elements(usize::from(*axis), *combine, operands, first)
        }
        Op::ScatterNd { combine } => scatter::scatter_nd(*combine, operands, first),
        Op::Reshape { dims: _ } => {
            first.bytes.copy_from_slice(operands[0].bytes);
            Ok(())
        }
        Op::Transpose { permutation } => movement::transpose(permutation, &operands[0], first),
        Op::Slice { starts, steps, sizes: _ } => movement::slice(starts, steps, rank, &operands[0], first),
        Op::Pad { low, high: _, mode } => movement::pad(low, *mode, operands, first),
        Op::Concat { axis } => movement::concat(usize::from(*axis), operands, first),
        Op::Broadcast { dims: _ } => movement::broadcast(&operands[0], first),
        Op::Resize { mode, coordinates, scales, region, sizes: _ } => {
            resize::resize(*mode, *coordinates, scales, region, &operands[0], first)
        }
        Op::TopK { axis, k: _, largest, sorted: _ } => match rest {
            [indices] => topk::topk(usize::from(*axis), *largest, &operands[0], first, indices),
            _ => Err(CpuError::Type("top_k: no result for the indices".to_owned())),
        },
        Op::Append { .. } => Err(CpuError::Unsupported {
            op: op.name(),
            dtype: first.ty.dtype,
            hint: "the state's current extent is known to the device that holds it; concatenate static tensors instead",
        }),
        Op::Softmax { axis, log } => softmax::softmax(usize::from(*axis), *log, &operands[0], first),
        Op::Norm { kind, axis, epsilon, scale, bias: _ } => {
            norm::norm(*kind, usize::from(*axis), epsilon.0, *scale, operands, first)
        }
        Op::Attention { scale, causal, softcap, mask: _ } => {
            attention::attention(scale.0, *causal, softcap.0, operands, first)
        }
        Op::Rotary { interleaved, rotary: _ } => rotary::rotary(*interleaved, operands, first),
        Op::Recurrence { cell, reverse, functions, bias, peepholes, lengths } => {
            let layer = recurrence::Layer { cell: *cell, reverse, functions };
            recurrence::recurrence(&layer, [*bias, *peepholes, *lengths], operands, first, rest)
        }
        Op::AllReduce { .. }
        | Op::AllGather { .. }
        | Op::ReduceScatter { .. }
        | Op::AllToAll { .. }
        | Op::Send { .. }
        | Op::Recv { .. } => Err(CpuError::Collective { op: op.name() }),
    }
}

/// Infers the result types, allocates and executes, as the stage's first rank. For constant folding.
///
/// # Errors
/// [`CpuError`].
pub fn evaluate(op: &Op, operands: &[&Tensor]) -> Result<Vec<Tensor>, CpuError> {
    if op.is_collective() {
        return Err(CpuError::Collective { op: op.name() });
    }
    let types: Vec<&TensorType> = operands.iter().map(|operand| &operand.ty).collect();
    let types = infer(op, &types).map_err(|why| CpuError::Type(format!("{}: {why}", op.name())))?;
    let allocate = |ty: TensorType| {
        let bytes = ty.bytes().unwrap_or(u64::MAX);
        Tensor::zeroed(ty.clone()).ok_or_else(|| CpuError::Memory { op: op.name(), ty, bytes })
    };
    let mut results: Vec<Tensor> = types.into_iter().map(allocate).collect::<Result<_, _>>()?;
    let operands: Vec<View<'_>> = operands.iter().map(|&operand| View::from(operand)).collect();
    let mut views: Vec<ViewMut<'_>> = results.iter_mut().map(ViewMut::from).collect();
    execute(op, 0, &operands, &mut views)?;
    Ok(results)
}
