//! From an imported module to a plan: the pipeline, the schedule, the lowering, and why it came out so.

use ir::{Mesh, Module};
use planfile::plan::{Alternative, Plan, PlanAxis};

use crate::error::PassError;
use crate::pipeline::{self, Settings};
use crate::shard::{self, MeshChoice};
use crate::{lower, schedule};

/// Compiles. `None` when the options stop the pipeline before its end. `observer` sees the module after each pass.
///
/// # Errors
/// What the passes report.
pub fn run(
    module: Module,
    settings: &Settings<'_>,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<Option<Plan>, PassError> {
    let mut whole = None;
    let sharded = pipeline::run(module, settings, &mut |pass, module| {
        if pass == "simplify" && matches!(settings.shard.mesh, MeshChoice::Devices(_)) {
            whole = Some(module.clone());
        }
        observer(pass, module);
    })?;
    if settings.options.stop_after.is_some() {
        return Ok(None);
    }
    let mut plan = lower::run(&schedule::run(sharded)?, settings.target)?;
    if let (Some(whole), MeshChoice::Devices(devices)) = (whole, &settings.shard.mesh) {
        let ranking = shard::rank_meshes(&whole, *devices, settings)?;
        let others = ranking.iter().skip(1);
        plan.explanations.alternatives = others.map(|(mesh, ns)| alternative(mesh, *ns)).collect();
        if let Some((mesh, ns)) = ranking.first() {
            plan.explanations.sharding.push(explain(mesh, *ns, ranking.len(), *devices));
        }
    }
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
