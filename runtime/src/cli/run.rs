//! Runs a plan on given data and says what came out, and how far from a reference it is.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::Path;
use std::time::Instant;

use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use cpu::CpuError;
use planfile::frozen::FrozenSummary;
use planfile::plan::PlanEntry;
use planfile::printable::printable;
use planfile::text::{count, few};
use planfile::{PlanFile, Tensor};
use serde::Serialize;

use super::comparison::{ComparisonReport, ToleranceFlags, ToleranceReport};
use super::exit::{Exit, Failure, warn};
use super::progress::bytes_bar;
use super::report::time_text;
use crate::compare::{Tolerance, to_f64s};
use crate::error::{RuntimeError, StepError};
use crate::gpus::OtherVersion;
use crate::npz::{read_npz_with, write_npz};
use crate::rounding::Rounding;
use crate::session::MAX_THREADS;
use crate::signature::Expected;
use crate::tensor_file::TestData;
use crate::{Devices, Session, random_inputs};

/// Seed of the inputs of runs that bring none.
const RANDOM_SEED: u64 = 0;
/// What a run on random inputs says of an index that is out of range.
const RANDOM_INDICES: &str = "; the inputs were random, integers 0 or 1, which not every model takes as indices: give \
                              it inputs of its own with --inputs or --test-data";

fn threads(text: &str) -> Result<NonZero<usize>, String> {
    let number = text.parse().ok().filter(|number: &NonZero<usize>| number.get() <= MAX_THREADS);
    number.ok_or_else(|| format!("must be a number from 1 to {MAX_THREADS}"))
}

/// Where a plan runs.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DeviceFlags {
    /// `cpu` for virtual devices, `cuda`, or `cuda:0,2` for GPUs by number; without it, what the plan is compiled for
    #[arg(long, value_name = "WHERE")]
    pub devices: Option<Devices>,
    /// Refuse libraries of other versions than the plan records
    #[arg(long)]
    pub strict: bool,
    /// Threads of each virtual device, 4096 for all together at most; without it, they share the cores
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<NonZero<usize>>,
}

/// What a run works on.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// See [`random_inputs`].
    Random,
    /// An archive of arrays by input name.
    Npz(&'a Path),
    /// Inputs, and references if there are any, by position.
    TestData(&'a TestData),
}

/// What came out of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunReport {
    pub entry: String,
    /// `cpu` for virtual devices, `cuda` or `cuda:0,2`.
    pub devices: String,
    /// `random`, `npz` or `test data`.
    pub inputs: &'static str,
    /// Inputs that were not given and have a value of the plan's own.
    pub frozen: Vec<FrozenSummary>,
    pub seconds: f64,
    /// What outputs may be off their references, where there are any.
    pub tolerance: Option<ToleranceReport>,
    pub outputs: Vec<OutputReport>,
}

/// One output. Numbers that are not finite are null in JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OutputReport {
    pub name: String,
    pub ty: String,
    pub min: f64,
    pub mean: f64,
    pub max: f64,
    pub comparison: Option<ComparisonReport>,
}

/// The named entry, or the only one.
///
/// # Errors
/// An unknown name, or no name where there are several.
pub fn choose_entry<'a>(session: &'a Session, name: Option<&str>) -> Result<&'a PlanEntry, Failure> {
    match (name, session.entries()) {
        (Some(name), _) => Ok(session.entry(name)?),
        (None, [entry]) => Ok(entry),
        (None, entries) => {
            let names = few(entries.iter().map(|entry| &entry.name));
            Err(Failure::new(Exit::Usage, format!("choose one of the entries with --entry: {names}")))
        }
    }
}

/// Loads a plan, runs an entry once and compares. Outputs are also written to the archive `save` if there is one.
///
/// # Errors
/// A plan, input or file at fault. Being beyond the tolerance is no error here: see [`RunReport::exit`].
pub fn run(
    file: PlanFile,
    entry: Option<&str>,
    data: Data<'_>,
    save: Option<&Path>,
    tolerance: ToleranceFlags,
    flags: &DeviceFlags,
) -> Result<RunReport, Failure> {
    let (session, devices) = load(file, flags)?;
    let entry = choose_entry(&session, entry)?;
    let inputs = given_inputs(entry, data)?;
    let frozen = frozen(entry, data, &inputs);
    let (references, kind) = match data {
        Data::Random => (&[][..], "random"),
        Data::Npz(_) => (&[][..], "npz"),
        Data::TestData(data) => (&data.outputs[..], "test data"),
    };
    let mut context = session.context_with_threads(flags.threads.unwrap_or_else(|| session.default_threads()))?;
    let start = Instant::now();
    let outputs = context.run(&entry.name, &inputs).map_err(|error| explained(data, error))?;
    let seconds = start.elapsed().as_secs_f64();
    if let Some(path) = save {
        write_npz(path, outputs.iter().map(|(name, tensor)| (name.as_str(), tensor)))?;
    }
    let tolerance = tolerance.of(Rounding::of(session.plan(), entry));
    let report = |(position, (name, tensor)): (usize, &(String, Tensor))| {
        output_report(name, tensor, references.get(position), tolerance)
    };
    let outputs = outputs.iter().enumerate().map(report).collect();
    let devices = devices.to_string();
    let tolerance = (!references.is_empty()).then(|| tolerance.into());
    Ok(RunReport { entry: entry.name.clone(), devices, inputs: kind, frozen, seconds, tolerance, outputs })
}

/// Loads a plan, with a progress bar, and says where.
pub(super) fn load(file: PlanFile, flags: &DeviceFlags) -> Result<(Session, Devices), Failure> {
    let bytes = file.plan().manifest.weight_arena_bytes.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes));
    let devices = flags.devices.clone().unwrap_or_else(|| Devices::of(file.plan()));
    let bar = bytes_bar("loading weights", bytes);
    let progress = |done| bar.set_position(done);
    let session = match flags.strict {
        true => Session::load_file_strictly(file, devices.clone(), progress)?,
        false => Session::load_file(file, devices.clone(), progress)?,
    };
    bar.finish_and_clear();
    for other in session.other_versions() {
        warn(&other_version_text(other));
    }
    Ok((session, devices))
}

/// What, where, and what to do about it.
fn other_version_text(OtherVersion { library, recorded, found, path }: &OtherVersion) -> String {
    format!(
        "the plan was made with {library} {recorded}, this machine has {found} ({path}): times and last bits may differ; \
         install that version (or name its file in {}), or compile the plan anew; --strict refuses other versions",
        library.variable()
    )
}

/// What a run works on, by input name.
pub(super) fn given_inputs(entry: &PlanEntry, data: Data<'_>) -> Result<BTreeMap<String, Tensor>, Failure> {
    match data {
        Data::Random => Ok(random_inputs(entry, RANDOM_SEED)?),
        Data::Npz(path) => {
            // Before memory is taken for it, so that what a file claims to hold costs nothing.
            let expected = Expected::new(entry);
            let given = read_npz_with(path, |name, ty| Ok::<_, Failure>(expected.check(&printable(name), ty)?))?;
            // As the compiler does with the model's names.
            Ok(given.into_iter().map(|(name, tensor)| (printable(&name).into_owned(), tensor)).collect())
        }
        Data::TestData(data) => by_name(entry, data),
    }
}

/// A failed run, with what to do about it where it is for want of inputs: random integers may be no indices of the
/// model.
pub(super) fn explained(data: Data<'_>, error: RuntimeError) -> Failure {
    let is_index = matches!(
        &error,
        RuntimeError::Step { source: StepError::OutOfRange | StepError::Cpu(CpuError::Index { .. }), .. }
    );
    let mut failure = Failure::from(error);
    if is_index && matches!(data, Data::Random) {
        failure.message.push_str(RANDOM_INDICES);
    }
    failure
}

/// Test data under the names of the entry's inputs.
fn by_name(entry: &PlanEntry, data: &TestData) -> Result<BTreeMap<String, Tensor>, Failure> {
    let counts =
        [("input", data.inputs.len(), entry.inputs.len()), ("output", data.outputs.len(), entry.outputs.len())];
    for (kind, given, expected) in counts {
        // References are optional.
        if given != expected && !(kind == "output" && given == 0) {
            let message = format!(
                "the test data has {}, entry `{}` has {expected}; give one {kind}_N.pb for each",
                count(given as u64, kind),
                entry.name
            );
            return Err(Failure::new(Exit::Invalid, message));
        }
    }
    Ok(entry.inputs.iter().map(|port| port.name.clone()).zip(data.inputs.iter().cloned()).collect())
}

/// Inputs of the entry that were not given and have a value of the plan's own.
pub(super) fn frozen(entry: &PlanEntry, data: Data<'_>, given: &BTreeMap<String, Tensor>) -> Vec<FrozenSummary> {
    let is_given = |input: &str| !matches!(data, Data::Random) && given.contains_key(input);
    entry.frozen.iter().filter(|frozen| !is_given(&frozen.input)).map(FrozenSummary::from).collect()
}

/// The inputs that a run took from the plan, a line each.
pub(super) fn frozen_lines(frozen: &[FrozenSummary]) -> String {
    frozen.iter().map(|frozen| format!("frozen {}\n", frozen.text())).collect()
}

fn output_report(name: &str, tensor: &Tensor, reference: Option<&Tensor>, tolerance: Tolerance) -> OutputReport {
    let values = to_f64s(tensor);
    // NaN wins: a report that hides one is worse than none.
    let pick = |pick: fn(f64, f64) -> f64| {
        let over = |a: f64, &b: &f64| if a.is_nan() || b.is_nan() { f64::NAN } else { pick(a, b) };
        values.split_first().map_or(f64::NAN, |(&first, rest)| rest.iter().fold(first, over))
    };
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let comparison = reference.map(|reference| ComparisonReport::of(tensor, reference, tolerance));
    let (min, max) = (pick(f64::min), pick(f64::max));
    OutputReport { name: name.to_owned(), ty: tensor.ty.to_string(), min, mean, max, comparison }
}

impl RunReport {
    /// [`Exit::Beyond`] unless every comparison passed.
    pub fn exit(&self) -> Exit {
        let failed = |output: &OutputReport| output.comparison.as_ref().is_some_and(|comparison| !comparison.passed);
        if self.outputs.iter().any(failed) { Exit::Beyond } else { Exit::Success }
    }

    /// For people.
    pub fn text(&self) -> String {
        let compared = self.outputs.iter().any(|output| output.comparison.is_some());
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        let mut header = vec!["output", "type", "min", "mean", "max"];
        if compared {
            header.extend(["max error", "of largest", "beyond", "largest error at", ""]);
        }
        table.set_header(header);
        for output in &self.outputs {
            let mut row = vec![output.name.clone(), output.ty.clone()];
            row.extend([output.min, output.mean, output.max].map(|value| format!("{value:.6}")));
            if let Some(comparison) = &output.comparison {
                row.push(format!("{:.2e}", comparison.max_error));
                row.push(format!("{:.2e}", comparison.max_relative_error));
                row.push(comparison.beyond.to_string());
                row.push(comparison.remark.clone());
                row.push(if comparison.passed { "ok" } else { "BEYOND TOLERANCE" }.to_owned());
            }
            table.add_row(row);
        }
        let time = time_text(self.seconds * 1e9);
        let devices = if self.devices == "cpu" { "virtual devices" } else { &self.devices };
        let but = match self.frozen.len() {
            0 => "",
            1 => " but for one that is frozen",
            _ => " but for those that are frozen",
        };
        let frozen = frozen_lines(&self.frozen);
        let (entry, inputs) = (&self.entry, self.inputs);
        let mut text = format!("ran `{entry}` on {devices} with {inputs} inputs{but} in {time}\n{frozen}{table}\n");
        text.extend(self.tolerance.as_ref().map(ToleranceReport::text));
        for output in &self.outputs {
            let failure = output.comparison.as_ref().map(|comparison| comparison.failure_text(&output.name));
            text.push_str(&failure.unwrap_or_default());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Elements;

    const TOLERANCE: Tolerance =
        Tolerance { rounding: Rounding::NONE, elements: Some(Elements { relative: 0.0, absolute: 0.1 }) };

    fn vector(elements: &[f32]) -> Tensor {
        Tensor::from_elements(&[elements.len() as u64], elements).unwrap()
    }

    fn report(actual: &[f32], expected: Option<&[f32]>) -> RunReport {
        let expected = expected.map(vector);
        let output = output_report("y", &vector(actual), expected.as_ref(), TOLERANCE);
        RunReport {
            entry: "main".into(),
            devices: "cpu".into(),
            inputs: "random",
            frozen: vec![],
            seconds: 0.5,
            tolerance: None,
            outputs: vec![output],
        }
    }

    #[test]
    fn comparisons_decide_the_exit_code() {
        assert_eq!(report(&[1.0, 2.0], None).exit(), Exit::Success);
        assert_eq!(report(&[1.0, 2.0], Some(&[1.05, 2.0])).exit(), Exit::Success);
        let beyond = report(&[1.0, 2.0], Some(&[1.0, 3.0]));
        assert_eq!(beyond.exit(), Exit::Beyond);
        let text = beyond.text();
        assert!(text.contains("element 1: 2 for 3") && text.contains("BEYOND") && text.contains("500.0 ms"), "{text}");
        let other_shape = report(&[1.0, 2.0], Some(&[1.0]));
        assert_eq!(other_shape.exit(), Exit::Beyond);
        assert!(other_shape.text().contains("f32[2], the reference is f32[1]"));
    }

    #[test]
    fn warnings_about_versions_say_what_where_and_what_next() {
        let library = cuda::LibraryName::CublasLt;
        let [recorded, found, path] = ["0.0.1", "13.0.2", "/usr/lib/libcublasLt.so.13"].map(str::to_owned);
        let text = other_version_text(&OtherVersion { library, recorded, found, path });
        for part in ["cuBLASLt 0.0.1", "has 13.0.2 (/usr/lib/libcublasLt.so.13)", "PLANWRIGHT_CUBLASLT", "--strict"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn random_inputs_are_told_of_where_an_index_is_out_of_range() {
        let told = |data, source| {
            let error = RuntimeError::Step { rank: 0, program: 0, step: 0, origin: vec![], source };
            let plain = error.to_string();
            let failure = explained(data, error);
            assert_eq!(failure.exit, Exit::Invalid);
            failure.message.strip_prefix(&plain).unwrap().to_owned()
        };
        let index = CpuError::Index { op: "gather", axis: 0, index: 1, bound: 1 };
        for source in [StepError::OutOfRange, index.into()] {
            let more = told(Data::Random, source.clone());
            assert!(more.contains("random") && more.contains("--inputs") && more.contains("--test-data"), "{more}");
            assert_eq!(told(Data::Npz(Path::new("x.npz")), source), "");
        }
        assert_eq!(told(Data::Random, StepError::Memory { bytes: 1 }), "");
    }

    #[test]
    fn statistics_show_what_is_not_a_number() {
        let output = &report(&[1.0, f32::NAN, 3.0], None).outputs[0];
        assert!(output.min.is_nan() && output.mean.is_nan() && output.max.is_nan());
        let output = &report(&[1.0, -2.0, 4.0], None).outputs[0];
        assert_eq!((output.min, output.mean, output.max), (-2.0, 1.0, 4.0));
        assert!(serde_json::to_string(&report(&[f32::NAN], None)).unwrap().contains("\"min\":null"));
    }
}
