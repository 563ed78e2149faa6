//! Turns messages into flat graphs: calls of model-local functions are replaced by their bodies, Constant nodes become
//! initializers, and every node gets a unique name.
//!
//! before  `y = my.Twice(x) {by: 2.0}`      after  `twice/c: initializer 2.0`
//!         `my.Twice(a) { c = Constant by;`        `twice/Mul_1: y = Mul(x, twice/c)`
//!         `               b = Mul(a, c) } -> b`
//!
//! A value inside a call is named after the call's node, so names do not depend on anything but the model.

use std::collections::{BTreeMap, BTreeSet};

use planfile::text::few;

use crate::attribute::{attribute_error, attribute_type, constant, nodes_in, readable, text};
use crate::error::OnnxError;
use crate::flat::{Attribute, Container, DimSpec, Graph, Initializer, Node, ValueInfo};
use crate::messages::{
    AttributeProto, AttributeType, DimensionValue, FunctionProto, GraphProto, NodeProto, TensorShapeProto,
    ValueInfoProto, type_proto,
};
use crate::names::Names;
use crate::source_files::SourceFiles;
use crate::tensor_data::{ElemType, Tensor, sparse_tensor, tensor};

/// Most nodes that a model may have once its functions are expanded.
pub const NODE_LIMIT: usize = 500_000;

/// Levels of function calls and sub-graphs.
pub const NESTING_LIMIT: usize = 64;

/// Domain, name and overload.
type FunctionKey = (String, String, String);

/// ONNX's own domain has two spellings.
pub(crate) fn canonical_domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// Flattens the graph of a model. Its nodes are in the model's order; [`crate::order`] checks and sorts them.
///
/// # Errors
/// When a tensor, attribute or call of a function is not valid.
pub(crate) fn flatten(
    graph: &GraphProto,
    functions: &[FunctionProto],
    opsets: &BTreeMap<String, i64>,
    files: &mut SourceFiles<'_>,
) -> Result<Graph, OnnxError> {
    let mut by_key = BTreeMap::new();
    for function in functions {
        let key = (canonical_domain(&function.domain).to_owned(), function.name.clone(), function.overload.clone());
        if by_key.insert(key.clone(), function).is_some() {
            let what = String::from("a function");
            let name = function_name(&key);
            return Err(OnnxError::DuplicateName {
                place: "the model".into(),
                name,
                first: what.clone(),
                second: what,
            });
        }
    }
    let mut names = Names::default();
    names.reserve_all(graph);
    let mut flattener =
        Flattener { functions: by_key, model_opsets: opsets, files, names, node_count: 0, calls: Vec::new(), depth: 0 };
    let mut frame = Frame { opsets: opsets.clone(), place: "the model".into(), prefix: String::new(), function: None };
    flattener.graph(graph, &mut frame, "")
}

/// What names and versions mean where a node stands.
struct Frame {
    opsets: BTreeMap<String, i64>,
    place: String,
    /// Put before names from inside a function; empty outside.
    prefix: String,
    function: Option<FunctionFrame>,
}

struct FunctionFrame {
    attributes: BTreeMap<String, Attribute>,
    /// From names in the function to names in the flat graph, the innermost body last.
    scopes: Vec<BTreeMap<String, String>>,
}

impl Frame {
    /// The flat name of a value; `None`: not defined in this function.
    fn value(&self, name: &str) -> Option<String> {
        match &self.function {
            Some(function) if !name.is_empty() => {
                function.scopes.iter().rev().find_map(|scope| scope.get(name)).cloned()
            }
            Some(_) | None => Some(name.to_owned()),
        }
    }

    fn values(&self, names: &[String], node: &str, op: &str) -> Result<Vec<String>, OnnxError> {
        let value = |name: &String| {
            self.value(name).ok_or_else(|| OnnxError::UndefinedValue {
                node: node.to_owned(),
                op: op.to_owned(),
                value: format!("{}{name}", self.prefix),
            })
        };
        names.iter().map(value).collect()
    }

    /// Opens a scope for the values that a body inside a function defines; nothing to do outside of functions.
    fn define<'n>(&mut self, defined: impl Iterator<Item = &'n String>, names: &mut Names) {
        if let Some(function) = &mut self.function {
            let mut scope = BTreeMap::new();
            for name in defined.filter(|name| !name.is_empty()) {
                scope.entry(name.clone()).or_insert_with(|| names.value(format!("{}{name}", self.prefix)));
            }
            function.scopes.push(scope);
        }
    }

    fn leave_body(&mut self) {
        if let Some(function) = &mut self.function {
            function.scopes.pop();
        }
    }
}

struct Flattener<'m, 'f, 'o> {
    functions: BTreeMap<FunctionKey, &'m FunctionProto>,
    model_opsets: &'m BTreeMap<String, i64>,
    files: &'f mut SourceFiles<'o>,
    names: Names,
    node_count: usize,
    calls: Vec<FunctionKey>,
    depth: usize,
}

impl Flattener<'_, '_, '_> {
    /// `prefix` goes before the names made up for nodes without one.
    fn graph(&mut self, proto: &GraphProto, frame: &mut Frame, prefix: &str) -> Result<Graph, OnnxError> {
        let sparse_names = || proto.sparse_initializer.iter().filter_map(|sparse| Some(&sparse.values.as_ref()?.name));
        let constants: BTreeSet<&String> =
            proto.initializer.iter().map(|initializer| &initializer.name).chain(sparse_names()).collect();
        let inputs = proto.input.iter().map(|input| &input.name);
        let outputs = proto.node.iter().flat_map(|node| &node.output);
        frame.define(inputs.chain(constants.iter().copied()).chain(outputs), &mut self.names);
        let mut graph = Graph { name: proto.name.clone(), ..Graph::default() };
        for initializer in &proto.initializer {
            let tensor = readable(tensor(initializer, &initializer.name, self.files))?;
            self.initializer(&initializer.name, tensor, frame, &mut graph)?;
        }
        for (sparse, name) in proto.sparse_initializer.iter().zip(sparse_names()) {
            let tensor = readable(sparse_tensor(sparse, name, self.files))?;
            self.initializer(name, tensor, frame, &mut graph)?;
        }
        for (index, node) in proto.node.iter().enumerate() {
            self.node(node, index, frame, prefix, &mut graph)?;
        }
        let infos = |infos: &[ValueInfoProto]| infos.iter().map(|info| value_info(info, frame)).collect::<Vec<_>>();
        // Older IR versions list initializers among the inputs: their data is a default, here it is the value.
        graph.inputs =
            proto.input.iter().filter(|input| !constants.contains(&input.name)).map(|i| value_info(i, frame)).collect();
        graph.outputs = infos(&proto.output);
        graph.value_info = infos(&proto.value_info);
        frame.leave_body();
        Ok(graph)
    }

    /// A constant of the graph; as a Constant node, which import reports, where we have no type for it.
    fn initializer(
        &mut self,
        name: &str,
        tensor: Result<Tensor, Attribute>,
        frame: &Frame,
        graph: &mut Graph,
    ) -> Result<(), OnnxError> {
        let value = frame.value(name).unwrap_or_default();
        match tensor {
            Ok(tensor) => graph.initializers.push(Initializer { name: value, tensor }),
            Err(unsupported) => {
                let name = self.names.node(name.to_owned(), false);
                self.count_nodes(1, &name)?;
                graph.nodes.push(Node {
                    op_type: "Constant".into(),
                    domain: String::new(),
                    opset: frame.opsets.get("").copied().unwrap_or(1),
                    name,
                    inputs: Vec::new(),
                    outputs: vec![value],
                    attributes: BTreeMap::from([("value".to_owned(), unsupported)]),
                    device_configurations: Vec::new(),
                });
            }
        }
        Ok(())
    }

    fn node(
        &mut self,
        proto: &NodeProto,
        index: usize,
        frame: &mut Frame,
        prefix: &str,
        graph: &mut Graph,
    ) -> Result<(), OnnxError> {
        let name = if proto.name.is_empty() {
            self.names.node(format!("{prefix}{}_{index}", proto.op_type), false)
        } else {
            self.names.node(format!("{}{}", frame.prefix, proto.name), frame.function.is_none())
        };
        self.count_nodes(1, &name)?;
        let domain = canonical_domain(&proto.domain);
        let op = &proto.op_type;
        let inputs = frame.values(&proto.input, &name, op)?;
        let outputs = frame.values(&proto.output, &name, op)?;
        let mut attributes = BTreeMap::new();
        for attribute in &proto.attribute {
            let Some(value) = self.attribute(attribute, &name, frame)? else { continue };
            if attributes.insert(attribute.name.clone(), value).is_some() {
                return Err(attribute_error(&name, &attribute.name, "it is given twice"));
            }
        }
        let key = (domain.to_owned(), op.clone(), proto.overload.clone());
        if let Some(&function) = self.functions.get(&key) {
            return self.call(function, key, &Call { name, inputs, outputs, attributes }, graph);
        }
        let opset = self.opset(frame, domain, &name, op)?;
        let mut device_configurations = proto.device_configurations.clone();
        for spec in device_configurations.iter_mut().flat_map(|configuration| &mut configuration.sharding_spec) {
            if let Some(flat) = frame.value(&spec.tensor_name) {
                spec.tensor_name = flat;
            }
        }
        let node = Node {
            op_type: op.clone(),
            domain: domain.to_owned(),
            opset,
            name,
            inputs,
            outputs,
            attributes,
            device_configurations,
        };
        match constant(&node) {
            Some(Ok(initializer)) => graph.initializers.push(initializer),
            // Import reports the constant, with all other nodes that cannot be imported.
            Some(Err(_)) | None => graph.nodes.push(node),
        }
        Ok(())
    }

    fn opset(&self, frame: &Frame, domain: &str, node: &str, op: &str) -> Result<i64, OnnxError> {
        let opset = frame.opsets.get(domain).or_else(|| self.model_opsets.get(domain)).copied();
        match opset {
            Some(opset) => Ok(opset),
            // Exporters leave out other domains; what we have of them is known by name.
            None if !domain.is_empty() => Ok(1),
            None => Err(OnnxError::NoOpset {
                place: frame.place.clone(),
                node: node.to_owned(),
                op: op.to_owned(),
                domain: "ai.onnx".into(),
            }),
        }
    }

    /// Puts the body of `function` in place of the call.
    fn call(
        &mut self,
        function: &FunctionProto,
        key: FunctionKey,
        call: &Call,
        graph: &mut Graph,
    ) -> Result<(), OnnxError> {
        if let Some(start) = self.calls.iter().position(|caller| *caller == key) {
            return Err(OnnxError::FunctionCycle {
                functions: self.calls[start..].iter().map(function_name).collect(),
            });
        }
        let fail = |problem: String| OnnxError::FunctionCall {
            node: call.name.clone(),
            function: function_name(&key),
            problem,
        };
        for (what, given, declared) in [
            ("inputs", call.inputs.len(), function.input.len()),
            ("outputs", call.outputs.len(), function.output.len()),
        ] {
            if given > declared {
                return Err(fail(format!("the call has {given} {what}, the function {declared}")));
            }
        }
        if let Some(name) = call.attributes.keys().find(|name| !takes(function, name)) {
            let declared = function.attribute.iter().chain(function.attribute_proto.iter().map(|proto| &proto.name));
            let declared = few(declared.map(|name| format!("`{name}`")));
            let declared = if declared.is_empty() { "none".to_owned() } else { declared };
            return Err(fail(format!("the call gives attribute `{name}`, the function has {declared}")));
        }
        let mut opsets = BTreeMap::new();
        for import in &function.opset_import {
            opsets.insert(canonical_domain(&import.domain).to_owned(), import.version);
        }
        let place = format!("function `{}`", function_name(&key));
        if let Some(&version) = opsets.get("") {
            crate::load::check_opset(&place, version)?;
        }
        let absent = String::new();
        let actual_inputs = call.inputs.iter().chain(std::iter::repeat(&absent));
        let mut scope: BTreeMap<String, String> = function.input.iter().cloned().zip(actual_inputs.cloned()).collect();
        // An output that is an input, or the same value as an output before it, needs a copy of its own name.
        let mut copies = Vec::new();
        for (formal, actual) in function.output.iter().zip(&call.outputs).filter(|(_, actual)| !actual.is_empty()) {
            if scope.contains_key(formal) {
                copies.push((formal, actual));
            } else {
                scope.insert(formal.clone(), actual.clone());
            }
        }
        let prefix = format!("{}/", call.name);
        for name in function.node.iter().flat_map(|node| &node.output).filter(|name| !name.is_empty()) {
            scope.entry(name.clone()).or_insert_with(|| self.names.value(format!("{prefix}{name}")));
        }
        let attributes = call.attributes.clone();
        let frame_function = FunctionFrame { attributes, scopes: vec![scope] };
        let mut frame = Frame { opsets, place, prefix: prefix.clone(), function: Some(frame_function) };
        self.enter(&call.name)?;
        self.calls.push(key.clone());
        for default in &function.attribute_proto {
            let is_given = frame.function.as_ref().is_some_and(|f| f.attributes.contains_key(&default.name));
            if is_given {
                continue;
            }
            if let (Some(value), Some(function)) =
                (self.attribute(default, &call.name, &mut frame)?, &mut frame.function)
            {
                function.attributes.insert(default.name.clone(), value);
            }
        }
        for (index, node) in function.node.iter().enumerate() {
            self.node(node, index, &mut frame, &prefix, graph)?;
        }
        for (formal, actual) in copies {
            let source = frame.value(formal).filter(|source| !source.is_empty());
            let source =
                source.ok_or_else(|| fail(format!("its output `{formal}` is an input that the call leaves out")))?;
            let name = self.names.node(format!("{prefix}Identity"), false);
            self.count_nodes(1, &name)?;
            graph.nodes.push(Node {
                op_type: "Identity".into(),
                domain: String::new(),
                opset: self.opset(&frame, "", &name, "Identity")?,
                name,
                inputs: vec![source],
                outputs: vec![actual.clone()],
                attributes: BTreeMap::new(),
                device_configurations: Vec::new(),
            });
        }
        self.calls.pop();
        self.depth -= 1;
        Ok(())
    }

    fn enter(&mut self, node: &str) -> Result<(), OnnxError> {
        self.depth += 1;
        if self.depth > NESTING_LIMIT { Err(too_large(node)) } else { Ok(()) }
    }

    fn count_nodes(&mut self, count: usize, node: &str) -> Result<(), OnnxError> {
        self.node_count = self.node_count.saturating_add(count);
        if self.node_count > NODE_LIMIT { Err(too_large(node)) } else { Ok(()) }
    }

    /// `None`: the attribute refers to one of the function that the call does not give, so it is left out.
    fn attribute(
        &mut self,
        proto: &AttributeProto,
        node: &str,
        frame: &mut Frame,
    ) -> Result<Option<Attribute>, OnnxError> {
        if !proto.ref_attr_name.is_empty() {
            let Some(function) = &frame.function else {
                return Err(attribute_error(
                    node,
                    &proto.name,
                    "it refers to a function's attribute outside of a function",
                ));
            };
            let value = function.attributes.get(&proto.ref_attr_name).cloned();
            if let Some(value) = &value {
                self.count_nodes(nodes_in(value), node)?;
            }
            return Ok(value);
        }
        let missing = || attribute_error(node, &proto.name, "its value is not given");
        let label = |tensor_name: &str| {
            if tensor_name.is_empty() { format!("{node}.{}", proto.name) } else { tensor_name.to_owned() }
        };
        Ok(Some(match attribute_type(proto, node)? {
            // proto2 writers may leave out a zero.
            AttributeType::Float => Attribute::Float(proto.f.unwrap_or_default()),
            AttributeType::Int => Attribute::Int(proto.i.unwrap_or_default()),
            AttributeType::String => match text(proto.s.as_deref().unwrap_or_default()) {
                Ok(text) => Attribute::String(text),
                Err(unsupported) => unsupported,
            },
            AttributeType::Floats => Attribute::Floats(proto.floats.clone()),
            AttributeType::Ints => Attribute::Ints(proto.ints.clone()),
            AttributeType::Strings => match proto.strings.iter().map(|bytes| text(bytes)).collect() {
                Ok(texts) => Attribute::Strings(texts),
                Err(unsupported) => unsupported,
            },
            AttributeType::Tensor => {
                let proto = proto.t.as_ref().ok_or_else(missing)?;
                match readable(tensor(proto, &label(&proto.name), self.files))? {
                    Ok(tensor) => Attribute::Tensor(tensor),
                    Err(unsupported) => unsupported,
                }
            }
            AttributeType::Tensors => {
                let mut tensors = Vec::new();
                for proto in &proto.tensors {
                    match readable(tensor(proto, &label(&proto.name), self.files))? {
                        Ok(tensor) => tensors.push(tensor),
                        Err(unsupported) => return Ok(Some(unsupported)),
                    }
                }
                Attribute::Tensors(tensors)
            }
            AttributeType::SparseTensor => {
                let proto = proto.sparse_tensor.as_ref().ok_or_else(missing)?;
                match readable(sparse_tensor(proto, &label(""), self.files))? {
                    Ok(tensor) => Attribute::Tensor(tensor),
                    Err(unsupported) => unsupported,
                }
            }
            AttributeType::Graph => {
                let body = proto.g.as_ref().ok_or_else(missing)?;
                Attribute::Graph(Box::new(self.body(body, node, &proto.name, frame)?))
            }
            AttributeType::Graphs => {
                let mut bodies = Vec::new();
                for body in &proto.graphs {
                    bodies.push(self.body(body, node, &proto.name, frame)?);
                }
                Attribute::Graphs(bodies)
            }
            AttributeType::SparseTensors => {
                Attribute::Unsupported("a list of sparse tensors, which is not supported".into())
            }
            AttributeType::TypeProto | AttributeType::TypeProtos => {
                Attribute::Unsupported("a type, which is not supported".into())
            }
            AttributeType::Undefined => return Err(missing()),
        }))
    }

    fn body(&mut self, body: &GraphProto, node: &str, attribute: &str, frame: &mut Frame) -> Result<Graph, OnnxError> {
        self.enter(node)?;
        let graph = self.graph(body, frame, &format!("{node}/{attribute}/"))?;
        self.depth -= 1;
        Ok(graph)
    }
}

/// A node that calls a function, in names of the flat graph.
struct Call {
    name: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    attributes: BTreeMap<String, Attribute>,
}

/// Whether a call may give the function this attribute: it is declared, or a node of the function reads it all the same.
fn takes(function: &FunctionProto, name: &str) -> bool {
    function.attribute.iter().any(|declared| declared == name)
        || function.attribute_proto.iter().any(|declared| declared.name == name)
        || reads(&function.node, name)
}

fn reads(nodes: &[NodeProto], name: &str) -> bool {
    nodes.iter().flat_map(|node| &node.attribute).any(|attribute| {
        let mut bodies = attribute.g.as_deref().into_iter().chain(&attribute.graphs);
        attribute.ref_attr_name == name || bodies.any(|body| reads(&body.node, name))
    })
}

fn function_name((domain, name, overload): &FunctionKey) -> String {
    let separator = if domain.is_empty() { "" } else { "." };
    let colon = if overload.is_empty() { "" } else { ":" };
    format!("{domain}{separator}{name}{colon}{overload}")
}

fn too_large(node: &str) -> OnnxError {
    OnnxError::ExpansionTooLarge { node: node.to_owned(), limit: NODE_LIMIT, depth_limit: NESTING_LIMIT }
}

fn value_info(proto: &ValueInfoProto, frame: &Frame) -> ValueInfo {
    let (container, elem_type, shape) = match proto.r#type.as_ref().and_then(|r#type| r#type.value.as_ref()) {
        Some(type_proto::Value::TensorType(tensor)) => (Container::Tensor, tensor.elem_type, tensor.shape.as_ref()),
        Some(type_proto::Value::SparseTensorType(tensor)) => {
            (Container::SparseTensor, tensor.elem_type, tensor.shape.as_ref())
        }
        Some(type_proto::Value::SequenceType(_)) => (Container::Sequence, 0, None),
        Some(type_proto::Value::OptionalType(_)) => (Container::Optional, 0, None),
        Some(type_proto::Value::MapType(_)) => (Container::Map, 0, None),
        Some(type_proto::Value::OpaqueType(_)) => (Container::Opaque, 0, None),
        None => (Container::Tensor, 0, None),
    };
    ValueInfo {
        name: frame.value(&proto.name).unwrap_or_default(),
        container,
        elem_type: ElemType(elem_type),
        dims: shape.map(dims),
    }
}

/// Exporters write an unknown dimension as nothing, as −1, as an empty name, or as `?` (which is not one and the same
/// number wherever it stands).
fn dims(shape: &TensorShapeProto) -> Vec<DimSpec> {
    let dim = |value: &Option<DimensionValue>| match value {
        Some(DimensionValue::DimValue(value)) => u64::try_from(*value).map_or(DimSpec::Unknown, DimSpec::Value),
        Some(DimensionValue::DimParam(name)) if !matches!(name.as_str(), "" | "?") => DimSpec::Param(name.clone()),
        Some(DimensionValue::DimParam(_)) | None => DimSpec::Unknown,
    };
    shape.dim.iter().map(|dimension| dim(&dimension.value)).collect()
}

#[cfg(test)]
mod tests;
