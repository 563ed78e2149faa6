//! What differs between two plans, in the terms of a plan and not of its bytes.
//!
//! Things with names are matched by them: entries, weights, kernels, stages. Steps are aligned by what they do, so that
//! one more step is one line, though it moves every offset behind it.

mod align;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Serialize;

use crate::error::PlanError;
use crate::frozen::{FrozenInput, FrozenSummary};
use crate::plan::{Kernel, Manifest, PlacedWeight, Plan, PlanEntry, PlanPort};
use crate::reader::PlanFile;
use crate::summary::memory;
use crate::text::{Bytes, Duration, Splits, count, implementation, mesh, primitives, recipe};
pub use steps::{ProgramDiff, StepLine};

/// Bytes of weights compared in one go.
const BLOCK_BYTES: u64 = 1 << 20;

/// All differences; lists are empty where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// The plans are the same, and so is what is known of their weights' bytes.
    pub same: bool,
    /// Compiler, model, machine, mesh, links.
    pub plan: Vec<Change>,
    /// Signatures.
    pub entries: Vec<Change>,
    /// In nanoseconds, by entry.
    pub predicted_ns: Vec<Change>,
    /// Per device, in bytes.
    pub memory: Vec<Change>,
    /// Types and recipes.
    pub weights: Vec<Change>,
    /// How weights are split between ranks.
    pub placements: Vec<Change>,
    /// Weights that are made alike, of other bytes. Empty unless [`values`] was asked.
    pub values: Vec<String>,
    pub kernels: Vec<Change>,
    pub programs: Vec<ProgramDiff>,
    /// Parts that differ in ways that nothing above shows, such as offsets.
    pub other: Vec<String>,
}

/// One thing that was added (no `before`), removed (no `after`) or changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub what: String,
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Compares two plans; their weights' bytes are not looked at: see [`values`].
pub fn diff(before: &Plan, after: &Plan) -> Diff {
    let both = |facts: fn(&Plan) -> Facts| changes(facts(before), facts(after));
    let mut diff = Diff {
        same: before == after,
        plan: both(plan_facts),
        entries: both(signatures),
        predicted_ns: both(predictions),
        memory: both(memory_facts),
        weights: both(recipes),
        placements: both(placements),
        values: Vec::new(),
        kernels: both(kernels),
        programs: steps::programs(before, after),
        other: Vec::new(),
    };
    diff.other = other(before, after, &diff);
    diff
}

/// Compares the bytes of weights that both plans have with the same type and placement; the names of those that differ
/// go into `diff`. Reads both weights sections.
///
/// # Errors
/// A plan that cannot be read, or is damaged.
pub fn values(before: &PlanFile, after: &PlanFile, diff: &mut Diff) -> Result<(), PlanError> {
    let theirs = placed_by_name(&after.plan().manifest);
    let mut told: BTreeSet<String> = diff.values.iter().cloned().collect();
    for (key, mine) in placed_by_name(&before.plan().manifest) {
        let Some(their) = theirs.get(&key) else { continue };
        if (&mine.ty, &mine.splits, &mine.ranks) != (&their.ty, &their.splits, &their.ranks) {
            continue;
        }
        let bytes = mine.ty.bytes().unwrap_or(0);
        let mut differs = false;
        for (&mine, &their) in mine.images.iter().zip(&their.images) {
            differs = differs || !equal_images(before, mine, after, their, bytes)?;
        }
        if differs && told.insert(key.0.to_owned()) {
            diff.values.push(key.0.to_owned());
        }
    }
    diff.same = diff.same && diff.values.is_empty();
    Ok(())
}

fn equal_images(before: &PlanFile, mine: u64, after: &PlanFile, their: u64, bytes: u64) -> Result<bool, PlanError> {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < bytes {
        let count = (bytes - at).min(BLOCK_BYTES) as usize;
        left.resize(count, 0);
        right.resize(count, 0);
        before.read_weights(mine + at, &mut left)?;
        after.read_weights(their + at, &mut right)?;
        if left != right {
            return Ok(false);
        }
        at += count as u64;
    }
    Ok(true)
}

/// Weights in arenas by name, stage, and number among those of that name and stage.
fn placed_by_name(manifest: &Manifest) -> BTreeMap<(&str, u32, usize), &PlacedWeight> {
    let mut counts: BTreeMap<(&str, u32), usize> = BTreeMap::new();
    let named = |placed: &'_ PlacedWeight| -> (&str, u32, usize) {
        let name = manifest.weights.get(placed.weight as usize).map_or("", |weight| weight.name.as_str());
        let count = counts.entry((name, placed.stage)).or_default();
        *count += 1;
        (name, placed.stage, *count - 1)
    };
    manifest.placed.iter().map(named).zip(&manifest.placed).collect()
}

/// What a plan says, by what it says it of; in the plan's order.
type Facts = Vec<(String, String)>;

/// Matches facts by their keys; in the order of `before`, what was added last.
fn changes(before: Facts, after: Facts) -> Vec<Change> {
    let (mut mine, mut theirs) = (BTreeMap::new(), BTreeMap::new());
    let index = |facts: Facts, by_key: &mut BTreeMap<(String, usize), String>| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let mut order = Vec::new();
        for (key, text) in facts {
            let count = counts.entry(key.clone()).or_default();
            order.push((key.clone(), *count));
            by_key.insert((key, *count), text);
            *count += 1;
        }
        order
    };
    let (before, after) = (index(before, &mut mine), index(after, &mut theirs));
    let added: Vec<_> = after.into_iter().filter(|key| !mine.contains_key(key)).collect();
    let change = |key: (String, usize)| {
        let (before, after) = (mine.get(&key).cloned(), theirs.get(&key).cloned());
        (before != after).then_some(Change { what: key.0, before, after })
    };
    before.into_iter().chain(added).filter_map(change).collect()
}

fn fact(key: impl Into<String>, text: impl Into<String>) -> (String, String) {
    (key.into(), text.into())
}

fn plan_facts(plan: &Plan) -> Facts {
    let manifest = &plan.manifest;
    let mut facts = vec![
        fact("compiler", &manifest.producer),
        fact("model", &manifest.model),
        fact("target", format!("{} ({})", manifest.target.name, manifest.target.architecture)),
        fact("mesh", mesh(&manifest.mesh, manifest.ranks)),
    ];
    facts.extend(manifest.files.iter().map(|file| fact(format!("file {}", file.name), Bytes(file.bytes).to_string())));
    let link =
        |link: &crate::plan::LinkRequirement| fact(format!("link {}-{}", link.ranks.0, link.ranks.1), &link.class);
    facts.extend(manifest.links.iter().map(link));
    facts
}

fn signatures(plan: &Plan) -> Facts {
    let ports = |entry: &PlanEntry| {
        let named = |what: &str, ports: &[PlanPort]| -> Facts {
            let port = |port: &PlanPort| fact(format!("{} {what} {}", entry.name, port.name), port.ty.to_string());
            ports.iter().map(port).collect()
        };
        let frozen = |frozen: &FrozenInput| {
            let FrozenSummary { input, ty, value, node, .. } = FrozenSummary::from(frozen);
            fact(format!("{} frozen {input}", entry.name), format!("{ty} = {value}, for `{node}`"))
        };
        let mut facts = vec![fact(&entry.name, count(entry.programs.len() as u64, "stage"))];
        facts.extend(named("input", &entry.inputs));
        facts.extend(named("output", &entry.outputs));
        facts.extend(entry.frozen.iter().map(frozen));
        facts
    };
    plan.manifest.entries.iter().flat_map(ports).collect()
}

fn predictions(plan: &Plan) -> Facts {
    plan.manifest.entries.iter().map(|entry| fact(&entry.name, entry.predicted_ns.to_string())).collect()
}

fn memory_facts(plan: &Plan) -> Facts {
    let device = |device: crate::summary::DeviceMemory| {
        let rank = device.rank;
        [
            fact(format!("rank {rank} weights"), device.weight_bytes.to_string()),
            fact(format!("rank {rank} activations"), device.activation_bytes.to_string()),
            fact(format!("rank {rank} peers"), device.peer_bytes.to_string()),
            fact(format!("rank {rank} states"), device.state_bytes.to_string()),
        ]
    };
    memory(plan).into_iter().flat_map(device).collect()
}

fn recipes(plan: &Plan) -> Facts {
    let weights = plan.manifest.weights.iter();
    weights.map(|weight| fact(&weight.name, format!("{} from {}", weight.ty, recipe(&weight.recipe)))).collect()
}

fn placements(plan: &Plan) -> Facts {
    let placed = placed_by_name(&plan.manifest);
    let place = |((name, stage, _), placed): ((&str, u32, usize), &PlacedWeight)| {
        fact(format!("{name} on stage {stage}"), format!("{}{}", placed.ty, Splits(&placed.splits)))
    };
    placed.into_iter().map(place).collect()
}

fn kernels(plan: &Plan) -> Facts {
    let kernel = |kernel: &Kernel| {
        let inputs: Vec<String> = kernel.spec.inputs.iter().map(ToString::to_string).collect();
        let nodes = primitives(&kernel.spec).join("; ");
        let text = format!("({}) {nodes} by {}", inputs.join(", "), implementation(&kernel.implementation));
        fact(&kernel.name, text)
    };
    // Kernels that share a name are matched in the order of what they compute, not of who uses them first.
    let mut facts: Facts = plan.kernels.iter().map(kernel).collect();
    facts.sort_unstable();
    facts
}

/// Names of unequal parts that no list shows.
fn other(before: &Plan, after: &Plan, diff: &Diff) -> Vec<String> {
    let (mine, theirs) = (&before.manifest, &after.manifest);
    let told_of_weights = !(diff.weights.is_empty() && diff.placements.is_empty());
    let told_of_kernels = !diff.kernels.is_empty() || !diff.programs.is_empty();
    let parts = [
        (mine.fingerprint != theirs.fingerprint, "what of the model's files decided the plan"),
        (mine.weights != theirs.weights && !told_of_weights, "order or constants of weights"),
        (mine.placed != theirs.placed && !told_of_weights, "offsets of weights"),
        (mine.states != theirs.states, "states"),
        (before.kernels != after.kernels && !told_of_kernels, "order of kernels"),
        (before.code != after.code, "machine code"),
        (before.explanations.sharding != after.explanations.sharding, "why it is sharded so"),
        (before.explanations.alternatives != after.explanations.alternatives, "alternatives that were considered"),
    ];
    let mut other: Vec<String> =
        parts.iter().filter(|(differs, _)| *differs).map(|(_, part)| (*part).to_owned()).collect();
    let shown = [&diff.plan, &diff.entries, &diff.predicted_ns, &diff.memory, &diff.weights, &diff.placements];
    let nothing = shown.iter().all(|list| list.is_empty()) && !told_of_kernels && other.is_empty();
    if nothing && !diff.same {
        other.push("order of entries, or names of ONNX nodes".to_owned());
    }
    other
}

impl Diff {
    /// For people: one difference a line, `-` before and `+` after.
    pub fn text(&self) -> String {
        if self.same {
            return "the plans are the same\n".to_owned();
        }
        let mut out = String::new();
        let raw = |text: &str| text.to_owned();
        let number = |show: fn(u64) -> String| move |text: &str| text.parse().map_or_else(|_| text.to_owned(), show);
        section(&mut out, "plan", &self.plan, &raw);
        section(&mut out, "entries", &self.entries, &raw);
        section(&mut out, "predicted time", &self.predicted_ns, &number(|ns| Duration(ns).to_string()));
        section(&mut out, "memory", &self.memory, &number(|bytes| Bytes(bytes).to_string()));
        section(&mut out, "weights", &self.weights, &raw);
        section(&mut out, "placements", &self.placements, &raw);
        section(&mut out, "kernels", &self.kernels, &raw);
        for program in &self.programs {
            out.push_str(&program.text());
        }
        list(&mut out, "weights of other bytes", &self.values);
        list(&mut out, "also different", &self.other);
        out
    }
}

fn list(out: &mut String, title: &str, lines: &[String]) {
    if !lines.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{title}\n  {}", lines.join("\n  "));
    }
}

fn section(out: &mut String, title: &str, changes: &[Change], show: &dyn Fn(&str) -> String) {
    if changes.is_empty() {
        return;
    }
    let _ = writeln!(out, "{title}");
    for Change { what, before, after } in changes {
        let _ = match (before, after) {
            (Some(before), Some(after)) if before.len() + after.len() <= 60 => {
                writeln!(out, "  {what}: {} → {}", show(before), show(after))
            }
            (before, after) => {
                let line = |sign, text: &Option<String>| {
                    text.as_ref().map_or_else(String::new, |text| format!("  {sign} {what}: {}\n", show(text)))
                };
                write!(out, "{}{}", line('-', before), line('+', after))
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Action, Argument};
    use crate::sample;
    use crate::writer::write_plan;

    #[test]
    fn a_plan_does_not_differ_from_itself() {
        let diff = diff(&sample::plan(), &sample::plan());
        assert_eq!(diff, Diff { same: true, ..Diff::default() });
        assert_eq!(diff.text(), "the plans are the same\n");
    }

    #[test]
    fn each_difference_is_named() {
        let mut after = sample::plan();
        after.manifest.target.name = "other".to_owned();
        after.manifest.entries[0].inputs[0].name = "z".to_owned();
        after.manifest.entries[0].predicted_ns = 12_000;
        after.manifest.weights[1].name = "bias".to_owned();
        after.manifest.placed[0].splits[0].dim = 1;
        after.programs[0].arena_bytes = 2048;
        after.kernels[1].name = "minus_f32".to_owned();
        let text = diff(&sample::plan(), &after).text();
        for line in [
            "  target: virtual (cpu) → other (cpu)",
            "  - main input x: f32[2, 8]",
            "  + main input z: f32[2, 8]",
            "  main: 6.00 µs → 12.0 µs",
            "  rank 1 activations: 1024 B → 2048 B",
            "  - b: f32[4] from file 0+0 f32[4]",
            "  + bias: f32[4] from file 0+0 f32[4]",
            "  + w on stage 0: f32[4, 4] split 1 [0..4 | 4..8]",
            "  neg_f32: 1 → 0",
            "  minus_f32: 0 → 1",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is not in\n{text}");
        }
    }

    #[test]
    fn very_many_weights_of_one_name_are_told_apart() {
        // Looking for each one's number, or each one's place, among all of them takes minutes.
        const WEIGHTS: u32 = 40_000;
        let mut plan = sample::plan();
        let Manifest { weights, placed, .. } = &mut plan.manifest;
        *weights = vec![weights[0].clone(); WEIGHTS as usize];
        let place = |weight| PlacedWeight { weight, ..placed[0].clone() };
        *placed = (0..WEIGHTS).map(place).collect();
        let mut after = plan.clone();
        after.manifest.placed[30_000].splits.clear();
        let found = diff(&plan, &after);
        assert_eq!((found.placements.len(), found.weights.len()), (1, 0));
        let places = crate::text::text(&plan).lines().filter(|line| line.contains("weights+")).count();
        assert!(places >= WEIGHTS as usize, "{places} lines");
    }

    /// Whatever is changed, something is said.
    #[test]
    fn no_difference_is_silent() {
        let changes: [fn(&mut Plan); 9] = [
            |plan| plan.manifest.fingerprint.digest[0] = 1,
            |plan| plan.manifest.placed[0].arena_offset = 1 << 20,
            |plan| plan.programs[0].steps[0].cost.operations = 1,
            |plan| plan.programs[0].streams = 3,
            |plan| plan.explanations.names[0] = "/other".to_owned(),
            |plan| plan.explanations.alternatives.clear(),
            |plan| plan.kernels.swap(0, 1),
            |plan| {
                let Action::Launch { scalars, .. } = &mut plan.programs[0].steps[1].action else { panic!("a launch") };
                scalars.push(Argument::Fault { word: 0 });
            },
            |plan| {
                let Action::Launch { operands, .. } = &mut plan.programs[0].steps[1].action else { panic!("a launch") };
                operands[0].at = Argument::Arena { offset: 4096 };
            },
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut after = sample::plan();
            change(&mut after);
            let found = diff(&sample::plan(), &after);
            assert!(!found.same && found.text().lines().count() >= 2, "change {number}: {}", found.text());
        }
    }

    #[test]
    fn weights_of_other_bytes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, last: u8| {
            let path = folder.path().join(name);
            let image = sample::image();
            write_plan(&path, &sample::plan(), |sink| {
                sink.push(0, &image[..80])?;
                sink.push(256, &image[256..319])?;
                sink.push(319, &[last])
            })
            .map_err(|error: PlanError| error)
            .unwrap();
            PlanFile::open(&path).unwrap()
        };
        let (first, same, other) = (write("a", 1), write("b", 1), write("c", 2));
        let compare = |after: &PlanFile| {
            let mut found = diff(first.plan(), after.plan());
            values(&first, after, &mut found).unwrap();
            found
        };
        assert!(compare(&same).same);
        let found = compare(&other);
        assert_eq!((found.same, found.values.as_slice()), (false, &["w".to_owned()][..]));
        assert_eq!(found.text(), "weights of other bytes\n  w\n");
    }
}
