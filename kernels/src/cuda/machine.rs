//! What an architecture allows a block.

use planfile::Architecture;

/// Blocks of a cluster that every device with clusters can run.
pub(super) const CLUSTER_MAX: u64 = 8;

/// Shared memory of a block, and whether blocks form clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    pub(super) shared_bytes: u64,
    pub(super) clusters: bool,
}

impl Machine {
    pub(super) fn of(architecture: &str) -> Self {
        // One that is not known allows nothing.
        let device = architecture.parse::<Architecture>().ok().and_then(Architecture::cuda);
        let shared_bytes = device.map_or(0, |device| u64::from(device.shared_bytes_max()));
        Self { shared_bytes, clusters: device.is_some_and(|device| device.has_clusters()) }
    }
}
