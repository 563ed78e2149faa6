//! Straight-line lists of primitives: what a kernel computes, and how a weight is made.

use serde::{Deserialize, Serialize};

use crate::infer::infer;
use crate::op::Op;
use crate::tensor::Buffer;
use crate::types::TensorType;

/// One primitive of a [`Spec`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SpecNode {
    pub op: Op,
    /// Values by number: the spec's inputs come first, then the results of its nodes in order.
    pub operands: Vec<u32>,
}

/// A straight-line program over named operands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Spec {
    pub inputs: Vec<TensorType>,
    pub nodes: Vec<SpecNode>,
    /// Values by number.
    pub results: Vec<u32>,
}

impl Spec {
    /// One primitive on operands of these types. Its results are all of the primitive's.
    ///
    /// # Errors
    /// What [`infer`] reports.
    pub fn of(op: Op, inputs: Vec<TensorType>) -> Result<Self, String> {
        let count = infer(&op, &inputs.iter().collect::<Vec<_>>())?.len();
        let first = inputs.len() as u32;
        let operands = (0..first).collect();
        Ok(Self { inputs, nodes: vec![SpecNode { op, operands }], results: (first..first + count as u32).collect() })
    }

    /// The input itself: a spec without primitives.
    pub fn identity(ty: TensorType) -> Self {
        Self { inputs: vec![ty], nodes: Vec::new(), results: vec![0] }
    }

    /// Types of all values, by number.
    ///
    /// # Errors
    /// The first node whose operands are out of range or do not fit, or a result out of range.
    pub fn types(&self) -> Result<Vec<TensorType>, String> {
        let mut types = self.inputs.clone();
        for (position, node) in self.nodes.iter().enumerate() {
            let operands: Option<Vec<&TensorType>> =
                node.operands.iter().map(|&operand| types.get(operand as usize)).collect();
            let operands = operands.ok_or_else(|| format!("node {position} reads a value that is not defined yet"))?;
            let results = infer(&node.op, &operands);
            types.extend(results.map_err(|why| format!("node {position} ({}): {why}", node.op.name()))?);
        }
        match self.results.iter().find(|&&result| result as usize >= types.len()) {
            Some(result) => Err(format!("result {result} is not defined")),
            None => Ok(types),
        }
    }

    /// Types of the results.
    ///
    /// # Errors
    /// As [`Self::types`].
    pub fn result_types(&self) -> Result<Vec<TensorType>, String> {
        let types = self.types()?;
        Ok(self.results.iter().map(|&result| types[result as usize].clone()).collect())
    }
}

/// A file that weights are read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceFile {
    /// Relative to the model's folder.
    pub name: String,
    pub bytes: u64,
}

/// Where the bytes of a weight's ingredient are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Source {
    /// Row-major little-endian bytes in a source file, from `offset`.
    File { file: u32, offset: u64 },
    /// In the plan itself: small constants.
    Inline(Buffer),
    /// Seeded noise, for planning without the weights: the same for the same seed, whoever reads which part.
    Random { seed: u64 },
}

/// An ingredient of a weight.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RecipeInput {
    pub ty: TensorType,
    pub source: Source,
}

/// How a weight is made from the model's files: ingredients, and primitives applied to them. One result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Recipe {
    pub inputs: Vec<RecipeInput>,
    pub spec: Spec,
}

impl Recipe {
    /// Ingredients taken as they are.
    pub fn source(ty: TensorType, source: Source) -> Self {
        Self { spec: Spec::identity(ty.clone()), inputs: vec![RecipeInput { ty, source }] }
    }

    /// The recipe, with one more primitive on its result.
    ///
    /// # Errors
    /// What does not fit, or a recipe of several results.
    pub fn then(mut self, op: Op) -> Result<Self, String> {
        let &[last] = self.spec.results.as_slice() else { return Err("a recipe has several results".to_owned()) };
        let result = self.spec.types()?.len() as u32;
        self.spec.nodes.push(SpecNode { op, operands: vec![last] });
        self.spec.results = vec![result];
        self.spec.result_types().map(|_| self)
    }
}
