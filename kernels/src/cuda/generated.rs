//! Kernels generated from a specification, an element of the result at a time.

use planfile::Spec;

use super::{Launch, Options};

pub(super) fn select(_spec: &Spec, _options: &Options) -> Option<Launch> {
    None
}

/// Whether the whole specification runs well as one generated kernel.
pub fn accepts_fusion(_spec: &Spec) -> bool {
    false
}
