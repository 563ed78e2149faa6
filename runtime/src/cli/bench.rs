//! Times runs of a plan, and its steps.
//!
//! On GPUs a run is a launch of the entry's CUDA graph between two events, inputs in place; a step's time is that of a
//! graph which repeats it. On virtual devices both are wall-clock times.
//!
//! A step's share of the roofline is the time that the target predicts over the one measured. The prediction is the
//! larger of its operations over the device's rate and its bytes over the memory's bandwidth, as the target states
//! them, and a launch; for a collective, the target's own measurement. It may exceed 1: a step that is repeated finds in
//! a cache what fits there, and modelled targets are estimates.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use planfile::frozen::FrozenSummary;
use planfile::plan::{Action, Plan, PlanEntry, Step};
use planfile::text::{count, few};
use planfile::{PlanFile, Tensor};
use serde::Serialize;

use super::exit::Failure;
use super::report::{bytes_text, time_text};
use super::run::{Data, DeviceFlags, choose_entry, explained, frozen, frozen_lines, given_inputs, load};
use crate::gpus::DeviceMemoryReport;
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
    /// Inputs that were not given and have a value of the plan's own.
    pub frozen: Vec<FrozenSummary>,
    pub ranks: u32,
    /// Of a virtual device; 0 on GPUs.
    pub threads_per_device: usize,
    pub runs: u32,
    /// One after the other, by the median.
    pub runs_per_second: f64,
    pub median_seconds: f64,
    pub least_seconds: f64,
    /// 99 of 100 runs take no longer.
    pub p99_seconds: f64,
    pub predicted_seconds: f64,
    /// The prediction over the median: the share of the target's roofline that is reached.
    pub roofline_share: f64,
    /// On GPUs, from inputs in the caller's memory to outputs there.
    pub end_to_end_median_seconds: Option<f64>,
    /// By rank, after the runs; empty on virtual devices.
    pub device_memory: Vec<DeviceMemoryReport>,
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
    /// Arithmetic operations a second, of one rank; a multiply-add counts two, and what tiles add does not count.
    pub operations_per_second: f64,
    /// Bytes of operands and results a second, of one rank, each counted once.
    pub bytes_per_second: f64,
    /// What the target predicts.
    pub predicted_seconds: f64,
    /// The prediction over the measured time; see the module's documentation.
    pub roofline_share: f64,
    /// More than 1: what is repeated stays in a cache, or the target is described as slower than the machine is.
    pub beyond_roofline: bool,
}

/// Loads a plan and times an entry on the same inputs each time.
///
/// # Errors
/// As [`super::run`].
pub fn bench(
    file: PlanFile,
    entry: Option<&str>,
    data: Data<'_>,
    devices: &DeviceFlags,
    flags: BenchFlags,
) -> Result<BenchReport, Failure> {
    let (session, _) = load(file, devices)?;
    let entry = choose_entry(&session, entry)?;
    let inputs = given_inputs(entry, data)?;
    let mut context = session.context_with_threads(devices.threads.unwrap_or_else(|| session.default_threads()))?;
    for _ in 0..flags.warm_up {
        context.run(&entry.name, &inputs).map_err(|error| explained(data, error))?;
    }
    let mut times = Vec::new();
    for _ in 0..flags.runs.get() {
        let start = Instant::now();
        context.run(&entry.name, &inputs).map_err(|error| explained(data, error))?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let end_to_end = session.is_on_gpus().then(|| median(&times).as_secs_f64());
    if session.is_on_gpus() {
        // The first launches of a graph are slower.
        context.time_graph(&entry.name, &inputs, flags.warm_up)?;
        let micros = context.time_graph(&entry.name, &inputs, flags.runs.get())?;
        times = micros.into_iter().map(|us| Duration::from_secs_f64(us * 1e-6)).collect();
        times.sort_unstable();
    }
    let device_memory = if session.is_on_gpus() { context.device_memory()? } else { Vec::new() };
    let plan = session.plan();
    let steps = match flags.steps {
        false => Vec::new(),
        true if session.is_on_gpus() => time_steps_alone(plan, entry, &mut context, &inputs)?,
        true => time_steps(plan, entry, &mut context, &inputs, flags.runs)?,
    };
    let (median_seconds, predicted_seconds) = (median(&times).as_secs_f64(), entry.predicted_ns as f64 * 1e-9);
    Ok(BenchReport {
        entry: entry.name.clone(),
        frozen: frozen(entry, data, &inputs),
        ranks: plan.manifest.ranks,
        threads_per_device: if session.is_on_gpus() { 0 } else { context.threads_per_device() },
        runs: flags.runs.get(),
        runs_per_second: ratio(1.0, median_seconds),
        median_seconds,
        least_seconds: times.first().copied().unwrap_or_default().as_secs_f64(),
        p99_seconds: quantile(&times, 0.99).as_secs_f64(),
        predicted_seconds,
        roofline_share: ratio(predicted_seconds, median_seconds),
        end_to_end_median_seconds: end_to_end,
        device_memory,
        steps,
    })
}

/// How often a graph repeats a step, and how many such graphs are timed.
const STEP_REPEATS: (u32, u32) = (20, 5);

/// Each step alone, over and over.
fn time_steps_alone(
    plan: &Plan,
    entry: &PlanEntry,
    context: &mut Context,
    inputs: &BTreeMap<String, Tensor>,
) -> Result<Vec<StepReport>, RuntimeError> {
    let mut slowest: BTreeMap<(usize, usize), Duration> = BTreeMap::new();
    for step in context.time_steps(&entry.name, inputs, STEP_REPEATS.0, STEP_REPEATS.1)? {
        let slowest = slowest.entry((step.program, step.step)).or_default();
        *slowest = (*slowest).max(Duration::from_secs_f64(step.us * 1e-6));
    }
    Ok(reports(plan, slowest))
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
    Ok(reports(plan, slowest))
}

/// Longest first.
fn reports(plan: &Plan, times: BTreeMap<(usize, usize), Duration>) -> Vec<StepReport> {
    let mut reports: Vec<StepReport> = times
        .into_iter()
        .filter_map(|((program, step), time)| {
            let described = plan.programs.get(program)?.steps.get(step)?;
            Some(step_report(plan, (program, step), described, time))
        })
        .collect();
    reports.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    reports
}

/// Primitives of a step's kernel, and the type of its first result.
pub(super) fn what(plan: &Plan, step: &Step) -> String {
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
    format!("{primitives}{result}")
}

fn step_report(plan: &Plan, (program, number): (usize, usize), step: &Step, time: Duration) -> StepReport {
    let names = step.origin.iter().filter_map(|&name| plan.explanations.names.get(name as usize));
    let (seconds, predicted_seconds) = (time.as_secs_f64(), step.cost.predicted_ns as f64 * 1e-9);
    let rate = |count: u64| ratio(count as f64, seconds);
    StepReport {
        program,
        step: number,
        what: what(plan, step),
        origin: names.cloned().collect(),
        seconds,
        operations_per_second: rate(step.cost.operations),
        bytes_per_second: rate(step.cost.memory_bytes),
        predicted_seconds,
        roofline_share: ratio(predicted_seconds, seconds),
        beyond_roofline: is_beyond(ratio(predicted_seconds, seconds)),
    }
}

/// A ratio to a measured time, 0 where that was over before the clock moved.
fn ratio(of: f64, seconds: f64) -> f64 {
    if seconds > 0.0 { of / seconds } else { 0.0 }
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
    fn devices(&self) -> String {
        let ranks = u64::from(self.ranks);
        match self.threads_per_device {
            0 => count(ranks, "GPU"),
            threads => format!("{}, {} each", count(ranks, "virtual device"), count(threads as u64, "thread")),
        }
    }

    /// For people.
    pub fn text(&self) -> String {
        let time = |seconds: f64| time_text(seconds * 1e9);
        let mut text = format!(
            "`{}`: median {} of {}, least {}, 99 of 100 within {}; {:.1} runs a second; {}\n",
            self.entry,
            time(self.median_seconds),
            count(u64::from(self.runs), "run"),
            time(self.least_seconds),
            time(self.p99_seconds),
            self.runs_per_second,
            self.devices(),
        );
        text.push_str(&frozen_lines(&self.frozen));
        if let Some(seconds) = self.end_to_end_median_seconds {
            text.push_str(&format!("with inputs and outputs in host memory: median {}\n", time(seconds)));
        }
        text.push_str(&format!(
            "the target's roofline is {}: {} of it is reached\n",
            time(self.predicted_seconds),
            share_text(self.roofline_share),
        ));
        text.push_str(&memory_text(&self.device_memory));
        if self.steps.is_empty() {
            if self.beyond_roofline() {
                text.push_str(BEYOND_ROOFLINE);
            }
            return text;
        }
        let total: f64 = self.steps.iter().map(|step| step.seconds).sum();
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header(["step", "what", "time", "share", "GFLOP/s", "GB/s", "of roofline", "from"]);
        for step in &self.steps {
            table.add_row([
                format!("{}.{}", step.program, step.step),
                step.what.clone(),
                time(step.seconds),
                format!("{:.1} %", 100.0 * ratio(step.seconds, total)),
                format!("{:.1}", step.operations_per_second * 1e-9),
                format!("{:.1}", step.bytes_per_second * 1e-9),
                share_text(step.roofline_share),
                few(&step.origin),
            ]);
        }
        for column in 2..7 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        text.push_str(&format!("{table}\n"));
        if self.beyond_roofline() {
            text.push_str(BEYOND_ROOFLINE);
        }
        text
    }

    fn beyond_roofline(&self) -> bool {
        is_beyond(self.roofline_share) || self.steps.iter().any(|step| is_beyond(step.roofline_share))
    }
}

/// What a mark after a share means.
const BEYOND_ROOFLINE: &str = "! more than the target's roofline: what is repeated stays in a cache, or the target's \
                               description is slower than the machine\n";

/// Whether a share cannot be what it says.
fn is_beyond(share: f64) -> bool {
    (100.0 * share).round() > 100.0
}

/// In percent; marked where it is more than there is.
fn share_text(share: f64) -> String {
    let mark = if is_beyond(share) { " !" } else { "" };
    format!("{:.0} %{mark}", 100.0 * share)
}

/// One line for each rank, or one for all that say the same.
fn memory_text(reports: &[DeviceMemoryReport]) -> String {
    let line = |report: &DeviceMemoryReport| {
        let arena = |what: &str, predicted: u64, taken: u64| {
            format!("{what} {} (predicted {})", bytes_text(taken), bytes_text(predicted))
        };
        format!(
            "{}, {}, of which {} are workspace of libraries; code, graphs and libraries {}",
            arena("weights", report.weight_arena_bytes, report.weight_arena_taken_bytes),
            arena("activations", report.activation_arena_bytes, report.activation_arena_taken_bytes),
            bytes_text(report.workspace_bytes),
            bytes_text(report.other_taken_bytes),
        )
    };
    let lines: Vec<String> = reports.iter().map(line).collect();
    match lines.split_first() {
        None => String::new(),
        Some((first, rest)) if rest.iter().all(|line| line == first) => {
            format!("memory of {} GPU: {first}\n", if rest.is_empty() { "the" } else { "each" })
        }
        Some(_) => {
            let of =
                |(report, line): (&DeviceMemoryReport, &String)| format!("memory of GPU {}: {line}\n", report.ordinal);
            reports.iter().zip(&lines).map(of).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ordinal: u32, other_taken_bytes: u64) -> DeviceMemoryReport {
        DeviceMemoryReport {
            rank: ordinal,
            ordinal,
            weight_arena_bytes: 3 << 20,
            activation_arena_bytes: 1536,
            workspace_bytes: 512,
            weight_arena_taken_bytes: 4 << 20,
            activation_arena_taken_bytes: 2 << 20,
            other_taken_bytes,
            used_before_bytes: 0,
        }
    }

    #[test]
    fn memory_is_one_line_where_all_gpus_take_the_same() {
        let same = memory_text(&[memory(0, 1024), memory(1, 1024)]);
        assert_eq!(
            same,
            "memory of each GPU: weights 4.0 MiB (predicted 3.0 MiB), activations 2.0 MiB (predicted 1.5 KiB), of which \
             512 B are workspace of libraries; code, graphs and libraries 1.0 KiB\n"
        );
        let different = memory_text(&[memory(0, 1024), memory(3, 2048)]);
        assert_eq!(different.lines().count(), 2);
        assert!(different.contains("\nmemory of GPU 3: "), "{different}");
        assert!(memory_text(&[memory(0, 0)]).starts_with("memory of the GPU: "));
        assert_eq!(memory_text(&[]), "");
    }

    #[test]
    fn nothing_is_divided_by_a_time_too_short_to_measure() {
        assert_eq!([ratio(1.0, 0.5), ratio(1.0, 0.0), ratio(0.0, 0.0)], [2.0, 0.0, 0.0]);
    }

    #[test]
    fn more_than_the_roofline_is_marked() {
        assert_eq!([0.5, 1.0, 1.004, 1.3].map(share_text), ["50 %", "100 %", "100 %", "130 % !"]);
        let mut report = BenchReport {
            entry: "main".to_owned(),
            frozen: vec![],
            ranks: 1,
            threads_per_device: 1,
            runs: 1,
            runs_per_second: 1.0,
            median_seconds: 1.0,
            least_seconds: 1.0,
            p99_seconds: 1.0,
            predicted_seconds: 0.5,
            roofline_share: 0.5,
            end_to_end_median_seconds: None,
            device_memory: vec![],
            steps: vec![],
        };
        assert!(!report.text().contains(BEYOND_ROOFLINE));
        assert!(report.text().contains("of 1 run,") && report.text().contains("1 virtual device, 1 thread each"));
        let share = 2.0;
        report.steps.push(StepReport {
            program: 0,
            step: 0,
            what: "dot".to_owned(),
            origin: vec![],
            seconds: 0.1,
            operations_per_second: 0.0,
            bytes_per_second: 0.0,
            predicted_seconds: 0.2,
            roofline_share: share,
            beyond_roofline: is_beyond(share),
        });
        assert!(report.text().contains("200 % !") && report.text().contains(BEYOND_ROOFLINE), "{}", report.text());
        report.steps.clear();
        report.roofline_share = 1.2;
        assert!(report.text().contains("120 % ! of it is reached\n! more than"), "{}", report.text());
    }

    #[test]
    fn quantiles_are_measured_times() {
        let times: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(median(&times), Duration::from_millis(100));
        assert_eq!(quantile(&times, 0.99), Duration::from_millis(198));
        assert_eq!(quantile(&times[..1], 0.99), Duration::from_millis(1));
        assert_eq!(median(&[]), Duration::ZERO);
    }
}
