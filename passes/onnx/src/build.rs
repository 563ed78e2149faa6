//! The module under construction, and evaluation of those of its values that shapes depend on.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ir::{Graph, Module, ValueDef, ValueId, Weight, WeightId};
use planfile::{Buffer, Recipe, Source, Tensor, TensorType};

use crate::context::OpError;
use crate::source_files::{FileIndex, WeightFiles};
use crate::tensor_data::{self, TensorSource};

/// Largest tensor, in elements, that is read or computed to learn a shape. Shape arithmetic is far smaller; a large
/// tensor on that path would make import as slow as a run.
pub(crate) const CONSTANT_LIMIT_ELEMENTS: u64 = 1 << 16;

/// A module with one graph, both growing.
#[derive(Default)]
pub(crate) struct Builder {
    pub(crate) module: Module,
    pub(crate) graph: Graph,
    /// Whether each weight file is absent, by index.
    pub(crate) absent: Vec<bool>,
    /// Seed that stands in for absent weight files.
    pub(crate) random_weights: Option<u64>,
    /// Name, and sample where one was given, by input number.
    pub(crate) inputs: Vec<(String, Option<Tensor>)>,
    /// Names that weights have or will have.
    pub(crate) weight_names: BTreeSet<String>,
    /// Inputs whose samples shapes depend on.
    pub(crate) pinned: BTreeSet<u32>,
    /// Values computed so far. Looked up, never walked.
    pub(crate) known: HashMap<ValueId, Tensor>,
    pub(crate) literals: BTreeMap<Tensor, ValueId>,
}

impl Builder {
    /// Adds an initializer of the model as a weight; its bytes stay where they are.
    pub(crate) fn initializer(&mut self, name: &str, tensor: &tensor_data::Tensor) -> ValueId {
        let ty = TensorType::new(tensor.dtype, &tensor.dims);
        let source = match &tensor.source {
            TensorSource::Bytes(bytes) => Source::Inline(Buffer::from_bytes(bytes)),
            TensorSource::FileRange { file, offset, .. } => {
                let absent = self.absent.get(file.0 as usize).copied().unwrap_or(false);
                match self.random_weights.filter(|_| absent) {
                    Some(seed) => Source::Random { seed: named_seed(seed, name) },
                    None => Source::File { file: file.0, offset: *offset },
                }
            }
        };
        self.weight(name.to_owned(), ty, source)
    }

    /// A constant that import makes; equal ones are one weight.
    pub(crate) fn literal(&mut self, tensor: Tensor) -> ValueId {
        if let Some(&known) = self.literals.get(&tensor) {
            return known;
        }
        let name = self.fresh_name();
        let value = self.weight(name, tensor.ty.clone(), Source::Inline(tensor.data.clone()));
        self.literals.insert(tensor, value);
        value
    }

    fn fresh_name(&mut self) -> String {
        let mut number = self.literals.len();
        loop {
            let name = format!("const_{number}");
            if self.weight_names.insert(name.clone()) {
                return name;
            }
            number += 1;
        }
    }

    fn weight(&mut self, name: String, ty: TensorType, source: Source) -> ValueId {
        let id = WeightId(self.module.weights.len() as u32);
        let recipe = Recipe::source(ty.clone(), source);
        self.module.weights.push(Weight { name, ty: ty.clone(), recipe });
        self.graph.add_source(ty, ValueDef::Weight(id))
    }

    /// Names and samples of the inputs that shapes depend on, in the order of the inputs.
    pub(crate) fn pinned(&self) -> Vec<(String, Tensor)> {
        let input = |number: &u32| {
            let (name, sample) = self.inputs.get(*number as usize)?;
            Some((name.clone(), sample.clone()?))
        };
        self.pinned.iter().filter_map(input).collect()
    }

    /// The value, computed from weights, samples of inputs, and the nodes added so far. Iterative, each value once.
    pub(crate) fn constant(&mut self, wanted: ValueId, files: &WeightFiles) -> Result<Tensor, OpError> {
        let mut stack = vec![wanted];
        while let Some(&value) = stack.last() {
            if self.known.contains_key(&value) {
                stack.pop();
                continue;
            }
            let ValueDef::Node(id, _) = self.graph.value(value).def else {
                let tensor = self.source(value, files)?;
                self.known.insert(value, tensor);
                continue;
            };
            let node = self.graph.node(id);
            let unknown: Vec<ValueId> =
                node.operands.iter().copied().filter(|operand| !self.known.contains_key(operand)).collect();
            if !unknown.is_empty() {
                stack.extend(unknown);
                continue;
            }
            for &result in &node.results {
                check_limit(self.graph.ty(result))?;
            }
            let operands: Vec<&Tensor> = node.operands.iter().filter_map(|operand| self.known.get(operand)).collect();
            let results = cpu::evaluate(&node.op, &operands)
                .map_err(|error| OpError::Invalid { why: format!("cannot compute a shape: {error}") })?;
            let names = node.results.clone();
            if names.len() != results.len() {
                let why = format!("{} gave {} results, not {}", node.op.name(), results.len(), names.len());
                return Err(OpError::Invalid { why });
            }
            self.known.extend(names.into_iter().zip(results));
        }
        self.known.get(&wanted).cloned().ok_or_else(|| OpError::Invalid { why: "a shape has no value".to_owned() })
    }

    /// The value of something that no node defines.
    fn source(&mut self, value: ValueId, files: &WeightFiles) -> Result<Tensor, OpError> {
        match self.graph.value(value).def {
            ValueDef::Input(number) => match self.inputs.get(number as usize) {
                Some((_, Some(sample))) => {
                    self.pinned.insert(number);
                    Ok(sample.clone())
                }
                Some((name, None)) => Err(OpError::DataDependent { input: name.clone() }),
                None => Err(OpError::Invalid { why: format!("there is no input {number}") }),
            },
            ValueDef::Weight(id) => {
                let weight = self.module.weight(id);
                check_limit(&weight.ty)?;
                let source = weight.recipe.inputs.first().map(|input| &input.source);
                read_source(&weight.ty, source, files)
            }
            ValueDef::State(_) | ValueDef::Node(..) => {
                Err(OpError::Invalid { why: "a shape depends on a value that changes from run to run".to_owned() })
            }
        }
    }
}

/// Bytes of a tensor of the model, read now.
pub(crate) fn read(tensor: &tensor_data::Tensor, files: &WeightFiles) -> Result<Tensor, OpError> {
    let ty = TensorType::new(tensor.dtype, &tensor.dims);
    check_limit(&ty)?;
    let mut result = zeroed(ty)?;
    files.read_tensor(&tensor.source, 0, result.data.bytes_mut())?;
    Ok(result)
}

fn read_source(ty: &TensorType, source: Option<&Source>, files: &WeightFiles) -> Result<Tensor, OpError> {
    let mut result = zeroed(ty.clone())?;
    match source {
        Some(Source::Inline(data)) => result.data = data.clone(),
        Some(Source::File { file, offset }) => {
            files.read_at(FileIndex(*file), *offset, result.data.bytes_mut())?;
        }
        Some(Source::Random { .. }) | None => {
            let why = "a shape depends on a weight whose file is absent; put the file there".to_owned();
            return Err(OpError::Invalid { why });
        }
    }
    Ok(result)
}

fn zeroed(ty: TensorType) -> Result<Tensor, OpError> {
    let why = format!("{ty} does not fit in memory");
    Tensor::zeroed(ty).ok_or(OpError::Invalid { why })
}

fn check_limit(ty: &TensorType) -> Result<(), OpError> {
    if ty.elements().is_some_and(|elements| elements <= CONSTANT_LIMIT_ELEMENTS) {
        return Ok(());
    }
    let hint = format!("a shape depends on a tensor of type {ty}; the limit is {CONSTANT_LIMIT_ELEMENTS} elements");
    Err(OpError::Unsupported { hint })
}

/// The seed of one weight: FNV-1a over its name, started from `seed`. Stable over releases, which std's hasher is not.
fn named_seed(seed: u64, name: &str) -> u64 {
    let start = seed ^ 0xcbf2_9ce4_8422_2325;
    name.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
