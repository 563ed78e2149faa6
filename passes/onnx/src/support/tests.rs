//! Tests of the list of operators.

use super::*;
use crate::messages::{AttributeProto, AttributeType, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use crate::samples::{attribute, graph, model, named, node, reload, tensor, value, with};

fn checked(model: &ModelProto, bindings: &Bindings) -> SupportReport {
    let model = reload(model).unwrap();
    support(&model, bindings, &WeightFiles::open(&[]).unwrap()).unwrap()
}

/// With `n` bound to 2.
fn bound() -> Bindings {
    Bindings { dims: BTreeMap::from([("n".to_owned(), 2)]), ..Bindings::default() }
}

fn row<'r>(report: &'r SupportReport, op: &str) -> &'r OperatorSupport {
    report.operators.iter().find(|row| row.op == op).unwrap()
}

/// The status of an operator, and its reasons.
fn said(report: &SupportReport, op: &str) -> (Status, String) {
    let row = row(report, op);
    (row.status, row.reason_texts().join("; "))
}

fn cast_to_string(input: &str, output: &str) -> NodeProto {
    let to = AttributeProto { i: Some(8), ..attribute("to", AttributeType::Int) };
    with(node("Cast", &[input], &[output]), to)
}

/// An input of another element type.
fn of_type(elem_type: i32, name: &str, dims: &[&str]) -> ValueInfoProto {
    let mut info = value(name, dims);
    match &mut info.r#type.as_mut().unwrap().value {
        Some(type_proto::Value::TensorType(tensor)) => tensor.elem_type = elem_type,
        other => panic!("{other:?} is no tensor"),
    }
    info
}

#[test]
fn every_operator_is_listed_with_its_status() {
    let nodes = vec![node("Neg", &["x"], &["a"]), node("Fancy", &["a"], &["b"]), node("Neg", &["b"], &["y"])];
    let report = checked(&model(graph(nodes)), &bound());
    assert_eq!((row(&report, "Fancy").count, row(&report, "Neg").count, row(&report, "Neg").opset), (1, 2, 17));
    assert!(said(&report, "Fancy").1.contains("no such operator"), "{report:?}");
    // The second one is an output, whose type the model states: it is looked at.
    assert_eq!(said(&report, "Neg").0, Status::Unknown, "{report:?}");
    assert_eq!(report.status(), Status::Unsupported);
}

#[test]
fn types_that_the_model_states_show_what_is_behind_a_refused_node() {
    let nodes = vec![node("Fancy", &["x"], &["a"]), cast_to_string("a", "b"), node("Neg", &["b"], &["y"])];
    let mut proto = model(graph(nodes));
    let (status, reasons) = said(&checked(&proto, &bound()), "Cast");
    assert!(status == Status::Unknown && reasons.contains("not looked at"), "{reasons}");
    proto.graph.as_mut().unwrap().value_info.push(value("a", &["n"]));
    let (status, reasons) = said(&checked(&proto, &bound()), "Cast");
    assert!(status == Status::Unsupported && reasons.contains("string"), "{reasons}");
}

#[test]
fn operators_of_others_come_with_advice() {
    let mut fused = node("SkipSimplifiedLayerNormalization", &["x", "x"], &["y"]);
    fused.domain = "com.microsoft".into();
    let report = checked(&model(graph(vec![fused])), &bound());
    let (status, reasons) = said(&report, "SkipSimplifiedLayerNormalization");
    assert!(status == Status::Unsupported && reasons.contains("RMSNormalization (opset 23)"), "{reasons}");
    assert!(report.advice.len() == 1 && report.advice[0].contains("--optimize"), "{:?}", report.advice);
}

#[test]
fn constants_of_unknown_types_are_reasons_and_not_the_end() {
    let mut proto = model(graph(vec![node("Add", &["x", "w"], &["a"]), node("Neg", &["x"], &["y"])]));
    let int4 = TensorProto { data_type: 22, raw_data: Some(vec![0]), ..tensor("w", &[2], &[]) };
    proto.graph.as_mut().unwrap().initializer.push(int4);
    let report = checked(&proto, &bound());
    let (status, reasons) = said(&report, "Add");
    assert_eq!(status, Status::Unsupported);
    assert!(reasons.contains("`w`") && reasons.contains("int4") && reasons.contains("8-bit"), "{reasons}");
    assert_eq!(said(&report, "Constant").0, Status::Unsupported);
    assert_eq!(said(&report, "Neg"), (Status::Supported, String::new()));
}

#[test]
fn inputs_of_unknown_types_are_reasons_and_not_the_end() {
    let mut proto = model(graph(vec![node("Identity", &["t"], &["a"]), node("Neg", &["x"], &["y"])]));
    proto.graph.as_mut().unwrap().input.push(of_type(8, "t", &["n"]));
    let report = checked(&proto, &bound());
    let (status, reasons) = said(&report, "Identity");
    assert!(status == Status::Unsupported && reasons.contains("`t`") && reasons.contains("string"), "{reasons}");
    assert_eq!(said(&report, "Neg").0, Status::Supported);
}

#[test]
fn with_open_dimensions_what_is_not_refused_is_unknown() {
    let nodes = vec![cast_to_string("x", "y"), node("Neg", &["x"], &["a"]), node("Abs", &["w"], &["b"])];
    let mut proto = model(graph(nodes));
    proto.graph.as_mut().unwrap().initializer.push(tensor("w", &[1], &[1.0]));
    let open = checked(&proto, &Bindings::default());
    assert_eq!(open.unbound.len(), 1);
    assert_eq!(said(&open, "Cast").0, Status::Unsupported);
    assert_eq!(said(&open, "Neg"), (Status::Unknown, String::new()));
    // It reads nothing that is open.
    assert_eq!(said(&open, "Abs").0, Status::Supported);
    let report = checked(&proto, &bound());
    assert!(report.unbound.is_empty());
    assert_eq!(said(&report, "Neg").0, Status::Supported);
}

#[test]
fn import_ends_with_what_the_list_refuses() {
    let model = reload(&model(graph(vec![cast_to_string("x", "a"), node("Fancy", &["x"], &["y"])]))).unwrap();
    let files = WeightFiles::open(&[]).unwrap();
    for bindings in [Bindings::default(), bound()] {
        let OnnxError::Unsupported(nodes) = crate::import(&model, &bindings, &files).unwrap_err() else {
            panic!("another error")
        };
        let refused: BTreeSet<&str> = nodes.iter().map(|node| node.op.as_str()).collect();
        assert_eq!(refused, BTreeSet::from(["Cast", "Fancy"]));
    }
}

#[test]
fn what_one_trial_shows_is_no_verdict() {
    let mut proto = model(graph(vec![node("Add", &["x", "w"], &["y"])]));
    proto.graph.as_mut().unwrap().initializer.push(tensor("w", &[32], &[1.0; 32]));
    let (status, reasons) = said(&checked(&proto, &Bindings::default()), "Add");
    assert!(status == Status::Unknown && reasons.contains("with 64 for what is open"), "{reasons}");
    let (status, reasons) = said(&checked(&proto, &bound()), "Add");
    assert!(status == Status::Invalid && reasons.contains("do not broadcast"), "{reasons}");
}

#[test]
fn needed_data_are_unknown_until_bound_and_then_frozen() {
    let mut proto = model(graph(vec![node("Expand", &["x", "s"], &["y"])]));
    proto.graph.as_mut().unwrap().input.push(of_type(7, "s", &["one"]));
    let mut bindings = bound();
    bindings.dims.insert("one".to_owned(), 1);
    let (status, reasons) = said(&checked(&proto, &bindings), "Expand");
    assert!(status == Status::Unknown && reasons.contains("--like"), "{reasons}");
    bindings.samples.insert("s".to_owned(), planfile::Tensor::from_elements(&[1], &[2i64]).unwrap());
    let report = checked(&proto, &bindings);
    assert_eq!((said(&report, "Expand").0, report.frozen[0].input.as_str()), (Status::Supported, "s"));
}

#[test]
fn later_findings_are_taken_in_by_the_names_of_nodes() {
    let model = reload(&model(graph(vec![node("Neg", &["x"], &["a"]), node("Neg", &["a"], &["y"])]))).unwrap();
    let mut report = support(&model, &bound(), &WeightFiles::open(&[]).unwrap()).unwrap();
    report.refuse(&model, &[(model.graph.nodes[1].name.clone(), "no kernel".to_owned())]);
    assert_eq!(said(&report, "Neg"), (Status::Unsupported, format!("no kernel (`{}`)", model.graph.nodes[1].name)));
}

#[test]
fn a_reason_that_several_nodes_share_is_given_once() {
    let mut reasons = Vec::new();
    for (node, text) in [("a", "no"), ("b", "never"), ("c", "no")] {
        add(&mut reasons, node, text);
    }
    let row = |count, reasons| OperatorSupport {
        domain: String::new(),
        op: "Cast".to_owned(),
        opset: 17,
        count,
        status: Status::Unsupported,
        reasons,
    };
    assert_eq!(row(5, reasons.clone()).reason_texts(), ["no (2 nodes, `a` first)", "never (`b`)"]);
    assert_eq!(row(2, reasons[..1].to_vec()).reason_texts(), ["no"]);
}

#[test]
fn what_onnx_forbids_needs_no_dimensions() {
    let invented = attribute("invented", AttributeType::Int);
    let nodes = vec![
        named("first", node("Relu", &["x"], &["a"])),
        named("second", with(node("Relu", &["a"], &["b"]), invented)),
        node("Add", &["b"], &["y"]),
    ];
    let report = checked(&model(graph(nodes)), &Bindings::default());
    let relu = "it has no attribute `invented`; allowed: none (`second`)";
    assert_eq!(said(&report, "Add"), (Status::Unsupported, "input 1 (`B`) is missing".to_owned()));
    assert_eq!(said(&report, "Relu"), (Status::Unsupported, relu.to_owned()));
}
