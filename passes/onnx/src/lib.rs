//! ONNX messages and import into the IR.

mod attribute;
pub mod bindings;
mod build;
mod context;
mod dim_expr;
pub mod error;
pub mod flat;
#[cfg(test)]
mod harness;
pub mod import;
pub mod inline;
pub mod load;
pub mod messages;
mod names;
mod operators;
mod order;
#[cfg(test)]
mod samples;
mod shown_names;
