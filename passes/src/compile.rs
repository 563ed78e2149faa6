//! From an imported module to a plan: the pipeline, the schedule, the lowering, and why it came out so.

use ir::verify::verify;
use ir::{Mesh, Module};
use planfile::plan::{Alternative, Explanations, Plan, PlanAxis};
use planfile::text::{Duration, count};

use crate::error::{NoKernel, PassError};
use crate::lower::Assembler;
use crate::pipeline::{self, PIPELINE, advance};
use crate::schedule::Scheduled;
use crate::settings::{MeshChoice, Settings};
use crate::shard::{self, IdleAxis};
use crate::{lower, schedule};

/// A plan, and what its user should know about it.
#[derive(Debug)]
pub struct Outcome {
    pub plan: Plan,
    pub warnings: Vec<Warning>,
}

/// What the user may not have meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// An axis of the mesh splits nothing, or less than it says.
    IdleAxis(IdleAxis),
    /// The plan is predicted to be no faster than one for one device; its explanations say so, too.
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

/// The module with steps and memory, why its mesh was chosen, and what its user should know.
fn scheduled(
    module: Module,
    settings: &Settings<'_>,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<Option<(Scheduled, Explanations, Vec<Warning>)>, PassError> {
    pipeline::check(&settings.options)?;
    verify(&module)?;
    // Meshes are compared once, on the module that is sharded; the plan keeps the comparison.
    let (before, after) = PIPELINE.split_at(PIPELINE.iter().position(|pass| pass.name == "shard").unwrap_or(0));
    let (module, stopped) = advance(module, before, settings, observer)?;
    if stopped {
        return Ok(None);
    }
    let mut settings = settings.clone();
    let mut explanations = Explanations::default();
    if let MeshChoice::Devices(devices) = settings.shard.mesh {
        let ranking = shard::rank_meshes(&module, devices, &settings)?;
        if let Some(((mesh, ns), others)) = ranking.split_first() {
            explanations.sharding.push(explain(mesh, *ns, ranking.len() as u64, devices));
            explanations.alternatives = others.iter().map(|(mesh, ns)| alternative(mesh, *ns)).collect();
            settings.shard.mesh = MeshChoice::Fixed(mesh.clone());
        }
    }
    let logical = matches!(&settings.shard.mesh, MeshChoice::Fixed(mesh) if mesh.ranks() > 1).then(|| module.clone());
    let (shard_row, rest) = after.split_at(after.len().min(1));
    let (module, stopped) = advance(module, shard_row, &settings, observer)?;
    if stopped {
        return Ok(None);
    }
    let mut warnings = Vec::new();
    if let Some(logical) = logical {
        explanations.sharding.extend(shard::whole(&logical, &module, settings.target).text(&module.mesh));
        warnings = judge(&logical, &module, &settings)?;
        let slower = warnings.iter().filter(|warning| matches!(warning, Warning::Slower { .. }));
        explanations.sharding.extend(slower.map(Warning::text));
    }
    let (module, stopped) = advance(module, rest, &settings, observer)?;
    if stopped {
        return Ok(None);
    }
    Ok(Some((schedule::run(module, settings.cuda().as_ref())?, explanations, warnings)))
}

/// What there is to say about a module that was placed on several devices. `logical`: before that.
fn judge(logical: &Module, placed: &Module, settings: &Settings<'_>) -> Result<Vec<Warning>, PassError> {
    let idle = shard::idle_axes(logical, placed, &settings.shard);
    let mut warnings: Vec<Warning> = idle.into_iter().map(Warning::IdleAxis).collect();
    let one_device_ns = shard::one_device_ns(logical, settings)?;
    let predicted_ns = shard::predicted_ns(placed, settings.target);
    if one_device_ns <= predicted_ns {
        warnings.push(Warning::Slower { ranks: placed.mesh.ranks(), predicted_ns, one_device_ns });
    }
    Ok(warnings)
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
    format!("{mesh}: {chosen}, {} before operations are fused; tensors are placed by rule", Duration(predicted_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_told_in_the_singular_and_in_the_plural() {
        let mesh = Mesh { axes: vec![ir::MeshAxis::new("tensor", 2)] };
        assert_eq!(
            explain(&mesh, 1500, 2, 2),
            "tensor=2: predicted to be the fastest of all 2 meshes of data and tensor for 2 devices that the batch fills, \
             1.50 µs before operations are fused; tensors are placed by rule"
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
