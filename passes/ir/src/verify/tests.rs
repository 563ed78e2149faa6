//! A valid module, and every way to break it.

use std::sync::Arc;

use planfile::{Buffer, DType, Dim, ExtentId, Op, RankScalar, Source, SourceFile, Tensor, TensorType};

use super::verify;
use crate::ids::{GraphId, NodeId, StateId, ValueId, WeightId};
use crate::mesh::{MeshAxis, SubAxes};
use crate::module::{Module, Output, Port, Shard, ValueDef};
use crate::text::parse;

/// Two stages on four ranks, with a file, weights of all kinds, a state, a channel and a table by rank.
const VALID: &str = r#"module "two_stages"
mesh pipe=2 tensor=2
file 0 "model.onnx" 65536 bytes
weight w0 "fc1": f32[64, 32] = file 0 at 4096
weight w1 "scale": f32[] = [0.25]
weight w2 "fc2": f32[32, 64] = recipe {
  %0: f32[64, 32] = random 7
  %1: f32[32, 64] = transpose %0 [1, 0]
  return %1
}
state s0 "cache": f16[2, <=16@0] extent 0
entry "main" (x: f32[8, 64], n: i64[1]) -> (h: f32[8, 32], y: f32[8, 64]) = @first, @second
  frozen (n: i64[1] = [3] for "reshape")
entry "other" () -> ()
graph @first ranks 0..2 (%0: f32[8, 64] of [8, 64], %1: i64[1] of [1]) {
  %2: f32[64, 16] of [64, 32] split(1: tensor) = weight w0 "fc1"
  %3: f32[8, 16] of [8, 32] split(1: tensor) = dot %0, %2 {contract [1]x[0]}  # /fc1/MatMul
  %4: f32[8, 32] of [8, 32] = all_gather %3 {axis 1, groups [[0, 1]]}  # /fc1/MatMul
  %5: f32[8, 16] of [8, 32] split(1: tensor) = slice %4 {starts [0, rank(0, 16)]}  # /fc1/MatMul
  send %5 {channel 0, peers [2, 3]}  # /fc1/MatMul
  return %4
}
graph @second ranks 2..4 () {
  %0: f32[8, 16] of [8, 32] split(1: tensor) = recv {channel 0, peers [0, 1]}  # /fc1/MatMul
  %1: f32[] of [] = weight w1 "scale"
  %2: f32[8, 16] of [8, 32] split(1: tensor) = pointwise %0, %1 {$0 * $1 + f32(index(1, rank(0, 16)))}  # /act/Mul
  %3: f32[16, 64] of [32, 64] split(0: tensor) = weight w2 "fc2"
  %4: f32[8, 64] of [8, 64] partial(sum: tensor) = dot %2, %3 {contract [1]x[0]}  # /fc2/MatMul
  %5: f32[8, 64] of [8, 64] = all_reduce %4 {sum, groups [[2, 3]]}  # /fc2/MatMul
  %6: f16[2, <=16@0] = state s0 "cache"
  return 1: %5
}
"#;

fn valid() -> Module {
    parse(VALID).unwrap()
}

#[test]
fn a_valid_module_passes() {
    assert_eq!(verify(&valid()), Ok(()));
    assert_eq!(verify(&Module::default()), Ok(()));
}

/// That the change is refused, in words that hold all of these.
fn refuses(words: &[&str], change: impl FnOnce(&mut Module)) {
    let mut module = valid();
    change(&mut module);
    let error = verify(&module).expect_err(words[0]).to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

fn shard(module: &mut Module, graph: usize, value: usize) -> &mut Shard {
    module.graphs[graph].values[value].shard.as_mut().unwrap()
}

fn port(name: &str) -> Port {
    Port { name: name.to_owned(), ty: TensorType::new(DType::F32, &[]) }
}

#[test]
fn meshes() {
    refuses(&["two mesh axes named `pipe`"], |module| module.mesh.axes[1].name = "pipe".to_owned());
    refuses(&["each at least 2"], |module| module.mesh.axes[1].factors = vec![2, 1]);
    refuses(&["at most 32 factors"], |module| module.mesh.axes[1].factors = vec![2; 40]);
    refuses(&["more than 65536 ranks"], |module| module.mesh.axes.push(MeshAxis::new("big", 1 << 20)));
}

#[test]
fn weights() {
    let input = |module: &mut Module, weight: usize, source| module.weights[weight].recipe.inputs[0].source = source;
    refuses(&["w0 `fc1`", "there is no file 1"], |module| input(module, 0, Source::File { file: 1, offset: 0 }));
    refuses(&["w0 `fc1`", "leave file 0 `model.onnx`"], |module| {
        input(module, 0, Source::File { file: 0, offset: 65_536 });
    });
    refuses(&["leave file 0"], |module| input(module, 0, Source::File { file: 0, offset: u64::MAX }));
    refuses(&["w1 `scale`", "3 bytes for f32[]"], |module| {
        input(module, 1, Source::Inline(Buffer::zeroed(3)));
    });
    refuses(&["w2 `fc2`", "not what its operations take"], |module| {
        module.weights[2].recipe.inputs[0].ty = TensorType::new(DType::F32, &[1]);
    });
    refuses(&["w2 `fc2`", "makes f32[64, 32], not f32[32, 64]"], |module| {
        module.weights[2].recipe.spec.results = vec![0];
    });
    refuses(&["w2 `fc2`", "makes 2 tensors"], |module| module.weights[2].recipe.spec.results = vec![1, 1]);
    refuses(&["w2 `fc2`", "node 0 reads a value"], |module| {
        module.weights[2].recipe.spec.nodes[0].operands = vec![9];
    });
    refuses(&["depends on the rank"], |module| {
        let starts = vec![RankScalar::ByRank(vec![0, 1]), RankScalar::Uniform(0)];
        module.weights[2].recipe.spec.nodes[0].op = Op::Slice { starts, steps: vec![1, 1], sizes: vec![32, 64] };
    });
    refuses(&["w0 `fc1`", "too large"], |module| {
        module.weights[0].ty.dims = vec![Dim::Static(u64::MAX / 2), Dim::Static(4)];
    });
    refuses(&["leave file 0"], |module| module.files[0] = SourceFile { name: "short".to_owned(), bytes: 4096 });
}

#[test]
fn states() {
    refuses(&["s0 `cache`", "bounded by extent 1"], |module| module.states[0].extent = ExtentId(1));
    refuses(&["graph `second`", "%6", "stands for f16[2, <=16@0]"], |module| {
        module.graphs[1].values[6].ty = TensorType::new(DType::F16, &[2, 16]);
    });
    refuses(&["there is no state s5"], |module| module.graphs[1].values[6].def = ValueDef::State(StateId(5)));
}

#[test]
fn values() {
    refuses(&["graph `first`", "%2", "there is no weight w9"], |module| {
        module.graphs[0].values[2].def = ValueDef::Weight(WeightId(9));
    });
    refuses(&["graph `first`", "%2", "stands for f32[]"], |module| {
        module.graphs[0].values[2].def = ValueDef::Weight(WeightId(1));
    });
    refuses(&["graph `first`", "%3 (from `/fc1/MatMul`)", "placement leaves [8, 16]"], |module| {
        module.graphs[0].values[3].ty = TensorType::new(DType::F32, &[8, 32]);
    });
    refuses(&["%3", "do not make up 33"], |module| shard(module, 0, 3).global[1] = 33);
    refuses(&["%3", "not of the mesh"], |module| shard(module, 0, 3).placement.splits[0].over = SubAxes::of(5));
    refuses(&["%4", "inferred f32[8, 32]"], |module| {
        module.graphs[0].values[4].ty = TensorType::new(DType::F16, &[8, 32]);
    });
    refuses(&["%3", "none such"], |module| module.graphs[0].values[3].def = ValueDef::Node(NodeId(99), 0));
    refuses(&["%3", "none such"], |module| module.graphs[0].values[3].def = ValueDef::Node(NodeId(0), 1));
    refuses(&["is a shard, but the graph has no ranks"], |module| module.graphs[0].ranks.clear());
    refuses(&["is too large"], |module| {
        module.graphs[0].values[0].ty = TensorType::new(DType::F32, &[u64::MAX, 2]);
    });
}

#[test]
fn nodes() {
    refuses(&["graph `first`", "dot", "/fc1/MatMul", "node n0", "reads %4 before"], |module| {
        module.graphs[0].nodes[0].operands[0] = ValueId(4);
    });
    refuses(&["node n0", "reads %77, which does not exist"], |module| {
        module.graphs[0].nodes[0].operands[0] = ValueId(77);
    });
    refuses(&["node n0", "result %77 does not exist"], |module| module.graphs[0].nodes[0].results[0] = ValueId(77));
    refuses(&["node n0", "result 0 is %4, which says it is result 0 of node n1"], |module| {
        module.graphs[0].nodes[0].results[0] = ValueId(4);
    });
    refuses(&["node n0", "has 1 results, not 2"], |module| module.graphs[0].nodes[0].results.push(ValueId(3)));
    refuses(&["node n0", "takes 2 operands"], |module| {
        module.graphs[0].nodes[0].operands.pop();
    });
    refuses(&["graph `second`", "pointwise", "from `/act/Mul + /act/Add`"], |module| {
        let node = &mut module.graphs[1].nodes[1];
        node.origin = Arc::from([Arc::from("/act/Mul"), Arc::from("/act/Add")]);
        node.operands.pop();
    });
}

#[test]
fn ranks() {
    refuses(&["not ascending ranks of the mesh"], |module| module.graphs[1].ranks = vec![3, 2]);
    refuses(&["not ascending ranks of the mesh"], |module| module.graphs[1].ranks = vec![3, 4]);
    refuses(&["slice", "a table of 3 numbers for 2 ranks"], |module| {
        let Op::Slice { starts, .. } = &mut module.graphs[0].nodes[2].op else { unreachable!() };
        starts[1] = RankScalar::ByRank(vec![0, 16, 0]);
    });
    refuses(&["pointwise", "a table of 2 numbers for 1 ranks"], |module| {
        module.graphs[1].ranks = vec![2];
        let Op::Recv { peers, .. } = &mut module.graphs[1].nodes[0].op else { unreachable!() };
        peers.pop();
    });
    refuses(&["all_gather", "do not partition the ranks [0, 1]"], |module| {
        let Op::AllGather { groups, .. } = &mut module.graphs[0].nodes[1].op else { unreachable!() };
        *groups = vec![vec![0, 2]];
    });
    refuses(&["send", "1 peers for 2 ranks"], |module| {
        module.graphs[0].nodes[3].op = Op::Send { channel: 0, peers: vec![2] };
    });
}

#[test]
fn entries() {
    refuses(&["two entries are named `main`"], |module| module.entries[1].name = "main".to_owned());
    refuses(&["two inputs are named `x`"], |module| module.entries[0].inputs.push(port("x")));
    refuses(&["two outputs are named `y`"], |module| module.entries[0].outputs.push(port("y")));
    refuses(&["entry `main`", "output `z` is produced 0 times"], |module| module.entries[0].outputs.push(port("z")));
    refuses(&["output `y` is produced 2 times"], |module| {
        module.graphs[1].outputs.push(Output { position: 1, value: ValueId(5) });
    });
    refuses(&["there is no output 7"], |module| module.graphs[1].outputs[0].position = 7);
    refuses(&["graph `second`", "output 1 is %70"], |module| module.graphs[1].outputs[0].value = ValueId(70));
    refuses(&["graph `second`, value %5, output `y`", "stands for f32[8, 65]"], |module| {
        module.entries[0].outputs[1].ty = TensorType::new(DType::F32, &[8, 65]);
    });
    refuses(&["graph `first`, value %0, input `x`", "stands for f16[8, 64]"], |module| {
        module.entries[0].inputs[0].ty.dtype = DType::F16;
    });
    refuses(&["there is no input 2"], |module| module.graphs[0].values[1].def = ValueDef::Input(2));
    refuses(&["stage @9 does not exist"], |module| module.entries[0].stages.push(GraphId(9)));
    refuses(&["a rank is in two stages"], |module| module.entries[0].stages.push(GraphId(0)));
    refuses(&["frozen `q` is no input"], |module| module.entries[0].frozen[0].input = "q".to_owned());
    refuses(&["`n` is frozen twice"], |module| {
        let again = module.entries[0].frozen[0].clone();
        module.entries[0].frozen.push(again);
    });
    refuses(&["frozen `n` is i64[2]"], |module| {
        module.entries[0].frozen[0].value = Tensor::from_elements(&[2], &[1i64, 2]).unwrap();
    });
}

#[test]
fn channels() {
    let set = |module: &mut Module, op: Op| module.graphs[0].nodes[3].op = op;
    refuses(&["channel 0 has 0 sends and 1 receives"], |module| {
        set(module, Op::Send { channel: 1, peers: vec![2, 3] });
    });
    refuses(&["channel 0: the peers"], |module| set(module, Op::Send { channel: 0, peers: vec![3, 2] }));
    refuses(&["channel 0: the peers"], |module| set(module, Op::Send { channel: 0, peers: vec![0, 1] }));
    refuses(&["channel 0 sends f32[8, 32] and receives f32[8, 16]"], |module| {
        module.graphs[0].nodes[3].operands[0] = ValueId(4);
    });
    refuses(&["does not lead to a later stage"], |module| module.entries[0].stages.reverse());
}
