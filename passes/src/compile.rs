//! From an imported module to a plan: the pipeline, the schedule, the lowering, and why it came out so.

use std::panic::resume_unwind;
use std::thread;

use ir::verify::verify;
use ir::{Mesh, Module};
use planfile::plan::{Alternative, Explanations, Plan, PlanAxis};
use planfile::text::{Duration, count};

use crate::error::{NoKernel, PassError};
use crate::lower::Assembler;
use crate::phase::{Logical, Scheduled, Sharded};
use crate::pipeline::{self, Pipeline};
use crate::settings::{MeshChoice, Settings};
use crate::shard::{self, IdleAxis};
use crate::{LOGICAL, SHARD, lower};

/// A plan, and what its user should know about it.
#[derive(Debug)]
pub struct Outcome {
    pub plan: Plan,
    pub warnings: Vec<Warning>,
}

/// What the user may not have meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// An axis of the mesh splits nothing, or less than it says; as with what follows, the plan's explanations say so, too.
    IdleAxis(IdleAxis),
    /// The plan is predicted to be no faster than one for one device.
    Slower { ranks: u32, predicted_ns: u64, one_device_ns: u64 },
}

impl Warning {
    /// A sentence.
    pub fn text(&self) -> String {
        match self {
            Self::IdleAxis(idle) => idle.text(),
            Self::Slower { ranks, predicted_ns, one_device_ns } => format!(
                "{} are predicted to take {}, one device takes {}: a plan for one device is {}",
                count(u64::from(*ranks), "device"),
                Duration(*predicted_ns),
                Duration(*one_device_ns),
                if predicted_ns == one_device_ns { "as fast" } else { "faster" },
            ),
        }
    }
}

/// Compiles. `None` when the options stop the pipeline before its end. `assembler` makes machine code of kernels where the
/// target is no host; `observer` sees the module after each pass.
///
/// # Errors
/// What the passes report.
pub fn run(
    module: Module,
    settings: &Settings<'_>,
    assembler: &dyn Assembler,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<Option<Outcome>, PassError> {
    let Some((scheduled, explanations, warnings)) = scheduled(module, settings, observer)? else { return Ok(None) };
    let mut plan = lower::run(&scheduled, settings.target, assembler)?;
    plan.explanations = Explanations { names: plan.explanations.names, ..explanations };
    Ok(Some(Outcome { plan, warnings }))
}

/// The model's nodes that no kernel of the target takes, by name, and why.
///
/// # Errors
/// What the passes report.
pub fn without_kernels(module: Module, settings: &Settings<'_>) -> Result<Vec<(String, String)>, PassError> {
    match scheduled(module, settings, &mut |_, _| {}) {
        Ok(_) => Ok(Vec::new()),
        Err(PassError::NoKernels(missing)) => {
            let named =
                |NoKernel { origin, why, .. }: NoKernel| origin.into_iter().map(move |node| (node, why.clone()));
            Ok(missing.into_iter().flat_map(named).collect())
        }
        Err(error) => Err(error),
    }
}

/// What became of a module, why its mesh was chosen, and what its user should know.
type Explained = (Scheduled, Explanations, Vec<Warning>);

/// Takes the module as far as memory. `None` when the options stop the pipeline before.
fn scheduled(
    module: Module,
    settings: &Settings<'_>,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<Option<Explained>, PassError> {
    pipeline::check(&settings.options)?;
    verify(&module)?;
    let mut pipeline = Pipeline { settings: settings.clone(), observer };
    let Some(logical) = pipeline.passes(LOGICAL, Logical(module))? else { return Ok(None) };
    let choice = Choice::new(&logical, settings)?;
    pipeline.settings.shard.mesh = MeshChoice::Fixed(choice.mesh.clone());
    let whole = (choice.mesh.ranks() > 1).then(|| logical.clone());
    let Some(sharded) = pipeline.pass(&SHARD, logical)? else { return Ok(None) };
    let placed = whole.as_ref().map(|Logical(whole)| Placed::new(whole, &sharded, &pipeline.settings));
    let (scheduled, one_device) = match &whole {
        None => (pipeline.finish(sharded), None),
        Some(whole) => {
            let one_device = || Some(predicted(whole.clone(), &Mesh::default(), settings));
            beside(one_device, || pipeline.finish(sharded))
        }
    };
    let Some(scheduled) = scheduled? else { return Ok(None) };
    let predicted_ns = scheduled.predicted_ns();
    let mut explanations = choice.explained(predicted_ns);
    let mut warnings = Vec::new();
    if let (Some(one_device), Some(placed)) = (one_device, placed) {
        explanations.sharding.extend(placed.whole);
        warnings.extend(placed.idle.into_iter().map(Warning::IdleAxis));
        let ranks = choice.mesh.ranks();
        if let Some(one_device_ns) = one_device?.filter(|&one_device_ns| one_device_ns <= predicted_ns) {
            warnings.push(Warning::Slower { ranks, predicted_ns, one_device_ns });
        }
        explanations.sharding.extend(warnings.iter().map(Warning::text));
    }
    Ok(Some((scheduled, explanations, warnings)))
}

/// What there is to say of a module on several devices.
struct Placed {
    /// What stayed whole, as a sentence.
    whole: Option<String>,
    idle: Vec<IdleAxis>,
}

impl Placed {
    fn new(logical: &Module, Sharded(placed): &Sharded, settings: &Settings<'_>) -> Self {
        let whole = shard::whole(logical, placed, settings.target).text(&placed.mesh);
        Self { whole, idle: shard::idle_axes(logical, placed, &settings.shard) }
    }
}

/// A mesh, and those that it was compared with.
struct Choice {
    mesh: Mesh,
    /// Devices that a mesh was wanted for; none where it was given.
    devices: Option<u32>,
    /// The others with their predicted times, fastest first; last those for which there is no plan.
    others: Vec<(Mesh, Option<u64>)>,
}

impl Choice {
    /// The mesh that is given, or of all for so many devices the one whose plan is predicted to be fastest.
    fn new(logical: &Logical, settings: &Settings<'_>) -> Result<Self, PassError> {
        let devices = match &settings.shard.mesh {
            MeshChoice::Fixed(mesh) => return Ok(Self { mesh: mesh.clone(), devices: None, others: Vec::new() }),
            &MeshChoice::Devices(devices) => devices,
        };
        let candidates = shard::candidate_meshes(&logical.0, devices, settings.shard.batch_dim);
        let mut ranking = Vec::with_capacity(candidates.len());
        match <[Mesh; 1]>::try_from(candidates) {
            // Nothing to compare it with.
            Ok([only]) => ranking.push((only, None)),
            Err(candidates) => {
                let times = predicted_on(logical, &candidates, settings)?;
                ranking.extend(candidates.into_iter().zip(times));
            }
        }
        ranking.sort_by_key(|(_, ns)| ns.unwrap_or(u64::MAX));
        let mut ranking = ranking.into_iter();
        let (mesh, _) = ranking.next().ok_or_else(|| PassError::invalid("shard", "no candidate mesh"))?;
        Ok(Self { mesh, devices: Some(devices), others: ranking.collect() })
    }

    fn explained(&self, predicted_ns: u64) -> Explanations {
        let Some(devices) = self.devices else { return Explanations::default() };
        let alternatives = self.others.iter().filter_map(|(mesh, ns)| Some(alternative(mesh, (*ns)?))).collect();
        let sharding = vec![explain(&self.mesh, predicted_ns, 1 + self.others.len() as u64, devices)];
        Explanations { sharding, alternatives, ..Explanations::default() }
    }
}

/// As [`predicted`] on each mesh, all at once.
fn predicted_on(logical: &Logical, meshes: &[Mesh], settings: &Settings<'_>) -> Result<Vec<Option<u64>>, PassError> {
    let Some((last, before)) = meshes.split_last() else { return Ok(Vec::new()) };
    let trial = || predicted(logical.clone(), last, settings);
    let (times, last) = match before {
        [] => (Ok(Vec::new()), trial()),
        before => beside(trial, || predicted_on(logical, before, settings)),
    };
    let mut times = times?;
    times.push(last?);
    Ok(times)
}

/// Stack of a thread: that of a program's first one on Linux.
const STACK_BYTES: usize = 8 << 20;

/// Does both at once, `other` on a thread of its own; one after the other where there are no more threads.
fn beside<A, B: Send>(other: impl Fn() -> B + Sync, own: impl FnOnce() -> A) -> (A, B) {
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, &other);
        let own = own();
        let other =
            thread.map_or_else(|_| other(), |thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        (own, other)
    })
}

/// Time of the plan on that mesh; `None` where the target has no kernel for a step of it.
fn predicted(logical: Logical, mesh: &Mesh, settings: &Settings<'_>) -> Result<Option<u64>, PassError> {
    let mut settings = settings.clone();
    settings.shard.mesh = MeshChoice::Fixed(mesh.clone());
    match pipeline::trial(logical, &settings) {
        Ok(scheduled) => Ok(Some(scheduled.predicted_ns())),
        Err(PassError::NoKernels(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn alternative(mesh: &Mesh, predicted_ns: u64) -> Alternative {
    let axis = |axis: &ir::MeshAxis| PlanAxis { name: axis.name.clone(), size: axis.size() };
    Alternative { mesh: mesh.axes.iter().map(axis).collect(), predicted_ns }
}

fn explain(mesh: &Mesh, predicted_ns: u64, candidates: u64, devices: u32) -> String {
    let axes: Vec<String> = mesh.axes.iter().map(|axis| format!("{}={}", axis.name, axis.size())).collect();
    let mesh = if axes.is_empty() { "one device".to_owned() } else { axes.join(",") };
    let devices = count(u64::from(devices), "device");
    let chosen = match candidates {
        1 => format!("the only mesh of data and tensor for {devices} that the batch fills"),
        _ => format!(
            "predicted to be the fastest of all {candidates} meshes of data and tensor for {devices} that the batch fills"
        ),
    };
    format!("{mesh}: {chosen}, {}; tensors are placed by rule", Duration(predicted_ns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{CPU, Machine, parse};
    use crate::lower::NoAssembler;

    #[test]
    fn meshes_are_compared_by_the_times_that_their_plans_state() {
        let text = "%x: f32[64, 256]
            %w: f32[256, 1024] = weight file 0 at 0
            %v: f32[1024, 256] = weight file 0 at 1048576
            %h = dot %x, %w {contract [1]x[0]}
            %a = pointwise %h {max($0, 0.0)}
            %y = dot %a, %v {contract [1]x[0]}
            return %y, %w";
        let plan_on = |mesh: MeshChoice| {
            let mut machine = Machine::new(CPU);
            machine.target = machine.target.with_devices(4);
            machine.shard.mesh = mesh;
            run(parse(text), &machine.settings(), &NoAssembler, &mut |_, _| {}).unwrap().unwrap().plan
        };
        let best = plan_on(MeshChoice::Devices(4));
        let stated = Duration(best.manifest.entries[0].predicted_ns).to_string();
        assert!(best.explanations.sharding[0].contains(&format!(", {stated}; ")), "{:?}", best.explanations);
        let [first, second] = best.explanations.alternatives.as_slice() else { panic!("{:?}", best.explanations) };
        for alternative in [first, second] {
            let axes = alternative.mesh.iter().map(|axis| ir::MeshAxis::new(&axis.name, axis.size)).collect();
            let plan = plan_on(MeshChoice::Fixed(Mesh { axes }));
            assert_eq!(plan.manifest.entries[0].predicted_ns, alternative.predicted_ns);
            assert!(alternative.predicted_ns >= best.manifest.entries[0].predicted_ns);
        }
    }

    #[test]
    fn choices_are_told_in_the_singular_and_in_the_plural() {
        let mesh = Mesh { axes: vec![ir::MeshAxis::new("tensor", 2)] };
        assert_eq!(
            explain(&mesh, 1500, 2, 2),
            "tensor=2: predicted to be the fastest of all 2 meshes of data and tensor for 2 devices that the batch fills, \
             1.50 µs; tensors are placed by rule"
        );
        let one = explain(&Mesh::default(), 1500, 1, 1);
        assert!(one.starts_with("one device: the only mesh of data and tensor for 1 device that"), "{one}");
    }

    #[test]
    fn plans_that_are_no_faster_say_both_times() {
        let slower = |predicted_ns| Warning::Slower { ranks: 64, predicted_ns, one_device_ns: 2000 }.text();
        let text = "64 devices are predicted to take 812 µs, one device takes 2.00 µs: a plan for one device is faster";
        assert_eq!(slower(812_000), text);
        assert!(slower(2000).ends_with("a plan for one device is as fast"));
    }
}
