//! Which operators of a model can be imported, and why not: every operator, every reason.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use ir::Module;
use planfile::FrozenInput;

use crate::advice;
use crate::bindings::{Bindings, InputType, Inputs, bind};
use crate::error::{OnnxError, UnboundDim, UnsupportedNode};
use crate::findings::Findings;
use crate::flat::{Attribute, Graph, Node};
use crate::import::{attempt, refused};
use crate::load::Model;
use crate::source_files::WeightFiles;

/// Sizes that open dimensions have on trial: what is refused with both of them, and for the same reason, is refused.
/// Pictures of these sizes survive five halvings, and texts of them fit the shortest tables of positions.
pub const TRIAL_SIZES: [u64; 2] = [32, 64];

/// What is known of a model's operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SupportReport {
    /// By domain, name and opset.
    pub operators: Vec<OperatorSupport>,
    /// Inputs whose samples shapes or branches depend on.
    pub frozen: Vec<FrozenInput>,
    /// Dimensions that nothing binds.
    pub unbound: Vec<UnboundDim>,
    /// What to do about operators that are not ONNX's own.
    pub advice: Vec<String>,
}

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
    pub status: Status,
    /// Each once.
    pub reasons: Vec<Reason>,
}

/// Whether an operator of a model can be imported; of several nodes, the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    Supported,
    /// Dimensions or data are not bound, or a node before it cannot be imported.
    Unknown,
    /// The model contradicts itself, or what is bound.
    Invalid,
    Unsupported,
}

/// Why an operator does not count as supported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    pub text: String,
    /// Name of the first node.
    pub node: String,
    /// How many nodes have this reason.
    pub nodes: usize,
}

/// Every operator of a model with its status: its attributes, and with dimensions bound, element types and shapes. Where
/// dimensions are open, two sizes are tried in their place, and what only one of them shows is unknown.
///
/// # Errors
/// Bindings that do not fit the model.
pub fn support(model: &Model, bindings: &Bindings, weights: &WeightFiles) -> Result<SupportReport, OnnxError> {
    let (inputs, module, found) = find(model, bindings, weights)?;
    let doubtful = if inputs.open.is_empty() { BTreeSet::new() } else { after_open(&model.graph, &inputs) };
    let operators = rows(model, found, &doubtful);
    let refused = operators.iter().filter(|row| row.status == Status::Unsupported);
    let advice = advice::for_domains(refused.map(|row| row.domain.as_str()));
    let frozen = module.entries.into_iter().flat_map(|entry| entry.frozen).collect();
    Ok(SupportReport { operators, frozen, unbound: inputs.open, advice })
}

/// Nodes that are refused for both of the sizes that open dimensions have on trial.
///
/// # Errors
/// As [`support`].
pub(crate) fn refused_whatever_is_bound(
    model: &Model,
    bindings: &Bindings,
    weights: &WeightFiles,
) -> Result<Vec<UnsupportedNode>, OnnxError> {
    let (_, _, found) = find(model, bindings, weights)?;
    Ok(found.into_iter().filter(|(status, _)| *status == Status::Unsupported).map(|(_, node)| node).collect())
}

impl SupportReport {
    /// Takes in what was found later, at nodes of these names: which of them no kernel takes.
    pub fn refuse(&mut self, model: &Model, found: &[(String, String)]) {
        let mut hints: BTreeMap<&str, &str> = BTreeMap::new();
        for (node, hint) in found {
            hints.entry(node).or_insert(hint);
        }
        walk(&model.graph, &mut |node| {
            let Some(hint) = hints.get(node.name.as_str()) else { return };
            let key = (&node.domain, &node.op_type, node.opset);
            let row = self.operators.iter_mut().find(|row| (&row.domain, &row.op, row.opset) == key);
            if let Some(row) = row {
                row.status = Status::Unsupported;
                add(&mut row.reasons, &node.name, hint);
            }
        });
    }

    /// The worst of all operators' statuses.
    pub fn status(&self) -> Status {
        self.operators.iter().map(|row| row.status).max().unwrap_or(Status::Supported)
    }
}

type Found = Vec<(Status, UnsupportedNode)>;

/// What is found at the nodes of the model, with its inputs and what could be imported, on trial where sizes are open.
fn find(model: &Model, bindings: &Bindings, weights: &WeightFiles) -> Result<(Inputs, Module, Found), OnnxError> {
    let refused = refused(&model.graph);
    let try_with = |size| -> Result<(Inputs, Module, Found), OnnxError> {
        let inputs = bind(&model.graph, bindings, size)?;
        let (module, findings) = attempt(model, &inputs.types, bindings, weights, refused.clone())?;
        Ok((inputs, module, statuses(findings)))
    };
    let [first, second] = TRIAL_SIZES;
    let (inputs, module, mut found) = try_with(first)?;
    if !inputs.open.is_empty() {
        found = agreed(found, try_with(second)?.2);
    }
    Ok((inputs, module, found))
}

fn statuses(findings: Findings) -> Found {
    let Findings { unsupported, faults, skipped } = findings;
    let faults = faults.into_iter().map(|(node, error)| match error {
        OnnxError::DataDependent { .. } => (Status::Unknown, node),
        _ => (Status::Invalid, node),
    });
    let with = |status| move |node| (status, node);
    let others = unsupported.into_iter().map(with(Status::Unsupported)).chain(faults);
    others.chain(skipped.into_iter().map(with(Status::Unknown))).collect()
}

/// What both trials found; what one of them found is doubtful, and says for which size.
fn agreed(first: Found, second: Found) -> Found {
    let keys = |found: &Found| -> BTreeSet<(Status, String, String)> {
        found.iter().map(|(status, node)| (*status, node.name.clone(), node.hint.clone())).collect()
    };
    let (in_first, in_second) = (keys(&first), keys(&second));
    let in_both: BTreeSet<&(Status, String, String)> = in_first.intersection(&in_second).collect();
    let mut agreed = Found::new();
    for (found, size) in [(first, TRIAL_SIZES[0]), (second, TRIAL_SIZES[1])] {
        for (status, mut node) in found {
            if in_both.contains(&(status, node.name.clone(), node.hint.clone())) {
                if size == TRIAL_SIZES[0] {
                    agreed.push((status, node));
                }
            } else if matches!(status, Status::Unsupported | Status::Invalid) {
                node.hint = format!("with {size} for what is open: {}", node.hint);
                agreed.push((Status::Unknown, node));
            }
        }
    }
    agreed
}

/// Names of the nodes that read, however far behind, an input with an open dimension.
fn after_open(graph: &Graph, inputs: &Inputs) -> BTreeSet<String> {
    let is_open = |ty: &InputType| matches!(ty, InputType::Known { is_open: true, .. } | InputType::Open);
    let open = graph.inputs.iter().zip(&inputs.types).filter(|(_, ty)| is_open(ty));
    let mut values: BTreeSet<&str> = open.map(|(input, _)| input.name.as_str()).collect();
    let mut nodes = BTreeSet::new();
    walk(graph, &mut |node| {
        // A body reads names of the graphs around it without listing them.
        let has_bodies = node.attributes.values().any(|attribute| !attribute.graphs().is_empty());
        if has_bodies || node.inputs.iter().any(|input| values.contains(input.as_str())) {
            values.extend(node.outputs.iter().map(String::as_str));
            nodes.insert(node.name.clone());
        }
    });
    nodes
}

/// Sees every node, each before those of its bodies.
fn walk<'m>(graph: &'m Graph, see: &mut dyn FnMut(&'m Node)) {
    let mut nodes: Vec<&Node> = graph.nodes.iter().rev().collect();
    while let Some(node) = nodes.pop() {
        see(node);
        let bodies: Vec<&Graph> = node.attributes.values().flat_map(Attribute::graphs).collect();
        nodes.extend(bodies.into_iter().flat_map(|body| &body.nodes).rev());
    }
}

/// Domain, name, opset.
type Key = (String, String, i64);

fn rows(model: &Model, found: Found, doubtful: &BTreeSet<String>) -> Vec<OperatorSupport> {
    let mut rows: BTreeMap<Key, OperatorSupport> = BTreeMap::new();
    walk(&model.graph, &mut |node| {
        let key = (node.domain.clone(), node.op_type.clone(), node.opset);
        let row = rows.entry(key).or_insert_with(|| OperatorSupport {
            domain: node.domain.clone(),
            op: node.op_type.clone(),
            opset: node.opset,
            count: 0,
            status: Status::Supported,
            reasons: Vec::new(),
        });
        row.count += 1;
        if doubtful.contains(&node.name) {
            row.status = row.status.max(Status::Unknown);
        }
    });
    // Where each reason stands among those of its row.
    let mut places: BTreeMap<(Key, String), usize> = BTreeMap::new();
    for (status, UnsupportedNode { name, op, domain, opset, hint }) in found {
        let key = (domain, op, opset);
        let Some(row) = rows.get_mut(&key) else { continue };
        row.status = row.status.max(status);
        match places.entry((key, hint)) {
            Entry::Occupied(place) => row.reasons[*place.get()].nodes += 1,
            Entry::Vacant(place) => {
                row.reasons.push(Reason { text: place.key().1.clone(), node: name, nodes: 1 });
                place.insert(row.reasons.len() - 1);
            }
        }
    }
    rows.into_values().collect()
}

fn add(reasons: &mut Vec<Reason>, node: &str, text: &str) {
    match reasons.iter_mut().find(|reason| reason.text == text) {
        Some(reason) => reason.nodes += 1,
        None => reasons.push(Reason { text: text.to_owned(), node: node.to_owned(), nodes: 1 }),
    }
}

impl OperatorSupport {
    /// The reasons, each with its nodes where it is not that of all of the operator's.
    pub fn reason_texts(&self) -> Vec<String> {
        let one = |Reason { text, node, nodes }: &Reason| match nodes {
            nodes if *nodes == self.count => text.clone(),
            1 => format!("{text} (`{node}`)"),
            nodes => format!("{text} ({nodes} nodes, `{node}` first)"),
        };
        self.reasons.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests;
