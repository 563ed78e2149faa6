//! Memory of a program over time: written before it is read, and never touched by two unordered steps unless both read.
//!
//! Steps come in issue order, which all edges respect, so each access is compared with what earlier ones left behind.

use std::collections::BTreeMap;

use super::bounds::{Bounds, memory_name, range};
use super::clock::Clocks;
use super::intervals::{Access, Intervals, Order};
use super::persistent::TaskOrder;
use super::steps::SIGNAL_BYTES;
use super::{At, Report};
use crate::plan::{Action, Argument, EdgeKind, Place, PlacedWeight, Plan, Program};

/// Checks a program whose steps are sound.
pub(super) fn check(plan: &Plan, index: usize, report: &mut Report) {
    let program = &plan.programs[index];
    let mut state = Memory::new(plan, program);
    for binding in &program.inputs {
        let bound = state.bind(&binding.place).map_err(|what| format!("input {}: {what}", binding.port));
        report.check(At { program: index, step: None }, bound);
    }
    for position in 0..program.steps.len() {
        report.check(At { program: index, step: Some(position) }, state.step(position));
    }
    for binding in &program.outputs {
        let left = state.output(&binding.place).map_err(|what| format!("output {}: {what}", binding.port));
        report.check(At { program: index, step: None }, left);
    }
    report.check(At { program: index, step: None }, check_signals(program));
}

/// Memories of a rank. Those of peers have the same offsets, and are one with the rank's own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Region {
    Arena,
    Peer,
    State(u32),
}

/// What is there before the first step.
const BEFORE: Access = Access { step: None, unit: 0, foreign: false };

struct Memory<'a> {
    program: &'a Program,
    bounds: Bounds<'a>,
    /// The stage's weights by offset.
    weights: BTreeMap<u64, &'a PlacedWeight>,
    regions: BTreeMap<Region, Intervals>,
    order: ProgramOrder,
}

struct ProgramOrder {
    clocks: Clocks,
    /// Of the persistent steps so far.
    tasks: BTreeMap<usize, TaskOrder>,
}

impl Order for ProgramOrder {
    fn ordered(&self, a: Access, b: Access) -> bool {
        match (a.step, b.step) {
            // Before the first step, or after the last.
            (None, _) | (_, None) => true,
            (Some(step), Some(same)) if step == same => {
                let tasks = self.tasks.get(&step);
                a.unit == b.unit || tasks.is_some_and(|tasks| tasks.ordered(a.unit, b.unit))
            }
            (Some(a_step), Some(b_step)) if a.foreign || b.foreign => self.clocks.ordered_between_ranks(a_step, b_step),
            (Some(a), Some(b)) => self.clocks.ordered(a, b),
        }
    }

    fn supersedes(&self, later: Access, earlier: Access) -> bool {
        match (later.step, earlier.step) {
            (Some(l), Some(e)) => {
                let unit = l != e || later.unit == earlier.unit;
                unit && later.foreign == earlier.foreign && self.clocks.stream(l) == self.clocks.stream(e)
            }
            _ => false,
        }
    }
}

impl<'a> Memory<'a> {
    fn new(plan: &'a Plan, program: &'a Program) -> Self {
        let placed = plan.manifest.placed.iter().filter(|placed| placed.stage == program.stage);
        let placed = placed.filter(|placed| placed.ty.bytes() != Some(0));
        let mut regions: BTreeMap<Region, Intervals> = BTreeMap::new();
        let order = ProgramOrder { clocks: Clocks::new(program), tasks: BTreeMap::new() };
        for (index, state) in plan.manifest.states.iter().enumerate() {
            let bytes = state.ty.bytes().unwrap_or(0);
            let intervals = regions.entry(Region::State(index as u32)).or_default();
            // Nothing was there before, so nothing can be in conflict.
            let _ = intervals.write((0, bytes), state.ty.dtype, BEFORE, &order);
        }
        Self {
            program,
            bounds: Bounds::new(plan, program),
            weights: placed.map(|placed| (placed.arena_offset, placed)).collect(),
            regions,
            order,
        }
    }

    fn bind(&mut self, place: &Place) -> Result<(), String> {
        let Some((region, _)) = self.region(place) else { return Ok(()) };
        let intervals = self.regions.entry(region).or_default();
        let range = range(place);
        if intervals.touched(range) {
            return Err(format!("shares bytes {:#x}..{:#x} with another input", range.0, range.1));
        }
        intervals.write(range, place.ty.dtype, BEFORE, &self.order)
    }

    fn step(&mut self, position: usize) -> Result<(), String> {
        let program = self.program;
        let access = |unit| Access { step: Some(position), unit, foreign: false };
        match &program.steps[position].action {
            Action::Persistent { tasks, counters, .. } => {
                let order = TaskOrder::new(tasks, counters)?;
                let units: Vec<usize> = order.units.iter().map(|unit| unit.task).collect();
                self.order.tasks.insert(position, order);
                for (unit, task) in units.into_iter().enumerate() {
                    let task = &tasks[task];
                    self.touch(&task.operands, &task.results, access(unit))?;
                }
                Ok(())
            }
            action => {
                let (reads, writes) = action.places();
                self.touch(reads, writes, access(0))
            }
        }
    }

    fn touch<'b>(
        &mut self,
        reads: impl IntoIterator<Item = &'b Place>,
        writes: impl IntoIterator<Item = &'b Place>,
        by: Access,
    ) -> Result<(), String> {
        for place in reads {
            self.read(place, by)?;
        }
        for place in writes {
            let Some((region, foreign)) = self.region(place) else { continue };
            let intervals = self.regions.entry(region).or_default();
            let written = intervals.write(range(place), place.ty.dtype, Access { foreign, ..by }, &self.order);
            written.map_err(|what| format!("{}: {what}", memory_name(&place.at)))?;
        }
        Ok(())
    }

    fn read(&mut self, place: &Place, by: Access) -> Result<(), String> {
        let range = range(place);
        if range.0 == range.1 {
            return Ok(());
        }
        let read = match self.region(place) {
            Some((region, foreign)) => {
                let intervals = self.regions.entry(region).or_default();
                intervals.read(range, place.ty.dtype, Access { foreign, ..by }, &self.order)
            }
            None => self.read_weights(place, range),
        };
        read.map_err(|what| format!("{}: {what}", memory_name(&place.at)))
    }

    fn read_weights(&self, place: &Place, range: (u64, u64)) -> Result<(), String> {
        let placed = self.weights.range(..=range.0).next_back();
        let end = |placed: &PlacedWeight| placed.arena_offset.saturating_add(placed.ty.bytes().unwrap_or(0));
        match placed {
            Some((_, placed)) if range.1 <= end(placed) && placed.ty.dtype == place.ty.dtype => Ok(()),
            _ => Err(format!("{} at {:#x}..{:#x} is no weight of this stage", place.ty, range.0, range.1)),
        }
    }

    fn output(&mut self, place: &Place) -> Result<(), String> {
        self.read(place, BEFORE)?;
        let Some((region, _)) = self.region(place) else { return Ok(()) };
        let overwritten = self.regions.get(&region).and_then(|intervals| intervals.overwritten(range(place)));
        match overwritten.and_then(|access| access.step) {
            Some(step) => Err(format!("is overwritten by a larger result of step #{step}")),
            None => Ok(()),
        }
    }

    /// Where a place is, and whether it may be another rank's; `None` for weights.
    fn region(&self, place: &Place) -> Option<(Region, bool)> {
        match &place.at {
            Argument::Arena { .. } => Some((Region::Arena, false)),
            Argument::Peer { rank, .. } => Some((Region::Peer, !self.bounds.is_own(rank))),
            Argument::State { state, .. } => Some((Region::State(*state), false)),
            Argument::Weights { .. }
            | Argument::Extent { .. }
            | Argument::Epoch
            | Argument::TensorMap { .. }
            | Argument::Scalar { .. }
            | Argument::Fault { .. } => None,
        }
    }
}

/// Signals share no byte with tensors of the peer arena.
fn check_signals(program: &Program) -> Result<(), String> {
    let mut tensors: Vec<(u64, u64)> = Vec::new();
    let mut add = |place: &Place| {
        if matches!(place.at, Argument::Peer { .. }) {
            tensors.push(range(place));
        }
    };
    program.inputs.iter().chain(&program.outputs).for_each(|binding| add(&binding.place));
    for step in &program.steps {
        let (reads, writes) = step.action.places();
        reads.into_iter().chain(writes).for_each(&mut add);
    }
    let mut flags: Vec<u64> = Vec::new();
    for edge in program.steps.iter().flat_map(|step| &step.waits) {
        if let EdgeKind::Signal { offset, .. } = &edge.kind {
            flags.push(*offset);
        }
    }
    flags.sort_unstable();
    for (first, end) in tensors {
        let near = flags.get(flags.partition_point(|flag| flag.saturating_add(SIGNAL_BYTES) <= first));
        if let Some(flag) = near.filter(|&&flag| flag < end && first < end) {
            return Err(format!("the signal at {flag} of the peer arena is inside a tensor"));
        }
    }
    Ok(())
}
