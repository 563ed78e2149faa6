//! How far a tensor is from its reference.

use half::{bf16, f16};
use planfile::{DType, Tensor};

/// An element passes where `|actual - expected| <= absolute + relative * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    pub relative: f64,
    pub absolute: f64,
}

/// Distance of a tensor from its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Largest `|actual - expected|`.
    pub max_error: f64,
    /// The same over the largest finite `|expected|`; over 1 where that is 0.
    pub max_relative_error: f64,
    /// Elements beyond the tolerance.
    pub beyond: u64,
    /// The one with the largest error, if there are elements.
    pub worst: Option<Worst>,
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

/// Compares element by element, in `f64`. NaN equals NaN, and an infinity equals itself.
///
/// # Errors
/// A sentence when type or shape differ.
pub fn compare(actual: &Tensor, expected: &Tensor, tolerance: Tolerance) -> Result<Comparison, String> {
    if actual.ty.dtype != expected.ty.dtype || actual.ty.sizes() != expected.ty.sizes() {
        return Err(format!("is {}, the reference is {}", actual.ty, expected.ty));
    }
    let (actual, expected) = (to_f64s(actual), to_f64s(expected));
    let mut comparison = Comparison { max_error: 0.0, max_relative_error: 0.0, beyond: 0, worst: None };
    let mut largest = 0f64;
    for (position, (&actual, &expected)) in (0u64..).zip(actual.iter().zip(&expected)) {
        let same = actual == expected || (actual.is_nan() && expected.is_nan());
        let error = match (actual - expected).abs() {
            _ if same => 0.0,
            // One of them is NaN.
            error if error.is_nan() => f64::INFINITY,
            error => error,
        };
        // Infinite tolerance would let anything pass where an infinity is expected.
        let allowed = if expected.is_finite() { tolerance.absolute + tolerance.relative * expected.abs() } else { 0.0 };
        comparison.beyond += u64::from(error > allowed);
        if comparison.worst.is_none() || error > comparison.max_error {
            comparison.max_error = error;
            comparison.worst = Some(Worst { position, actual, expected });
        }
        if expected.is_finite() {
            largest = largest.max(expected.abs());
        }
    }
    comparison.max_relative_error = comparison.max_error / if largest == 0.0 { 1.0 } else { largest };
    Ok(comparison)
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

    const TOLERANCE: Tolerance = Tolerance { relative: 0.1, absolute: 0.5 };

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
    }
}
