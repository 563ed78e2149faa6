//! Exchanges between devices along the outermost dimension, where what each one sends and receives is contiguous.
//!
//! before  %y: f32[4, 16] = all_gather %x {axis 1, groups [[0, 1]]}
//! after   %g: f32[8, 8] = all_gather %x {axis 0, groups [[0, 1]]}
//!         %s: f32[2, 4, 8] = reshape %g
//!         %t: f32[4, 2, 8] = transpose %s [1, 0, 2]
//!         %y: f32[4, 16] = reshape %t
//!
//! The host exchanges along any dimension, so its plans stay as they are.

use std::sync::Arc;

use ir::{Graph, Module, Node, NodeId, Origin, Value, ValueDef, ValueId};
use planfile::{Dim, Op};

use crate::error::PassError;
use crate::lower;
use crate::pipeline::Settings;

/// Rewrites the exchanges of every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Invalid`] if a type does not follow.
pub fn run(mut module: Module, settings: &Settings<'_>) -> Result<Module, PassError> {
    if settings.target.device.architecture != lower::CPU {
        for graph in module.graphs.iter_mut().filter(|graph| graph.nodes.iter().any(|node| is_inner(graph, node))) {
            *graph = rewritten(graph).map_err(|why| PassError::invalid("exchange", why))?;
        }
    }
    Ok(module)
}

/// Whether more than one run of memory goes to or comes from each device.
fn is_inner(graph: &Graph, node: &Node) -> bool {
    let Some(&operand) = node.operands.first() else { return false };
    let inner = |axis: u8| graph.ty(operand).sizes()[..usize::from(axis)].iter().any(|&size| size != 1);
    match node.op {
        Op::AllGather { axis, .. } | Op::ReduceScatter { axis, .. } => inner(axis),
        Op::AllToAll { split, concat, .. } => inner(split) || inner(concat),
        _ => false,
    }
}

fn rewritten(old: &Graph) -> Result<Graph, String> {
    // Values keep their numbers; what is added comes after them.
    let mut new = Graph { nodes: Vec::new(), ..old.clone() };
    for node in &old.nodes {
        let mut add = |op: Op, operand: ValueId| add(&mut new, op, operand, &node.origin);
        let last = match (&node.op, node.operands.as_slice()) {
            (Op::AllGather { axis, groups }, &[x]) if is_inner(old, node) => {
                let members = groups.first().map_or(1, Vec::len) as u64;
                let whole = add(Op::AllGather { axis: 0, groups: groups.clone() }, x)?;
                joined(&mut add, whole, &old.ty(x).dims, usize::from(*axis), members)?
            }
            (Op::ReduceScatter { combine, axis, groups }, &[x]) if is_inner(old, node) => {
                let members = groups.first().map_or(1, Vec::len) as u64;
                let parted = parted(&mut add, x, &old.ty(x).dims, usize::from(*axis), members)?;
                (Op::ReduceScatter { combine: *combine, axis: 0, groups: groups.clone() }, parted)
            }
            (Op::AllToAll { split, concat, groups }, &[x]) if is_inner(old, node) => {
                let members = groups.first().map_or(1, Vec::len) as u64;
                let mut dims = old.ty(x).dims.clone();
                let parted = parted(&mut add, x, &dims, usize::from(*split), members)?;
                let moved = add(Op::AllToAll { split: 0, concat: 0, groups: groups.clone() }, parted)?;
                dims[usize::from(*split)] = Dim::Static(dims[usize::from(*split)].capacity() / members);
                joined(&mut add, moved, &dims, usize::from(*concat), members)?
            }
            _ => {
                let id = NodeId(new.nodes.len() as u32);
                for (position, &result) in (0u32..).zip(&node.results) {
                    new.values[result.index()].def = ValueDef::Node(id, position);
                }
                new.nodes.push(node.clone());
                continue;
            }
        };
        let &[result] = node.results.as_slice() else { return Err("an exchange has one result".to_owned()) };
        new.values[result.index()].def = ValueDef::Node(NodeId(new.nodes.len() as u32), 0);
        let (op, operand) = last;
        new.nodes.push(Node { op, operands: vec![operand], results: vec![result], origin: Arc::clone(&node.origin) });
    }
    Ok(new)
}

/// Appends a node of one operand and one result.
fn add(graph: &mut Graph, op: Op, operand: ValueId, origin: &Origin) -> Result<ValueId, String> {
    let types = planfile::infer(&op, &[graph.ty(operand)])?;
    let [ty] = types.as_slice() else { return Err(format!("{} has {} results", op.name(), types.len())) };
    graph.values.push(Value { ty: ty.clone(), def: ValueDef::Node(NodeId(graph.nodes.len() as u32), 0), shard: None });
    let result = ValueId(graph.values.len() as u32 - 1);
    graph.nodes.push(Node { op, operands: vec![operand], results: vec![result], origin: Arc::clone(origin) });
    Ok(result)
}

/// What adds a node to the graph.
type Add<'a> = dyn FnMut(Op, ValueId) -> Result<ValueId, String> + 'a;

/// Parts of dimensions `dims`, one after the other, side by side along `axis`: the last operation, and its operand.
fn joined(add: &mut Add<'_>, x: ValueId, dims: &[Dim], axis: usize, parts: u64) -> Result<(Op, ValueId), String> {
    let stacked = add(Op::Reshape { dims: [&[Dim::Static(parts)], dims].concat() }, x)?;
    // The parts' dimension moves to just before `axis`.
    let mut permutation: Vec<u8> = (1..=dims.len() as u8).collect();
    permutation.insert(axis, 0);
    let moved = add(Op::Transpose { permutation }, stacked)?;
    let mut whole = dims.to_vec();
    whole[axis] = Dim::Static(dims[axis].capacity() * parts);
    Ok((Op::Reshape { dims: whole }, moved))
}

/// A tensor of dimensions `dims`, cut along `axis` into parts that lie one after the other.
fn parted(add: &mut Add<'_>, x: ValueId, dims: &[Dim], axis: usize, parts: u64) -> Result<ValueId, String> {
    let size = dims[axis].capacity();
    if parts == 0 || !size.is_multiple_of(parts) {
        return Err(format!("{size} elements are cut into {parts} parts"));
    }
    let mut cut = dims.to_vec();
    cut[axis] = Dim::Static(size / parts);
    cut.insert(axis, Dim::Static(parts));
    let split = add(Op::Reshape { dims: cut.clone() }, x)?;
    let mut permutation: Vec<u8> = (0..cut.len() as u8).filter(|&dim| usize::from(dim) != axis).collect();
    permutation.insert(0, axis as u8);
    let moved = add(Op::Transpose { permutation }, split)?;
    let mut stacked = dims.to_vec();
    stacked[axis] = Dim::Static(size / parts);
    stacked[0] = Dim::Static(stacked[0].capacity() * parts);
    add(Op::Reshape { dims: stacked }, moved)
}

#[cfg(test)]
mod tests {
    use ir::text::parse_lines;

    use super::*;

    /// Names of the operations after the rewriting, with the type of the last result.
    fn names(text: &str) -> (Vec<&'static str>, String) {
        let module = parse_lines(text).unwrap();
        let graph = rewritten(&module.graphs[0]).unwrap();
        for node in &graph.nodes {
            let operands: Vec<_> = node.operands.iter().map(|&operand| graph.ty(operand)).collect();
            let inferred = planfile::infer(&node.op, &operands).unwrap();
            assert_eq!(inferred[0], *graph.ty(node.results[0]), "{}", node.op.name());
        }
        let last = graph.nodes.last().unwrap().results[0];
        (graph.nodes.iter().map(|node| node.op.name()).collect(), graph.ty(last).to_string())
    }

    #[test]
    fn a_gather_of_columns_is_one_of_rows() {
        let (names, ty) = names(
            "%x: f32[4, 8]
             %y: f32[4, 16] = all_gather %x {axis 1, groups [[0, 1]]}
             return %y",
        );
        assert_eq!(
            (names.as_slice(), ty.as_str()),
            (&["all_gather", "reshape", "transpose", "reshape"][..], "f32[4, 16]")
        );
    }

    #[test]
    fn an_exchange_of_rows_for_columns_is_contiguous() {
        let (names, ty) = names(
            "%x: f32[4, 8]
             %y: f32[8, 4] = all_to_all %x {split 1, concat 0, groups [[0, 1]]}
             return %y",
        );
        let expected = ["reshape", "transpose", "reshape", "all_to_all", "reshape", "transpose", "reshape"];
        assert_eq!((names.as_slice(), ty.as_str()), (&expected[..], "f32[8, 4]"));
    }

    #[test]
    fn rows_stay_rows() {
        let (names, _) = names(
            "%x: f32[1, 4, 8]
             %y: f32[1, 8, 8] = all_gather %x {axis 1, groups [[0, 1]]}
             return %y",
        );
        assert_eq!(names, ["all_gather"]);
    }

    #[test]
    fn parts_lie_as_the_host_has_them() {
        // What a device sends and receives by the rewritten gather is what the host's concatenates.
        let part = |base: i64| {
            let elements: Vec<i64> = (base..base + 6).collect();
            planfile::Tensor::from_elements(&[2, 3], &elements).unwrap()
        };
        let parts = [part(0), part(100)];
        let concat = |axis| cpu::evaluate(&Op::Concat { axis }, &[&parts[0], &parts[1]]).unwrap().remove(0);
        let mut value = concat(0);
        let mut last = |op: Op, _: ValueId| {
            value = cpu::evaluate(&op, &[&value]).unwrap().remove(0);
            Ok(ValueId(0))
        };
        let dims = [2, 3].map(Dim::Static);
        let (op, _) = joined(&mut last, ValueId(0), &dims, 1, 2).unwrap();
        let gathered = cpu::evaluate(&op, &[&value]).unwrap().remove(0);
        assert_eq!(gathered, concat(1));
    }
}
