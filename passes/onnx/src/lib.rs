//! ONNX messages and import into the IR.

mod advice;
mod attribute;
pub mod bindings;
mod build;
mod context;
mod dim_expr;
pub mod error;
mod findings;
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
mod schema;
mod shown_names;
pub mod source_files;
mod stand_ins;
pub mod support;
pub mod tensor_data;
pub mod wire;

pub use bindings::{BindingError, Bindings};
pub use error::OnnxError;
pub use import::import;
pub use support::{OperatorSupport, Status, SupportReport, support};
