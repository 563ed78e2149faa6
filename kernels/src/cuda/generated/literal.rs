//! Types and constants as CUDA C++.

use planfile::{DType, Scalar};

/// What the elements of a tensor are in memory, as `scalar.cuh` names them.
pub(super) const fn element(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "u8",
        other => other.name(),
    }
}

/// What the elements are computed in.
pub(super) const fn value(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 | DType::BF16 => "f32",
        other => element(other),
    }
}

pub(super) const fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// A constant, in the type that it is computed in.
pub(super) fn constant(scalar: Scalar) -> String {
    let dtype = scalar.dtype;
    match dtype {
        DType::Bool | DType::U8 | DType::U16 | DType::I8 | DType::I16 => {
            format!("static_cast<{}>({})", element(dtype), scalar.to_i64().unwrap_or_default())
        }
        DType::U32 => format!("{}u", scalar.bits),
        DType::U64 => format!("{}ull", scalar.bits),
        // The lowest values have no literal: a minus sign is an operator.
        DType::I32 if scalar.to_i64() == Some(i64::from(i32::MIN)) => "static_cast<i32>(0x80000000u)".to_owned(),
        DType::I64 if scalar.to_i64() == Some(i64::MIN) => "static_cast<i64>(1ull << 63)".to_owned(),
        DType::I32 => format!("{}", scalar.to_i64().unwrap_or_default()),
        DType::I64 => format!("{}ll", scalar.to_i64().unwrap_or_default()),
        DType::F16 | DType::BF16 | DType::F32 => f32(scalar.to_f64() as f32),
        DType::F64 => f64(scalar.to_f64()),
    }
}

/// The shortest decimal that reads back as `value`; bits where there is none.
pub(super) fn f32(value: f32) -> String {
    if value.is_finite() { format!("{value:?}f") } else { format!("__uint_as_float({:#x}u)", value.to_bits()) }
}

pub(super) fn f64(value: f64) -> String {
    if value.is_finite() {
        format!("{value:?}")
    } else {
        format!("__longlong_as_double(static_cast<i64>({:#x}ull))", value.to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_have_their_type() {
        assert_eq!(constant(Scalar::f32(1.0)), "1.0f");
        assert_eq!(constant(Scalar::f32(1e-12)), "1e-12f");
        assert_eq!(constant(Scalar::f32(f32::NEG_INFINITY)), "__uint_as_float(0xff800000u)");
        assert_eq!(constant(Scalar::from_f64(DType::F16, 0.1)), "0.099975586f");
        assert_eq!(constant(Scalar::i64(-5)), "-5ll");
        assert_eq!(constant(Scalar::i64(i64::MIN)), "static_cast<i64>(1ull << 63)");
        assert_eq!(constant(Scalar::from_i64(DType::I8, -1)), "static_cast<i8>(-1)");
        assert_eq!(constant(Scalar { dtype: DType::U64, bits: u64::MAX }), "18446744073709551615ull");
    }
}
