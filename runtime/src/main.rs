//! The binary `plan`: runs, times, checks, inspects, verifies, compares and refits plans, and examines a machine.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use planfile::trust::{Trusted, trusted};
use planfile::{PlanError, PlanFile, diff, replace};
use runtime::cli::{
    Allocator, BenchFlags, Data, DeviceFlags, Exit, Failure, Program, Shell, ToleranceFlags, bench, bytes_bar, check,
    completions, doctor, finish, parse, print, print_json, run, start, start_threads, summary_text, warn,
};
use runtime::refit::{Sources, refit};
use runtime::tensor_file::TestData;
use serde_json::json;

/// Runs, times, inspects, verifies, compares and refits plans that `compile` wrote.
#[derive(Parser)]
#[command(name = "plan", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a plan on GPUs or on virtual devices, one per rank
    Run {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// Which entry; needed where there are several
        #[arg(long, value_name = "NAME")]
        entry: Option<String>,
        /// Inputs by name, frozen ones may be left out; without them or --test-data, random ones: floating point in
        /// [-1, 1), integers 0 or 1, frozen inputs at their value
        #[arg(long, value_name = "FILE.npz", conflicts_with = "test_data")]
        inputs: Option<PathBuf>,
        /// Where to write the outputs
        #[arg(long, value_name = "FILE.npz")]
        outputs: Option<PathBuf>,
        /// Folder with input_0.pb, … and output_0.pb, … to compare with
        #[arg(long, value_name = "DIR")]
        test_data: Option<PathBuf>,
        #[command(flatten)]
        tolerance: ToleranceFlags,
        #[command(flatten)]
        devices: DeviceFlags,
        /// The report for programs
        #[arg(long)]
        json: bool,
    },
    /// Times runs of a plan: median, least, 99th percentile
    Bench {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// Which entry; needed where there are several
        #[arg(long, value_name = "NAME")]
        entry: Option<String>,
        /// Inputs by name; without them, random ones as for `run`
        #[arg(long, value_name = "FILE.npz")]
        inputs: Option<PathBuf>,
        #[command(flatten)]
        flags: BenchFlags,
        #[command(flatten)]
        devices: DeviceFlags,
        /// The report for programs
        #[arg(long)]
        json: bool,
    },
    /// Runs each step on GPUs and compares it with its specification on the CPU, on the same operands
    Check {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// Which entry; needed where there are several
        #[arg(long, value_name = "NAME")]
        entry: Option<String>,
        /// Inputs by name; without them or --test-data, random ones as for `run`
        #[arg(long, value_name = "FILE.npz", conflicts_with = "test_data")]
        inputs: Option<PathBuf>,
        /// Folder with input_0.pb, …
        #[arg(long, value_name = "DIR")]
        test_data: Option<PathBuf>,
        /// A plan of the same model, such as one in f32, that the CPU runs: how far the outputs are from its
        #[arg(long, value_name = "OTHER.plan")]
        reference: Option<PathBuf>,
        #[command(flatten)]
        tolerance: ToleranceFlags,
        #[command(flatten)]
        devices: DeviceFlags,
        /// The report for programs
        #[arg(long)]
        json: bool,
    },
    /// Shows driver, libraries and GPUs, what is missing and how to get it
    Doctor {
        /// The report for programs
        #[arg(long)]
        json: bool,
    },
    /// Shows signature, memory per device and steps, and why it is placed so
    Inspect {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// The summary for programs
        #[arg(long, conflicts_with = "text")]
        json: bool,
        /// All of the plan, one fact a line
        #[arg(long)]
        text: bool,
    },
    /// Checks every hash, bound, order and collective
    Verify {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// The verdict for programs
        #[arg(long)]
        json: bool,
    },
    /// Shows what differs between two plans; ends with 1 if anything does
    Diff {
        /// A plan
        #[arg(value_name = "OLD.plan")]
        before: PathBuf,
        /// The plan to compare it with
        #[arg(value_name = "NEW.plan")]
        after: PathBuf,
        /// The differences for programs
        #[arg(long)]
        json: bool,
    },
    /// Puts new weights of the same graph into a plan, as compiling the new model would
    Refit {
        /// The plan
        #[arg(value_name = "MODEL.plan")]
        plan: PathBuf,
        /// The new model file, or its folder; external data beside it, all of the same sizes as before
        #[arg(long, value_name = "MODEL.onnx|DIR")]
        weights: PathBuf,
        /// Where the new plan goes; may be the old one
        #[arg(short, long, value_name = "OUT.plan")]
        output: PathBuf,
        /// External data may also lie below this folder, links included
        #[arg(long, value_name = "DIR")]
        external_data_root: Option<PathBuf>,
    },
    /// Prints a script that completes this command line
    Completions {
        /// Which shell
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    start();
    finish(execute(parse::<Arguments>(Program::Plan).command))
}

fn execute(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Run { plan, entry, inputs, outputs, test_data, tolerance, devices, json } => {
            // Before the work, so that a wrong path does not cost it.
            outputs.as_deref().map(replace::check).transpose()?;
            let test_data = test_data.map(|folder| TestData::read(&folder)).transpose()?;
            let data = match (&inputs, &test_data) {
                (Some(path), _) => Data::Npz(path),
                (None, Some(data)) => Data::TestData(data),
                (None, None) => Data::Random,
            };
            let file = PlanFile::open(&plan)?;
            let report = run(file, entry.as_deref(), data, outputs.as_deref(), tolerance, &devices)?;
            if json { print_json(&json!(report)) } else { print(&report.text()) }?;
            Ok(report.exit())
        }
        Command::Bench { plan, entry, inputs, flags, devices, json } => {
            let data = inputs.as_deref().map_or(Data::Random, Data::Npz);
            let report = bench(PlanFile::open(&plan)?, entry.as_deref(), data, &devices, flags)?;
            if json { print_json(&json!(report)) } else { print(&report.text()) }?;
            Ok(Exit::Success)
        }
        Command::Check { plan, entry, inputs, test_data, reference, tolerance, devices, json } => {
            let test_data = test_data.map(|folder| TestData::read(&folder)).transpose()?;
            let data = match (&inputs, &test_data) {
                (Some(path), _) => Data::Npz(path),
                (None, Some(data)) => Data::TestData(data),
                (None, None) => Data::Random,
            };
            let reference = reference.map(|path| PlanFile::open(&path)).transpose()?;
            let report = check(PlanFile::open(&plan)?, entry.as_deref(), data, tolerance, &devices, reference)?;
            if json { print_json(&json!(report)) } else { print(&report.text()) }?;
            Ok(report.exit())
        }
        Command::Doctor { json } => {
            let report = doctor();
            if json { print_json(&json!(report)) } else { print(&report.text()) }?;
            Ok(report.exit())
        }
        Command::Inspect { plan, json, text } => {
            let file = PlanFile::open(&plan)?;
            let summary = planfile::summary::summary(file.plan());
            match (json, text) {
                (true, _) => {
                    let mut report = json!(summary);
                    report["sharding"] = json!(file.plan().explanations.sharding);
                    report["alternatives"] = json!(file.plan().explanations.alternatives);
                    print_json(&report)
                }
                (false, true) => print(&planfile::text::text(file.plan())),
                (false, false) => {
                    let why = file.plan().explanations.sharding.iter().map(|sentence| format!("{sentence}\n"));
                    print(&format!("{}{}", summary_text(&summary), why.collect::<String>()))
                }
            }?;
            Ok(Exit::Success)
        }
        Command::Verify { plan, json } => match verify(&plan) {
            Ok((bytes, trusted)) => {
                if json {
                    print_json(&json!({ "sound": true, "bytes": bytes, "trusted": trusted }))
                } else {
                    let lines: String = trusted.iter().map(|trusted| format!("  {trusted}\n")).collect();
                    let plan = plan.display();
                    print(&format!(
                        "{plan} is sound: every byte matches its hash, and the plan holds together\ntaken on trust:\n{lines}"
                    ))
                }?;
                Ok(Exit::Success)
            }
            Err(error @ (PlanError::Io { .. } | PlanError::NotAFile { .. } | PlanError::Memory { .. })) => {
                Err(error.into())
            }
            Err(error) if json => {
                print_json(&json!({ "sound": false, "error": error.to_string() }))?;
                Ok(Exit::Beyond)
            }
            Err(error) => Err(Failure::new(Exit::Beyond, error)),
        },
        Command::Diff { before, after, json } => {
            let (before, after) = (PlanFile::open(&before)?, PlanFile::open(&after)?);
            let mut found = diff::diff(before.plan(), after.plan());
            diff::values(&before, &after, &mut found)?;
            if json { print_json(&json!(found)) } else { print(&found.text()) }?;
            Ok(if found.same { Exit::Success } else { Exit::Beyond })
        }
        Command::Refit { plan, weights, output, external_data_root } => {
            start_threads()?;
            let plan = PlanFile::open(&plan)?.into_plan();
            if external_data_root.is_some() && plan.manifest.files.len() < 2 {
                warn("--external-data-root has no effect: the plan was made from no external data");
            }
            let sources = Sources { weights: &weights, external_data_root: external_data_root.as_deref() };
            let bar = bytes_bar("writing weights", plan.manifest.image_bytes);
            refit(plan, sources, &output, |done| bar.set_position(done))?;
            bar.finish_and_clear();
            print(&format!("wrote {}\n", output.display()))?;
            Ok(Exit::Success)
        }
        Command::Completions { shell } => {
            print(&completions(shell, Arguments::command()))?;
            Ok(Exit::Success)
        }
    }
}

/// Checks the whole file; its length in bytes, and what no check vouches for.
fn verify(path: &std::path::Path) -> Result<(u64, Vec<Trusted>), PlanError> {
    let file = PlanFile::open(path)?;
    let length = file.span(planfile::container::Section::Weights);
    let total = length.offset.saturating_add(length.bytes);
    let bar = bytes_bar("verifying", total);
    file.verify_all(|done| bar.set_position(done))?;
    bar.finish_and_clear();
    Ok((total, trusted(file.plan())))
}

#[cfg(test)]
mod tests {
    use runtime::cli::{described, undescribed};

    use super::*;

    #[test]
    fn every_argument_is_described() {
        assert_eq!(undescribed(&described(Arguments::command(), Program::Plan)), Vec::<String>::new());
    }
}
