//! Programs, the entries and stages they serve, and how the entries' ports are bound to their memory.

use std::collections::BTreeMap;

use super::bounds::Bounds;
use super::{At, MAX_CLOCKS, MAX_STEPS, MAX_STREAMS, Report, splits};
use crate::plan::{Argument, Binding, Plan, PlanPort, Program, predicted_ns};

/// Checks that entries and programs name each other, and returns the ranks of each stage.
pub(super) fn check_stages(plan: &Plan, report: &mut Report) -> BTreeMap<u32, Vec<u32>> {
    let mut served = vec![0usize; plan.programs.len()];
    for (index, entry) in plan.manifest.entries.iter().enumerate() {
        for (stage, &program) in entry.programs.iter().enumerate() {
            let found = plan.programs.get(program as usize);
            let fine = found.is_some_and(|found| found.entry as usize == index && found.stage as usize == stage);
            report.require(fine, format_args!("entry `{}`", entry.name), || {
                format!("stage {stage} is program {program}, which is not for it")
            });
            if let Some(count) = served.get_mut(program as usize) {
                *count += 1;
            }
        }
    }
    let mut stages: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (index, program) in plan.programs.iter().enumerate() {
        let at = At { program: index, step: None };
        report.require(served[index] == 1, at, || format!("serves {} entries", served[index]));
        report.check(at, check_sizes(program, plan.manifest.ranks));
        let ranks = stages.entry(program.stage).or_insert_with(|| program.ranks.clone());
        report.require(*ranks == program.ranks, at, || {
            format!("stage {} is on ranks {:?} here and {ranks:?} elsewhere", program.stage, program.ranks)
        });
    }
    let mut owners = BTreeMap::new();
    for (stage, ranks) in &stages {
        for rank in ranks {
            if let Some(other) = owners.insert(rank, stage) {
                report.require(other == stage, format_args!("stage {stage}"), || {
                    format!("shares rank {rank} with stage {other}")
                });
            }
        }
    }
    stages
}

fn check_sizes(program: &Program, ranks: u32) -> Result<(), String> {
    let ascending = program.ranks.windows(2).all(|pair| pair[0] < pair[1]);
    if program.ranks.is_empty() || !ascending || program.ranks.last().is_some_and(|&last| last >= ranks) {
        return Err(format!("ranks {:?} are not ascending and below {ranks}", program.ranks));
    }
    if !(1..=MAX_STREAMS).contains(&program.streams) {
        return Err(format!("{} streams, of 1 to {MAX_STREAMS}", program.streams));
    }
    let (steps, streams) = (program.steps.len(), program.streams as usize);
    if steps > MAX_STEPS || steps * streams > MAX_CLOCKS {
        return Err(format!("{steps} steps on {streams} streams, limit {MAX_STEPS}, or {MAX_CLOCKS} together"));
    }
    let largest = program.arena_bytes.max(program.peer_arena_bytes);
    (largest <= i64::MAX as u64).then_some(()).ok_or_else(|| format!("an arena of {largest} bytes"))
}

/// Checks how ports are bound. Stages are sound.
pub(super) fn check_bindings(plan: &Plan, report: &mut Report) {
    for entry in &plan.manifest.entries {
        let mut bound = vec![0usize; entry.outputs.len()];
        for &index in &entry.programs {
            let at = At { program: index as usize, step: None };
            let program = &plan.programs[index as usize];
            let bounds = Bounds::new(plan, program);
            for binding in &program.inputs {
                let what = check_binding(&bounds, binding, &entry.inputs).and_then(|_| check_input(&bounds, binding));
                report.check(at, what.map_err(|what| format!("input {}: {what}", binding.port)));
            }
            for binding in &program.outputs {
                let ranks = program.ranks.len();
                let what = check_binding(&bounds, binding, &entry.outputs)
                    .and_then(|port| splits::covers(&port.ty, ranks, &binding.splits));
                report.check(at, what.map_err(|what| format!("output {}: {what}", binding.port)));
                if let Some(count) = bound.get_mut(binding.port as usize) {
                    *count += 1;
                }
            }
        }
        for (port, count) in entry.outputs.iter().zip(bound) {
            report.require(count == 1, format_args!("entry `{}`, `{}`", entry.name, port.name), || {
                format!("{count} programs bind this output")
            });
        }
    }
}

/// An entry takes as long as its steps. Stages are sound.
pub(super) fn check_predictions(plan: &Plan, report: &mut Report) {
    for entry in &plan.manifest.entries {
        let predicted = predicted_ns(entry.programs.iter().map(|&index| &plan.programs[index as usize]));
        report.require(entry.predicted_ns == predicted, format_args!("entry `{}`", entry.name), || {
            format!("is predicted to take {} ns, its steps take {predicted}", entry.predicted_ns)
        });
    }
}

fn check_binding<'a>(bounds: &Bounds<'_>, binding: &Binding, ports: &'a [PlanPort]) -> Result<&'a PlanPort, String> {
    let port = ports.get(binding.port as usize).ok_or_else(|| format!("there are {}", ports.len()))?;
    bounds.check(&binding.place)?;
    splits::check(&port.ty, &binding.place.ty, bounds.ranks.len(), &binding.splits)?;
    Ok(port)
}

fn check_input(bounds: &Bounds<'_>, binding: &Binding) -> Result<(), String> {
    match &binding.place.at {
        Argument::Arena { .. } => Ok(()),
        Argument::Peer { rank, .. } if bounds.is_own(rank) => Ok(()),
        _ => Err("is bound outside the rank's own arenas".to_owned()),
    }
}
