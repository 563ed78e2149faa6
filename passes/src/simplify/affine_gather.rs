//! Gathers whose indices are known and regular become slices, transposes and broadcasts of the operand.
//!
//! before  %i = grid [B, 1, S, T, 2] of (batch index, key index)     after  %r = reshape %mask [B, 1, 1, T]
//!         %m = gather_nd %mask, %i                                         %m = broadcast %r [B, 1, S, T]
//!
//! A gather could be split by no dimension that its indices go through; these can, so a mask follows the batch. A gather
//! by one constant index is the simplest case.

use ir::ValueId;
use planfile::{Dim, Op, RankScalar};

use super::affine::{Affine, is_index_type};
use super::sweep::{Call, Step, Sweep};
use crate::error::PassError;

/// Where the elements of one dimension of the operand go.
#[derive(Clone, Copy, Debug)]
struct Pick {
    start: i64,
    step: i64,
    size: u64,
    /// Dimension of the result; none for a single index.
    to: Option<usize>,
}

pub(super) fn apply(sweep: &mut Sweep<'_, '_, '_>, call: &Call) -> Result<Option<Step>, PassError> {
    let &[x, indices] = call.operands.as_slice() else { return Ok(None) };
    let (x_dims, index_ty) = (sweep.ty(x).dims.clone(), sweep.ty(indices).clone());
    let Some(x_sizes) = x_dims.iter().map(|dim| dim.fixed()).collect::<Option<Vec<u64>>>() else { return Ok(None) };
    if !is_index_type(&index_ty) || x_sizes.contains(&0) {
        return Ok(None);
    }
    let index_sizes = index_ty.sizes();
    let whole = |axis: usize, to: usize| Pick { start: 0, step: 1, size: x_sizes[axis], to: Some(to) };
    let (picks, result) = match call.op {
        Op::Gather { axis } => {
            let axis = usize::from(axis);
            let Some(affine) = sweep.affine(indices) else { return Ok(None) };
            let Some(along) = pick(affine, &index_sizes, x_sizes[axis], axis) else { return Ok(None) };
            let after = axis + index_sizes.len();
            let mut picks: Vec<Pick> = (0..axis).map(|axis| whole(axis, axis)).collect();
            picks.push(along);
            picks.extend((axis + 1..x_sizes.len()).map(|other| whole(other, after + other - axis - 1)));
            (picks, [&x_sizes[..axis], &index_sizes, &x_sizes[axis + 1..]].concat())
        }
        Op::GatherNd { batch } => {
            let batch = usize::from(batch);
            let Some((_, grid)) = index_sizes.split_last() else { return Ok(None) };
            let Some(components) = components(sweep, indices)? else { return Ok(None) };
            let mut picks: Vec<Pick> = (0..batch).map(|axis| whole(axis, axis)).collect();
            for component in &components {
                let size = x_sizes[picks.len()];
                let Some(pick) = pick(component, grid, size, 0) else { return Ok(None) };
                picks.push(pick);
            }
            let (inner, first) = (picks.len(), grid.len());
            picks.extend((inner..x_sizes.len()).map(|axis| whole(axis, first + axis - inner)));
            (picks, [grid, &x_sizes[inner..]].concat())
        }
        _ => return Ok(None),
    };
    let mut targets: Vec<usize> = picks.iter().filter_map(|pick| pick.to).collect();
    targets.sort_unstable();
    if targets.windows(2).any(|pair| pair[0] == pair[1]) {
        // Two indices that move together take a diagonal.
        return Ok(None);
    }
    view(sweep, call, x, &picks, &result).map(|value| Some(Step::Values(vec![value])))
}

/// One dimension's pick from the function of its indices; `offset` is added to the dimension of the result.
fn pick(affine: &Affine, grid: &[u64], size: u64, offset: usize) -> Option<Pick> {
    let (low, high) = affine.range(grid)?;
    let size = i64::try_from(size).ok()?;
    // Negative indices count from the end; indices on both sides of zero are not regular.
    let shift = if high < 0 { size } else { 0 };
    (low.checked_add(shift)? >= 0 && high.checked_add(shift)? < size).then_some(())?;
    let start = affine.base + shift;
    let mut moving = affine.steps.iter().enumerate().filter(|(_, step)| **step != 0);
    match (moving.next(), moving.next()) {
        (None, _) => Some(Pick { start, step: 1, size: 1, to: None }),
        (Some((dim, &step)), None) => Some(Pick { start, step, size: grid[dim], to: Some(dim + offset) }),
        (Some(_), Some(_)) => None,
    }
}

/// The function of each component of index tuples: `indices[.., c]`, over the dimensions before the last.
fn components(sweep: &mut Sweep<'_, '_, '_>, indices: ValueId) -> Result<Option<Vec<Affine>>, PassError> {
    let sizes = sweep.ty(indices).sizes();
    let Some((&depth, grid)) = sizes.split_last() else { return Ok(None) };
    if let Some(affine) = sweep.affine(indices) {
        return Ok(along_last(affine, depth));
    }
    if let Some(weight) = sweep.as_weight(indices) {
        let Some(elements) = sweep.weights.read(weight)?.and_then(|tensor| tensor.to_i64s()) else { return Ok(None) };
        let depth = depth as usize;
        let component = |c: usize| elements.iter().skip(c).step_by(depth).copied().collect::<Vec<_>>();
        return Ok((0..depth).map(|c| Affine::fit(grid, &component(c))).collect());
    }
    let Some(node) = sweep.producer(indices) else { return Ok(None) };
    let last = grid.len();
    if !matches!(node.op, Op::Concat { axis } if usize::from(axis) == last) {
        return Ok(None);
    }
    let parts = node.operands.iter().map(|&part| along_last(sweep.affine(part)?, sweep.ty(part).size(last)));
    Ok(parts.collect::<Option<Vec<_>>>().map(|parts| parts.concat()))
}

/// The functions at each index of the last dimension.
fn along_last(affine: &Affine, depth: u64) -> Option<Vec<Affine>> {
    let (&step, steps) = affine.steps.split_last()?;
    let at = |c: i64| Some(Affine { base: affine.base.checked_add(step.checked_mul(c)?)?, steps: steps.to_vec() });
    (0..i64::try_from(depth).ok()?).map(at).collect()
}

/// Slice, transpose, reshape and broadcast of `x`; what changes nothing is not built.
fn view(
    sweep: &mut Sweep<'_, '_, '_>,
    call: &Call,
    x: ValueId,
    picks: &[Pick],
    result: &[u64],
) -> Result<ValueId, PassError> {
    let slice = Op::Slice {
        starts: picks.iter().map(|pick| RankScalar::Uniform(pick.start)).collect(),
        steps: picks.iter().map(|pick| pick.step).collect(),
        sizes: picks.iter().map(|pick| pick.size).collect(),
    };
    let value = sweep.emit_one(slice, x, &call.origin)?;
    let mut permutation: Vec<u8> = (0..picks.len() as u8).collect();
    permutation.sort_by_key(|&axis| picks[usize::from(axis)].to);
    let value = sweep.emit_one(Op::Transpose { permutation }, value, &call.origin)?;
    let placed =
        (0..result.len()).map(|dim| picks.iter().find(|pick| pick.to == Some(dim)).map_or(1, |pick| pick.size));
    let dims = placed.map(Dim::Static).collect();
    let value = sweep.emit_one(Op::Reshape { dims }, value, &call.origin)?;
    let dims = result.iter().copied().map(Dim::Static).collect();
    sweep.emit_one(Op::Broadcast { dims }, value, &call.origin)
}

#[cfg(test)]
mod tests {
    use crate::simplify::tests::{check, check_unchanged};

    #[test]
    fn one_constant_index_is_a_slice() {
        check(
            "%x: f32[2, 5, 3]
             %i: i64[] = weight [-2]
             %y = gather %x, %i {axis 1}
             return %y",
            "%x: f32[2, 5, 3]
             %s: f32[2, 1, 3] = slice %x {starts [0, 3, 0]}
             %y: f32[2, 3] = reshape %s
             return %y",
        );
    }

    #[test]
    fn a_grid_of_indices_is_a_broadcast() {
        // How exporters look a padding mask up for every query.
        check(
            "%mask: f32[2, 300]
             %rows: i64[2, 1, 1, 1] = pointwise {index(0)}
             %keys: i64[1, 1, 1, 300] = pointwise {index(3)}
             %r: i64[2, 1, 300, 300] = broadcast %rows
             %k: i64[2, 1, 300, 300] = broadcast %keys
             %r1: i64[2, 1, 300, 300, 1] = reshape %r
             %k1: i64[2, 1, 300, 300, 1] = reshape %k
             %grid = concat %r1, %k1 {axis 4}
             %y = gather_nd %mask, %grid
             return %y",
            "%mask: f32[2, 300]
             %m: f32[2, 1, 1, 300] = reshape %mask
             %y: f32[2, 1, 300, 300] = broadcast %m
             return %y",
        );
    }

    #[test]
    fn so_is_a_grid_that_was_folded_to_numbers() {
        check(
            "%mask: f32[2, 3]
             %i: i64[3, 2, 2] = weight [0, 2, 1, 2,  0, 1, 1, 1,  0, 0, 1, 0]
             %y = gather_nd %mask, %i
             return %y",
            "%mask: f32[2, 3]
             %s: f32[2, 3] = slice %mask {starts [0, 2], steps [1, -1]}
             %y = transpose %s [1, 0]
             return %y",
        );
    }

    #[test]
    fn wrapped_indices_are_understood() {
        check(
            "%x: f32[400]
             %i: i64[300] = pointwise {index(0) - 300}
             %w = pointwise %i {select($0 < 0, $0 + 400, $0)}
             %y = gather %x, %w {axis 0}
             return %y",
            "%x: f32[400]
             %y: f32[300] = slice %x {starts [100]}
             return %y",
        );
    }

    #[test]
    fn a_diagonal_stays() {
        check_unchanged(
            "%x: f32[3, 3]
             %i: i64[3, 2] = weight [0, 0, 1, 1, 2, 2]
             %y = gather_nd %x, %i
             return %y",
        );
    }

    #[test]
    fn irregular_or_unknown_indices_stay() {
        check_unchanged(
            "%x: f32[4]
             %i: i64[3] = weight [0, 1, 3]
             %y = gather %x, %i {axis 0}
             return %y",
        );
    }
}
