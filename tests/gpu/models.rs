//! Every model on 1, 2 and 4 GPUs, as far as there are, in three types, against references and against the CPU.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::{DType, Target, Tensor};
use planwright::compiler::Request;
use runtime::compare::to_f64s;
use runtime::tensor_file::TestData;
use runtime::{Devices, Session};

use crate::error;
use crate::routing::{Agreement, Bounds, agreement, outputs, with_choices};

/// Largest error of `f32` models, as a share of the largest reference value.
const TOLERANCE: f64 = 1e-4;

/// How far outputs are off others, or may be.
#[derive(Clone, Copy, Default)]
struct Difference {
    /// The largest, as a share of the largest value.
    largest: f64,
    /// The norm of all differences, as a share of the norm of all values.
    norm: f64,
}

impl Difference {
    fn between(actual: &Tensor, expected: &Tensor) -> Self {
        let largest = error(actual, expected);
        let [actual, expected] = [actual, expected].map(to_f64s);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        // What both have, NaN and infinities included, is no difference.
        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
        let off = norm(&mut actual.iter().zip(&expected).map(|(&a, &b)| if same(a, b) { 0.0 } else { a - b }));
        let all = norm(&mut expected.iter().copied().filter(|value| value.is_finite()));
        Self { largest, norm: if off == 0.0 { 0.0 } else { off / all.max(f64::MIN_POSITIVE) } }
    }

    /// Of the worse one of each; what is no number is worst.
    fn worse(self, other: Self) -> Self {
        let worse = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        Self { largest: worse(self.largest, other.largest), norm: worse(self.norm, other.norm) }
    }

    fn exceeds(self, bound: Self) -> bool {
        // A comparison that NaN does not pass.
        !(self.largest <= bound.largest && self.norm <= bound.norm)
    }
}

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
fn tolerance(name: &str, dtype: Option<DType>) -> Difference {
    let both = |bound| Difference { largest: bound, norm: bound };
    match (dtype, name) {
        (None | Some(DType::F32), _) => both(TOLERANCE),
        // A last sigmoid of sums as large as 130, whose rounding moves whole edges of the map.
        (_, "ppocr_det") => Difference { largest: 5e-1, norm: 5e-2 },
        (Some(DType::BF16), _) => both(1e-1),
        (Some(_), _) => both(3e-2),
    }
}

/// What outputs may be off the same plan's on the CPU: half types round where they are stored, and deep networks amplify
/// that.
fn tolerance_from_cpu(name: &str, dtype: Option<DType>) -> Difference {
    let both = |bound| Difference { largest: bound, norm: bound };
    match (dtype, name) {
        // As above: edges of the map.
        (Some(_), "ppocr_det") => tolerance(name, dtype),
        (Some(DType::BF16), _) => both(3e-2),
        (Some(DType::F16), _) => both(5e-3),
        _ => both(TOLERANCE),
    }
}

/// Whether tokens may be routed to other experts, where two are nearly as good: some rows are another expert's then, and
/// how far off those are says nothing.
fn is_routed(name: &str, dtype: Option<DType>) -> bool {
    (name, dtype) == ("tiny_mixtral", Some(DType::BF16))
}

/// What `bf16` must keep of the routing in `f32` on the CPU.
const ROUTING: Bounds = Bounds { routed_alike: 0.8, first_alike: 0.8, first_alike_of_those: 0.9, error_of_those: 3e-2 };

/// How a model's routing on GPUs agrees with that in `f32` on the CPU.
fn routing(folder: &Path, data: &TestData, mesh: &MeshChoice, dtype: Option<DType>) -> Result<Agreement, String> {
    let copy = tempfile::tempdir().unwrap();
    let model = copy.path().join("model.onnx");
    let choices = with_choices(&folder.join("model.onnx"), &model);
    let request = |target: &str| {
        let mut request = Request::new(&model, Target::from_json(target).unwrap());
        request.samples.clone_from(&data.inputs);
        request
    };
    let expected = request(include_str!("../../fixtures/targets/cpu.json"));
    let expected = outputs(&expected, data, Devices::Virtual)?;
    let mut on_gpus = request(include_str!("../../fixtures/targets/h200x4.json"));
    (on_gpus.mesh, on_gpus.options.dtype) = (mesh.clone(), dtype);
    let actual = outputs(&on_gpus, data, Devices::Cuda { ordinals: None })?;
    Ok(agreement(&actual, &expected, choices))
}

struct Row {
    from_reference: Difference,
    from_cpu: Difference,
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
    let worst = |differences: Vec<Difference>| differences.into_iter().fold(Difference::default(), Difference::worse);
    let actual = || first.iter().map(|(_, actual)| actual);
    let reference = actual().zip(&data.outputs).map(|(a, b)| Difference::between(a, b)).collect();
    let host = actual().zip(&on_cpu).map(|(a, (_, b))| Difference::between(a, b)).collect();
    Ok(Row { from_reference: worst(reference), from_cpu: worst(host) })
}

/// On the mesh that is best by prediction, which is often one without any exchange, and on meshes that must exchange.
/// `MODELS_ONLY=part_of_a_name` picks some models.
fn check(gpus: u32, meshes: &[&str]) {
    let chosen = [(format!("{gpus} GPUs"), MeshChoice::Devices(gpus))];
    let fixed = meshes.iter().map(|mesh| ((*mesh).to_owned(), MeshChoice::Fixed(parse_mesh(mesh).unwrap())));
    let meshes: Vec<(String, MeshChoice)> = chosen.into_iter().chain(fixed).collect();
    let part = std::env::var("MODELS_ONLY").unwrap_or_default();
    let mut failures = Vec::new();
    println!("{:59}{:>18} {:>18}", "", "off the reference", "off the CPU");
    println!(
        "{:24} {:23} {:8}  {:>9} {:>9} {:>9} {:>9}",
        "model", "mesh", "type", "largest", "norm", "largest", "norm"
    );
    for (name, folder) in models().iter().filter(|(name, _)| name.contains(&part)) {
        let data = TestData::read(&folder.join("test_data_set_0")).unwrap();
        for (mesh, choice) in &meshes {
            for dtype in [None, Some(DType::F16), Some(DType::BF16)] {
                let label = dtype.map_or("as it is", DType::name);
                match run(folder, &data, choice, dtype) {
                    Ok(Row { from_reference, from_cpu }) => {
                        let numbers = [from_reference.largest, from_reference.norm, from_cpu.largest, from_cpu.norm];
                        let numbers: String = numbers.map(|number| format!(" {number:9.1e}")).concat();
                        println!("{name:24} {mesh:23} {label:8} {numbers}");
                        if is_routed(name, dtype) {
                            match routing(folder, &data, choice, dtype) {
                                Ok(found) if found.is_within(&ROUTING) => println!("{:57}{found:?}", ""),
                                found => failures.push(format!("{name} {mesh} {label}: {found:?}")),
                            }
                            continue;
                        }
                        let too_far = [
                            (from_reference.exceeds(tolerance(name, dtype)), "the reference"),
                            (from_cpu.exceeds(tolerance_from_cpu(name, dtype)), "the CPU"),
                        ];
                        for (_, from) in too_far.iter().filter(|(exceeds, _)| *exceeds) {
                            failures.push(format!("{name} {mesh} {label}: off {from}:{numbers}"));
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
