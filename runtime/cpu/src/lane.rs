//! Instructions of expressions on blocks of elements: what each means for each type.

use planfile::{Binary, Compare, Unary};

use crate::float_math;
use crate::number::Number;
use crate::simd::vectorised;

/// A type that expressions are computed in.
pub(crate) trait Lane: Number {
    /// `dst[i] = op(x[i])`, of one type. [`Unary::IsNan`] and [`Unary::IsInf`] are [`classify`]'s, bits are copied as
    /// they are; functions of floats leave integers as they are: the type check admits no such program.
    fn unary(op: Unary, dst: &mut [Self], x: &[Self]);
    /// `dst[i] = op(a[i], b[i])`. Bitwise instructions leave floats as they are, like above.
    fn binary(op: Binary, dst: &mut [Self], a: &[Self], b: &[Self]);
    fn is_infinite(self) -> bool;
}

#[inline(always)]
fn map<T: Copy, R>(dst: &mut [R], x: &[T], f: impl Fn(T) -> R) {
    for (dst, &x) in dst.iter_mut().zip(x) {
        *dst = f(x);
    }
}

#[inline(always)]
fn zip<T: Copy, R>(dst: &mut [R], a: &[T], b: &[T], f: impl Fn(T, T) -> R) {
    for ((dst, &a), &b) in dst.iter_mut().zip(a).zip(b) {
        *dst = f(a, b);
    }
}

vectorised! {
/// `dst[i] = op(a[i], b[i])`, as 0 or 1.
pub(crate) fn compare<T: Number>(op: Compare, dst: &mut [u8], a: &[T], b: &[T]) {
    match op {
        Compare::Eq => zip(dst, a, b, |a, b| u8::from(a == b)),
        Compare::Ne => zip(dst, a, b, |a, b| u8::from(a != b)),
        Compare::Lt => zip(dst, a, b, |a, b| u8::from(a < b)),
        Compare::Le => zip(dst, a, b, |a, b| u8::from(a <= b)),
        Compare::Gt => zip(dst, a, b, |a, b| u8::from(a > b)),
        Compare::Ge => zip(dst, a, b, |a, b| u8::from(a >= b)),
    }
}
}

/// `dst[i] = op(x[i])` as 0 or 1: `infinite` asks for infinities, otherwise for NaN.
pub(crate) fn classify<T: Lane>(infinite: bool, dst: &mut [u8], x: &[T]) {
    if infinite {
        map(dst, x, |x| u8::from(x.is_infinite()));
    } else {
        map(dst, x, |x| u8::from(x.is_nan()));
    }
}

/// Logical negation.
pub(crate) fn not(dst: &mut [u8], x: &[u8]) {
    map(dst, x, |x| u8::from(x == 0));
}

vectorised! {
/// `dst[i] = if condition[i] { yes[i] } else { no[i] }`.
pub(crate) fn select<T: Copy>(dst: &mut [T], condition: &[u8], yes: &[T], no: &[T]) {
    for (((dst, &condition), &yes), &no) in dst.iter_mut().zip(condition).zip(yes).zip(no) {
        *dst = if condition == 0 { no } else { yes };
    }
}
}

/// Integers to the power of integers, wrapping. Negative powers truncate: 0 but for bases 1 and -1.
macro_rules! power {
    ($int:ty, signed) => {
        |base: $int, exponent: $int| -> $int {
            match base {
                1 => 1,
                -1 => if exponent & 1 == 0 { 1 } else { -1 },
                _ if exponent < 0 => 0,
                _ => power!(@loop $int, base, exponent),
            }
        }
    };
    ($int:ty, unsigned) => {
        |base: $int, exponent: $int| -> $int { power!(@loop $int, base, exponent) }
    };
    (@loop $int:ty, $base:expr, $exponent:expr) => {{
        let (mut result, mut square, mut exponent): ($int, $int, $int) = (1, $base, $exponent);
        while exponent != 0 {
            if exponent & 1 == 1 {
                result = result.wrapping_mul(square);
            }
            square = square.wrapping_mul(square);
            exponent >>= 1;
        }
        result
    }};
}

/// Remainder with the sign of the divisor; 0 for a zero divisor.
macro_rules! floor_mod {
    ($int:ty, signed) => {
        |a: $int, b: $int| -> $int {
            let remainder = if b == 0 { 0 } else { a.wrapping_rem(b) };
            if remainder != 0 && (remainder < 0) != (b < 0) { remainder + b } else { remainder }
        }
    };
    ($int:ty, unsigned) => {
        |a: $int, b: $int| -> $int { if b == 0 { 0 } else { a % b } }
    };
}

macro_rules! sign {
    ($int:ty, signed) => {
        <$int>::signum
    };
    ($int:ty, unsigned) => {
        |x: $int| <$int>::from(x != 0)
    };
}

macro_rules! magnitude {
    ($int:ty, signed) => {
        <$int>::wrapping_abs
    };
    ($int:ty, unsigned) => {
        |x: $int| x
    };
}

macro_rules! integer_lane {
    ($int:ty, $sign:ident) => {
        impl Lane for $int {
            fn unary(op: Unary, dst: &mut [Self], x: &[Self]) {
                match op {
                    Unary::Neg => map(dst, x, <$int>::wrapping_neg),
                    Unary::Abs => map(dst, x, magnitude!($int, $sign)),
                    Unary::Sign => map(dst, x, sign!($int, $sign)),
                    Unary::Not => map(dst, x, |x| !x),
                    Unary::Floor
                    | Unary::Ceil
                    | Unary::Round
                    | Unary::Trunc
                    | Unary::Sqrt
                    | Unary::Reciprocal
                    | Unary::Exp
                    | Unary::Log
                    | Unary::Sin
                    | Unary::Cos
                    | Unary::Tan
                    | Unary::Asin
                    | Unary::Acos
                    | Unary::Atan
                    | Unary::Sinh
                    | Unary::Cosh
                    | Unary::Tanh
                    | Unary::Asinh
                    | Unary::Acosh
                    | Unary::Atanh
                    | Unary::Erf
                    | Unary::Sigmoid
                    | Unary::IsNan
                    | Unary::IsInf
                    | Unary::Bits
                    | Unary::FromBits => dst.copy_from_slice(x),
                }
            }

            fn binary(op: Binary, dst: &mut [Self], a: &[Self], b: &[Self]) {
                match op {
                    Binary::Add => zip(dst, a, b, <$int>::wrapping_add),
                    Binary::Sub => zip(dst, a, b, <$int>::wrapping_sub),
                    Binary::Mul => zip(dst, a, b, <$int>::wrapping_mul),
                    Binary::Div => zip(dst, a, b, |a, b| if b == 0 { 0 } else { a.wrapping_div(b) }),
                    Binary::Mod => zip(dst, a, b, floor_mod!($int, $sign)),
                    Binary::Rem => zip(dst, a, b, |a, b| if b == 0 { 0 } else { a.wrapping_rem(b) }),
                    Binary::Pow => zip(dst, a, b, power!($int, $sign)),
                    Binary::Max => zip(dst, a, b, |a, b| a.max(b)),
                    Binary::Min => zip(dst, a, b, |a, b| a.min(b)),
                    Binary::And => zip(dst, a, b, |a, b| a & b),
                    Binary::Or => zip(dst, a, b, |a, b| a | b),
                    Binary::Xor => zip(dst, a, b, |a, b| a ^ b),
                    // Amounts that no bit survives, negative ones included, give 0, or the sign to the right.
                    Binary::ShiftLeft => {
                        zip(dst, a, b, |a, b| u32::try_from(b).ok().and_then(|b| a.checked_shl(b)).unwrap_or(0))
                    }
                    Binary::ShiftRight => zip(dst, a, b, |a, b| {
                        let amount = u32::try_from(b).unwrap_or(u32::MAX).min(<$int>::BITS);
                        a.checked_shr(amount).unwrap_or_else(|| a.checked_shr(<$int>::BITS - 1).unwrap_or(0) >> 1)
                    }),
                }
            }

            #[inline]
            fn is_infinite(self) -> bool {
                false
            }
        }
    };
}
integer_lane!(u8, unsigned);
integer_lane!(u16, unsigned);
integer_lane!(u32, unsigned);
integer_lane!(u64, unsigned);
integer_lane!(i8, signed);
integer_lane!(i16, signed);
integer_lane!(i32, signed);
integer_lane!(i64, signed);

macro_rules! float_lane {
    ($float:ty, $exp:path, $tanh:path, $sigmoid:expr, $erf:path) => {
        impl Lane for $float {
            fn unary(op: Unary, dst: &mut [Self], x: &[Self]) {
                vectorised! {
                    fn unary(op: Unary, dst: &mut [$float], x: &[$float]) {
                match op {
                    Unary::Neg => map(dst, x, |x| -x),
                    Unary::Abs => map(dst, x, <$float>::abs),
                    Unary::Sign => map(dst, x, |x| if x == 0.0 || x.is_nan() { x } else { x.signum() }),
                    Unary::Floor => map(dst, x, <$float>::floor),
                    Unary::Ceil => map(dst, x, <$float>::ceil),
                    Unary::Round => map(dst, x, <$float>::round_ties_even),
                    Unary::Trunc => map(dst, x, <$float>::trunc),
                    Unary::Sqrt => map(dst, x, <$float>::sqrt),
                    Unary::Reciprocal => map(dst, x, <$float>::recip),
                    Unary::Exp => map(dst, x, $exp),
                    Unary::Log => map(dst, x, <$float>::ln),
                    Unary::Sin => map(dst, x, <$float>::sin),
                    Unary::Cos => map(dst, x, <$float>::cos),
                    Unary::Tan => map(dst, x, <$float>::tan),
                    Unary::Asin => map(dst, x, <$float>::asin),
                    Unary::Acos => map(dst, x, <$float>::acos),
                    Unary::Atan => map(dst, x, <$float>::atan),
                    Unary::Sinh => map(dst, x, <$float>::sinh),
                    Unary::Cosh => map(dst, x, <$float>::cosh),
                    Unary::Tanh => map(dst, x, $tanh),
                    Unary::Asinh => map(dst, x, <$float>::asinh),
                    Unary::Acosh => map(dst, x, <$float>::acosh),
                    Unary::Atanh => map(dst, x, <$float>::atanh),
                    Unary::Erf => map(dst, x, $erf),
                    Unary::Sigmoid => map(dst, x, $sigmoid),
                    Unary::Not | Unary::IsNan | Unary::IsInf | Unary::Bits | Unary::FromBits => {
                        dst.copy_from_slice(x);
                    }
                }
                    }
                }
                unary(op, dst, x);
            }

            fn binary(op: Binary, dst: &mut [Self], a: &[Self], b: &[Self]) {
                vectorised! {
                    fn binary(op: Binary, dst: &mut [$float], a: &[$float], b: &[$float]) {
                match op {
                    Binary::Add => zip(dst, a, b, |a, b| a + b),
                    Binary::Sub => zip(dst, a, b, |a, b| a - b),
                    Binary::Mul => zip(dst, a, b, |a, b| a * b),
                    Binary::Div => zip(dst, a, b, |a, b| a / b),
                    Binary::Mod => zip(dst, a, b, |a, b| {
                        let remainder = a % b;
                        let zero = <$float>::copysign(0.0, b);
                        let same = if (remainder < 0.0) == (b < 0.0) { remainder } else { remainder + b };
                        if remainder == 0.0 { zero } else { same }
                    }),
                    Binary::Rem => zip(dst, a, b, |a, b| a % b),
                    // Squares are what exporters spell norms with.
                    Binary::Pow => zip(dst, a, b, |a, b| if b == 2.0 { a * a } else { a.powf(b) }),
                    Binary::Max => zip(dst, a, b, Number::larger),
                    Binary::Min => zip(dst, a, b, Number::smaller),
                    Binary::And | Binary::Or | Binary::Xor | Binary::ShiftLeft | Binary::ShiftRight => {
                        dst.copy_from_slice(a);
                    }
                }
                    }
                }
                binary(op, dst, a, b);
            }

            #[inline]
            fn is_infinite(self) -> bool {
                self.is_infinite()
            }
        }
    };
}
float_lane!(f32, float_math::exp, float_math::tanh, float_math::sigmoid, float_math::erf);
float_lane!(
    f64,
    f64::exp,
    f64::tanh,
    |x: f64| {
        // The exponential of a number that is not positive cannot overflow.
        let small = (-x.abs()).exp();
        if x < 0.0 { small / (1.0 + small) } else { 1.0 / (1.0 + small) }
    },
    libm::erf
);

#[cfg(test)]
mod tests {
    use super::*;

    fn binary<T: Lane>(op: Binary, a: T, b: T) -> T {
        let mut dst = [T::ZERO];
        T::binary(op, &mut dst, &[a], &[b]);
        dst[0]
    }

    fn unary<T: Lane>(op: Unary, x: T) -> T {
        let mut dst = [T::ZERO];
        T::unary(op, &mut dst, &[x]);
        dst[0]
    }

    #[test]
    fn integer_division_never_traps() {
        assert_eq!(binary(Binary::Div, -7i32, 2), -3);
        assert_eq!(binary(Binary::Div, 7i32, 0), 0);
        assert_eq!(binary(Binary::Div, i64::MIN, -1), i64::MIN);
        assert_eq!(binary(Binary::Mod, i8::MIN, -1), 0);
        assert_eq!(binary(Binary::Rem, i8::MIN, -1), 0);
        assert_eq!(binary(Binary::Mod, -7i32, 3), 2);
        assert_eq!(binary(Binary::Mod, 7i32, -3), -2);
        assert_eq!(binary(Binary::Mod, i8::MIN, 127), 126);
        assert_eq!(binary(Binary::Rem, -7i32, 3), -1);
        assert_eq!(binary(Binary::Mod, 7u8, 0), 0);
        assert_eq!(binary(Binary::Mod, -7.5f32, 2.0), 0.5);
        assert_eq!(binary(Binary::Rem, -7.5f32, 2.0), -1.5);
        assert_eq!(binary(Binary::Mod, 7.5f32, f32::NEG_INFINITY), f32::NEG_INFINITY);
        assert_eq!(binary(Binary::Mod, 7.5f64, f64::INFINITY), 7.5);
        for (a, b) in [(0.0f64, -2.0), (-6.0, 2.0), (6.0, -2.0), (-0.0, f64::INFINITY)] {
            let zero = binary(Binary::Mod, a, b);
            assert!(zero == 0.0 && zero.is_sign_negative() == b.is_sign_negative(), "{a} mod {b} is {zero}");
        }
        for (a, b) in [(f32::INFINITY, 2.0), (2.0, 0.0), (0.0, -0.0), (f32::NAN, 1.0), (1.0, f32::NAN)] {
            assert!(binary(Binary::Mod, a, b).is_nan(), "{a} mod {b}");
        }
    }

    #[test]
    fn integer_powers() {
        assert_eq!(binary(Binary::Pow, 3i32, 4), 81);
        assert_eq!(binary(Binary::Pow, 2i8, 7), -128);
        assert_eq!(binary(Binary::Pow, 2i32, -1), 0);
        assert_eq!(binary(Binary::Pow, -1i64, -3), -1);
        assert_eq!(binary(Binary::Pow, 1i64, i64::MIN), 1);
        assert_eq!(binary(Binary::Pow, 0u8, 0), 1);
    }

    #[test]
    fn shifts_beyond_the_width() {
        assert_eq!(binary(Binary::ShiftLeft, 1u8, 8), 0);
        assert_eq!(binary(Binary::ShiftLeft, 1i32, -1), 0);
        assert_eq!(binary(Binary::ShiftRight, 0x80u8, 7), 1);
        assert_eq!(binary(Binary::ShiftRight, 0x80u8, 8), 0);
        assert_eq!(binary(Binary::ShiftRight, u64::MAX, u64::MAX), 0);
        assert_eq!(binary(Binary::ShiftRight, -8i32, 1), -4);
        assert_eq!(binary(Binary::ShiftRight, -8i32, 77), -1);
        assert_eq!(binary(Binary::ShiftRight, 8i64, 64), 0);
    }

    #[test]
    fn extremes_propagate_nan() {
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
            assert!(binary(Binary::Max, a, b).is_nan());
            assert!(binary(Binary::Min, a, b).is_nan());
        }
        assert_eq!(binary(Binary::Max, f64::NEG_INFINITY, -1.0), -1.0);
    }

    #[test]
    fn rounding_and_signs() {
        assert_eq!([0.5, 1.5, 2.5, -0.5f32].map(|x| unary(Unary::Round, x)), [0.0, 2.0, 2.0, 0.0]);
        assert_eq!([-3.0, 0.0, 2.0f32].map(|x| unary(Unary::Sign, x)), [-1.0, 0.0, 1.0]);
        assert!(unary(Unary::Sign, f32::NAN).is_nan());
        assert_eq!(unary(Unary::Sign, 9u8), 1);
        assert_eq!(unary(Unary::Abs, i8::MIN), i8::MIN);
        assert_eq!(unary(Unary::Neg, 1u8), 255);
    }

    #[test]
    fn sigmoid_does_not_overflow() {
        assert_eq!(unary(Unary::Sigmoid, 1000.0f32), 1.0);
        assert_eq!(unary(Unary::Sigmoid, -1000.0f32), 0.0);
        assert_eq!(unary(Unary::Sigmoid, 0.0f32), 0.5);
        assert!(unary(Unary::Sigmoid, -80.0f32) > 0.0);
        assert!(unary(Unary::Sigmoid, f32::NAN).is_nan());
        assert!((unary(Unary::Erf, 0.5f64) - 0.520_499_877_813_046_5).abs() < 1e-15);
    }
}
