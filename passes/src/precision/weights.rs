//! The weight table while it is converted: each weight in each type that somebody reads it in.

use std::collections::{BTreeSet, HashMap};

use cpu::evaluate;
use ir::{Weight, WeightId};
use planfile::{DType, Dim, Op, Recipe, Scalar, Source, SpecNode, Tensor, TensorType};

use super::cast::{convert, exceeds, has_large_constant};
use super::{CONSTANT_BYTES, NAME};
use crate::error::PassError;

pub(super) struct Weights<'a> {
    old: &'a [Weight],
    /// The type that the module is converted to.
    dtype: DType,
    /// The old weight and the type of each new one.
    table: Vec<(WeightId, DType)>,
    known: HashMap<(WeightId, DType), WeightId>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(old: &'a [Weight], dtype: DType) -> Self {
        Self { old, dtype, table: Vec::new(), known: HashMap::new() }
    }

    /// The number in the new table of an old weight in this type.
    pub(super) fn get(&mut self, id: WeightId, dtype: DType) -> (WeightId, TensorType) {
        let table = &mut self.table;
        let new = *self.known.entry((id, dtype)).or_insert_with(|| {
            table.push((id, dtype));
            WeightId(table.len() as u32 - 1)
        });
        (new, self.old[id.index()].ty.with_dtype(dtype))
    }

    /// The type in which an expression reads it: a constant stays what it is, a table becomes the half type.
    pub(super) fn of_expression(&self, id: WeightId) -> DType {
        let ty = &self.old[id.index()].ty;
        match ty.dtype {
            dtype if dtype == self.dtype => dtype,
            _ if ty.bytes().is_some_and(|bytes| bytes > CONSTANT_BYTES) => self.dtype,
            _ => DType::F32,
        }
    }

    /// Whether it is known to hold a finite number that is not finite in the type converted to. Values that lie in files
    /// are not looked at, so that what happens does not depend on training.
    pub(super) fn exceeds(&self, id: WeightId) -> bool {
        let Recipe { inputs, spec } = &self.old[id.index()].recipe;
        let large = |node: &SpecNode| match &node.op {
            Op::Pointwise { expr, .. } => has_large_constant(expr, self.dtype),
            _ => false,
        };
        let inline = inputs.iter().any(|input| match (&input.source, input.ty.dtype) {
            (Source::Inline(buffer), dtype @ (DType::F32 | DType::BF16)) => {
                let mut elements = buffer.bytes().chunks_exact(dtype.bytes());
                elements.any(|bytes| Scalar::from_bytes(dtype, bytes).is_some_and(|x| exceeds(x.to_f64(), self.dtype)))
            }
            _ => false,
        });
        inline || spec.nodes.iter().any(large)
    }

    /// The new weights. The first type that a weight is read in keeps its name; another one is named after its type too.
    ///
    /// # Errors
    /// When a constant of the module cannot be converted, which would be a bug.
    pub(super) fn into_table(self) -> Result<Vec<Weight>, PassError> {
        let mut names: BTreeSet<String> = self.old.iter().map(|weight| weight.name.clone()).collect();
        let mut seen = BTreeSet::new();
        let mut weights = Vec::new();
        for &(id, dtype) in &self.table {
            let weight = &self.old[id.index()];
            let mut name = weight.name.clone();
            if !seen.insert(id) {
                name = format!("{name}.{dtype}");
                while !names.insert(name.clone()) {
                    name.push('_');
                }
            }
            let ty = weight.ty.with_dtype(dtype);
            let recipe = if ty == weight.ty { weight.recipe.clone() } else { self.converted(id, dtype)? };
            weights.push(Weight { name, ty, recipe });
        }
        Ok(weights)
    }

    fn converted(&self, id: WeightId, dtype: DType) -> Result<Recipe, PassError> {
        let Weight { ty, recipe, .. } = &self.old[id.index()];
        // Trained weights never come near the limits of bf16, which are nearly those of f32; masks may lie there.
        let saturate = dtype == DType::F16 || self.exceeds(id);
        let dims = ty.sizes().into_iter().map(Dim::Static).collect();
        let op = Op::Pointwise { expr: convert(ty.dtype, dtype, saturate), dims };
        let recipe = recipe.clone();
        if let (true, [input]) = (recipe.spec.nodes.is_empty(), recipe.inputs.as_slice())
            && let Source::Inline(data) = &input.source
        {
            // Small and here already: converted now, so that the plan keeps half of the bytes.
            let tensor = Tensor { ty: ty.clone(), data: data.clone() };
            let result = evaluate(&op, &[&tensor]).map_err(|error| PassError::invalid(NAME, error))?;
            let result = result.into_iter().next().ok_or_else(|| PassError::invalid(NAME, "a cast has no result"))?;
            return Ok(Recipe::source(result.ty, Source::Inline(result.data)));
        }
        recipe.then(op).map_err(|why| PassError::invalid(NAME, why))
    }
}
