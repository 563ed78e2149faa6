//! Models of very many nodes: time and memory grow with their number, not with its square.
//!
//! Nothing here is timed. The counts are such that a pass that compares every node with every other, or hands on what
//! all nodes before it were called, takes minutes and gigabytes instead of a second or two.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use onnx::messages::{
    AttributeProto, AttributeType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use planfile::{PlanFile, Tensor};
use prost::Message as _;
use runtime::{Devices, Session};

const NODES: usize = 10_000;

fn node(op: &str, inputs: &[String], outputs: &[String]) -> NodeProto {
    let name = format!("{op}_{}", outputs[0]);
    NodeProto { op_type: op.into(), name, input: inputs.to_vec(), output: outputs.to_vec(), ..NodeProto::default() }
}

fn one(op: &str, input: &str, output: impl Into<String>) -> NodeProto {
    node(op, &[input.to_owned()], &[output.into()])
}

/// A port of `f32`.
fn port(name: &str, sizes: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| Dimension { value: Some(DimensionValue::DimValue(size)) };
    let shape = Some(TensorShapeProto { dim: sizes.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: 1, shape };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) }) }
}

fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: AttributeType::Int as i32, i: Some(value), ..AttributeProto::default() }
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}{number}")).collect()
}

/// A link for each of the operators, over and over, from `x` to the last name.
fn chain(operators: &[&str], links: usize) -> (Vec<NodeProto>, String) {
    let name = |link: usize| if link == 0 { "x".to_owned() } else { format!("v{link}") };
    let link = |number: usize| one(operators[number % operators.len()], &name(number), name(number + 1));
    ((0..links).map(link).collect(), name(links))
}

/// Compiles, and reads the plan.
fn compiled(graph: GraphProto, arguments: &[&str]) -> PlanFile {
    let folder = tempfile::tempdir().unwrap();
    let (model, plan) = (folder.path().join("x.onnx"), folder.path().join("x.plan"));
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 18 }];
    let proto = ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..ModelProto::default() };
    fs::write(&model, proto.encode_to_vec()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_compile"));
    let output = command.arg(&model).arg("-o").arg(&plan).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PlanFile::open(&plan).unwrap_or_else(|error| panic!("{error}"))
}

fn graph(node: Vec<NodeProto>, input: Vec<ValueInfoProto>, output: Vec<ValueInfoProto>) -> GraphProto {
    GraphProto { name: "main".into(), node, input, output, ..GraphProto::default() }
}

fn steps(plan: &PlanFile) -> usize {
    plan.plan().programs.iter().map(|program| program.steps.len()).sum()
}

#[test]
fn equal_nodes_become_one() {
    let outputs = names("y", NODES);
    let nodes = outputs.iter().map(|output| one("Exp", "x", output)).collect();
    let ports = outputs.iter().map(|output| port(output, &[4])).collect();
    let plan = compiled(graph(nodes, vec![port("x", &[4])], ports), &[]);
    assert_eq!(steps(&plan), 1);
    let origin = &plan.plan().programs[0].steps[0].origin;
    let name = |index: usize| plan.plan().explanations.names[origin[index] as usize].as_str();
    assert_eq!((origin.len(), name(0), name(255)), (256, "Exp_y0", "…"));
}

#[test]
fn chains_stay_as_long_as_they_are() {
    let (nodes, last) = chain(&["Softmax", "Exp"], NODES);
    let plan = compiled(graph(nodes, vec![port("x", &[4])], vec![port(&last, &[4])]), &[]);
    assert_eq!(steps(&plan), NODES);
    let (nodes, last) = chain(&["Exp", "Neg"], NODES);
    let plan = compiled(graph(nodes, vec![port("x", &[4])], vec![port(&last, &[4])]), &["--gpus", "2"]);
    assert!(steps(&plan) < NODES / 100, "{} steps", steps(&plan));
}

#[test]
fn wide_nodes_read_and_write_many_values() {
    let inputs = names("x", NODES);
    let ports = || inputs.iter().map(|input| port(input, &[1])).collect::<Vec<_>>();
    for (op, size) in [("Sum", 1), ("Max", 1), ("Mean", 1)] {
        let wide = node(op, &inputs, &["y".to_owned()]);
        let plan = compiled(graph(vec![wide], ports(), vec![port("y", &[size])]), &[]);
        assert!(steps(&plan) > 0);
    }
    let apart = names("y", NODES);
    let mut split = vec![node("Split", &["x".to_owned()], &apart)];
    split[0].attribute.push(integer("num_outputs", NODES as i64));
    let parts = apart.iter().map(|part| port(part, &[1])).collect();
    let plan = compiled(graph(split, vec![port("x", &[NODES as i64])], parts), &[]);
    assert_eq!(plan.plan().manifest.entries[0].outputs.len(), NODES);
}

/// Branches in branches: a message in a message in a message for each level.
#[test]
fn deeply_nested_branches_are_followed_or_refused() {
    let field = |number: u32, content: &[u8]| {
        let mut bytes = Vec::new();
        prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut bytes);
        prost::encoding::encode_varint(content.len() as u64, &mut bytes);
        [&bytes, content].concat()
    };
    let nested = |levels: usize| {
        let exp = one("Exp", "x", format!("v{levels}")).encode_to_vec();
        let mut inner = field(1, &exp);
        for level in (0..levels).rev() {
            let own = format!("v{level}");
            let port = |name: &str| field(12, &port(name, &[4]).encode_to_vec());
            let then = [inner, port(&format!("v{}", level + 1))].concat();
            let otherwise =
                [field(1, &one("Neg", "x", format!("e{level}")).encode_to_vec()), port(&format!("e{level}"))];
            // The type of both attributes: 5, a graph.
            let branch = |name: &str, body: &[u8]| {
                field(5, &[&field(1, name.as_bytes())[..], &field(6, body), &[0xa0, 1, 5]].concat())
            };
            let head = node("If", &["c".to_owned()], &[own]).encode_to_vec();
            let branches = [branch("then_branch", &then), branch("else_branch", &otherwise.concat())];
            inner = field(1, &[head, branches.concat()].concat());
        }
        let truth = TensorProto { name: "c".into(), data_type: 9, int32_data: vec![1], ..TensorProto::default() };
        let ports = graph(vec![], vec![port("x", &[4])], vec![port("v0", &[4])]);
        let graph = GraphProto { initializer: vec![truth], ..ports }.encode_to_vec();
        let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 18 }];
        let model = ModelProto { ir_version: Some(8), opset_import, ..ModelProto::default() };
        [model.encode_to_vec(), field(7, &[graph, inner].concat())].concat()
    };
    let folder = tempfile::tempdir().unwrap();
    let (model, plan) = (folder.path().join("x.onnx"), folder.path().join("x.plan"));
    let ended = |levels: usize| {
        fs::write(&model, nested(levels)).unwrap();
        let ended = Command::new(env!("CARGO_BIN_EXE_compile")).arg(&model).arg("-o").arg(&plan).output().unwrap();
        (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
    };
    assert_eq!(ended(28), (Some(0), String::new()));
    let exp = &PlanFile::open(&plan).unwrap_or_else(|error| panic!("{error}")).into_plan();
    assert_eq!((exp.programs[0].steps.len(), exp.explanations.names.as_slice()), (1, &["Exp_v28".to_owned()][..]));
    for levels in [29, 2000] {
        let (code, said) = ended(levels);
        assert!(code == Some(3) && said.contains("nests messages deeper than 88 levels"), "{code:?} {said}");
    }
}

/// A kernel has a limited number of parameters, and each start of a part is a kernel of its own: thousands of them would
/// be compiled for minutes.
#[test]
fn wide_nodes_are_cut_into_few_kernels_for_gpus() {
    let parts = names("p", NODES);
    let sizes = TensorProto {
        name: "sizes".into(),
        dims: vec![NODES as i64],
        data_type: 7,
        int64_data: (0..NODES as i64).map(|part| 1 + part % 2).collect(),
        ..TensorProto::default()
    };
    let elements = 3 * NODES / 2;
    let split = node("Split", &["x".to_owned(), "sizes".to_owned()], &parts);
    let backwards: Vec<String> = parts.iter().rev().cloned().collect();
    let mut concat = node("Concat", &backwards, &["y".to_owned()]);
    concat.attribute.push(integer("axis", 0));
    let ports = |name| vec![port(name, &[elements as i64])];
    let graph = GraphProto { initializer: vec![sizes], ..graph(vec![split, concat], ports("x"), ports("y")) };
    let file = compiled(graph, &["--target", "h200x4"]);
    let kernels = file.plan().kernels.len();
    assert!(kernels < 400, "{kernels} kernels");
    assert!(file.plan().kernels.iter().all(|kernel| kernel.spec.inputs.len() < 256));
    // Computed by the same steps, on the host.
    let x: Vec<f32> = (0..elements).map(|element| element as f32).collect();
    let mut rest = x.as_slice();
    let mut expected: Vec<&[f32]> = (0..NODES).map(|part| rest.split_off(..1 + part % 2).unwrap()).collect();
    expected.reverse();
    let inputs = BTreeMap::from([("x".to_owned(), Tensor::from_elements(&[elements as u64], &x).unwrap())]);
    let session = Session::load_file(file, Devices::Virtual, |_| {}).unwrap();
    let outputs = session.context().unwrap().run("main", &inputs).unwrap();
    assert_eq!(outputs[0].1.elements::<f32>().unwrap(), expected.concat());
}

#[test]
fn many_weights_inputs_and_outputs_are_told_apart() {
    let (inputs, outputs) = (names("x", NODES), names("y", NODES));
    let weight = |number: usize| TensorProto {
        name: format!("w{number}"),
        dims: vec![2],
        data_type: 1,
        float_data: vec![number as f32, -1.0],
        ..TensorProto::default()
    };
    let add = |number: usize| node("Add", &[inputs[number].clone(), format!("w{number}")], &[outputs[number].clone()]);
    let ports = |names: &[String]| names.iter().map(|name| port(name, &[2])).collect::<Vec<_>>();
    let nodes = (0..NODES).map(add).collect();
    let graph =
        GraphProto { initializer: (0..NODES).map(weight).collect(), ..graph(nodes, ports(&inputs), ports(&outputs)) };
    let plan = compiled(graph, &[]);
    assert_eq!((steps(&plan), plan.plan().manifest.weights.len()), (NODES, NODES));
}
