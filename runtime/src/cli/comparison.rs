//! What an output may be off its reference, how far it is, and what that looks like; for people and for programs.

use std::fmt::Write;

use planfile::text::count;
use planfile::{DType, Tensor};
use serde::Serialize;

use crate::compare::{Comparison, Diagnosis, Elements, HISTOGRAM_EDGES, Look, Tolerance, compare};
use crate::rounding::Rounding;

/// With one of `--rtol` and `--atol`, the other is this.
const RTOL: f64 = 1e-3;
const ATOL: f64 = 1e-5;

/// Limits of a comparison.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct ToleranceFlags {
    /// Judges each element by itself: it may differ by this share of the expected value, plus --atol [default: what
    /// rounding in the plan's types explains; 1e-3 with --atol]
    #[arg(long, value_name = "X", value_parser = not_negative, allow_negative_numbers = true)]
    pub rtol: Option<f64>,
    /// Judges each element by itself: it may differ by this much, plus --rtol's share [default: what rounding in the
    /// plan's types explains; 1e-5 with --rtol]
    #[arg(long, value_name = "X", value_parser = not_negative, allow_negative_numbers = true)]
    pub atol: Option<f64>,
}

impl ToleranceFlags {
    /// For a plan that rounds so.
    pub(super) fn of(self, rounding: Rounding) -> Tolerance {
        let elements = match self {
            Self { rtol: None, atol: None } => None,
            Self { rtol, atol } => Some(Elements { relative: rtol.unwrap_or(RTOL), absolute: atol.unwrap_or(ATOL) }),
        };
        Tolerance { rounding, elements }
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value >= 0.0 && value.is_finite() { Ok(value) } else { Err("must be a number from 0 up".to_owned()) }
}

/// What a comparison allows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ToleranceReport {
    /// `rounding`: by norms, as rounding explains; `elements`: each by itself, as told.
    pub kind: &'static str,
    pub rtol: Option<f64>,
    pub atol: Option<f64>,
    /// The floating-point type with the fewest digits that a primitive results in.
    pub coarsest_type: Option<&'static str>,
    /// Primitives that round.
    pub primitives: u64,
    /// Terms of the longest sum.
    pub longest_sum: u64,
    /// How far off rounding is expected to bring results, as a share of their norm.
    pub expected_error: f64,
    /// What all of an output may be off, as a share of its norm.
    pub whole: f64,
    /// What a row, the elements at one index of a dimension, or an element may be off.
    pub part: f64,
    /// Whether rows may be another result, for a choice among rounded values fell otherwise.
    pub choices: bool,
}

impl From<Tolerance> for ToleranceReport {
    fn from(tolerance: Tolerance) -> Self {
        let Tolerance { rounding, elements } = tolerance;
        Self {
            kind: if elements.is_some() { "elements" } else { "rounding" },
            rtol: elements.map(|elements| elements.relative),
            atol: elements.map(|elements| elements.absolute),
            coarsest_type: rounding.coarsest.map(DType::name),
            primitives: rounding.primitives,
            longest_sum: rounding.longest_sum,
            expected_error: rounding.expected,
            whole: rounding.whole(),
            part: rounding.part(),
            choices: rounding.chooses,
        }
    }
}

impl ToleranceReport {
    /// One line.
    pub fn text(&self) -> String {
        if let (Some(rtol), Some(atol)) = (self.rtol, self.atol) {
            return format!("tolerance: each element within {rtol:e} of its size plus {atol:e}\n");
        }
        let Some(coarsest) = self.coarsest_type else {
            return "tolerance: none, for nothing in the plan rounds\n".to_owned();
        };
        let choices = if self.choices {
            "; up to an eighth of the rows may be another choice's, for choices among rounded values fall otherwise"
        } else {
            ""
        };
        format!(
            "tolerance: what rounding explains, {:.1e} of the norm of the whole and {:.1e} of a part's: {} to {coarsest} at \
             the coarsest, sums of up to {}, so {:.1e} is expected{choices}\n",
            self.whole,
            self.part,
            count(self.primitives, "rounding"),
            count(self.longest_sum, "term"),
            self.expected_error,
        )
    }
}

/// Distance of an output from its reference. Numbers that are not finite are null in JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComparisonReport {
    pub passed: bool,
    pub max_error: f64,
    /// Over the largest reference value.
    pub max_relative_error: f64,
    /// Of the Euclidean norms.
    pub norm_error: f64,
    /// Of the angle between output and reference.
    pub cosine: f64,
    pub beyond: u64,
    /// Rows that are another choice's result.
    pub elsewhere: u64,
    /// Why nothing was compared, or the worst element.
    pub remark: String,
    /// The part that is farthest beyond what it may be off.
    pub worst_part: Option<PartReport>,
    /// `same`, `rounding`, `concentrated`, `everywhere` or `not finite`; `not compared` where the types differ.
    pub looks_like: &'static str,
    /// The share of squared errors that the hundredth of the elements with the largest errors has.
    pub concentration: f64,
    /// Elements whose error is at most [`HistogramBin::up_to`] units.
    pub histogram: Vec<HistogramBin>,
    /// What rounding is expected to do to an element of average size.
    pub histogram_unit: f64,
    /// What would pass.
    pub would_pass: Option<WouldPass>,
}

/// A part of an output, and how far it is off.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PartReport {
    /// Such as `row 7`.
    pub part: String,
    pub error: f64,
    pub allowed: f64,
}

/// Elements whose errors are of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HistogramBin {
    /// In units; null in the last bin.
    pub up_to: Option<f64>,
    pub elements: u64,
}

/// Flags that a comparison would pass with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WouldPass {
    pub rtol: f64,
    pub atol: f64,
}

impl ComparisonReport {
    /// Compares an output.
    pub(super) fn of(actual: &Tensor, expected: &Tensor, tolerance: Tolerance) -> Self {
        match compare(actual, expected, tolerance) {
            Ok(comparison) => comparison.into(),
            Err(remark) => Self {
                passed: false,
                max_error: f64::INFINITY,
                max_relative_error: f64::INFINITY,
                norm_error: f64::INFINITY,
                cosine: f64::NAN,
                beyond: actual.ty.elements().unwrap_or(0),
                elsewhere: 0,
                remark,
                worst_part: None,
                looks_like: "not compared",
                concentration: 0.0,
                histogram: Vec::new(),
                histogram_unit: 0.0,
                would_pass: None,
            },
        }
    }

    /// What failed, what it looks like and what would pass; nothing where it passed.
    pub fn failure_text(&self, name: &str) -> String {
        if self.passed {
            return String::new();
        }
        let mut text = match &self.worst_part {
            Some(PartReport { part, error, allowed }) => {
                format!("{name}: {part} is off by {error:.1e} of its norm, {allowed:.1e} is allowed\n")
            }
            None if self.looks_like == "not compared" => return format!("{name}: {}\n", self.remark),
            None => format!("{name}: {} beyond the tolerance\n", count(self.beyond, "element")),
        };
        let concentration = 100.0 * self.concentration;
        let look = match self.looks_like {
            "rounding" => {
                format!(
                    "like rounding that the model amplifies: small, and spread ({concentration:.0} % of the squared \
                         error is in 1 % of the elements)"
                )
            }
            "concentrated" => {
                format!("like a fault in a part: {concentration:.0} % of the squared error is in 1 % of the elements")
            }
            "everywhere" => "like a fault: large, and everywhere".to_owned(),
            "not finite" => {
                "like a fault: elements are finite in one of them only, which no tolerance passes".to_owned()
            }
            other => other.to_owned(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  looks {look}");
        let (norm, cosine) = (self.norm_error, 1.0 - self.cosine);
        let _ = writeln!(text, "  off by {norm:.1e} of the norm; cosine 1 - {cosine:.1e}");
        let total: u64 = self.histogram.iter().map(|bin| bin.elements).sum();
        let bins: Vec<String> = self.histogram.iter().map(|bin| bin.text(total)).collect();
        let unit = self.histogram_unit;
        let _ =
            writeln!(text, "  elements by error, in units of {unit:.1e} that rounding explains: {}", bins.join(", "));
        if let Some(WouldPass { rtol, atol }) = self.would_pass {
            let _ = writeln!(text, "  would pass: --rtol {rtol:e} --atol {atol:e}");
        }
        text
    }
}

impl HistogramBin {
    fn text(&self, total: u64) -> String {
        let share = 100.0 * self.elements as f64 / total.max(1) as f64;
        match self.up_to {
            Some(edge) => format!("≤ {edge}: {share:.1} %"),
            None => format!("more: {share:.1} %"),
        }
    }
}

impl From<Comparison> for ComparisonReport {
    fn from(comparison: Comparison) -> Self {
        let passed = comparison.passes();
        let Comparison { max_error, max_relative_error, norm_error, cosine, beyond, elsewhere, .. } = comparison;
        let Comparison { worst, worst_part, diagnosis, .. } = comparison;
        let Diagnosis { look, concentration, histogram, unit, would_pass, .. } = diagnosis;
        let edges = HISTOGRAM_EDGES.iter().map(|&edge| Some(edge)).chain([None]);
        Self {
            passed,
            max_error,
            max_relative_error,
            norm_error,
            cosine,
            beyond,
            elsewhere,
            remark: worst.map_or_else(String::new, |worst| {
                format!("element {}: {} for {}", worst.position, short(worst.actual), short(worst.expected))
            }),
            worst_part: worst_part.map(|part| PartReport {
                part: part.place.to_string(),
                error: part.error,
                allowed: part.allowed,
            }),
            looks_like: match look {
                Look::Same => "same",
                Look::Rounding => "rounding",
                Look::Concentrated => "concentrated",
                Look::Everywhere => "everywhere",
                Look::NotFinite => "not finite",
            },
            concentration,
            histogram: edges.zip(histogram).map(|(up_to, elements)| HistogramBin { up_to, elements }).collect(),
            histogram_unit: unit,
            would_pass: would_pass.map(|(rtol, atol)| WouldPass { rtol, atol }),
        }
    }
}

/// Seven digits, as many as an `f32` has.
fn short(value: f64) -> String {
    let digits = 6 - value.abs().max(1.0).log10().clamp(0.0, 6.0) as usize;
    let text = format!("{value:.digits$}");
    if value.fract() == 0.0 || !value.is_finite() { value.to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(flags: ToleranceFlags, actual: &[f32], expected: &[f32]) -> ComparisonReport {
        let rounding =
            Rounding { coarsest: Some(DType::BF16), primitives: 9, longest_sum: 64, expected: 0.01, chooses: false };
        let [actual, expected] =
            [actual, expected].map(|values| Tensor::from_elements(&[values.len() as u64], values).unwrap());
        ComparisonReport::of(&actual, &expected, flags.of(rounding))
    }

    #[test]
    fn flags_judge_elements_and_without_them_rounding_does() {
        let (rounded, expected) = ([1.02, -1.99, 3.0], [1.0, -2.0, 3.0]);
        assert!(report(ToleranceFlags::default(), &rounded, &expected).passed);
        let told = |rtol, atol| report(ToleranceFlags { rtol, atol }, &rounded, &expected);
        assert!(!told(Some(0.01), None).passed && told(Some(0.03), None).passed);
        assert!(!told(None, Some(0.01)).passed && told(None, Some(0.03)).passed);
        let tolerance = ToleranceFlags { rtol: None, atol: Some(0.5) }.of(Rounding::NONE);
        assert_eq!(tolerance.elements, Some(Elements { relative: RTOL, absolute: 0.5 }));
    }

    #[test]
    fn failures_say_what_would_pass_and_it_does() {
        let expected: Vec<f32> = (0..256).map(|i| (i as f32 * 12.9898).sin()).collect();
        let actual: Vec<f32> = expected.iter().map(|value| value * 1.2).collect();
        let failed = report(ToleranceFlags::default(), &actual, &expected);
        let text = failed.failure_text("y");
        for words in ["the whole is off by 2.0e-1 of its norm, 4.0e-2 is allowed", "looks like rounding", "cosine"] {
            assert!(text.contains(words), "`{words}` is not in\n{text}");
        }
        let line = text.lines().find_map(|line| line.strip_prefix("  would pass: ")).unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let flags = ToleranceFlags { rtol: words[1].parse().ok(), atol: words[3].parse().ok() };
        assert_eq!((words[0], words[2]), ("--rtol", "--atol"));
        assert!(report(flags, &actual, &expected).passed, "{line}");
        assert_eq!(report(flags, &actual, &expected).failure_text("y"), "");
    }

    #[test]
    fn the_tolerance_is_stated() {
        let rounding =
            Rounding { coarsest: Some(DType::BF16), primitives: 1, longest_sum: 64, expected: 0.01, chooses: true };
        let text = ToleranceReport::from(ToleranceFlags::default().of(rounding)).text();
        for words in ["4.0e-2 of the norm", "1.6e-1 of a part's", "1 rounding to bf16", "64 terms", "another choice"] {
            assert!(text.contains(words), "`{words}` is not in {text}");
        }
        let told = ToleranceReport::from(ToleranceFlags { rtol: Some(0.02), atol: None }.of(rounding)).text();
        assert_eq!(told, "tolerance: each element within 2e-2 of its size plus 1e-5\n");
        assert!(ToleranceReport::from(ToleranceFlags::default().of(Rounding::NONE)).text().contains("none"));
    }

    #[test]
    fn elements_have_seven_digits() {
        let numbers = [1.016_261_577_606_201_2, -4_096.123_456, 3.0, f64::INFINITY];
        assert_eq!(numbers.map(short), ["1.016262", "-4096.123", "3", "inf"]);
    }
}
