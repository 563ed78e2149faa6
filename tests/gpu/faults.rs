//! Indices that are out of range: on GPUs as on the CPU an error that names the step, and the context goes on.

use std::collections::BTreeMap;
use std::path::Path;

use cpu::CpuError;
use cpu::recipe::NoFiles;
use cuda::nvrtc::Nvrtc;
use ir::Mesh;
use passes::error::PassError;
use passes::lower::{Assembler, KernelSource};
use passes::settings::{MeshChoice, Options, Settings, ShardOptions};
use passes::shard::parse_mesh;
use planfile::plan::Plan;
use planfile::{Cuda, DType, Target, Tensor, write_plan};
use runtime::{Context, Devices, RuntimeError, Session, StepError, image};

use crate::{error, kernel_tolerance};

type Inputs = BTreeMap<String, Tensor>;
type Outcome = Result<Vec<(String, Tensor)>, RuntimeError>;

/// NVRTC, each time anew.
struct Anew;

impl Assembler for Anew {
    fn assemble(&self, sources: &[KernelSource], architecture: Cuda) -> Result<Vec<Vec<u8>>, PassError> {
        let architecture = &architecture.to_string();
        let list: Vec<(&str, &str)> =
            sources.iter().map(|source| (source.symbol.as_str(), source.source.as_str())).collect();
        let made = Nvrtc::load().and_then(|nvrtc| nvrtc.compile(&list, architecture));
        made.map_err(|error| PassError::Assemble { why: error.to_string() })
    }
}

/// Writes the plan of these lines for a mesh, of one device where it is empty; look-up tables are split.
fn compile(text: &str, mesh: &str, path: &Path) -> Plan {
    let target = Target::from_json(include_str!("../../fixtures/targets/h200x4.json")).unwrap();
    let mesh = if mesh.is_empty() { Mesh::default() } else { parse_mesh(mesh).unwrap() };
    let mesh = MeshChoice::Fixed(mesh);
    let shard = ShardOptions { mesh, split_table_bytes: 1, batch_dim: 0 };
    let settings = Settings { weights: &NoFiles, options: Options::default(), shard, target: &target };
    let module = ir::text::parse_lines(text).unwrap();
    let plan = passes::compile::run(module, &settings, &Anew, &mut |_, _| {}).unwrap().unwrap().plan;
    assert!(plan.programs.iter().any(|program| program.faults().count() > 0));
    write_plan::<planwright::compiler::CompileError>(path, &plan, |sink| {
        Ok(image::write(&plan, &NoFiles, |bytes| sink.push(sink.position(), bytes))?)
    })
    .unwrap();
    plan
}

/// Where a run failed because of an index.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    rank: u32,
    at: At,
}

/// The same on all ranks.
#[derive(Debug, PartialEq, Eq)]
struct At {
    program: usize,
    step: usize,
    /// ONNX nodes.
    origin: Vec<String>,
}

fn fault(outcome: Outcome) -> Found {
    match outcome {
        Err(RuntimeError::Step { rank, program, step, origin, source }) => {
            assert!(matches!(source, StepError::OutOfRange | StepError::Cpu(CpuError::Index { .. })), "{source}");
            Found { rank, at: At { program, step, origin } }
        }
        other => panic!("expected an index that is out of range: {other:?}"),
    }
}

/// Fails on the GPU where it fails on the CPU: at `/look`, and on `rank` if one rank alone can find it.
fn refused(gpu: &mut Context, cpu: &mut Context, inputs: &Inputs, rank: Option<u32>) {
    let (found, expected) = (fault(gpu.run("main", inputs)), fault(cpu.run("main", inputs)));
    assert_eq!(found.at.origin, ["/look"]);
    assert_eq!(found.at, expected.at);
    if let Some(rank) = rank {
        assert_eq!((found.rank, expected.rank), (rank, rank));
    }
}

/// Good inputs give what the CPU gives, and bad ones fail where they fail there (see [`refused`]), in any order and
/// however they are run.
fn check(text: &str, mesh: &str, good: &Inputs, bad: &[Inputs], rank: Option<u32>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("faults.plan");
    compile(text, mesh, &path);
    let [cpu, gpu] = [Devices::Virtual, Devices::Cuda { ordinals: None }].map(|on| Session::load(&path, on).unwrap());
    let mut cpu = cpu.context().unwrap();
    let expected = cpu.run("main", good).unwrap();
    let mut refused = |gpu: &mut Context, inputs: &Inputs| refused(gpu, &mut cpu, inputs, rank);
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

/// Indices `i`, and `x` of these sizes if it is an input.
fn inputs(x: Option<&[u64]>, indices: Tensor) -> Inputs {
    let mut inputs = BTreeMap::from([("i".to_owned(), indices)]);
    if let Some(sizes) = x {
        let elements: Vec<f32> =
            (0..sizes.iter().product()).map(|element| (element % 1000) as f32 / 8.0 - 1.0).collect();
        inputs.insert("x".to_owned(), Tensor::from_elements(sizes, &elements).unwrap());
    }
    inputs
}

fn i64s(sizes: &[u64], indices: &[i64]) -> Tensor {
    Tensor::from_elements(sizes, indices).unwrap()
}

fn i32s(sizes: &[u64], indices: &[i32]) -> Tensor {
    Tensor::from_elements(sizes, indices).unwrap()
}

/// What is no index of ten rows.
const OUTSIDE: [i64; 5] = [10, -11, 1 << 40, i64::MIN, i64::MAX];
const OUTSIDE_I32: [i32; 4] = [10, -11, i32::MIN, i32::MAX];

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
    let x = Some(&[10, 4][..]);
    for (lines, sizes) in models {
        let shape: Vec<String> = sizes.iter().map(u64::to_string).collect();
        let text = |dtype| format!("%x: f32[10, 4]\n %i: {dtype}[{}]\n {lines}\n return %y", shape.join(", "));
        let bad = OUTSIDE.map(|index| inputs(x, i64s(sizes, &[0, index, 5])));
        check(&text("i64"), "", &inputs(x, i64s(sizes, &[9, -10, 5])), &bad, None);
        let bad = OUTSIDE_I32.map(|index| inputs(x, i32s(sizes, &[0, index, 5])));
        check(&text("i32"), "", &inputs(x, i32s(sizes, &[9, -10, 5])), &bad, None);
    }
}

/// Either index of a pair may be outside, also so far that an offset made from both would overflow.
#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90 and NVRTC"]
fn pairs_of_indices_out_of_range_are_found() {
    let models = [
        "%y = gather_nd %x, %i # /look",
        "%u: f32[3] = weight random 5\n %y = scatter_nd %x, %i, %u {sum} # /look",
        "%u: f32[3] = weight random 5\n %y = scatter_nd %x, %i, %u # /look",
    ];
    let x = Some(&[10, 4][..]);
    let pairs = OUTSIDE.into_iter().flat_map(|index| [[index, 0], [index, index], [index, i64::MAX]]);
    let pairs: Vec<[i64; 2]> = pairs.chain([4, -5, i64::MIN, i64::MAX].map(|index| [9, index])).collect();
    for lines in models {
        let text = format!("%x: f32[10, 4]\n %i: i64[3, 2]\n {lines}\n return %y");
        let bad: Vec<Inputs> = pairs.iter().map(|&[a, b]| inputs(x, i64s(&[3, 2], &[0, 0, 5, 2, a, b]))).collect();
        check(&text, "", &inputs(x, i64s(&[3, 2], &[9, 3, -10, -4, 5, 0])), &bad, None);
    }
}

/// Whole rows of many are read in packs, and the last index of all counts.
#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90 and NVRTC"]
fn the_last_index_of_many_is_found() {
    const ROWS: u64 = 1 << 20;
    let text = format!("%x: f32[{ROWS}, 8]\n %i: i64[{ROWS}]\n %y = gather %x, %i {{axis 0}} # /look\n return %y");
    let with_last = |last: i64| {
        let mut indices: Vec<i64> = (0..ROWS.cast_signed()).rev().collect();
        indices[ROWS as usize - 1] = last;
        inputs(Some(&[ROWS, 8]), i64s(&[ROWS], &indices))
    };
    check(&text, "", &with_last(-1), &[ROWS.cast_signed(), i64::MIN].map(with_last), None);
}

/// No index is one of a table without rows.
#[test]
#[ignore = "needs a CUDA GPU of architecture sm_90 and NVRTC"]
fn all_indices_of_an_empty_table_are_out_of_range() {
    let models = [
        ("gather %x, %i {axis 0}", &[3][..]),
        ("gather_elements %x, %i {axis 0}", &[3, 1]),
        ("gather_nd %x, %i", &[3, 1]),
    ];
    for (line, sizes) in models {
        let shape: Vec<String> = sizes.iter().map(u64::to_string).collect();
        let text = format!("%x: f32[0, 4]\n %i: i64[{}]\n %y = {line} # /look\n return %y", shape.join(", "));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty.plan");
        compile(&text, "", &path);
        let [mut cpu, mut gpu] = [Devices::Virtual, Devices::Cuda { ordinals: None }]
            .map(|on| Session::load(&path, on).unwrap().context().unwrap());
        for indices in [[0; 3], [-1, 0, 1], [i64::MIN, i64::MAX, 0], [0; 3]] {
            refused(&mut gpu, &mut cpu, &inputs(Some(&[0, 4]), i64s(sizes, &indices)), None);
        }
    }
}

/// What each rank has of the table and of the indices of the one step that checks indices.
fn local_sizes(text: &str, mesh: &str) -> Vec<Vec<u64>> {
    let folder = tempfile::tempdir().unwrap();
    let plan = compile(text, mesh, &folder.path().join("sizes.plan"));
    let [program] = &plan.programs[..] else { panic!("{} programs", plan.programs.len()) };
    assert_eq!(program.ranks, [0, 1]);
    let steps: Vec<usize> = program.faults().map(|(step, _)| step).collect();
    let [step] = steps[..] else { panic!("steps {steps:?} check indices") };
    let (operands, _) = program.steps[step].action.places();
    // Behind them: which indices are of the rank's own rows.
    operands.iter().take(2).map(|operand| operand.ty.sizes()).collect()
}

/// With the indices split by batch, one rank alone finds the fault, and the other goes on. With the table split by rows
/// both find it: an index that is in neither's rows must not be taken for one of the other's.
#[test]
#[ignore = "needs 2 CUDA GPUs of architecture sm_90, NCCL and NVRTC"]
fn indices_out_of_range_on_one_rank_fail_the_run() {
    let text = "%i: i64[4]
        %t: f32[10, 8] = weight random 3
        %g = gather %t, %i {axis 0} # /look
        %w: f32[8, 6] = weight random 4
        %y = dot %g, %w {contract [1]x[0]} # /product
        return %y";
    assert_eq!(local_sizes(text, "data=2"), [vec![10, 8], vec![2]]);
    assert_eq!(local_sizes(text, "tensor=2"), [vec![5, 8], vec![4]]);
    let good = inputs(None, i64s(&[4], &[9, -10, 0, 3]));
    for place in 0..4 {
        let bad = OUTSIDE.map(|index| {
            let mut indices = [1; 4];
            indices[place] = index;
            inputs(None, i64s(&[4], &indices))
        });
        check(text, "tensor=2", &good, &bad, None);
        check(text, "data=2", &good, &bad, Some(place as u32 / 2));
    }
}
