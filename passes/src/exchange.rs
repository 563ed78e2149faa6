//! Exchanges between devices along the outermost dimension, where what each one sends and receives is contiguous.
//!
//! before  %y: f32[4, 16] = all_gather %x {axis 1, groups [[0, 1]]}
//! after   %g: f32[8, 8] = all_gather %x {axis 0, groups [[0, 1]]}
//!         %s: f32[2, 4, 8] = reshape %g
//!         %t: f32[4, 2, 8] = transpose %s [1, 0, 2]
//!         %y: f32[4, 16] = reshape %t
//!
//! The host exchanges along any dimension, so its plans stay as they are.

use ir::{Edit, Graph, IrError, Node, ValueId};
use planfile::{Dim, Op};

use crate::error::PassError;
use crate::phase::Sharded;
use crate::settings::Settings;

/// Rewrites the exchanges of every graph, for CUDA devices.
///
/// # Errors
/// [`PassError::Ir`] if a type does not follow.
pub fn run(Sharded(module): Sharded, settings: &Settings<'_>) -> Result<Sharded, PassError> {
    if settings.target.device.architecture.is_host() {
        return Ok(Sharded(module));
    }
    Ok(Sharded(module.rewrite(contiguous)?))
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

/// The exchange along the outermost dimension, between what moves elements there and back.
fn contiguous(edit: &mut Edit<'_>, node: &Node) -> Result<Vec<ValueId>, IrError> {
    if !is_inner(&edit.old(), node) {
        return edit.keep(node);
    }
    let x = edit.value(node.operands[0])?;
    let dims = edit.new_graph().ty(x).dims.clone();
    let mut line = Line { edit, node, value: x };
    match &node.op {
        Op::AllGather { axis, groups } => {
            line.then(Op::AllGather { axis: 0, groups: groups.clone() })?;
            line.joined(&dims, usize::from(*axis), members(groups))?;
        }
        Op::ReduceScatter { combine, axis, groups } => {
            line.parted(&dims, usize::from(*axis), members(groups))?;
            line.then(Op::ReduceScatter { combine: *combine, axis: 0, groups: groups.clone() })?;
        }
        Op::AllToAll { split, concat, groups } => {
            let (split, concat, members) = (usize::from(*split), usize::from(*concat), members(groups));
            line.parted(&dims, split, members)?;
            line.then(Op::AllToAll { split: 0, concat: 0, groups: groups.clone() })?;
            let mut part = dims;
            part[split] = Dim::Static(part[split].capacity() / members);
            line.joined(&part, concat, members)?;
        }
        _ => return line.edit.keep(node),
    }
    Ok(vec![line.value])
}

/// Devices of a group.
fn members(groups: &[Vec<u32>]) -> u64 {
    groups.first().map_or(1, Vec::len) as u64
}

/// Nodes of one operand in a row, in place of one.
struct Line<'e, 'a> {
    edit: &'e mut Edit<'a>,
    node: &'e Node,
    value: ValueId,
}

impl Line<'_, '_> {
    fn then(&mut self, op: Op) -> Result<(), IrError> {
        self.value = self.edit.add_one(op, &[self.value], &self.node.origin)?;
        Ok(())
    }

    /// Parts of dimensions `dims`, one after the other, side by side along `axis`.
    fn joined(&mut self, dims: &[Dim], axis: usize, parts: u64) -> Result<(), IrError> {
        self.then(Op::Reshape { dims: [&[Dim::Static(parts)], dims].concat() })?;
        // The parts' dimension moves to just before `axis`.
        let mut permutation: Vec<u8> = (1..=dims.len() as u8).collect();
        permutation.insert(axis, 0);
        self.then(Op::Transpose { permutation })?;
        let mut whole = dims.to_vec();
        whole[axis] = Dim::Static(dims[axis].capacity() * parts);
        self.then(Op::Reshape { dims: whole })
    }

    /// A tensor of dimensions `dims`, cut along `axis` into parts that lie one after the other.
    fn parted(&mut self, dims: &[Dim], axis: usize, parts: u64) -> Result<(), IrError> {
        let size = dims[axis].capacity();
        if parts == 0 || !size.is_multiple_of(parts) {
            return Err(self.edit.fault(format!("{size} elements are cut into {parts} parts")));
        }
        let mut cut = dims.to_vec();
        cut[axis] = Dim::Static(size / parts);
        cut.insert(axis, Dim::Static(parts));
        self.then(Op::Reshape { dims: cut.clone() })?;
        let mut permutation: Vec<u8> = (0..cut.len() as u8).filter(|&dim| usize::from(dim) != axis).collect();
        permutation.insert(0, axis as u8);
        self.then(Op::Transpose { permutation })?;
        let mut stacked = dims.to_vec();
        stacked[axis] = Dim::Static(size / parts);
        stacked[0] = Dim::Static(stacked[0].capacity() * parts);
        self.then(Op::Reshape { dims: stacked })
    }
}

#[cfg(test)]
mod tests {
    use crate::harness::{CPU, Case, H200};

    #[track_caller]
    fn check(before: &str, after: &str) {
        Case::new(super::run, H200).check(before, after);
        Case::new(super::run, CPU).check_unchanged(before);
    }

    #[test]
    fn a_gather_of_columns_is_one_of_rows() {
        check(
            "mesh tensor=2
             %x: f32[4, 8] of [4, 16] split(1: tensor)
             %y: f32[4, 16] = all_gather %x {axis 1, groups [[0, 1]]}
             return %y",
            "mesh tensor=2
             %x: f32[4, 8] of [4, 16] split(1: tensor)
             %g: f32[8, 8] = all_gather %x {axis 0, groups [[0, 1]]}
             %s: f32[2, 4, 8] = reshape %g
             %t: f32[4, 2, 8] = transpose %s [1, 0, 2]
             %y: f32[4, 16] = reshape %t
             return %y",
        );
    }

    #[test]
    fn a_sum_of_columns_is_cut_into_columns_first() {
        check(
            "mesh tensor=2
             %x: f32[4, 8] of [4, 8] partial(sum: tensor)
             %y: f32[4, 4] of [4, 8] split(1: tensor) = reduce_scatter %x {sum, axis 1, groups [[0, 1]]}
             %z: f32[4, 8] = all_gather %y {axis 1, groups [[0, 1]]}
             return %z",
            "mesh tensor=2
             %x: f32[4, 8] of [4, 8] partial(sum: tensor)
             %c: f32[4, 2, 4] = reshape %x
             %t: f32[2, 4, 4] = transpose %c [1, 0, 2]
             %r: f32[8, 4] = reshape %t
             %y: f32[4, 4] of [4, 8] split(1: tensor) = reduce_scatter %r {sum, axis 0, groups [[0, 1]]}
             %g: f32[8, 4] = all_gather %y {axis 0, groups [[0, 1]]}
             %s: f32[2, 4, 4] = reshape %g
             %m: f32[4, 2, 4] = transpose %s [1, 0, 2]
             %z: f32[4, 8] = reshape %m
             return %z",
        );
    }

    #[test]
    fn an_exchange_of_rows_for_columns_is_contiguous() {
        check(
            "mesh tensor=2
             %x: f32[4, 8] of [8, 8] split(0: tensor)
             %y: f32[8, 4] of [8, 8] split(1: tensor) = all_to_all %x {split 1, concat 0, groups [[0, 1]]}
             return %y",
            "mesh tensor=2
             %x: f32[4, 8] of [8, 8] split(0: tensor)
             %c: f32[4, 2, 4] = reshape %x
             %t: f32[2, 4, 4] = transpose %c [1, 0, 2]
             %r: f32[8, 4] = reshape %t
             %e: f32[8, 4] = all_to_all %r {split 0, concat 0, groups [[0, 1]]}
             %s: f32[2, 4, 4] = reshape %e
             %m: f32[2, 4, 4] = transpose %s [0, 1, 2]
             %y: f32[8, 4] of [8, 8] split(1: tensor) = reshape %m
             return %y",
        );
    }

    #[test]
    fn rows_stay_rows() {
        Case::new(super::run, H200).check_unchanged(
            "mesh tensor=2
             %x: f32[1, 4, 8] of [1, 8, 8] split(1: tensor)
             %y: f32[1, 8, 8] = all_gather %x {axis 1, groups [[0, 1]]}
             return %y",
        );
    }
}
