//! Checks every step of a plan on GPUs against its specification on the CPU, and the outputs against another plan's.

use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use planfile::frozen::FrozenSummary;
use planfile::plan::Plan;
use planfile::text::{count, few};
use planfile::{DType, PlanFile};
use serde::Serialize;

use super::bench::what;
use super::comparison::{ComparisonReport, ToleranceFlags, ToleranceReport};
use super::exit::{Exit, Failure};
use super::run::{Data, DeviceFlags, choose_entry, explained, frozen, frozen_lines, given_inputs, load};
use crate::check::{Checker, Deviation, distance, tolerance};
use crate::compare::Elements;
use crate::error::{RuntimeError, StepError};
use crate::rounding::{Rounding, WHOLE};
use crate::{Devices, Session};

/// Steps that the text shows, the farthest off first.
const SHOWN_STEPS: usize = 10;

/// What was compared, and how far it was off. Numbers that are not finite are null in JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckReport {
    pub entry: String,
    /// Inputs that were not given and have a value of the plan's own.
    pub frozen: Vec<FrozenSummary>,
    pub ranks: u32,
    /// Steps that were compared, each on all ranks that run it.
    pub steps: usize,
    /// Exchanges of which a rank's record is missing.
    pub uncompared: usize,
    /// How steps are judged.
    pub step_tolerance: String,
    /// Steps beyond their tolerance.
    pub beyond: usize,
    /// The first of them, in the plan's order.
    pub first: Option<CheckedStep>,
    /// The farthest off first.
    pub worst: Vec<CheckedStep>,
    /// What outputs may be off the reference plan's, where one is given.
    pub output_tolerance: Option<ToleranceReport>,
    /// Against the reference plan, where one is given.
    pub outputs: Vec<CheckedOutput>,
}

/// A step, and how far it is from its specification on the same operands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckedStep {
    pub program: usize,
    pub step: usize,
    /// Primitives of the step's kernel, and the type of the first result.
    pub what: String,
    /// ONNX nodes it came from.
    pub origin: Vec<String>,
    /// Largest difference over the largest expected value.
    pub largest: f64,
    /// Of the Euclidean norms.
    pub relative: f64,
    /// What the largest difference may be, unless elements are judged by themselves.
    pub allowed: Option<f64>,
    pub passed: bool,
    /// Of the first result that is beyond it.
    pub failure: Option<ComparisonReport>,
}

/// An output, and how far it is from the reference plan's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckedOutput {
    pub name: String,
    pub largest: f64,
    pub relative: f64,
    pub comparison: ComparisonReport,
}

/// Runs an entry step by step on GPUs and compares each step with the CPU. The outputs are also compared with those of
/// `reference`, which the CPU executes: a plan of the same model in `f32` shows what a half type costs.
///
/// # Errors
/// A plan, input or machine at fault. Being beyond the tolerance is no error here: see [`CheckReport::exit`].
pub fn check(
    file: PlanFile,
    entry: Option<&str>,
    data: Data<'_>,
    limits: ToleranceFlags,
    devices: &DeviceFlags,
    reference: Option<PlanFile>,
) -> Result<CheckReport, Failure> {
    if devices.devices.clone().unwrap_or_else(|| Devices::of(file.plan())) == Devices::Virtual {
        let message = "`check` compares GPUs with the CPU, and this plan would run on the CPU: check one that is compiled \
                       with --target for GPUs, or compare this one's outputs with `plan run --test-data DIR`";
        return Err(Failure::new(Exit::Usage, message));
    }
    let (session, _) = load(file, devices)?;
    let entry = choose_entry(&session, entry)?;
    let inputs = given_inputs(entry, data)?;
    let mut context = session.context_with_threads(devices.threads.unwrap_or_else(|| session.default_threads()))?;
    let plan = session.plan();
    let limits = limits.of(Rounding::of(plan, entry));
    let mut checker = Checker::new(plan, limits.elements);
    let mut replay = Replay::default();
    let outputs = context.run_recorded(&entry.name, &inputs, &mut |record| {
        let at = (record.program, record.step, record.rank);
        replay.add(at, || checker.add(record));
    });
    let outputs = replay.verdict(outputs).map_err(|error| explained(data, error))?;
    let steps: Vec<CheckedStep> = checker.found().map(|(at, found)| checked(plan, at, found)).collect();
    let mut worst = steps.clone();
    worst.sort_by(|a, b| b.largest.total_cmp(&a.largest));
    let output_tolerance = reference.is_some().then(|| limits.into());
    let outputs = match reference {
        None => Vec::new(),
        Some(reference) => {
            let session = Session::load_file(reference, Devices::Virtual, |_| {})?;
            let name = &choose_entry(&session, Some(&entry.name))?.name;
            let expected = session.context()?.run(name, &inputs).map_err(|error| explained(data, error))?;
            let compare = |((name, actual), (_, expected)): (&(String, _), &(String, _))| {
                let (largest, relative) = distance(actual, expected);
                let comparison = ComparisonReport::of(actual, expected, limits);
                CheckedOutput { name: name.clone(), largest, relative, comparison }
            };
            outputs.iter().zip(&expected).map(compare).collect()
        }
    };
    Ok(CheckReport {
        entry: entry.name.clone(),
        frozen: frozen(entry, data, &inputs),
        ranks: plan.manifest.ranks,
        steps: steps.len(),
        uncompared: checker.uncompared(),
        step_tolerance: step_tolerance(limits.elements),
        beyond: steps.iter().filter(|step| !step.passed).count(),
        first: steps.into_iter().find(|step| !step.passed),
        worst,
        output_tolerance,
        outputs,
    })
}

/// A clause.
fn step_tolerance(elements: Option<Elements>) -> String {
    match elements {
        Some(Elements { relative, absolute }) => {
            format!("each element within {relative:e} of its size plus {absolute:e}")
        }
        None => format!(
            "{WHOLE} times what rounding is expected to do in a step, as a share of the largest value; at least {:e} in f32, \
             {:e} in f16, {:e} in bf16",
            tolerance(DType::F32, &Rounding::NONE),
            tolerance(DType::F16, &Rounding::NONE),
            tolerance(DType::BF16, &Rounding::NONE)
        ),
    }
}

/// The first step, in the plan's order and then the ranks', that the CPU cannot execute. Ranks tell of their steps in
/// an order that differs from run to run.
#[derive(Default)]
struct Replay {
    failed: Option<((usize, usize, u32), RuntimeError)>,
}

impl Replay {
    /// Replays the step at this program, step and rank, unless an earlier one has failed.
    fn add(&mut self, at: (usize, usize, u32), replay: impl FnOnce() -> Result<(), RuntimeError>) {
        if self.failed.as_ref().is_some_and(|(first, _)| *first < at) {
            return;
        }
        if let Err(error) = replay() {
            self.failed = Some((at, error));
        }
    }

    /// What the run on GPUs gave, or why there is nothing to compare it with. What the CPU cannot execute either it can
    /// explain better than the GPU: it knows which index is out of range. Other failures of the run are its own.
    fn verdict<T>(self, outcome: Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        match (outcome, self.failed) {
            (Ok(_) | Err(RuntimeError::Step { source: StepError::OutOfRange, .. }), Some((_, error))) => Err(error),
            (outcome, _) => outcome,
        }
    }
}

fn checked(plan: &Plan, (program, number): (usize, usize), found: Deviation) -> CheckedStep {
    let step = plan.programs.get(program).and_then(|program| program.steps.get(number));
    let names = &plan.explanations.names;
    let origin = step.map_or(&[][..], |step| &step.origin);
    CheckedStep {
        program,
        step: number,
        what: step.map_or_else(String::new, |step| what(plan, step)),
        origin: origin.iter().filter_map(|&name| names.get(name as usize)).cloned().collect(),
        largest: found.largest,
        relative: found.relative,
        allowed: found.allowed,
        passed: found.passes,
        failure: found.failure.map(ComparisonReport::from),
    }
}

impl CheckReport {
    /// Whether every step and output was within its tolerance.
    pub fn exit(&self) -> Exit {
        let outputs = self.outputs.iter().all(|output| output.comparison.passed);
        if self.beyond == 0 && self.uncompared == 0 && outputs { Exit::Success } else { Exit::Beyond }
    }

    pub fn text(&self) -> String {
        let mut text = format!(
            "checked {} of `{}` on {} against the CPU: {} beyond the tolerance\ntolerance: {}\n",
            count(self.steps as u64, "step"),
            self.entry,
            count(u64::from(self.ranks), "GPU"),
            self.beyond,
            self.step_tolerance,
        );
        text.push_str(&frozen_lines(&self.frozen));
        if self.uncompared > 0 {
            let exchanges = count(self.uncompared as u64, "exchange");
            text.push_str(&format!("not compared, for a rank's record is missing: {exchanges}\n"));
        }
        if let Some(CheckedStep { program, step, what, origin, largest, relative, failure, .. }) = &self.first {
            text.push_str(&format!(
                "the first: step #{step} of program {program}, {what}, from {}: {largest:.2e} of the largest, {relative:.2e} \
                 in the norm\n",
                if origin.is_empty() { "no node".to_owned() } else { few(origin) },
            ));
            text.extend(failure.as_ref().map(|failure| failure.failure_text("its result")));
        }
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header(["step", "computes", "of largest", "allowed", "norm", "", "from"]);
        for step in self.worst.iter().take(SHOWN_STEPS) {
            table.add_row([
                format!("{}.{}", step.program, step.step),
                step.what.clone(),
                format!("{:.2e}", step.largest),
                step.allowed.map_or_else(String::new, |allowed| format!("{allowed:.1e}")),
                format!("{:.2e}", step.relative),
                if step.passed { "ok" } else { "BEYOND" }.to_owned(),
                few(&step.origin),
            ]);
        }
        text.push_str(&format!("{table}\n"));
        text.extend(self.output_tolerance.as_ref().map(ToleranceReport::text));
        for CheckedOutput { name, largest, relative, comparison } in &self.outputs {
            let verdict = if comparison.passed { "ok" } else { "BEYOND TOLERANCE" };
            text.push_str(&format!(
                "{name} against the reference plan: {largest:.2e} of the largest, {relative:.2e} in the norm: {verdict}\n"
            ));
            text.push_str(&comparison.failure_text(name));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure((program, step, rank): (usize, usize, u32), source: StepError) -> RuntimeError {
        RuntimeError::Step { rank, program, step, origin: vec![], source }
    }

    /// The message of a check of steps that the CPU cannot execute, told of in this order.
    fn message(told: &[(usize, usize, u32)], outcome: Result<(), RuntimeError>) -> Result<(), String> {
        let mut replay = Replay::default();
        for &at in told {
            replay.add(at, || Err(failure(at, StepError::Unsupported { what: "that" })));
        }
        replay.verdict(outcome).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_failure_is_told_in_whatever_order_ranks_come() {
        let first = message(&[(0, 3, 0)], Ok(())).unwrap_err();
        assert!(first.starts_with("rank 0, program 0, step 3: that is not executed"), "{first}");
        for told in [[(0, 3, 0), (0, 3, 1), (1, 0, 0)], [(1, 0, 0), (0, 3, 1), (0, 3, 0)]] {
            assert_eq!(message(&told, Ok(())), Err(first.clone()));
            assert_eq!(message(&told, Err(failure((0, 3, 1), StepError::OutOfRange))), Err(first.clone()));
        }
    }

    #[test]
    fn steps_behind_a_failure_are_not_replayed() {
        let mut replay = Replay::default();
        replay.add((0, 1, 1), || Err(failure((0, 1, 1), StepError::OutOfRange)));
        replay.add((0, 2, 0), || panic!("replayed"));
        let mut replayed = false;
        replay.add((0, 1, 0), || {
            replayed = true;
            Ok(())
        });
        assert!(replayed);
    }

    #[test]
    fn a_failure_of_the_run_is_not_hidden() {
        let lost = || failure((0, 9, 0), StepError::Cuda(cuda::CudaError::Abandoned));
        assert_eq!(message(&[(0, 3, 0)], Err(lost())), Err(lost().to_string()));
        assert_eq!(message(&[], Err(lost())), Err(lost().to_string()));
        assert_eq!(message(&[], Ok(())), Ok(()));
    }
}
