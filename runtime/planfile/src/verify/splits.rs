//! How whole tensors are divided between ranks.

use crate::plan::{PlanPiece, SplitDim};
use crate::types::TensorType;

/// Most cells that [`covers`] looks at, over all ranks.
const MAX_CELLS: u64 = 1 << 26;

/// Whether `splits` divide `global` into pieces that lie inside `local` on each of `ranks` ranks.
pub(super) fn check(global: &TensorType, local: &TensorType, ranks: usize, splits: &[SplitDim]) -> Result<(), String> {
    if global.dtype != local.dtype || global.rank() != local.rank() {
        return Err(format!("{local} is no part of {global}"));
    }
    if !splits.windows(2).all(|pair| pair[0].dim < pair[1].dim) {
        return Err("split dimensions are not ascending".to_owned());
    }
    for (dim, (whole, part)) in global.dims.iter().zip(&local.dims).enumerate() {
        let Some(split) = splits.iter().find(|split| usize::from(split.dim) == dim) else {
            if whole != part {
                return Err(format!("dimension {dim} is not split, but {part} of {whole}"));
            }
            continue;
        };
        if split.pieces.len() != ranks {
            return Err(format!("dimension {dim} has pieces for {} ranks of {ranks}", split.pieces.len()));
        }
        for pieces in &split.pieces {
            check_pieces(pieces, whole.capacity(), part.capacity())
                .map_err(|what| format!("dimension {dim}: {what}"))?;
        }
    }
    match splits.iter().find(|split| usize::from(split.dim) >= global.rank()) {
        Some(split) => Err(format!("dimension {} of {global} is split", split.dim)),
        None => Ok(()),
    }
}

fn check_pieces(pieces: &[PlanPiece], whole: u64, part: u64) -> Result<(), String> {
    let mut filled = 0;
    for piece in pieces {
        let inside = |first: u64, size: u64| first.checked_add(piece.len).is_some_and(|end| end <= size);
        if piece.len == 0 || !inside(piece.global, whole) || !inside(piece.local, part) {
            let PlanPiece { global, local, len } = piece;
            return Err(format!("piece of {len} from {global} of {whole} at {local} of {part}"));
        }
        if piece.local < filled {
            return Err(format!("pieces overlap or are out of order at {} of the part", piece.local));
        }
        filled = piece.local + piece.len;
    }
    Ok(())
}

/// Whether the ranks' pieces together are the whole tensor. The splits passed [`check`].
pub(super) fn covers(global: &TensorType, ranks: usize, splits: &[SplitDim]) -> Result<(), String> {
    if global.elements() == Some(0) {
        return Ok(());
    }
    let grids: Vec<Vec<u64>> = splits.iter().map(|split| breakpoints(split, global)).collect();
    let cells = grids.iter().try_fold(1u64, |cells, grid| cells.checked_mul(grid.len() as u64 - 1));
    let cells = cells.filter(|cells| cells.checked_mul(ranks as u64).is_some_and(|work| work <= MAX_CELLS));
    let cells = cells.ok_or("is divided into too many pieces")?;
    let mut covered = vec![false; cells as usize];
    for rank in 0..ranks {
        // Cells that this rank holds, widened by one dimension at a time.
        let mut held = vec![0usize];
        for (split, grid) in splits.iter().zip(&grids) {
            let width = grid.len() - 1;
            let marked = marked(&split.pieces[rank], grid);
            held = held.iter().flat_map(|cell| marked.iter().map(move |mark| cell * width + mark)).collect();
        }
        for cell in held {
            covered[cell] = true;
        }
    }
    match covered.iter().position(|covered| !covered) {
        Some(cell) => Err(format!("no rank has the part at {:?} of {global}", corner(cell, &grids, splits))),
        None => Ok(()),
    }
}

/// Ends of pieces and of the dimension, ascending: at least two, as the tensor is not empty.
fn breakpoints(split: &SplitDim, global: &TensorType) -> Vec<u64> {
    let pieces = split.pieces.iter().flatten();
    let mut points: Vec<u64> = pieces.flat_map(|piece| [piece.global, piece.global + piece.len]).collect();
    points.extend([0, global.size(usize::from(split.dim))]);
    points.sort_unstable();
    points.dedup();
    points
}

/// Intervals between breakpoints that the pieces fill.
fn marked(pieces: &[PlanPiece], grid: &[u64]) -> Vec<usize> {
    let mut marked = vec![false; grid.len() - 1];
    for piece in pieces {
        let first = grid.partition_point(|&point| point < piece.global);
        let end = grid.partition_point(|&point| point < piece.global + piece.len);
        marked[first..end].fill(true);
    }
    (0..marked.len()).filter(|&position| marked[position]).collect()
}

/// Dimension and first element of a cell, for the reader of a finding.
fn corner(mut cell: usize, grids: &[Vec<u64>], splits: &[SplitDim]) -> Vec<(u8, u64)> {
    let mut corner = Vec::new();
    for (grid, split) in grids.iter().zip(splits).rev() {
        corner.push((split.dim, grid[cell % (grid.len() - 1)]));
        cell /= grid.len() - 1;
    }
    corner.reverse();
    corner
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn split(dim: u8, pieces: &[&[(u64, u64, u64)]]) -> SplitDim {
        let piece = |&(global, local, len): &(u64, u64, u64)| PlanPiece { global, local, len };
        SplitDim { dim, pieces: pieces.iter().map(|pieces| pieces.iter().map(piece).collect()).collect() }
    }

    fn f32s(sizes: &[u64]) -> TensorType {
        TensorType::new(DType::F32, sizes)
    }

    #[test]
    fn uneven_and_merged_splits_are_fine() {
        let uneven = [split(0, &[&[(0, 0, 2)], &[(2, 0, 1)]])];
        assert_eq!(check(&f32s(&[3]), &f32s(&[2]), 2, &uneven), Ok(()));
        assert_eq!(covers(&f32s(&[3]), 2, &uneven), Ok(()));
        let merged = [split(0, &[&[(0, 0, 2), (4, 2, 2)], &[(2, 0, 2), (6, 2, 2)]])];
        assert_eq!(check(&f32s(&[8]), &f32s(&[4]), 2, &merged), Ok(()));
        assert_eq!(covers(&f32s(&[8]), 2, &merged), Ok(()));
    }

    #[test]
    fn two_split_dimensions_need_all_corners() {
        let halves = |pattern: [u64; 4]| pattern.map(|half| vec![PlanPiece { global: half * 2, local: 0, len: 2 }]);
        let split = |dim, pattern| SplitDim { dim, pieces: halves(pattern).to_vec() };
        let full = [split(0, [0, 0, 1, 1]), split(1, [0, 1, 0, 1])];
        assert_eq!(covers(&f32s(&[4, 4]), 4, &full), Ok(()));
        let diagonal = [split(0, [0, 0, 1, 1]), split(1, [0, 0, 1, 1])];
        let missing = covers(&f32s(&[4, 4]), 4, &diagonal).unwrap_err();
        assert_eq!(missing, "no rank has the part at [(0, 0), (1, 2)] of f32[4, 4]");
    }

    #[test]
    fn pieces_outside_are_refused() {
        let refused = |pieces: &[&[(u64, u64, u64)]]| {
            check(&f32s(&[8]), &f32s(&[4]), pieces.len(), &[split(0, pieces)]).unwrap_err()
        };
        assert!(refused(&[&[(6, 0, 4)]]).contains("piece of 4 from 6 of 8"));
        assert!(refused(&[&[(0, 2, 4)]]).contains("at 2 of 4"));
        assert!(refused(&[&[(u64::MAX, 0, 4)]]).contains("piece of 4"));
        assert!(refused(&[&[(0, 0, 2), (2, 1, 2)]]).contains("overlap"));
        assert!(check(&f32s(&[8]), &f32s(&[4]), 2, &[]).unwrap_err().contains("not split"));
        let beyond = check(&f32s(&[8]), &f32s(&[8]), 1, &[split(3, &[&[]])]).unwrap_err();
        assert_eq!(beyond, "dimension 3 of f32[8] is split");
    }
}
