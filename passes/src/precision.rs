//! Converts a model to a half type (`--dtype f16`, `--dtype bf16`), with `f32` kept where it matters; or to `f32`.
//!
//! before  %h: f32[8, 64] = dot %x, %w           after  %h: bf16[8, 64] = dot %x, %w     # %w's recipe: cast of %w's
//!         %y: f32[8, 64] = pointwise %h, %b            %y: bf16[8, 64] = pointwise %h, %b
//!           {tanh($0 + $1)}                              {bf16(tanh(f32($0) + $1))}
//!
//! Half types are for memory and for products; arithmetic is in `f32`:
//! - Products (`dot`, `conv`, `attention`) read the half type, accumulate in `f32`, and round their result; that of a
//!   `dot` that only `f32` wants, such as logits that leave the model, is not rounded at all. Where sharding splits what
//!   a product sums over, each rank rounds its term, and their combination is rounded again.
//! - An expression computes in `f32` whatever it reads, and rounds at most once, when it stores. It stores `f32` when it
//!   reads a value that is kept in `f32`, has a constant that the half type cannot hold, or only `f32` is wanted of it:
//!   norms and softmax that exporters spell out stay in `f32` up to the next product.
//! - `reduce`, `scan` and `top_k` read and give `f32`: they are statistics, or choices that rounding would turn into ties.
//! - `softmax` and `norm` keep their operand's type, since they compute in `f32` inside. So does what moves elements.
//! - Weights of products and look-up tables become the half type, by a cast at the end of their recipe; constants of
//!   expressions (biases, scales, masks) stay as they are up to 64 KiB. A finite weight beyond the half type
//!   becomes its largest number, not infinity; infinities stay.
//! - Inputs, outputs and states keep the types that the model states. Integers, booleans and `f64` are not touched.
//!
//! A model that has half types itself is read as if it were in `f32` first, so `f32` undoes them.

pub(crate) mod cast;
mod demand;
mod rebuild;
mod weights;

#[cfg(test)]
mod tests;

use ir::{Module, Value};
use planfile::DType;

use crate::error::PassError;
use crate::phase::Logical;
use crate::settings::Settings;
use crate::simplify;
use rebuild::Rebuild;
use weights::Weights;

const NAME: &str = "precision";

/// Constants of expressions up to this size stay in `f32`.
const CONSTANT_BYTES: u64 = 64 << 10;

/// Types that a model can be converted to.
pub const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Converts a module that is not sharded yet to the type in the options; without one, nothing changes.
///
/// # Errors
/// [`PassError::Invalid`] when the type is none of [`DTYPES`] or the module is sharded; otherwise as [`simplify::run`].
pub fn run(Logical(module): Logical, settings: &Settings<'_>) -> Result<Logical, PassError> {
    match settings.options.dtype {
        // Casts of weights that are constants of the module are calculated, and what lost its readers goes.
        Some(dtype) => simplify::run(Logical(convert(module, dtype)?), settings),
        None => Ok(Logical(module)),
    }
}

fn convert(module: Module, dtype: DType) -> Result<Module, PassError> {
    if !DTYPES.contains(&dtype) {
        return Err(PassError::invalid(NAME, format!("models are not converted to {dtype}")));
    }
    let sharded = |value: &Value| value.shard.is_some();
    if module.graphs.iter().flat_map(|graph| graph.values()).any(sharded) {
        return Err(PassError::invalid(NAME, "the module is sharded already"));
    }
    let mut weights = Weights::new(&module.weights, dtype);
    let mut graphs = Vec::new();
    for (index, graph) in module.graphs.iter().enumerate() {
        let entry = module.entries.iter().find(|entry| entry.stages.iter().any(|stage| stage.index() == index));
        let outputs: Vec<DType> =
            entry.map_or_else(Vec::new, |entry| entry.outputs.iter().map(|port| port.ty.dtype).collect());
        graphs.push(graph.rewrite_with(&mut Rebuild::new(graph, &outputs, &mut weights, dtype))?);
    }
    let weights = weights.into_table()?;
    Ok(Module { graphs, weights, ..module })
}
