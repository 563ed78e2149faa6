//! The closed set of primitive operations.
//!
//! IR nodes hold them, a kernel's specification is a list of them, the CPU executes them. Result types follow from
//! operand types alone: see [`crate::infer::infer`].

use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::expr::{Expr, ExprOp, RankScalar};
use crate::types::{Dim, TensorType};

/// An `f64` attribute, compared and hashed by its bits so that operations can be table keys.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Real(pub f64);

impl PartialEq for Real {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Eq for Real {}

impl Hash for Real {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

/// How values combine in reductions, scatters and collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Combine {
    Sum,
    Prod,
    Max,
    Min,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceKind {
    /// Same type in and out; half types accumulate in `f32`.
    Combine(Combine),
    /// `Sum / count`.
    Mean,
    /// Index of the extremum, `I64`; the first of equals unless `last`.
    ArgMax {
        last: bool,
    },
    ArgMin {
        last: bool,
    },
}

/// A window sliding over the spatial dimensions, one entry per spatial dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Window {
    pub sizes: Vec<u64>,
    pub strides: Vec<u64>,
    pub dilations: Vec<u64>,
    /// Padding before and after; may be negative (cropping) for transposed convolutions.
    pub pads: Vec<(i64, i64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PoolKind {
    Max,
    /// `count_pads`: padding counts into the divisor.
    Average {
        count_pads: bool,
    },
    /// `(sum |x|^p)^(1/p)`.
    Lp {
        p: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PadMode {
    /// With the scalar in the second operand.
    Constant,
    /// Mirror without repeating the edge.
    Reflect,
    /// Repeat the edge.
    Edge,
    /// Continue from the other side.
    Wrap,
}

/// Statistics of [`Op::Norm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NormKind {
    /// `(x - mean) / sqrt(variance + epsilon)`.
    Layer,
    /// `x / sqrt(mean(x²) + epsilon)`.
    Rms,
}

/// Interpolation of [`Op::Resize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResizeMode {
    Nearest(NearestRounding),
    Linear { antialias: bool },
    Cubic { a: Real, exclude_outside: bool, antialias: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NearestRounding {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
}

/// Output coordinate → input coordinate, as the ONNX specification of `Resize` defines them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    /// With the region of interest of each axis and the value outside of it.
    TfCropAndResize {
        extrapolation: Real,
    },
}

/// Ranks that communicate: disjoint groups, each in the order that chunks are laid out.
pub type Groups = Vec<Vec<u32>>;

/// A primitive. Operand lists are stated as `(name: shape, …)`; a `?` marks an operand that a flag makes present.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Op {
    /// `(x…)`: each broadcastable to `dims` like NumPy. Result `dims`.
    Pointwise {
        expr: Expr,
        dims: Vec<Dim>,
    },
    /// `(a, b)`: batched product. Result: batch dimensions, free of `a`, free of `b`. Accumulates in `accumulate`.
    Dot {
        batch: Vec<(u8, u8)>,
        contract: Vec<(u8, u8)>,
        accumulate: DType,
        out: DType,
    },
    /// `(x: [N, C, spatial…], w: [M, C / groups, window…])` → `[N, M, …]`.
    /// Transposed: `w: [C, M / groups, window…]`, with `output_pads` added at the end of each spatial dimension.
    Conv {
        window: Window,
        groups: u64,
        transposed: bool,
        output_pads: Vec<u64>,
    },
    /// `(x: [N, C, spatial…])`. `ceil`: the last window may start inside and end outside.
    /// `Max` with `indices`: a second result, `I64` flat indices into `x` (column-major in the spatial part if so said).
    Pool {
        kind: PoolKind,
        window: Window,
        ceil: bool,
        indices: Option<IndexOrder>,
    },
    /// `(x)`; reduced dimensions stay with size 1 where `keep`.
    Reduce {
        kind: ReduceKind,
        axes: Vec<u8>,
        keep: bool,
    },
    /// `(x)`: cumulative along `axis`.
    Scan {
        combine: Combine,
        axis: u8,
        exclusive: bool,
        reverse: bool,
    },
    /// `(x, indices: I32 | I64)`: `x[.., indices, ..]` at `axis`; negative indices count from the end.
    Gather {
        axis: u8,
    },
    /// `(x, indices)`: element-wise along `axis`; result has the shape of `indices`.
    GatherElements {
        axis: u8,
    },
    /// `(x, indices: [.., depth])` with `batch` leading dimensions in common.
    GatherNd {
        batch: u8,
    },
    /// `(x, indices, updates)`; `combine` none: assigns, the last of equals wins.
    ScatterElements {
        axis: u8,
        combine: Option<Combine>,
    },
    ScatterNd {
        combine: Option<Combine>,
    },
    /// `(x)`: same elements in the same order.
    Reshape {
        dims: Vec<Dim>,
    },
    /// `(x)`: result dimension `i` is operand dimension `permutation[i]`.
    Transpose {
        permutation: Vec<u8>,
    },
    /// `(x)`: `sizes[i]` elements from `starts[i]` by `steps[i]` (negative: backwards) on each axis.
    Slice {
        starts: Vec<RankScalar>,
        steps: Vec<i64>,
        sizes: Vec<u64>,
    },
    /// `(x, value?: [])`: `value` for `Constant` only. Negative amounts crop.
    Pad {
        low: Vec<i64>,
        high: Vec<i64>,
        mode: PadMode,
    },
    /// `(x…)`, at least one, equal but for `axis`.
    Concat {
        axis: u8,
    },
    /// `(x)` to `dims`, like NumPy.
    Broadcast {
        dims: Vec<Dim>,
    },
    /// `(x)`; `scales` and `region` (start and end, normalised) per axis.
    Resize {
        mode: ResizeMode,
        coordinates: Coordinates,
        scales: Vec<Real>,
        region: Vec<(Real, Real)>,
        sizes: Vec<u64>,
    },
    /// `(x)` → values, indices `I64`; equal elements by lower index first.
    TopK {
        axis: u8,
        k: u64,
        largest: bool,
        sorted: bool,
    },
    /// `(state, new)`: writes `new` at the current extent of the state's bounded dimension `axis`.
    Append {
        axis: u8,
    },
    /// `(x)`: along `axis`, in `f32` at least. `log`: its logarithm.
    Softmax {
        axis: u8,
        log: bool,
    },
    /// `(x, scale?, bias?)`: normalised over the dimensions from `axis` on; `scale` and `bias` broadcast to them.
    /// Statistics in `f32` at least.
    Norm {
        kind: NormKind,
        axis: u8,
        epsilon: Real,
        scale: bool,
        bias: bool,
    },
    /// `(q: [B, H, S, D], k: [B, G, T, D], v: [B, G, T, E], mask?: broadcastable to [B, H, S, T])` → `[B, H, S, E]`,
    /// `H` a multiple of `G`. Mask: `Bool` (true = attend) or additive. Scores: `scale · q kᵀ`, then `softcap · tanh(s / softcap)`
    /// when `softcap` is not 0, then the mask.
    /// A query that sees nothing yields 0.
    Attention {
        scale: Real,
        causal: Option<Causal>,
        softcap: Real,
        mask: bool,
    },
    /// `(x: [B, H, S, D], cos: [B | 1, S, R / 2], sin: same)`: rotates the first `rotary` of `D` features, pairs
    /// `(i, i + R / 2)`, or `(2i, 2i + 1)` when `interleaved`.
    Rotary {
        interleaved: bool,
        rotary: u64,
    },
    /// A recurrent layer, all steps of it, in `D` directions: 1 or 2, as many as `reverse` has.
    /// `(x: [T, B, D, G·H], weights: [D, G·H, H], hidden: [D, B, H], cell?: [D, B, H], bias?: [D, H], peepholes?: [D, 3·H],
    /// lengths?: [B] I32 | I64)` → hidden states `[T, D, B, H]`, the last hidden state `[D, B, H]` and, of an LSTM, the
    /// last cell state `[D, B, H]`; see [`Cell`] for the `G` gates.
    ///
    /// `x` holds the products of the input, with all biases that commute with the products of the state. Steps compute
    /// in `f32` (`f64` for `f64`), where the cell state stays; the hidden state is rounded to the element type in each.
    /// `functions`, of operand 0 in that type: [`Cell::functions`] for each direction.
    /// Samples whose length is over have 0 in the first result, and their state stays. In reverse they start at their
    /// last step.
    Recurrence {
        cell: Cell,
        reverse: Vec<bool>,
        functions: Vec<Expr>,
        /// Added to the product of the state that a late reset scales: [`Cell::Gru`] with `resets_late` only.
        bias: bool,
        /// Weights of the cell state in the gates input, output and forget: [`Cell::Lstm`] only.
        peepholes: bool,
        lengths: bool,
    },
    /// `(x)`: the combination over each group, on all its ranks.
    AllReduce {
        combine: Combine,
        groups: Groups,
    },
    /// `(x)`: the group's operands concatenated along `axis`.
    AllGather {
        axis: u8,
        groups: Groups,
    },
    /// `(x)`: the combination over the group, of which each rank keeps its chunk along `axis`.
    ReduceScatter {
        combine: Combine,
        axis: u8,
        groups: Groups,
    },
    /// `(x)`: chunk `i` along `split` goes to the group's rank `i`; what arrives is concatenated along `concat`.
    AllToAll {
        split: u8,
        concat: u8,
        groups: Groups,
    },
    /// `(x)` → nothing: to `peers[i]` from the stage's `i`-th rank. Matched to a receive by `channel`.
    Send {
        channel: u32,
        peers: Vec<u32>,
    },
    /// `()` → `ty`: from `peers[i]` to the stage's `i`-th rank.
    Recv {
        channel: u32,
        peers: Vec<u32>,
        ty: TensorType,
    },
}

/// What a step of [`Op::Recurrence`] does, with `h` the hidden state, `x` the step's own products in blocks of gates and
/// `φ`, `γ`, `σ` the functions.
///
/// Source: the ONNX operators RNN, GRU (Cho et al., 2014) and LSTM (Hochreiter and Schmidhuber, 1997; peepholes: Gers and
/// Schmidhuber, 2000).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Cell {
    /// `h' = φ(x + W·h)`.
    Rnn,
    /// Update, reset, new: `z, r = φ(x + W·h)`; `n = γ(x + W·(r ∘ h))`, or `γ(x + r ∘ (W·h + bias))` if it resets late;
    /// `h' = (1 - z) ∘ n + z ∘ h`.
    Gru { resets_late: bool },
    /// Input, output, forget, cell: `i, f = φ(x + W·h + p ∘ c)`, `f = 1 - i` if coupled; `c' = f ∘ c + i ∘ γ(x + W·h)`;
    /// `o = φ(x + W·h + p ∘ c')`; `h' = o ∘ σ(c')`.
    Lstm { coupled: bool },
}

impl Cell {
    /// Blocks of `H` rows in the weights: `G`.
    pub const fn gates(self) -> u64 {
        match self {
            Self::Rnn => 1,
            Self::Gru { .. } => 3,
            Self::Lstm { .. } => 4,
        }
    }

    /// Functions of one direction: of the gates, of what is new, of the cell state that is shown.
    pub const fn functions(self) -> usize {
        match self {
            Self::Rnn => 1,
            Self::Gru { .. } => 2,
            Self::Lstm { .. } => 3,
        }
    }
}

/// Which past keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Causal {
    /// Query `i` sees keys `0..=i`.
    FromStart,
    /// Query `i` sees keys `0..=i + T - S`: the queries are the last of the sequence.
    FromEnd,
}

/// Order of flat indices that max pooling reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IndexOrder {
    RowMajor,
    ColumnMajor,
}

impl Op {
    /// Name in the text forms.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Pointwise { .. } => "pointwise",
            Self::Dot { .. } => "dot",
            Self::Conv { .. } => "conv",
            Self::Pool { .. } => "pool",
            Self::Reduce { .. } => "reduce",
            Self::Scan { .. } => "scan",
            Self::Gather { .. } => "gather",
            Self::GatherElements { .. } => "gather_elements",
            Self::GatherNd { .. } => "gather_nd",
            Self::ScatterElements { .. } => "scatter_elements",
            Self::ScatterNd { .. } => "scatter_nd",
            Self::Reshape { .. } => "reshape",
            Self::Transpose { .. } => "transpose",
            Self::Slice { .. } => "slice",
            Self::Pad { .. } => "pad",
            Self::Concat { .. } => "concat",
            Self::Broadcast { .. } => "broadcast",
            Self::Resize { .. } => "resize",
            Self::TopK { .. } => "top_k",
            Self::Append { .. } => "append",
            Self::Softmax { .. } => "softmax",
            Self::Norm { .. } => "norm",
            Self::Attention { .. } => "attention",
            Self::Rotary { .. } => "rotary",
            Self::Recurrence { .. } => "recurrence",
            Self::AllReduce { .. } => "all_reduce",
            Self::AllGather { .. } => "all_gather",
            Self::ReduceScatter { .. } => "reduce_scatter",
            Self::AllToAll { .. } => "all_to_all",
            Self::Send { .. } => "send",
            Self::Recv { .. } => "recv",
        }
    }

    /// The groups of ranks that meet in it, each with the same operation.
    pub const fn groups(&self) -> Option<&Groups> {
        match self {
            Self::AllReduce { groups, .. }
            | Self::AllGather { groups, .. }
            | Self::ReduceScatter { groups, .. }
            | Self::AllToAll { groups, .. } => Some(groups),
            _ => None,
        }
    }

    /// The other side of a message, for each rank of the stage.
    pub const fn peers(&self) -> Option<&Vec<u32>> {
        match self {
            Self::Send { peers, .. } | Self::Recv { peers, .. } => Some(peers),
            _ => None,
        }
    }

    /// Whether devices exchange data in it.
    pub const fn is_collective(&self) -> bool {
        self.groups().is_some() || self.peers().is_some()
    }

    /// The numbers in it that may differ by rank, and do.
    pub fn rank_scalars(&self) -> impl Iterator<Item = &RankScalar> {
        let (starts, instructions): (&[RankScalar], &[ExprOp]) = match self {
            Self::Slice { starts, .. } => (starts, &[]),
            Self::Pointwise { expr, .. } => (&[], &expr.ops),
            _ => (&[], &[]),
        };
        let bases = instructions.iter().filter_map(|instruction| match instruction {
            ExprOp::Index { base, .. } => Some(base),
            _ => None,
        });
        starts.iter().chain(bases).filter(|scalar| matches!(scalar, RankScalar::ByRank(_)))
    }

    /// Whether it reads indices that may be out of range, which is then an error.
    pub const fn checks_indices(&self) -> bool {
        matches!(
            self,
            Self::Gather { .. }
                | Self::GatherElements { .. }
                | Self::GatherNd { .. }
                | Self::ScatterElements { .. }
                | Self::ScatterNd { .. }
        )
    }
}
