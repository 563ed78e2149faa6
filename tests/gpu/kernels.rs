//! Each sample of a kernel as an entry of one plan, run on a GPU and on the CPU on the same inputs.

use std::collections::BTreeMap;

use kernels::cuda::{Launch, Options, Selected, select};
use kernels::samples::{inputs, samples};
use planfile::fingerprint::Fingerprint;
use planfile::plan::{
    Action, Argument, Binding, Code, Explanations, Implementation, Kernel, LaunchShape, Manifest, Place, Plan,
    PlanEntry, PlanPort, Program, Step, StepCost, TargetRef,
};
use planfile::{DType, Op, RankScalar, Spec, TensorType, write_plan};
use runtime::cuda::nvrtc::Nvrtc;
use runtime::{Devices, Session};

use crate::{error, error_by_row, kernel_tolerance};

const ARCHITECTURE: &str = "sm_90a";

/// Places in an arena, one after the other.
#[derive(Default)]
struct Arena {
    bytes: u64,
}

impl Arena {
    fn place(&mut self, ty: &TensorType) -> Place {
        let offset = self.bytes;
        self.bytes += ty.bytes().unwrap().max(1).next_multiple_of(256);
        Place { ty: ty.clone(), at: Argument::Arena { offset } }
    }
}

/// A plan of one entry for each sample; entries are named by number.
fn plan(samples: &[(String, Spec)], allow_tf32: bool) -> Plan {
    let options = Options { architecture: ARCHITECTURE.to_owned(), allow_tf32 };
    let selected: Vec<Selected> = samples.iter().map(|(_, spec)| select(spec, &options).unwrap().1).collect();
    let launches: Vec<&Launch> = selected
        .iter()
        .filter_map(|selected| if let Selected::Launch(launch) = selected { Some(launch) } else { None })
        .collect();
    let sources: Vec<(&str, &str)> =
        launches.iter().map(|launch| (launch.symbol.as_str(), launch.source.as_str())).collect();
    let cubins = Nvrtc::load().and_then(|nvrtc| nvrtc.compile(&sources, ARCHITECTURE)).unwrap();
    let code = cubins.into_iter().map(|cubin| Code { architecture: ARCHITECTURE.to_owned(), cubin }).collect();
    let (mut kernels, mut programs, mut entries, mut next_code) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (index, ((name, spec), selected)) in samples.iter().zip(&selected).enumerate() {
        let mut arena = Arena::default();
        let operands: Vec<Place> = spec.inputs.iter().map(|ty| arena.place(ty)).collect();
        let types = spec.result_types().unwrap();
        let results: Vec<Place> = types.iter().map(|ty| arena.place(ty)).collect();
        let kernel = index as u32;
        let bind = |places: &[Place]| {
            let binding = |(port, place): (u32, &Place)| Binding { port, place: place.clone(), splits: vec![] };
            (0u32..).zip(places).map(binding).collect()
        };
        let (inputs, outputs) = (bind(&operands), bind(&results));
        let (implementation, action) = match selected {
            Selected::Launch(launch) => {
                let implementation = Implementation::Cuda { code: next_code, symbol: launch.symbol.clone() };
                next_code += 1;
                let scalars = launch.scalars.iter().map(|value| Argument::Scalar { value: value.clone() });
                let scalars = scalars.chain(launch.checks.then_some(Argument::Fault { word: 0 })).collect();
                let grid = launch.grid.map(|size| RankScalar::Uniform(i64::from(size)));
                let shape = LaunchShape { grid, block: launch.block, shared_bytes: launch.shared_bytes };
                (implementation, Action::Launch { kernel, operands, results, scalars, launch: Some(shape) })
            }
            Selected::Library { library, call, workspace_bytes } => {
                let (library, call, version) = (*library, call.clone(), String::new());
                let workspace =
                    (*workspace_bytes > 0).then(|| arena.place(&TensorType::new(DType::U8, &[*workspace_bytes])));
                let action = Action::Library { kernel, operands, results, workspace, algorithm: vec![] };
                (Implementation::Library { library, version, call }, action)
            }
        };
        kernels.push(Kernel { name: name.clone(), spec: spec.clone(), implementation });
        let step = Step { action, stream: 0, waits: vec![], origin: vec![], cost: StepCost::default() };
        programs.push(Program {
            entry: index as u32,
            stage: 0,
            ranks: vec![0],
            inputs,
            outputs,
            steps: vec![step],
            arena_bytes: arena.bytes,
            peer_arena_bytes: 0,
            streams: 1,
        });
        let port = |kind: &str, (position, ty): (usize, &TensorType)| PlanPort {
            name: format!("{kind}{position}"),
            ty: ty.clone(),
        };
        entries.push(PlanEntry {
            name: index.to_string(),
            inputs: spec.inputs.iter().enumerate().map(|input| port("x", input)).collect(),
            outputs: types.iter().enumerate().map(|output| port("y", output)).collect(),
            frozen: vec![],
            programs: vec![index as u32],
            predicted_ns: 0,
        });
    }
    let manifest = Manifest {
        producer: "tests".to_owned(),
        model: "kernels".to_owned(),
        files: vec![],
        fingerprint: Fingerprint::default(),
        mesh: vec![],
        ranks: 1,
        target: TargetRef { name: "test".to_owned(), architecture: ARCHITECTURE.to_owned() },
        entries,
        weights: vec![],
        placed: vec![],
        weight_arena_bytes: vec![0],
        image_bytes: 0,
        states: vec![],
        links: vec![],
    };
    Plan { manifest, programs, kernels, code, explanations: Explanations::default() }
}

/// Whether each row of the result is as large as it is, whatever the others are.
fn by_row(spec: &Spec) -> bool {
    spec.nodes.iter().any(|node| matches!(node.op, Op::Softmax { .. } | Op::Norm { .. } | Op::Attention { .. }))
}

fn check(samples: &[(String, Spec)], seeds: std::ops::Range<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels.plan");
    write_plan(&path, &plan(samples, false), |_| Ok::<(), planfile::PlanError>(())).unwrap();
    let on_cpu = Session::load(&path, Devices::Virtual).unwrap();
    let on_gpu = Session::load(&path, Devices::Cuda { ordinals: None }).unwrap();
    let (mut cpu, mut gpu) = (on_cpu.context().unwrap(), on_gpu.context().unwrap());
    let (mut failures, mut worst): (Vec<String>, BTreeMap<DType, f64>) = (Vec::new(), BTreeMap::new());
    for (index, (name, spec)) in samples.iter().enumerate() {
        for seed in seeds.clone() {
            let given = inputs(spec, seed).into_iter().enumerate();
            let given: BTreeMap<String, _> = given.map(|(position, x)| (format!("x{position}"), x)).collect();
            let entry = index.to_string();
            let expected = cpu.run(&entry, &given).unwrap_or_else(|error| panic!("{name}: {error}"));
            let actual = match gpu.run(&entry, &given) {
                Ok(actual) => actual,
                Err(error) => {
                    failures.push(format!("{name}: {error}"));
                    continue;
                }
            };
            let again = gpu.run(&entry, &given).unwrap();
            for (((output, actual), (_, expected)), (_, again)) in actual.iter().zip(&expected).zip(&again) {
                let dtype = expected.ty.dtype;
                let off = if by_row(spec) { error_by_row(actual, expected) } else { error(actual, expected) };
                let seen = worst.entry(dtype).or_default();
                *seen = seen.max(off);
                if off > kernel_tolerance(dtype) {
                    failures.push(format!("{name} seed {seed}, {output}: {off:.1e} off"));
                }
                if actual.data.bytes() != again.data.bytes() {
                    failures.push(format!("{name} seed {seed}, {output}: another result in the second run"));
                }
            }
        }
    }
    println!("{} kernels on {} seeds, largest errors {worst:?}", samples.len(), seeds.end - seeds.start);
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// `KERNELS_ONLY=part_of_a_name` picks some.
#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90, cuBLASLt, cuDNN and NVRTC"]
fn kernels_agree_with_the_cpu() {
    let part = std::env::var("KERNELS_ONLY").unwrap_or_default();
    let picked: Vec<(String, Spec)> = samples().into_iter().filter(|(name, _)| name.contains(&part)).collect();
    assert!(!picked.is_empty());
    check(&picked, 0..3);
}
