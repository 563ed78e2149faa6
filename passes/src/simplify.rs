//! Brings a module into canonical form: constants folded, duplicates merged, nothing unused.
//!
//! before  %s = shape arithmetic of a dozen nodes      after  %y = reshape %x [2, 64]
//!         %y = reshape (reshape %x …) %s
//!
//! Exporters spell one thing in many ways, and later passes should see one. A round rebuilds each graph in one forward
//! sweep: every node is built anew on its operands' replacements, and while a rule has a simpler form for it, that is
//! taken. Since operands are canonical by then, one sweep does nearly everything; rounds repeat until nothing changes,
//! so the pass is idempotent. Chains of large constants become recipes last, when they are as simple as they get.

mod affine;
mod affine_gather;
mod broadcast;
mod concat;
mod expr;
mod fold;
mod pad;
mod pointwise;
mod recipes;
mod reshape;
mod slice;
mod sweep;
mod transpose;
mod weights;

#[cfg(test)]
mod tests;

use cpu::recipe::WeightBytes;
use ir::Module;

use crate::error::PassError;
use crate::phase::Logical;
use crate::settings::Settings;
use sweep::{Rule, Simplest};
use weights::Weights;

const NAME: &str = "simplify";

/// Tried in this order; folding last, so that what is already a constant is not folded into another.
const RULES: &[Rule] = &[
    Rule { name: "reshape", apply: reshape::apply },
    Rule { name: "transpose", apply: transpose::apply },
    Rule { name: "slice", apply: slice::apply },
    Rule { name: "concat", apply: concat::apply },
    Rule { name: "pad", apply: pad::apply },
    Rule { name: "broadcast", apply: broadcast::apply },
    Rule { name: "pointwise", apply: pointwise::apply },
    Rule { name: "affine gather", apply: affine_gather::apply },
    Rule { name: "fold", apply: fold::apply },
];

/// Rounds until the module must have settled. Chains shrink with every round; models take two or three.
const MAX_ROUNDS: usize = 64;

/// Simplifies every graph of a module that is not sharded yet.
///
/// # Errors
/// [`PassError::Weights`] when a constant cannot be read; [`PassError::Invalid`] when the module is sharded or does not
/// settle.
pub fn run(Logical(module): Logical, settings: &Settings<'_>) -> Result<Logical, PassError> {
    simplify(module, settings.weights).map(Logical)
}

fn simplify(module: Module, bytes: &dyn WeightBytes) -> Result<Module, PassError> {
    let invalid = |why: &str| Err(PassError::Invalid { pass: NAME, why: why.to_owned() });
    if module.graphs.iter().flat_map(|graph| graph.values()).any(|value| value.shard.is_some()) {
        return invalid("the module is sharded already");
    }
    let mut module = module;
    for _ in 0..MAX_ROUNDS {
        let next = round(&module, bytes)?;
        if next == module {
            return Ok(next);
        }
        module = next;
    }
    invalid("rules undo each other")
}

/// One sweep over every graph, then recipes.
fn round(module: &Module, bytes: &dyn WeightBytes) -> Result<Module, PassError> {
    let (mut weights, renamed) = Weights::new(&module.weights, bytes);
    let mut graphs = Vec::new();
    for graph in &module.graphs {
        graphs.push(graph.rewrite_with(&mut Simplest::new(&mut weights, &renamed))?);
    }
    let Module { name, mesh, files, states, entries, .. } = module.clone();
    let module = Module { name, mesh, files, weights: weights.into_table(), states, graphs, entries };
    recipes::run(module.without_unread_weights(), bytes)
}
