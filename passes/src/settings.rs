//! What passes know beside the module: the weights behind it, the machine, and what the user chose.
//!
//! Every pass reads these and no pass is named here, so that the pipeline alone knows the passes.

use cpu::recipe::WeightBytes;
use ir::Mesh;
use kernels::cuda::CudaTarget;
use planfile::{DType, Target};

/// What passes know beside the module.
#[derive(Clone)]
pub struct Settings<'a> {
    /// The files behind the module's weights.
    pub weights: &'a dyn WeightBytes,
    pub options: Options,
    pub shard: ShardOptions,
    /// The machine that is compiled for.
    pub target: &'a Target,
}

impl Settings<'_> {
    /// What kernels are made for, where the machine's devices are GPUs.
    pub fn cuda(&self) -> Option<CudaTarget> {
        CudaTarget::of(self.target, self.options.allow_tf32)
    }
}

/// What the command line says about the pipeline itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Name of the last pass to run; all if none.
    pub stop_after: Option<String>,
    /// Name of the pass whose result is shown. The pipeline only checks that there is one: who observes shows.
    pub print_after: Option<String>,
    /// Element type to convert the model to; as the model says if none.
    pub dtype: Option<DType>,
    /// Whether products of `f32` may round their operands to TF32, where the device is faster so.
    pub allow_tf32: bool,
}

impl Options {
    /// Whether the result of this pass is to be shown.
    pub fn prints_after(&self, pass: &str) -> bool {
        self.print_after.as_deref() == Some(pass)
    }

    /// Whether this pass is the last.
    pub fn stops_after(&self, pass: &str) -> bool {
        self.stop_after.as_deref() == Some(pass)
    }
}

/// What the user chose about sharding.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    pub mesh: MeshChoice,
    /// Look-up tables (embeddings) of at least this many bytes are split by rows over the tensor axis.
    pub split_table_bytes: u64,
    /// The dimension of inputs that the data axis splits: 0, unless batches come along another.
    pub batch_dim: usize,
}

/// Which mesh to place tensors on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshChoice {
    Fixed(Mesh),
    /// The one of so many devices that is predicted to be fastest.
    Devices(u32),
}

/// A table this large is worth an all-reduce of what was looked up.
pub const SPLIT_TABLE_BYTES: u64 = 64 << 20;
