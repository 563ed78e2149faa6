//! The list of cases, the table of results and its summary, as text.

use std::collections::BTreeMap;
use std::fmt::Write;

/// A way to run a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    One,
    /// Two devices on the tensor axis.
    Tensor,
    /// Two devices on the data axis, which splits the first dimension of inputs.
    Batch,
    /// Two devices on the tensor axis, with inputs made weights: all but the first, then the first alone.
    Weights,
    /// Two devices on the data axis, which splits each other dimension of inputs in turn.
    OtherDims,
}

/// How each case runs, in the order of [`Row::outcomes`].
pub(crate) const DEVICES: [(&str, Way); 5] = [
    ("1 device", Way::One),
    ("tensor=2", Way::Tensor),
    ("data=2", Way::Batch),
    ("weights", Way::Weights),
    ("other dims", Way::OtherDims),
];

/// A node test: its folder, the operator it is about, and `core` or why it does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) operator: String,
    pub(crate) class: String,
}

impl Case {
    pub(crate) fn is_core(&self) -> bool {
        self.class == "core"
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Passed,
    /// Passed on two devices that both computed everything: nothing was split.
    Whole,
    Failed,
    /// Refused with a message that says what is not supported.
    Unsupported,
    NotRun,
}

impl Status {
    const ALL: [Self; 5] = [Self::Passed, Self::Whole, Self::Failed, Self::Unsupported, Self::NotRun];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Whole => "whole",
            Self::Failed => "failed",
            Self::Unsupported => "unsupported",
            Self::NotRun => "-",
        }
    }

    fn parse(text: &str) -> Self {
        let found = Self::ALL.into_iter().find(|status| status.name() == text);
        found.unwrap_or_else(|| panic!("`{text}` is no status"))
    }

    fn is_fault(self) -> bool {
        matches!(self, Self::Failed | Self::Unsupported)
    }

    /// Passed is better than passed unsplit, a refusal better than a wrong answer.
    fn rank(self) -> u8 {
        match self {
            Self::Passed => 4,
            Self::Whole => 3,
            Self::Unsupported => 2,
            Self::Failed => 1,
            Self::NotRun => 0,
        }
    }
}

/// What became of a case on some devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: Status,
    /// Empty where it passed.
    pub(crate) reason: String,
}

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) case: Case,
    /// One for each of [`DEVICES`].
    pub(crate) outcomes: Vec<Outcome>,
}

impl Row {
    /// The first reason there is.
    fn reason(&self) -> &str {
        let reasons = self.outcomes.iter().map(|outcome| outcome.reason.as_str());
        reasons.into_iter().find(|reason| !reason.is_empty()).unwrap_or_default()
    }

    fn status(&self, device: usize) -> Status {
        self.outcomes.get(device).map_or(Status::NotRun, |outcome| outcome.status)
    }
}

fn columns<const N: usize>(text: &str) -> impl Iterator<Item = [String; N]> {
    text.lines().skip(1).map(|line| {
        let parts: Vec<String> = line.split('\t').map(str::to_owned).collect();
        parts.try_into().unwrap_or_else(|_| panic!("`{line}` has not {N} columns"))
    })
}

pub(crate) fn parse_cases(text: &str) -> Vec<Case> {
    columns(text).map(|[name, operator, class]| Case { name, operator, class }).collect()
}

pub(crate) fn parse_rows(text: &str) -> Vec<Row> {
    let row = |[name, operator, class, one, tensor, data, weights, dims, reason]: [String; 9]| {
        let mut outcomes: Vec<Outcome> = [one, tensor, data, weights, dims]
            .iter()
            .map(|status| Outcome { status: Status::parse(status), reason: String::new() })
            .collect();
        let fault = |outcome: &&mut Outcome| outcome.status.is_fault();
        if let Some(outcome) = outcomes.iter_mut().find(fault) {
            outcome.reason = reason;
        }
        Row { case: Case { name, operator, class }, outcomes }
    };
    columns(text).map(row).collect()
}

pub(crate) fn to_tsv(rows: &[Row]) -> String {
    let mut text = format!("case\toperator\tclass\t{}\treason\n", DEVICES.map(|(label, _)| label).join("\t"));
    for row in rows {
        let Case { name, operator, class } = &row.case;
        let statuses = std::array::from_fn::<_, { DEVICES.len() }, _>(|device| row.status(device).name()).join("\t");
        let reason = row.reason();
        writeln!(text, "{name}\t{operator}\t{class}\t{statuses}\t{reason}").unwrap();
    }
    text
}

/// One sentence for each result that is not what it was.
pub(crate) fn differences(committed: &[Row], rows: &[Row]) -> Vec<String> {
    let known: BTreeMap<&str, &Row> = committed.iter().map(|row| (row.case.name.as_str(), row)).collect();
    let mut found = Vec::new();
    for row in rows {
        let before = known.get(row.case.name.as_str());
        for (device, (outcome, (label, _))) in row.outcomes.iter().zip(DEVICES).enumerate() {
            let (was, is) = (before.map_or(Status::NotRun, |row| row.status(device)), outcome.status);
            if was != is {
                let verdict = if is.rank() < was.rank() { "WORSE " } else { "better" };
                let (name, was, is, reason) = (&row.case.name, was.name(), is.name(), &outcome.reason);
                found.push(format!("{verdict}  {name}, {label}: {was}, now {is} {reason}"));
            }
        }
    }
    found
}

/// Counts by one operator or class.
#[derive(Default)]
struct Counts {
    cases: usize,
    passed: usize,
    failed: usize,
    unsupported: usize,
    split: usize,
    whole: usize,
    broken: usize,
}

impl Counts {
    fn add(&mut self, row: &Row) {
        self.cases += 1;
        match row.status(0) {
            Status::Passed | Status::Whole => self.passed += 1,
            Status::Failed => self.failed += 1,
            Status::Unsupported => self.unsupported += 1,
            Status::NotRun => {}
        }
        let two: Vec<Status> = (1..DEVICES.len()).map(|device| row.status(device)).collect();
        if two.iter().any(|status| status.is_fault()) {
            self.broken += 1;
        } else if two.contains(&Status::Passed) {
            self.split += 1;
        } else if two.contains(&Status::Whole) {
            self.whole += 1;
        }
    }

    fn row(&self, name: &str) -> String {
        let number = |count: usize| if count == 0 { String::new() } else { count.to_string() };
        let Self { cases, passed, failed, unsupported, split, whole, broken } = *self;
        let counts = [passed, failed, unsupported, split, whole, broken].map(number);
        format!("| {name} | {cases} | {} |\n", counts.join(" | "))
    }
}

/// The summary for people, by operator.
pub(crate) fn summary(rows: &[Row]) -> String {
    let mut operators: BTreeMap<&str, Counts> = BTreeMap::new();
    let mut classes: BTreeMap<&str, usize> = BTreeMap::new();
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    let mut total = Counts::default();
    for row in rows {
        if !row.case.is_core() {
            *classes.entry(row.case.class.trim_start_matches("not core: ")).or_default() += 1;
            continue;
        }
        operators.entry(&row.case.operator).or_default().add(row);
        total.add(row);
        if !row.reason().is_empty() {
            *reasons.entry(row.reason()).or_default() += 1;
        }
    }
    let mut text = String::from(INTRODUCTION);
    text += &by_way(rows);
    text += "## By operator\n\n";
    text += "| operator | cases | passed | failed | not supported | split on 2 | whole on 2 | failed on 2 |\n";
    text += "| --- | --: | --: | --: | --: | --: | --: | --: |\n";
    text += &total.row("**all**");
    for (operator, counts) in &operators {
        text += &counts.row(operator);
    }
    if !reasons.is_empty() {
        text += "\n## Reasons\n\n| cases | reason |\n| --: | --- |\n";
    }
    let mut reasons: Vec<(&str, usize)> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (reason, count) in reasons {
        writeln!(text, "| {count} | {} |", reason.replace('|', "\\|")).unwrap();
    }
    text += "\n## Not core\n\nThese do not run.\n\n| cases | about |\n| --: | --- |\n";
    for (class, count) in classes {
        writeln!(text, "| {count} | {class} |").unwrap();
    }
    text
}

/// How many cases were really split in each way.
fn by_way(rows: &[Row]) -> String {
    let mut text = String::from("## Two devices\n\n| devices | cases | split | whole | failed |\n");
    text += "| --- | --: | --: | --: | --: |\n";
    for (device, (label, _)) in DEVICES.iter().enumerate().skip(1) {
        let count = |wanted: fn(Status) -> bool| rows.iter().filter(|row| wanted(row.status(device))).count();
        let (split, whole) = (count(|status| status == Status::Passed), count(|status| status == Status::Whole));
        let failed = count(Status::is_fault);
        writeln!(text, "| {label} | {} | {split} | {whole} | {failed} |", split + whole + failed).unwrap();
    }
    text + "\n"
}

const INTRODUCTION: &str = "\
# Node tests of ONNX

Written by `UPDATE_CONFORMANCE=1 cargo test --test conformance`; case by case in `results.tsv`.

The backend node tests of the package `onnx` 1.23.2, written by `fixtures/node_tests.py`. Each core case is compiled with
its inputs as samples (inputs that carry shapes are fixed by them) and run on one virtual device, then on two, for a
machine whose links cost nothing, so that whatever can be split is:

- `tensor=2`: the tensor axis, which splits weights; most cases have none;
- `data=2`: the data axis, along the first dimension of the inputs;
- `weights`: the tensor axis, with inputs made weights: all inputs but the first, then the first alone;
- `other dims`: the data axis, along the second dimension of the inputs, then the third, and so on.

`split on 2`: right in each of these ways, and in one at least something was split. `whole on 2`: right, but nothing
could be split. `failed on 2`: not right in one of these ways, or not compiled.

Passed means: the reference's type and shape; equal for integers and booleans; for floating point
`|actual - expected| <= absolute + relative * |expected|` with these tolerances:

| type | relative | absolute |
| --- | --: | --: |
| f32, f64 | 1e-3 | 1e-7 |
| f16 | 2e-3 | 1e-5 |
| bf16 | 1.6e-2 | 1e-5 |

Those of f32 are the tolerances of ONNX's own runner; those of the half types are two units in the last place.

Four cases are held to other values than the published ones (`errata.rs`):

- `test_dft_inverse`, and the same for opset 19: ten elements that are 0 exactly are published as 1.9e-7, rounding noise
  of the `f32` transform that made them, and more than the tolerance of 1e-7: a transform without any error would fail.
  Here they are held to 0, all others to what is published.
- `test_resize_downsample_scales_linear_align_corners`, and the same `cubic`: ONNX contradicts itself where the product of
  length and scale is fractional. Its text says `x_original = x_resized * (length_original - 1) / (length_resized - 1)`
  with `length_resized` *the length of the resized tensor in axis x*, a whole number, and has another name,
  `output_width`, for a *target length* that *can be a fractional number*. Its reference implementation, which made the
  published values, takes the fraction: of 4 columns by 0.6, it makes 2 whose second is column 1 · 3 / (2.4 - 1) = 2.14,
  not the corner, 3. The text is followed, as ONNX Runtime and PyTorch, from which such models come, do. (Modes of
  coordinates that the text states by `scale` take the scale that is given, as what is published for them does.)

";
