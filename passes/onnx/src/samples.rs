//! Small models for tests, as messages and as files.

use std::path::PathBuf;

use prost::Message as _;
use tempfile::TempDir;

use crate::error::OnnxError;
use crate::load::{LoadOptions, Model, load};
use crate::messages::{
    AttributeProto, AttributeType, Dimension, DimensionValue, FunctionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};

pub(crate) fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// An `f32` value with named dimensions.
pub(crate) fn value(name: &str, dims: &[&str]) -> ValueInfoProto {
    let dim = |name: &&str| Dimension { value: Some(DimensionValue::DimParam((*name).to_owned())) };
    let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: 1, shape };
    let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) });
    ValueInfoProto { name: name.into(), r#type }
}

/// A node without a name.
pub(crate) fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { op_type: op.into(), input: strings(inputs), output: strings(outputs), ..NodeProto::default() }
}

pub(crate) fn named(name: &str, node: NodeProto) -> NodeProto {
    NodeProto { name: name.into(), ..node }
}

pub(crate) fn with(mut node: NodeProto, attribute: AttributeProto) -> NodeProto {
    node.attribute.push(attribute);
    node
}

pub(crate) fn attribute(name: &str, r#type: AttributeType) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: r#type as i32, ..AttributeProto::default() }
}

pub(crate) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

pub(crate) fn body(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto { g: Some(Box::new(graph)), ..attribute(name, AttributeType::Graph) }
}

/// An `f32` tensor in `raw_data`.
pub(crate) fn tensor(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorProto { name: name.into(), dims: dims.to_vec(), data_type: 1, raw_data: Some(raw), ..TensorProto::default() }
}

/// An `f32` tensor in another file.
pub(crate) fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> TensorProto {
    let entry = |(key, value): &(&str, &str)| StringStringEntryProto { key: (*key).into(), value: (*value).into() };
    TensorProto {
        raw_data: None,
        data_location: 1,
        external_data: entries.iter().map(entry).collect(),
        ..tensor(name, dims, &[])
    }
}

/// A graph from `x` to `y`.
pub(crate) fn graph(nodes: Vec<NodeProto>) -> GraphProto {
    GraphProto {
        name: "main".into(),
        node: nodes,
        input: vec![value("x", &["n"])],
        output: vec![value("y", &["n"])],
        ..GraphProto::default()
    }
}

pub(crate) fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.into(), version }
}

pub(crate) fn model(graph: GraphProto) -> ModelProto {
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset("", 17)], ..ModelProto::default() }
}

/// A function of domain `my`.
pub(crate) fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "my".into(),
        input: strings(inputs),
        output: strings(outputs),
        node: nodes,
        opset_import: vec![opset("", 17), opset("my", 1)],
        ..FunctionProto::default()
    }
}

pub(crate) fn call(function: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto { domain: "my".into(), ..node(function, inputs, outputs) }
}

/// A folder with one file, `model.onnx`.
pub(crate) struct Saved {
    pub(crate) folder: TempDir,
    pub(crate) path: PathBuf,
}

pub(crate) fn save_bytes(bytes: &[u8]) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, bytes).unwrap();
    Saved { folder, path }
}

pub(crate) fn save(model: &ModelProto) -> Saved {
    save_bytes(&model.encode_to_vec())
}

/// Saves and loads a model.
pub(crate) fn reload(model: &ModelProto) -> Result<Model, OnnxError> {
    load(&save(model).path, &LoadOptions::default())
}
