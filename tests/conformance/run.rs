//! Compiles and runs one case.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use onnx::OnnxError;
use passes::error::PassError;
use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::plan::{Action, Plan};
use planfile::{DType, Target, Tensor};
use planwright::compiler::{CompileError, Request};
use runtime::compare::{Elements, Tolerance, compare};
use runtime::tensor_file::TestData;
use runtime::tensor_proto::read_tensor_proto;
use runtime::{Devices, Session};

use crate::table::{Case, DEVICES, Outcome, Row, Status, Way};
use crate::{errata, weights};

/// Characters of a reason that are kept.
const REASON_CHARS: usize = 200;

thread_local! {
    /// Where the last panic of this thread was.
    static PANIC_PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// The folder of the cases.
pub(crate) fn suite() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fetched/onnx_node")
}

/// From now on a panic is noted for its case, not printed.
pub(crate) fn record_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|place| format!("{}:{}", place.file(), place.line()));
        PANIC_PLACE.with(|slot| *slot.borrow_mut() = place.unwrap_or_default());
    }));
}

/// Runs a core case in every way of [`DEVICES`]; the others in none.
pub(crate) fn row(case: &Case) -> Row {
    let mut outcomes = Vec::new();
    if case.is_core() {
        let folder = suite().join(&case.name);
        match test_data(case) {
            Err(reason) => outcomes.push(Outcome { status: Status::Failed, reason: shorten(&reason) }),
            Ok(data) => {
                for (label, way) in DEVICES {
                    let outcome = attempt(label, || run_way(way, &folder, &data));
                    let passed = outcome.status == Status::Passed;
                    outcomes.push(outcome);
                    // What is not right on one device has nothing to show on two.
                    if way == Way::One && !passed {
                        break;
                    }
                }
            }
        }
    }
    outcomes.resize(DEVICES.len(), Outcome { status: Status::NotRun, reason: String::new() });
    Row { case: case.clone(), outcomes }
}

/// What `work` came to, panics included; a fault names the way it happened in.
fn attempt(label: &str, work: impl FnOnce() -> Result<Status, Fault>) -> Outcome {
    let (status, reason) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(status)) => (status, String::new()),
        Ok(Err(Fault { status, reason })) => (status, reason),
        Err(panic) => (Status::Failed, panic_message(panic.as_ref())),
    };
    let first = label == DEVICES[0].0 || reason.is_empty();
    Outcome { status, reason: shorten(&if first { reason } else { format!("{label}: {reason}") }) }
}

/// Compiles and runs a case in one of the ways.
fn run_way(way: Way, folder: &Path, data: &TestData) -> Result<Status, Fault> {
    let model = folder.join("model.onnx");
    let rank = data.inputs.iter().map(|input| input.ty.rank()).max().unwrap_or(0);
    let splits = match way {
        Way::One => return run(&model, data, MeshChoice::Devices(1), 0).map(|_| Status::Passed),
        Way::Tensor => vec![run(&model, data, two("tensor"), 0)?],
        Way::Batch => vec![run(&model, data, two("data"), 0)?],
        Way::OtherDims => (1..rank).map(|dim| run(&model, data, two("data"), dim)).collect::<Result<Vec<_>, _>>()?,
        Way::Weights => {
            let mut splits = Vec::new();
            for chosen in weights::choices(data) {
                let fixed = weights::fix(folder, data, &chosen).map_err(failed)?;
                splits.push(run(&fixed.model(), &fixed.data, two("tensor"), 0)?);
            }
            splits
        }
    };
    Ok(if splits.contains(&true) {
        Status::Passed
    } else if splits.is_empty() {
        Status::NotRun
    } else {
        Status::Whole
    })
}

/// Two devices along an axis of the mesh.
fn two(axis: &str) -> MeshChoice {
    MeshChoice::Fixed(parse_mesh(&format!("{axis}=2")).unwrap())
}

/// What a case is run with and held to. Unlike models, cases may have no inputs at all.
fn test_data(case: &Case) -> Result<TestData, String> {
    let TestData { inputs, outputs } = published(&case.name)?;
    Ok(TestData { inputs, outputs: errata::corrected(&case.name, outputs)? })
}

fn published(case: &str) -> Result<TestData, String> {
    let folder = suite().join(case).join("test_data_set_0");
    let tensors = |kind: &str| {
        let paths = (0..).map(|number| folder.join(format!("{kind}_{number}.pb")));
        let tensors = paths.take_while(|path| path.exists()).map(|path| read_tensor_proto(&path));
        tensors.collect::<Result<Vec<Tensor>, _>>().map_err(|error| error.to_string())
    };
    Ok(TestData { inputs: tensors("input")?, outputs: tensors("output")? })
}

/// Whether the published values of a case would be told from those that it is held to.
pub(crate) fn needs_its_erratum(case: &str) -> Result<bool, String> {
    let published = published(case)?.outputs;
    let corrected = errata::corrected(case, published.clone())?;
    Ok(corrected.iter().zip(&published).any(|(corrected, published)| check(corrected, published).is_err()))
}

struct Fault {
    status: Status,
    reason: String,
}

/// Anything that is no refusal.
fn failed(reason: impl ToString) -> Fault {
    Fault { status: Status::Failed, reason: reason.to_string() }
}

fn refused_or_failed(error: &CompileError) -> Fault {
    let status = match error {
        CompileError::Model(OnnxError::Unsupported(_) | OnnxError::Opset { .. })
        | CompileError::Pass(PassError::Unsupported { .. }) => Status::Unsupported,
        _ => Status::Failed,
    };
    Fault { status, reason: error.to_string() }
}

/// Two units in the last place for half types, the tolerance of ONNX's own runner for the others.
fn tolerance(dtype: DType) -> Tolerance {
    let elements = match dtype {
        DType::F16 => Elements { relative: 2e-3, absolute: 1e-5 },
        DType::BF16 => Elements { relative: 1.6e-2, absolute: 1e-5 },
        DType::F32 | DType::F64 => Elements { relative: 1e-3, absolute: 1e-7 },
        _ => Elements { relative: 0.0, absolute: 0.0 },
    };
    elements.into()
}

/// What a case is compiled for, and run on.
#[derive(Clone)]
struct Machine {
    target: Target,
    devices: Devices,
}

/// One CUDA device.
fn gpu() -> Machine {
    let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
    Machine { target, devices: Devices::Cuda { ordinals: None } }
}

/// Runs a core case on one CUDA device.
pub(crate) fn on_gpu(case: &Case) -> Outcome {
    let folder = suite().join(&case.name);
    let run = |data: &TestData| run_on(&gpu(), &folder.join("model.onnx"), data, MeshChoice::Devices(1), 0);
    match test_data(case) {
        Err(reason) => Outcome { status: Status::Failed, reason: shorten(&reason) },
        Ok(data) => attempt(DEVICES[0].0, || run(&data).map(|_| Status::Passed)),
    }
}

/// Virtual devices whose links cost nothing, so that even a small tensor is worth splitting.
fn target() -> Target {
    let mut target = Target::from_json(include_str!("../../fixtures/targets/cpu.json")).unwrap();
    for link in &mut target.links {
        link.latency_ns = 0.0;
        link.bytes_per_second = 1e18;
    }
    target
}

/// Whether something was split, on virtual devices.
fn run(model: &Path, data: &TestData, mesh: MeshChoice, batch_dim: usize) -> Result<bool, Fault> {
    run_on(&Machine { target: target(), devices: Devices::Virtual }, model, data, mesh, batch_dim)
}

/// Whether something was split.
fn run_on(machine: &Machine, model: &Path, data: &TestData, mesh: MeshChoice, batch_dim: usize) -> Result<bool, Fault> {
    let mut request = Request::new(model, machine.target.clone());
    request.samples.clone_from(&data.inputs);
    request.mesh = mesh;
    request.split_table_bytes = 0;
    request.batch_dim = batch_dim;
    let compiled = request.compile(&mut |_, _| {}).map_err(|error| refused_or_failed(&error))?;
    let compiled = compiled.ok_or_else(|| failed("no plan was made"))?;
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("model.plan");
    compiled.write(&path, |_| {}).map_err(|error| refused_or_failed(&error))?;
    let session = Session::load(&path, machine.devices.clone()).map_err(failed)?;
    let entry = session.entries().first().ok_or_else(|| failed("the plan has no entry"))?;
    if entry.inputs.len() != data.inputs.len() {
        return Err(failed(format!("the entry has {} inputs, not {}", entry.inputs.len(), data.inputs.len())));
    }
    let names = entry.inputs.iter().map(|port| port.name.clone());
    let inputs = names.zip(data.inputs.iter().cloned()).collect();
    let mut context = session.context().map_err(failed)?;
    let outputs = context.run(&entry.name, &inputs).map_err(failed)?;
    if outputs.len() != data.outputs.len() {
        return Err(failed(format!("{} outputs, not {}", outputs.len(), data.outputs.len())));
    }
    for ((name, actual), expected) in outputs.iter().zip(&data.outputs) {
        check(actual, expected).map_err(|why| failed(format!("output `{name}` {why}")))?;
    }
    Ok(is_split(session.plan()))
}

fn check(actual: &Tensor, expected: &Tensor) -> Result<(), String> {
    let comparison = compare(actual, expected, tolerance(expected.ty.dtype))?;
    let exact = !expected.ty.dtype.is_float();
    if comparison.beyond > 0 || (exact && actual.data.bytes() != expected.data.bytes()) {
        let (beyond, ty, error) = (comparison.beyond, &expected.ty, comparison.max_error);
        let worst = comparison.worst.map(|worst| format!("{} for {}", worst.actual, worst.expected));
        let worst = worst.unwrap_or_default();
        return Err(format!("{ty} differs in {beyond} elements, by {error:.1e} at most ({worst})"));
    }
    Ok(())
}

fn is_split(plan: &Plan) -> bool {
    let bound = |program: &planfile::plan::Program| {
        let mut bindings = program.inputs.iter().chain(&program.outputs);
        bindings.any(|binding| !binding.splits.is_empty())
            || program.steps.iter().any(|step| matches!(step.action, Action::Collective { .. }))
    };
    plan.programs.iter().any(bound) || plan.manifest.placed.iter().any(|placed| !placed.splits.is_empty())
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let place = PANIC_PLACE.with(|slot| slot.borrow().clone());
    format!("PANIC at {place}: {}", text.unwrap_or("?"))
}

/// One line without paths of this machine, cut to [`REASON_CHARS`] unless cases were picked by hand.
fn shorten(reason: &str) -> String {
    let line = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    let root = format!("{}/", env!("CARGO_MANIFEST_DIR"));
    let line = line.replace(&root, "");
    if std::env::var_os("CONFORMANCE_ONLY").is_some() { line } else { line.chars().take(REASON_CHARS).collect() }
}
