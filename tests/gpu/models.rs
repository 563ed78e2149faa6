//! Every model on 1, 2 and 4 GPUs, as far as there are, in three types, against references and against the CPU.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use passes::shard::{MeshChoice, parse_mesh};
use planfile::{DType, Target, Tensor};
use planwright::compiler::Request;
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

use crate::error;

/// Largest error of `f32` models, as a share of the largest reference value.
const TOLERANCE: f64 = 1e-4;

/// Models with sample inputs and references, those that `fixtures/fetch.py` brings included.
fn models() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut found = Vec::new();
    for folder in ["onnx", "fetched"] {
        let Ok(entries) = fs::read_dir(root.join(folder)) else { continue };
        for entry in entries.map(Result::unwrap) {
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            if path.join("model.onnx").is_file() && path.join("test_data_set_0").is_dir() {
                found.push((name, path));
            }
        }
    }
    found.sort();
    found
}

/// What outputs may be off the `f32` reference: for half types it is the model's own rounding, not the devices'.
fn tolerance(name: &str, dtype: Option<DType>) -> f64 {
    match (dtype, name) {
        (None | Some(DType::F32), _) => TOLERANCE,
        // A last sigmoid of sums as large as 130, whose rounding moves whole edges of the map.
        (_, "ppocr_det") => 5e-1,
        // Tokens are routed to other experts where two are nearly as good: some rows are another expert's.
        (Some(DType::BF16), "tiny_mixtral") => 1.0,
        (Some(DType::BF16), _) => 1e-1,
        (Some(_), _) => 3e-2,
    }
}

/// What outputs may be off the same plan's on the CPU: half types round where they are stored, and deep networks amplify
/// that.
fn tolerance_from_cpu(name: &str, dtype: Option<DType>) -> f64 {
    match (dtype, name) {
        // As above: edges of the map, and tokens that are routed elsewhere.
        (Some(_), "ppocr_det") | (Some(DType::BF16), "tiny_mixtral") => tolerance(name, dtype),
        (Some(DType::BF16), _) => 3e-2,
        (Some(DType::F16), _) => 5e-3,
        _ => TOLERANCE,
    }
}

struct Row {
    /// Against the reference.
    error: f64,
    /// Against the same plan on virtual devices.
    from_cpu: f64,
}

fn run(folder: &Path, data: &TestData, mesh: &MeshChoice, dtype: Option<DType>) -> Result<Row, String> {
    let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
    let mut request = Request::new(&folder.join("model.onnx"), target);
    request.samples.clone_from(&data.inputs);
    request.mesh = mesh.clone();
    // Tables are split, too.
    request.split_table_bytes = 1 << 10;
    request.options.dtype = dtype;
    let compiled = request.compile(&mut |_, _| {}).map_err(|error| error.to_string())?.unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("model.plan");
    compiled.write(&path, |_| {}).map_err(|error| error.to_string())?;
    let outputs = |devices: Devices, runs: u32| -> Result<Vec<Vec<(String, Tensor)>>, String> {
        let session = Session::load(&path, devices).map_err(|error| error.to_string())?;
        let entry = &session.entries()[0];
        let names = entry.inputs.iter().map(|port| port.name.clone());
        let inputs: BTreeMap<String, Tensor> = names.zip(data.inputs.iter().cloned()).collect();
        let mut context = session.context().map_err(|error| error.to_string())?;
        (0..runs).map(|_| context.run(&entry.name, &inputs).map_err(|error| error.to_string())).collect()
    };
    let on_gpu = outputs(Devices::Cuda { ordinals: None }, 3)?;
    let [first, rest @ ..] = on_gpu.as_slice() else { panic!("it was run three times") };
    if rest.iter().any(|again| again != first) {
        return Err("results differ from run to run".to_owned());
    }
    let on_cpu = outputs(Devices::Virtual, 1)?.remove(0);
    let worst = |errors: Vec<f64>| errors.into_iter().fold(0.0, f64::max);
    let reference = first.iter().zip(&data.outputs).map(|((_, actual), expected)| error(actual, expected)).collect();
    let host = first.iter().zip(&on_cpu).map(|((_, actual), (_, expected))| error(actual, expected)).collect();
    Ok(Row { error: worst(reference), from_cpu: worst(host) })
}

/// On the mesh that is best by prediction, which is often one without any exchange, and on meshes that must exchange.
/// `MODELS_ONLY=part_of_a_name` picks some models.
fn check(gpus: u32, meshes: &[&str]) {
    let chosen = [(format!("{gpus} GPUs"), MeshChoice::Devices(gpus))];
    let fixed = meshes.iter().map(|mesh| ((*mesh).to_owned(), MeshChoice::Fixed(parse_mesh(mesh).unwrap())));
    let meshes: Vec<(String, MeshChoice)> = chosen.into_iter().chain(fixed).collect();
    let part = std::env::var("MODELS_ONLY").unwrap_or_default();
    let mut failures = Vec::new();
    println!("model                    mesh                    type     off the reference   off the CPU");
    for (name, folder) in models().iter().filter(|(name, _)| name.contains(&part)) {
        let data = TestData::read(&folder.join("test_data_set_0")).unwrap();
        for (mesh, choice) in &meshes {
            for dtype in [None, Some(DType::F16), Some(DType::BF16)] {
                let label = dtype.map_or("as it is", DType::name);
                match run(folder, &data, choice, dtype) {
                    Ok(Row { error, from_cpu }) => {
                        println!("{name:24} {mesh:23} {label:8} {error:17.1e} {from_cpu:13.1e}");
                        if error > tolerance(name, dtype) {
                            failures.push(format!("{name} {mesh} {label}: {error:.1e} off the reference"));
                        }
                        if from_cpu > tolerance_from_cpu(name, dtype) {
                            failures.push(format!("{name} {mesh} {label}: {from_cpu:.1e} off the CPU"));
                        }
                    }
                    Err(why) => {
                        println!("{name:24} {mesh:23} {label:8} FAILED {why}");
                        failures.push(format!("{name} {mesh} {label}: {why}"));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90, cuBLASLt, cuDNN and NVRTC"]
fn models_on_one_gpu() {
    check(1, &[]);
}

#[test]
#[ignore = "needs 2 CUDA GPUs of architecture sm_90, cuBLASLt, cuDNN, NCCL and NVRTC"]
fn models_on_two_gpus() {
    check(2, &["tensor=2", "pipe=2"]);
}

#[test]
#[ignore = "needs 4 CUDA GPUs of architecture sm_90, cuBLASLt, cuDNN, NCCL and NVRTC"]
fn models_on_four_gpus() {
    check(4, &["tensor=4", "data=2,tensor=2", "data=2,pipe=2"]);
}
