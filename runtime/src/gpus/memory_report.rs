//! What a plan predicts that its ranks take of their GPUs' memory, and what they have taken.

use planfile::plan::{Action, Plan};

use super::session::{CudaSession, arena_bytes};
use cuda::CudaError;
use cuda::driver::{DeviceMemory, Gpu};

/// Memory of one rank's GPU, in bytes: as the plan predicts, and as the driver counts.
///
/// The driver gives out whole pages, of 2 MiB on GPUs of today. Its counts are of the whole GPU: what other processes,
/// or other contexts of this one, took since the session was loaded is among [`Self::other_taken_bytes`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DeviceMemoryReport {
    pub rank: u32,
    /// Number of the GPU, as CUDA counts them.
    pub ordinal: u32,
    /// Predicted: all weights that the rank holds.
    pub weight_arena_bytes: u64,
    /// Predicted: all that the rank's programs compute with, workspaces of libraries included.
    pub activation_arena_bytes: u64,
    /// Predicted, and inside of the activation arena: the largest workspace of a call into a library.
    pub workspace_bytes: u64,
    /// Taken for the weight arena.
    pub weight_arena_taken_bytes: u64,
    /// Taken for this context's activation arena.
    pub activation_arena_taken_bytes: u64,
    /// Taken besides the two since the session began to load: machine code, graphs, handles of libraries, and the
    /// buffers of NCCL.
    pub other_taken_bytes: u64,
    /// In use before: CUDA's own context, and other processes.
    pub used_before_bytes: u64,
}

impl DeviceMemoryReport {
    /// Of a rank with this activation arena, as it is now.
    pub(super) fn new(
        plan: &Plan,
        session: &CudaSession,
        (rank, gpu): (u32, &Gpu),
        weights: &DeviceMemory,
        arena: &DeviceMemory,
    ) -> Result<Self, CudaError> {
        let (free, total) = gpu.memory()?;
        let free_before = session.free_before(rank);
        let arenas = weights.taken_bytes.saturating_add(arena.taken_bytes);
        Ok(Self {
            rank,
            ordinal: gpu.info.ordinal,
            weight_arena_bytes: plan.manifest.weight_arena_bytes.get(rank as usize).copied().unwrap_or(0),
            activation_arena_bytes: arena_bytes(plan, rank),
            workspace_bytes: workspace_bytes(plan, rank),
            weight_arena_taken_bytes: weights.taken_bytes,
            activation_arena_taken_bytes: arena.taken_bytes,
            other_taken_bytes: free_before.saturating_sub(free).saturating_sub(arenas),
            used_before_bytes: total.saturating_sub(free_before),
        })
    }
}

/// The largest workspace of a rank's calls into libraries.
fn workspace_bytes(plan: &Plan, rank: u32) -> u64 {
    let programs = plan.programs.iter().filter(|program| program.ranks.contains(&rank));
    let workspaces = programs.flat_map(|program| &program.steps).filter_map(|step| match &step.action {
        Action::Library { workspace, .. } => workspace.as_ref()?.ty.bytes(),
        Action::Launch { .. } | Action::Collective { .. } | Action::Copy { .. } | Action::Persistent { .. } => None,
    });
    workspaces.max().unwrap_or(0)
}
