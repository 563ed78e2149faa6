//! The binary `compile`: command line and reporting.

mod arguments;
mod support;

use std::process::ExitCode;
use std::time::Instant;

use clap::CommandFactory;
use cpu::CpuError;
use cpu::recipe::RecipeError;
use onnx::OnnxError;
use passes::compile::Warning;
use passes::error::PassError;
use passes::shard::IdleAxis;
use planfile::summary::summary;
use planfile::{PlanFile, replace};
use planwright::compiler::{CompileError, Compiled, Request};
use runtime::cli::{
    Allocator, Data, DeviceFlags, Exit, Failure, Program, bytes_bar, completions, exit_of_io, finish, parse, print,
    print_json, run, spinner, start, start_threads, summary_text, warn,
};
use runtime::image::ImageError;
use runtime::tensor_file::TestData;
use serde_json::{Value, json};

use crate::arguments::Arguments;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    start();
    finish(execute(&parse(Program::Compile)))
}

fn execute(arguments: &Arguments) -> Result<Exit, Failure> {
    if let Some(shell) = arguments.completions {
        print(&completions(shell, Arguments::command()))?;
        return Ok(Exit::Success);
    }
    start_threads()?;
    let start = Instant::now();
    let path = arguments.output()?;
    if !arguments.check_support && arguments.stop_after.is_none() {
        replace::check(&path)?;
    }
    let like = arguments.like.as_deref().map(TestData::read).transpose()?;
    // Read before the work, as the place of the plan is looked at, so that a wrong path does not cost it.
    let test_data = arguments.test_data.as_deref().map(TestData::read).transpose()?;
    let request = arguments.request(like.as_ref())?;
    if arguments.check_support {
        return support::check(&request, arguments.json);
    }
    let Some(compiled) = compile(arguments, &request)? else { return Ok(Exit::Success) };
    report_warnings(&compiled.mesh_warnings, arguments.strict_mesh)?;
    compiled.warnings.iter().for_each(|warning| warn(warning));
    let bar = bytes_bar("writing weights", compiled.plan.manifest.image_bytes);
    compiled.write(&path, |done| bar.set_position(done)).map_err(failure)?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let summary = summary(&compiled.plan);
    if !arguments.json {
        print(&summary_text(&summary))?;
        let warned: Vec<String> =
            compiled.mesh_warnings.iter().filter(|own| is_warned(own)).map(Warning::text).collect();
        let sentences = compiled.plan.explanations.sharding.iter().filter(|sentence| !warned.contains(sentence));
        print(&sentences.map(|sentence| format!("{sentence}\n")).collect::<String>())?;
        print(&format!("wrote {} in {seconds:.2} s\n", path.display()))?;
    }
    let report = match arguments.run {
        false => None,
        true => {
            let data = test_data.as_ref().or(like.as_ref()).map_or(Data::Random, Data::TestData);
            let devices = DeviceFlags { devices: arguments.devices.clone(), ..DeviceFlags::default() };
            Some(run(PlanFile::open(&path)?, None, data, None, arguments.tolerance, &devices)?)
        }
    };
    if arguments.json {
        let explanations = &compiled.plan.explanations;
        let all = json!({
            "path": path.to_string_lossy(), "seconds": seconds, "plan": summary, "sharding": explanations.sharding,
            "alternatives": explanations.alternatives, "run": report,
            "warnings": warnings_json(&compiled),
        });
        print_json(&all)?;
    } else if let Some(report) = &report {
        print(&format!("\n{}", report.text()))?;
    }
    Ok(report.map_or(Exit::Success, |report| report.exit()))
}

/// Compiles; `None` when told to stop early. Shows modules that are asked for.
fn compile(arguments: &Arguments, request: &Request) -> Result<Option<Compiled>, Failure> {
    let spinner = spinner();
    spinner.set_message("import");
    let shown = arguments.print_after.as_deref().or(arguments.stop_after.as_deref());
    let mut printed = Ok(());
    let compiled = request.compile(&mut |pass, module| {
        spinner.set_message(format!("after {pass}"));
        if shown == Some(pass) && printed.is_ok() {
            printed = spinner.suspend(|| print(&module.to_string()));
        }
    });
    spinner.finish_and_clear();
    printed?;
    compiled.map_err(failure)
}

/// Says on standard error what the user may not have meant.
///
/// # Errors
/// Where `strict`, an axis of the mesh that splits nothing.
fn report_warnings(warnings: &[Warning], strict: bool) -> Result<(), Failure> {
    for warning in warnings.iter().filter(|warning| is_warned(warning)) {
        if strict {
            let next = "choose another --mesh, or leave --strict-mesh out";
            return Err(Failure::new(Exit::Usage, format!("--mesh: {}; {next}", warning.text())));
        }
        warn(&warning.text());
    }
    Ok(())
}

/// Whether standard error says it. All of them stand in the plan's explanations; the others follow the summary.
fn is_warned(warning: &Warning) -> bool {
    matches!(warning, Warning::IdleAxis(_))
}

/// Those about the mesh first.
fn warnings_json(compiled: &Compiled) -> Vec<Value> {
    let other = compiled.warnings.iter().map(|text| json!({ "kind": "other", "text": text }));
    compiled.mesh_warnings.iter().map(warning_json).chain(other).collect()
}

fn warning_json(warning: &Warning) -> Value {
    let text = warning.text();
    match warning {
        Warning::IdleAxis(IdleAxis { axis, size, ways, why }) => {
            json!({ "kind": "idle_axis", "axis": axis, "size": size, "ways": ways, "why": why, "text": text })
        }
        Warning::Slower { ranks, predicted_ns, one_device_ns } => {
            json!({
                "kind": "slower", "ranks": ranks, "predicted_ns": predicted_ns, "one_device_ns": one_device_ns,
                "text": text,
            })
        }
    }
}

/// Whose fault it is.
fn failure(error: CompileError) -> Failure {
    let exit = match error {
        CompileError::Plan(error) | CompileError::Image(ImageError::Sink(error)) => return written(error),
        CompileError::Model(ref error) => model_exit(error),
        CompileError::Pass(ref error) => match error {
            PassError::Unsupported { .. } | PassError::NoKernels(_) => Exit::Invalid,
            PassError::UnknownPass { .. } => Exit::Usage,
            PassError::Weights { source, .. } => recipe_exit(source),
            PassError::Assemble { .. } => Exit::Machine,
            PassError::Invalid { .. } | PassError::Ir(_) => Exit::Internal,
        },
        CompileError::Image(ImageError::Recipe { ref source, .. }) => recipe_exit(source),
        CompileError::Image(ImageError::Layout { .. }) => Exit::Internal,
        CompileError::Samples { .. } => Exit::Invalid,
    };
    Failure::new(exit, error)
}

/// A plan that does not verify before it is written is our bug, not the user's plan.
fn written(error: planfile::PlanError) -> Failure {
    match error {
        planfile::PlanError::Invalid(_) => Failure::new(Exit::Internal, error),
        error => error.into(),
    }
}

fn model_exit(error: &OnnxError) -> Exit {
    match error {
        OnnxError::Io { source, .. } => exit_of_io(source),
        OnnxError::NotAFile { .. }
        | OnnxError::MissingWeights { .. }
        | OnnxError::AbsentFile { .. }
        | OnnxError::FileChanged { .. } => Exit::File,
        OnnxError::Binding(_) | OnnxError::UnboundDims(_) => Exit::Usage,
        _ => Exit::Invalid,
    }
}

fn recipe_exit(error: &RecipeError) -> Exit {
    match error {
        error if error.is_memory() => Exit::Invalid,
        RecipeError::Read(_) => Exit::File,
        // What the model's own constants ask for: an index beyond its table, an operator on a type that has none.
        RecipeError::Evaluate(CpuError::Index { .. } | CpuError::Unsupported { .. }) => Exit::Invalid,
        RecipeError::Malformed(_)
        | RecipeError::Region { .. }
        | RecipeError::Memory { .. }
        | RecipeError::Evaluate(_) => Exit::Internal,
    }
}
