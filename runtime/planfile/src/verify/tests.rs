//! One plan that is fine, and for every check a change of it that must be refused for the right reason.

use super::*;
use crate::LaunchRule;
use crate::dtype::DType;
use crate::expr::RankScalar;
use crate::op::{Combine, Op};
use crate::plan::*;
use crate::sample;
use crate::spec::{Recipe, Source};
use crate::tensor::{Buffer, Tensor};
use crate::types::{Dim, ExtentId};

mod device_code;

fn f32s(sizes: &[u64]) -> TensorType {
    TensorType::new(DType::F32, sizes)
}

/// The change makes a finding that contains `expected`.
#[track_caller]
fn refused_in(mut plan: Plan, expected: &str, change: impl FnOnce(&mut Plan)) {
    change(&mut plan);
    let findings = verify(&plan).expect_err(expected);
    let lines: Vec<String> = findings.iter().map(Finding::to_string).collect();
    assert!(lines.iter().any(|line| line.contains(expected)), "expected `{expected}` in {lines:#?}");
}

#[track_caller]
fn refused(expected: &str, change: impl FnOnce(&mut Plan)) {
    refused_in(sample::plan(), expected, change);
}

/// A product of `[2, 4]` and `[4, 4]`, whose left rows are so far apart.
fn library(left_stride: u64) -> Implementation {
    let matrix = |operand, row_stride| Matrix { operand, offset: 0, row_stride, column_stride: 1, batch_stride: 0 };
    let call = Call::Matmul(Matmul {
        m: 2,
        n: 4,
        k: 4,
        batch: 1,
        a: matrix(0, left_stride),
        b: matrix(1, 4),
        result: matrix(0, 4),
        scale: crate::op::Real(1.0),
        bias: None,
        residual: None,
        activation: Activation::None,
        allow_tf32: false,
    });
    Implementation::Library { library: Library::CublasLt, version: "13".to_owned(), call }
}

fn steps(plan: &mut Plan) -> &mut Vec<Step> {
    &mut plan.programs[0].steps
}

fn operands(plan: &mut Plan, step: usize) -> &mut Vec<Place> {
    match &mut plan.programs[0].steps[step].action {
        Action::Launch { operands, .. } | Action::Collective { operands, .. } => operands,
        _ => panic!("step {step} has no operands"),
    }
}

fn results(plan: &mut Plan, step: usize) -> &mut Vec<Place> {
    match &mut plan.programs[0].steps[step].action {
        Action::Launch { results, .. } | Action::Collective { results, .. } => results,
        _ => panic!("step {step} has no results"),
    }
}

fn arena(offset: u64) -> Argument {
    Argument::Arena { offset }
}

#[test]
fn sound_plans_pass() {
    assert_eq!(verify(&sample::plan()), Ok(()));
    assert_eq!(verify(&sample::gpu()), Ok(()));
    assert_eq!(verify(&sample::staged()), Ok(()));
}

#[test]
fn mesh_and_names() {
    refused("3 sizes of weight arenas for 2 ranks", |plan| plan.manifest.weight_arena_bytes.push(0));
    refused("the mesh does not make 2 ranks", |plan| plan.manifest.mesh[0].size = 3);
    refused("0 ranks", |plan| plan.manifest.ranks = 0);
    let link = |ranks| LinkRequirement { ranks, class: "host".to_owned() };
    refused("link of class `host` between (0, 2), which do not exchange", |plan| plan.manifest.links[0] = link((0, 2)));
    refused("link of class `host` between (1, 0), which do not exchange", |plan| plan.manifest.links[0] = link((1, 0)));
    refused("link of class `host` between (0, 1), which do not exchange", |plan| {
        plan.manifest.links.push(link((0, 1)))
    });
    refused("link of class `` between (0, 1)", |plan| plan.manifest.links[0].class.clear());
    refused_in(sample::staged(), "no link between", |plan| plan.manifest.links[0] = link((2, 3)));
    refused("two weights are named `w`", |plan| plan.manifest.weights[1].name = "w".to_owned());
    refused("two inputs are named `x`", |plan| {
        let again = plan.manifest.entries[0].inputs[0].clone();
        plan.manifest.entries[0].inputs.push(again);
    });
    let of = |name: &str, value| FrozenInput { input: name.to_owned(), value, node: "/Reshape".to_owned(), nodes: 1 };
    let frozen = |name: &str, sizes: &[u64]| of(name, Tensor::zeroed(f32s(sizes)).unwrap());
    refused("two frozen inputs are named `x`", |plan| {
        plan.manifest.entries[0].frozen = vec![frozen("x", &[2, 8]), frozen("x", &[2, 8])];
    });
    refused("f32[1] for the input f32[2, 8]", |plan| plan.manifest.entries[0].frozen.push(frozen("x", &[1])));
    refused("there is no such input", |plan| plan.manifest.entries[0].frozen.push(frozen("p", &[1])));
    refused("4 bytes for f32[3]", |plan| {
        let value = Tensor { ty: f32s(&[3]), data: Buffer::zeroed(4) };
        plan.manifest.entries[0].frozen.push(of("p", value));
    });
    refused("leaves the model's folder", |plan| plan.manifest.files[0].name = "a/../../b".to_owned());
    refused("leaves the model's folder", |plan| plan.manifest.files[0].name = "/etc/passwd".to_owned());
    refused("overflows 63 bits", |plan| plan.manifest.entries[0].inputs[0].ty = f32s(&[u64::MAX, 2]));
}

#[test]
fn texts_are_printable() {
    refused("weight `w\\u{1b}[2J`: has control characters", |plan| {
        plan.manifest.weights[0].name = "w\u{1b}[2J".to_owned()
    });
    refused("node `a\\nb`", |plan| plan.explanations.names.push("a\nb".to_owned()));
    refused("sentence `\\u{9b}`", |plan| plan.explanations.sharding.push("\u{9b}".to_owned()));
    refused("input `\\u{7f}`", |plan| plan.manifest.entries[0].inputs[0].name = "\u{7f}".to_owned());
    refused("file `\\r`", |plan| plan.manifest.files[0].name = "\r".to_owned());
    refused("kernel `\\0`", |plan| plan.kernels[0].name = "\0".to_owned());
    // Names of another script are no control characters.
    let mut plan = sample::plan();
    plan.manifest.model = "größe → 大小".to_owned();
    verify(&plan).unwrap();
}

#[test]
fn recipes() {
    let source = |plan: &mut Plan, source| plan.manifest.weights[0].recipe.inputs[0].source = source;
    refused("the recipe reads file 1", |plan| source(plan, Source::File { file: 1, offset: 0 }));
    refused("at 4000 of `sample.onnx`", |plan| source(plan, Source::File { file: 0, offset: 4000 }));
    refused("of `sample.onnx`", |plan| source(plan, Source::File { file: 0, offset: u64::MAX }));
    refused("the recipe holds 3 bytes", |plan| source(plan, Source::Inline(Buffer::zeroed(3))));
    refused("the recipe makes f32[4], not f32[8, 4]", |plan| {
        plan.manifest.weights[0].recipe = Recipe::source(f32s(&[4]), Source::Random { seed: 1 });
    });
    refused("ingredients are not what", |plan| plan.manifest.weights[0].recipe.inputs.clear());
    refused("the recipe's slice is not for one device", |plan| {
        let starts = vec![RankScalar::ByRank(vec![0, 1]), 0.into()];
        let op = Op::Slice { starts, steps: vec![1, 1], sizes: vec![7, 4] };
        plan.manifest.weights[0].recipe.spec = crate::spec::Spec::of(op, vec![f32s(&[8, 4])]).unwrap();
    });
}

#[test]
fn placed_weights() {
    let placed = |change: fn(&mut PlacedWeight)| move |plan: &mut Plan| change(&mut plan.manifest.placed[0]);
    refused("is weight 2 of 2", placed(|placed| placed.weight = 2));
    refused("are not those of stage 1", placed(|placed| placed.stage = 1));
    refused("are not those of stage 0", placed(|placed| placed.ranks = vec![0]));
    refused("offset 64 is not a multiple of 256", placed(|placed| placed.arena_offset = 64));
    refused("64 bytes at 512 of 512 of the weight arena of rank 0", placed(|placed| placed.arena_offset = 512));
    refused("weights `b` and `w` overlap", |plan| plan.manifest.placed[1].arena_offset = 0);
    refused("1 images for 2 ranks", placed(|placed| placed.images.truncate(1)));
    refused("image of 64 bytes at 257 of 320", placed(|placed| placed.images[1] = 257));
    refused("pieces for 1 ranks of 2", placed(|placed| placed.splits[0].pieces.truncate(1)));
    refused("f32[4] is no part of f32[8, 4]", placed(|placed| placed.ty = f32s(&[4])));
    refused("`w`: dimension 0: piece of 4 from 5 of 8", placed(|placed| placed.splits[0].pieces[1][0].global = 5));
}

#[test]
fn programs_entries_and_stages() {
    refused("stage 0 is program 1, which is not for it", |plan| plan.manifest.entries[0].programs = vec![1]);
    refused("serves 0 entries", |plan| plan.manifest.entries[0].programs.clear());
    refused("are not ascending and below 2", |plan| plan.programs[0].ranks = vec![1, 0]);
    refused("are not ascending and below 2", |plan| plan.programs[0].ranks = vec![0, 2]);
    refused("0 streams", |plan| plan.programs[0].streams = 0);
    refused("an arena of", |plan| plan.programs[0].arena_bytes = u64::MAX);
    refused_in(sample::staged(), "stage 1: shares rank 0 with stage 0", |plan| plan.programs[1].ranks = vec![0]);
}

#[test]
fn bindings() {
    refused("input 1: there are 1", |plan| plan.programs[0].inputs[0].port = 1);
    refused("input 0: 32 bytes at 1024 of 1024", |plan| plan.programs[0].inputs[0].place.at = arena(1024));
    refused("input 0: is bound outside", |plan| plan.programs[0].inputs[0].place.at = Argument::Weights { offset: 0 });
    refused("dimension 1 is not split, but 4 of 8", |plan| plan.programs[0].inputs[0].splits.clear());
    refused("output 0: no rank has the part at [(1, 2)]", |plan| {
        let piece = PlanPiece { global: 0, local: 0, len: 2 };
        plan.programs[0].outputs[0].splits = vec![SplitDim { dim: 1, pieces: vec![vec![piece], vec![piece]] }];
    });
    refused("0 programs bind this output", |plan| plan.programs[0].outputs.clear());
    refused("input 0: shares bytes 0x0..0x20 with another input", |plan| {
        let again = plan.programs[0].inputs[0].clone();
        plan.programs[0].inputs.push(again);
    });
}

#[test]
fn kernels() {
    refused("node 0 (pointwise)", |plan| plan.kernels[1].spec.inputs[0] = f32s(&[3, 3]));
    refused("reads a value that is not defined yet", |plan| plan.kernels[1].spec.nodes[0].operands[0] = 9);
    refused("all_reduce inside a kernel", |plan| {
        let op = Op::AllReduce { combine: Combine::Sum, groups: vec![vec![0, 1]] };
        plan.kernels[1] = sample::kernel("k", op, vec![f32s(&[2, 4])]);
    });
    let on_gpu = |expected: &str, change: fn(&mut Plan)| refused_in(sample::gpu(), expected, change);
    on_gpu("kernel `dot_f32` is not called this way", |plan| {
        if let Action::Launch { kernel, operands, .. } = &mut steps(plan)[3].action {
            (*kernel, operands[0].at) = (0, arena(256));
        }
    });
    on_gpu("the left matrix reaches outside of its 8 elements", |plan| {
        plan.kernels[0].implementation = library(5);
    });
    refused("has tables of 3 values for 2 ranks", |plan| {
        let starts = vec![RankScalar::ByRank(vec![0, 0, 0]), 0.into()];
        let op = Op::Slice { starts, steps: vec![1, 1], sizes: vec![2, 4] };
        plan.kernels[1] = sample::kernel("slice", op, vec![f32s(&[2, 4])]);
    });
}

#[test]
fn operands_and_results() {
    refused("step #0: kernel 7 of 3", |plan| {
        if let Action::Launch { kernel, .. } = &mut steps(plan)[0].action {
            *kernel = 7;
        }
    });
    refused("kernel `dot_f32`: 1 operands, expected 2", |plan| operands(plan, 0).truncate(1));
    refused("operand 0 is f32[4, 2], expected f32[2, 4]", |plan| operands(plan, 0)[0].ty = f32s(&[4, 2]));
    refused("operand 0: offset 4 is not a multiple of 256", |plan| operands(plan, 0)[0].at = arena(4));
    refused("operand 0: 32 bytes at 18446744073709551360 of 1024", |plan| {
        operands(plan, 0)[0].at = arena(u64::MAX - 255);
    });
    refused("64 bytes at 512 of 512 of the weight arena", |plan| {
        operands(plan, 0)[1].at = Argument::Weights { offset: 512 };
    });
    refused("result 0: writes to weights", |plan| results(plan, 0)[0].at = Argument::Weights { offset: 0 });
    refused("operand 0: state 0 of 0", |plan| operands(plan, 0)[0].at = Argument::State { state: 0, offset: 0 });
    refused("a tensor that is not in memory", |plan| operands(plan, 0)[0].at = Argument::Epoch);
    refused("peer 2 is not a rank of this program", |plan| {
        plan.programs[0].peer_arena_bytes = 256;
        operands(plan, 0)[0].at = Argument::Peer { rank: 2.into(), offset: 0 };
    });
    refused("a table of 1 values for 2 ranks", |plan| {
        operands(plan, 0)[0].at = Argument::Peer { rank: RankScalar::ByRank(vec![0]), offset: 0 };
    });
    refused("two ranks write to the same peer", |plan| {
        plan.programs[0].peer_arena_bytes = 256;
        results(plan, 0)[0].at = Argument::Peer { rank: 0.into(), offset: 0 };
    });
    refused("stream 2 of 2", |plan| steps(plan)[0].stream = 2);
    refused("comes from name 1 of 1", |plan| steps(plan)[0].origin[0] = 1);
}

#[test]
fn overwriting_operands() {
    // Element-wise in place is fine: step 3 of the plan does it. A product in place is not.
    refused("result 0 at 0x0..0x20 of the arena overlaps 0x0..0x20", |plan| results(plan, 0)[0].at = arena(0));
    refused("step #2: result 0 at 0x100..0x120 of the arena overlaps", |plan| results(plan, 2)[0].at = arena(256));
    // Nor an operand that is broadcast.
    refused("step #3: result 0", |plan| {
        operands(plan, 3)[1].at = arena(512);
    });
}

#[test]
fn written_before_read() {
    refused("step #0: arena: reads 0x0..0x20, of which 0x0..0x20 was never written", |plan| {
        plan.programs[0].inputs[0].place.at = arena(768);
        operands(plan, 1)[0].at = arena(768);
        results(plan, 1)[0].at = arena(512);
    });
    refused("reads 0x300..0x320, of which", |plan| operands(plan, 0)[0].at = arena(768));
    refused("weight arena: f32[4] at 0x100..0x110 is no weight", |plan| {
        plan.manifest.placed.truncate(1);
    });
    refused("output 0: arena: reads 0x300..0x320, of which", |plan| {
        plan.programs[0].outputs[0].place.at = arena(768);
        results(plan, 1)[0].at = arena(512);
        operands(plan, 3)[2].at = arena(512);
        steps(plan)[2].waits.push(Edge { from: 1, kind: EdgeKind::Full });
    });
    refused("reads 0x0..0x20 as f32, which was written as i32", |plan| {
        plan.programs[0].inputs[0].place.ty.dtype = DType::I32;
        plan.manifest.entries[0].inputs[0].ty.dtype = DType::I32;
    });
}

#[test]
fn races() {
    // Without the edge, stream 0 reads what stream 1 may still be writing.
    refused("step #3: arena: reads 0x300..0x320, which step #1 writes, with no order between them", |plan| {
        steps(plan)[3].waits.clear();
    });
    // Stream 0 overwrites what stream 1 may still be reading.
    refused("step #2: arena: writes 0x0..0x20, which step #1 reads, with no order", |plan| {
        results(plan, 2)[0].at = arena(0);
        operands(plan, 3)[0].at = arena(0);
    });
    // Both write.
    refused("step #1: arena: writes 0x100..0x120, which step #0 writes, with no order", |plan| {
        results(plan, 1)[0].at = arena(256);
    });
    refused("waits for step #3, which does not come before it", |plan| steps(plan)[3].waits[0].from = 3);
    refused("a programmatic edge from step #2, not between launches", |plan| {
        steps(plan)[3].waits.push(Edge { from: 2, kind: EdgeKind::Programmatic });
    });
}

#[test]
fn order_is_transitive_across_streams() {
    let mut plan = sample::plan();
    // 0 → 1 on stream 1, 1 → 2: step 3 needs no edge of its own.
    steps(&mut plan)[2].waits.push(Edge { from: 1, kind: EdgeKind::Full });
    steps(&mut plan)[3].waits.clear();
    assert_eq!(verify(&plan), Ok(()));
}

#[test]
fn outputs_are_not_overwritten() {
    refused("output 0: is overwritten by a larger result of step #4", |plan| {
        plan.programs[0].arena_bytes = 2048;
        let scalar = f32s(&[]);
        plan.manifest.weights[1].ty = scalar.clone();
        plan.manifest.weights[1].recipe = Recipe::source(scalar.clone(), Source::Random { seed: 0 });
        plan.manifest.placed[1].ty = scalar.clone();
        // Step 3 no longer reads `b`, which is now a scalar.
        let negate = plan.kernels[1].spec.nodes[0].op.clone();
        plan.kernels[2] = sample::kernel("neg", negate, vec![f32s(&[2, 4])]);
        operands(plan, 3).truncate(1);
        let large = Place { ty: f32s(&[2, 4, 16]), at: arena(512) };
        let widen = Op::Broadcast { dims: large.ty.dims.clone() };
        plan.kernels.push(sample::kernel("wide", widen, vec![scalar.clone()]));
        let scalar = Place { ty: scalar, at: Argument::Weights { offset: 256 } };
        steps(plan).push(sample::step(0, sample::launch(3, vec![scalar], vec![large]), &[1]));
    });
}

#[test]
fn collectives() {
    let groups = |plan: &mut Plan, new: Vec<Vec<u32>>| {
        if let Action::Collective { op: Op::AllReduce { groups, .. }, .. } = &mut steps(plan)[2].action {
            *groups = new;
        }
    };
    refused("groups [[0, 2]] are not ranks [0, 1]", |plan| groups(plan, vec![vec![0, 2]]));
    refused("groups [[0]] are not ranks [0, 1]", |plan| groups(plan, vec![vec![0]]));
    refused("groups must be disjoint", |plan| groups(plan, vec![vec![0, 0]]));
    refused("all_reduce: result 0 is f32[8], expected f32[2, 4]", |plan| results(plan, 2)[0].ty = f32s(&[8]));
    refused("reshape is not between ranks", |plan| {
        if let Action::Collective { op, .. } = &mut steps(plan)[2].action {
            *op = Op::Reshape { dims: f32s(&[2, 4]).dims };
        }
    });
    refused("outside the rank's own peer arena", |plan| {
        if let Action::Collective { algorithm, .. } = &mut steps(plan)[2].action {
            *algorithm = CollectiveAlgorithm::OneShot;
        }
    });
}

fn exchange(plan: &mut Plan, program: usize, step: usize) -> &mut Op {
    match &mut plan.programs[program].steps[step].action {
        Action::Collective { op, .. } => op,
        _ => panic!("no exchange"),
    }
}

#[test]
fn sends_and_receives() {
    let staged = |expected: &str, change: fn(&mut Plan)| refused_in(sample::staged(), expected, change);
    staged("channel 7 has no receive", |plan| {
        if let Op::Recv { channel, .. } = exchange(plan, 1, 0) {
            *channel = 9;
        }
    });
    staged("channel 8 is used twice on one side", |plan| {
        if let Op::Send { channel, .. } = exchange(plan, 0, 0) {
            *channel = 8;
        }
    });
    staged("channel 7: sent to [0], received from [0]", |plan| {
        if let Op::Send { peers, .. } = exchange(plan, 0, 0) {
            *peers = vec![0];
        }
    });
    staged("2 peers for 1 ranks", |plan| {
        if let Op::Send { peers, .. } = exchange(plan, 0, 0) {
            peers.push(0);
        }
    });
    staged("channel 7: sends f32[4], receives f32[2, 2]", |plan| {
        if let Op::Recv { ty, .. } = exchange(plan, 1, 0) {
            *ty = f32s(&[2, 2]);
        }
        if let Action::Collective { results, .. } = &mut plan.programs[1].steps[0].action {
            results[0].ty = f32s(&[2, 2]);
        }
        if let Action::Collective { operands, .. } = &mut plan.programs[1].steps[1].action {
            operands[0].at = arena(256);
        }
        plan.programs[1].inputs.push(Binding {
            port: 0,
            place: Place { ty: f32s(&[4]), at: arena(256) },
            splits: vec![],
        });
    });
}

#[test]
fn cycles_of_waits() {
    // Both sides receive first.
    refused_in(
        sample::staged(),
        "cycle of waits: stage 0 step #0 (receive on channel 8) waits for stage 1 step #1 (send on channel 8)",
        |plan| plan.programs[0].steps.swap(0, 1),
    );
    // Two streams would do on devices, but the host takes steps one by one.
    refused_in(sample::staged(), "cycle of waits", |plan| {
        plan.programs[0].steps.swap(0, 1);
        plan.programs[0].steps[1].stream = 1;
    });
    // Sends that do not wait would do on the host, but devices meet.
    refused_in(sample::staged(), "cycle of waits", |plan| {
        plan.programs[1].steps.swap(0, 1);
        let input = plan.programs[0].inputs[0].clone();
        plan.programs[1].inputs.push(input);
        plan.programs[1].steps[1].stream = 0;
        if let Action::Collective { results, .. } = &mut plan.programs[1].steps[1].action {
            results[0].at = arena(256);
        }
    });
}

fn with_state(plan: &mut Plan) {
    let extent = ExtentId(3);
    let dims = vec![Dim::Bounded { capacity: 2, extent }, Dim::Static(4)];
    let ty = TensorType { dtype: DType::F32, dims };
    plan.manifest.states.push(PlanState { name: "kv".to_owned(), ty: ty.clone(), extent, arena_offset: 0 });
    let op = Op::Append { axis: 0 };
    plan.kernels.push(sample::kernel("append", op, vec![ty.clone(), f32s(&[1, 4])]));
    let place = Place { ty, at: Argument::State { state: 0, offset: 0 } };
    let row = Place { ty: f32s(&[1, 4]), at: arena(0) };
    let action = sample::launch(3, vec![place.clone(), row], vec![place]);
    steps(plan).push(sample::step(0, action, &[]));
}

#[test]
fn states_are_appended_to_in_place() {
    let mut plan = sample::plan();
    with_state(&mut plan);
    assert_eq!(verify(&plan), Ok(()));
    refused("state `other`: overlaps state `kv`", |plan| {
        with_state(plan);
        let mut other = plan.manifest.states[0].clone();
        other.name = "other".to_owned();
        plan.manifest.states.push(other);
    });
    refused("offset 4 is not a multiple", |plan| {
        with_state(plan);
        plan.manifest.states[0].arena_offset = 4;
    });
    refused("32 bytes at 256 of 32 of the state", |plan| {
        with_state(plan);
        results(plan, 4)[0].at = Argument::State { state: 0, offset: 256 };
    });
}

fn own(offset: u64) -> Argument {
    Argument::Peer { rank: RankScalar::ByRank(vec![0, 1]), offset }
}

fn other(offset: u64) -> Argument {
    Argument::Peer { rank: RankScalar::ByRank(vec![1, 0]), offset }
}

/// Step 0 leaves its result where peers read it, and step 4 reads it there after a signal.
fn with_peers(plan: &mut Plan) {
    plan.programs[0].peer_arena_bytes = 1024;
    results(plan, 0)[0].at = own(256);
    operands(plan, 2)[0].at = own(256);
    let from = Place { ty: f32s(&[2, 4]), at: other(256) };
    let copy = Action::Copy { from, to: sample::at(256, &[2, 4]) };
    let signal = Edge { from: 0, kind: EdgeKind::Signal { ranks: vec![0, 1], offset: 0 } };
    let mut step = sample::step(1, copy, &[]);
    step.waits.push(signal);
    steps(plan).push(step);
}

#[test]
fn peers_are_read_after_a_signal() {
    let mut plan = sample::plan();
    with_peers(&mut plan);
    assert_eq!(verify(&plan), Ok(()));
    refused("step #4: peer arena: reads 0x100..0x120, which step #0 writes, with no order", |plan| {
        with_peers(plan);
        // Orders the steps of a rank, but says nothing of other ranks.
        steps(plan)[4].waits[0].kind = EdgeKind::Full;
    });
    refused("a signal of ranks [0], not of all", |plan| {
        with_peers(plan);
        steps(plan)[4].waits[0].kind = EdgeKind::Signal { ranks: vec![0], offset: 0 };
    });
    refused("a signal at 1024 of 1024 of the peer arena", |plan| {
        with_peers(plan);
        steps(plan)[4].waits[0].kind = EdgeKind::Signal { ranks: vec![0, 1], offset: 1024 };
    });
    refused("the signal at 264 of the peer arena is inside a tensor", |plan| {
        with_peers(plan);
        steps(plan)[4].waits[0].kind = EdgeKind::Signal { ranks: vec![0, 1], offset: 264 };
    });
    // The next owner of the memory must know that peers are done with it.
    refused("step #5: peer arena: writes 0x100..0x120, which step #4 reads on another rank", |plan| {
        with_peers(plan);
        let to = Place { ty: f32s(&[2, 4]), at: own(256) };
        let copy = Action::Copy { from: sample::at(0, &[2, 4]), to };
        steps(plan).push(sample::step(0, copy, &[4]));
    });
}

/// Replaces step 1 by a persistent one: block 0 negates into 768 by two tiles, block 1 negates that into 1024.
fn with_tasks(plan: &mut Plan, waits: &[u32]) {
    plan.programs[0].arena_bytes = 2048;
    let place = |offset| vec![sample::at(offset, &[2, 4])];
    let task = |block, from, to, tiles, waits: &[u32], signals: &[u32]| Task {
        kernel: 1,
        block,
        tiles,
        operands: place(from),
        results: place(to),
        waits: waits.to_vec(),
        signals: signals.to_vec(),
    };
    let tasks = vec![
        task(0, 0, 768, (0, 1), &[], &[0]),
        task(0, 0, 768, (1, 2), &[], &[0]),
        task(1, 768, 1024, (0, 2), waits, &[]),
    ];
    steps(plan)[1].action = Action::Persistent { tasks, counters: vec![Counter { threshold: 2 }], launch: None };
    operands(plan, 3)[2].at = arena(1024);
}

#[test]
fn tasks_are_ordered_by_counters() {
    let mut plan = sample::plan();
    with_tasks(&mut plan, &[0]);
    assert_eq!(verify(&plan), Ok(()));
    refused("step #1: arena: reads 0x300..0x320, which step #1 writes, with no order", |plan| with_tasks(plan, &[]));
    refused("counter 0 has threshold 1 and 2 signals", |plan| {
        with_tasks(plan, &[0]);
        if let Action::Persistent { counters, .. } = &mut steps(plan)[1].action {
            counters[0].threshold = 1;
        }
    });
    refused("task 0: kernel 9 of 3", |plan| {
        with_tasks(plan, &[0]);
        if let Action::Persistent { tasks, .. } = &mut steps(plan)[1].action {
            tasks[0].kernel = 9;
        }
    });
}

#[test]
fn long_programs_take_little_time() {
    let mut plan = sample::plan();
    plan.programs[0].arena_bytes = 2048;
    let mut step = steps(&mut plan)[1].clone();
    step.cost = StepCost::default();
    for position in 0..50_000u64 {
        if let Action::Launch { results, .. } = &mut step.action {
            results[0].at = arena(1024 + position % 4 * 256);
        }
        steps(&mut plan).push(step.clone());
    }
    assert_eq!(verify(&plan), Ok(()));
}
