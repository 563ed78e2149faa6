//! Order of steps and offsets in memory.
//!
//! Nodes keep their order, on one stream. Every value gets an offset in the rank's arena; a value's bytes are used
//! again once its last reader has run. Reshapes take no step: their result is their operand under another type.

use std::collections::{BTreeMap, BTreeSet};

use ir::{Graph, ValueDef, ValueId};
use planfile::Target;

use crate::cost;
use crate::error::PassError;
use crate::fuse::is_view;
use crate::phase::{Copied, Schedule, Scheduled, Selected, Step};
use crate::settings::Settings;

/// Offsets are multiples of this, which suits every vector load and bulk copy.
pub const ALIGN: u64 = 256;

/// Gives every graph of the module memory.
///
/// # Errors
/// [`PassError::Unsupported`] where an arena would exceed 2⁶³ bytes.
pub fn run(selected: Selected, settings: &Settings<'_>) -> Result<Scheduled, PassError> {
    let Selected { module, steps } = selected;
    let mut schedules = Vec::with_capacity(module.graphs.len());
    for (graph, steps) in module.graphs.iter().zip(steps) {
        schedules.push(schedule(graph, steps, settings.target).ok_or_else(|| PassError::Unsupported {
            node: module.name.clone(),
            op: "an arena of more than 2^63 bytes".to_owned(),
            hint: "compile for smaller dimensions".to_owned(),
        })?);
    }
    Ok(Scheduled { module, schedules })
}

fn schedule(graph: &Graph, steps: Vec<Option<Step>>, target: &Target) -> Option<Schedule> {
    let mut root: Vec<ValueId> = (0..graph.values().len() as u32).map(ValueId).collect();
    for node in graph.nodes().iter().filter(|node| is_view(node)) {
        root[node.results[0].index()] = root[node.operands[0].index()];
    }
    let in_arena = |value: ValueId| matches!(graph.value(value).def, ValueDef::Input(_) | ValueDef::Node(..));
    let from_node = |value: ValueId| matches!(graph.value(value).def, ValueDef::Node(..));
    // The last node that reads each root; outputs are read after all of them.
    let mut last_use = vec![0; graph.values().len()];
    for (index, node) in graph.nodes().iter().enumerate() {
        let inputs = steps[index].as_ref().map_or(&[][..], |step| &step.region.inputs);
        for &value in inputs.iter().chain(&node.results) {
            last_use[root[value.index()].index()] = index;
        }
    }
    let (mut copied, mut known) = (Vec::new(), BTreeSet::new());
    for output in graph.outputs() {
        let source = root[output.value.index()];
        last_use[source.index()] = graph.nodes().len();
        if !from_node(source) && known.insert(output.value) {
            copied.push(output.value);
        }
    }
    let mut expiring: Vec<Vec<ValueId>> = vec![Vec::new(); graph.nodes().len() + 1];
    for (index, &last) in last_use.iter().enumerate() {
        expiring[last].push(ValueId(index as u32));
    }
    let mut arena = Arena::default();
    let (mut offsets, mut workspaces) = (BTreeMap::new(), BTreeMap::new());
    let inputs = (0..graph.values().len() as u32).map(ValueId);
    for input in inputs.filter(|&value| matches!(graph.value(value).def, ValueDef::Input(_))) {
        offsets.insert(input, arena.take(graph.ty(input).bytes()?)?);
    }
    for (index, node) in graph.nodes().iter().enumerate() {
        if steps[index].is_some() {
            for &result in &node.results {
                offsets.insert(result, arena.take(graph.ty(result).bytes()?)?);
            }
        }
        let workspace_bytes = steps[index].as_ref().map_or(0, |step| step.execution.workspace_bytes());
        if workspace_bytes > 0 {
            let offset = arena.take(workspace_bytes)?;
            workspaces.insert(index, offset);
            arena.give(offset, workspace_bytes);
        }
        for &value in &expiring[index] {
            // Inputs that no node reads expire with the first node, like those it reads last.
            if root[value.index()] == value
                && in_arena(value)
                && let Some(&offset) = offsets.get(&value)
            {
                arena.give(offset, graph.ty(value).bytes()?);
            }
        }
    }
    let mut copies = BTreeMap::new();
    for value in copied {
        let bytes = graph.ty(value).bytes()?;
        copies.insert(value, Copied { offset: arena.take(bytes)?, cost: cost::copy(bytes, target).capped() });
    }
    Some(Schedule { root, offsets, copies, steps, workspaces, arena_bytes: arena.top })
}

/// Free memory, and how far the arena reaches.
#[derive(Debug, Default)]
struct Arena {
    /// Sizes of gaps by offset.
    free: BTreeMap<u64, u64>,
    /// The same gaps, the smallest first and of those the lowest: size and offset.
    by_size: BTreeSet<(u64, u64)>,
    top: u64,
}

impl Arena {
    /// The smallest gap that fits, or new memory at the end. `None` on overflow.
    fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGN)?;
        if let Some(&(size, offset)) = self.by_size.range((bytes, 0)..).next() {
            self.close(offset);
            if size > bytes {
                self.open(offset + bytes, size - bytes);
            }
            return Some(offset);
        }
        // A gap at the end grows.
        let start = self
            .free
            .last_key_value()
            .filter(|(offset, size)| **offset + **size == self.top)
            .map(|(offset, _)| *offset);
        let offset = start.unwrap_or(self.top);
        self.close(offset);
        self.top = offset.checked_add(bytes).filter(|top| *top <= i64::MAX as u64)?;
        Some(offset)
    }

    /// Returns memory that [`Self::take`] gave for so many bytes.
    fn give(&mut self, offset: u64, bytes: u64) {
        let (mut start, mut end) = (offset, offset + bytes.max(1).next_multiple_of(ALIGN));
        if let Some((&before, &size)) = self.free.range(..start).next_back()
            && before + size == start
        {
            self.close(before);
            start = before;
        }
        end += self.close(end);
        self.open(start, end - start);
    }

    /// Adds a gap.
    fn open(&mut self, offset: u64, size: u64) {
        self.free.insert(offset, size);
        self.by_size.insert((size, offset));
    }

    /// Removes the gap at this offset; its size, 0 where there is none.
    fn close(&mut self, offset: u64) -> u64 {
        let size = self.free.remove(&offset).unwrap_or(0);
        self.by_size.remove(&(size, offset));
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_gaps_merge() {
        let mut arena = Arena::default();
        let [a, b, c] = [256, 512, 256].map(|bytes| arena.take(bytes).unwrap());
        assert_eq!([a, b, c], [0, 256, 768]);
        arena.give(a, 256);
        arena.give(b, 512);
        assert_eq!(arena.take(700).unwrap(), 0);
        assert_eq!(arena.top, 1024);
    }

    #[test]
    fn many_gaps_are_not_searched_one_by_one() {
        // As many comparisons as gaps times blocks would be ten thousand million.
        const GAPS: u64 = 100_000;
        let mut arena = Arena::default();
        let blocks: Vec<u64> = (0..2 * GAPS).map(|_| arena.take(256).unwrap()).collect();
        blocks.iter().step_by(2).for_each(|&block| arena.give(block, 256));
        for number in 0..GAPS {
            assert_eq!(arena.take(512).unwrap(), 512 * (GAPS + number));
        }
        // The lowest of the smallest first.
        assert_eq!([arena.take(256), arena.take(1)], [Some(0), Some(512)]);
        assert_eq!((arena.free.len(), arena.by_size.len()), (GAPS as usize - 2, GAPS as usize - 2));
    }

    #[test]
    fn a_gap_at_the_end_grows() {
        let mut arena = Arena::default();
        let a = arena.take(100).unwrap();
        arena.give(a, 100);
        assert_eq!(arena.take(1000).unwrap(), 0);
        assert_eq!(arena.top, 1024);
    }
}
