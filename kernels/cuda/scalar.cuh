// Element types, and what every instruction of an expression means on one element.
//
// Put first in every generated source; needs no include. An element type is what a tensor holds in memory; values are
// computed in `Computed<T>`: `f32` for the half types, the type itself otherwise (booleans are `u8`, 0 or 1).
//
//   widen(x)        element → value                       scalar::…     instructions on values
//   narrow<T>(v)    value → element, rounded to nearest   convert<T>(v) conversion between values
//   round_to<T>(v)  value → value that `T` can hold: what a half type keeps after each instruction

#define DEVICE __device__ __forceinline__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;

/// IEEE 754 binary16, as bits.
struct f16 {
    u16 bits;
};

/// The upper half of binary32, as bits.
struct bf16 {
    u16 bits;
};

DEVICE f32 to_f32(f16 x) {
    f32 value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}
DEVICE f32 to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
DEVICE f32 to_f32(f32 x) { return x; }
DEVICE f32 to_f32(f64 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(u8 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(u16 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(u32 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(u64 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(i8 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(i16 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(i32 x) { return static_cast<f32>(x); }
DEVICE f32 to_f32(i64 x) { return static_cast<f32>(x); }

// ---- What is known of a type -------------------------------------------------------------------------------------

template <typename T>
struct Traits {
    typedef T Value;
    typedef u32 Wrapping;
    static constexpr bool is_float = false;
    static constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(1);
    static constexpr int bits = 8 * sizeof(T);
    static DEVICE T lowest() { return is_signed ? static_cast<T>(1ull << (bits - 1)) : static_cast<T>(0); }
    static DEVICE T highest() { return static_cast<T>(is_signed ? (1ull << (bits - 1)) - 1 : ~0ull); }
};
template <> struct Traits<u64> {
    typedef u64 Value;
    typedef u64 Wrapping;
    static constexpr bool is_float = false;
    static constexpr bool is_signed = false;
    static constexpr int bits = 64;
    static DEVICE u64 lowest() { return 0; }
    static DEVICE u64 highest() { return ~0ull; }
};
template <> struct Traits<i64> {
    typedef i64 Value;
    typedef u64 Wrapping;
    static constexpr bool is_float = false;
    static constexpr bool is_signed = true;
    static constexpr int bits = 64;
    static DEVICE i64 lowest() { return static_cast<i64>(1ull << 63); }
    static DEVICE i64 highest() { return static_cast<i64>(~0ull >> 1); }
};
template <> struct Traits<f32> {
    typedef f32 Value;
    static constexpr bool is_float = true;
    static constexpr bool is_signed = true;
    static DEVICE f32 lowest() { return __uint_as_float(0xff800000u); }
    static DEVICE f32 highest() { return __uint_as_float(0x7f800000u); }
};
template <> struct Traits<f64> {
    typedef f64 Value;
    static constexpr bool is_float = true;
    static constexpr bool is_signed = true;
    static DEVICE f64 lowest() { return __longlong_as_double(static_cast<i64>(0xfff0000000000000ull)); }
    static DEVICE f64 highest() { return __longlong_as_double(0x7ff0000000000000ll); }
};
template <> struct Traits<f16> : Traits<f32> {};
template <> struct Traits<bf16> : Traits<f32> {};

/// The type that elements of type `T` are computed in.
template <typename T> using Computed = typename Traits<T>::Value;

// ---- Conversions -------------------------------------------------------------------------------------------------

/// Value `x` as a value of `To`: floats to integers truncate and saturate, NaN gives 0; integers wrap.
template <typename To, typename From>
DEVICE Computed<To> convert(From x) {
    typedef Computed<To> Value;
    if constexpr (Traits<From>::is_float && !Traits<Value>::is_float) {
        // Powers of two, exact in either float type; the comparisons are false for NaN.
        constexpr int bits = Traits<Value>::bits - (Traits<Value>::is_signed ? 1 : 0);
        constexpr From bound = static_cast<From>(1ull << (bits - 1)) * static_cast<From>(2);
        if (x >= bound) return Traits<Value>::highest();
        if constexpr (Traits<Value>::is_signed) {
            return x >= -bound ? static_cast<Value>(x) : x < -bound ? Traits<Value>::lowest() : static_cast<Value>(0);
        } else {
            return x > static_cast<From>(-1) ? static_cast<Value>(x) : static_cast<Value>(0);
        }
    } else {
        return static_cast<Value>(x);
    }
}

/// As a boolean.
template <typename From>
DEVICE u8 to_bool(From x) { return static_cast<u8>(x != static_cast<From>(0)); }

template <typename T>
DEVICE Computed<T> widen(T x) { return x; }
template <> DEVICE f32 widen<f16>(f16 x) { return to_f32(x); }
template <> DEVICE f32 widen<bf16>(bf16 x) { return to_f32(x); }

template <typename T>
DEVICE T narrow(Computed<T> x) { return x; }
template <> DEVICE f16 narrow<f16>(f32 x) {
    f16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}
template <> DEVICE bf16 narrow<bf16>(f32 x) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}

/// The element nearest to `x`; integers truncate and saturate.
template <typename T>
DEVICE T from_f32(f32 x) { return narrow<T>(convert<T>(x)); }

/// `x` rounded to what `T` holds.
template <typename T>
DEVICE Computed<T> round_to(Computed<T> x) { return widen<T>(narrow<T>(x)); }

/// Several neighbouring elements, moved by one instruction of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// ---- Instructions ------------------------------------------------------------------------------------------------

namespace scalar {

// Integers wrap: signed arithmetic is done in an unsigned type of at least its width.
#define WRAPPING(NAME, OPERATOR)                                                                                       \
    template <typename T>                                                                                              \
    DEVICE T NAME(T a, T b) {                                                                                          \
        typedef typename Traits<T>::Wrapping Wide;                                                                     \
        return static_cast<T>(static_cast<Wide>(a) OPERATOR static_cast<Wide>(b));                                     \
    }                                                                                                                  \
    DEVICE f32 NAME(f32 a, f32 b) { return a OPERATOR b; }                                                             \
    DEVICE f64 NAME(f64 a, f64 b) { return a OPERATOR b; }
WRAPPING(add, +)
WRAPPING(sub, -)
WRAPPING(mul, *)
#undef WRAPPING

/// A product that is rounded before anything is added to it; `mul` may become one instruction with what follows.
template <typename T> DEVICE T rounded_mul(T a, T b) { return mul(a, b); }
DEVICE f32 rounded_mul(f32 a, f32 b) { return __fmul_rn(a, b); }
DEVICE f64 rounded_mul(f64 a, f64 b) { return __dmul_rn(a, b); }

template <typename T> DEVICE T neg(T x) { return sub(static_cast<T>(0), x); }
DEVICE f32 neg(f32 x) { return -x; }
DEVICE f64 neg(f64 x) { return -x; }

template <typename T> DEVICE bool is_negative(T x) {
    if constexpr (Traits<T>::is_signed) return x < static_cast<T>(0);
    return false;
}

template <typename T> DEVICE T magnitude(T x) { return is_negative(x) ? neg(x) : x; }
DEVICE f32 magnitude(f32 x) { return fabsf(x); }
DEVICE f64 magnitude(f64 x) { return fabs(x); }

/// -1, 0 or 1; zeros and NaN as they are.
template <typename T> DEVICE T sign(T x) { return is_negative(x) ? static_cast<T>(-1) : static_cast<T>(x != 0); }
DEVICE f32 sign(f32 x) { return x == 0.0f || x != x ? x : copysignf(1.0f, x); }
DEVICE f64 sign(f64 x) { return x == 0.0 || x != x ? x : copysign(1.0, x); }

template <typename T> DEVICE T bit_not(T x) { return static_cast<T>(~x); }
DEVICE u8 logical_not(u8 x) { return x == 0; }

template <typename T> DEVICE u8 is_nan(T x) { return x != x; }
DEVICE u8 is_inf(f32 x) { return fabsf(x) == Traits<f32>::highest(); }
DEVICE u8 is_inf(f64 x) { return fabs(x) == Traits<f64>::highest(); }

DEVICE i32 bits(f32 x) { return __float_as_int(x); }
DEVICE i64 bits(f64 x) { return __double_as_longlong(x); }
DEVICE f32 from_bits(i32 x) { return __int_as_float(x); }
DEVICE f64 from_bits(i64 x) { return __longlong_as_double(x); }

#define FUNCTION(NAME, SINGLE, DOUBLE)                                                                                 \
    DEVICE f32 NAME(f32 x) { return SINGLE(x); }                                                                       \
    DEVICE f64 NAME(f64 x) { return DOUBLE(x); }
FUNCTION(floor, floorf, ::floor)
FUNCTION(ceil, ceilf, ::ceil)
FUNCTION(round, rintf, ::rint)
FUNCTION(trunc, truncf, ::trunc)
FUNCTION(sqrt, sqrtf, ::sqrt)
FUNCTION(exp, expf, ::exp)
FUNCTION(log, logf, ::log)
FUNCTION(sin, sinf, ::sin)
FUNCTION(cos, cosf, ::cos)
FUNCTION(tan, tanf, ::tan)
FUNCTION(asin, asinf, ::asin)
FUNCTION(acos, acosf, ::acos)
FUNCTION(atan, atanf, ::atan)
FUNCTION(sinh, sinhf, ::sinh)
FUNCTION(cosh, coshf, ::cosh)
FUNCTION(tanh, tanhf, ::tanh)
FUNCTION(asinh, asinhf, ::asinh)
FUNCTION(acosh, acoshf, ::acosh)
FUNCTION(atanh, atanhf, ::atanh)
FUNCTION(erf, erff, ::erf)
#undef FUNCTION

DEVICE f32 reciprocal(f32 x) { return 1.0f / x; }
DEVICE f64 reciprocal(f64 x) { return 1.0 / x; }

/// `1 / (1 + e^-x)`: the exponential of a number that is not positive cannot overflow.
template <typename T> DEVICE T sigmoid(T x) {
    const T small = exp(-magnitude(x));
    return (x < static_cast<T>(0) ? small : static_cast<T>(1)) / (static_cast<T>(1) + small);
}

/// Truncated; 0 for a zero divisor.
template <typename T> DEVICE T div(T a, T b) {
    if (b == 0) return 0;
    // The lowest value has no negative: dividing it by -1 wraps.
    if constexpr (Traits<T>::is_signed) if (b == static_cast<T>(-1)) return neg(a);
    return static_cast<T>(a / b);
}
DEVICE f32 div(f32 a, f32 b) { return a / b; }
DEVICE f64 div(f64 a, f64 b) { return a / b; }

/// Remainder with the sign of the dividend; 0 for a zero divisor.
template <typename T> DEVICE T rem(T a, T b) {
    if (b == 0) return 0;
    if constexpr (Traits<T>::is_signed) if (b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
}
DEVICE f32 rem(f32 a, f32 b) { return fmodf(a, b); }
DEVICE f64 rem(f64 a, f64 b) { return fmod(a, b); }

/// Remainder with the sign of the divisor.
template <typename T> DEVICE T mod(T a, T b) {
    const T remainder = rem(a, b);
    const bool other_sign = remainder != static_cast<T>(0) && is_negative(remainder) != is_negative(b);
    return other_sign ? add(remainder, b) : remainder;
}
/// A zero has the sign of the divisor too.
DEVICE f32 mod(f32 a, f32 b) {
    const f32 remainder = fmodf(a, b);
    if (remainder == 0) return copysignf(0.0f, b);
    return (remainder < 0) == (b < 0) ? remainder : remainder + b;
}
DEVICE f64 mod(f64 a, f64 b) {
    const f64 remainder = fmod(a, b);
    if (remainder == 0) return copysign(0.0, b);
    return (remainder < 0) == (b < 0) ? remainder : remainder + b;
}

/// By squaring, wrapping; negative powers truncate: 0 but for bases 1 and -1.
template <typename T> DEVICE T pow(T base, T exponent) {
    if constexpr (Traits<T>::is_signed) {
        if (base == 1) return 1;
        if (base == static_cast<T>(-1)) return exponent & 1 ? static_cast<T>(-1) : static_cast<T>(1);
        if (exponent < 0) return 0;
    }
    T result = 1;
    for (; exponent != 0; exponent = static_cast<T>(exponent >> 1)) {
        if (exponent & 1) result = mul(result, base);
        base = mul(base, base);
    }
    return result;
}
DEVICE f32 pow(f32 a, f32 b) { return b == 2.0f ? rounded_mul(a, a) : powf(a, b); }
DEVICE f64 pow(f64 a, f64 b) { return b == 2.0 ? rounded_mul(a, a) : ::pow(a, b); }

/// NaN if either is NaN.
template <typename T> DEVICE T larger(T a, T b) { return a > b || a != a ? a : b; }
template <typename T> DEVICE T smaller(T a, T b) { return a < b || a != a ? a : b; }

template <typename T> DEVICE T bit_and(T a, T b) { return static_cast<T>(a & b); }
template <typename T> DEVICE T bit_or(T a, T b) { return static_cast<T>(a | b); }
template <typename T> DEVICE T bit_xor(T a, T b) { return static_cast<T>(a ^ b); }

/// Amounts that no bit survives, negative ones included, give 0.
template <typename T> DEVICE T shift_left(T a, T amount) {
    typedef typename Traits<T>::Wrapping Wide;
    const u64 by = static_cast<u64>(amount);
    return by < Traits<T>::bits ? static_cast<T>(static_cast<Wide>(a) << by) : static_cast<T>(0);
}
/// Amounts that no bit survives, negative ones included, leave the sign.
template <typename T> DEVICE T shift_right(T a, T amount) {
    const u64 by = static_cast<u64>(amount);
    if (by < Traits<T>::bits) return static_cast<T>(a >> by);
    return is_negative(a) ? static_cast<T>(-1) : static_cast<T>(0);
}

template <typename T> DEVICE u8 eq(T a, T b) { return a == b; }
template <typename T> DEVICE u8 ne(T a, T b) { return a != b; }
template <typename T> DEVICE u8 lt(T a, T b) { return a < b; }
template <typename T> DEVICE u8 le(T a, T b) { return a <= b; }
template <typename T> DEVICE u8 gt(T a, T b) { return a > b; }
template <typename T> DEVICE u8 ge(T a, T b) { return a >= b; }

/// `sum / count`; truncated for integers, where no elements give 0.
template <typename T> DEVICE T mean(T sum, i64 count) {
    if constexpr (Traits<T>::is_float) {
        return sum / static_cast<T>(count);
    } else if constexpr (Traits<T>::is_signed) {
        return count == 0 ? static_cast<T>(0) : static_cast<T>(static_cast<i64>(sum) / count);
    } else {
        return count == 0 ? static_cast<T>(0) : static_cast<T>(static_cast<u64>(sum) / static_cast<u64>(count));
    }
}

}  // namespace scalar
