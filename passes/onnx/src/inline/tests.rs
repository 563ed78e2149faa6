//! Inlining: attribute references, name clashes, nesting, defaults, and what is refused.

use super::*;
use crate::load::Model;
use crate::messages::{AttributeType, ModelProto};
use crate::samples::{attribute, body, call, float, function, graph, model, named, node, opset, reload, with};
use crate::tensor_data::TensorSource;

fn with_functions(nodes: Vec<NodeProto>, functions: Vec<FunctionProto>) -> Result<Model, OnnxError> {
    let opset_import = vec![opset("", 17), opset("my", 1)];
    reload(&ModelProto { functions, opset_import, ..model(graph(nodes)) })
}

/// `outputs = op(inputs)  # name`, a line per node.
fn listing(graph: &Graph) -> Vec<String> {
    let line = |node: &Node| {
        format!("{} = {}({})  # {}", node.outputs.join(", "), node.op_type, node.inputs.join(", "), node.name)
    };
    graph.nodes.iter().map(line).collect()
}

fn reference(name: &str, to: &str, r#type: AttributeType) -> AttributeProto {
    AttributeProto { ref_attr_name: to.into(), ..attribute(name, r#type) }
}

/// `b = a * by`
fn scale() -> FunctionProto {
    let nodes = vec![
        with(node("Constant", &[], &["c"]), reference("value_float", "by", AttributeType::Float)),
        node("Mul", &["a", "c"], &["b"]),
    ];
    FunctionProto { attribute: vec!["by".into()], ..function("Scale", &["a"], &["b"], nodes) }
}

fn constant_of(model: &Model, name: &str) -> f32 {
    let found = model.graph.initializers.iter().find(|initializer| initializer.name == name).unwrap();
    match &found.tensor.source {
        TensorSource::Bytes(bytes) => f32::from_le_bytes(bytes[..].try_into().unwrap()),
        TensorSource::FileRange { .. } => panic!("not inline"),
    }
}

#[test]
fn a_call_becomes_its_body_with_attributes_filled_in() {
    let nodes = vec![
        named("first", with(call("Scale", &["x"], &["m"]), float("by", 2.0))),
        with(call("Scale", &["m"], &["y"]), float("by", 3.0)),
    ];
    let loaded = with_functions(nodes, vec![scale()]).unwrap();
    assert_eq!(
        listing(&loaded.graph),
        ["m = Mul(x, first/c)  # first/Mul_1", "y = Mul(m, Scale_1/c)  # Scale_1/Mul_1"]
    );
    assert_eq!((constant_of(&loaded, "first/c"), constant_of(&loaded, "Scale_1/c")), (2.0, 3.0));
}

#[test]
fn defaults_hold_unless_the_call_says_otherwise() {
    let with_default = FunctionProto { attribute_proto: vec![float("by", 7.0)], ..scale() };
    let nodes = vec![call("Scale", &["x"], &["m"]), with(call("Scale", &["m"], &["y"]), float("by", 3.0))];
    let loaded = with_functions(nodes, vec![with_default]).unwrap();
    assert_eq!((constant_of(&loaded, "Scale_0/c"), constant_of(&loaded, "Scale_1/c")), (7.0, 3.0));
}

#[test]
fn functions_call_functions_and_pass_attributes_on() {
    let outer = function(
        "Outer",
        &["p"],
        &["q"],
        vec![
            named("inner", with(call("Scale", &["p"], &["t"]), reference("by", "factor", AttributeType::Float))),
            named("neg", node("Neg", &["t"], &["q"])),
        ],
    );
    let nodes = vec![named("o", with(call("Outer", &["x"], &["y"]), float("factor", 5.0)))];
    let loaded = with_functions(nodes, vec![outer, scale()]).unwrap();
    assert_eq!(listing(&loaded.graph), ["o/t = Mul(x, o/inner/c)  # o/inner/Mul_1", "y = Neg(o/t)  # o/neg"]);
    assert_eq!(constant_of(&loaded, "o/inner/c"), 5.0);
}

#[test]
fn names_from_inside_do_not_meet_those_outside() {
    let nodes = vec![
        named("f", with(call("Scale", &["x"], &["f/c"]), float("by", 2.0))),
        named("f/Mul_1", node("Neg", &["f/c"], &["y"])),
    ];
    let loaded = with_functions(nodes, vec![scale()]).unwrap();
    assert_eq!(listing(&loaded.graph), ["f/c = Mul(x, f/c_1)  # f/Mul_1_1", "y = Neg(f/c)  # f/Mul_1"]);
}

#[test]
fn a_node_keeps_the_opset_of_its_function() {
    let old = FunctionProto { opset_import: vec![opset("", 12)], ..scale() };
    let nodes = vec![with(call("Scale", &["x"], &["m"]), float("by", 2.0)), node("Neg", &["m"], &["y"])];
    let loaded = with_functions(nodes.clone(), vec![old]).unwrap();
    let opsets: Vec<i64> = loaded.graph.nodes.iter().map(|node| node.opset).collect();
    assert_eq!(opsets, [12, 17]);
    let too_new = FunctionProto { opset_import: vec![opset("", 99)], ..scale() };
    let error = with_functions(nodes, vec![too_new]).unwrap_err().to_string();
    assert!(error.contains("function `my.Scale` uses opset 99"), "{error}");
}

#[test]
fn inputs_passed_through_are_copied_and_missing_ones_stay_missing() {
    let through = function("Through", &["a", "b"], &["a"], vec![]);
    let loaded = with_functions(vec![call("Through", &["x"], &["y"])], vec![through]).unwrap();
    assert_eq!(listing(&loaded.graph), ["y = Identity(x)  # Through_0/Identity"]);
    let clip = function("Limit", &["a", "min", "max"], &["b"], vec![node("Clip", &["a", "min", "max"], &["b"])]);
    let loaded = with_functions(vec![call("Limit", &["x"], &["y"])], vec![clip]).unwrap();
    assert_eq!(listing(&loaded.graph), ["y = Clip(x, , )  # Limit_0/Clip_0"]);
}

#[test]
fn bodies_inside_functions_are_renamed_with_them() {
    let inner = GraphProto { input: vec![], ..graph(vec![node("Neg", &["t"], &["y"])]) };
    let branch = function(
        "Branch",
        &["a"],
        &["b"],
        vec![node("Relu", &["a"], &["t"]), named("if", with(node("If", &["a"], &["b"]), body("then_branch", inner)))],
    );
    let loaded = with_functions(vec![named("f", call("Branch", &["x"], &["y"]))], vec![branch]).unwrap();
    assert_eq!(listing(&loaded.graph), ["f/t = Relu(x)  # f/Relu_0", "y = If(x)  # f/if"]);
    let Attribute::Graph(body) = &loaded.graph.nodes[1].attributes["then_branch"] else { panic!("no body") };
    assert_eq!(listing(body), ["f/y = Neg(f/t)  # f/if/then_branch/Neg_0"]);
    assert_eq!(body.outputs[0].name, "f/y");
}

#[test]
fn recursion_is_refused_with_its_cycle() {
    let one = function("One", &["a"], &["b"], vec![call("Two", &["a"], &["b"])]);
    let two = function("Two", &["a"], &["b"], vec![call("One", &["a"], &["b"])]);
    let error = with_functions(vec![call("One", &["x"], &["y"])], vec![one, two]).unwrap_err().to_string();
    assert!(error.contains("`my.One` -> `my.Two` -> `my.One`"), "{error}");
}

#[test]
fn expansions_that_double_at_each_level_or_go_too_deep_are_stopped() {
    let level = |n: usize| {
        let next = format!("F{}", n + 1);
        let nodes = vec![call(&next, &["a"], &["m"]), call(&next, &["m"], &["b"])];
        function(&format!("F{n}"), &["a"], &["b"], nodes)
    };
    for (levels, is_too_deep) in [(25, false), (NESTING_LIMIT + 1, true)] {
        let error = with_functions(vec![call("F0", &["x"], &["y"])], (0..levels).map(level).collect()).unwrap_err();
        let OnnxError::ExpansionTooLarge { node, .. } = error else { panic!("{error:?}") };
        assert_eq!(node.matches('/').count() >= NESTING_LIMIT, is_too_deep, "{node}");
    }
}

#[test]
fn a_call_gives_no_attribute_that_its_function_does_not_have() {
    let given = |name: &str| vec![named("f", with(call("Scale", &["x"], &["y"]), float(name, 2.0)))];
    let error = with_functions(given("bye"), vec![scale()]).unwrap_err().to_string();
    assert!(error.contains("node `f` cannot call") && error.contains("attribute `bye`"), "{error}");
    // `scale` does not declare `by`, as some exporters do not, but reads it.
    assert!(with_functions(given("by"), vec![scale()]).is_ok());
    let declared = FunctionProto { attribute: vec!["bye".into()], ..scale() };
    assert!(with_functions(given("bye"), vec![declared]).is_ok());
}

#[test]
fn wrong_calls_are_named() {
    let many = with_functions(vec![named("f", call("Scale", &["x", "x"], &["y"]))], vec![scale()]);
    let error = many.unwrap_err().to_string();
    assert!(error.contains("node `f` cannot call the function `my.Scale`: the call has 2 inputs"), "{error}");
    let ghost = function("Ghost", &["a"], &["b"], vec![named("n", node("Neg", &["ghost"], &["b"]))]);
    let error = with_functions(vec![named("g", call("Ghost", &["x"], &["y"]))], vec![ghost]).unwrap_err();
    assert!(error.to_string().contains("node `g/n` (Neg) reads `g/ghost`"), "{error}");
    let twice = with_functions(vec![node("Neg", &["x"], &["y"])], vec![scale(), scale()]).unwrap_err();
    assert!(matches!(twice, OnnxError::DuplicateName { name, .. } if name == "my.Scale"));
    let outside = with(node("Neg", &["x"], &["y"]), reference("alpha", "by", AttributeType::Float));
    assert!(matches!(with_functions(vec![outside], vec![]), Err(OnnxError::Attribute { .. })));
}

#[test]
fn unnamed_and_repeated_names_become_unique() {
    let nodes = vec![
        node("Neg", &["x"], &["a"]),
        named("same", node("Neg", &["a"], &["b"])),
        named("same", node("Neg", &["b"], &["c"])),
        named("Neg_0", node("Neg", &["c"], &["y"])),
    ];
    let loaded = with_functions(nodes, vec![]).unwrap();
    let names: Vec<&str> = loaded.graph.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["Neg_0_1", "same", "same_1", "Neg_0"]);
}
