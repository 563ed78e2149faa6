//! Element types as the CPU computes with them: half types are computed in `f32`, booleans are bytes.

use planfile::Element;
use planfile::op::Combine;

use crate::float_math;

/// A type that values are computed in. Integers wrap.
pub(crate) trait Number: Element + PartialOrd + Send + Sync {
    /// What sums and products are accumulated in: `f64` for floats.
    type Sum: Number;
    const ZERO: Self;
    const ONE: Self;
    /// Identity of `max`: negative infinity or the smallest integer.
    const LOWEST: Self;
    /// Identity of `min`.
    const HIGHEST: Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// NaN if either is NaN.
    fn larger(self, other: Self) -> Self;
    /// NaN if either is NaN.
    fn smaller(self, other: Self) -> Self;
    fn is_nan(self) -> bool;
    /// Numbers in their order: NaN above all others, zeros of either sign as one.
    fn rank(self) -> i64;
    fn to_sum(self) -> Self::Sum;
    fn from_sum(sum: Self::Sum) -> Self;
    /// `sum / count`; truncated for integers, where no elements give 0.
    fn mean(sum: Self::Sum, count: usize) -> Self;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;

    #[inline(always)]
    fn combine(self, combine: Combine, other: Self) -> Self {
        match combine {
            Combine::Sum => self.add(other),
            Combine::Prod => self.mul(other),
            Combine::Max => self.larger(other),
            Combine::Min => self.smaller(other),
        }
    }

    /// What combining nothing gives.
    fn identity(combine: Combine) -> Self {
        match combine {
            Combine::Sum => Self::ZERO,
            Combine::Prod => Self::ONE,
            Combine::Max => Self::LOWEST,
            Combine::Min => Self::HIGHEST,
        }
    }
}

/// Conversion with the meaning of Rust's `as`: floats to integers truncate and saturate, integers wrap.
pub(crate) trait Convert<To> {
    fn convert(self) -> To;
}

macro_rules! convert {
    ($from:ty => $($to:ty),*) => {
        $(impl Convert<$to> for $from {
            #[inline(always)]
            fn convert(self) -> $to {
                self as $to
            }
        })*
    };
}

macro_rules! integers {
    ($($int:ty),*) => {
        $(impl Number for $int {
            type Sum = Self;
            const ZERO: Self = 0;
            const ONE: Self = 1;
            const LOWEST: Self = Self::MIN;
            const HIGHEST: Self = Self::MAX;
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                self.max(other)
            }
            #[inline(always)]
            fn smaller(self, other: Self) -> Self {
                self.min(other)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                false
            }
            #[inline(always)]
            fn rank(self) -> i64 {
                let unsigned_64 = Self::MIN == 0 && Self::BITS == 64;
                if unsigned_64 { self as i64 ^ i64::MIN } else { self as i64 }
            }
            #[inline(always)]
            fn to_sum(self) -> Self {
                self
            }
            #[inline(always)]
            fn from_sum(sum: Self) -> Self {
                sum
            }
            fn mean(sum: Self, count: usize) -> Self {
                (sum as i128).checked_div(count as i128).unwrap_or_default() as Self
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
        }
        convert!($int => u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);
        )*
    };
}
integers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! floats {
    ($($float:ty: $exp:path, $tanh:path);*) => {
        $(impl Number for $float {
            type Sum = f64;
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = Self::NEG_INFINITY;
            const HIGHEST: Self = Self::INFINITY;
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                if self > other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn smaller(self, other: Self) -> Self {
                if self < other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                self.is_nan()
            }
            #[inline(always)]
            fn rank(self) -> i64 {
                if self.is_nan() {
                    return i64::MAX;
                }
                // Bits of numbers of one sign are in the order of their magnitudes. What is added makes -0 of 0.
                let bits = (f64::from(self) + 0.0).to_bits().cast_signed();
                if bits < 0 { bits ^ i64::MAX } else { bits }
            }
            #[inline(always)]
            fn to_sum(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn from_sum(sum: f64) -> Self {
                sum as Self
            }
            fn mean(sum: f64, count: usize) -> Self {
                (sum / count as f64) as Self
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                Self::from(value)
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
        }
        impl Float for $float {
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }
        }
        convert!($float => u8, u16, u32, u64, i8, i16, i32, i64, f32, f64);
        )*
    };
}
floats!(f32: float_math::exp, float_math::tanh; f64: f64::exp, f64::tanh);

/// Floating-point types that functions are computed in.
pub(crate) trait Float:
    Number<Sum = f64>
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
{
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn from_f64(value: f64) -> Self;
}

/// The sum of a term of each element, in independent parts, so that one need not wait for the one before.
#[inline(always)]
pub(crate) fn sum<T: Float>(elements: &[T], term: impl Fn(T) -> f64) -> f64 {
    const PARTS: usize = 16;
    let mut parts = [0.0; PARTS];
    let chunks = elements.chunks_exact(PARTS);
    for (part, &element) in parts.iter_mut().zip(chunks.remainder()) {
        *part = term(element);
    }
    for chunk in chunks {
        for (part, &element) in parts.iter_mut().zip(chunk) {
            *part += term(element);
        }
    }
    parts.iter().sum()
}

/// Runs the body with `$T` the type that `$dtype` is computed in.
macro_rules! with_number {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            planfile::DType::Bool | planfile::DType::U8 => {
                type $T = u8;
                $body
            }
            planfile::DType::U16 => {
                type $T = u16;
                $body
            }
            planfile::DType::U32 => {
                type $T = u32;
                $body
            }
            planfile::DType::U64 => {
                type $T = u64;
                $body
            }
            planfile::DType::I8 => {
                type $T = i8;
                $body
            }
            planfile::DType::I16 => {
                type $T = i16;
                $body
            }
            planfile::DType::I32 => {
                type $T = i32;
                $body
            }
            planfile::DType::I64 => {
                type $T = i64;
                $body
            }
            planfile::DType::F16 | planfile::DType::BF16 | planfile::DType::F32 => {
                type $T = f32;
                $body
            }
            planfile::DType::F64 => {
                type $T = f64;
                $body
            }
        }
    };
}
pub(crate) use with_number;

/// Runs the body with `$T` the type for sums and products of `$dtype`: for integers the unsigned one of their size, since
/// sums and products that wrap have the same bits with a sign and without.
macro_rules! with_wrapping {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            planfile::DType::F16 | planfile::DType::BF16 | planfile::DType::F32 => {
                type $T = f32;
                $body
            }
            planfile::DType::F64 => {
                type $T = f64;
                $body
            }
            integer => $crate::number::with_width!(integer, $T => $body),
        }
    };
}
pub(crate) use with_wrapping;

/// Runs the body with `$T` the float type that `$dtype` is computed in; an error of `$op` for other types.
macro_rules! with_float {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            planfile::DType::F16 | planfile::DType::BF16 | planfile::DType::F32 => {
                type $T = f32;
                $body
            }
            planfile::DType::F64 => {
                type $T = f64;
                $body
            }
            dtype => Err($crate::CpuError::Unsupported { op: $op, dtype, hint: "cast to a floating-point type first" }),
        }
    };
}
pub(crate) use with_float;

/// Runs the body with `$T` an unsigned integer as wide as `$dtype`, for moving elements around.
macro_rules! with_width {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            planfile::DType::Bool | planfile::DType::U8 | planfile::DType::I8 => {
                type $T = u8;
                $body
            }
            planfile::DType::U16 | planfile::DType::I16 | planfile::DType::F16 | planfile::DType::BF16 => {
                type $T = u16;
                $body
            }
            planfile::DType::U32 | planfile::DType::I32 | planfile::DType::F32 => {
                type $T = u32;
                $body
            }
            planfile::DType::U64 | planfile::DType::I64 | planfile::DType::F64 => {
                type $T = u64;
                $body
            }
        }
    };
}
pub(crate) use with_width;
