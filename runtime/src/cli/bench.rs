//! Times runs of a plan, and its steps.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use planfile::plan::{Action, Plan, PlanEntry, Step};
use planfile::{PlanFile, Tensor};
use serde::Serialize;

use super::exit::Failure;
use super::report::time_text;
use super::run::{Data, choose_entry, given_inputs, load};
use crate::{Context, RuntimeError, StepTime};

/// How often an entry is run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct BenchFlags {
    /// Runs that are timed
    #[arg(long, value_name = "N", default_value = "20")]
    pub runs: NonZero<u32>,
    /// Runs before, which are not
    #[arg(long, value_name = "N", default_value = "3")]
    pub warm_up: u32,
    /// Also time each step, in runs of their own
    #[arg(long)]
    pub steps: bool,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BenchReport {
    pub entry: String,
    pub ranks: u32,
    pub threads_per_device: usize,
    pub runs: u32,
    pub median_seconds: f64,
    pub least_seconds: f64,
    /// 99 of 100 runs take no longer.
    pub p99_seconds: f64,
    pub predicted_seconds: f64,
    /// Longest first; empty unless asked for.
    pub steps: Vec<StepReport>,
}

/// A step of a program: medians over runs, of the rank that takes longest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    pub program: usize,
    pub step: usize,
    /// Primitives of the step's kernel, and the type of the first result.
    pub what: String,
    /// ONNX nodes it came from.
    pub origin: Vec<String>,
    pub seconds: f64,
    /// Arithmetic operations a second.
    pub operations_per_second: f64,
    /// Bytes read and written a second.
    pub bytes_per_second: f64,
    pub predicted_seconds: f64,
}

/// Loads a plan and times an entry on the same inputs each time.
///
/// # Errors
/// As [`super::run`].
pub fn bench(
    file: PlanFile,
    entry: Option<&str>,
    data: Data<'_>,
    threads: Option<NonZero<usize>>,
    flags: BenchFlags,
) -> Result<BenchReport, Failure> {
    let session = load(file)?;
    let entry = choose_entry(&session, entry)?;
    let inputs = given_inputs(entry, data)?;
    let mut context = session.context_with_threads(threads.unwrap_or_else(|| session.default_threads()))?;
    for _ in 0..flags.warm_up {
        context.run(&entry.name, &inputs)?;
    }
    let mut times = Vec::new();
    for _ in 0..flags.runs.get() {
        let start = Instant::now();
        context.run(&entry.name, &inputs)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let plan = session.plan();
    let steps = if flags.steps { time_steps(plan, entry, &mut context, &inputs, flags.runs)? } else { Vec::new() };
    Ok(BenchReport {
        entry: entry.name.clone(),
        ranks: plan.manifest.ranks,
        threads_per_device: context.threads_per_device(),
        runs: flags.runs.get(),
        median_seconds: median(&times).as_secs_f64(),
        least_seconds: times.first().copied().unwrap_or_default().as_secs_f64(),
        p99_seconds: quantile(&times, 0.99).as_secs_f64(),
        predicted_seconds: entry.predicted_ns as f64 * 1e-9,
        steps,
    })
}

/// Runs anew and takes each step's time.
fn time_steps(
    plan: &Plan,
    entry: &PlanEntry,
    context: &mut Context,
    inputs: &BTreeMap<String, Tensor>,
    runs: NonZero<u32>,
) -> Result<Vec<StepReport>, RuntimeError> {
    // By program, step and rank.
    let times: Mutex<BTreeMap<(usize, usize, u32), Vec<Duration>>> = Mutex::default();
    for _ in 0..runs.get() {
        context.run_observed(&entry.name, inputs, &|time: StepTime| {
            let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
            times.entry((time.program, time.step, time.rank)).or_default().push(time.duration);
        })?;
    }
    let mut slowest: BTreeMap<(usize, usize), Duration> = BTreeMap::new();
    for ((program, step, _), mut times) in times.into_inner().unwrap_or_else(PoisonError::into_inner) {
        times.sort_unstable();
        let slowest = slowest.entry((program, step)).or_default();
        *slowest = (*slowest).max(median(&times));
    }
    let mut reports: Vec<StepReport> = slowest
        .into_iter()
        .filter_map(|((program, step), time)| {
            let described = plan.programs.get(program)?.steps.get(step)?;
            Some(step_report(plan, (program, step), described, time))
        })
        .collect();
    reports.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Ok(reports)
}

fn step_report(plan: &Plan, (program, number): (usize, usize), step: &Step, time: Duration) -> StepReport {
    let primitives = match &step.action {
        Action::Launch { kernel, .. } | Action::Library { kernel, .. } => {
            let kernel = plan.kernels.get(*kernel as usize);
            let nodes = kernel.map(|kernel| kernel.spec.nodes.as_slice()).unwrap_or_default();
            nodes.iter().map(|node| node.op.name()).collect::<Vec<_>>().join(" ")
        }
        Action::Collective { op, .. } => op.name().to_owned(),
        Action::Copy { .. } => "copy".to_owned(),
        Action::Persistent { .. } => "persistent".to_owned(),
    };
    let (_, results) = step.action.places();
    let result = results.first().map_or_else(String::new, |place| format!(" {}", place.ty));
    let names = step.origin.iter().filter_map(|&name| plan.explanations.names.get(name as usize));
    let seconds = time.as_secs_f64();
    StepReport {
        program,
        step: number,
        what: format!("{primitives}{result}"),
        origin: names.cloned().collect(),
        seconds,
        operations_per_second: step.cost.operations as f64 / seconds,
        bytes_per_second: step.cost.memory_bytes as f64 / seconds,
        predicted_seconds: step.cost.predicted_ns as f64 * 1e-9,
    }
}

fn median(sorted: &[Duration]) -> Duration {
    quantile(sorted, 0.5)
}

/// The smallest time that at least this share of the runs do not exceed.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

impl BenchReport {
    /// For people.
    pub fn text(&self) -> String {
        let time = |seconds: f64| time_text(seconds * 1e9);
        let mut text = format!(
            "`{}`: median {} of {} runs, least {}, 99 of 100 within {}; {:.1} runs a second; {} virtual device{}, {} \
             thread{} each\n",
            self.entry,
            time(self.median_seconds),
            self.runs,
            time(self.least_seconds),
            time(self.p99_seconds),
            1.0 / self.median_seconds,
            self.ranks,
            if self.ranks == 1 { "" } else { "s" },
            self.threads_per_device,
            if self.threads_per_device == 1 { "" } else { "s" },
        );
        if self.steps.is_empty() {
            return text;
        }
        let total: f64 = self.steps.iter().map(|step| step.seconds).sum();
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header(["step", "what", "time", "share", "GFLOP/s", "GB/s", "from"]);
        for step in &self.steps {
            table.add_row([
                format!("{}.{}", step.program, step.step),
                step.what.clone(),
                time(step.seconds),
                format!("{:.1} %", 100.0 * step.seconds / total),
                format!("{:.1}", step.operations_per_second * 1e-9),
                format!("{:.1}", step.bytes_per_second * 1e-9),
                step.origin.join(" "),
            ]);
        }
        for column in 2..6 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        text.push_str(&format!("{table}\n"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_times() {
        let times: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(median(&times), Duration::from_millis(100));
        assert_eq!(quantile(&times, 0.99), Duration::from_millis(198));
        assert_eq!(quantile(&times[..1], 0.99), Duration::from_millis(1));
        assert_eq!(median(&[]), Duration::ZERO);
    }
}
