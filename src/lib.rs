//! The compiler as a library: what the binary `compile` and the tests across crates drive.

mod assembler;
pub mod compiler;
