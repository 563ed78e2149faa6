//! The text form of a whole plan: for reading, for snapshots, and for `diff`.
//!
//! One fact a line, in the order of the plan; weights' bytes and machine code only by their size, hashes not at all.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write};

use crate::attributes::{attributes, real};
use crate::container::FORMAT_VERSION;
use crate::expr::{Expr, ExprOp, Scalar};
use crate::frozen::FrozenSummary;
use crate::infer::infer;
use crate::op::{Op, Real};
use crate::plan::{
    Action, Argument, Binding, Edge, EdgeKind, Implementation, Kernel, LaunchShape, Place, PlacedWeight, Plan,
    PlanAxis, PlanWeight, Program, SplitDim, Step, Task,
};
use crate::spec::{Recipe, Source, Spec, SpecNode};
use crate::summary::memory;
use crate::types::TensorType;

/// The whole plan as text; the same for the same plan.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_plan(&mut out, plan);
    out
}

fn write_plan(out: &mut String, plan: &Plan) -> fmt::Result {
    let manifest = &plan.manifest;
    writeln!(out, "plan {}: format {FORMAT_VERSION}, {}", manifest.model, manifest.producer)?;
    writeln!(out, "target {} ({})", manifest.target.name, manifest.target.architecture)?;
    writeln!(out, "mesh {}", mesh(&manifest.mesh, manifest.ranks))?;
    for (index, file) in manifest.files.iter().enumerate() {
        writeln!(out, "file {index} {} {}", file.name, Bytes(file.bytes))?;
    }
    for link in &manifest.links {
        writeln!(out, "link {}-{} {}", link.ranks.0, link.ranks.1, link.class)?;
    }
    for entry in &manifest.entries {
        writeln!(out, "\nentry {}  {}", entry.name, Duration(entry.predicted_ns))?;
        for port in &entry.inputs {
            writeln!(out, "  input {} {}", port.name, port.ty)?;
        }
        for frozen in &entry.frozen {
            writeln!(out, "  frozen {}", FrozenSummary::from(frozen).text())?;
        }
        for port in &entry.outputs {
            writeln!(out, "  output {} {}", port.name, port.ty)?;
        }
    }
    writeln!(out, "\nmemory")?;
    for device in memory(plan) {
        let [weights, activations] = [Bytes(device.weight_bytes), Bytes(device.activation_bytes)];
        let [peers, states] = [Bytes(device.peer_bytes), Bytes(device.state_bytes)];
        let rank = device.rank;
        writeln!(out, "  rank {rank}: weights {weights}, activations {activations}, peers {peers}, states {states}")?;
    }
    for (index, state) in manifest.states.iter().enumerate() {
        writeln!(
            out,
            "  state {index} {} {} at {:#x}, extent {}",
            state.name, state.ty, state.arena_offset, state.extent.0
        )?;
    }
    writeln!(out, "\nweights {}", Bytes(manifest.image_bytes))?;
    let mut placed: BTreeMap<usize, Vec<&PlacedWeight>> = BTreeMap::new();
    manifest.placed.iter().for_each(|part| placed.entry(part.weight as usize).or_default().push(part));
    for (index, weight) in manifest.weights.iter().enumerate() {
        write_weight(out, weight, placed.get(&index).map_or(&[], Vec::as_slice))?;
    }
    for (index, kernel) in plan.kernels.iter().enumerate() {
        write_kernel(out, index, kernel)?;
    }
    for (index, code) in plan.code.iter().enumerate() {
        writeln!(out, "\ncode {index} {} {}", code.architecture, Bytes(code.cubin.len() as u64))?;
    }
    for (index, program) in plan.programs.iter().enumerate() {
        write_program(out, plan, index, program)?;
    }
    if !plan.explanations.sharding.is_empty() || !plan.explanations.alternatives.is_empty() {
        writeln!(out, "\nwhy")?;
    }
    for sentence in &plan.explanations.sharding {
        writeln!(out, "  {sentence}")?;
    }
    for alternative in &plan.explanations.alternatives {
        writeln!(out, "  instead {}: {}", axes(&alternative.mesh), Duration(alternative.predicted_ns))?;
    }
    Ok(())
}

fn write_weight(out: &mut String, weight: &PlanWeight, placed: &[&PlacedWeight]) -> fmt::Result {
    writeln!(out, "  {} {} from {}", weight.name, weight.ty, recipe(&weight.recipe))?;
    for PlacedWeight { stage, arena_offset, ty, splits, images, .. } in placed {
        let images: Vec<String> = images.iter().map(|image| format!("{image:#x}")).collect();
        writeln!(
            out,
            "    stage {stage} weights+{arena_offset:#x} {ty}{} images {}",
            Splits(splits),
            images.join(", ")
        )?;
    }
    Ok(())
}

/// Ingredients, then the primitives applied to them.
pub(crate) fn recipe(recipe: &Recipe) -> String {
    let inputs = recipe.inputs.iter().map(|input| match &input.source {
        Source::File { file, offset } => format!("file {file}+{offset} {}", input.ty),
        Source::Inline(_) => format!("constant {}", input.ty),
        Source::Random { seed } => format!("random {seed} {}", input.ty),
    });
    inputs.chain(primitives(&recipe.spec)).collect::<Vec<_>>().join(", ")
}

/// Each primitive with the types it results in.
pub(crate) fn primitives(spec: &Spec) -> Vec<String> {
    let types = |results: Vec<(usize, TensorType)>| {
        results.into_iter().map(|(_, ty)| format!(" {ty}")).collect::<Vec<_>>().join(",")
    };
    spec.nodes.iter().zip(results(spec)).map(|(node, made)| format!("{}{}", operation(&node.op), types(made))).collect()
}

/// For each node of a specification, its results by number, as far as they can be inferred.
fn results(spec: &Spec) -> Vec<Vec<(usize, TensorType)>> {
    let types = spec.types().unwrap_or_default();
    let mut known = spec.inputs.len();
    let made = |node: &SpecNode| {
        let taken: Option<Vec<_>> = node.operands.iter().map(|&operand| types.get(operand as usize)).collect();
        let count = taken.and_then(|taken| infer(&node.op, &taken).ok()).map_or(1, |results| results.len());
        let end = types.len().min(known + count);
        let made = types.get(known..end).unwrap_or_default().iter().cloned();
        let made = made.enumerate().map(|(number, ty)| (known + number, ty)).collect();
        known += count;
        made
    };
    spec.nodes.iter().map(made).collect()
}

/// What executes a kernel.
pub(crate) fn implementation(implementation: &Implementation) -> String {
    match implementation {
        Implementation::Reference => "reference".to_owned(),
        Implementation::Cuda { code, symbol, rule } => format!("code {code} {symbol} {rule}"),
        Implementation::Library { library, version, call } => {
            let version = if version.is_empty() { String::new() } else { format!(" {version}") };
            format!("{library}{version} {call}")
        }
    }
}

fn write_kernel(out: &mut String, index: usize, kernel: &Kernel) -> fmt::Result {
    let inputs: Vec<String> =
        kernel.spec.inputs.iter().enumerate().map(|(value, ty)| format!("%{value}: {ty}")).collect();
    let by = implementation(&kernel.implementation);
    writeln!(out, "\nkernel {index} {} ({}) {by}", kernel.name, inputs.join(", "))?;
    for (node, made) in kernel.spec.nodes.iter().zip(results(&kernel.spec)) {
        let operands: Vec<String> = node.operands.iter().map(|operand| format!("%{operand}")).collect();
        let made: Vec<String> = made.iter().map(|(value, ty)| format!("%{value}: {ty}")).collect();
        writeln!(out, "  {} = {} {}", made.join(", "), operation(&node.op), operands.join(", "))?;
    }
    let results: Vec<String> = kernel.spec.results.iter().map(|result| format!("%{result}")).collect();
    writeln!(out, "  return {}", results.join(", "))
}

fn write_program(out: &mut String, plan: &Plan, index: usize, program: &Program) -> fmt::Result {
    let entry = plan.manifest.entries.get(program.entry as usize);
    let name = entry.map_or("", |entry| &entry.name);
    writeln!(
        out,
        "\nprogram {index}: entry {name}, stage {}, ranks {:?}, {}, arena {}, peers {}",
        program.stage,
        program.ranks,
        count(u64::from(program.streams), "stream"),
        Bytes(program.arena_bytes),
        Bytes(program.peer_arena_bytes)
    )?;
    let show = Show { plan, stage: program.stage };
    let mut bind = |what: &str, binding: &Binding, names: &dyn Fn(usize) -> Option<String>| {
        let name = names(binding.port as usize).unwrap_or_else(|| binding.port.to_string());
        writeln!(out, "  {what} {name} {}{}", show.place(&binding.place), Splits(&binding.splits))
    };
    for binding in &program.inputs {
        bind("input", binding, &|port| Some(entry?.inputs.get(port)?.name.clone()))?;
    }
    for binding in &program.outputs {
        bind("output", binding, &|port| Some(entry?.outputs.get(port)?.name.clone()))?;
    }
    for (position, step) in program.steps.iter().enumerate() {
        write_step(out, &show, position, step)?;
    }
    Ok(())
}

fn write_step(out: &mut String, show: &Show<'_>, position: usize, step: &Step) -> fmt::Result {
    write!(out, "  #{position} s{} {}", step.stream, show.action(&step.action))?;
    write!(out, "  {}", Duration(step.cost.predicted_ns))?;
    if step.cost.link_bytes > 0 {
        write!(out, " {} sent", Bytes(step.cost.link_bytes))?;
    }
    let names = &show.plan.explanations.names;
    let origin: Vec<&str> =
        step.origin.iter().filter_map(|&name| names.get(name as usize)).map(String::as_str).collect();
    if !origin.is_empty() {
        write!(out, "  {}", origin.join(", "))?;
    }
    for (number, Edge { from, kind }) in step.waits.iter().enumerate() {
        write!(out, "{} #{from}", if number == 0 { "  after" } else { "," })?;
        match kind {
            EdgeKind::Full => {}
            EdgeKind::Programmatic => write!(out, " early")?,
            EdgeKind::Signal { offset, .. } => write!(out, " on all ranks by peers+{offset:#x}")?,
        }
    }
    writeln!(out)?;
    if let Action::Persistent { tasks, counters, .. } = &step.action {
        for (number, task) in tasks.iter().enumerate() {
            writeln!(out, "    {number}: {}", show.task(task))?;
        }
        let thresholds: Vec<String> = counters.iter().map(|counter| counter.threshold.to_string()).collect();
        writeln!(out, "    counters {}", thresholds.join(", "))?;
    }
    Ok(())
}

/// Shows parts of a program with the names that the plan has for them.
struct Show<'a> {
    plan: &'a Plan,
    stage: u32,
}

impl Show<'_> {
    fn action(&self, action: &Action) -> String {
        match action {
            Action::Launch { kernel, operands, results, scalars, launch } => {
                let mut text = format!("launch {} {}", self.kernel(*kernel), self.flow(operands, results));
                if !scalars.is_empty() {
                    let scalars: Vec<String> = scalars.iter().map(|scalar| self.argument(scalar)).collect();
                    text.push_str(&format!(" with {}", scalars.join(", ")));
                }
                text.push_str(&shape(launch.as_ref()));
                text
            }
            Action::Library { kernel, operands, results, workspace, .. } => {
                let workspace = workspace.as_ref().map(|place| format!(" workspace {}", self.place(place)));
                let flow = self.flow(operands, results);
                format!("library {} {flow}{}", self.kernel(*kernel), workspace.unwrap_or_default())
            }
            Action::Collective { op, operands, results, algorithm } => {
                format!("{} {} by {algorithm}", operation(op), self.flow(operands, results))
            }
            Action::Copy { from, to } => format!("copy ({}) -> {}", self.place(from), self.place(to)),
            Action::Persistent { tasks, launch, .. } => {
                format!("persistent {}{}", count(tasks.len() as u64, "task"), shape(launch.as_ref()))
            }
        }
    }

    fn task(&self, task: &Task) -> String {
        let Task { kernel, block, tiles, operands, results, waits, signals } = task;
        let flow = self.flow(operands, results);
        let name = self.kernel(*kernel);
        format!("block {block} {name}[{}..{}] {flow} waits {waits:?} signals {signals:?}", tiles.0, tiles.1)
    }

    fn kernel(&self, index: u32) -> String {
        let found = self.plan.kernels.get(index as usize);
        found.map_or_else(|| format!("kernel {index}"), |kernel| format!("{}@{index}", kernel.name))
    }

    fn flow(&self, operands: &[Place], results: &[Place]) -> String {
        let list = |places: &[Place]| places.iter().map(|place| self.place(place)).collect::<Vec<_>>().join(", ");
        let arrow = if results.is_empty() { "" } else { " -> " };
        format!("({}){arrow}{}", list(operands), list(results))
    }

    fn place(&self, place: &Place) -> String {
        format!("{} {}", self.argument(&place.at), place.ty)
    }

    fn argument(&self, argument: &Argument) -> String {
        match argument {
            Argument::Arena { offset } => format!("arena+{offset:#x}"),
            Argument::Weights { offset } => match self.weight(*offset) {
                Some(name) => format!("weights+{offset:#x} {name}"),
                None => format!("weights+{offset:#x}"),
            },
            Argument::Peer { rank, offset } => format!("peer({rank})+{offset:#x}"),
            Argument::State { state, offset } => {
                let name = self.plan.manifest.states.get(*state as usize).map_or("", |state| &state.name);
                format!("state {state}+{offset:#x} {name}")
            }
            Argument::Extent { extent } => format!("extent {}", extent.0),
            Argument::Epoch => "epoch".to_owned(),
            Argument::TensorMap { offset, block } => format!("map arena+{offset:#x} {block:?}"),
            Argument::Scalar { value } => value.to_string(),
            Argument::Fault { word } => format!("fault {word}"),
        }
    }

    fn weight(&self, offset: u64) -> Option<&str> {
        let manifest = &self.plan.manifest;
        let here = |placed: &&PlacedWeight| placed.stage == self.stage && placed.arena_offset == offset;
        let placed = manifest.placed.iter().find(here)?;
        Some(&manifest.weights.get(placed.weight as usize)?.name)
    }
}

fn shape(launch: Option<&LaunchShape>) -> String {
    launch.map_or_else(String::new, ToString::to_string)
}

/// With a space before it: the end of a line about a step.
impl Display for LaunchShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { grid: [x, y, z], block, shared_bytes } = self;
        write!(f, " grid [{x}, {y}, {z}] block {block:?} shared {shared_bytes}")
    }
}

/// An operation with its attributes; expressions in postfix.
pub fn operation(op: &Op) -> String {
    format!("{}{}", op.name(), attributes(op, &postfix))
}

fn postfix(expr: &Expr) -> String {
    let ops = expr.ops.iter().map(|op| match op {
        ExprOp::Operand(index) => format!("x{index}"),
        ExprOp::Const(scalar) => constant(*scalar),
        ExprOp::Index { axis, base } => format!("index({axis}, {base})"),
        ExprOp::Set(slot) => format!("set{slot}"),
        ExprOp::Get(slot) => format!("get{slot}"),
        ExprOp::Cast(dtype) => dtype.to_string(),
        ExprOp::Unary(op) => op.to_string(),
        ExprOp::Binary(op) => op.to_string(),
        ExprOp::Compare(op) => op.to_string(),
        ExprOp::Select => "select".to_owned(),
    });
    ops.collect::<Vec<_>>().join(" ")
}

fn constant(scalar: Scalar) -> String {
    match scalar.to_i64() {
        Some(value) => format!("{value}:{}", scalar.dtype),
        None => format!("{}:{}", real(Real(scalar.to_f64())), scalar.dtype),
    }
}

/// `data=2,tensor=2 on 4 ranks`.
pub(crate) fn mesh(axes_: &[PlanAxis], ranks: u32) -> String {
    let axes = if axes_.is_empty() { String::new() } else { format!("{} on ", axes(axes_)) };
    format!("{axes}{}", count(u64::from(ranks), "rank"))
}

pub(crate) fn axes(mesh: &[PlanAxis]) -> String {
    mesh.iter().map(|axis| format!("{}={}", axis.name, axis.size)).collect::<Vec<_>>().join(",")
}

/// ` split 1 [0..4 | 4..8]`: per rank, its pieces; where they do not lie at the start of the part, `@` says where.
pub(crate) struct Splits<'a>(pub(crate) &'a [SplitDim]);

impl Display for Splits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for split in self.0 {
            let ranks = split.pieces.iter().map(|pieces| {
                let mut filled = 0;
                let shown = pieces.iter().map(|piece| {
                    let gap = if piece.local == filled { String::new() } else { format!("@{}", piece.local) };
                    filled = piece.local.saturating_add(piece.len);
                    format!("{}..{}{gap}", piece.global, piece.global.saturating_add(piece.len))
                });
                shown.collect::<Vec<_>>().join(" ")
            });
            write!(f, " split {} [{}]", split.dim, ranks.collect::<Vec<_>>().join(" | "))?;
        }
        Ok(())
    }
}

/// `1 step`, `2 steps`: for nouns that take an `s`.
pub fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Items of a list that a sentence names.
const NAMED: usize = 8;

/// `a, b, c`; of a long list the first few, and how many more there are: `a, b, … and 7998 more`.
pub fn few<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut items = items.into_iter();
    let mut text = String::new();
    for (number, item) in items.by_ref().take(NAMED).enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}{item}", if number == 0 { "" } else { ", " });
    }
    match items.count() {
        0 => text,
        more => format!("{text}, … and {more} more"),
    }
}

/// Exact up to a few thousand, then also rounded.
pub struct Bytes(pub u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 10_240 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

/// Of nanoseconds, with three digits.
pub struct Duration(pub u64);

impl Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["ns", "µs", "ms", "s"];
        if self.0 < 1000 {
            return write!(f, "{} ns", self.0);
        }
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1000.0 && unit + 1 < UNITS.len() {
            value /= 1000.0;
            unit += 1;
        }
        let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        write!(f, "{value:.digits$} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn a_plan_reads_well() {
        insta::assert_snapshot!(text(&sample::plan()));
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!([0, 1, 2].map(|number| count(number, "step")), ["0 steps", "1 step", "2 steps"]);
        assert_eq!(mesh(&[], 1), "1 rank");
        assert_eq!(mesh(&[PlanAxis { name: "data".to_owned(), size: 2 }], 2), "data=2 on 2 ranks");
    }

    #[test]
    fn long_lists_are_named_by_their_first() {
        assert_eq!([few([0; 0]), few(["a"]), few(["a", "b"])], ["", "a", "a, b"]);
        assert_eq!(few(1..9), "1, 2, 3, 4, 5, 6, 7, 8");
        assert_eq!(few(1..8001), "1, 2, 3, 4, 5, 6, 7, 8, … and 7992 more");
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(Bytes(4096).to_string(), "4096 B");
        assert_eq!(Bytes(3 << 20).to_string(), "3.0 MiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "16.0 EiB");
        let durations = [999, 1500, 42_000, 999_000_000, 7_200_000_000_000].map(|ns| Duration(ns).to_string());
        assert_eq!(durations, ["999 ns", "1.50 µs", "42.0 µs", "999 ms", "7200 s"]);
    }
}
