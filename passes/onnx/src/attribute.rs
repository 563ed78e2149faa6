//! Values of attributes, and of the Constant nodes that have them.

use planfile::DType;
use planfile::text::few;

use crate::advice;
use crate::error::{OnnxError, TensorProblem};
use crate::flat::{Attribute, Graph, Initializer, Node};
use crate::messages::{AttributeProto, AttributeType};
use crate::schema::check;
use crate::tensor_data::Tensor;

pub(crate) fn attribute_error(node: &str, attribute: &str, problem: &str) -> OnnxError {
    OnnxError::Attribute { node: node.to_owned(), attribute: attribute.to_owned(), problem: problem.to_owned() }
}

/// A string attribute's text.
pub(crate) fn text(bytes: &[u8]) -> Result<String, Attribute> {
    let text = str::from_utf8(bytes)
        .map_err(|_| Attribute::Unsupported("a string that is not UTF-8, which is not supported".into()))?;
    Ok(text.to_owned())
}

/// Sets apart a valid tensor that we have no type for: its node is reported with all the others that cannot be imported.
pub(crate) fn readable(tensor: Result<Tensor, OnnxError>) -> Result<Result<Tensor, Attribute>, OnnxError> {
    match tensor {
        Ok(tensor) => Ok(Ok(tensor)),
        Err(OnnxError::Tensor { problem: TensorProblem::UnsupportedType { name }, .. }) => Ok(Err(
            Attribute::Unsupported(format!("a tensor of {name}, which is not supported: {}", advice::for_type(name))),
        )),
        Err(error) => Err(error),
    }
}

/// The declared type, or for files from before it was required, the one of the field that is there.
pub(crate) fn attribute_type(proto: &AttributeProto, node: &str) -> Result<AttributeType, OnnxError> {
    let declared = AttributeType::try_from(proto.r#type)
        .map_err(|_| attribute_error(node, &proto.name, &format!("its type number {} is unknown", proto.r#type)))?;
    if declared != AttributeType::Undefined {
        return Ok(declared);
    }
    let fields = [
        (proto.f.is_some(), AttributeType::Float),
        (proto.i.is_some(), AttributeType::Int),
        (proto.s.is_some(), AttributeType::String),
        (proto.t.is_some(), AttributeType::Tensor),
        (proto.g.is_some(), AttributeType::Graph),
        (!proto.floats.is_empty(), AttributeType::Floats),
        (!proto.ints.is_empty(), AttributeType::Ints),
        (!proto.strings.is_empty(), AttributeType::Strings),
        (!proto.tensors.is_empty(), AttributeType::Tensors),
        (!proto.graphs.is_empty(), AttributeType::Graphs),
        (proto.sparse_tensor.is_some(), AttributeType::SparseTensor),
    ];
    let present = fields.into_iter().find_map(|(is_present, kind)| is_present.then_some(kind));
    Ok(present.unwrap_or(AttributeType::Undefined))
}

/// Nodes of the bodies that an attribute holds.
pub(crate) fn nodes_in(attribute: &Attribute) -> usize {
    let count = |graph: &Graph| {
        let inner = graph.nodes.iter().flat_map(|node| node.attributes.values()).map(nodes_in);
        inner.fold(graph.nodes.len(), usize::saturating_add)
    };
    attribute.graphs().iter().map(count).fold(0, usize::saturating_add)
}

/// The initializer that a Constant node stands for; `None` for any other node.
///
/// # Errors
/// What is wrong with the node, or with its value for us.
pub(crate) fn constant(node: &Node) -> Option<Result<Initializer, String>> {
    if node.op_type != "Constant" || !node.domain.is_empty() {
        return None;
    }
    let findings = check::form(node);
    let tensor = if findings.is_empty() { value(node) } else { Err(findings.join("; ")) };
    Some(tensor.and_then(|tensor| {
        let findings = check::types(node, &[], &[Some(tensor.dtype)]);
        let name = node.outputs.first().cloned().unwrap_or_default();
        if findings.is_empty() { Ok(Initializer { name, tensor }) } else { Err(findings.join("; ")) }
    }))
}

/// The value of a Constant node.
fn value(node: &Node) -> Result<Tensor, String> {
    let floats = |dims, values: &[f32]| {
        Tensor::inline(DType::F32, dims, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    };
    let ints = |dims, values: &[i64]| {
        Tensor::inline(DType::I64, dims, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    };
    let values: Vec<(&String, &Attribute)> =
        node.attributes.iter().filter(|(name, _)| name.starts_with("value") || *name == "sparse_value").collect();
    let [(_, value)] = values.as_slice() else {
        let names = few(values.iter().map(|(name, _)| format!("`{name}`")));
        let given = if names.is_empty() { "none".to_owned() } else { names };
        return Err(format!("a constant has one attribute that says its value; given: {given}"));
    };
    match value {
        Attribute::Tensor(tensor) => Ok(tensor.clone()),
        Attribute::Float(value) => Ok(floats(vec![], &[*value])),
        Attribute::Floats(values) => Ok(floats(vec![values.len() as u64], values)),
        Attribute::Int(value) => Ok(ints(vec![], &[*value])),
        Attribute::Ints(values) => Ok(ints(vec![values.len() as u64], values)),
        Attribute::Unsupported(why) => Err(format!("its value is {why}")),
        Attribute::String(_) | Attribute::Strings(_) => Err("its value is strings, which are not supported".to_owned()),
        Attribute::Tensors(_) | Attribute::Graph(_) | Attribute::Graphs(_) => {
            Err("its value is not a tensor".to_owned())
        }
    }
}
