//! The weight table while it is rewritten: equal weights are one, names stay unique, small ones can be read.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use cpu::recipe::{WeightBytes, read_all};
use ir::{Origin, Weight, WeightId};
use planfile::{Recipe, Source, Tensor, TensorType};

use crate::error::PassError;

/// Weights up to this size are read when it may help to know their values.
pub(super) const READABLE_BYTES: u64 = 1 << 20;

pub(super) struct Weights<'a> {
    table: Vec<Weight>,
    known: HashMap<(TensorType, Recipe), WeightId>,
    names: HashSet<String>,
    /// Next number to try for a name that is taken.
    numbers: HashMap<String, usize>,
    tensors: HashMap<WeightId, Rc<Tensor>>,
    bytes: &'a dyn WeightBytes,
}

impl<'a> Weights<'a> {
    /// The table with equal weights merged, the first one's name kept; and where each weight went.
    pub(super) fn new(weights: &[Weight], bytes: &'a dyn WeightBytes) -> (Self, Vec<WeightId>) {
        let mut table = Self {
            table: Vec::new(),
            known: HashMap::new(),
            names: HashSet::new(),
            numbers: HashMap::new(),
            tensors: HashMap::new(),
            bytes,
        };
        let renamed = weights.iter().map(|weight| table.insert(weight.clone())).collect();
        (table, renamed)
    }

    fn insert(&mut self, weight: Weight) -> WeightId {
        let key = (weight.ty.clone(), weight.recipe.clone());
        if let Some(&id) = self.known.get(&key) {
            return id;
        }
        let id = WeightId(self.table.len() as u32);
        self.known.insert(key, id);
        self.names.insert(weight.name.clone());
        self.table.push(weight);
        id
    }

    /// The weight of this recipe; named after the node that it replaces if it is new.
    pub(super) fn add(&mut self, ty: TensorType, recipe: Recipe, origin: &Origin, fallback: &str) -> WeightId {
        if let Some(&id) = self.known.get(&(ty.clone(), recipe.clone())) {
            return id;
        }
        let base = origin.first().map_or(fallback, |name| name);
        let mut name = base.to_owned();
        while self.names.contains(&name) {
            let number = self.numbers.entry(base.to_owned()).or_default();
            *number += 1;
            name = format!("{base}.{number}");
        }
        self.insert(Weight { name, ty, recipe })
    }

    /// A constant kept in the module itself.
    pub(super) fn add_inline(&mut self, tensor: Tensor, origin: &Origin, fallback: &str) -> WeightId {
        let Tensor { ty, data } = tensor;
        self.add(ty.clone(), Recipe::source(ty, Source::Inline(data)), origin, fallback)
    }

    pub(super) fn get(&self, id: WeightId) -> &Weight {
        &self.table[id.index()]
    }

    /// Whether the weight is a plain constant in the module, not read from a file.
    pub(super) fn is_inline(&self, id: WeightId) -> bool {
        let recipe = &self.get(id).recipe;
        recipe.spec.nodes.is_empty() && recipe.inputs.iter().all(|input| matches!(input.source, Source::Inline(_)))
    }

    /// The values of a weight of at most [`READABLE_BYTES`]; `None` for larger ones.
    pub(super) fn read(&mut self, id: WeightId) -> Result<Option<Rc<Tensor>>, PassError> {
        if let Some(tensor) = self.tensors.get(&id) {
            return Ok(Some(Rc::clone(tensor)));
        }
        let weight = self.get(id);
        if weight.ty.bytes().is_none_or(|bytes| bytes > READABLE_BYTES) {
            return Ok(None);
        }
        let tensor = read_all(&weight.recipe, self.bytes);
        let tensor = tensor.map_err(|source| PassError::Weights { weight: weight.name.clone(), source })?;
        let tensor = Rc::new(tensor);
        self.tensors.insert(id, Rc::clone(&tensor));
        Ok(Some(tensor))
    }

    pub(super) fn into_table(self) -> Vec<Weight> {
        self.table
    }
}
