//! What a module is on its way to a plan. Each phase is a type, so that a pass cannot be given another.
//!
//! | phase | what is decided |
//! | --- | --- |
//! | [`Logical`] | what is computed, on whole tensors |
//! | [`Sharded`] | what each rank holds and computes, and what ranks exchange |
//! | [`Fused`] | which nodes are one step |
//! | [`Selected`] | what executes each step |
//! | [`Scheduled`] | when, and where in memory |
//!
//! A plan writes the last one down.

use std::collections::BTreeMap;
use std::sync::Arc;

use ir::{Module, NodeId, ValueId};
use kernels::cuda::Launch;
use planfile::Spec;
use planfile::plan::{Call, CollectiveAlgorithm, Library, MAX_PREDICTED_NS, StepCost};

/// A module in some phase.
pub trait Phase {
    fn module(&self) -> &Module;
}

/// As imported: tensors are whole, and nothing is known of devices.
#[derive(Clone, Debug)]
pub struct Logical(pub Module);

/// Placed on its mesh: a graph is what each rank of its stage runs, on that rank's parts.
#[derive(Clone, Debug)]
pub struct Sharded(pub Module);

/// Grouped into steps: by graph, for each node the region that ends with it, if one does.
#[derive(Clone, Debug)]
pub struct Fused {
    pub module: Module,
    pub regions: Vec<Vec<Option<Region>>>,
}

/// Each step with what executes it.
#[derive(Clone, Debug)]
pub struct Selected {
    pub module: Module,
    pub steps: Vec<Vec<Option<Step>>>,
}

/// Each graph with an order and memory.
#[derive(Clone, Debug)]
pub struct Scheduled {
    pub module: Module,
    pub schedules: Vec<Schedule>,
}

/// Nodes that are one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Ascending; the results of the last are those of the step.
    pub nodes: Vec<NodeId>,
    /// What is read from outside, in the order of the specification's inputs.
    pub inputs: Vec<ValueId>,
    /// What is computed.
    pub spec: Spec,
}

/// A region, what executes it, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub region: Region,
    /// Shared by regions that compute the same.
    pub execution: Arc<Execution>,
    pub cost: StepCost,
}

/// What executes a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Execution {
    /// An exchange between ranks.
    Collective(CollectiveAlgorithm),
    /// The host, by the specification itself.
    Reference,
    /// A kernel of ours.
    Kernel(Launch),
    /// A call into a library, which reserves a workspace.
    Call { library: Library, call: Call, workspace_bytes: u64 },
}

impl Execution {
    /// Memory that is reserved while it runs.
    pub fn workspace_bytes(&self) -> u64 {
        match self {
            Self::Call { workspace_bytes, .. } => *workspace_bytes,
            Self::Collective(_) | Self::Reference | Self::Kernel(_) => 0,
        }
    }
}

/// Memory and steps of one graph.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// For each value of the graph: the value whose memory it shares, itself unless a reshape made it.
    pub root: Vec<ValueId>,
    /// Offsets of roots that live in the arena; weights and states have none.
    pub offsets: BTreeMap<ValueId, u64>,
    /// Outputs that are copied because their memory is not the graph's to give away.
    pub copies: BTreeMap<ValueId, Copied>,
    /// For each node, the step that ends with it, if one does.
    pub steps: Vec<Option<Step>>,
    /// Offsets of what libraries reserve, by the node that their step ends with.
    pub workspaces: BTreeMap<usize, u64>,
    pub arena_bytes: u64,
}

/// Where a value is copied to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Copied {
    pub offset: u64,
    pub cost: StepCost,
}

impl Scheduled {
    /// The time of a run of all entries, one after the other: that which their plan will state.
    pub fn predicted_ns(&self) -> u64 {
        let steps = self.schedules.iter().flat_map(|schedule| schedule.steps.iter().flatten().map(|step| step.cost));
        let copies = self.schedules.iter().flat_map(|schedule| schedule.copies.values().map(|copied| copied.cost));
        let sum = steps.chain(copies).fold(0u64, |sum, cost| sum.saturating_add(cost.predicted_ns));
        sum.min(MAX_PREDICTED_NS)
    }
}

impl From<Module> for Logical {
    fn from(module: Module) -> Self {
        Self(module)
    }
}

impl From<Module> for Sharded {
    fn from(module: Module) -> Self {
        Self(module)
    }
}

impl Phase for Logical {
    fn module(&self) -> &Module {
        &self.0
    }
}

impl Phase for Sharded {
    fn module(&self) -> &Module {
        &self.0
    }
}

impl Phase for Fused {
    fn module(&self) -> &Module {
        &self.module
    }
}

impl Phase for Selected {
    fn module(&self) -> &Module {
        &self.module
    }
}

impl Phase for Scheduled {
    fn module(&self) -> &Module {
        &self.module
    }
}
