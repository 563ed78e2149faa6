//! A model's graph as import reads it: functions inlined, constants gathered, every name defined once and before its use.

use std::collections::BTreeMap;

use crate::messages::NodeDeviceConfigurationProto;
use crate::tensor_data::{ElemType, Tensor};

/// A graph, or the body of a control-flow node, which may read values of the graphs around it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    pub name: String,
    /// Values given at run time; never one that has an initializer.
    pub inputs: Vec<ValueInfo>,
    pub outputs: Vec<ValueInfo>,
    /// Constants: the model's initializers, then the values of Constant nodes.
    pub initializers: Vec<Initializer>,
    /// Each after the nodes whose results it reads.
    pub nodes: Vec<Node>,
    /// What the model says of inner values; hints, not promises.
    pub value_info: Vec<ValueInfo>,
}

/// A constant of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Initializer {
    pub name: String,
    pub tensor: Tensor,
}

/// One operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op_type: String,
    /// Empty for ONNX's own.
    pub domain: String,
    /// Version of `domain` in force: of the function that the node was inlined from, or of the model.
    pub opset: i64,
    /// Unique in the model.
    pub name: String,
    /// Value names; an empty string is an optional input left out.
    pub inputs: Vec<String>,
    /// Value names; an empty string is an output nobody wants.
    pub outputs: Vec<String>,
    pub attributes: BTreeMap<String, Attribute>,
    /// Kept as the model has them.
    pub device_configurations: Vec<NodeDeviceConfigurationProto>,
}

/// Value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    String(String),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
    Tensor(Tensor),
    Tensors(Vec<Tensor>),
    Graph(Box<Graph>),
    Graphs(Vec<Graph>),
    /// A value that cannot be represented; the text says why.
    Unsupported(String),
}

impl Attribute {
    /// The bodies that it holds.
    pub(crate) fn graphs(&self) -> &[Graph] {
        match self {
            Self::Graph(body) => std::slice::from_ref(body),
            Self::Graphs(bodies) => bodies,
            Self::Int(_)
            | Self::Float(_)
            | Self::String(_)
            | Self::Ints(_)
            | Self::Floats(_)
            | Self::Strings(_)
            | Self::Tensor(_)
            | Self::Tensors(_)
            | Self::Unsupported(_) => &[],
        }
    }
}

/// Name and type of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueInfo {
    pub name: String,
    pub container: Container,
    /// Of a tensor; [`ElemType::UNDEFINED`] where the model does not say, and for other containers.
    pub elem_type: ElemType,
    /// `None`: rank unknown.
    pub dims: Option<Vec<DimSpec>>,
}

/// What kind of value it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    Tensor,
    SparseTensor,
    Sequence,
    Optional,
    Map,
    /// A type of some domain's own.
    Opaque,
}

/// One dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DimSpec {
    Value(u64),
    /// A name; equal names are equal numbers.
    Param(String),
    Unknown,
}
