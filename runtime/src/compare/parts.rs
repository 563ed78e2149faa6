//! Judges the whole and its parts by their norms, so that a wrong part does not hide behind what is right elsewhere.

use std::fmt;

use crate::rounding::Rounding;

/// Parts that are small beside the rest are compared with this share of its size.
const FLOOR: f64 = 0.03;
/// Parts of fewer elements are compared with the largest of all: such a part may be all cancellation.
const SMALL: u64 = 64;
/// Of rows, one in so many may be another result where elements are chosen by what was rounded.
const ELSEWHERE_ONE_IN: usize = 8;

/// Which elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    All,
    /// Along the last dimension, by number in row-major order.
    Row(u64),
    /// All at one index of one dimension.
    Slice {
        dim: usize,
        index: u64,
    },
    /// By position in row-major order.
    Element(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("the whole"),
            Self::Row(row) => write!(f, "row {row}"),
            Self::Slice { dim, index } => write!(f, "index {index} of dimension {dim}"),
            Self::Element(position) => write!(f, "element {position}"),
        }
    }
}

/// Elements that are off by more than they may.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    pub place: Place,
    /// Norm of the differences over what it is compared with.
    pub error: f64,
    /// What that may be.
    pub allowed: f64,
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Judgement {
    pub(super) beyond: u64,
    pub(super) elsewhere: u64,
    pub(super) worst: Option<Part>,
}

/// Squares of errors and of expected values, over some elements.
#[derive(Clone, Copy, Default)]
struct Squares {
    errors: f64,
    expected: f64,
    count: u64,
}

impl Squares {
    fn add(&mut self, error: f64, expected: f64) {
        self.errors += error * error;
        self.expected += expected * expected;
        self.count += 1;
    }
}

/// The sizes that parts are compared with.
struct Scale {
    largest: f64,
    rms: f64,
}

impl Scale {
    fn of(&self, part: &Squares) -> f64 {
        let floor = FLOOR * (part.count as f64).sqrt() * self.rms;
        let small = if part.count < SMALL { self.largest } else { 0.0 };
        part.expected.sqrt().max(floor).max(small)
    }
}

/// Judges elements of a tensor of these sizes. `errors` are infinite where they are beyond anything.
pub(super) fn judge(errors: &[f64], expected: &[f64], sizes: &[u64], rounding: &Rounding) -> Judgement {
    let impossible = errors.iter().filter(|error| error.is_infinite()).count() as u64;
    if impossible > 0 {
        return Judgement { beyond: impossible, ..Judgement::default() };
    }
    let finite = |value: f64| if value.is_finite() { value } else { 0.0 };
    let mut all = Squares::default();
    let mut largest = 0f64;
    for (&error, &value) in errors.iter().zip(expected) {
        all.add(error, finite(value));
        largest = largest.max(finite(value).abs());
    }
    if all.errors == 0.0 {
        return Judgement::default();
    }
    // Where all is zero, as little as beside ones.
    let scale = match largest {
        0.0 => Scale { largest: 1.0, rms: 1.0 },
        _ => Scale { largest, rms: (all.expected / all.count as f64).sqrt() },
    };
    let width = sizes.last().map_or(1, |&size| size.max(1) as usize);
    let rows = rows(errors, expected, width, &finite);
    let elsewhere = elsewhere(&rows, &scale, sizes.len(), rounding);
    let is_elsewhere = |position: usize| elsewhere.get(position / width).copied().unwrap_or(false);

    let mut found = Judgement {
        elsewhere: elsewhere.iter().filter(|elsewhere| **elsewhere).count() as u64,
        ..Judgement::default()
    };
    let mut consider = |place: Place, part: &Squares, allowed: f64| {
        let of = match place {
            Place::All if largest > 0.0 => part.expected.sqrt(),
            _ => scale.of(part),
        };
        let error = part.errors.sqrt() / of.max(f64::MIN_POSITIVE);
        if error > allowed {
            let one = Part { place, error, allowed };
            found.beyond = found.beyond.max(part.count);
            // A row that is wrong has elements that are; the row says more.
            let excess = |part: &Part| {
                let several = !matches!(part.place, Place::Element(_));
                (several, part.error / part.allowed.max(f64::MIN_POSITIVE))
            };
            if found.worst.is_none_or(|other| excess(&one) > excess(&other)) {
                found.worst = Some(one);
            }
        }
    };
    // What is another result is judged as such; the rest as if that were right.
    let judged = |position: usize| if is_elsewhere(position) { 0.0 } else { errors[position] };
    let mut rest = Squares::default();
    for (position, &value) in expected.iter().enumerate() {
        rest.add(judged(position), finite(value));
        let mut element = Squares::default();
        element.add(judged(position), finite(value));
        consider(Place::Element(position as u64), &element, rounding.part());
    }
    consider(Place::All, &rest, rounding.whole());
    for (row, squares) in rows.iter().enumerate().filter(|(row, _)| !elsewhere.get(*row).copied().unwrap_or(false)) {
        consider(Place::Row(row as u64), squares, rounding.part());
    }
    let mut stride = 1usize;
    for (dim, &size) in sizes.iter().enumerate().rev() {
        let size = size as usize;
        // One index is the whole; of one dimension, each is an element.
        if size > 1 && sizes.len() > 1 {
            let mut slices = vec![Squares::default(); size];
            for (position, &value) in expected.iter().enumerate() {
                slices[position / stride % size].add(judged(position), finite(value));
            }
            for (index, squares) in slices.iter().enumerate() {
                consider(Place::Slice { dim, index: index as u64 }, squares, rounding.part());
            }
        }
        stride *= size.max(1);
    }
    found
}

fn rows(errors: &[f64], expected: &[f64], width: usize, finite: &dyn Fn(f64) -> f64) -> Vec<Squares> {
    let row = |(errors, expected): (&[f64], &[f64])| {
        let mut squares = Squares::default();
        for (&error, &value) in errors.iter().zip(expected) {
            squares.add(error, finite(value));
        }
        squares
    };
    errors.chunks(width).zip(expected.chunks(width)).map(row).collect()
}

/// Rows that are another result than the reference's, as after a choice that fell otherwise: farther off than rounding
/// brings a row, and not too many, nor too far. None of them otherwise: then those rows are wrong.
fn elsewhere(rows: &[Squares], scale: &Scale, rank: usize, rounding: &Rounding) -> Vec<bool> {
    let Some(most) = rounding.elsewhere().filter(|_| rank > 1) else { return Vec::new() };
    let off = |row: &Squares| row.errors.sqrt() / scale.of(row).max(f64::MIN_POSITIVE);
    let beyond: Vec<bool> = rows.iter().map(|row| off(row) > rounding.part() / 2.0).collect();
    let of_them = || rows.iter().zip(&beyond).filter(|(_, beyond)| **beyond).map(|(row, _)| row);
    let few = of_them().count() * ELSEWHERE_ONE_IN <= rows.len();
    if few && of_them().all(|row| off(row) <= most) { beyond } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use planfile::DType;

    use super::*;

    const ROUNDING: Rounding =
        Rounding { coarsest: Some(DType::BF16), primitives: 40, longest_sum: 64, expected: 0.02, chooses: false };
    const SIZES: [u64; 3] = [2, 16, 64];

    /// Numbers between -1 and 1 that repeat only late, of size 1 by their norm.
    fn values(seed: f64) -> Vec<f64> {
        (0..2 * 16 * 64).map(|i| (f64::from(i) * 12.9898 + seed).sin()).collect()
    }

    fn judged(change: impl Fn(usize, f64) -> f64, rounding: &Rounding) -> Judgement {
        let expected = values(0.0);
        let errors: Vec<f64> =
            expected.iter().enumerate().map(|(i, &value)| (change(i, value) - value).abs()).collect();
        judge(&errors, &expected, &SIZES, rounding)
    }

    #[test]
    fn rounding_passes_and_twice_what_is_allowed_does_not() {
        let noise = values(5.0);
        let by = |size: f64| judged(|i, value| value + size * noise[i], &ROUNDING);
        assert_eq!(by(0.5 * ROUNDING.whole()).beyond, 0);
        assert_eq!(by(2.0 * ROUNDING.whole()).worst.map(|part| part.place), Some(Place::All));
    }

    #[test]
    fn a_wrong_part_does_not_hide() {
        let other = values(5.0);
        let place = |change: &dyn Fn(usize, f64) -> f64| judged(change, &ROUNDING).worst.map(|part| part.place);
        // A row of another token, of zeros, and with its sign flipped.
        assert_eq!(place(&|i, value| if i / 64 == 7 { other[i] } else { value }), Some(Place::Row(7)));
        assert_eq!(place(&|i, value| if i / 64 == 31 { 0.0 } else { value }), Some(Place::Row(31)));
        assert_eq!(place(&|i, value| if i / 64 == 0 { -value } else { value }), Some(Place::Row(0)));
        // A column, as where a bias lacks one feature.
        let column = place(&|i, value| if i % 64 == 3 { value + 0.8 } else { value });
        assert_eq!(column, Some(Place::Slice { dim: 2, index: 3 }));
        // One element.
        assert_eq!(place(&|i, value| if i == 5 { value + 0.9 } else { value }), Some(Place::Element(5)));
    }

    #[test]
    fn what_is_finite_in_one_only_is_beyond_anything() {
        let expected = values(0.0);
        let mut errors = vec![0.0; expected.len()];
        errors[9] = f64::INFINITY;
        assert_eq!(judge(&errors, &expected, &SIZES, &ROUNDING).beyond, 1);
    }

    #[test]
    fn rows_of_another_choice_pass_where_there_are_choices_and_wrong_rows_do_not() {
        let noise = values(5.0);
        let choosing = Rounding { chooses: true, ..ROUNDING };
        let off = |rows: usize, size: f64| {
            move |i: usize, value: f64, noise: &[f64]| {
                if i / 64 % 16 < rows { value + size * noise[i] } else { value }
            }
        };
        let judge = |rows, size, rounding: &Rounding| judged(|i, value| off(rows, size)(i, value, &noise), rounding);
        assert_eq!((judge(2, 0.4, &choosing).beyond, judge(2, 0.4, &choosing).elsewhere), (0, 4));
        assert!(judge(2, 0.4, &ROUNDING).beyond > 0);
        // Too many, and too far.
        assert!(judge(3, 0.4, &choosing).beyond > 0);
        assert!(judge(1, 1.2, &choosing).beyond > 0);
    }
}
