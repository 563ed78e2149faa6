//! A plan in few numbers: for the table after compiling, and as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::frozen::FrozenSummary;
use crate::plan::{Action, Manifest, Plan, PlanAxis, PlanEntry, PlanPort, Program};

/// What a plan is and needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub model: String,
    pub producer: String,
    pub target: String,
    pub architecture: String,
    pub mesh: Vec<PlanAxis>,
    pub ranks: u32,
    pub entries: Vec<EntrySummary>,
    pub devices: Vec<DeviceMemory>,
    pub weights: usize,
    /// Bytes of the model's weights by element type, each weight once and whole.
    pub weight_bytes: BTreeMap<&'static str, u64>,
    /// Bytes of all ranks' weights in the file; what ranks share counts once.
    pub image_bytes: u64,
    pub kernels: usize,
    pub code_bytes: u64,
}

/// Memory that the plan reserves on one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    pub rank: u32,
    pub weight_bytes: u64,
    /// Of the entry that needs most.
    pub activation_bytes: u64,
    /// Of the entry that needs most.
    pub peer_bytes: u64,
    pub state_bytes: u64,
}

/// An entry: its signature and its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EntrySummary {
    pub name: String,
    pub inputs: Vec<PortSummary>,
    pub outputs: Vec<PortSummary>,
    /// Inputs whose values were bound at compile time, because shapes or branches depend on them.
    pub frozen: Vec<FrozenSummary>,
    pub predicted_ns: u64,
    pub stages: Vec<StageSummary>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortSummary {
    pub name: String,
    /// Such as `f32[2, 8]`.
    pub ty: String,
}

/// One stage's steps; costs are of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StageSummary {
    pub ranks: Vec<u32>,
    pub streams: u32,
    /// Number of steps by kind: `launch`, `library`, `copy`, `persistent`, or the collective's name.
    pub steps: BTreeMap<&'static str, usize>,
    /// Bytes that collectives send, by name.
    pub collective_bytes: BTreeMap<&'static str, u64>,
    /// Of all steps, one after the other.
    pub predicted_ns: u64,
    pub operations: u64,
    pub memory_bytes: u64,
    pub link_bytes: u64,
}

/// The summary of any plan; sums that overflow stay at the largest number.
pub fn summary(plan: &Plan) -> Summary {
    let manifest = &plan.manifest;
    Summary {
        model: manifest.model.clone(),
        producer: manifest.producer.clone(),
        target: manifest.target.name.clone(),
        architecture: manifest.target.architecture.clone(),
        mesh: manifest.mesh.clone(),
        ranks: manifest.ranks,
        entries: manifest.entries.iter().map(|entry| entry_summary(plan, entry)).collect(),
        devices: memory(plan),
        weights: manifest.weights.len(),
        weight_bytes: weight_bytes(manifest),
        image_bytes: manifest.image_bytes,
        kernels: plan.kernels.len(),
        code_bytes: plan.code.iter().map(|code| code.cubin.len() as u64).sum(),
    }
}

fn weight_bytes(manifest: &Manifest) -> BTreeMap<&'static str, u64> {
    let mut bytes: BTreeMap<&'static str, u64> = BTreeMap::new();
    for weight in &manifest.weights {
        let sum = bytes.entry(weight.ty.dtype.name()).or_default();
        *sum = sum.saturating_add(weight.ty.bytes().unwrap_or(u64::MAX));
    }
    bytes
}

fn entry_summary(plan: &Plan, entry: &PlanEntry) -> EntrySummary {
    let ports = |ports: &[PlanPort]| {
        let port = |port: &PlanPort| PortSummary { name: port.name.clone(), ty: port.ty.to_string() };
        ports.iter().map(port).collect()
    };
    let programs = entry.programs.iter().filter_map(|&program| plan.programs.get(program as usize));
    EntrySummary {
        name: entry.name.clone(),
        inputs: ports(&entry.inputs),
        outputs: ports(&entry.outputs),
        frozen: entry.frozen.iter().map(FrozenSummary::from).collect(),
        predicted_ns: entry.predicted_ns,
        stages: programs.map(stage_summary).collect(),
    }
}

fn stage_summary(program: &Program) -> StageSummary {
    let mut stage = StageSummary { ranks: program.ranks.clone(), streams: program.streams, ..Default::default() };
    for step in &program.steps {
        let kind = match &step.action {
            Action::Launch { .. } => "launch",
            Action::Library { .. } => "library",
            Action::Collective { op, .. } => op.name(),
            Action::Copy { .. } => "copy",
            Action::Persistent { .. } => "persistent",
        };
        *stage.steps.entry(kind).or_default() += 1;
        if matches!(step.action, Action::Collective { .. }) {
            let bytes = stage.collective_bytes.entry(kind).or_default();
            *bytes = bytes.saturating_add(step.cost.link_bytes);
        }
        stage.predicted_ns = stage.predicted_ns.saturating_add(step.cost.predicted_ns);
        stage.operations = stage.operations.saturating_add(step.cost.operations);
        stage.memory_bytes = stage.memory_bytes.saturating_add(step.cost.memory_bytes);
        stage.link_bytes = stage.link_bytes.saturating_add(step.cost.link_bytes);
    }
    stage
}

/// Memory of each device, by rank.
pub fn memory(plan: &Plan) -> Vec<DeviceMemory> {
    let manifest = &plan.manifest;
    let end = |offset: u64, bytes: Option<u64>| offset.saturating_add(bytes.unwrap_or(0));
    let states = manifest.states.iter().map(|state| end(state.arena_offset, state.ty.bytes())).max().unwrap_or(0);
    let device = |(rank, &weight_bytes): (usize, &u64)| {
        let rank = rank as u32;
        let here = || plan.programs.iter().filter(|program| program.ranks.contains(&rank));
        DeviceMemory {
            rank,
            weight_bytes,
            activation_bytes: here().map(|program| program.arena_bytes).max().unwrap_or(0),
            peer_bytes: here().map(|program| program.peer_arena_bytes).max().unwrap_or(0),
            state_bytes: states,
        }
    };
    manifest.weight_arena_bytes.iter().enumerate().map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn counts_steps_and_memory() {
        let summary = summary(&sample::plan());
        let device = |rank| DeviceMemory { rank, weight_bytes: 512, activation_bytes: 1024, ..Default::default() };
        assert_eq!(summary.devices, [device(0), device(1)]);
        let stage = &summary.entries[0].stages[0];
        assert_eq!(stage.steps, BTreeMap::from([("all_reduce", 1), ("launch", 3)]));
        assert_eq!(stage.predicted_ns, 6000);
        assert_eq!(summary.entries[0].inputs[0].ty, "f32[2, 8]");
    }
}
