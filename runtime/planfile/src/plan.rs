//! What a plan says: manifest, programs, kernels and explanations.
//!
//! Everything here was decided at compile time. Numbers are bytes, elements or nanoseconds, as their names say; ranks
//! are numbers of devices in the plan, `0..ranks`.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::call::{Activation, Call, Convolution, Matmul, Matrix};
use crate::expr::RankScalar;
use crate::fingerprint::Fingerprint;
pub use crate::frozen::FrozenInput;
use crate::launch::LaunchRule;
use crate::op::Op;
use crate::spec::{Recipe, SourceFile, Spec};
use crate::types::{ExtentId, TensorType};

/// A whole plan but for the bytes of its weights, which stay in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub manifest: Manifest,
    /// One per entry and stage.
    pub programs: Vec<Program>,
    /// Deduplicated: steps name them by index.
    pub kernels: Vec<Kernel>,
    /// Machine code that kernels name by index; empty for CPU plans.
    pub code: Vec<Code>,
    pub explanations: Explanations,
}

/// Signature, weights and requirements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Compiler name and version.
    pub producer: String,
    pub model: String,
    /// Files that recipes read.
    pub files: Vec<SourceFile>,
    /// What of those files decided the plan.
    pub fingerprint: Fingerprint,
    pub mesh: Vec<PlanAxis>,
    /// Number of devices.
    pub ranks: u32,
    pub target: TargetRef,
    pub entries: Vec<PlanEntry>,
    pub weights: Vec<PlanWeight>,
    /// Weights as they lie in the ranks' arenas.
    pub placed: Vec<PlacedWeight>,
    /// Bytes of each rank's weight arena.
    pub weight_arena_bytes: Vec<u64>,
    /// Bytes of the weights section.
    pub image_bytes: u64,
    pub states: Vec<PlanState>,
    /// Links that ranks need between them.
    pub links: Vec<LinkRequirement>,
}

/// An axis of the mesh, outermost first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanAxis {
    pub name: String,
    pub size: u32,
}

/// The machine that the plan was compiled for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRef {
    pub name: String,
    /// An [`Architecture`](crate::Architecture) by name: `cpu`, or such as `sm_90a`.
    pub architecture: String,
}

/// The slowest class of link that serves a pair of ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkRequirement {
    pub ranks: (u32, u32),
    pub class: String,
}

/// A way into the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanEntry {
    pub name: String,
    pub inputs: Vec<PlanPort>,
    pub outputs: Vec<PlanPort>,
    /// Inputs whose values were bound at compile time.
    pub frozen: Vec<FrozenInput>,
    /// The programs of its stages, in order, by index.
    pub programs: Vec<u32>,
    /// Of one run, over all stages: see [`predicted_ns`].
    pub predicted_ns: u64,
}

/// A named input or output, whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanPort {
    pub name: String,
    pub ty: TensorType,
}

/// A weight of the model and how it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanWeight {
    pub name: String,
    pub ty: TensorType,
    pub recipe: Recipe,
}

/// A weight in the arenas of one stage's ranks: at the same offset on all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedWeight {
    /// Index into [`Manifest::weights`].
    pub weight: u32,
    /// Index of the stage.
    pub stage: u32,
    /// The stage's ranks, in the order of `images` and of the tables in `splits`.
    pub ranks: Vec<u32>,
    /// What each rank holds.
    pub ty: TensorType,
    pub arena_offset: u64,
    pub splits: Vec<SplitDim>,
    /// For each rank, where its bytes begin in the weights section; ranks that hold the same share them.
    pub images: Vec<u64>,
}

/// How a dimension is divided between ranks; elements outside every piece are padding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitDim {
    pub dim: u8,
    /// For each rank of the stage, its pieces in order.
    pub pieces: Vec<Vec<PlanPiece>>,
}

/// A run of a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlanPiece {
    /// First element in the whole dimension.
    pub global: u64,
    /// First element on the rank.
    pub local: u64,
    pub len: u64,
}

/// Persistent memory between runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanState {
    pub name: String,
    pub ty: TensorType,
    pub extent: ExtentId,
    pub arena_offset: u64,
}

/// The steps of one stage of one entry; every rank of the stage runs the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    pub entry: u32,
    pub stage: u32,
    /// Ascending.
    pub ranks: Vec<u32>,
    pub inputs: Vec<Binding>,
    pub outputs: Vec<Binding>,
    /// In issue order.
    pub steps: Vec<Step>,
    /// Bytes of the activation arena on each rank.
    pub arena_bytes: u64,
    /// Bytes of the arena that peers address, at the same offsets on all ranks.
    pub peer_arena_bytes: u64,
    pub streams: u32,
}

/// An entry's port in the ranks' memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Index into the entry's inputs or outputs.
    pub port: u32,
    pub place: Place,
    pub splits: Vec<SplitDim>,
}

/// A tensor in a rank's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub ty: TensorType,
    pub at: Argument,
}

/// What a step's argument is on each rank. Offsets are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Argument {
    /// In the rank's activation arena.
    Arena {
        offset: u64,
    },
    /// In the rank's weight arena; read only.
    Weights {
        offset: u64,
    },
    /// In a peer's part of the symmetric arena.
    Peer {
        rank: RankScalar,
        offset: u64,
    },
    /// In persistent memory.
    State {
        state: u32,
        offset: u64,
    },
    /// The current number of elements of a bounded dimension.
    Extent {
        extent: ExtentId,
    },
    /// A counter of runs: distinguishes one run's signals from the next one's.
    Epoch,
    /// A descriptor for bulk copies of the tensor at `offset` of the arena, encoded at load.
    TensorMap {
        offset: u64,
        block: Vec<u64>,
    },
    Scalar {
        value: RankScalar,
    },
    /// The address of a `u32` of the step's own, zero before a run, which the kernel makes 1 where an index that it reads
    /// is out of range. The run then fails, with the name of the step. Words are numbered within the program, from 0 on;
    /// they are in memory of the host that the rank reaches, so that a run without faults has nothing to copy. The last
    /// scalar of its step.
    ///
    /// A kernel reads the indices of what it computes: where a later operation that is fused into it leaves elements
    /// out, such as a slice or a crop, an index whose element nothing reads may pass unreported. The CPU computes
    /// every step whole, operation by operation, and reports it.
    Fault {
        word: u32,
    },
}

/// One thing a rank does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub action: Action,
    pub stream: u32,
    /// Steps of this program that must be over first, besides those before it in its own stream.
    pub waits: Vec<Edge>,
    /// ONNX nodes it came from: indexes into [`Explanations::names`].
    pub origin: Vec<u32>,
    pub cost: StepCost,
}

/// Longest prediction, in nanoseconds: 36 years. What is predicted to take longer is said to take so long.
pub const MAX_PREDICTED_NS: u64 = 1 << 60;

/// Largest amount of work that a step is said to be, in operations or bytes.
pub const MAX_WORK: u64 = i64::MAX as u64;

/// The time of an entry: that of all steps of its programs, one after the other.
pub fn predicted_ns<'a>(programs: impl IntoIterator<Item = &'a Program>) -> u64 {
    let steps = programs.into_iter().flat_map(|program| &program.steps);
    steps.fold(0u64, |sum, step| sum.saturating_add(step.cost.predicted_ns)).min(MAX_PREDICTED_NS)
}

/// Prediction and work of a step on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepCost {
    pub predicted_ns: u64,
    /// Arithmetic operations; a multiply-add counts two.
    pub operations: u64,
    /// Device memory read and written.
    pub memory_bytes: u64,
    /// Sent over links by each rank.
    pub link_bytes: u64,
}

impl StepCost {
    /// The cost, with what is beyond the limits of a plan at them.
    #[must_use]
    pub fn capped(self) -> Self {
        Self {
            predicted_ns: self.predicted_ns.min(MAX_PREDICTED_NS),
            operations: self.operations.min(MAX_WORK),
            memory_bytes: self.memory_bytes.min(MAX_WORK),
            link_bytes: self.link_bytes.min(MAX_WORK),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// A kernel of ours. Operands and results match the kernel's spec; scalars and launch are those that follow from
    /// its rule, and kernels that are their specifications have none.
    Launch {
        kernel: u32,
        operands: Vec<Place>,
        results: Vec<Place>,
        scalars: Vec<Argument>,
        launch: Option<LaunchShape>,
    },
    /// A call into a library, with what it reserves. An algorithm is the library's own bytes; none leaves the choice to
    /// the machine.
    Library { kernel: u32, operands: Vec<Place>, results: Vec<Place>, workspace: Option<Place>, algorithm: Vec<u8> },
    /// An operation between ranks.
    Collective { op: Op, operands: Vec<Place>, results: Vec<Place>, algorithm: CollectiveAlgorithm },
    /// Same bytes elsewhere.
    Copy { from: Place, to: Place },
    /// One kernel that runs many tasks with counters between them.
    Persistent { tasks: Vec<Task>, counters: Vec<Counter>, launch: Option<LaunchShape> },
}

/// Grid and block of a launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchShape {
    pub grid: [RankScalar; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
}

/// Who moves the bytes of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CollectiveAlgorithm {
    /// The runtime's own on virtual devices.
    Host,
    Nccl,
    /// Each rank reads all peers' operands from the symmetric arena.
    OneShot,
}

/// A piece of a persistent kernel: a tile range of a spec, on one block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub kernel: u32,
    pub block: u32,
    pub tiles: (u32, u32),
    pub operands: Vec<Place>,
    pub results: Vec<Place>,
    /// Counters that must have reached their thresholds.
    pub waits: Vec<u32>,
    /// Counters that it raises by one.
    pub signals: Vec<u32>,
}

/// Counts finished tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    pub threshold: u32,
}

/// A dependency between two steps of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// Index of the step that comes first.
    pub from: u32,
    pub kind: EdgeKind,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EdgeKind {
    /// Starts when the other has ended.
    Full,
    /// May start before the other has ended, and waits inside; reads only weights before that.
    Programmatic,
    /// Waits for the same step on other ranks too, by a flag in the peer arena.
    Signal { ranks: Vec<u32>, offset: u64 },
}

/// What is computed, and by what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    pub name: String,
    pub spec: Spec,
    pub implementation: Implementation,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Implementation {
    /// The spec itself, executed on the host.
    Reference,
    /// A function in [`Plan::code`], and how it is launched: see [`crate::launch`].
    Cuda { code: u32, symbol: String, rule: LaunchRule },
    Library {
        library: Library,
        /// The version that the plan was made with; empty for the machine's own.
        version: String,
        call: Call,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Library {
    CublasLt,
    Cudnn,
}

/// Machine code for one architecture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    pub architecture: String,
    pub cubin: Vec<u8>,
}

/// Why the plan is as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Explanations {
    /// Names of ONNX nodes.
    pub names: Vec<String>,
    /// Sentences about the choice of mesh and placements.
    pub sharding: Vec<String>,
    /// Other meshes that were considered, best first, with what they would cost.
    pub alternatives: Vec<Alternative>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    pub mesh: Vec<PlanAxis>,
    pub predicted_ns: u64,
}

impl fmt::Display for CollectiveAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Nccl => "NCCL",
            Self::OneShot => "one shot",
        })
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CublasLt => "cuBLASLt",
            Self::Cudnn => "cuDNN",
        })
    }
}

impl Program {
    /// Pairs of ranks that exchange data, the lower one first; some more than once.
    pub fn exchanging(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let ops = self.steps.iter().filter_map(|step| match &step.action {
            Action::Collective { op, .. } => Some(op),
            _ => None,
        });
        let mut seen = HashSet::new();
        let groups = ops.clone().filter_map(Op::groups);
        let groups = groups.filter(move |groups| seen.insert(*groups)).flatten();
        let within = groups.flat_map(|group| {
            let later = |position: usize| group.iter().skip(position + 1);
            group.iter().enumerate().flat_map(move |(position, &a)| later(position).map(move |&b| (a, b)))
        });
        let peers = ops.filter_map(Op::peers).flatten();
        // Each has a peer for each of the program's ranks, in their order.
        let across = self.ranks.iter().copied().cycle().zip(peers.copied());
        within.chain(across).map(|(a, b)| (a.min(b), a.max(b)))
    }

    /// Steps that check indices, in order, with their fault words.
    pub fn faults(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.steps.iter().enumerate().flat_map(|(step, described)| {
            let words = described.action.scalars().iter().filter_map(|scalar| match scalar {
                Argument::Fault { word } => Some(*word),
                _ => None,
            });
            words.map(move |word| (step, word))
        })
    }
}

impl Action {
    /// What it is given besides tensors.
    pub fn scalars(&self) -> &[Argument] {
        match self {
            Self::Launch { scalars, .. } => scalars,
            Self::Library { .. } | Self::Collective { .. } | Self::Copy { .. } | Self::Persistent { .. } => &[],
        }
    }

    /// The tensors it reads and those it writes.
    pub fn places(&self) -> (Vec<&Place>, Vec<&Place>) {
        match self {
            Self::Launch { operands, results, .. } | Self::Collective { operands, results, .. } => {
                (operands.iter().collect(), results.iter().collect())
            }
            Self::Library { operands, results, workspace, .. } => {
                (operands.iter().collect(), results.iter().chain(workspace).collect())
            }
            Self::Copy { from, to } => (vec![from], vec![to]),
            Self::Persistent { tasks, .. } => (
                tasks.iter().flat_map(|task| &task.operands).collect(),
                tasks.iter().flat_map(|task| &task.results).collect(),
            ),
        }
    }
}
