//! How far a tensor is from its reference, and whether rounding explains it.
//!
//! Either each element is judged by itself, as `--rtol` and `--atol` say, or the whole and its parts are judged by their
//! Euclidean norms, with the share that [`Rounding`] allows. With `Δ = actual - expected`, for all elements
//!
//! `‖Δ‖ ≤ whole · ‖expected‖`
//!
//! and, for each part `p` of `m` elements: a row along the last dimension, all at one index of one dimension, one element,
//!
//! `‖Δ_p‖ ≤ part · max(‖expected_p‖, 0.03 · √m · rms(expected), max|expected| where m < 64)`.
//!
//! The last two say what a small part is compared with: rounding errors are of the size of the numbers that were summed,
//! not of what is left where they cancel. Integers and booleans must be equal.

mod diagnosis;
mod parts;

use half::{bf16, f16};
use planfile::{DType, Tensor};

pub use diagnosis::{Diagnosis, HISTOGRAM_EDGES, Look};
pub use parts::{Part, Place};

use crate::rounding::Rounding;

/// What lets a comparison pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// What rounding explains; see the module's documentation.
    pub rounding: Rounding,
    /// Judges each element by itself instead.
    pub elements: Option<Elements>,
}

/// An element passes where `|actual - expected| <= absolute + relative * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Elements {
    pub relative: f64,
    pub absolute: f64,
}

impl From<Elements> for Tolerance {
    fn from(elements: Elements) -> Self {
        Self { rounding: Rounding::NONE, elements: Some(elements) }
    }
}

/// Distance of a tensor from its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Largest `|actual - expected|`.
    pub max_error: f64,
    /// The same over the largest finite `|expected|`; over 1 where that is 0.
    pub max_relative_error: f64,
    /// `‖actual - expected‖ / ‖expected‖`, of elements that are finite in both.
    pub norm_error: f64,
    /// Of the angle between both, of elements that are finite in both; 1 where they are the same.
    pub cosine: f64,
    /// Elements that are off by more than they may, by themselves or as part of what is off in its norm.
    pub beyond: u64,
    /// Rows that are another result, not a rounded one, as after a choice that fell otherwise: see
    /// [`Rounding::chooses`].
    pub elsewhere: u64,
    /// The one with the largest error, if there are elements.
    pub worst: Option<Worst>,
    /// What is farthest beyond what it may be off in its norm.
    pub worst_part: Option<Part>,
    pub diagnosis: Diagnosis,
}

/// An element, by its position in row-major order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    pub position: u64,
    pub actual: f64,
    pub expected: f64,
}

impl Comparison {
    pub fn passes(&self) -> bool {
        self.beyond == 0
    }
}

/// Compares in `f64`. NaN equals NaN, and an infinity equals itself; what is finite in one only is beyond any tolerance.
///
/// # Errors
/// A sentence when type or shape differ.
pub fn compare(actual: &Tensor, expected: &Tensor, tolerance: Tolerance) -> Result<Comparison, String> {
    if actual.ty.dtype != expected.ty.dtype || actual.ty.sizes() != expected.ty.sizes() {
        return Err(format!("is {}, the reference is {}", actual.ty, expected.ty));
    }
    let (dtype, sizes) = (expected.ty.dtype, expected.ty.sizes());
    let unequal = || {
        let width = dtype.bytes();
        let pairs = actual.data.bytes().chunks_exact(width).zip(expected.data.bytes().chunks_exact(width));
        pairs.filter(|(a, b)| a != b).count() as u64
    };
    let (values, references) = (to_f64s(actual), to_f64s(expected));
    let errors: Vec<f64> = values.iter().zip(&references).map(|(&a, &b)| error(a, b)).collect();
    let largest = references.iter().filter(|value| value.is_finite()).fold(0.0, |largest: f64, v| largest.max(v.abs()));
    let (beyond, elsewhere, worst_part) = match tolerance.elements {
        Some(Elements { relative, absolute }) => {
            let pairs = errors.iter().zip(&references);
            // Infinite tolerance would let anything pass where an infinity is expected.
            let allowed = |expected: f64| if expected.is_finite() { absolute + relative * expected.abs() } else { 0.0 };
            (pairs.filter(|(error, expected)| **error > allowed(**expected)).count() as u64, 0, None)
        }
        None if !dtype.is_float() => (unequal(), 0, None),
        None => {
            let found = parts::judge(&errors, &references, &sizes, &tolerance.rounding);
            (found.beyond, found.elsewhere, found.worst)
        }
    };
    let worst = errors.iter().enumerate().fold(None, |worst: Option<usize>, (position, error)| match worst {
        Some(other) if errors[other] >= *error => worst,
        _ => Some(position),
    });
    let max_error = worst.map_or(0.0, |position| errors[position]);
    let diagnosis = Diagnosis::of(&values, &references, &errors, tolerance.rounding.expected);
    Ok(Comparison {
        max_error,
        max_relative_error: max_error / if largest == 0.0 { 1.0 } else { largest },
        norm_error: diagnosis.norm_error,
        cosine: diagnosis.cosine,
        beyond,
        elsewhere,
        worst: worst.map(|position| Worst {
            position: position as u64,
            actual: values[position],
            expected: references[position],
        }),
        worst_part,
        diagnosis,
    })
}

/// `|actual - expected|`; infinite where one is a number and the other is not.
fn error(actual: f64, expected: f64) -> f64 {
    let same = actual == expected || (actual.is_nan() && expected.is_nan());
    match (actual - expected).abs() {
        _ if same => 0.0,
        // One of them is NaN.
        error if error.is_nan() => f64::INFINITY,
        error => error,
    }
}

/// All elements as `f64`: exact but for integers beyond 53 bits.
pub fn to_f64s(tensor: &Tensor) -> Vec<f64> {
    fn widen<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        let element = |chunk: &[u8]| {
            let mut element = [0; N];
            element.copy_from_slice(chunk);
            convert(element)
        };
        bytes.chunks_exact(N).map(element).collect()
    }
    let bytes = tensor.data.bytes();
    match tensor.ty.dtype {
        DType::Bool | DType::U8 => widen(bytes, |element| f64::from(u8::from_le_bytes(element))),
        DType::U16 => widen(bytes, |element| f64::from(u16::from_le_bytes(element))),
        DType::U32 => widen(bytes, |element| f64::from(u32::from_le_bytes(element))),
        DType::U64 => widen(bytes, |element| u64::from_le_bytes(element) as f64),
        DType::I8 => widen(bytes, |element| f64::from(i8::from_le_bytes(element))),
        DType::I16 => widen(bytes, |element| f64::from(i16::from_le_bytes(element))),
        DType::I32 => widen(bytes, |element| f64::from(i32::from_le_bytes(element))),
        DType::I64 => widen(bytes, |element| i64::from_le_bytes(element) as f64),
        DType::F16 => widen(bytes, |element| f16::from_le_bytes(element).to_f64()),
        DType::BF16 => widen(bytes, |element| bf16::from_le_bytes(element).to_f64()),
        DType::F32 => widen(bytes, |element| f64::from(f32::from_le_bytes(element))),
        DType::F64 => widen(bytes, f64::from_le_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance { elements: Some(Elements { relative: 0.1, absolute: 0.5 }), ..EXACT };
    const EXACT: Tolerance = Tolerance { rounding: Rounding::NONE, elements: None };

    fn vector(elements: &[f32]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    #[test]
    fn errors_are_absolute_and_relative_to_the_largest() {
        let comparison = compare(&vector(&[1.4, -20.0, 0.0]), &vector(&[1.0, -17.0, 0.6]), TOLERANCE).unwrap();
        // 0.4 <= 0.5 + 0.1; 3 > 0.5 + 1.7; 0.6 > 0.5 + 0.06.
        assert_eq!((comparison.beyond, comparison.max_error), (2, 3.0));
        assert!((comparison.max_relative_error - 3.0 / 17.0).abs() < 1e-12);
        assert_eq!(comparison.worst.map(|worst| worst.position), Some(1));
    }

    #[test]
    fn what_is_not_finite_equals_itself_only() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert!(compare(&vector(&[nan, inf, -inf]), &vector(&[nan, inf, -inf]), TOLERANCE).unwrap().passes());
        let comparison = compare(&vector(&[nan, 1.0, 1.0, -inf]), &vector(&[1.0, nan, inf, inf]), TOLERANCE).unwrap();
        assert_eq!(comparison.beyond, 4);
        assert_eq!(comparison.max_error, f64::INFINITY);
    }

    #[test]
    fn types_and_shapes_must_agree() {
        let doubles = Tensor::from_elements(&[1], &[1f64]).unwrap();
        let message = compare(&vector(&[1.0]), &doubles, TOLERANCE).unwrap_err();
        assert_eq!(message, "is f32[1], the reference is f64[1]");
        assert!(compare(&vector(&[1.0]), &vector(&[1.0, 2.0]), TOLERANCE).is_err());
    }

    #[test]
    fn integers_and_nothing_are_compared_too() {
        let ids = |elements: &[i64]| Tensor::from_elements(&[elements.len() as u64], elements).unwrap();
        assert_eq!(compare(&ids(&[3, -4]), &ids(&[3, 4]), TOLERANCE).unwrap().max_error, 8.0);
        assert_eq!(compare(&ids(&[]), &ids(&[]), TOLERANCE).unwrap().worst, None);
        // Integers that `f64` cannot tell apart.
        let large = 1i64 << 53;
        assert_eq!(compare(&ids(&[large + 1, 3]), &ids(&[large, 3]), EXACT).unwrap().beyond, 1);
        assert!(compare(&ids(&[large + 1]), &ids(&[large + 1]), EXACT).unwrap().passes());
    }
}
