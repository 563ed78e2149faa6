//! Types that a model states of its values: with them an import goes on after a node that it cannot take, to find what
//! else is in the way.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use planfile::TensorType;

use crate::bindings::InputType;
use crate::dim_expr::evaluate;
use crate::flat::{Container, DimSpec, Graph, ValueInfo};

/// What is stated, and what of it was used.
pub(crate) struct StandIns<'m> {
    graph: &'m Graph,
    /// Sizes that the inputs give to symbols.
    symbols: BTreeMap<&'m str, u64>,
    /// Gathered when the first one is asked for. Looked up, never walked.
    stated: Option<HashMap<&'m str, &'m ValueInfo>>,
    used: BTreeSet<String>,
}

impl<'m> StandIns<'m> {
    pub(crate) fn new(graph: &'m Graph, types: &[InputType]) -> Self {
        let mut symbols = BTreeMap::new();
        for (input, ty) in graph.inputs.iter().zip(types) {
            let (InputType::Known { ty, .. }, Some(dims)) = (ty, &input.dims) else { continue };
            for (dim, size) in dims.iter().zip(ty.sizes()) {
                if let DimSpec::Param(name) = dim {
                    symbols.entry(name.as_str()).or_insert(size);
                }
            }
        }
        Self { graph, symbols, stated: None, used: BTreeSet::new() }
    }

    /// The type that the model states of a value; from now on it counts as used.
    pub(crate) fn take(&mut self, name: &str) -> Option<TensorType> {
        let graph = self.graph;
        let stated = self.stated.get_or_insert_with(|| {
            let infos = graph.value_info.iter().chain(&graph.outputs);
            infos.map(|info| (info.name.as_str(), info)).collect()
        });
        let info = *stated.get(name)?;
        let (Container::Tensor, Some(dims)) = (info.container, &info.dims) else { return None };
        let symbol = |name: &str| self.symbols.get(name).copied();
        let size = |dim: &DimSpec| match dim {
            DimSpec::Value(size) => Some(*size),
            DimSpec::Param(name) => symbol(name).or_else(|| evaluate(name, &symbol)),
            DimSpec::Unknown => None,
        };
        let sizes: Vec<u64> = dims.iter().map(size).collect::<Option<_>>()?;
        let ty = TensorType::new(info.elem_type.dtype().ok()?, &sizes);
        ty.bytes()?;
        self.used.insert(name.to_owned());
        Some(ty)
    }

    pub(crate) fn is_used(&self) -> bool {
        !self.used.is_empty()
    }

    /// Whether this is a value that was taken.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.used.contains(name)
    }
}
