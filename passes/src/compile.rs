//! From an imported module to a plan: the pipeline, the schedule, the lowering, and why it came out so.

use ir::verify::verify;
use ir::{Mesh, Module};
use planfile::plan::{Alternative, Explanations, Plan, PlanAxis};

use crate::error::PassError;
use crate::lower::Assembler;
use crate::pipeline::{PIPELINE, Settings, advance};
use crate::regions::Devices;
use crate::shard::{self, MeshChoice};
use crate::{lower, schedule};

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
) -> Result<Option<Plan>, PassError> {
    settings.options.check()?;
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
            explanations.sharding.push(explain(mesh, *ns, ranking.len(), devices));
            explanations.alternatives = others.iter().map(|(mesh, ns)| alternative(mesh, *ns)).collect();
            settings.shard.mesh = MeshChoice::Fixed(mesh.clone());
        }
    }
    let (module, stopped) = advance(module, after, &settings, observer)?;
    if stopped {
        return Ok(None);
    }
    let architecture = &settings.target.device.architecture;
    let devices = if architecture == lower::CPU {
        Devices::Host
    } else {
        let allow_tf32 = settings.options.allow_tf32;
        Devices::Cuda(kernels::cuda::Options { architecture: architecture.clone(), allow_tf32 })
    };
    let mut plan = lower::run(&schedule::run(module, &devices)?, settings.target, assembler)?;
    plan.explanations = Explanations { names: plan.explanations.names, ..explanations };
    Ok(Some(plan))
}

fn alternative(mesh: &Mesh, predicted_ns: u64) -> Alternative {
    let axis = |axis: &ir::MeshAxis| PlanAxis { name: axis.name.clone(), size: axis.size() };
    Alternative { mesh: mesh.axes.iter().map(axis).collect(), predicted_ns }
}

fn explain(mesh: &Mesh, predicted_ns: u64, candidates: usize, devices: u32) -> String {
    let axes: Vec<String> = mesh.axes.iter().map(|axis| format!("{}={}", axis.name, axis.size())).collect();
    let mesh = if axes.is_empty() { "one device".to_owned() } else { axes.join(",") };
    let micros = predicted_ns as f64 / 1e3;
    format!("{mesh}: predicted {micros:.1} µs, the fastest of {candidates} meshes tried for {devices} devices")
}
