//! Which lines of two lists are the same ones, in order.
//!
//! The greedy search of Myers, "An O(ND) Difference Algorithm and Its Variations" (1986): all ways that need one edit more,
//! each as far as it goes. Lists that have nothing in common would need as many rounds as they have lines, and time with
//! the square of it: after [`EDITS_MAX`] edits the way that has come farthest is taken, and a new search starts where it
//! ends. Up to so many edits there is no shorter way.

/// Edits of one search.
const EDITS_MAX: usize = 256;

/// Pairs of equal lines, by their numbers in both lists, ascending in both.
pub(super) fn align<T: PartialEq>(before: &[T], after: &[T]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    let mut at = Place { before: 0, after: 0 };
    while at.before < before.len() && at.after < after.len() {
        let search = Search { before: &before[at.before..], after: &after[at.after..], rounds: Vec::new() };
        let (found, end) = search.run();
        pairs.extend(found.iter().map(|pair| (at.before + pair.before, at.after + pair.after)));
        at = Place { before: at.before + end.before, after: at.after + end.after };
    }
    pairs
}

/// How many lines of each list a way has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    before: usize,
    after: usize,
}

struct Search<'a, T> {
    before: &'a [T],
    after: &'a [T],
    /// `rounds[edits][added]`: the end of the farthest way with so many edits, so many of which add a line and the others
    /// remove one. `None` where a list does not have as many lines.
    rounds: Vec<Vec<Option<Place>>>,
}

impl<T: PartialEq> Search<'_, T> {
    /// Pairs, and where they end: at the end of both lists, or after [`EDITS_MAX`] edits.
    fn run(mut self) -> (Vec<Place>, Place) {
        let whole = Place { before: self.before.len(), after: self.after.len() };
        loop {
            let edits = self.rounds.len();
            let end = |(start, _): (Place, bool)| {
                let same = self.before[start.before..].iter().zip(&self.after[start.after..]);
                let same = same.take_while(|(before, after)| before == after).count();
                Place { before: start.before + same, after: start.after + same }
            };
            let round: Vec<Option<Place>> = (0..=edits).map(|added| self.start(edits, added).map(end)).collect();
            let ends = (0..).zip(&round).filter_map(|(added, place)| Some((added, (*place)?)));
            let farthest = ends.max_by_key(|(_, place)| place.before + place.after);
            self.rounds.push(round);
            // There is a way as long as a list has lines left.
            let Some((added, end)) = farthest else { return (Vec::new(), whole) };
            if end == whole || edits == EDITS_MAX {
                return (self.pairs(added), end);
            }
        }
    }

    /// Where the last edit of the farthest way leads, before equal lines follow; whether it adds a line.
    fn start(&self, edits: usize, added: usize) -> Option<(Place, bool)> {
        let Some(last) = edits.checked_sub(1).map(|last| &self.rounds[last]) else {
            return Some((Place { before: 0, after: 0 }, false));
        };
        let removing = last.get(added).copied().flatten().filter(|place| place.before < self.before.len());
        let removing = removing.map(|place| (Place { before: place.before + 1, ..place }, false));
        let adding = added.checked_sub(1).and_then(|added| last[added]);
        let adding = adding.filter(|place| place.after < self.after.len());
        let adding = adding.map(|place| (Place { after: place.after + 1, ..place }, true));
        // Both are on one diagonal.
        removing.into_iter().chain(adding).max_by_key(|(place, adds)| (place.before, !adds))
    }

    /// The equal lines on the way that the last round found.
    fn pairs(&self, mut added: usize) -> Vec<Place> {
        let mut pairs = Vec::new();
        for edits in (0..self.rounds.len()).rev() {
            let (Some((start, adds)), Some(end)) = (self.start(edits, added), self.rounds[edits][added]) else { break };
            let same = 0..end.before - start.before;
            pairs.extend(same.rev().map(|line| Place { before: start.before + line, after: start.after + line }));
            added -= usize::from(adds);
        }
        pairs.reverse();
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that pairs are equal lines and ascend; how many there are.
    fn aligned(before: &[u32], after: &[u32]) -> usize {
        let pairs = align(before, after);
        assert!(pairs.iter().all(|&(mine, their)| before[mine] == after[their]));
        assert!(pairs.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1));
        pairs.len()
    }

    /// Length of the longest common subsequence.
    fn longest(before: &[u32], after: &[u32]) -> usize {
        let mut row = vec![0; after.len() + 1];
        for line in before {
            let mut diagonal = 0;
            for (position, other) in after.iter().enumerate() {
                let above = row[position + 1];
                row[position + 1] = if line == other { diagonal + 1 } else { above.max(row[position]) };
                diagonal = above;
            }
        }
        row[after.len()]
    }

    /// Numbers below `below`, the same each time.
    fn numbers(seed: u64, count: usize, below: u64) -> Vec<u32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % below) as u32
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    #[test]
    fn no_alignment_is_longer() {
        for seed in 0..200 {
            let (before, after) = (numbers(seed, seed as usize % 40, 4), numbers(seed + 1000, seed as usize % 31, 4));
            assert_eq!(aligned(&before, &after), longest(&before, &after), "{before:?} {after:?}");
        }
        assert_eq!([aligned(&[], &[]), aligned(&[1], &[]), aligned(&[], &[1]), aligned(&[1], &[2])], [0; 4]);
    }

    #[test]
    fn an_edit_of_a_long_list_is_one_edit() {
        let before = numbers(7, 100_000, 5);
        let mut after = before.clone();
        after.insert(20_000, 9);
        after.remove(70_000);
        after.splice(90_000..90_000, [1, 2, 3]);
        assert_eq!(aligned(&before, &after), before.len() - 1);
    }

    #[test]
    fn lists_that_have_little_in_common_are_aligned_all_the_same() {
        // The square of the edits would be hundreds of millions of comparisons, and as many places in memory.
        const LINES: u32 = 20_000;
        let (before, after): (Vec<u32>, Vec<u32>) = ((0..LINES).collect(), (LINES..2 * LINES).collect());
        assert_eq!(aligned(&before, &after), 0);
        let (before, after) = (numbers(1, LINES as usize, 9), numbers(2, LINES as usize, 9));
        assert!(aligned(&before, &after) > LINES as usize / 3);
    }
}
