//! Small plans for tests, written by hand.

use crate::cubin::forge::{Forged, forge};
use crate::dtype::DType;
use crate::error::PlanError;
use crate::expr::{Binary, Expr, ExprOp, RankScalar, Unary};
use crate::fingerprint::Fingerprint;
use crate::launch::{Factor, LABEL_BYTES, LaunchRule, SizeOf, label};
use crate::op::{Combine, Op, Real};
use crate::plan::*;
use crate::spec::{Recipe, Source, SourceFile, Spec};
use crate::types::TensorType;
use crate::writer::WeightSink;

fn f32s(sizes: &[u64]) -> TensorType {
    TensorType::new(DType::F32, sizes)
}

pub(crate) fn at(offset: u64, sizes: &[u64]) -> Place {
    Place { ty: f32s(sizes), at: Argument::Arena { offset } }
}

fn weight(offset: u64, sizes: &[u64]) -> Place {
    Place { ty: f32s(sizes), at: Argument::Weights { offset } }
}

pub(crate) fn step(stream: u32, action: Action, waits: &[u32]) -> Step {
    let waits = waits.iter().map(|&from| Edge { from, kind: EdgeKind::Full }).collect();
    Step { action, stream, waits, origin: vec![0], cost: StepCost::default() }
}

pub(crate) fn launch(kernel: u32, operands: Vec<Place>, results: Vec<Place>) -> Action {
    Action::Launch { kernel, operands, results, scalars: vec![], launch: None }
}

pub(crate) fn kernel(name: &str, op: Op, inputs: Vec<TensorType>) -> Kernel {
    let spec = Spec::of(op, inputs).unwrap();
    Kernel { name: name.to_owned(), spec, implementation: Implementation::Reference }
}

fn split(dim: u8, len: u64) -> SplitDim {
    let piece = |rank: u64| vec![PlanPiece { global: rank * len, local: 0, len }];
    SplitDim { dim, pieces: vec![piece(0), piece(1)] }
}

/// `y = x w + b - x'` on two ranks: `x` split by columns, `w` by rows, an all-reduce between, `b` on both.
pub(crate) fn plan() -> Plan {
    let local = [2, 4];
    let groups = vec![vec![0, 1]];
    let dot = Op::Dot { batch: vec![], contract: vec![(1, 0)], accumulate: DType::F32, out: DType::F32 };
    let negate = Op::Pointwise { expr: Expr::operand(0).unary(Unary::Neg), dims: f32s(&local).dims };
    let sum = Expr::operand(0).binary(Binary::Add, Expr::operand(1)).binary(Binary::Add, Expr::operand(2));
    let add = Op::Pointwise { expr: sum, dims: f32s(&local).dims };
    let all_reduce = Action::Collective {
        op: Op::AllReduce { combine: Combine::Sum, groups },
        operands: vec![at(256, &local)],
        results: vec![at(512, &local)],
        algorithm: CollectiveAlgorithm::Host,
    };
    let source = |offset| Source::File { file: 0, offset };
    let timed = |step: Step| Step { cost: StepCost { predicted_ns: 1500, ..StepCost::default() }, ..step };
    Plan {
        manifest: Manifest {
            producer: "compile 0.0.0".to_owned(),
            model: "sample".to_owned(),
            files: vec![SourceFile { name: "sample.onnx".to_owned(), bytes: 4096 }],
            fingerprint: Fingerprint::default(),
            mesh: vec![PlanAxis { name: "tensor".to_owned(), size: 2 }],
            ranks: 2,
            target: TargetRef { name: "virtual".to_owned(), architecture: "cpu".to_owned() },
            entries: vec![PlanEntry {
                name: "main".to_owned(),
                inputs: vec![PlanPort { name: "x".to_owned(), ty: f32s(&[2, 8]) }],
                outputs: vec![PlanPort { name: "y".to_owned(), ty: f32s(&[2, 4]) }],
                frozen: vec![],
                programs: vec![0],
                predicted_ns: 6000,
            }],
            weights: vec![
                PlanWeight {
                    name: "w".to_owned(),
                    ty: f32s(&[8, 4]),
                    recipe: Recipe::source(f32s(&[8, 4]), source(64)),
                },
                PlanWeight { name: "b".to_owned(), ty: f32s(&[4]), recipe: Recipe::source(f32s(&[4]), source(0)) },
            ],
            placed: vec![
                PlacedWeight {
                    weight: 0,
                    stage: 0,
                    ranks: vec![0, 1],
                    ty: f32s(&[4, 4]),
                    arena_offset: 0,
                    splits: vec![split(0, 4)],
                    images: vec![0, 256],
                },
                PlacedWeight {
                    weight: 1,
                    stage: 0,
                    ranks: vec![0, 1],
                    ty: f32s(&[4]),
                    arena_offset: 256,
                    splits: vec![],
                    images: vec![64, 64],
                },
            ],
            weight_arena_bytes: vec![512, 512],
            image_bytes: 320,
            states: vec![],
            links: vec![LinkRequirement { ranks: (0, 1), class: "host".to_owned() }],
        },
        programs: vec![Program {
            entry: 0,
            stage: 0,
            ranks: vec![0, 1],
            inputs: vec![Binding { port: 0, place: at(0, &local), splits: vec![split(1, 4)] }],
            outputs: vec![Binding { port: 0, place: at(512, &local), splits: vec![] }],
            steps: [
                step(0, launch(0, vec![at(0, &local), weight(0, &[4, 4])], vec![at(256, &local)]), &[]),
                step(1, launch(1, vec![at(0, &local)], vec![at(768, &local)]), &[]),
                step(0, all_reduce, &[]),
                step(
                    0,
                    launch(2, vec![at(512, &local), weight(256, &[4]), at(768, &local)], vec![at(512, &local)]),
                    &[1],
                ),
            ]
            .map(timed)
            .into(),
            arena_bytes: 1024,
            peer_arena_bytes: 0,
            streams: 2,
        }],
        kernels: vec![
            kernel("dot_f32", dot, vec![f32s(&local), f32s(&[4, 4])]),
            kernel("neg_f32", negate, vec![f32s(&local)]),
            kernel("add3_f32", add, vec![f32s(&local), f32s(&[4]), f32s(&local)]),
        ],
        code: vec![],
        explanations: Explanations {
            names: vec!["/fc/MatMul".to_owned()],
            sharding: vec!["w is split by rows".to_owned()],
            alternatives: vec![Alternative {
                mesh: vec![PlanAxis { name: "data".to_owned(), size: 2 }],
                predicted_ns: 9000,
            }],
        },
    }
}

/// The weights section of [`plan`].
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; 320];
    for (offset, byte) in image[..80].iter_mut().enumerate() {
        *byte = offset as u8 + 1;
    }
    image[256..].fill(0xee);
    image
}

pub(crate) fn push_weights(sink: &mut WeightSink<'_>) -> Result<(), PlanError> {
    let image = image();
    sink.push(0, &image[..80])?;
    sink.push(256, &image[256..])
}

fn send(channel: u32, peer: u32, offset: u64) -> Action {
    Action::Collective {
        op: Op::Send { channel, peers: vec![peer] },
        operands: vec![at(offset, &[4])],
        results: vec![],
        algorithm: CollectiveAlgorithm::Host,
    }
}

fn recv(channel: u32, peer: u32, offset: u64) -> Action {
    Action::Collective {
        op: Op::Recv { channel, peers: vec![peer], ty: f32s(&[4]) },
        operands: vec![],
        results: vec![at(offset, &[4])],
        algorithm: CollectiveAlgorithm::Host,
    }
}

/// Two stages of a rank each: `x` goes to the second stage on channel 7 and comes back on channel 8.
pub(crate) fn staged() -> Plan {
    let mut plan = plan();
    let ty = f32s(&[4]);
    let manifest = &mut plan.manifest;
    manifest.mesh[0].name = "pipe".to_owned();
    manifest.entries[0].inputs[0].ty = ty.clone();
    manifest.entries[0].outputs[0].ty = ty;
    manifest.entries[0].programs = vec![0, 1];
    manifest.entries[0].predicted_ns = 0;
    manifest.weights.clear();
    manifest.placed.clear();
    manifest.weight_arena_bytes = vec![0, 0];
    manifest.image_bytes = 0;
    plan.kernels.clear();
    let port = |offset| vec![Binding { port: 0, place: at(offset, &[4]), splits: vec![] }];
    let program = |stage, inputs, outputs, steps| Program {
        entry: 0,
        stage,
        ranks: vec![stage],
        inputs,
        outputs,
        steps,
        arena_bytes: 512,
        peer_arena_bytes: 0,
        streams: 2,
    };
    plan.programs = vec![
        program(0, port(0), port(256), vec![step(0, send(7, 1, 0), &[]), step(0, recv(8, 1, 256), &[])]),
        program(1, vec![], vec![], vec![step(0, recv(7, 0, 0), &[]), step(0, send(8, 0, 0), &[])]),
    ];
    plan
}

/// [`plan`] for two GPUs: the product by cuBLASLt; in place of the negation, rows of `x` by the indices `i`; the sum by a
/// kernel that knows its rank's first row; and at last rows of the sum, which nothing reads.
pub(crate) fn gpu() -> Plan {
    let mut plan = plan();
    let local = [2, 4];
    let indices = TensorType::new(DType::I64, &[2]);
    plan.manifest.target.architecture = "sm_90a".to_owned();
    plan.manifest.entries[0].inputs.push(PlanPort { name: "i".to_owned(), ty: indices.clone() });
    let rows = Spec::of(Op::Gather { axis: 0 }, vec![f32s(&local), indices.clone()]).unwrap();
    let first = ExprOp::Index { axis: 0, base: RankScalar::ByRank(vec![0, 2]) };
    let first = Expr { ops: vec![first, ExprOp::Cast(DType::F32)] };
    let sum = (0..3).fold(first, |sum, operand| sum.binary(Binary::Add, Expr::operand(operand)));
    let sum = Op::Pointwise { expr: sum, dims: f32s(&local).dims };
    let sum = Spec::of(sum, vec![f32s(&local), f32s(&[4]), f32s(&local)]).unwrap();
    let matrix = |operand| Matrix { operand, offset: 0, row_stride: 4, column_stride: 1, batch_stride: 0 };
    let call = Call::Matmul(Matmul {
        m: 2,
        n: 4,
        k: 4,
        batch: 1,
        a: matrix(0),
        b: matrix(1),
        result: matrix(0),
        scale: Real(1.0),
        bias: None,
        residual: None,
        activation: Activation::None,
        allow_tf32: false,
    });
    let version = String::new();
    plan.kernels[0].implementation = Implementation::Library { library: Library::CublasLt, version, call };
    plan.kernels[1] = coded(&mut plan.code, "gather", rows, [64, 0], 0);
    plan.kernels[2] = coded(&mut plan.code, "add3", sum, [128, 2], 4096);
    let in_arena = Place { ty: indices, at: Argument::Arena { offset: 1024 } };
    let program = &mut plan.programs[0];
    program.arena_bytes = 1536;
    program.inputs.push(Binding { port: 1, place: in_arena.clone(), splits: vec![] });
    program.steps[0].action = Action::Library {
        kernel: 0,
        operands: vec![at(0, &local), weight(0, &[4, 4])],
        results: vec![at(256, &local)],
        workspace: None,
        algorithm: vec![],
    };
    let launch = |kernel: &Kernel, number, operands, results, scalars| {
        let Implementation::Cuda { rule, .. } = &kernel.implementation else { panic!("no code") };
        let launch = Some(rule.shape(&kernel.spec).unwrap());
        Action::Launch { kernel: number, operands, results, scalars, launch }
    };
    let rows = |from, to, word| {
        let operands = vec![at(from, &local), in_arena.clone()];
        launch(&plan.kernels[1], 1, operands, vec![at(to, &local)], vec![Argument::Fault { word }])
    };
    program.steps[1].action = rows(0, 768, 0);
    if let Action::Collective { algorithm, .. } = &mut program.steps[2].action {
        *algorithm = CollectiveAlgorithm::Nccl;
    }
    let operands = vec![at(512, &local), weight(256, &[4]), at(768, &local)];
    let rank = vec![Argument::Scalar { value: RankScalar::ByRank(vec![0, 2]) }];
    program.steps[3].action = launch(&plan.kernels[2], 2, operands, vec![at(512, &local)], rank);
    program.steps.push(step(0, rows(512, 1280, 1), &[]));
    plan
}

/// A kernel with machine code that says what it takes: so many threads for each element, blocks in clusters of so many.
fn coded(code: &mut Vec<Code>, name: &str, spec: Spec, [threads, cluster]: [u32; 2], shared_bytes: u32) -> Kernel {
    let result = *spec.results.first().unwrap();
    let sizes = (0..2).map(|axis| SizeOf { value: result, axis }).collect();
    let blocks = vec![Factor::Tiles { sizes, tile: 4 }, Factor::Count(u64::from(cluster.max(1)))];
    let rule = LaunchRule { grid: [blocks, vec![], vec![]], block: [threads, 1, 1], shared_bytes };
    let symbol = format!("{name}_kernel");
    let scalars = spec.rank_scalars().len() + usize::from(spec.checks_indices());
    let cubin = forge(&Forged {
        architecture: 90,
        symbol: symbol.clone(),
        parameters: (spec.inputs.len() + spec.results.len() + scalars) as u16,
        threads,
        registers: 32,
        shared_bytes: 1024,
        cluster,
        labels: vec![[1; LABEL_BYTES], label(&spec, &symbol, &rule).unwrap()],
    });
    code.push(Code { architecture: "sm_90a".to_owned(), cubin });
    let implementation = Implementation::Cuda { code: code.len() as u32 - 1, symbol, rule };
    Kernel { name: name.to_owned(), spec, implementation }
}
