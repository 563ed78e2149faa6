//! What is in the way of an import, all of it: `compile` ends with it, `--check-support` lists it.

use crate::error::{OnnxError, UnsupportedNode};

/// What was found at the nodes of a model.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Nodes that are not supported, or not as they are.
    pub(crate) unsupported: Vec<UnsupportedNode>,
    /// Nodes that contradict what is known of the model, or need data that nobody gave; with the error that each is.
    pub(crate) faults: Vec<(UnsupportedNode, OnnxError)>,
    /// Nodes that were not looked at, because they read results of such nodes.
    pub(crate) skipped: Vec<UnsupportedNode>,
}

impl Findings {
    /// The error that import ends with, if anything was found.
    pub(crate) fn into_error(self) -> Option<OnnxError> {
        if !self.unsupported.is_empty() {
            return Some(OnnxError::Unsupported(self.unsupported));
        }
        self.faults.into_iter().next().map(|(_, error)| error)
    }
}
