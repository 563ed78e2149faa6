//! What must hold between passes. A pass that breaks it is at fault, not the model.
//!
//! The module's tables are judged here, graphs in [`graph`], signatures and stages in [`entry`].

mod entry;
mod graph;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use planfile::op::Op;
use planfile::text::count;
use planfile::{Dim, ExprOp, RankScalar, Source, TensorType};

use crate::error::IrError;
use crate::mesh::Mesh;
use crate::module::{Module, State, Value, Weight};

/// Devices that a mesh may have.
pub const MAX_RANKS: u32 = 1 << 16;
/// Sub-axes that a mesh may have: bits of a set.
const MAX_SUB_AXES: usize = 32;

/// Proves that tables, types, placements and signatures of the module agree.
///
/// # Errors
/// The first thing that does not: [`IrError::Module`] for tables and entries, [`IrError::Graph`] for values,
/// [`IrError::Type`] for nodes.
pub fn verify(module: &Module) -> Result<(), IrError> {
    let fault = |why| IrError::Module { module: module.name.clone(), why };
    check_mesh(&module.mesh).map_err(fault)?;
    for (number, weight) in module.weights.iter().enumerate() {
        let why = check_weight(module, weight);
        why.map_err(|why| fault(format!("weight w{number} `{}`: {why}", weight.name)))?;
    }
    for (number, state) in module.states.iter().enumerate() {
        check_state(state).map_err(|why| fault(format!("state s{number} `{}`: {why}", state.name)))?;
    }
    for graph in &module.graphs {
        graph::check(module, graph)?;
    }
    let names = module.entries.iter().map(|entry| entry.name.as_str());
    unique(names).map_err(|name| fault(format!("two entries are named `{name}`")))?;
    for entry in &module.entries {
        entry::check(module, entry).map_err(|why| fault(format!("entry `{}`: {why}", entry.name)))?;
    }
    Ok(())
}

/// The first name that is there twice, as the error.
fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), &'a str> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(name);
        }
    }
    Ok(())
}

fn check_mesh(mesh: &Mesh) -> Result<(), String> {
    unique(mesh.axes.iter().map(|axis| axis.name.as_str())).map_err(|name| format!("two mesh axes named `{name}`"))?;
    let sizes = mesh.sizes();
    if sizes.len() > MAX_SUB_AXES || sizes.iter().any(|&size| size < 2) {
        return Err(format!("the mesh needs at most {MAX_SUB_AXES} factors, each at least 2"));
    }
    let ranks = sizes.iter().try_fold(1u32, |ranks, &size| ranks.checked_mul(size));
    let fits = ranks.is_some_and(|ranks| ranks <= MAX_RANKS);
    fits.then_some(()).ok_or_else(|| format!("the mesh has more than {MAX_RANKS} ranks"))
}

/// That memory can hold a tensor of the type.
fn check_type(ty: &TensorType) -> Result<(), String> {
    let fits = ty.bytes().is_some() && ty.rank() <= planfile::infer::MAX_RANK;
    fits.then_some(()).ok_or_else(|| format!("{ty} is too large"))
}

fn check_weight(module: &Module, weight: &Weight) -> Result<(), String> {
    check_type(&weight.ty)?;
    let recipe = &weight.recipe;
    if !recipe.inputs.iter().map(|input| &input.ty).eq(&recipe.spec.inputs) {
        return Err("the recipe's ingredients are not what its operations take".to_owned());
    }
    for (number, input) in recipe.inputs.iter().enumerate() {
        check_source(module, &input.ty, &input.source).map_err(|why| format!("ingredient {number}: {why}"))?;
    }
    for node in &recipe.spec.nodes {
        let by_rank = rank_scalars(&node.op).iter().any(|scalar| matches!(scalar, RankScalar::ByRank(_)));
        if node.op.is_collective() || by_rank {
            return Err(format!("{} in a recipe depends on the rank", node.op.name()));
        }
    }
    match recipe.spec.result_types()?.as_slice() {
        [ty] if *ty == weight.ty => Ok(()),
        [ty] => Err(format!("the recipe makes {ty}, not {}", weight.ty)),
        types => Err(format!("the recipe makes {} tensors, not one", types.len())),
    }
}

fn check_source(module: &Module, ty: &TensorType, source: &Source) -> Result<(), String> {
    let bytes = ty.bytes().ok_or_else(|| format!("{ty} is too large"))?;
    match source {
        Source::File { file, offset } => {
            let known = module.files.get(*file as usize).ok_or_else(|| format!("there is no file {file}"))?;
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= known.bytes);
            inside
                .then_some(())
                .ok_or_else(|| format!("{} at {offset} leave file {file} `{}`", count(bytes, "byte"), known.name))
        }
        Source::Inline(buffer) => {
            let fits = buffer.len() as u64 == bytes;
            fits.then_some(()).ok_or_else(|| format!("{} for {ty}", count(buffer.len() as u64, "byte")))
        }
        Source::Random { .. } => Ok(()),
    }
}

fn check_state(state: &State) -> Result<(), String> {
    check_type(&state.ty)?;
    let bounded = |dim: &Dim| matches!(dim, Dim::Bounded { extent, .. } if *extent == state.extent);
    let found = state.ty.dims.iter().any(bounded);
    found.then_some(()).ok_or_else(|| format!("no dimension of {} is bounded by extent {}", state.ty, state.extent.0))
}

/// The numbers of an operation that may differ by rank.
fn rank_scalars(op: &Op) -> Vec<&RankScalar> {
    match op {
        Op::Slice { starts, .. } => starts.iter().collect(),
        Op::Pointwise { expr, .. } => {
            let bases = expr.ops.iter().filter_map(|op| match op {
                ExprOp::Index { base, .. } => Some(base),
                _ => None,
            });
            bases.collect()
        }
        _ => Vec::new(),
    }
}

/// That the value is the tensor of this type, or a shard of it.
fn check_whole(value: &Value, whole: &TensorType) -> Result<(), String> {
    let same = match &value.shard {
        Some(shard) => value.ty.dtype == whole.dtype && shard.global == whole.sizes(),
        None => value.ty == *whole,
    };
    let of = value.shard.as_ref().map(|shard| format!(" of {:?}", shard.global)).unwrap_or_default();
    same.then_some(()).ok_or_else(|| format!("is {}{of}, but stands for {whole}", value.ty))
}
