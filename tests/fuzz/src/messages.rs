//! Models made small: long data moved to the file beside them, so that mutations hit structure.

use onnx::messages::{AttributeProto, GraphProto, ModelProto, StringStringEntryProto, TensorProto};
use prost::Message as _;

/// Data up to this size stays in the model.
const INSIDE_BYTES: usize = 64;

/// The model with its long tensors in `weights.bin`, all at its start. `None` for bytes that are no model.
pub fn small(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut model = ModelProto::decode(bytes).ok()?;
    if let Some(graph) = &mut model.graph {
        shrink_graph(graph);
    }
    for function in &mut model.functions {
        function.node.iter_mut().flat_map(|node| &mut node.attribute).for_each(shrink_attribute);
    }
    Some(model.encode_to_vec())
}

fn shrink_graph(graph: &mut GraphProto) {
    graph.initializer.iter_mut().for_each(shrink_tensor);
    graph.node.iter_mut().flat_map(|node| &mut node.attribute).for_each(shrink_attribute);
}

fn shrink_attribute(attribute: &mut AttributeProto) {
    attribute.t.iter_mut().for_each(|tensor| shrink_tensor(tensor));
    attribute.tensors.iter_mut().for_each(shrink_tensor);
    attribute.g.iter_mut().for_each(|graph| shrink_graph(graph));
    attribute.graphs.iter_mut().for_each(shrink_graph);
}

fn shrink_tensor(tensor: &mut TensorProto) {
    if tensor.raw_data.as_ref().is_none_or(|raw| raw.len() <= INSIDE_BYTES) {
        return;
    }
    tensor.raw_data = None;
    tensor.data_location = 1;
    tensor.external_data = vec![StringStringEntryProto { key: "location".to_owned(), value: "weights.bin".to_owned() }];
}
