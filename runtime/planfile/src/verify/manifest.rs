//! Signature, mesh, recipes and states: what the manifest says about itself.

use std::collections::HashMap;

use super::{ARENA_ALIGN, MAX_RANKS, Report, duplicate, sound_bytes};
use crate::architecture::Architecture;
use crate::frozen::FrozenInput;
use crate::plan::{MAX_PREDICTED_NS, Manifest, Plan, PlanEntry, PlanPort};
use crate::spec::{Recipe, Source, SourceFile};
use crate::text::count;
use crate::types::TensorType;

pub(super) fn check(plan: &Plan, report: &mut Report) {
    let manifest = &plan.manifest;
    report.check("manifest", manifest.target.architecture.parse::<Architecture>().map(|_| ()));
    check_mesh(manifest, report);
    check_names(manifest, report);
    for entry in &manifest.entries {
        check_entry(entry, report);
    }
    for file in &manifest.files {
        report.require(stays_inside(&file.name), format_args!("file `{}`", file.name), || {
            "leaves the model's folder".to_owned()
        });
    }
    for weight in &manifest.weights {
        let at = format_args!("weight `{}`", weight.name);
        report.check(at, sound_bytes(&weight.ty).map(|_| ()));
        let made = check_recipe(&weight.recipe, &manifest.files);
        report.check(at, made.and_then(|()| check_result(&weight.recipe, &weight.ty)));
    }
    check_states(manifest, report);
    for alternative in &plan.explanations.alternatives {
        report.require(alternative.predicted_ns <= MAX_PREDICTED_NS, "explanations", || {
            format!("an alternative is predicted to take {} ns", alternative.predicted_ns)
        });
    }
}

fn check_mesh(manifest: &Manifest, report: &mut Report) {
    let ranks = manifest.ranks;
    report.require((1..=MAX_RANKS).contains(&ranks), "manifest", || format!("{ranks} ranks, of 1 to {MAX_RANKS}"));
    let product = manifest.mesh.iter().try_fold(1u32, |product, axis| product.checked_mul(axis.size));
    report.require(product == Some(ranks), "manifest", || format!("the mesh does not make {ranks} ranks"));
    let arenas = &manifest.weight_arena_bytes;
    report.require(arenas.len() == ranks as usize, "manifest", || {
        format!("{} sizes of weight arenas for {ranks} ranks", arenas.len())
    });
    for bytes in arenas.iter().chain([&manifest.image_bytes]) {
        report.require(*bytes <= i64::MAX as u64, "manifest", || format!("{bytes} bytes of weights on a rank"));
    }
}

fn check_names(manifest: &Manifest, report: &mut Report) {
    let mut unique = |what: &str, duplicate: Option<&String>| {
        if let Some(name) = duplicate {
            report.add("manifest", format!("two {what} are named `{name}`"));
        }
    };
    unique("mesh axes", duplicate(manifest.mesh.iter().map(|axis| &axis.name)));
    unique("entries", duplicate(manifest.entries.iter().map(|entry| &entry.name)));
    unique("weights", duplicate(manifest.weights.iter().map(|weight| &weight.name)));
    unique("states", duplicate(manifest.states.iter().map(|state| &state.name)));
    for entry in &manifest.entries {
        let names = |ports: &[PlanPort]| ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>();
        unique("inputs", duplicate(names(&entry.inputs).iter()));
        unique("frozen inputs", duplicate(entry.frozen.iter().map(|frozen| &frozen.input)));
        unique("outputs", duplicate(names(&entry.outputs).iter()));
    }
}

fn check_entry(entry: &PlanEntry, report: &mut Report) {
    for port in entry.inputs.iter().chain(&entry.outputs) {
        report.check(format_args!("entry `{}`, `{}`", entry.name, port.name), sound_bytes(&port.ty).map(|_| ()));
    }
    let ports: HashMap<&str, &PlanPort> = entry.inputs.iter().map(|port| (port.name.as_str(), port)).collect();
    for FrozenInput { input: name, value, .. } in &entry.frozen {
        let bytes = sound_bytes(&value.ty);
        let fine = bytes.and_then(|bytes| {
            let fine = bytes == value.data.len() as u64;
            fine.then_some(()).ok_or_else(|| format!("{} for {}", count(value.data.len() as u64, "byte"), value.ty))
        });
        let fine = fine.and_then(|()| match ports.get(name.as_str()) {
            Some(port) if port.ty == value.ty => Ok(()),
            Some(port) => Err(format!("{} for the input {}", value.ty, port.ty)),
            None => Err("there is no such input".to_owned()),
        });
        report.check(format_args!("entry `{}`, frozen `{name}`", entry.name), fine);
    }
}

/// Whether a name is relative and stays below the folder that it is relative to, on any system.
fn stays_inside(name: &str) -> bool {
    let mut parts = name.split(['/', '\\']);
    parts.all(|part| !part.is_empty() && part != "..")
}

fn check_recipe(recipe: &Recipe, files: &[SourceFile]) -> Result<(), String> {
    let types = recipe.inputs.iter().map(|input| &input.ty);
    if !types.eq(&recipe.spec.inputs) {
        return Err("the recipe's ingredients are not what its primitives take".to_owned());
    }
    for input in &recipe.inputs {
        let bytes = sound_bytes(&input.ty)?;
        match &input.source {
            Source::File { file, offset } => {
                let file = files.get(*file as usize).ok_or_else(|| format!("the recipe reads file {file}"))?;
                if offset.checked_add(bytes).is_none_or(|end| end > file.bytes) {
                    return Err(format!("the recipe reads {} at {offset} of `{}`", count(bytes, "byte"), file.name));
                }
            }
            Source::Inline(data) if data.len() as u64 != bytes => {
                return Err(format!("the recipe holds {} for {}", count(data.len() as u64, "byte"), input.ty));
            }
            Source::Inline(_) | Source::Random { .. } => {}
        }
    }
    for node in &recipe.spec.nodes {
        if node.op.is_collective() || node.op.rank_scalars().next().is_some() {
            return Err(format!("the recipe's {} is not for one device", node.op.name()));
        }
    }
    Ok(())
}

fn check_result(recipe: &Recipe, ty: &TensorType) -> Result<(), String> {
    let results = recipe.spec.result_types()?;
    match results.as_slice() {
        [result] if result == ty => Ok(()),
        [result] => Err(format!("the recipe makes {result}, not {ty}")),
        many => Err(format!("the recipe makes {} tensors", many.len())),
    }
}

fn check_states(manifest: &Manifest, report: &mut Report) {
    let mut ranges = Vec::new();
    for (index, state) in manifest.states.iter().enumerate() {
        let at = format_args!("state `{}`", state.name);
        let end = sound_bytes(&state.ty).and_then(|bytes| {
            let end = state.arena_offset.checked_add(bytes).filter(|&end| end <= i64::MAX as u64);
            end.ok_or_else(|| format!("{bytes} bytes at {} overflow", state.arena_offset))
        });
        match end {
            Ok(end) => ranges.push((state.arena_offset, end, index)),
            Err(what) => report.add(at, what),
        }
        report.require(state.arena_offset.is_multiple_of(ARENA_ALIGN), at, || {
            format!("offset {} is not a multiple of {ARENA_ALIGN}", state.arena_offset)
        });
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        report.require(pair[0].1 <= pair[1].0, format_args!("state `{}`", manifest.states[pair[1].2].name), || {
            format!("overlaps state `{}`", manifest.states[pair[0].2].name)
        });
    }
}
