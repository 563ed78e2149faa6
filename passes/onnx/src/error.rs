//! What can be wrong with a model, each message saying what, where, and what to do next.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use planfile::text::count;
use thiserror::Error;

use crate::advice;
use crate::bindings::BindingError;
use crate::flat::Node;
use crate::load::{IR_VERSIONS, OPSETS};

/// Why a model could not be loaded or imported. The file's or the user's fault, never a bug of ours.
#[derive(Debug, Error)]
pub enum OnnxError {
    #[error("cannot {action} {}: {source}; check the path and its permissions", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },

    #[error("{} is empty (0 bytes); export or download the model again", path.display())]
    Empty { path: PathBuf },

    #[error("{} is not a regular file; give the path of a model file", path.display())]
    NotAFile { path: PathBuf },

    #[error("{} has {file_bytes} bytes, more than the {limit_bytes} that one tensor file may have; give a smaller sample", path.display())]
    TensorFileTooLarge { path: PathBuf, file_bytes: u64, limit_bytes: u64 },

    #[error("{} is not an ONNX model: {found} at byte {offset}; {hint}", path.display())]
    NotAModel { path: PathBuf, offset: u64, found: String, hint: &'static str },

    #[error(
        "{} is truncated: a field at byte {offset} needs {}, {left_bytes} left; export or download the model again",
        path.display(),
        count(*needed_bytes, "byte")
    )]
    Truncated { path: PathBuf, offset: u64, needed_bytes: u64, left_bytes: u64 },

    #[error("{} is damaged: {found} at byte {offset}, inside {inside}; export or download the model again", path.display())]
    Malformed { path: PathBuf, offset: u64, inside: &'static str, found: String },

    #[error("{} is damaged: {source}; run `onnx.checker.check_model` on it, or export it again", path.display())]
    Decode { path: PathBuf, source: prost::DecodeError },

    #[error(
        "{} nests messages deeper than {limit} levels at byte {offset}; flatten its nested If and Loop bodies",
        path.display()
    )]
    TooDeep { path: PathBuf, offset: u64, limit: usize },

    #[error(
        "{} keeps more than {limit_bytes} bytes outside `raw_data` (reached at byte {offset}); save its weights as `raw_data` or external data",
        path.display()
    )]
    GraphTooLarge { path: PathBuf, offset: u64, limit_bytes: u64 },

    #[error(
        "{} has no {field}; it is cut short or not a model (a test-data `.pb` file is a tensor): export the model again",
        path.display()
    )]
    Missing { path: PathBuf, field: &'static str },

    #[error(
        "{} has IR version {found}, supported are {} to {}; re-save it with an onnx package of that range",
        path.display(), IR_VERSIONS.start(), IR_VERSIONS.end()
    )]
    IrVersion { path: PathBuf, found: i64 },

    #[error(
        "{place} uses opset {found} of ONNX, supported are {} to {}; convert it with `onnx.version_converter.convert_version` or export for an opset of that range",
        OPSETS.start(), OPSETS.end()
    )]
    Opset { place: String, found: i64 },

    #[error(
        "node `{node}` ({op}) is of domain `{domain}`, for which {place} imports no opset; add it to `opset_import`, or define the function it calls"
    )]
    NoOpset { place: String, node: String, op: String, domain: String },

    #[error("{place} defines `{name}` twice: as {first} and as {second}; rename one (every value is defined once)")]
    DuplicateName { place: String, name: String, first: String, second: String },

    #[error(
        "node `{node}` ({op}) reads `{value}`, which nothing defines; declare it as an input or initializer of the graph, or fix the name"
    )]
    UndefinedValue { node: String, op: String, value: String },

    #[error("{place} lists the output `{value}`, which nothing defines; remove it or fix the name")]
    UndefinedOutput { place: String, value: String },

    #[error(
        "the graph is cyclic: {}; break the cycle (a Loop or Scan node carries state over iterations)",
        cycle(nodes)
    )]
    Cycle { nodes: Vec<String> },

    #[error("functions call each other in a cycle: {}; ONNX functions may not be recursive", cycle(functions))]
    FunctionCycle { functions: Vec<String> },

    #[error("node `{node}` cannot call the function `{function}`: {problem}; fix the call or the function")]
    FunctionCall { node: String, function: String, problem: String },

    #[error(
        "functions expand to more than {limit} nodes or {depth_limit} levels at node `{node}`; inline fewer of them"
    )]
    ExpansionTooLarge { node: String, limit: usize, depth_limit: usize },

    #[error("attribute `{attribute}` of node `{node}`: {problem}; export the model again")]
    Attribute { node: String, attribute: String, problem: String },

    #[error("tensor `{tensor}`: {problem}")]
    Tensor { tensor: String, problem: TensorProblem },

    #[error("external data of tensor `{tensor}` at `{location}`: {problem}")]
    ExternalData { tensor: String, location: String, problem: ExternalProblem },

    #[error(
        "the weights of tensor `{tensor}` are in {}, which does not exist; put the file there, or plan without it: `--weights random:SEED`",
        path.display()
    )]
    MissingWeights { tensor: String, path: PathBuf },

    #[error("weights are absent: {} was not there when the model was loaded; put the file there, or use `--weights random:SEED`", path.display())]
    AbsentFile { path: PathBuf },

    #[error("{} changed since the model was loaded: it had {}, now {found_bytes}; compile again", path.display(), count(*expected_bytes, "byte"))]
    FileChanged { path: PathBuf, expected_bytes: u64, found_bytes: u64 },

    #[error("bytes {offset}..+{length} were asked of weight file {file}, which has {}", count(*file_bytes, "byte"))]
    OutOfRange { file: u32, offset: u64, length: u64, file_bytes: u64 },

    #[error("{}", unsupported(.0))]
    Unsupported(Vec<UnsupportedNode>),

    #[error("{}", unbound(.0))]
    UnboundDims(Vec<UnboundDim>),

    #[error(transparent)]
    Binding(#[from] BindingError),

    #[error(
        "a shape or a branch at node `{node}` ({op}) depends on the data in input `{input}`; bind it with sample inputs: `--like DIR`"
    )]
    DataDependent { node: String, op: String, input: String },

    #[error(
        "shapes contradict each other at node `{node}` ({op}): {problem}; check the model and the bound dimensions"
    )]
    ContradictoryShape { node: String, op: String, problem: String },
}

/// What is wrong with one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TensorProblem {
    #[error("dimension {axis} is {value}; dimensions count from 0 up, export the model again")]
    NegativeDim { axis: usize, value: i64 },
    #[error("the product of its dimensions {dims:?} overflows 64 bits; export the model again")]
    Overflow { dims: Vec<u64> },
    #[error(
        "raw data of the wrong length: {} for {dtype}{dims:?}, which takes {expected_bytes}; export the model again",
        count(*found_bytes, "byte")
    )]
    RawLength { dtype: &'static str, dims: Vec<u64>, expected_bytes: u64, found_bytes: u64 },
    #[error("`{field}` holds {} for dimensions {dims:?}, which take {expected}; export the model again", count(*found, "element"))]
    ElementCount { field: &'static str, dims: Vec<u64>, expected: u64, found: u64 },
    #[error("element type number {number} is not one of ONNX; export the model again")]
    UnknownType { number: i32 },
    #[error("element type {name} is not supported: {}", advice::for_type(name))]
    UnsupportedType { name: &'static str },
    #[error("`{field}` holds {value}, which does not fit {dtype}; export the model again")]
    ValueRange { field: &'static str, value: i64, dtype: &'static str },
    #[error("data is given in more than one field; export the model again")]
    Ambiguous,
    #[error("data is in `{field}`, which does not hold {dtype}; export the model again")]
    WrongField { field: &'static str, dtype: &'static str },
    #[error("it is stored in segments, which are not supported; save the model with whole tensors")]
    Segmented,
    #[error("its data is in another file, which a file with a single tensor cannot name; store the data inside")]
    ExternalHere,
    #[error("{problem}, in a sparse tensor; store it dense")]
    Sparse { problem: String },
}

/// What is wrong with a reference to external data.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExternalProblem {
    #[error("no location is given; save the model again with `onnx.save(..., save_as_external_data=True)`")]
    NoLocation,
    #[error("`{key}` is `{value}`, not a number from 0 up; save the model again")]
    NotANumber { key: String, value: String },
    #[error(
        "the location must be a plain path relative to the model's folder; save the model again with a relative location"
    )]
    NotRelative,
    #[error("it leads outside of {}; move the file there, or allow a wider folder with `--external-data-root DIR`", root.display())]
    Outside { root: PathBuf },
    #[error(
        "the file has {links} hard links, so it may belong to another folder; copy it, or allow its folder with `--external-data-root DIR`"
    )]
    HardLinked { links: u64 },
    #[error("it is not a regular file; put the weights there as a file")]
    NotAFile,
    #[error(
        "bytes {offset} to {offset} + {length} lie past the end of the file ({}); the file is cut short or belongs to another model",
        count(*file_bytes, "byte")
    )]
    PastEnd { offset: u64, length: u64, file_bytes: u64 },
}

/// One node that cannot be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsupportedNode {
    pub name: String,
    pub op: String,
    /// Empty for ONNX's own.
    pub domain: String,
    pub opset: i64,
    /// What is not supported, or what to use instead.
    pub hint: String,
}

impl UnsupportedNode {
    pub(crate) fn at(node: &Node, hint: &str) -> Self {
        Self {
            name: node.name.clone(),
            op: node.op_type.clone(),
            domain: node.domain.clone(),
            opset: node.opset,
            hint: hint.to_owned(),
        }
    }
}

impl OnnxError {
    /// The message, for where the node is named already.
    pub(crate) fn at_a_node(&self) -> String {
        match self {
            Self::DataDependent { input, .. } => format!(
                "a shape or a branch depends on the data in input `{input}`: bind it with sample inputs, `--like DIR`"
            ),
            Self::ContradictoryShape { problem, .. } => format!("shapes contradict each other: {problem}"),
            other => other.to_string(),
        }
    }
}

/// One symbolic dimension that no flag binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnboundDim {
    /// The model input it belongs to.
    pub input: String,
    pub axis: usize,
    /// `None`: the model gives the axis neither a number nor a name.
    pub name: Option<String>,
}

impl UnboundDim {
    /// The flag that binds it.
    pub fn flag(&self) -> String {
        match &self.name {
            Some(name) => format!("--dim {name}=N"),
            None => format!("--shape {}=D0,D1,...", self.input),
        }
    }
}

fn cycle(names: &[String]) -> String {
    let mut text = String::new();
    for name in names.iter().chain(names.first()) {
        if !text.is_empty() {
            text.push_str(" -> ");
        }
        text.push('`');
        text.push_str(name);
        text.push('`');
    }
    text
}

fn unsupported(nodes: &[UnsupportedNode]) -> String {
    let mut text = format!("{} node{} cannot be imported:", nodes.len(), if nodes.len() == 1 { "" } else { "s" });
    // Nodes of one operator with one reason share a line, in the order of the first of them.
    let mut places = BTreeMap::new();
    let mut lines: Vec<(&UnsupportedNode, usize)> = Vec::new();
    for node in nodes {
        let place = *places.entry((&node.domain, &node.op, node.opset, &node.hint)).or_insert(lines.len());
        match lines.get_mut(place) {
            Some((_, count)) => *count += 1,
            None => lines.push((node, 1)),
        }
    }
    for (UnsupportedNode { name, op, domain, opset, hint }, count) in lines {
        let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
        let separator = if domain.is_empty() { "" } else { "." };
        text.push_str(&format!("\n  `{name}`{more}: {domain}{separator}{op} (opset {opset}): {hint}"));
    }
    for advice in advice::for_domains(nodes.iter().map(|node| node.domain.as_str())) {
        text.push_str(&format!("\n{advice}"));
    }
    text.push_str("\n`--check-support` lists every operator of the model");
    text
}

fn unbound(dims: &[UnboundDim]) -> String {
    let mut text = String::from("dimensions of the model's inputs are not bound:");
    for dim in dims {
        match &dim.name {
            Some(name) => {
                text.push_str(&format!("\n  `{name}` (input `{}`, axis {}): `{}`", dim.input, dim.axis, dim.flag()))
            }
            None => {
                text.push_str(&format!("\n  axis {} of input `{}` has no name: `{}`", dim.axis, dim.input, dim.flag()))
            }
        }
    }
    text.push_str("\nor bind all of them from sample inputs: `--like DIR`");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_every_unsupported_node() {
        let node = |name: &str, domain: &str| UnsupportedNode {
            name: name.into(),
            op: "Fancy".into(),
            domain: domain.into(),
            opset: 17,
            hint: "no such operator".into(),
        };
        let text = OnnxError::Unsupported(vec![node("a", ""), node("b", "com.example")]).to_string();
        assert!(text.contains("2 nodes") && text.contains("`a`: Fancy (opset 17)"), "{text}");
        assert!(text.contains("`b`: com.example.Fancy (opset 17)"), "{text}");
        assert!(text.contains("domain com.example is not known") && text.contains("--check-support"), "{text}");
    }

    #[test]
    fn nodes_with_one_reason_share_a_line() {
        let node = |name: &str, hint: &str| UnsupportedNode {
            name: name.into(),
            op: "Fancy".into(),
            domain: String::new(),
            opset: 17,
            hint: hint.into(),
        };
        let nodes = vec![node("a", "no"), node("b", "never"), node("c", "no"), node("d", "no")];
        let text = OnnxError::Unsupported(nodes).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "4 nodes cannot be imported:");
        assert_eq!(lines[1], "  `a` and 2 more: Fancy (opset 17): no");
        assert_eq!(lines[2], "  `b`: Fancy (opset 17): never");
    }

    #[test]
    fn unbound_dimensions_show_the_flag() {
        let dims = vec![
            UnboundDim { input: "x".into(), axis: 0, name: Some("batch".into()) },
            UnboundDim { input: "y".into(), axis: 1, name: None },
        ];
        let text = OnnxError::UnboundDims(dims).to_string();
        assert!(text.contains("`--dim batch=N`") && text.contains("`--shape y="), "{text}");
    }

    #[test]
    fn a_cycle_returns_to_its_first_node() {
        let error = OnnxError::Cycle { nodes: vec!["a".into(), "b".into()] };
        assert!(error.to_string().contains("`a` -> `b` -> `a`"), "{error}");
    }
}
