//! Cuts whole tensors into what each rank holds, and puts them together again.

use planfile::plan::{PlanPiece, SplitDim};

/// What one rank holds of a tensor.
pub(crate) struct Part<'a> {
    /// Sizes of the whole tensor.
    pub(crate) whole: &'a [u64],
    /// Sizes of the rank's part, padding included.
    pub(crate) local: &'a [u64],
    pub(crate) splits: &'a [SplitDim],
    /// Position of the rank among the stage's.
    pub(crate) position: usize,
    pub(crate) element_bytes: usize,
}

/// Equal runs of bytes: where each begins in the whole tensor and on the rank, and how long they are.
pub(crate) struct Runs {
    pairs: Vec<(usize, usize)>,
    bytes: usize,
}

impl Part<'_> {
    /// The runs that make up this part, grouped by length; `None` where tables do not fit the sizes.
    pub(crate) fn runs(&self) -> Option<Vec<Runs>> {
        if self.whole.len() != self.local.len() {
            return None;
        }
        let pieces = self.pieces()?;
        // Dimensions after the last split one are contiguous on both sides.
        let Some(last) = self.splits.iter().map(|split| usize::from(split.dim)).max() else {
            let bytes = byte_count(self.whole, self.element_bytes)?;
            return Some(vec![Runs { pairs: vec![(0, 0)], bytes }]);
        };
        let inner = byte_count(&self.whole[last + 1..], self.element_bytes)?;
        let mut outer = vec![(0usize, 0usize)];
        for (dim, pieces) in pieces.iter().enumerate().take(last) {
            let mut next = Vec::new();
            for &(whole, local) in &outer {
                for piece in pieces {
                    for element in 0..piece.len {
                        let whole = index(whole, self.whole[dim], piece.global.checked_add(element)?)?;
                        next.push((whole, index(local, self.local[dim], piece.local.checked_add(element)?)?));
                    }
                }
            }
            outer = next;
        }
        let mut runs = Vec::new();
        for piece in &pieces[last] {
            let mut pairs = Vec::with_capacity(outer.len());
            for &(whole, local) in &outer {
                let whole = index(whole, self.whole[last], piece.global)?.checked_mul(inner)?;
                pairs.push((whole, index(local, self.local[last], piece.local)?.checked_mul(inner)?));
            }
            runs.push(Runs { pairs, bytes: usize::try_from(piece.len).ok()?.checked_mul(inner)? });
        }
        Some(runs)
    }

    /// The pieces of each dimension: all of it where it is not split.
    fn pieces(&self) -> Option<Vec<Vec<PlanPiece>>> {
        let mut pieces: Vec<Vec<PlanPiece>> =
            self.whole.iter().map(|&len| vec![PlanPiece { global: 0, local: 0, len }]).collect();
        for split in self.splits {
            let table = split.pieces.get(self.position)?;
            let fits = |piece: &&PlanPiece| {
                let end = |first: u64| first.checked_add(piece.len);
                let dim = usize::from(split.dim);
                end(piece.global).is_some_and(|end| self.whole.get(dim).is_some_and(|&size| end <= size))
                    && end(piece.local).is_some_and(|end| self.local.get(dim).is_some_and(|&size| end <= size))
            };
            if !table.iter().all(|piece| fits(&piece)) {
                return None;
            }
            // A piece of nothing may begin past the end of the dimension.
            *pieces.get_mut(usize::from(split.dim))? = table.iter().copied().filter(|piece| piece.len > 0).collect();
        }
        let same = |dim: usize| self.whole[dim] == self.local[dim];
        let split = |dim: usize| self.splits.iter().any(|split| usize::from(split.dim) == dim);
        (0..self.whole.len()).all(|dim| split(dim) || same(dim)).then_some(pieces)
    }

    /// Copies the rank's elements from the whole tensor; what is not covered becomes zero.
    pub(crate) fn scatter(&self, whole: &[u8], local: &mut [u8]) -> Option<()> {
        if !self.splits.is_empty() {
            local.fill(0);
        }
        self.each_run(|at_whole, at_local, bytes| {
            local.get_mut(at_local..at_local + bytes)?.copy_from_slice(whole.get(at_whole..at_whole + bytes)?);
            Some(())
        })
    }

    /// Copies the rank's elements into the whole tensor; the number of bytes, padding left out.
    pub(crate) fn gather(&self, local: &[u8], whole: &mut [u8]) -> Option<usize> {
        let mut copied = 0;
        self.each_run(|at_whole, at_local, bytes| {
            whole.get_mut(at_whole..at_whole + bytes)?.copy_from_slice(local.get(at_local..at_local + bytes)?);
            copied += bytes;
            Some(())
        })?;
        Some(copied)
    }

    fn each_run(&self, mut copy: impl FnMut(usize, usize, usize) -> Option<()>) -> Option<()> {
        for run in self.runs()? {
            for (whole, local) in run.pairs {
                copy(whole, local, run.bytes)?;
            }
        }
        Some(())
    }
}

/// Whether an earlier rank of the stage holds the same part.
pub(crate) fn is_repeated(splits: &[SplitDim], position: usize) -> bool {
    (0..position).any(|earlier| splits.iter().all(|split| split.pieces.get(earlier) == split.pieces.get(position)))
}

fn index(outer: usize, size: u64, element: u64) -> Option<usize> {
    outer.checked_mul(usize::try_from(size).ok()?)?.checked_add(usize::try_from(element).ok()?)
}

fn byte_count(sizes: &[u64], element_bytes: usize) -> Option<usize> {
    let elements = planfile::types::element_count(sizes)?;
    usize::try_from(elements).ok()?.checked_mul(element_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(global: u64, local: u64, len: u64) -> PlanPiece {
        PlanPiece { global, local, len }
    }

    fn round_trip(whole: &[u64], locals: &[u64], splits: &[SplitDim], ranks: usize) -> Vec<Vec<u8>> {
        let count = whole.iter().product::<u64>() as u8;
        let bytes: Vec<u8> = (1..=count).collect();
        let mut back = vec![0; bytes.len()];
        let mut copied = 0;
        let mut parts = Vec::new();
        for position in 0..ranks {
            let part = Part { whole, local: locals, splits, position, element_bytes: 1 };
            let mut local = vec![255; locals.iter().product::<u64>() as usize];
            part.scatter(&bytes, &mut local).unwrap();
            if !is_repeated(splits, position) {
                copied += part.gather(&local, &mut back).unwrap();
            }
            parts.push(local);
        }
        assert_eq!((back, copied), (bytes.clone(), bytes.len()));
        parts
    }

    #[test]
    fn uneven_splits_pad_with_zeros() {
        let split = SplitDim { dim: 1, pieces: vec![vec![piece(0, 0, 2)], vec![piece(2, 0, 1)]] };
        assert_eq!(round_trip(&[2, 3], &[2, 2], &[split], 2), [[1, 2, 4, 5], [3, 0, 6, 0]]);
    }

    #[test]
    fn segments_are_split_alike() {
        // Four columns of two segments each; ranks hold one column of each segment.
        let pieces = vec![vec![piece(0, 0, 1), piece(2, 1, 1)], vec![piece(1, 0, 1), piece(3, 1, 1)]];
        let split = SplitDim { dim: 0, pieces };
        assert_eq!(round_trip(&[4, 2], &[2, 2], &[split], 2), [[1, 2, 5, 6], [3, 4, 7, 8]]);
    }

    #[test]
    fn two_dimensions_are_split_and_a_replica_is_skipped() {
        let rows = SplitDim { dim: 0, pieces: vec![vec![piece(0, 0, 1)], vec![piece(0, 0, 1)], vec![piece(1, 0, 1)]] };
        let columns = SplitDim { dim: 2, pieces: vec![vec![piece(0, 0, 2)]; 3] };
        let parts = round_trip(&[2, 2, 2], &[1, 2, 2], &[rows, columns], 3);
        assert_eq!(parts, [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]);
    }

    #[test]
    fn a_rank_may_hold_nothing() {
        let split = SplitDim { dim: 0, pieces: vec![vec![piece(0, 0, 1)], vec![piece(1, 0, 0)]] };
        assert_eq!(round_trip(&[1, 2], &[1, 2], &[split], 2), [[1, 2], [0, 0]]);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let runs = |splits: &[SplitDim], local: &[u64]| {
            Part { whole: &[4], local, splits, position: 0, element_bytes: 1 }.runs().is_some()
        };
        let split = |pieces| [SplitDim { dim: 0, pieces }];
        assert!(runs(&split(vec![vec![piece(2, 0, 2)]]), &[2]));
        assert!(!runs(&split(vec![vec![piece(3, 0, 2)]]), &[2]));
        assert!(!runs(&split(vec![vec![piece(u64::MAX, 0, 2)]]), &[2]));
        assert!(!runs(&split(vec![vec![piece(0, 1, 2)]]), &[2]));
        assert!(!runs(&split(vec![]), &[2]));
        assert!(!runs(&[], &[2]));
        assert!(!runs(&[SplitDim { dim: 3, pieces: vec![vec![]] }], &[4]));
    }
}
