//! The module under construction, and evaluation of those of its values that shapes depend on.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ir::{Graph, Module, ValueDef, ValueId, Weight, WeightId};
use planfile::{Buffer, FrozenInput, Recipe, Source, Tensor, TensorType};

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
    /// Inputs whose samples were needed, by number, and who needed them.
    pub(crate) frozen: BTreeMap<u32, Readers>,
    /// Values computed so far. Looked up, never walked.
    pub(crate) known: HashMap<ValueId, Known>,
    pub(crate) literals: BTreeMap<Tensor, ValueId>,
}

/// A value computed now.
pub(crate) struct Known {
    tensor: Tensor,
    /// Numbers of the inputs whose samples decided it.
    inputs: BTreeSet<u32>,
}

/// Nodes of the model that need an input's value.
pub(crate) struct Readers {
    first: String,
    /// Of a node that asks more than once, each time counts as one.
    last: String,
    count: u32,
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

    /// Inputs whose samples shapes or branches depend on, in the order of the inputs.
    pub(crate) fn frozen(&self) -> Vec<FrozenInput> {
        let input = |(&number, readers): (&u32, &Readers)| {
            let (name, sample) = self.inputs.get(number as usize)?;
            let (input, value, node) = (name.clone(), sample.clone()?, readers.first.clone());
            Some(FrozenInput { input, value, node, nodes: readers.count })
        };
        self.frozen.iter().filter_map(input).collect()
    }

    /// The value that a node of this name needs now, computed from weights, samples of inputs, and the nodes added so far.
    pub(crate) fn constant(&mut self, wanted: ValueId, node: &str, files: &WeightFiles) -> Result<Tensor, OpError> {
        self.evaluate(wanted, files)?;
        let known = self.known.get(&wanted);
        let known = known.ok_or_else(|| OpError::Invalid { why: "a shape has no value".to_owned() })?;
        for &input in &known.inputs {
            match self.frozen.get_mut(&input) {
                Some(readers) if readers.last == node => {}
                Some(readers) => {
                    node.clone_into(&mut readers.last);
                    readers.count += 1;
                }
                None => {
                    let readers = Readers { first: node.to_owned(), last: node.to_owned(), count: 1 };
                    self.frozen.insert(input, readers);
                }
            }
        }
        Ok(known.tensor.clone())
    }

    /// Makes the value known. Iterative, each value once.
    fn evaluate(&mut self, wanted: ValueId, files: &WeightFiles) -> Result<(), OpError> {
        let mut stack = vec![wanted];
        while let Some(&value) = stack.last() {
            if self.known.contains_key(&value) {
                stack.pop();
                continue;
            }
            let ValueDef::Node(id, _) = self.graph.value(value).def else {
                let tensor = self.source(value, files)?;
                let input = match self.graph.value(value).def {
                    ValueDef::Input(number) => Some(number),
                    _ => None,
                };
                self.known.insert(value, Known { tensor, inputs: input.into_iter().collect() });
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
            let operands: Vec<&Known> = node.operands.iter().filter_map(|operand| self.known.get(operand)).collect();
            let inputs: BTreeSet<u32> = operands.iter().flat_map(|known| known.inputs.iter().copied()).collect();
            let operands: Vec<&Tensor> = operands.into_iter().map(|known| &known.tensor).collect();
            let results = cpu::evaluate(&node.op, &operands)
                .map_err(|error| OpError::Invalid { why: format!("cannot compute a shape: {error}") })?;
            let names = node.results.clone();
            if names.len() != results.len() {
                let why = format!("{} gave {} results, not {}", node.op.name(), results.len(), names.len());
                return Err(OpError::Invalid { why });
            }
            let results = results.into_iter().map(|tensor| Known { tensor, inputs: inputs.clone() });
            self.known.extend(names.into_iter().zip(results));
        }
        Ok(())
    }

    /// The value of something that no node defines.
    fn source(&self, value: ValueId, files: &WeightFiles) -> Result<Tensor, OpError> {
        match self.graph.value(value).def {
            ValueDef::Input(number) => match self.inputs.get(number as usize) {
                Some((_, Some(sample))) => Ok(sample.clone()),
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
