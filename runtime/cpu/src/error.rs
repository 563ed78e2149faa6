//! What can go wrong when a primitive is executed.

use planfile::{DType, TensorType};

/// Why a primitive could not be executed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// The operands, results and attributes do not fit together.
    #[error("{0}")]
    Type(String),
    /// There is less memory than a result takes.
    #[error("{op}: {ty} takes {bytes} bytes, more than there is memory; use a machine with more of it")]
    Memory { op: &'static str, ty: TensorType, bytes: u64 },
    /// A view's bytes are not as many as its type says.
    #[error("{what} has {actual} bytes, its type needs {expected}")]
    Length { what: String, expected: u64, actual: usize },
    /// A view's bytes do not start at a multiple of the element size.
    #[error("bytes of a {dtype} tensor are not aligned to {} bytes", dtype.bytes())]
    Alignment { dtype: DType },
    /// An index in a tensor of indices is outside of the indexed dimension.
    #[error("{op}: index {index} is outside of -{bound}..{bound} on axis {axis}")]
    Index { op: &'static str, axis: usize, index: i64, bound: u64 },
    /// The primitive is legal, but not executed here.
    #[error("{op} on {dtype} is not executed on the CPU: {hint}")]
    Unsupported { op: &'static str, dtype: DType, hint: &'static str },
    /// Collectives are executed by whoever holds all ranks.
    #[error("{op} exchanges data between ranks, it cannot be executed on one")]
    Collective { op: &'static str },
}
