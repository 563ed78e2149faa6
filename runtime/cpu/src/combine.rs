//! How two values become one: reductions, scatters, and the step that collectives repeat.

use planfile::DType;
use planfile::attributes::combine_name;
use planfile::op::Combine;

use crate::error::CpuError;
use crate::number::{Number, with_number};
use crate::view::{is_half, narrow_half, slice, slice_mut, widen_half};

/// Sums of booleans are "or", the largest of 0 and 1. Minima are "and", their product, so that none give 1.
pub(crate) fn logical(combine: Combine, dtype: DType) -> Combine {
    match (dtype, combine) {
        (DType::Bool, Combine::Sum) => Combine::Max,
        (DType::Bool, Combine::Min) => Combine::Prod,
        (_, other) => other,
    }
}

/// Runs the body with `$f` the function of two `$T` that `$combine` stands for, so that loops are compiled for each.
macro_rules! with_combine {
    ($combine:expr, $T:ty, $f:ident => $body:expr) => {
        match $combine {
            planfile::op::Combine::Sum => {
                let $f = <$T as $crate::number::Number>::add;
                $body
            }
            planfile::op::Combine::Prod => {
                let $f = <$T as $crate::number::Number>::mul;
                $body
            }
            planfile::op::Combine::Max => {
                let $f = <$T as $crate::number::Number>::larger;
                $body
            }
            planfile::op::Combine::Min => {
                let $f = <$T as $crate::number::Number>::smaller;
                $body
            }
        }
    };
}
pub(crate) use with_combine;

/// The combination step of collectives: accumulates `from` into `into` element by element.
///
/// Half types are combined in `f32` and rounded. Integers wrap; sums and products of booleans are "or" and "and".
///
/// # Errors
/// [`CpuError::Length`] unless both are equally many whole elements, [`CpuError::Alignment`].
pub fn combine(combine: Combine, dtype: DType, into: &mut [u8], from: &[u8]) -> Result<(), CpuError> {
    if into.len() != from.len() || !into.len().is_multiple_of(dtype.bytes()) {
        let what = format!("right side of {} of {dtype}", combine_name(combine));
        return Err(CpuError::Length { what, expected: into.len() as u64, actual: from.len() });
    }
    if is_half(dtype) {
        return combine_half(combine, dtype, slice_mut(into, dtype)?, slice(from, dtype)?);
    }
    with_number!(dtype, T => {
        accumulate::<T>(logical(combine, dtype), slice_mut(into, dtype)?, slice(from, dtype)?);
    });
    Ok(())
}

fn combine_half(combine: Combine, dtype: DType, into: &mut [u16], from: &[u16]) -> Result<(), CpuError> {
    const CHUNK: usize = 512;
    let (mut left, mut right) = ([0f32; CHUNK], [0f32; CHUNK]);
    for (into, from) in into.chunks_mut(CHUNK).zip(from.chunks(CHUNK)) {
        let (left, right) = (&mut left[..into.len()], &mut right[..into.len()]);
        widen_half(dtype, into, left);
        widen_half(dtype, from, right);
        accumulate(combine, left, right);
        narrow_half(dtype, left, into);
    }
    Ok(())
}

/// `into[i] = combine(into[i], from[i])`.
#[inline(always)]
pub(crate) fn accumulate<T: Number>(combine: Combine, into: &mut [T], from: &[T]) {
    with_combine!(combine, T, f => {
        for (into, &from) in into.iter_mut().zip(from) {
            *into = f(*into, from);
        }
    });
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn halves_are_combined_in_single_precision() {
        let mut into = [f16::from_f32(60000.0), f16::from_f32(1.0), f16::NAN];
        let from = [f16::from_f32(-60000.0), f16::from_f32(2048.0), f16::ONE];
        combine(Combine::Sum, DType::F16, bytemuck::cast_slice_mut(&mut into), bytemuck::cast_slice(&from)).unwrap();
        assert_eq!([into[0].to_f32(), into[1].to_f32()], [0.0, 2048.0]);
        assert!(into[2].is_nan());
    }

    #[test]
    fn integers_wrap_and_booleans_stay_booleans() {
        let mut bytes = [200u8, 1, 0];
        combine(Combine::Sum, DType::U8, &mut bytes, &[100, 1, 0]).unwrap();
        assert_eq!(bytes, [44, 2, 0]);
        let mut flags = [1u8, 1, 0, 0];
        combine(Combine::Sum, DType::Bool, &mut flags, &[1, 0, 1, 0]).unwrap();
        assert_eq!(flags, [1, 1, 1, 0]);
        combine(Combine::Prod, DType::Bool, &mut flags, &[1, 0, 1, 0]).unwrap();
        assert_eq!(flags, [1, 0, 1, 0]);
    }

    #[test]
    fn unequal_lengths_are_refused() {
        let error = combine(Combine::Max, DType::F32, &mut [0; 4], &[0; 8]).unwrap_err();
        assert!(matches!(error, CpuError::Length { expected: 4, actual: 8, .. }));
        assert!(combine(Combine::Max, DType::F32, &mut [0; 3], &[0; 3]).is_err());
    }
}
