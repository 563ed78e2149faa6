//! What a plan on GPUs takes of their memory, and what is said about libraries of other versions than it records.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use cuda::{LibraryName, gpus};
use planfile::plan::*;
use planfile::{DType, Op, PlanError, PlanFile, Real, Recipe, Source, Spec, Tensor, TensorType, write_plan};
use runtime::{Devices, RuntimeError, Session};
use tempfile::TempDir;

/// Sizes of the product: the weight arena and the activation arena are no whole number of pages.
const M: u64 = 64;
const K: u64 = 1024;
const N: u64 = 2050;
const WORKSPACE_BYTES: u64 = 4 << 20;
/// What the driver gives out at once.
const PAGE_BYTES: u64 = 2 << 20;

/// `y = x w`, a product by cuBLASLt of that version, for one device of that architecture.
fn product(architecture: &str, version: &str) -> Plan {
    let f32s = |sizes: [u64; 2]| TensorType::new(DType::F32, &sizes);
    let (x, w, y) = (f32s([M, K]), f32s([K, N]), f32s([M, N]));
    let bytes = |ty: &TensorType| ty.bytes().unwrap();
    let in_arena = |offset, ty: &TensorType| Place { ty: ty.clone(), at: Argument::Arena { offset } };
    let at_x = in_arena(0, &x);
    let at_y = in_arena(bytes(&x), &y);
    let workspace = in_arena(bytes(&x) + bytes(&y), &TensorType::new(DType::U8, &[WORKSPACE_BYTES]));
    let at_w = Place { ty: w.clone(), at: Argument::Weights { offset: 0 } };
    let matrix = |operand, row_stride| Matrix { operand, offset: 0, row_stride, column_stride: 1, batch_stride: 0 };
    let call = Call::Matmul(Matmul {
        m: M,
        n: N,
        k: K,
        batch: 1,
        a: matrix(0, K),
        b: matrix(1, N),
        result: matrix(0, N),
        scale: Real(1.0),
        bias: None,
        residual: None,
        activation: Activation::None,
        allow_tf32: false,
    });
    let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: DType::F32 };
    let step = Action::Library {
        kernel: 0,
        operands: vec![at_x.clone(), at_w],
        results: vec![at_y.clone()],
        workspace: Some(workspace),
        algorithm: vec![],
    };
    let port = |name: &str, ty: &TensorType| vec![PlanPort { name: name.to_owned(), ty: ty.clone() }];
    let binding = |place| vec![Binding { port: 0, place, splits: vec![] }];
    Plan {
        manifest: Manifest {
            producer: "test".to_owned(),
            model: "product".to_owned(),
            files: vec![],
            fingerprint: Default::default(),
            mesh: vec![],
            ranks: 1,
            target: TargetRef { name: "test".to_owned(), architecture: architecture.to_owned() },
            entries: vec![PlanEntry {
                name: "main".to_owned(),
                inputs: port("x", &x),
                outputs: port("y", &y),
                frozen: vec![],
                programs: vec![0],
                predicted_ns: 5000,
            }],
            weights: vec![PlanWeight {
                name: "w".to_owned(),
                ty: w.clone(),
                recipe: Recipe::source(w.clone(), Source::Random { seed: 1 }),
            }],
            placed: vec![PlacedWeight {
                weight: 0,
                stage: 0,
                ranks: vec![0],
                ty: w.clone(),
                arena_offset: 0,
                splits: vec![],
                images: vec![0],
            }],
            weight_arena_bytes: vec![bytes(&w)],
            image_bytes: bytes(&w),
            states: vec![],
            links: vec![],
        },
        programs: vec![Program {
            entry: 0,
            stage: 0,
            ranks: vec![0],
            inputs: binding(at_x),
            outputs: binding(at_y),
            steps: vec![Step {
                action: step,
                stream: 0,
                waits: vec![],
                origin: vec![],
                cost: StepCost { predicted_ns: 5000, ..Default::default() },
            }],
            arena_bytes: bytes(&x) + bytes(&y) + WORKSPACE_BYTES,
            peer_arena_bytes: 0,
            streams: 1,
        }],
        kernels: vec![Kernel {
            name: "product".to_owned(),
            spec: Spec::of(dot, vec![x, w]).unwrap(),
            implementation: Implementation::Library { library: Library::CublasLt, version: version.to_owned(), call },
        }],
        code: vec![],
        explanations: Explanations::default(),
    }
}

/// The plan with a weight of ones, and the folder that it is in.
fn save(plan: &Plan) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.plan");
    let ones = 1f32.to_le_bytes().repeat((K * N) as usize);
    write_plan::<PlanError>(&path, plan, |sink| sink.push(0, &ones)).unwrap();
    (folder, path)
}

/// The plan for the first GPU.
fn product_for_gpu(version: &str) -> Plan {
    let (major, minor) = gpus().unwrap()[0].capability;
    product(&format!("sm_{major}{minor}"), version)
}

fn inputs(first: f32) -> BTreeMap<String, Tensor> {
    let mut elements = vec![0f32; (M * K) as usize];
    elements[0] = first;
    BTreeMap::from([("x".to_owned(), Tensor::from_elements(&[M, K], &elements).unwrap())])
}

/// The first element of a run's output.
fn first_of(outputs: &[(String, Tensor)]) -> f32 {
    outputs[0].1.elements::<f32>().unwrap()[0]
}

fn on_gpu(path: &Path) -> Session {
    Session::load(path, Devices::Cuda { ordinals: None }).unwrap()
}

/// Why the plan was not loaded.
fn refused_strictly(path: &Path, progress: impl FnMut(u64)) -> Option<RuntimeError> {
    Session::load_file_strictly(PlanFile::open(path).unwrap(), Devices::Cuda { ordinals: None }, progress).err()
}

#[test]
fn the_plan_is_sound_and_runs_on_virtual_devices() {
    let (_folder, path) = save(&product("sm_90", "0.0.1"));
    let session = Session::load(&path, Devices::Virtual).unwrap();
    assert!(session.other_versions().is_empty());
    let mut context = session.context().unwrap();
    assert_eq!(first_of(&context.run("main", &inputs(3.0)).unwrap()), 3.0);
    assert!(matches!(context.device_memory(), Err(RuntimeError::OnlyOnGpus { .. })));
}

/// Counts of the driver are of the whole GPU: nothing else may run on it.
#[test]
#[ignore = "needs a CUDA GPU"]
fn memory_on_the_gpu_is_what_the_plan_predicts() {
    let plan = product_for_gpu("");
    let (_folder, path) = save(&plan);
    let session = on_gpu(&path);
    let mut context = session.context().unwrap();
    assert_eq!(first_of(&context.run("main", &inputs(3.0)).unwrap()), 3.0);
    let after_one = context.device_memory().unwrap();
    let report = &after_one[0];
    assert_eq!(after_one.len(), 1);
    assert_eq!(report.weight_arena_bytes, plan.manifest.weight_arena_bytes[0]);
    assert_eq!(report.activation_arena_bytes, plan.programs[0].arena_bytes);
    assert_eq!(report.workspace_bytes, WORKSPACE_BYTES);
    let pages = |bytes: u64| bytes.next_multiple_of(PAGE_BYTES);
    assert_eq!(report.weight_arena_taken_bytes, pages(report.weight_arena_bytes), "{report:?}");
    assert_eq!(report.activation_arena_taken_bytes, pages(report.activation_arena_bytes), "{report:?}");
    for run in 0..50u8 {
        assert_eq!(first_of(&context.run("main", &inputs(f32::from(run))).unwrap()), f32::from(run));
    }
    assert_eq!(context.device_memory().unwrap(), after_one);
    println!("{report:#?}");
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_library_of_another_version_is_named_and_refused_if_asked() {
    let (_folder, path) = save(&product_for_gpu("0.0.1"));
    let session = on_gpu(&path);
    let [other] = session.other_versions() else { unreachable!("one library, one version") };
    assert_eq!((other.library, other.recorded.as_str()), (LibraryName::CublasLt, "0.0.1"));
    assert!(other.path.contains("libcublasLt"), "{other:?}");
    let found = other.found.clone();
    drop(session);
    // Nothing of the weights is loaded before.
    let mut loaded = 0;
    let refused = refused_strictly(&path, |bytes| loaded = bytes);
    assert!(matches!(refused, Some(RuntimeError::OtherVersion { .. })) && loaded == 0, "{refused:?} {loaded}");

    let run = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_plan")).arg("run").arg(&path).args(flags).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, message) = run(&[]);
    let warning = format!("warning: the plan was made with cuBLASLt 0.0.1, this machine has {found} (");
    assert!(code == Some(0) && message.contains(&warning) && message.contains("--strict"), "{code:?} {message}");
    let (code, message) = run(&["--strict"]);
    assert!(code == Some(5) && message.contains("cuBLASLt 0.0.1") && message.contains(&found), "{code:?} {message}");

    // The machine's own version is neither warned of nor refused.
    let (_folder, path) = save(&product_for_gpu(&found));
    assert!(on_gpu(&path).other_versions().is_empty() && refused_strictly(&path, |_| {}).is_none());
}
