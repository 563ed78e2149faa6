//! Indices that are out of range: on GPUs as on the CPU an error that names the step, and the context goes on.

use std::collections::BTreeMap;
use std::path::Path;

use cpu::CpuError;
use cpu::recipe::NoFiles;
use ir::Mesh;
use passes::error::PassError;
use passes::lower::{Assembler, KernelSource};
use passes::pipeline::{Options, Settings};
use passes::shard::{MeshChoice, ShardOptions, parse_mesh};
use planfile::{DType, Target, Tensor, write_plan};
use runtime::cuda::nvrtc::Nvrtc;
use runtime::{Context, Devices, RuntimeError, Session, StepError, image};

use crate::{error, kernel_tolerance};

type Inputs = BTreeMap<String, Tensor>;
type Outcome = Result<Vec<(String, Tensor)>, RuntimeError>;

/// NVRTC, each time anew.
struct Anew;

impl Assembler for Anew {
    fn assemble(&self, sources: &[KernelSource], architecture: &str) -> Result<Vec<Vec<u8>>, PassError> {
        let list: Vec<(&str, &str)> =
            sources.iter().map(|source| (source.symbol.as_str(), source.source.as_str())).collect();
        let made = Nvrtc::load().and_then(|nvrtc| nvrtc.compile(&list, architecture));
        made.map_err(|error| PassError::Assemble { why: error.to_string() })
    }
}

/// Writes the plan of these lines for a mesh, of one device where it is empty; look-up tables are split.
fn compile(text: &str, mesh: &str, path: &Path) {
    let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
    let mesh = if mesh.is_empty() { Mesh::default() } else { parse_mesh(mesh).unwrap() };
    let mesh = MeshChoice::Fixed(mesh);
    let shard = ShardOptions { mesh, split_table_bytes: 1, batch_dim: 0 };
    let settings = Settings { weights: &NoFiles, options: Options::default(), shard, target: &target };
    let module = ir::text::parse_lines(text).unwrap();
    let plan = passes::compile::run(module, &settings, &Anew, &mut |_, _| {}).unwrap().unwrap();
    assert!(plan.programs.iter().any(|program| program.faults().count() > 0));
    write_plan::<planwright::compiler::CompileError>(path, &plan, |sink| {
        Ok(image::write(&plan, &NoFiles, |bytes| sink.push(sink.position(), bytes))?)
    })
    .unwrap();
}

/// Where a run failed because of an index: program, step, and the names of its ONNX nodes.
fn fault(outcome: Outcome) -> (usize, usize, Vec<String>) {
    match outcome {
        Err(RuntimeError::Step { program, step, origin, source, .. }) => {
            assert!(matches!(source, StepError::OutOfRange | StepError::Cpu(CpuError::Index { .. })), "{source}");
            (program, step, origin)
        }
        other => panic!("expected an index that is out of range: {other:?}"),
    }
}

/// Good inputs give what the CPU gives, and bad ones fail where they fail there, in any order and however they are run.
fn check(text: &str, mesh: &str, node: &str, good: &Inputs, bad: &[Inputs]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("faults.plan");
    compile(text, mesh, &path);
    let [cpu, gpu] = [Devices::Virtual, Devices::Cuda { ordinals: None }].map(|on| Session::load(&path, on).unwrap());
    let mut cpu = cpu.context().unwrap();
    let expected = cpu.run("main", good).unwrap();
    let mut refused = |gpu: &mut Context, inputs: &Inputs| {
        let found = fault(gpu.run("main", inputs));
        assert_eq!(found.2, [node], "{text}");
        assert_eq!(found, fault(cpu.run("main", inputs)), "{text}");
    };
    let agreed = |gpu: &mut Context| {
        let actual = gpu.run("main", good).unwrap();
        let off = actual.iter().zip(&expected).map(|((_, a), (_, b))| error(a, b)).fold(0.0, f64::max);
        assert!(off <= kernel_tolerance(DType::F32), "{text}: {off:.1e} off");
    };
    // The first run of a context goes step by step, later ones are graphs.
    for bad in bad {
        let mut gpu = gpu.context().unwrap();
        refused(&mut gpu, bad);
        agreed(&mut gpu);
    }
    let mut gpu = gpu.context().unwrap();
    for _ in 0..3 {
        agreed(&mut gpu);
        for bad in bad {
            refused(&mut gpu, bad);
        }
    }
    fault(gpu.run_recorded("main", &bad[0], &mut |_| {}));
    fault(gpu.time_graph("main", &bad[0], 3).map(|_| vec![]));
    fault(gpu.time_steps("main", &bad[0], 2, 2).map(|_| vec![]));
    // A step alone works on what others have left: that is no fault.
    gpu.time_steps("main", good, 2, 2).unwrap();
    gpu.time_graph("main", good, 3).unwrap();
    agreed(&mut gpu);
}

fn inputs(x: Option<(&[u64], usize)>, sizes: &[u64], indices: &[i64]) -> Inputs {
    let mut inputs = BTreeMap::from([("i".to_owned(), Tensor::from_elements(sizes, indices).unwrap())]);
    if let Some((sizes, count)) = x {
        let elements: Vec<f32> = (0..count).map(|element| element as f32 / 8.0 - 1.0).collect();
        inputs.insert("x".to_owned(), Tensor::from_elements(sizes, &elements).unwrap());
    }
    inputs
}

const OUTSIDE: [i64; 5] = [10, -11, 1 << 40, i64::MIN, i64::MAX];

#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90 and NVRTC"]
fn indices_out_of_range_are_found() {
    let models = [
        ("%y = gather %x, %i {axis 0} # /look", &[3][..]),
        ("%g = gather %x, %i {axis 0} # /look\n %y = pointwise %g {tanh($0)}", &[3]),
        ("%y = gather_elements %x, %i {axis 0} # /look", &[3, 1]),
        ("%y = gather_nd %x, %i # /look", &[3, 1]),
        (
            "%u: f32[3, 4] = slice %x {starts [0, 0], steps [1, 1]} # /part\n %y = scatter_nd %x, %i, %u {sum} # /look",
            &[3, 1],
        ),
        (
            "%u: f32[3, 1] = slice %x {starts [0, 0], steps [1, 1]} # /part\n \
             %y = scatter_elements %x, %i, %u {axis 0} # /look",
            &[3, 1],
        ),
    ];
    let x = Some((&[10, 4][..], 40));
    for (lines, sizes) in models {
        let shape: Vec<String> = sizes.iter().map(u64::to_string).collect();
        let text = format!("%x: f32[10, 4]\n %i: i64[{}]\n {lines}\n return %y", shape.join(", "));
        let bad = OUTSIDE.map(|index| inputs(x, sizes, &[0, index, 5]));
        check(&text, "", "/look", &inputs(x, sizes, &[9, -10, 5]), &bad);
    }
}

/// The table is split by rows, and the indices by batch: one rank alone finds the fault, and the others go on.
#[test]
#[ignore = "needs 2 CUDA GPUs of architecture sm_90, NCCL and NVRTC"]
fn indices_out_of_range_on_one_rank_fail_the_run() {
    let text = "%i: i64[4]
        %t: f32[10, 8] = weight random 3
        %g = gather %t, %i {axis 0} # /look
        %w: f32[8, 6] = weight random 4
        %y = dot %g, %w {contract [1]x[0]} # /product
        return %y";
    let good = inputs(None, &[4], &[9, -10, 0, 3]);
    for place in 0..4 {
        let bad = OUTSIDE.map(|index| {
            let mut indices = [1; 4];
            indices[place] = index;
            inputs(None, &[4], &indices)
        });
        check(text, "tensor=2", "/look", &good, &bad);
        check(text, "data=2", "/look", &good, &bad);
    }
}
