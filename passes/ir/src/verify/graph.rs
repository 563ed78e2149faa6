//! One graph: SSA form, types, placements, rank tables and groups.

use planfile::op::{Groups, Op};
use planfile::{RankScalar, TensorType, infer};

use super::{check_type, check_whole, rank_scalars};
use crate::error::IrError;
use crate::ids::{NodeId, ValueId};
use crate::module::{Graph, Module, Node, Value, ValueDef};

pub(super) fn check(module: &Module, graph: &Graph) -> Result<(), IrError> {
    let fault = |why| IrError::Graph { graph: graph.name.clone(), why };
    check_ranks(module, graph).map_err(fault)?;
    let mut defined = Vec::with_capacity(graph.values.len());
    for (index, value) in graph.values.iter().enumerate() {
        check_value(module, graph, value)
            .map_err(|why| fault(format!("value %{index}{}: {why}", origin_of(graph, value))))?;
        defined.push(!matches!(value.def, ValueDef::Node(..)));
    }
    for (index, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(index as u32);
        check_node(graph, id, node, &mut defined).map_err(|why| IrError::Type {
            graph: graph.name.clone(),
            op: node.op.name(),
            origin: node.origin.join(" + "),
            why: format!("node {id}: {why}"),
        })?;
    }
    if let Some(index) = defined.iter().position(|defined| !defined) {
        return Err(fault(format!("value %{index} is the result of no node")));
    }
    for output in &graph.outputs {
        if output.value.index() >= graph.values.len() {
            return Err(fault(format!("output {} is {}, which does not exist", output.position, output.value)));
        }
    }
    Ok(())
}

/// ` (from …)` for a node's result.
fn origin_of(graph: &Graph, value: &Value) -> String {
    let ValueDef::Node(node, _) = value.def else { return String::new() };
    let node = graph.nodes.get(node.index());
    node.map(|node| format!(" (from `{}`)", node.origin.join(" + "))).unwrap_or_default()
}

fn check_ranks(module: &Module, graph: &Graph) -> Result<(), String> {
    let ascending = graph.ranks.windows(2).all(|pair| pair[0] < pair[1]);
    let known = graph.ranks.iter().all(|&rank| rank < module.mesh.ranks());
    (ascending && known).then_some(()).ok_or_else(|| "ranks are not ascending ranks of the mesh".to_owned())
}

fn check_value(module: &Module, graph: &Graph, value: &Value) -> Result<(), String> {
    check_type(&value.ty)?;
    if let Some(shard) = &value.shard {
        if graph.ranks.is_empty() {
            return Err("is a shard, but the graph has no ranks".to_owned());
        }
        shard.placement.check(&module.mesh, &shard.global)?;
        let local = shard.placement.local_sizes(&module.mesh, &shard.global);
        if local != value.ty.sizes() {
            return Err(format!("is {}, but its placement leaves {local:?} of {:?}", value.ty, shard.global));
        }
    }
    match value.def {
        // Inputs are judged with the entry that names them, results with their nodes.
        ValueDef::Input(_) => Ok(()),
        ValueDef::Node(node, position) => {
            let found = graph.nodes.get(node.index()).map(|node| node.results.len());
            let known = found.is_some_and(|results| (position as usize) < results);
            known.then_some(()).ok_or_else(|| format!("is result {position} of node {node}, which has none such"))
        }
        ValueDef::Weight(weight) => {
            let known = module.weights.get(weight.index());
            check_whole(value, &known.ok_or_else(|| format!("there is no weight {weight}"))?.ty)
        }
        ValueDef::State(state) => {
            let known = module.states.get(state.index());
            check_whole(value, &known.ok_or_else(|| format!("there is no state {state}"))?.ty)
        }
    }
}

fn check_node(graph: &Graph, id: NodeId, node: &Node, defined: &mut [bool]) -> Result<(), String> {
    for operand in &node.operands {
        match defined.get(operand.index()) {
            Some(true) => {}
            Some(false) => return Err(format!("reads {operand} before it is defined")),
            None => return Err(format!("reads {operand}, which does not exist")),
        }
    }
    let types: Vec<&TensorType> = node.operands.iter().map(|&operand| graph.ty(operand)).collect();
    let inferred = infer(&node.op, &types)?;
    if inferred.len() != node.results.len() {
        return Err(format!("has {} results, not {}", inferred.len(), node.results.len()));
    }
    for ((position, &result), ty) in (0..).zip(&node.results).zip(&inferred) {
        let value = graph.values.get(result.index()).ok_or_else(|| format!("result {result} does not exist"))?;
        if value.def != ValueDef::Node(id, position) {
            return Err(format!("result {position} is {result}, which says it is {}", describe(value.def)));
        }
        if value.ty != *ty {
            return Err(format!("result {result} is {}, inferred {ty}", value.ty));
        }
        set(defined, result);
    }
    check_by_rank(graph, &node.op)
}

fn set(defined: &mut [bool], value: ValueId) {
    if let Some(defined) = defined.get_mut(value.index()) {
        *defined = true;
    }
}

fn describe(def: ValueDef) -> String {
    match def {
        ValueDef::Input(number) => format!("input {number}"),
        ValueDef::Weight(weight) => format!("weight {weight}"),
        ValueDef::State(state) => format!("state {state}"),
        ValueDef::Node(node, position) => format!("result {position} of node {node}"),
    }
}

/// Tables have an entry per rank; groups hold each rank once.
fn check_by_rank(graph: &Graph, op: &Op) -> Result<(), String> {
    let ranks = graph.ranks.len();
    for scalar in rank_scalars(op) {
        if let RankScalar::ByRank(table) = scalar
            && (table.len() != ranks || ranks == 0)
        {
            return Err(format!("a table of {} numbers for {ranks} ranks", table.len()));
        }
    }
    match (op.groups(), op.peers()) {
        (Some(groups), _) => check_groups(graph, groups),
        (None, Some(peers)) if peers.len() != ranks || ranks == 0 => {
            Err(format!("{} peers for {ranks} ranks", peers.len()))
        }
        _ => Ok(()),
    }
}

fn check_groups(graph: &Graph, groups: &Groups) -> Result<(), String> {
    let mut members: Vec<u32> = groups.iter().flatten().copied().collect();
    members.sort_unstable();
    let partition = members == graph.ranks;
    partition.then_some(()).ok_or_else(|| format!("groups {groups:?} do not partition the ranks {:?}", graph.ranks))
}
