//! Which operators of a model can be imported, and why not.

use std::collections::BTreeMap;

use crate::bindings::Bindings;
use crate::error::{OnnxError, UnsupportedNode};
use crate::flat::{Attribute, Graph};
use crate::import::{attempt, refused};
use crate::load::Model;
use crate::source_files::WeightFiles;

/// An operator of a model, in one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorSupport {
    /// Empty for ONNX's own.
    pub domain: String,
    pub op: String,
    /// Version of the domain in force.
    pub opset: i64,
    /// Nodes of the model, functions inlined and bodies of control flow included.
    pub count: usize,
    pub supported: bool,
    /// Why it is not supported.
    pub reason: Option<String>,
}

/// Every operator of a model with its status, by domain, name and opset: whether there is such an operator, and whether
/// its nodes have the attributes, inputs and outputs that ONNX gives it. Values of attributes, element types and shapes are
/// not looked at; see [`support_bound`].
pub fn support(model: &Model) -> Vec<OperatorSupport> {
    rows(model, refused(&model.graph))
}

/// As [`support`], and whether each node can be imported with the dimensions bound: its attributes, element types and
/// shapes. Nodes that read a result of one that cannot be are not looked at.
///
/// # Errors
/// Bindings that do not fit the model, or a model that cannot be imported for another reason than lack of support.
pub fn support_bound(
    model: &Model,
    bindings: &Bindings,
    weights: &WeightFiles,
) -> Result<Vec<OperatorSupport>, OnnxError> {
    match attempt(model, bindings, weights, refused(&model.graph)) {
        Ok(_) => Ok(rows(model, Vec::new())),
        Err(OnnxError::Unsupported(nodes)) => Ok(rows(model, nodes)),
        Err(error) => Err(error),
    }
}

/// Domain, name, opset.
type Key = (String, String, i64);

fn rows(model: &Model, refused: Vec<UnsupportedNode>) -> Vec<OperatorSupport> {
    let mut rows: BTreeMap<Key, OperatorSupport> = BTreeMap::new();
    let mut graphs: Vec<&Graph> = vec![&model.graph];
    while let Some(graph) = graphs.pop() {
        for node in &graph.nodes {
            let row = rows.entry((node.domain.clone(), node.op_type.clone(), node.opset));
            let row = row.or_insert_with(|| OperatorSupport {
                domain: node.domain.clone(),
                op: node.op_type.clone(),
                opset: node.opset,
                count: 0,
                supported: true,
                reason: None,
            });
            row.count += 1;
            graphs.extend(node.attributes.values().flat_map(Attribute::graphs));
        }
    }
    let mut nodes: BTreeMap<Key, Vec<UnsupportedNode>> = BTreeMap::new();
    for node in refused {
        nodes.entry((node.domain.clone(), node.op.clone(), node.opset)).or_default().push(node);
    }
    for (key, nodes) in nodes {
        if let Some(row) = rows.get_mut(&key) {
            row.supported = false;
            row.reason = Some(reason(&nodes, row.count));
        }
    }
    rows.into_values().collect()
}

/// Every reason once, with the first node that has it.
fn reason(nodes: &[UnsupportedNode], count: usize) -> String {
    let mut hints: Vec<(&str, &str, usize)> = Vec::new();
    for node in nodes {
        match hints.iter_mut().find(|(hint, ..)| *hint == node.hint) {
            Some((.., times)) => *times += 1,
            None => hints.push((&node.hint, &node.name, 1)),
        }
    }
    let one = |(hint, name, times): &(&str, &str, usize)| match (times, count) {
        (times, count) if *times == count => (*hint).to_owned(),
        (1, _) => format!("{hint} (`{name}`)"),
        _ => format!("{hint} ({times} nodes, `{name}` first)"),
    };
    hints.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::ModelProto;
    use crate::samples::{graph, model, node, reload};

    fn loaded() -> Model {
        let nodes = vec![node("Neg", &["x"], &["a"]), node("Fancy", &["a"], &["b"]), node("Neg", &["b"], &["y"])];
        let proto: ModelProto = model(graph(nodes));
        reload(&proto).unwrap()
    }

    #[test]
    fn every_operator_is_listed_with_its_status() {
        let rows = support(&loaded());
        let found: Vec<(&str, usize, bool)> =
            rows.iter().map(|row| (row.op.as_str(), row.count, row.supported)).collect();
        assert_eq!(found, [("Fancy", 1, false), ("Neg", 2, true)]);
        assert!(rows[0].reason.as_ref().unwrap().contains("no such operator"), "{rows:?}");
        assert_eq!((rows[1].reason.as_ref(), rows[1].opset), (None, 17));
    }

    #[test]
    fn bound_dimensions_show_what_attributes_ask() {
        let mut proto = model(graph(vec![node("Cast", &["x"], &["y"])]));
        let to = crate::samples::attribute("to", crate::messages::AttributeType::Int);
        proto.graph.as_mut().unwrap().node[0].attribute.push(crate::messages::AttributeProto { i: Some(8), ..to });
        let model = reload(&proto).unwrap();
        assert!(support(&model)[0].supported);
        let files = WeightFiles::open(&[]).unwrap();
        assert!(matches!(support_bound(&model, &Bindings::default(), &files), Err(OnnxError::UnboundDims(_))));
        let dims = BTreeMap::from([("n".to_owned(), 2)]);
        let rows = support_bound(&model, &Bindings { dims, ..Bindings::default() }, &files).unwrap();
        assert!(!rows[0].supported && rows[0].reason.as_ref().unwrap().contains("string"), "{rows:?}");
    }

    #[test]
    fn what_onnx_forbids_needs_no_dimensions() {
        let invented = crate::samples::attribute("invented", crate::messages::AttributeType::Int);
        let nodes = vec![
            crate::samples::named("first", node("Relu", &["x"], &["a"])),
            crate::samples::named("second", crate::samples::with(node("Relu", &["a"], &["b"]), invented)),
            node("Add", &["b"], &["y"]),
        ];
        let rows = support(&reload(&model(graph(nodes))).unwrap());
        let reasons: Vec<Option<&str>> = rows.iter().map(|row| row.reason.as_deref()).collect();
        let relu = "it has no attribute `invented`; allowed: none (`second`)";
        assert_eq!(reasons, [Some("input 1 (`B`) is missing"), Some(relu)]);
        assert!(rows.iter().all(|row| !row.supported));
    }

    #[test]
    fn a_reason_that_several_nodes_share_is_given_once() {
        let node = |name: &str, hint: &str| UnsupportedNode {
            name: name.to_owned(),
            op: "Cast".to_owned(),
            domain: String::new(),
            opset: 17,
            hint: hint.to_owned(),
        };
        let nodes = [node("a", "no"), node("b", "never"), node("c", "no")];
        assert_eq!(reason(&nodes, 5), "no (2 nodes, `a` first); never (`b`)");
        assert_eq!(reason(&nodes[..1], 1), "no");
    }
}
