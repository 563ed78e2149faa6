//! Control characters in a model's names become what Rust writes for them in a literal, all over the model alike.
//!
//! before  node "a\x1b[2J" reads "x\n"      after  node `a\u{1b}[2J` reads `x\n`, all printable
//!
//! Names end up in messages, tables and plans, and a terminal obeys such characters. ONNX asks for names that are
//! identifiers of C, so a name that changes here is none. Values of attributes stay as they are.

use planfile::printable::printable;

use crate::messages::{
    AttributeProto, DimensionValue, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    SparseTensorProto, TensorProto, TypeProto, ValueInfoProto, type_proto,
};

/// Rewrites every name of the model that has control characters. Nesting was bounded when the model was read.
pub(crate) fn show(model: &mut ModelProto) {
    shown(&mut model.producer_name);
    shown(&mut model.producer_version);
    opsets(&mut model.opset_import);
    for entry in &mut model.metadata_props {
        shown(&mut entry.key);
        shown(&mut entry.value);
    }
    model.graph.iter_mut().for_each(graph);
    model.functions.iter_mut().for_each(function);
}

/// Rewrites one name.
pub(crate) fn shown(name: &mut String) {
    if name.contains(char::is_control) {
        *name = printable(name).into_owned();
    }
}

fn all(names: &mut [String]) {
    names.iter_mut().for_each(shown);
}

fn opsets(imports: &mut [OperatorSetIdProto]) {
    imports.iter_mut().for_each(|import| shown(&mut import.domain));
}

fn graph(graph: &mut GraphProto) {
    shown(&mut graph.name);
    graph.node.iter_mut().for_each(node);
    graph.initializer.iter_mut().for_each(tensor);
    graph.sparse_initializer.iter_mut().for_each(sparse);
    let values = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
    values.for_each(value);
}

fn function(function: &mut FunctionProto) {
    [&mut function.name, &mut function.domain, &mut function.overload].into_iter().for_each(shown);
    [&mut function.input, &mut function.output, &mut function.attribute].into_iter().for_each(|names| all(names));
    opsets(&mut function.opset_import);
    function.node.iter_mut().for_each(node);
    function.attribute_proto.iter_mut().for_each(attribute);
    function.value_info.iter_mut().for_each(value);
}

fn node(node: &mut NodeProto) {
    [&mut node.name, &mut node.op_type, &mut node.domain, &mut node.overload].into_iter().for_each(shown);
    all(&mut node.input);
    all(&mut node.output);
    node.attribute.iter_mut().for_each(attribute);
}

fn attribute(attribute: &mut AttributeProto) {
    shown(&mut attribute.name);
    shown(&mut attribute.ref_attr_name);
    attribute.t.iter_mut().map(Box::as_mut).chain(&mut attribute.tensors).for_each(tensor);
    attribute.g.iter_mut().map(Box::as_mut).chain(&mut attribute.graphs).for_each(graph);
    attribute.sparse_tensor.iter_mut().map(Box::as_mut).chain(&mut attribute.sparse_tensors).for_each(sparse);
}

fn tensor(tensor: &mut TensorProto) {
    shown(&mut tensor.name);
}

fn sparse(sparse: &mut SparseTensorProto) {
    sparse.values.iter_mut().chain(&mut sparse.indices).for_each(tensor);
}

/// Names of dimensions are those of tensors: types in types are not supported, and refused without them.
fn value(value: &mut ValueInfoProto) {
    shown(&mut value.name);
    let Some(TypeProto { value: Some(ty) }) = &mut value.r#type else { return };
    let (type_proto::Value::TensorType(tensor) | type_proto::Value::SparseTensorType(tensor)) = ty else { return };
    for dim in tensor.shape.iter_mut().flat_map(|shape| &mut shape.dim) {
        if let Some(DimensionValue::DimParam(name)) = &mut dim.value {
            shown(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::error::OnnxError;
    use crate::messages::AttributeType;
    use crate::samples::{attribute, body, graph, model, node, reload, tensor, value, with};

    #[test]
    fn names_stay_the_same_among_each_other() {
        let mut inner = graph(vec![node("Identity", &["w\u{1b}"], &["z\n"])]);
        (inner.input, inner.output) = (vec![], vec![value("z\n", &[])]);
        let branch = with(node("If", &["c\u{7f}"], &["z\n"]), body("then_branch", inner.clone()));
        let mut proto =
            model(graph(vec![node("Relu", &["x\r"], &["y\u{9b}"]), with(branch, body("else_branch", inner))]));
        let outer = proto.graph.as_mut().unwrap();
        outer.input = vec![value("x\r", &["n\u{1b}"]), value("c\u{7f}", &[])];
        outer.output = vec![value("y\u{9b}", &["n\u{1b}"])];
        outer.initializer.push(tensor("w\u{1b}", &[1], &[1.0]));
        outer.node[0].name = "a\0".to_owned();
        let loaded = reload(&proto).unwrap();
        assert!(!format!("{loaded:?}").contains(char::is_control));
        assert_eq!((loaded.graph.nodes[0].name.as_str(), loaded.graph.inputs[0].name.as_str()), ("a\\0", "x\\r"));
        assert_eq!(
            (loaded.graph.outputs[0].name.as_str(), loaded.graph.initializers[0].name.as_str()),
            ("y\\u{9b}", "w\\u{1b}")
        );
    }

    #[test]
    fn errors_show_names_too() {
        let error = reload(&model(graph(vec![node("Relu", &["no\u{1b}[2J"], &["y"])]))).unwrap_err();
        assert!(matches!(error, OnnxError::UndefinedValue { .. }));
        assert!(error.to_string().contains("`no\\u{1b}[2J`"), "{error}");
        let named = attribute("a\n", AttributeType::Int);
        let twice = with(with(node("Relu", &["x"], &["y"]), named.clone()), named);
        let text = reload(&model(graph(vec![twice]))).unwrap_err().to_string();
        assert!(!text.contains(char::is_control), "{text}");
    }
}
