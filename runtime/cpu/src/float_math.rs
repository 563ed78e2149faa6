//! Exponential functions of `f32` without branches, so that loops over them become vector instructions.
//!
//! Errors are below two units in the last place for the exponential and the tangent, of the others below six; see the tests.

/// `2^n` for an integer `n` in `-126..=127`, given as a float.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves the integer in the low bits.
    let bits = (n + 12_582_912.0).to_bits();
    f32::from_bits(bits.wrapping_add(127) << 23)
}

/// `e^x`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these bounds the result is infinite or zero; comparisons keep NaN as it is.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let n = clamped * std::f32::consts::LOG2_E + 12_582_912.0 - 12_582_912.0;
    // ln 2 in two parts, of which the first has few enough digits for an exact product.
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    // Taylor's series to the seventh order: its rest is below 2⁻²⁷ for |r| ≤ ln 2 / 2.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + coefficient;
    }
    // In two steps, since results may be subnormal or just below infinity.
    let half = n * 0.5 + 12_582_912.0 - 12_582_912.0;
    sum * power_of_two(half) * power_of_two(n - half)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    // The exponential of a number that is not positive cannot overflow.
    let small = exp(-x.abs());
    let numerator = if x < 0.0 { small } else { 1.0 };
    numerator / (1.0 + small)
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    // Taylor's series where the formula below would cancel; its rest is below 2⁻²⁶ of the result for |x| < 0.4.
    let square = x * x;
    let mut series = 21_844.0 / 6_081_075.0;
    for coefficient in [-1_382.0 / 155_925.0, 62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        series = series * square + coefficient;
    }
    let near = x * (1.0 + square * series);
    let far = 1.0 - 2.0 / (1.0 + exp(2.0 * magnitude));
    let far = if x < 0.0 { -far } else { far };
    if magnitude < 0.4 { near } else { far }
}

/// The error function: a quotient of polynomials, the fit that Eigen and XLA use.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    // From here on the result rounds to one; comparisons keep NaN as it is.
    let clamped = if x > 3.832_507 { 3.832_507 } else { x };
    let clamped = if clamped < -3.832_507 { -3.832_507 } else { clamped };
    let square = clamped * clamped;
    let mut numerator = 0.000_229_050_66;
    for coefficient in [0.003_408_291, 0.050_955_694, 0.185_208_33, std::f32::consts::FRAC_2_SQRT_PI] {
        numerator = numerator * square + coefficient;
    }
    let mut denominator = -1.179_160_3e-7;
    for coefficient in [0.000_023_547_966, 0.001_017_962_5, 0.014_070_47, 0.110_985_05, 0.497_469_26, 1.0] {
        denominator = denominator * square + coefficient;
    }
    let quotient = clamped * numerator / denominator;
    let quotient = if quotient > 1.0 { 1.0 } else { quotient };
    if quotient < -1.0 { -1.0 } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error over floats of all sizes within ±`limit`, in units of the last place of the result.
    fn worst(limit: f32, function: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let mut worst = 0f64;
        for bits in (0..limit.to_bits()).step_by(1 << 10) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let expected = exact(f64::from(x));
                let rounded = (expected as f32).abs();
                let unit = f64::from(rounded.next_up()) - f64::from(rounded);
                worst = worst.max((f64::from(function(x)) - expected).abs() / unit);
            }
        }
        worst
    }

    #[test]
    fn errors_are_a_few_units_in_the_last_place() {
        for (name, bound, error) in [
            ("exp", 2.0, worst(88.0, exp, f64::exp)),
            ("sigmoid", 3.0, worst(80.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp()))),
            ("tanh", 2.0, worst(20.0, tanh, f64::tanh)),
            ("erf", 6.0, worst(5.0, erf, libm::erf)),
        ] {
            assert!(error < bound, "{name}: {error} units in the last place");
        }
    }

    #[test]
    fn extremes() {
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!((exp(-100.0) / 3.78e-44 - 1.0).abs() < 0.03, "{}", exp(-100.0));
        assert_eq!([sigmoid(f32::NEG_INFINITY), sigmoid(0.0), sigmoid(f32::INFINITY)], [0.0, 0.5, 1.0]);
        assert_eq!([tanh(f32::NEG_INFINITY), tanh(0.0), tanh(f32::INFINITY)], [-1.0, 0.0, 1.0]);
        assert!([tanh, erf].iter().all(|function| function(-0.0).to_bits() == (-0.0f32).to_bits()));
        assert_eq!([erf(f32::NEG_INFINITY), erf(0.0), erf(f32::INFINITY)], [-1.0, 0.0, 1.0]);
        assert!([exp, sigmoid, tanh, erf].iter().all(|function| function(f32::NAN).is_nan()));
    }
}
