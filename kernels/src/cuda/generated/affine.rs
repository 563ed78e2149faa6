//! Positions as sums of digits of indices, so that shapes meet at compile time.
//!
//! A thread knows one number, the flat index `i` of its element; a coordinate is a digit of it, `(i / divide) % size`.
//! Movement only shuffles, shifts and scales digits; reading memory sums them up again. Digits that are neighbours in
//! both places merge on the way, which collapses dimensions:
//!
//! ```text
//! y: [8, 16, 32] reads x: [16, 32]      (i / 32) % 16 · 32 + i % 32   →   i % 512
//! ```

/// `times · ((base / divide) % size)`; `base` numbers an index variable of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Term {
    pub(super) base: usize,
    pub(super) divide: u64,
    pub(super) size: u64,
    pub(super) times: i64,
}

/// A sum of terms, of multiples of the kernel's scalar parameters, and a constant.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Affine {
    pub(super) terms: Vec<Term>,
    /// Factor and number of the scalar.
    pub(super) scalars: Vec<(i64, usize)>,
    pub(super) constant: i64,
}

/// How a position changes over the lanes of a thread, which are consecutive values of one base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// It does not.
    Uniform,
    /// By `by` from each lane to the next; that of the first is a multiple of `aligned`, which divides the lanes.
    Step {
        by: i64,
        aligned: u64,
    },
    Irregular,
}

impl Affine {
    pub(super) fn constant(constant: i64) -> Self {
        Self { constant, ..Self::default() }
    }

    /// The digit of `base` above `divide` that takes `size` values.
    pub(super) fn digit(base: usize, divide: u64, size: u64) -> Self {
        let terms = if size > 1 { vec![Term { base, divide, size, times: 1 }] } else { Vec::new() };
        Self { terms, ..Self::default() }
    }

    #[must_use]
    pub(super) fn plus(mut self, constant: i64) -> Self {
        self.constant = self.constant.wrapping_add(constant);
        self
    }

    #[must_use]
    pub(super) fn times(mut self, factor: i64) -> Self {
        if factor == 0 {
            return Self::default();
        }
        self.terms.iter_mut().for_each(|term| term.times = term.times.wrapping_mul(factor));
        self.scalars.iter_mut().for_each(|scalar| scalar.0 = scalar.0.wrapping_mul(factor));
        self.constant = self.constant.wrapping_mul(factor);
        self
    }

    #[must_use]
    pub(super) fn and(mut self, other: Self) -> Self {
        for term in other.terms {
            self.add_term(term);
        }
        self.scalars.extend(other.scalars);
        self.constant = self.constant.wrapping_add(other.constant);
        self
    }

    /// Adds a term, merged with what it continues.
    fn add_term(&mut self, mut term: Term) {
        while let Some(position) = self.terms.iter().position(|other| merged(*other, term).is_some()) {
            let other = self.terms.swap_remove(position);
            match merged(other, term) {
                Some(sum) if sum.times == 0 => return,
                Some(sum) => term = sum,
                None => break,
            }
        }
        self.terms.push(term);
        self.terms.sort_unstable();
    }

    /// Row-major flat position of coordinates in a tensor of these sizes.
    pub(super) fn flat(index: &[Self], sizes: &[u64]) -> Self {
        let (mut sum, mut stride) = (Self::default(), 1i64);
        for (coordinate, &size) in index.iter().zip(sizes).rev() {
            if size > 1 {
                sum = sum.and(coordinate.clone().times(stride));
            }
            stride = stride.wrapping_mul(size.cast_signed());
        }
        sum
    }

    /// Coordinates, in a tensor of these sizes, of this flat position below their product; `None` where its digits do
    /// not fall together with those of the sizes.
    pub(super) fn split(&self, sizes: &[u64]) -> Option<Vec<Self>> {
        if !self.scalars.is_empty() || self.constant != 0 || self.terms.iter().any(|term| term.times <= 0) {
            return None;
        }
        let mut rest = self.terms.clone();
        let mut coordinates = vec![Self::default(); sizes.len()];
        let mut weight = 1u64;
        for (coordinate, &size) in coordinates.iter_mut().zip(sizes).rev() {
            let end = weight.checked_mul(size)?;
            while weight < end {
                rest.sort_unstable_by_key(|term| std::cmp::Reverse(term.times));
                let Some(&term) = rest.last().filter(|term| term.times.cast_unsigned() < end) else { break };
                let left = end / term.times.cast_unsigned();
                // A digit of this coordinate begins at its weight or above, and ends with it or below.
                if term.times.cast_unsigned() % weight != 0 || end % term.times.cast_unsigned() != 0 {
                    return None;
                }
                rest.pop();
                let scale = term.times / (end / size).cast_signed();
                let taken = if term.size <= left {
                    if left % term.size != 0 && !rest.is_empty() {
                        return None;
                    }
                    term.size
                } else {
                    if term.size % left != 0 {
                        return None;
                    }
                    let (divide, above) = (term.divide.checked_mul(left)?, term.size / left);
                    rest.push(Term { divide, size: above, times: end.cast_signed(), ..term });
                    left
                };
                coordinate.terms.push(Term { size: taken, times: scale, ..term });
                weight = term.times.cast_unsigned().checked_mul(taken)?;
            }
            coordinate.terms.sort_unstable();
            weight = end;
        }
        rest.is_empty().then_some(coordinates)
    }

    /// How it changes over `lanes` consecutive values of `base`, of which the first is a multiple of `lanes`.
    pub(super) fn spread(&self, base: usize, lanes: u64) -> Spread {
        let (mut by, mut aligned) = (0i64, lanes);
        for term in &self.terms {
            if term.base != base || term.divide.is_multiple_of(lanes) {
                aligned = divisor(aligned, term.times);
            } else if term.divide == 1 && term.size.is_multiple_of(lanes) {
                by = by.wrapping_add(term.times);
            } else {
                return Spread::Irregular;
            }
        }
        for factor in self.scalars.iter().map(|scalar| scalar.0).chain([self.constant]) {
            aligned = divisor(aligned, factor);
        }
        if by == 0 { Spread::Uniform } else { Spread::Step { by, aligned } }
    }

    /// With the digits of `from` read off `to`.
    #[must_use]
    pub(super) fn rebased(&self, from: usize, to: usize) -> Self {
        let mut moved = self.clone();
        moved.terms.iter_mut().filter(|term| term.base == from).for_each(|term| term.base = to);
        moved
    }
}

/// The sum of two terms as one, where they are the same digit or neighbours.
fn merged(a: Term, b: Term) -> Option<Term> {
    if a.base != b.base {
        return None;
    }
    if (a.divide, a.size) == (b.divide, b.size) {
        return Some(Term { times: a.times.wrapping_add(b.times), ..a });
    }
    let continues = |low: Term, high: Term| {
        let size = low.size.checked_mul(high.size)?;
        let neighbours = low.divide.checked_mul(low.size) == Some(high.divide);
        let same_step = low.times.checked_mul(low.size.cast_signed()) == Some(high.times);
        (neighbours && same_step).then_some(Term { size, ..low })
    };
    continues(a, b).or_else(|| continues(b, a))
}

/// Greatest common divisor of a power of two and any number.
fn divisor(power: u64, number: i64) -> u64 {
    if number == 0 { power } else { power.min(1 << number.trailing_zeros()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinates(sizes: &[u64]) -> Vec<Affine> {
        let count = sizes.iter().product();
        Affine::digit(0, 1, count).split(sizes).unwrap()
    }

    /// The value at an index.
    fn at(affine: &Affine, i: u64) -> i64 {
        let digit = |term: &Term| (i / term.divide % term.size) as i64 * term.times;
        affine.terms.iter().map(digit).sum::<i64>() + affine.constant
    }

    #[test]
    fn neighbours_collapse() {
        let index = coordinates(&[8, 16, 32]);
        assert_eq!(Affine::flat(&index, &[8, 16, 32]), Affine::digit(0, 1, 4096));
        assert_eq!(Affine::flat(&index[1..], &[16, 32]), Affine::digit(0, 1, 512));
        assert_eq!(Affine::flat(&index[1..2], &[16]), Affine::digit(0, 32, 16));
    }

    #[test]
    fn splitting_inverts_flattening() {
        // Transposed, then other dimensions: heads split and merged.
        let index = coordinates(&[2, 3, 4, 8]);
        let swapped = [index[0].clone(), index[2].clone(), index[1].clone(), index[3].clone()];
        let flat = Affine::flat(&swapped, &[2, 4, 3, 8]);
        for sizes in [vec![2, 4, 24], vec![8, 24], vec![2, 4, 3, 2, 4], vec![8, 3, 1, 8], vec![8, 6, 4]] {
            let split = flat.split(&sizes).unwrap();
            for i in 0..192 {
                let mut rest = at(&flat, i) as u64;
                for (coordinate, &size) in split.iter().zip(&sizes).rev() {
                    assert_eq!(at(coordinate, i) as u64, rest % size, "{sizes:?} at {i}");
                    rest /= size;
                }
            }
        }
        assert_eq!(flat.split(&[16, 12]), None);
    }

    #[test]
    fn lanes_step_or_stay() {
        let index = coordinates(&[4, 16]);
        assert_eq!(index[0].spread(0, 8), Spread::Uniform);
        assert_eq!(index[1].spread(0, 8), Spread::Step { by: 1, aligned: 8 });
        assert_eq!(index[1].clone().plus(4).spread(0, 8), Spread::Step { by: 1, aligned: 4 });
        assert_eq!(index[1].spread(0, 32), Spread::Irregular);
        assert_eq!(
            Affine::flat(&[index[1].clone(), index[0].clone()], &[16, 6]).spread(0, 4),
            Spread::Step { by: 6, aligned: 1 }
        );
    }
}
