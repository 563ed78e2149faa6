//! What an architecture allows a block.

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
        let number = architecture.trim_start_matches("sm_").trim_end_matches(['a', 'f']);
        let shared = match number {
            "80" | "87" => 163,
            "90" | "100" | "103" | "110" => 227,
            _ => 99,
        };
        let clusters = number.parse::<u32>().is_ok_and(|number| number >= 90);
        Self { shared_bytes: shared << 10, clusters }
    }
}
