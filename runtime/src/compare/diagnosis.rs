//! What errors look like: rounding, or a fault; and what tolerance of elements would let them pass.

/// Upper ends of the histogram's bins but for the last, in units of what rounding is expected to do to a number of
/// average size.
pub const HISTOGRAM_EDGES: [f64; 5] = [0.01, 0.1, 1.0, 10.0, 100.0];

/// The share of elements, those with the largest errors, that tells whether errors are spread.
const FEW: f64 = 0.01;
/// Errors are spread where the few hold less than this of all squares.
const SPREAD: f64 = 0.5;
/// Errors of fewer times what is expected may be rounding that a model amplifies.
const AMPLIFIED: f64 = 64.0;

/// What errors look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Look {
    /// There are none.
    #[default]
    Same,
    /// Small, and spread over all elements.
    Rounding,
    /// A few elements hold most of the error.
    Concentrated,
    /// Large, and spread.
    Everywhere,
    /// Finite in one only.
    NotFinite,
}

/// How errors are distributed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Diagnosis {
    pub look: Look,
    pub(super) norm_error: f64,
    pub(super) cosine: f64,
    /// The share of the sum of squared errors that the hundredth of the elements with the largest errors has.
    pub concentration: f64,
    /// Elements by the size of their errors: between [`HISTOGRAM_EDGES`], in units of [`Self::unit`].
    pub histogram: [u64; HISTOGRAM_EDGES.len() + 1],
    /// What rounding is expected to do to a number of average size.
    pub unit: f64,
    /// `--rtol` and `--atol` that this comparison would pass; none where nothing would.
    pub would_pass: Option<(f64, f64)>,
}

impl Diagnosis {
    /// `unit`: the relative error that is expected.
    pub(super) fn of(actual: &[f64], expected: &[f64], errors: &[f64], unit: f64) -> Self {
        let both = || actual.iter().zip(expected).filter(|(a, b)| a.is_finite() && b.is_finite());
        let sum = |term: &dyn Fn(f64, f64) -> f64| both().map(|(&a, &b)| term(a, b)).sum::<f64>();
        let (of_actual, of_expected) = (sum(&|a, _| a * a), sum(&|_, b| b * b));
        let of_errors = sum(&|a, b| (a - b) * (a - b));
        let ratio = |of: f64, to: f64| if of == 0.0 { 0.0 } else { of / to.max(f64::MIN_POSITIVE) };
        let norm_error = ratio(of_errors.sqrt(), of_expected.sqrt());
        let cosine = if of_errors == 0.0 { 1.0 } else { ratio(sum(&|a, b| a * b), (of_actual * of_expected).sqrt()) };
        let unit = unit * (of_expected / (both().count().max(1) as f64)).sqrt();
        let mut histogram = [0; HISTOGRAM_EDGES.len() + 1];
        for error in errors {
            let within = |edge: &f64| *error <= edge * unit;
            histogram[HISTOGRAM_EDGES.iter().position(within).unwrap_or(HISTOGRAM_EDGES.len())] += 1;
        }
        let concentration = concentration(errors);
        let look = if errors.iter().any(|error| error.is_infinite()) {
            Look::NotFinite
        } else if of_errors == 0.0 {
            Look::Same
        } else if concentration > SPREAD && errors.len() > 1 {
            Look::Concentrated
        } else if of_errors.sqrt() <= AMPLIFIED * unit * (errors.len() as f64).sqrt() {
            Look::Rounding
        } else {
            Look::Everywhere
        };
        let would_pass = (look != Look::NotFinite).then(|| would_pass(expected, errors, norm_error));
        Self { look, norm_error, cosine, concentration, histogram, unit, would_pass }
    }
}

/// The share of squared errors that the [`FEW`] elements with the largest errors have.
fn concentration(errors: &[f64]) -> f64 {
    let mut squares: Vec<f64> = errors.iter().filter(|error| error.is_finite()).map(|error| error * error).collect();
    let total: f64 = squares.iter().sum();
    let few = ((squares.len() as f64 * FEW).ceil() as usize).min(squares.len());
    if few == 0 || total == 0.0 {
        return 0.0;
    }
    let (_, _, _) = squares.select_nth_unstable_by(few - 1, |a, b| b.total_cmp(a));
    squares[..few].iter().sum::<f64>() / total
}

/// A relative tolerance of about the error in the norm, and the absolute one that the rest needs.
fn would_pass(expected: &[f64], errors: &[f64], norm_error: f64) -> (f64, f64) {
    let relative = two_digits_up(norm_error);
    let left = |(error, expected): (&f64, &f64)| {
        let allowed = if expected.is_finite() { relative * expected.abs() } else { 0.0 };
        error - allowed
    };
    let absolute = errors.iter().zip(expected).map(left).fold(0.0, f64::max);
    (relative, two_digits_up(absolute))
}

/// The next number of two digits that is larger, or as large; what it prints as, it reads back as.
fn two_digits_up(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return value.max(0.0);
    }
    let exponent = value.log10().floor() as i32 - 1;
    let digits = (value / 10f64.powi(exponent)).ceil();
    let printed = |digits: f64| format!("{digits}e{exponent}").parse().unwrap_or(value);
    // Division rounds, too.
    let up = printed(digits);
    if up >= value { up } else { printed(digits + 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(actual: &[f64], expected: &[f64]) -> Diagnosis {
        let errors: Vec<f64> = actual.iter().zip(expected).map(|(&a, &b)| super::super::error(a, b)).collect();
        Diagnosis::of(actual, expected, &errors, 0.01)
    }

    fn values(seed: f64) -> Vec<f64> {
        (0..1000).map(|i| (f64::from(i) * 12.9898 + seed).sin()).collect()
    }

    #[test]
    fn rounding_is_told_from_faults() {
        let (expected, noise) = (values(0.0), values(3.0));
        let with = |change: &dyn Fn(usize) -> f64| {
            let actual: Vec<f64> = expected.iter().enumerate().map(|(i, &value)| value + change(i)).collect();
            of(&actual, &expected)
        };
        let rounded = with(&|i| 0.05 * noise[i]);
        assert_eq!(rounded.look, Look::Rounding);
        assert!(rounded.cosine > 0.99 && (rounded.norm_error - 0.05).abs() < 0.01, "{rounded:?}");
        assert_eq!(rounded.histogram.iter().sum::<u64>(), 1000);
        assert!(rounded.histogram[3] > 500, "{rounded:?}");
        assert_eq!(with(&|i| if i % 100 == 0 { 1.0 } else { 0.0 }).look, Look::Concentrated);
        assert_eq!(with(&|i| -2.0 * expected[i]).look, Look::Everywhere);
        assert_eq!(with(&|i| if i == 4 { f64::NAN } else { 0.0 }).look, Look::NotFinite);
        assert_eq!(with(&|_| 0.0), Diagnosis { unit: rounded.unit, ..of(&expected, &expected) });
    }

    #[test]
    fn what_would_pass_does() {
        let (expected, noise) = (values(0.0), values(3.0));
        for size in [1e-6, 0.0371, 4.0] {
            let actual: Vec<f64> = expected.iter().zip(&noise).map(|(value, noise)| value + size * noise).collect();
            let (relative, absolute) = of(&actual, &expected).would_pass.unwrap();
            let text = format!("{relative:e} {absolute:e}");
            let read: Vec<f64> = text.split(' ').map(|number| number.parse().unwrap()).collect();
            let passes = |(a, b): (&f64, &f64)| (a - b).abs() <= read[1] + read[0] * b.abs();
            assert!(actual.iter().zip(&expected).all(passes), "{text}");
            assert!(relative < 1.2 * size && absolute < 1.2 * size, "{text}");
        }
        assert_eq!(of(&[f64::NAN], &[1.0]).would_pass, None);
    }
}
