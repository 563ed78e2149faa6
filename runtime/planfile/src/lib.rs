//! The plan file and everything a plan is made of.
//!
//! This crate owns the closed set of primitive operations, their types and the format. It depends on no other crate
//! of the workspace and does no computing of its own.

pub mod architecture;
pub mod attributes;
pub mod call;
pub mod codec;
pub mod container;
pub mod cubin;
pub mod diff;
pub mod dtype;
pub mod error;
pub mod expr;
pub mod fingerprint;
pub mod frozen;
pub mod infer;
pub mod launch;
pub mod op;
pub mod plan;
pub mod printable;
pub mod reader;
pub mod regular;
pub mod replace;
#[cfg(test)]
mod sample;
pub mod spec;
pub mod summary;
pub mod target;
pub mod tensor;
pub mod text;
pub mod trust;
pub mod types;
pub mod verify;
pub mod writer;

pub use architecture::{Architecture, Cuda};
pub use dtype::DType;
pub use error::PlanError;
pub use expr::{Binary, Compare, Expr, ExprOp, RankScalar, Scalar, Unary};
pub use frozen::FrozenInput;
pub use infer::infer;
pub use launch::LaunchRule;
pub use op::{Combine, Op, Real};
pub use reader::PlanFile;
pub use spec::{Recipe, RecipeInput, Source, SourceFile, Spec, SpecNode};
pub use target::Target;
pub use tensor::{Buffer, Element, Tensor};
pub use types::{Dim, ExtentId, TensorType};
pub use verify::{Finding, verify};
pub use writer::{WeightSink, write_plan};
