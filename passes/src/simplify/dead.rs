//! Drops what nobody reads: nodes, values and weights; numbers what remains in order of use.
//!
//! before  %a = exp %x        after  %y = tanh %x
//!         %y = tanh %x

use ir::{Graph, Module, Node, NodeId, Output, Value, ValueDef, ValueId, Weight, WeightId};
use planfile::Op;

/// The module without dead parts. Ports of entries, files and states stay.
pub(crate) fn run(module: &Module) -> Module {
    let mut used = vec![false; module.weights.len()];
    let mut graphs: Vec<Graph> = module.graphs.iter().map(compact).collect();
    let defs =
        |graphs: &[Graph]| graphs.iter().flat_map(|graph| &graph.values).map(|value| value.def).collect::<Vec<_>>();
    for def in defs(&graphs) {
        if let ValueDef::Weight(id) = def {
            used[id.index()] = true;
        }
    }
    let mut weights: Vec<Weight> = Vec::new();
    let mut renumbered = Vec::new();
    for (weight, used) in module.weights.iter().zip(used) {
        renumbered.push(WeightId(weights.len() as u32));
        if used {
            weights.push(weight.clone());
        }
    }
    for value in graphs.iter_mut().flat_map(|graph| &mut graph.values) {
        if let ValueDef::Weight(id) = &mut value.def {
            *id = renumbered[id.index()];
        }
    }
    let Module { name, mesh, files, states, entries, .. } = module;
    Module {
        name: name.clone(),
        mesh: mesh.clone(),
        files: files.clone(),
        weights,
        states: states.clone(),
        graphs,
        entries: entries.clone(),
    }
}

/// Nodes that do more than make their results.
fn has_effects(op: &Op) -> bool {
    op.is_collective() || matches!(op, Op::Append { .. })
}

fn compact(graph: &Graph) -> Graph {
    let mut live = vec![false; graph.values.len()];
    for output in &graph.outputs {
        live[output.value.index()] = true;
    }
    let mut kept = vec![false; graph.nodes.len()];
    for (node, kept) in graph.nodes.iter().zip(&mut kept).rev() {
        if has_effects(&node.op) || node.results.iter().any(|result| live[result.index()]) {
            *kept = true;
            for operand in &node.operands {
                live[operand.index()] = true;
            }
        }
    }
    let mut compacted = Graph { ranks: graph.ranks.clone(), ..Graph::new(&graph.name) };
    let mut renumbered: Vec<Option<ValueId>> = vec![None; graph.values.len()];
    for (node, _) in graph.nodes.iter().zip(&kept).filter(|(_, kept)| **kept) {
        let id = NodeId(compacted.nodes.len() as u32);
        let operands = node.operands.iter().map(|&operand| keep(graph, &mut compacted, &mut renumbered, operand, None));
        let operands = operands.collect();
        let results = (0u32..).zip(&node.results).map(|(position, &result)| {
            keep(graph, &mut compacted, &mut renumbered, result, Some(ValueDef::Node(id, position)))
        });
        let results = results.collect();
        let origin = node.origin.clone();
        compacted.nodes.push(Node { op: node.op.clone(), operands, results, origin });
    }
    for &Output { position, value } in &graph.outputs {
        let value = keep(graph, &mut compacted, &mut renumbered, value, None);
        compacted.outputs.push(Output { position, value });
    }
    compacted
}

/// The value's new number; results come with their definition, sources keep theirs.
fn keep(
    graph: &Graph,
    compacted: &mut Graph,
    renumbered: &mut [Option<ValueId>],
    value: ValueId,
    def: Option<ValueDef>,
) -> ValueId {
    *renumbered[value.index()].get_or_insert_with(|| {
        let old = graph.value(value);
        compacted.values.push(Value { ty: old.ty.clone(), def: def.unwrap_or(old.def), shard: old.shard.clone() });
        ValueId(compacted.values.len() as u32 - 1)
    })
}
