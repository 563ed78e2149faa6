//! Models in half types: how far they are from `f32`, on one device and on two; smaller plans; new weights in old plans.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may stop at the first surprise, in its own functions too"
)]

mod routing;

use std::fs;
use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::{DType, PlanFile, Source, Target};
use planwright::compiler::Request;
use runtime::refit::{Sources, refit};
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

use routing::{Bounds, agreement, outputs, with_choices};

/// Largest error of a row against the largest reference value.
const TOLERANCES: [(DType, f64); 3] = [(DType::F32, 1e-5), (DType::F16, 5e-3), (DType::BF16, 3e-2)];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx").join(name)
}

fn request(model: &Path, data: &TestData, dtype: Option<DType>, mesh: &str) -> Request {
    let mut request = Request::new(model, Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap());
    request.samples.clone_from(&data.inputs);
    request.options.dtype = dtype;
    request.mesh = match mesh {
        "1" => MeshChoice::Devices(1),
        mesh => MeshChoice::Fixed(parse_mesh(mesh).unwrap()),
    };
    request
}

fn write(request: &Request, path: &Path) -> Vec<u8> {
    request.compile(&mut |_, _| {}).unwrap().unwrap().write(path, |_| {}).unwrap();
    fs::read(path).unwrap()
}

/// The errors of the rows along outputs' last dimensions: each row's largest, as a share of the output's largest
/// reference value. The largest first.
fn errors(path: &Path, data: &TestData) -> Vec<f64> {
    let session = Session::load(path, Devices::Virtual).unwrap();
    let entry = &session.entries()[0];
    let names = entry.inputs.iter().map(|port| port.name.clone());
    let inputs = names.zip(data.inputs.iter().cloned()).collect();
    let outputs = session.context().unwrap().run(&entry.name, &inputs).unwrap();
    let mut errors: Vec<f64> = Vec::new();
    for ((_, actual), expected) in outputs.iter().zip(&data.outputs) {
        assert_eq!(actual.ty, expected.ty);
        let row = expected.ty.sizes().last().map_or(1, |&size| size as usize);
        let [actual, expected] = [actual, expected].map(runtime::compare::to_f64s);
        assert!(actual.iter().all(|value| value.is_finite()));
        let largest = expected.iter().fold(f64::MIN_POSITIVE, |largest: f64, value| largest.max(value.abs()));
        let rows = actual.chunks_exact(row).zip(expected.chunks_exact(row));
        errors.extend(rows.map(|(actual, expected)| {
            actual.iter().zip(expected).fold(0.0, |worst: f64, (a, b)| worst.max((a - b).abs() / largest))
        }));
    }
    errors.sort_by(|a, b| b.total_cmp(a));
    errors
}

#[test]
fn models_in_half_types_are_near_their_references() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.plan");
    let mut failures = Vec::new();
    let folders = fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<String> = folders
        .filter(|folder| folder.join("model.onnx").exists())
        .map(|folder| folder.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() > 10, "{names:?}");
    for name in &names {
        let data = TestData::read(&fixture(name).join("test_data_set_0")).unwrap();
        for (dtype, tolerance) in TOLERANCES {
            for mesh in ["1", "tensor=2", "data=2"] {
                write(&request(&fixture(name).join("model.onnx"), &data, Some(dtype), mesh), &path);
                let errors = errors(&path, &data);
                let beyond = errors.iter().filter(|&&error| error > tolerance).count();
                println!("{name:20} {dtype:4} {mesh:10} {:.1e}, {beyond} of {} rows beyond", errors[0], errors.len());
                // A token that two experts suit alike may be routed to the other one by the rounding of bf16: see below.
                let routed = name == "tiny_mixtral" && dtype == DType::BF16;
                if beyond > 0 && !routed {
                    failures.push(format!("{name} {dtype} {mesh}: {:.2e}, {beyond} rows", errors[0]));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn tokens_are_routed_alike_in_half_types() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.onnx");
    let choices = with_choices(&fixture("tiny_mixtral").join("model.onnx"), &model);
    let data = TestData::read(&fixture("tiny_mixtral").join("test_data_set_0")).unwrap();
    let run = |dtype, mesh| outputs(&request(&model, &data, dtype, mesh), &data, Devices::Virtual).unwrap();
    let expected = run(None, "1");
    assert_eq!(expected.len(), data.outputs.len() + choices);
    for (dtype, bounds) in [
        (DType::F16, Bounds { routed_alike: 1.0, first_alike: 1.0, first_alike_of_those: 1.0, error_of_those: 5e-3 }),
        (DType::BF16, Bounds { routed_alike: 0.8, first_alike: 0.8, first_alike_of_those: 0.9, error_of_those: 3e-2 }),
    ] {
        for mesh in ["1", "tensor=2", "data=2"] {
            let found = agreement(&run(Some(dtype), mesh), &expected, choices);
            println!("{dtype:4} {mesh:10} {found:?}");
            assert!(found.is_within(&bounds), "{dtype} {mesh}: {found:?}");
        }
    }
}

#[test]
fn half_types_make_half_the_plan_and_ports_stay() {
    let folder = tempfile::tempdir().unwrap();
    let name = "tiny_llama";
    let data = TestData::read(&fixture(name).join("test_data_set_0")).unwrap();
    let plan = |dtype| {
        let path = folder.path().join("model.plan");
        write(&request(&fixture(name).join("model.onnx"), &data, dtype, "1"), &path);
        PlanFile::open(&path).unwrap().into_plan()
    };
    let (single, half) = (plan(None), plan(Some(DType::BF16)));
    assert_eq!(single.manifest.entries[0].inputs, half.manifest.entries[0].inputs);
    assert_eq!(single.manifest.entries[0].outputs, half.manifest.entries[0].outputs);
    let [before, after] = [&single, &half].map(planfile::summary::summary);
    assert_eq!(before.weight_bytes.keys().copied().collect::<Vec<_>>(), ["bool", "f32"]);
    assert!(after.weight_bytes["bf16"] > 10 * after.weight_bytes["f32"], "{:?}", after.weight_bytes);
    assert!(after.image_bytes * 100 < before.image_bytes * 55, "{} of {}", after.image_bytes, before.image_bytes);
    // Already in `f32`: the type changes nothing.
    assert_eq!(plan(Some(DType::F32)), single);
}

/// Through the casts in recipes, on ranks that hold parts.
#[test]
fn new_weights_give_what_compiling_gives() {
    for (name, dtype) in [("tiny_llama", DType::BF16), ("tiny_bert", DType::F16)] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let model = path("model.onnx");
        fs::copy(fixture(name).join("model.onnx"), &model).unwrap();
        let data = TestData::read(&fixture(name).join("test_data_set_0")).unwrap();
        let old = write(&request(&model, &data, Some(dtype), "tensor=2"), &path("old.plan"));
        let plan = PlanFile::open(&path("old.plan")).unwrap().into_plan();
        // The third byte of an element is seen in any of the types.
        let cast = plan.manifest.weights.iter().filter(|weight| !weight.recipe.spec.nodes.is_empty());
        let copied = cast.flat_map(|weight| &weight.recipe.inputs).filter_map(|input| match input.source {
            Source::File { file: 0, offset } => Some(offset as usize + 2),
            _ => None,
        });
        let ranges = &plan.manifest.fingerprint.ranges;
        let is_free = |at: &usize| !ranges.iter().any(|range| (range.first..range.end).contains(&(*at as u64)));
        let copied: Vec<usize> = copied.filter(is_free).collect();
        assert!(copied.len() > 4, "{name}: {copied:?}");
        let mut bytes = fs::read(&model).unwrap();
        for at in copied {
            bytes[at] ^= 1;
        }
        fs::write(&model, bytes).unwrap();
        let sources = Sources { weights: folder.path(), external_data_root: None };
        refit(plan, sources, &path("new.plan"), |_| {}).unwrap();
        let compiled = write(&request(&model, &data, Some(dtype), "tensor=2"), &path("compiled.plan"));
        assert!(compiled != old, "{name}: the change is not seen");
        assert!(fs::read(path("new.plan")).unwrap() == compiled, "{name}");
    }
}
