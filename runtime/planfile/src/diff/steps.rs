//! Differences between programs: steps aligned by what they do.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::align::align;
use crate::plan::{Action, Plan, Program, Step};
use crate::text;

/// What differs between the programs of one entry and stage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgramDiff {
    /// Such as `main, stage 0`.
    pub program: String,
    /// Number of steps.
    pub before: usize,
    pub after: usize,
    /// Kernels and operations that run more or less often: times before and after.
    pub counts: BTreeMap<String, (usize, usize)>,
    /// Steps that were removed and added, in order; equal neighbours are one line.
    pub lines: Vec<StepLine>,
    /// Steps that do the same in another way, by what differs: `places`, `scalars`, `order`, `cost`, `origin`.
    pub details: BTreeMap<&'static str, usize>,
    /// Differences of the program itself.
    pub facts: Vec<String>,
}

/// One or more neighbouring steps that only one of the plans has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepLine {
    /// `-` or `+`.
    pub sign: char,
    /// Number of the first one, in the plan that has it.
    pub first: usize,
    pub times: usize,
    /// What is run, and the types that result.
    pub step: String,
}

/// Programs that differ, by entry and stage.
pub(super) fn programs(before: &Plan, after: &Plan) -> Vec<ProgramDiff> {
    let (mine, theirs) = (by_name(before), by_name(after));
    let mut names: Vec<&String> = mine.keys().chain(theirs.keys()).collect();
    names.sort_unstable();
    names.dedup();
    let one = |name: &String| {
        let (mine, theirs) = (mine.get(name).copied(), theirs.get(name).copied());
        let found = program(name, (before, mine), (after, theirs));
        let empty = ProgramDiff {
            program: found.program.clone(),
            before: found.before,
            after: found.after,
            ..ProgramDiff::default()
        };
        (found != empty).then_some(found)
    };
    names.into_iter().filter_map(one).collect()
}

fn by_name(plan: &Plan) -> BTreeMap<String, &Program> {
    let name = |program: &Program| {
        let entry = plan.manifest.entries.get(program.entry as usize).map_or("", |entry| entry.name.as_str());
        format!("{entry}, stage {}", program.stage)
    };
    plan.programs.iter().map(|program| (name(program), program)).collect()
}

fn program(name: &str, before: (&Plan, Option<&Program>), after: (&Plan, Option<&Program>)) -> ProgramDiff {
    let steps = |(_, program): (&Plan, Option<&'_ Program>)| program.map_or(0, |program| program.steps.len());
    let mut diff = ProgramDiff {
        program: name.to_owned(),
        before: steps(before),
        after: steps(after),
        facts: facts(before.1, after.1),
        ..ProgramDiff::default()
    };
    let (mine, theirs) = (described(before), described(after));
    for (side, described) in [(0, &mine), (1, &theirs)] {
        for (what, _, _) in described {
            let count = diff.counts.entry(what.clone()).or_default();
            if side == 0 {
                count.0 += 1;
            } else {
                count.1 += 1;
            }
        }
    }
    diff.counts.retain(|_, (before, after)| before != after);
    let lines = |described: &[(String, String, &Step)]| -> Vec<String> {
        described.iter().map(|(what, types, _)| format!("{what} {types}")).collect()
    };
    let (left, right) = (lines(&mine), lines(&theirs));
    let (mut old, mut new) = (0, 0);
    // The end of both is a pair, too.
    for (mine_at, their_at) in align(&left, &right).into_iter().chain([(left.len(), right.len())]) {
        (old..mine_at).for_each(|index| push(&mut diff.lines, '-', index, &left[index]));
        (new..their_at).for_each(|index| push(&mut diff.lines, '+', index, &right[index]));
        if let (Some(mine), Some(theirs)) = (mine.get(mine_at), theirs.get(their_at)) {
            details((before.0, mine.2), (after.0, theirs.2), &mut diff.details);
        }
        (old, new) = (mine_at + 1, their_at + 1);
    }
    diff
}

fn push(lines: &mut Vec<StepLine>, sign: char, index: usize, step: &str) {
    match lines.last_mut() {
        Some(last) if last.sign == sign && last.step == step && last.first + last.times == index => last.times += 1,
        _ => lines.push(StepLine { sign, first: index, times: 1, step: step.to_owned() }),
    }
}

/// What each step runs, and the types that result.
fn described<'a>((plan, program): (&Plan, Option<&'a Program>)) -> Vec<(String, String, &'a Step)> {
    let kernel = |kernel: u32| plan.kernels.get(kernel as usize).map_or("", |kernel| kernel.name.as_str()).to_owned();
    let steps = program.map_or(&[][..], |program| &program.steps);
    let describe = |step: &'a Step| {
        let what = match &step.action {
            Action::Launch { kernel: number, .. } | Action::Library { kernel: number, .. } => kernel(*number),
            Action::Collective { op, .. } => op.name().to_owned(),
            Action::Copy { .. } => "copy".to_owned(),
            Action::Persistent { tasks, .. } => format!("persistent of {}", text::count(tasks.len() as u64, "task")),
        };
        let (reads, writes) = step.action.places();
        let places = if writes.is_empty() { reads } else { writes };
        let types: Vec<String> = places.iter().map(|place| place.ty.to_string()).collect();
        (what, types.join(", "), step)
    };
    steps.iter().map(describe).collect()
}

/// Counts in what two steps that do the same differ.
fn details(before: (&Plan, &Step), after: (&Plan, &Step), counts: &mut BTreeMap<&'static str, usize>) {
    let (mine, theirs) = (before.1, after.1);
    fn names<'a>((plan, step): (&'a Plan, &'a Step)) -> impl Iterator<Item = &'a String> {
        step.origin.iter().filter_map(|&name| plan.explanations.names.get(name as usize))
    }
    let parts = [
        ("places", mine.action.places() != theirs.action.places()),
        ("scalars", mine.action.scalars() != theirs.action.scalars()),
        ("order", (mine.stream, &mine.waits) != (theirs.stream, &theirs.waits)),
        ("cost", mine.cost != theirs.cost),
        ("origin", !names(before).eq(names(after))),
    ];
    for (what, _) in parts.iter().filter(|(_, differs)| *differs) {
        *counts.entry(what).or_default() += 1;
    }
}

fn facts(before: Option<&Program>, after: Option<&Program>) -> Vec<String> {
    let (Some(before), Some(after)) = (before, after) else {
        return vec![if before.is_some() { "removed" } else { "added" }.to_owned()];
    };
    let mut facts = Vec::new();
    if before.ranks != after.ranks {
        facts.push(format!("ranks: {:?} → {:?}", before.ranks, after.ranks));
    }
    if before.streams != after.streams {
        facts.push(format!("streams: {} → {}", before.streams, after.streams));
    }
    for (what, mine, theirs) in
        [("inputs", &before.inputs, &after.inputs), ("outputs", &before.outputs, &after.outputs)]
    {
        if mine != theirs {
            facts.push(format!("places or splits of {what} differ"));
        }
    }
    facts
}

impl ProgramDiff {
    pub(super) fn text(&self) -> String {
        /// Lines of one program that a reader still reads.
        const SHOWN: usize = 100;
        let Self { program, before, after, counts, lines, details, facts } = self;
        let mut out = format!("steps of {program}: {before} → {after}\n");
        // Writing to a string cannot fail.
        for fact in facts {
            let _ = writeln!(out, "  {fact}");
        }
        for (what, (before, after)) in counts {
            let _ = writeln!(out, "  {what}: {before} → {after}");
        }
        for StepLine { sign, first, times, step } in lines.iter().take(SHOWN) {
            let times = if *times == 1 { String::new() } else { format!(" × {times}") };
            let _ = writeln!(out, "  {sign} #{first} {step}{times}");
        }
        if lines.len() > SHOWN {
            let more = text::count((lines.len() - SHOWN) as u64, "line");
            let _ = writeln!(out, "  and {more} more; --json has all");
        }
        for (what, count) in details {
            let steps = if *count == 1 { "step that does" } else { "steps that do" };
            let _ = writeln!(out, "  other {what}: {count} {steps} the same");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn one_more_step_is_one_line() {
        let before = sample::plan();
        let mut after = before.clone();
        let steps = &mut after.programs[0].steps;
        let negate = steps[1].clone();
        steps.splice(1..1, [negate.clone(), negate]);
        let found = programs(&before, &after);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].counts, BTreeMap::from([("neg_f32".to_owned(), (1, 3))]));
        let line = &found[0].lines;
        assert_eq!(line.len(), 1, "{line:?}");
        assert_eq!((line[0].sign, line[0].times, line[0].step.as_str()), ('+', 2, "neg_f32 f32[2, 4]"));
        assert!(found[0].text().contains("neg_f32 f32[2, 4] × 2"), "{}", found[0].text());
        let back = &programs(&after, &before)[0].lines[0];
        assert_eq!((back.sign, back.times), ('-', 2));
    }

    #[test]
    fn stages_are_matched_by_entry_and_stage() {
        let before = sample::staged();
        let mut after = before.clone();
        after.programs.swap(0, 1);
        assert!(programs(&before, &after).is_empty());
        after.programs.truncate(1);
        let found = programs(&before, &after);
        assert_eq!((found.len(), found[0].program.as_str()), (1, "main, stage 0"));
        assert_eq!(found[0].facts, ["removed"]);
        assert_eq!(found[0].counts.len(), 2);
    }
}
