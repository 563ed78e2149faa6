//! The text form of modules: what snapshots show, what tests are written in, what parses back to the same module.
//!
//! ```text
//! module "tiny_mlp"
//! mesh data=2 tensor=2x2
//! file 0 "model.onnx" 637430 bytes
//! weight w0 "fc1.weight": f32[64, 256] = file 0 at 4096
//! weight w1 "scale": f32[] = [0.25]
//! entry "main" (x: f32[8, 64]) -> (y: f32[8, 256]) = @main
//! graph @main ranks 0..8 (%0: f32[4, 64] of [8, 64] split(0: data)) {
//!   %1: f32[64, 64] of [64, 256] split(1: tensor) = weight w0 "fc1.weight"
//!   %2: f32[4, 64] of [8, 256] split(0: data, 1: tensor) = dot %0, %1 {contract [1]x[0]}   # /fc1/MatMul
//!   return %2
//! }
//! ```
//!
//! Numbers after `%` are the values' ids; other names get the free ids in order. Result types may be left out where
//! operands decide them. Sub-axes of the mesh go by the name of their axis when all of it is meant, else `tensor.0`.
//! A segmented split states `size/unit` of each segment. What follows `#` on a node's line is its origin.

mod bag;
mod cursor;
mod expr;
mod lexer;
mod op;
mod parse;
mod print;
mod recipe;
mod recurrence;
mod scalar;
mod statements;
mod types;

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

use std::fmt;

pub use parse::{parse, parse_lines};
pub use print::{Options, graph_text, module_text};

use crate::module::Module;

impl fmt::Display for Module {
    /// All of the module, so that [`parse`] returns it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&module_text(self, Options::default()))
    }
}

impl Module {
    /// The text with a length and a hash in place of long constants: for people, not for [`parse`].
    pub fn summary_text(&self) -> String {
        module_text(self, Options { elide_data: true })
    }
}
