//! Sessions over plans written by hand.

use std::path::PathBuf;

use planfile::plan::*;
use planfile::{Combine, DType, Expr, Op, PlanError, Recipe, Source, Spec, TensorType, write_plan};
use tempfile::TempDir;

use super::*;
use crate::error::StepError;

fn f32s(sizes: &[u64]) -> TensorType {
    TensorType::new(DType::F32, sizes)
}

fn at(offset: u64, ty: &TensorType) -> Place {
    Place { ty: ty.clone(), at: Argument::Arena { offset } }
}

/// `dim` in equal runs, one per rank.
fn even(dim: u8, len: u64, ranks: u64) -> SplitDim {
    let piece = |rank| vec![PlanPiece { global: rank * len, local: 0, len }];
    SplitDim { dim, pieces: (0..ranks).map(piece).collect() }
}

fn step(action: Action) -> Step {
    Step { action, stream: 0, waits: vec![], origin: vec![0], cost: StepCost::default() }
}

fn collective(op: Op, operands: Vec<Place>, results: Vec<Place>) -> Step {
    step(Action::Collective { op, operands, results, algorithm: CollectiveAlgorithm::Host })
}

/// A plan of these programs with one entry, no weights and one ONNX node, `/the/node`.
fn plan(ranks: u32, inputs: &[(&str, TensorType)], output: TensorType, programs: Vec<Program>) -> Plan {
    let ports = |ports: &[(&str, TensorType)]| {
        ports.iter().map(|(name, ty)| PlanPort { name: (*name).to_owned(), ty: ty.clone() }).collect()
    };
    Plan {
        manifest: Manifest {
            producer: "test".to_owned(),
            model: "test".to_owned(),
            files: vec![],
            fingerprint: Default::default(),
            mesh: vec![PlanAxis { name: "tensor".to_owned(), size: ranks }],
            ranks,
            target: TargetRef { name: "virtual".to_owned(), architecture: "cpu".to_owned() },
            entries: vec![PlanEntry {
                name: "main".to_owned(),
                inputs: ports(inputs),
                outputs: ports(&[("y", output)]),
                frozen: vec![],
                programs: (0..programs.len() as u32).collect(),
                predicted_ns: 0,
            }],
            weights: vec![],
            placed: vec![],
            weight_arena_bytes: vec![0; ranks as usize],
            image_bytes: 0,
            states: vec![],
            links: vec![],
        },
        programs,
        kernels: vec![],
        code: vec![],
        explanations: Explanations { names: vec!["/the/node".to_owned()], ..Explanations::default() },
    }
}

fn program(ranks: Vec<u32>, inputs: Vec<Binding>, outputs: Vec<Binding>, steps: Vec<Step>) -> Program {
    Program { entry: 0, stage: 0, ranks, inputs, outputs, steps, arena_bytes: 4096, peer_arena_bytes: 0, streams: 1 }
}

/// `y = op(x)`, both divided along a dimension or not at all.
fn plan_of(op: Op, x: (&TensorType, Option<u8>), local: &TensorType, y: (&TensorType, Option<u8>)) -> Plan {
    let divide = |(ty, dim): (&TensorType, Option<u8>)| {
        dim.map(|dim| even(dim, ty.size(usize::from(dim)) / 2, 2)).into_iter().collect::<Vec<_>>()
    };
    let mut part = x.0.clone();
    if let Some(dim) = x.1 {
        part.dims[usize::from(dim)] = (x.0.size(usize::from(dim)) / 2).into();
    }
    let inputs = vec![Binding { port: 0, place: at(0, &part), splits: divide(x) }];
    let outputs = vec![Binding { port: 0, place: at(1024, local), splits: divide(y) }];
    let steps = vec![collective(op, vec![at(0, &part)], vec![at(1024, local)])];
    plan(2, &[("x", x.0.clone())], y.0.clone(), vec![program(vec![0, 1], inputs, outputs, steps)])
}

struct Saved {
    _folder: TempDir,
    path: PathBuf,
}

fn save(plan: &Plan, image: &[u8]) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.plan");
    write_plan::<PlanError>(&path, plan, |sink| sink.push(0, image)).unwrap();
    Saved { _folder: folder, path }
}

fn run(plan: &Plan, inputs: &[(&str, Tensor)]) -> Result<Vec<(String, Tensor)>, RuntimeError> {
    let session = Session::load(&save(plan, &[]).path, Devices::Virtual)?;
    let inputs = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
    session.context()?.run("main", &inputs)
}

fn counting(sizes: &[u64]) -> Tensor {
    let elements: Vec<f32> = (0..sizes.iter().product::<u64>()).map(|value| value as f32).collect();
    Tensor::from_elements(sizes, &elements).unwrap()
}

fn groups() -> Vec<Vec<u32>> {
    vec![vec![0, 1]]
}

#[test]
fn gathering_restores_the_whole() {
    let whole = f32s(&[4, 4]);
    let gather = Op::AllGather { axis: 0, groups: groups() };
    let outputs = run(&plan_of(gather, (&whole, Some(0)), &whole, (&whole, None)), &[("x", counting(&[4, 4]))]);
    assert_eq!(outputs.unwrap(), [("y".to_owned(), counting(&[4, 4]))]);
}

#[test]
fn all_to_all_moves_the_split_to_another_dimension() {
    let whole = f32s(&[4, 4]);
    let exchange = Op::AllToAll { split: 1, concat: 0, groups: groups() };
    let plan = plan_of(exchange, (&whole, Some(0)), &f32s(&[4, 2]), (&whole, Some(1)));
    assert_eq!(run(&plan, &[("x", counting(&[4, 4]))]).unwrap()[0].1, counting(&[4, 4]));
}

#[test]
fn reductions_add_what_the_ranks_hold() {
    let (whole, half) = (f32s(&[4, 2]), f32s(&[2, 2]));
    let expected = Tensor::from_elements(&[2, 2], &[4.0f32, 6.0, 8.0, 10.0]).unwrap();
    let reduce = Op::AllReduce { combine: Combine::Sum, groups: groups() };
    let plan = plan_of(reduce, (&whole, Some(0)), &half, (&half, None));
    assert_eq!(run(&plan, &[("x", counting(&[4, 2]))]).unwrap()[0].1, expected);
    let scatter = Op::ReduceScatter { combine: Combine::Sum, axis: 1, groups: groups() };
    let plan = plan_of(scatter, (&whole, Some(0)), &f32s(&[2, 1]), (&half, Some(1)));
    assert_eq!(run(&plan, &[("x", counting(&[4, 2]))]).unwrap()[0].1, expected);
}

/// `y = x`, where `x` goes from the first stage to the second and back.
fn stages() -> Plan {
    let ty = f32s(&[4]);
    let send = |peer, channel| collective(Op::Send { channel, peers: vec![peer] }, vec![at(0, &ty)], vec![]);
    let recv = |peer, channel, offset| {
        let op = Op::Recv { channel, peers: vec![peer], ty: ty.clone() };
        collective(op, vec![], vec![at(offset, &ty)])
    };
    let port = |offset| vec![Binding { port: 0, place: at(offset, &ty), splits: vec![] }];
    let copy = step(Action::Copy { from: at(0, &ty), to: at(1024, &ty) });
    let first = program(vec![0], port(0), port(1024), vec![send(1, 0), recv(1, 1, 256), copy]);
    let second = Program { stage: 1, ..program(vec![1], vec![], vec![], vec![recv(0, 0, 0), send(0, 1)]) };
    plan(2, &[("x", ty.clone())], ty.clone(), vec![first, second])
}

#[test]
fn stages_send_and_receive() {
    assert_eq!(run(&stages(), &[("x", counting(&[4]))]).unwrap()[0].1, counting(&[4]));
}

/// `y = all_reduce(x[i]) * w`, where each rank has an index of its own, and `w` is on both.
fn indexed() -> Plan {
    let (table, one, index) = (f32s(&[4]), f32s(&[1]), TensorType::new(DType::I64, &[1]));
    let product = Op::Pointwise {
        expr: Expr::operand(0).binary(planfile::Binary::Mul, Expr::operand(1)),
        dims: one.dims.clone(),
    };
    let kernel = |op, inputs| Kernel {
        name: "kernel".to_owned(),
        spec: Spec::of(op, inputs).unwrap(),
        implementation: Implementation::Reference,
    };
    let launch =
        |kernel, operands, results| step(Action::Launch { kernel, operands, results, scalars: vec![], launch: None });
    let inputs = vec![
        Binding { port: 0, place: at(0, &table), splits: vec![] },
        Binding { port: 1, place: at(256, &index), splits: vec![even(0, 1, 2)] },
    ];
    let outputs = vec![Binding { port: 0, place: at(1024, &one), splits: vec![] }];
    let reduce = Op::AllReduce { combine: Combine::Sum, groups: groups() };
    let weight = Place { ty: one.clone(), at: Argument::Weights { offset: 256 } };
    let steps = vec![
        launch(0, vec![at(0, &table), at(256, &index)], vec![at(512, &one)]),
        collective(reduce, vec![at(512, &one)], vec![at(768, &one)]),
        launch(1, vec![at(768, &one), weight], vec![at(1024, &one)]),
    ];
    let indexes = TensorType::new(DType::I64, &[2]);
    let program = program(vec![0, 1], inputs, outputs, steps);
    let mut plan = plan(2, &[("x", table.clone()), ("i", indexes)], one.clone(), vec![program]);
    plan.kernels = vec![kernel(Op::Gather { axis: 0 }, vec![table, index]), kernel(product, vec![one.clone(); 2])];
    let recipe = Recipe::source(one.clone(), Source::Random { seed: 1 });
    plan.manifest.weights = vec![PlanWeight { name: "w".to_owned(), ty: one.clone(), recipe }];
    plan.manifest.placed = vec![PlacedWeight {
        weight: 0,
        stage: 0,
        ranks: vec![0, 1],
        ty: one,
        arena_offset: 256,
        splits: vec![],
        images: vec![0, 0],
    }];
    plan.manifest.weight_arena_bytes = vec![512, 512];
    plan.manifest.image_bytes = 4;
    plan
}

fn indexes(elements: [i64; 2]) -> BTreeMap<String, Tensor> {
    let indexes = Tensor::from_elements(&[2], &elements).unwrap();
    BTreeMap::from([("x".to_owned(), counting(&[4])), ("i".to_owned(), indexes)])
}

#[test]
fn contexts_share_weights_and_run_again() {
    let saved = save(&indexed(), &2.5f32.to_le_bytes());
    let session = Session::load(&saved.path, Devices::Virtual).unwrap();
    let (mut first, mut second) = (session.context().unwrap(), session.context().unwrap());
    for (context, given, expected) in [(&mut first, [1, 3], 10.0f32), (&mut second, [2, 2], 10.0)] {
        let outputs = context.run("main", &indexes(given)).unwrap();
        assert_eq!(outputs[0].1.elements::<f32>().unwrap(), [expected]);
    }
    assert_eq!(first.run("main", &indexes([0, 1])).unwrap()[0].1.elements::<f32>().unwrap(), [2.5]);
}

#[test]
fn a_rank_that_fails_is_named_and_nobody_waits_for_it() {
    let saved = save(&indexed(), &1f32.to_le_bytes());
    let mut context = Session::load(&saved.path, Devices::Virtual).unwrap().context().unwrap();
    let error = context.run("main", &indexes([1, 9])).unwrap_err();
    assert!(matches!(&error, RuntimeError::Step { rank: 1, step: 0, source: StepError::Cpu(_), .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("rank 1") && message.contains("/the/node") && message.contains("index 9"), "{message}");
    // The context is as good as new.
    assert!(context.run("main", &indexes([1, 1])).is_ok());
}

#[test]
fn entries_and_inputs_are_checked_by_name() {
    let saved = save(&indexed(), &1f32.to_le_bytes());
    let mut context = Session::load(&saved.path, Devices::Virtual).unwrap().context().unwrap();
    let message = context.run("decode", &indexes([0, 0])).unwrap_err().to_string();
    assert!(message.contains("no entry `decode`") && message.contains("`main`"), "{message}");
    let missing = BTreeMap::from([("x".to_owned(), counting(&[4]))]);
    assert!(matches!(context.run("main", &missing), Err(RuntimeError::MissingInput { .. })));
}

#[test]
fn a_flipped_byte_is_noticed_on_load() {
    let saved = save(&indexed(), &1f32.to_le_bytes());
    let mut bytes = std::fs::read(&saved.path).unwrap();
    // The weights section is last.
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&saved.path, bytes).unwrap();
    let error = Session::load(&saved.path, Devices::Virtual).map(drop).unwrap_err();
    assert!(matches!(error, RuntimeError::Plan(PlanError::Damaged { .. })), "{error}");
}

/// A plan for GPUs: two ranks, or one, that each copy their input.
fn gpu_plan(ranks: u32, architecture: &str) -> Plan {
    let mut plan = plan_of(
        Op::AllGather { axis: 0, groups: groups() },
        (&f32s(&[4, 4]), Some(0)),
        &f32s(&[4, 4]),
        (&f32s(&[4, 4]), None),
    );
    if ranks == 1 {
        let port = |offset| vec![Binding { port: 0, place: at(offset, &f32s(&[4])), splits: vec![] }];
        let copy = step(Action::Copy { from: at(0, &f32s(&[4])), to: at(1024, &f32s(&[4])) });
        let program = program(vec![0], port(0), port(1024), vec![copy]);
        plan = self::plan(1, &[("x", f32s(&[4]))], f32s(&[4]), vec![program]);
    }
    compiled_for(plan, architecture)
}

/// The plan for GPUs of that architecture, whose ranks exchange through NCCL.
fn compiled_for(mut plan: Plan, architecture: &str) -> Plan {
    for step in plan.programs.iter_mut().flat_map(|program| &mut program.steps) {
        if let Action::Collective { algorithm, .. } = &mut step.action {
            *algorithm = CollectiveAlgorithm::Nccl;
        }
    }
    plan.manifest.target.architecture = architecture.to_owned();
    plan
}

fn load_on_gpus(plan: &Plan, ordinals: Option<&[u32]>) -> RuntimeError {
    let devices = Devices::Cuda { ordinals: ordinals.map(<[u32]>::to_vec) };
    Session::load(&save(plan, &[]).path, devices).map(drop).unwrap_err()
}

#[test]
fn gpus_are_chosen_before_anything_is_opened() {
    let twice = load_on_gpus(&gpu_plan(2, "sm_90a"), Some(&[1, 1]));
    assert!(matches!(twice, RuntimeError::SameGpu { ordinal: 1 }), "{twice}");
    let too_few = load_on_gpus(&gpu_plan(2, "sm_90a"), Some(&[0]));
    assert!(matches!(too_few, RuntimeError::GpuCount { ranks: 2, given: 1 }), "{too_few}");
}

#[test]
#[ignore = "needs a machine without an NVIDIA driver"]
fn without_a_driver_the_error_says_what_to_do() {
    let message = load_on_gpus(&gpu_plan(1, "sm_90a"), None).to_string();
    assert!(message.contains("the CUDA driver was not found: looked for libcuda.so.1"), "{message}");
    assert!(message.contains("--devices cpu"), "{message}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_copies_in_a_graph_and_step_by_step() {
    let session = on_gpus(gpu_plan(1, "sm_90"));
    let mut context = session.context().unwrap();
    let inputs = |first: f32| {
        let tensor = Tensor::from_elements(&[4], &[first, 2.0, 3.0, 4.0]).unwrap();
        BTreeMap::from([("x".to_owned(), tensor)])
    };
    // The first run goes step by step, the second by graph.
    for first in [1.0, 7.0] {
        assert_eq!(context.run("main", &inputs(first)).unwrap()[0].1, inputs(first)["x"]);
    }
    let mut records = Vec::new();
    let outputs = context.run_recorded("main", &inputs(5.0), &mut |record| records.push(record)).unwrap();
    assert_eq!((&records[0].operands[0], &records[0].results[0]), (&outputs[0].1, &inputs(5.0)["x"]));
    assert_eq!(records.len(), 1);
    assert!(context.time_graph("main", &inputs(1.0), 3).unwrap().iter().all(|&us| us > 0.0));
    assert!(context.time_steps("main", &inputs(1.0), 10, 3).unwrap()[0].us > 0.0);
    let elsewhere = load_on_gpus(&gpu_plan(1, "sm_75"), None);
    assert!(matches!(elsewhere, RuntimeError::Architecture { .. }), "{elsewhere}");
}

/// Loads a plan for the first GPUs.
fn on_gpus(plan: Plan) -> Session {
    let (major, minor) = cuda::gpus().unwrap()[0].capability;
    let plan = compiled_for(plan, &format!("sm_{major}{minor}"));
    Session::load(&save(&plan, &[]).path, Devices::Cuda { ordinals: None }).unwrap()
}

/// Two threads run a context each, many times, each with inputs of its own.
fn run_two_contexts_at_once(session: &Session, expected: impl Fn(&Tensor) -> Tensor + Sync) {
    let sizes = session.entries()[0].inputs[0].ty.sizes();
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (sizes, expected) = (&sizes, &expected);
            scope.spawn(move || {
                let mut context = session.context().unwrap();
                for run in 0..100 {
                    let first = (1000 * number + run) as f32;
                    let elements: Vec<f32> =
                        (0..sizes.iter().product::<u64>()).map(|value| first + value as f32).collect();
                    let input = Tensor::from_elements(sizes, &elements).unwrap();
                    let inputs = BTreeMap::from([("x".to_owned(), input.clone())]);
                    assert_eq!(context.run("main", &inputs).unwrap()[0].1, expected(&input));
                }
            });
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn two_contexts_run_at_once_on_one_gpu() {
    run_two_contexts_at_once(&on_gpus(gpu_plan(1, "sm_90")), Tensor::clone);
}

#[test]
#[ignore = "needs 2 GPUs"]
fn two_contexts_that_exchange_take_turns() {
    run_two_contexts_at_once(&on_gpus(gpu_plan(2, "sm_90")), Tensor::clone);
}

/// `y = x` without a step: the output is where the input is.
fn plan_without_steps(sizes: &[u64], arena_bytes: u64) -> Plan {
    let ty = f32s(sizes);
    let port = || vec![Binding { port: 0, place: at(0, &ty), splits: vec![] }];
    let program = Program { arena_bytes, ..program(vec![0], port(), port(), vec![]) };
    plan(1, &[("x", ty.clone())], ty.clone(), vec![program])
}

#[test]
fn programs_without_steps_and_tensors_without_elements_run() {
    for (sizes, arena_bytes) in [(&[4][..], 4096), (&[3, 0], 256), (&[0], 0)] {
        let outputs = run(&plan_without_steps(sizes, arena_bytes), &[("x", counting(sizes))]).unwrap();
        assert_eq!(outputs[0].1, counting(sizes));
    }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn programs_without_steps_and_tensors_without_elements_run_on_a_gpu() {
    for (sizes, arena_bytes) in [(&[4][..], 4096), (&[3, 0], 256), (&[0], 0)] {
        let mut context = on_gpus(plan_without_steps(sizes, arena_bytes)).context().unwrap();
        let inputs = BTreeMap::from([("x".to_owned(), counting(sizes))]);
        for _ in 0..3 {
            assert_eq!(context.run("main", &inputs).unwrap()[0].1, counting(sizes));
        }
        assert_eq!(context.time_graph("main", &inputs, 3).unwrap().len(), 3);
        assert!(context.time_steps("main", &inputs, 3, 3).unwrap().is_empty());
    }
}

#[test]
#[ignore = "needs 2 GPUs"]
fn a_rank_that_panics_frees_the_other_and_the_next_context_runs() {
    let session = on_gpus(gpu_plan(2, "sm_90"));
    let inputs = BTreeMap::from([("x".to_owned(), counting(&[4, 4]))]);
    let mut context = session.context().unwrap();
    for _ in 0..2 {
        assert_eq!(context.run("main", &inputs).unwrap()[0].1, inputs["x"]);
    }
    let start = std::time::Instant::now();
    let Ranks::Cuda(ranks) = &mut context.ranks else { unreachable!("the session is on GPUs") };
    let error = ranks.run_with_panic(0, &[&inputs["x"]], 1).unwrap_err();
    assert!(matches!(error, RuntimeError::Panicked { rank: 1 }), "{error}");
    let again = context.run("main", &inputs).unwrap_err();
    assert!(matches!(again, RuntimeError::Broken), "{again}");
    drop(context);
    // Well before the ranks would have been given up.
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(session.context().unwrap().run("main", &inputs).unwrap()[0].1, inputs["x"]);
}

#[test]
#[ignore = "needs 2 GPUs"]
fn two_gpus_exchange_through_nccl() {
    let (whole, half) = (f32s(&[4, 4]), f32s(&[2, 4]));
    let reduced = Tensor::from_elements(&[2, 4], &[8.0f32, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0]).unwrap();
    let rows = [0u8, 2, 1, 3].map(|row| [0, 1, 2, 3].map(|column| f32::from(4 * row + column)));
    let exchanged = Tensor::from_elements(&[4, 4], rows.as_flattened()).unwrap();
    let sum = Combine::Sum;
    let plans = [
        (
            plan_of(Op::AllGather { axis: 0, groups: groups() }, (&whole, Some(0)), &whole, (&whole, None)),
            counting(&[4, 4]),
        ),
        (
            plan_of(Op::AllReduce { combine: sum, groups: groups() }, (&whole, Some(0)), &half, (&half, None)),
            reduced.clone(),
        ),
        (
            plan_of(
                Op::ReduceScatter { combine: sum, axis: 0, groups: groups() },
                (&whole, Some(0)),
                &f32s(&[1, 4]),
                (&half, Some(0)),
            ),
            reduced,
        ),
        (
            plan_of(
                Op::AllToAll { split: 0, concat: 0, groups: groups() },
                (&whole, Some(0)),
                &half,
                (&whole, Some(0)),
            ),
            exchanged,
        ),
        (stages(), counting(&[4])),
    ];
    for (plan, expected) in plans {
        let session = on_gpus(plan);
        let mut context = session.context().unwrap();
        let sizes = session.entries()[0].inputs[0].ty.sizes();
        let inputs = BTreeMap::from([("x".to_owned(), counting(&sizes))]);
        for _ in 0..3 {
            assert_eq!(context.run("main", &inputs).unwrap()[0].1, expected);
        }
        assert_eq!(context.time_graph("main", &inputs, 5).unwrap().len(), 5);
        let steps: usize =
            session.plan().programs.iter().map(|program| program.steps.len() * program.ranks.len()).sum();
        assert_eq!(context.time_steps("main", &inputs, 4, 2).unwrap().len(), steps);
        let mut records = 0;
        let outputs = context.run_recorded("main", &inputs, &mut |_| records += 1).unwrap();
        assert_eq!((&outputs[0].1, records), (&expected, steps));
    }
}

#[test]
fn devices_are_written_as_they_are_read() {
    for text in ["cpu", "cuda", "cuda:0", "cuda:2,0"] {
        assert_eq!(text.parse::<Devices>().unwrap().to_string(), text);
    }
    assert_eq!("cuda:2,0".parse(), Ok(Devices::Cuda { ordinals: Some(vec![2, 0]) }));
    for wrong in ["gpu", "cuda:", "cuda:a", "cpu:0", ""] {
        assert!(wrong.parse::<Devices>().is_err(), "{wrong}");
    }
    assert_eq!(Devices::of(&gpu_plan(1, "sm_90a")), Devices::Cuda { ordinals: None });
    assert_eq!(Devices::of(&gpu_plan(1, "cpu")), Devices::Virtual);
}
