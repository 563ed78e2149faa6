//! Names that are new: of nodes without one, and of what comes out of an inlined function.

use std::collections::{BTreeMap, BTreeSet};

use crate::messages::GraphProto;

/// The names in use, so that made-up ones are new.
#[derive(Default)]
pub(crate) struct Names {
    given_nodes: BTreeSet<String>,
    used_nodes: BTreeSet<String>,
    values: BTreeSet<String>,
    /// Next number to try after a name that is taken.
    suffixes: BTreeMap<String, u64>,
}

impl Names {
    /// Takes every name that a graph and its bodies use.
    pub(crate) fn reserve_all(&mut self, graph: &GraphProto) {
        let values = graph.input.iter().map(|value| &value.name);
        self.values.extend(values.chain(graph.initializer.iter().map(|tensor| &tensor.name)).cloned());
        for node in &graph.node {
            self.given_nodes.insert(node.name.clone());
            self.values.extend(node.output.iter().cloned());
            for attribute in &node.attribute {
                for body in attribute.g.as_deref().into_iter().chain(&attribute.graphs) {
                    self.reserve_all(body);
                }
            }
        }
    }

    /// A node's name: as the model gives it if nobody has it yet.
    pub(crate) fn node(&mut self, base: String, is_given: bool) -> String {
        if is_given && self.used_nodes.insert(base.clone()) {
            return base;
        }
        let taken = |names: &Self, name: &str| names.given_nodes.contains(name) || names.used_nodes.contains(name);
        let name = self.numbered(base, taken);
        self.used_nodes.insert(name.clone());
        name
    }

    /// A new value name, `base` if it is not taken.
    pub(crate) fn value(&mut self, base: String) -> String {
        let name = self.numbered(base, |names, name| names.values.contains(name));
        self.values.insert(name.clone());
        name
    }

    fn numbered(&mut self, base: String, taken: impl Fn(&Self, &str) -> bool) -> String {
        if !taken(self, &base) {
            return base;
        }
        let mut suffix = self.suffixes.get(&base).copied().unwrap_or(1);
        while taken(self, &format!("{base}_{suffix}")) {
            suffix += 1;
        }
        let name = format!("{base}_{suffix}");
        self.suffixes.insert(base, suffix + 1);
        name
    }
}
