//! Splits through reshapes, slices and concatenations, and back.
//!
//! A reshape is cut into blocks, runs of dimensions with equal products on both sides. In a block, a split of the
//! leading dimension stays one of the leading dimension (in larger or smaller units); a split of an inner dimension
//! becomes one with a segment for each index of the dimensions before it.

use ir::{Mesh, Placement, Segment, Split};

/// Dimensions of both sides whose elements correspond, sizes of 1 left out.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    from: Vec<usize>,
    to: Vec<usize>,
}

fn blocks(from: &[u64], to: &[u64]) -> Option<Vec<Block>> {
    if from.contains(&0) || to.contains(&0) {
        return None;
    }
    let real = |sizes: &[u64]| -> Vec<usize> { (0..sizes.len()).filter(|&dim| sizes[dim] > 1).collect() };
    let (mut left, mut right) = (real(from).into_iter().peekable(), real(to).into_iter().peekable());
    let mut blocks = Vec::new();
    while left.peek().is_some() || right.peek().is_some() {
        let mut block = Block { from: Vec::new(), to: Vec::new() };
        let (mut a, mut b) = (1u64, 1u64);
        loop {
            if a <= b && (a < b || block.from.is_empty()) {
                let dim = left.next()?;
                a = a.checked_mul(from[dim])?;
                block.from.push(dim);
            } else if b < a {
                let dim = right.next()?;
                b = b.checked_mul(to[dim])?;
                block.to.push(dim);
            } else {
                break;
            }
        }
        blocks.push(block);
    }
    Some(blocks)
}

/// The split after a reshape from `from` to `to`, if it can be said; `split` is on a dimension of `from`.
pub(crate) fn through_reshape(split: &Split, from: &[u64], to: &[u64]) -> Option<Split> {
    let blocks = blocks(from, to)?;
    let block = blocks.iter().find(|block| block.from.contains(&usize::from(split.dim)))?;
    // In terms of the block's elements: a run of segments whose sizes count elements of the block.
    let position = block.from.iter().position(|&dim| dim == usize::from(split.dim))?;
    let inner: u64 = block.from[position + 1..].iter().map(|&dim| from[dim]).product();
    let outer: u64 = block.from[..position].iter().map(|&dim| from[dim]).product();
    if outer > MAX_SEGMENTS || outer * split.segments.len() as u64 > MAX_SEGMENTS {
        return None;
    }
    let scaled: Vec<Segment> =
        split.segments.iter().map(|s| Segment { size: s.size * inner, unit: s.unit * inner }).collect();
    let mut flat = Vec::new();
    for _ in 0..outer {
        flat.extend_from_slice(&scaled);
    }
    // Find the dimension of the other side on which these segments fall.
    for (position, &dim) in block.to.iter().enumerate() {
        let inner: u64 = block.to[position + 1..].iter().map(|&dim| to[dim]).product();
        let outer: u64 = block.to[..position].iter().map(|&dim| to[dim]).product();
        if !(flat.len() as u64).is_multiple_of(outer) {
            continue;
        }
        let period = flat.len() / outer as usize;
        let (first, repeats) = (&flat[..period], flat.chunks(period).all(|chunk| *chunk == flat[..period]));
        let total: u64 = first.iter().map(|segment| segment.size).sum();
        let fits = first.iter().all(|s| s.size.is_multiple_of(inner) && s.unit.is_multiple_of(inner));
        if repeats && fits && total == to[dim] * inner {
            let segments = first.iter().map(|s| Segment { size: s.size / inner, unit: s.unit / inner }).collect();
            return Some(Split { dim: dim as u8, over: split.over, segments });
        }
    }
    None
}

/// Splits of the operand that survive the reshape, and what they become. Several splits in one block survive only
/// where the outer ones leave single indexes, so that each rank's elements are adjacent.
pub(crate) fn reshape(mesh: &Mesh, placement: &Placement, from: &[u64], to: &[u64]) -> (Placement, Placement) {
    let (mut kept, mut result) = (placement.clone(), placement.clone());
    (kept.splits, result.splits) = (Vec::new(), Vec::new());
    let Some(blocks) = blocks(from, to) else { return (kept, result) };
    for block in &blocks {
        let inside: Vec<&Split> =
            placement.splits.iter().filter(|split| block.from.contains(&usize::from(split.dim))).collect();
        match inside.as_slice() {
            [] => {}
            [split] => {
                if let Some(mapped) = through_reshape(split, from, to) {
                    kept.splits.push((*split).clone());
                    result.splits.push(mapped);
                }
            }
            [outer, .., inner] => {
                if let (2, Some(mapped)) = (inside.len(), merged(mesh, outer, inner, block, from, to)) {
                    kept.splits.extend([(*outer).clone(), (*inner).clone()]);
                    result.splits.push(mapped);
                } else if let Some(mapped) = through_reshape(outer, from, to) {
                    kept.splits.push((*outer).clone());
                    result.splits.push(mapped);
                }
            }
        }
    }
    result.splits.sort_by_key(|split| split.dim);
    (kept, result)
}

/// Two even splits that merge into one: the first leaves one index per rank, the second splits the next dimension.
fn merged(mesh: &Mesh, outer: &Split, inner: &Split, block: &Block, from: &[u64], to: &[u64]) -> Option<Split> {
    let [first, second] = [usize::from(outer.dim), usize::from(inner.dim)];
    let adjacent = block.from.first() == Some(&first) && block.from.get(1) == Some(&second);
    let single = outer.local_size(mesh) == 1 && !outer.is_padded(mesh) && outer.segments.len() == 1;
    let even = !inner.is_padded(mesh) && inner.segments.len() == 1;
    let ordered = outer.over.iter().max() < inner.over.iter().min();
    let rest: u64 = block.from[2..].iter().map(|&dim| from[dim]).product();
    let over = outer.over.union(inner.over);
    let &target = block.to.first()?;
    let unit = inner.local_size(mesh) * rest;
    let tail: u64 = block.to[1..].iter().map(|&dim| to[dim]).product();
    (adjacent && single && even && ordered && unit.is_multiple_of(tail))
        .then(|| Split::simple(target as u8, over, to[target], 1))
}

/// A slice of `size` from `start` in a split dimension: the segments it takes whole, and the first of them.
pub(crate) fn whole_segments(split: &Split, start: u64, size: u64) -> Option<(usize, Vec<Segment>)> {
    let (mut at, mut first, mut taken) = (0, None, Vec::new());
    for (index, segment) in split.segments.iter().enumerate() {
        if at >= start && at + segment.size <= start + size {
            first = first.or(Some((index, at)));
            taken.push(*segment);
        }
        at += segment.size;
    }
    let total: u64 = taken.iter().map(|segment| segment.size).sum();
    first.filter(|&(_, at)| at == start && total == size && size > 0).map(|(index, _)| (index, taken))
}

/// More segments than this are not worth their slices.
const MAX_SEGMENTS: u64 = 64;

#[cfg(test)]
mod tests {
    use ir::{MeshAxis, SubAxes};

    use super::*;

    fn split(dim: u8, segments: &[(u64, u64)]) -> Split {
        let segments = segments.iter().map(|&(size, unit)| Segment { size, unit }).collect();
        Split { dim, over: SubAxes::of(0), segments }
    }

    #[test]
    fn heads_split_out_of_features_and_back() {
        let merged = split(2, &[(64, 16)]);
        let heads = through_reshape(&merged, &[2, 8, 64], &[2, 8, 4, 16]).unwrap();
        assert_eq!(heads, split(2, &[(4, 1)]));
        assert_eq!(through_reshape(&heads, &[2, 8, 4, 16], &[2, 8, 64]).unwrap(), merged);
    }

    #[test]
    fn units_that_cut_heads_do_not_pass() {
        assert_eq!(through_reshape(&split(2, &[(64, 1)]), &[2, 8, 64], &[2, 8, 4, 16]), None);
    }

    #[test]
    fn segments_become_a_dimension_before_the_split_one() {
        let merged = split(1, &[(64, 16), (64, 16), (64, 16)]);
        let mapped = through_reshape(&merged, &[2, 192], &[2, 3, 4, 16]).unwrap();
        assert_eq!(mapped, split(2, &[(4, 1)]));
        assert_eq!(through_reshape(&mapped, &[2, 3, 4, 16], &[2, 192]).unwrap(), merged);
    }

    #[test]
    fn grouped_heads_merge_two_splits() {
        let mesh = Mesh { axes: vec![MeshAxis::new("tensor", 4)] };
        let outer = Split::simple(1, SubAxes::of(0), 2, 1);
        let inner = Split::simple(2, SubAxes::of(1), 4, 1);
        let placement = Placement { splits: vec![outer, inner], partial: None };
        let (kept, result) = reshape(&mesh, &placement, &[1, 2, 4, 8, 16], &[1, 8, 8, 16]);
        assert_eq!(kept, placement);
        assert_eq!(result.splits, vec![Split::simple(1, SubAxes(3), 8, 1)]);
    }

    #[test]
    fn slices_take_whole_segments_only() {
        let merged = split(0, &[(64, 16), (16, 16), (16, 16)]);
        assert_eq!(whole_segments(&merged, 64, 32).unwrap(), (1, merged.segments[1..].to_vec()));
        assert_eq!(whole_segments(&merged, 60, 20), None);
    }
}
