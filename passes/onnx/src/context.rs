//! What an operator's lowering sees: one ONNX node, its operands, and the graph it adds primitives to.

use ir::{Origin, ValueId};
use planfile::types::element_count;
use planfile::{DType, Dim, Expr, Op, RankScalar, Scalar, Tensor, TensorType};
use thiserror::Error;

use crate::build::{Builder, read};
use crate::error::OnnxError;
use crate::flat::{Attribute, Node};
use crate::source_files::WeightFiles;

/// Why a node could not be lowered.
#[derive(Debug, Error)]
pub(crate) enum OpError {
    /// The operator or this form of it is not supported; import goes on, to list all such nodes.
    #[error("{hint}")]
    Unsupported { hint: String },
    /// The node breaks ONNX's rules, or the shapes at hand.
    #[error("{why}")]
    Invalid { why: String },
    /// A shape depends on the data in this graph input.
    #[error("a shape depends on the data in input `{input}`")]
    DataDependent { input: String },
    /// A weight that a shape depends on could not be read.
    #[error("{0}")]
    Read(Box<OnnxError>),
}

impl From<OnnxError> for OpError {
    fn from(error: OnnxError) -> Self {
        Self::Read(Box::new(error))
    }
}

/// One ONNX node being lowered.
pub(crate) struct Context<'a> {
    builder: &'a mut Builder,
    files: &'a WeightFiles,
    node: &'a Node,
    operands: Vec<Option<ValueId>>,
    origin: Origin,
}

/// An attribute's value, of the kind that the reader expects.
macro_rules! attribute {
    ($self:ident, $name:ident, $kind:ident, $expected:literal) => {
        match $self.node.attributes.get($name) {
            None => Ok(None),
            Some(Attribute::$kind(value)) => Ok(Some(value)),
            Some(Attribute::Unsupported(why)) => Err($self.unsupported(&format!("attribute `{}`: {why}", $name))),
            Some(_) => Err($self.invalid(&format!("attribute `{}` is not {}", $name, $expected))),
        }
    };
}

impl<'a> Context<'a> {
    /// `operands` go with the node's inputs one to one; `None` where one is left out.
    pub(crate) fn new(
        builder: &'a mut Builder,
        files: &'a WeightFiles,
        node: &'a Node,
        operands: Vec<Option<ValueId>>,
    ) -> Self {
        Self { builder, files, node, operands, origin: ir::module::origin(&node.name) }
    }

    // --- the node ---------------------------------------------------------------------------------------------------

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Version of the node's domain in force.
    pub(crate) fn opset(&self) -> i64 {
        self.node.opset
    }

    /// A required input.
    pub(crate) fn operand(&self, index: usize) -> Result<ValueId, OpError> {
        self.optional(index).ok_or_else(|| self.invalid(&format!("input {index} is missing")))
    }

    /// An optional input; `None` when left out or named "".
    pub(crate) fn optional(&self, index: usize) -> Option<ValueId> {
        self.operands.get(index).copied().flatten()
    }

    /// All inputs, `None` where one is left out.
    pub(crate) fn operands(&self) -> Vec<Option<ValueId>> {
        self.operands.clone()
    }

    /// All inputs of a variadic operator: at least one, none left out.
    pub(crate) fn variadic(&self) -> Result<Vec<ValueId>, OpError> {
        let operands: Option<Vec<ValueId>> = self.operands.iter().copied().collect();
        operands.filter(|operands| !operands.is_empty()).ok_or_else(|| self.invalid("an input is missing"))
    }

    /// Whether somebody may read the output: it is present and named.
    pub(crate) fn wants(&self, output: usize) -> bool {
        self.node.outputs.get(output).is_some_and(|name| !name.is_empty())
    }

    // --- types ------------------------------------------------------------------------------------------------------

    pub(crate) fn ty(&self, value: ValueId) -> &TensorType {
        self.builder.graph.ty(value)
    }

    pub(crate) fn sizes(&self, value: ValueId) -> Vec<u64> {
        self.ty(value).sizes()
    }

    pub(crate) fn dtype(&self, value: ValueId) -> DType {
        self.ty(value).dtype
    }

    pub(crate) fn rank(&self, value: ValueId) -> usize {
        self.ty(value).rank()
    }

    // --- attributes -------------------------------------------------------------------------------------------------

    pub(crate) fn has(&self, name: &str) -> bool {
        self.node.attributes.contains_key(name)
    }

    pub(crate) fn int(&self, name: &str, default: i64) -> Result<i64, OpError> {
        Ok(attribute!(self, name, Int, "an integer")?.copied().unwrap_or(default))
    }

    /// An integer attribute that has no default.
    pub(crate) fn required_int(&self, name: &str) -> Result<i64, OpError> {
        let value = attribute!(self, name, Int, "an integer")?;
        value.copied().ok_or_else(|| self.invalid(&format!("attribute `{name}` is missing")))
    }

    /// An integer attribute that says yes (not 0) or no.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, OpError> {
        Ok(self.int(name, i64::from(default))? != 0)
    }

    pub(crate) fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, OpError> {
        Ok(attribute!(self, name, Ints, "a list of integers")?.cloned())
    }

    pub(crate) fn float(&self, name: &str, default: f32) -> Result<f32, OpError> {
        Ok(attribute!(self, name, Float, "a number")?.copied().unwrap_or(default))
    }

    pub(crate) fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, OpError> {
        Ok(attribute!(self, name, Floats, "a list of numbers")?.cloned())
    }

    pub(crate) fn string(&self, name: &str, default: &str) -> Result<String, OpError> {
        Ok(attribute!(self, name, String, "a string")?.cloned().unwrap_or_else(|| default.to_owned()))
    }

    pub(crate) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, OpError> {
        Ok(attribute!(self, name, Strings, "a list of strings")?.cloned())
    }

    pub(crate) fn tensor_attribute(&self, name: &str) -> Result<Option<Tensor>, OpError> {
        let tensor = attribute!(self, name, Tensor, "a tensor")?;
        tensor.map(|tensor| read(tensor, self.files)).transpose()
    }

    /// `value` as an axis of a tensor of `rank`; negative values count from the end.
    pub(crate) fn axis(&self, value: i64, rank: usize) -> Result<u8, OpError> {
        let from_front = if value < 0 { value.checked_add(rank as i64) } else { Some(value) };
        let axis = from_front.and_then(|axis| u8::try_from(axis).ok()).filter(|&axis| usize::from(axis) < rank);
        axis.ok_or_else(|| self.invalid(&format!("axis {value} is out of range for rank {rank}")))
    }

    /// `values` as distinct axes of a tensor of `rank`, in the order given.
    pub(crate) fn axes(&self, values: &[i64], rank: usize) -> Result<Vec<u8>, OpError> {
        let axes = values.iter().map(|&value| self.axis(value, rank)).collect::<Result<Vec<u8>, _>>()?;
        let mut sorted = axes.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if sorted.len() == axes.len() { Ok(axes) } else { Err(self.invalid(&format!("axes {values:?} repeat"))) }
    }

    // --- values known at compile time -------------------------------------------------------------------------------

    /// The value, computed now. Inputs with a sample count as known and are recorded as frozen.
    pub(crate) fn constant(&mut self, value: ValueId) -> Result<Tensor, OpError> {
        self.builder.constant(value, &self.node.name, self.files)
    }

    /// Elements of an integer value, computed now, row-major.
    pub(crate) fn constant_i64s(&mut self, value: ValueId) -> Result<Vec<i64>, OpError> {
        let tensor = self.constant(value)?;
        tensor.to_i64s().ok_or_else(|| self.invalid(&format!("expected integers, found {}", tensor.ty)))
    }

    /// The only element of an integer value, computed now.
    pub(crate) fn constant_i64(&mut self, value: ValueId) -> Result<i64, OpError> {
        match self.constant_i64s(value)?.as_slice() {
            [element] => Ok(*element),
            elements => Err(self.invalid(&format!("expected one element, found {}", elements.len()))),
        }
    }

    /// Elements of a numeric value, computed now, as `f64`.
    pub(crate) fn constant_f64s(&mut self, value: ValueId) -> Result<Vec<f64>, OpError> {
        let tensor = self.constant(value)?;
        let dtype = tensor.ty.dtype;
        let scalars = tensor.data.bytes().chunks_exact(dtype.bytes());
        Ok(scalars.filter_map(|bytes| Scalar::from_bytes(dtype, bytes)).map(Scalar::to_f64).collect())
    }

    /// A constant kept in the plan.
    pub(crate) fn literal(&mut self, tensor: Tensor) -> ValueId {
        self.builder.literal(tensor)
    }

    /// A constant of rank 0.
    pub(crate) fn scalar(&mut self, dtype: DType, value: f64) -> ValueId {
        let ty = TensorType::new(dtype, &[]);
        let data = planfile::Buffer::from_bytes(&Scalar::from_f64(dtype, value).to_bytes());
        self.literal(Tensor { ty, data })
    }

    /// An `i64[n]` constant.
    pub(crate) fn literal_i64s(&mut self, values: &[i64]) -> ValueId {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let ty = TensorType::new(DType::I64, &[values.len() as u64]);
        self.literal(Tensor { ty, data: planfile::Buffer::from_bytes(&bytes) })
    }

    // --- primitives -------------------------------------------------------------------------------------------------

    /// Adds a primitive that has one result.
    pub(crate) fn emit(&mut self, op: Op, operands: &[ValueId]) -> Result<ValueId, OpError> {
        let name = op.name();
        let results = self.emit_all(op, operands)?;
        let [result] = results.as_slice() else {
            return Err(self.invalid(&format!("{name} has {} results where one is expected", results.len())));
        };
        Ok(*result)
    }

    pub(crate) fn emit_all(&mut self, op: Op, operands: &[ValueId]) -> Result<Vec<ValueId>, OpError> {
        self.builder.graph.add(op, operands, &self.origin).map_err(|error| match error {
            ir::IrError::Type { why, .. } => OpError::Invalid { why },
            other => OpError::Invalid { why: other.to_string() },
        })
    }

    /// An element-wise expression over operands that broadcast to each other.
    pub(crate) fn pointwise(&mut self, expr: Expr, operands: &[ValueId]) -> Result<ValueId, OpError> {
        let sizes = self.broadcast_sizes(operands)?;
        let dims = sizes.into_iter().map(Dim::Static).collect();
        self.emit(Op::Pointwise { expr, dims }, operands)
    }

    /// The shape that the operands broadcast to under NumPy's rules.
    pub(crate) fn broadcast_sizes(&self, operands: &[ValueId]) -> Result<Vec<u64>, OpError> {
        let mut result: Vec<u64> = Vec::new();
        for &operand in operands {
            let sizes = self.sizes(operand);
            if sizes.len() > result.len() {
                let missing = sizes.len() - result.len();
                result.splice(0..0, std::iter::repeat_n(1, missing));
            }
            for (have, &size) in result.iter_mut().rev().zip(sizes.iter().rev()) {
                match (*have, size) {
                    (1, _) => *have = size,
                    (n, m) if n == m || m == 1 => {}
                    _ => {
                        let types: Vec<String> = operands.iter().map(|&v| self.ty(v).to_string()).collect();
                        return Err(self.invalid(&format!("{} do not broadcast to each other", types.join(" and "))));
                    }
                }
            }
        }
        Ok(result)
    }

    /// The same elements under other sizes; no node if unchanged.
    pub(crate) fn reshape(&mut self, value: ValueId, sizes: &[u64]) -> Result<ValueId, OpError> {
        if self.sizes(value) == sizes {
            return Ok(value);
        }
        self.emit(Op::Reshape { dims: sizes.iter().copied().map(Dim::Static).collect() }, &[value])
    }

    /// Result dimension `i` is dimension `permutation[i]`; no node if that is the identity.
    pub(crate) fn transpose(&mut self, value: ValueId, permutation: &[u8]) -> Result<ValueId, OpError> {
        let identity = permutation.len() == self.rank(value)
            && permutation.iter().enumerate().all(|(position, &axis)| usize::from(axis) == position);
        if identity {
            return Ok(value);
        }
        self.emit(Op::Transpose { permutation: permutation.to_vec() }, &[value])
    }

    /// Converts the elements; no node if unchanged.
    pub(crate) fn cast(&mut self, value: ValueId, dtype: DType) -> Result<ValueId, OpError> {
        if self.dtype(value) == dtype {
            return Ok(value);
        }
        self.pointwise(Expr::operand(0).cast(dtype), &[value])
    }

    /// Repeats along dimensions of size 1 and new leading ones; no node if unchanged.
    pub(crate) fn broadcast(&mut self, value: ValueId, sizes: &[u64]) -> Result<ValueId, OpError> {
        if self.sizes(value) == sizes {
            return Ok(value);
        }
        self.emit(Op::Broadcast { dims: sizes.iter().copied().map(Dim::Static).collect() }, &[value])
    }

    /// The parts after each other along `axis`; no node for a single part.
    pub(crate) fn concat(&mut self, parts: &[ValueId], axis: u8) -> Result<ValueId, OpError> {
        match parts {
            [part] if usize::from(axis) < self.rank(*part) => Ok(*part),
            parts => self.emit(Op::Concat { axis }, parts),
        }
    }

    /// `size` elements from `start` on along one axis; no node if that is all of it.
    pub(crate) fn slice_axis(&mut self, value: ValueId, axis: u8, start: u64, size: u64) -> Result<ValueId, OpError> {
        let mut sizes = self.sizes(value);
        let mut starts = vec![0i64; sizes.len()];
        let steps = vec![1; sizes.len()];
        let Some(slot) = sizes.get_mut(usize::from(axis)) else {
            return Err(self.invalid(&format!("axis {axis} of {}", self.ty(value))));
        };
        if start == 0 && *slot == size {
            return Ok(value);
        }
        *slot = size;
        starts[usize::from(axis)] =
            i64::try_from(start).map_err(|_| self.invalid(&format!("start {start} is out of range")))?;
        self.slice(value, &starts, &steps, &sizes)
    }

    /// `sizes[i]` elements from `starts[i]` by `steps[i]` on each axis.
    pub(crate) fn slice(
        &mut self,
        value: ValueId,
        starts: &[i64],
        steps: &[i64],
        sizes: &[u64],
    ) -> Result<ValueId, OpError> {
        let starts = starts.iter().map(|&start| RankScalar::Uniform(start)).collect();
        self.emit(Op::Slice { starts, steps: steps.to_vec(), sizes: sizes.to_vec() }, &[value])
    }

    /// Inserts dimensions of size 1 at these axes of the result.
    pub(crate) fn unsqueeze(&mut self, value: ValueId, axes: &[u8]) -> Result<ValueId, OpError> {
        let mut rest = self.sizes(value).into_iter();
        let rank = self.rank(value) + axes.len();
        let sizes: Vec<u64> =
            (0..rank).map(|axis| if is_in(axes, axis) { 1 } else { rest.next().unwrap_or(1) }).collect();
        self.reshape(value, &sizes)
    }

    /// Removes these axes, all of size 1.
    pub(crate) fn squeeze(&mut self, value: ValueId, axes: &[u8]) -> Result<ValueId, OpError> {
        let sizes = self.sizes(value);
        if let Some(axis) = axes.iter().find(|&&axis| sizes.get(usize::from(axis)) != Some(&1)) {
            return Err(self.invalid(&format!("axis {axis} of {} is not of size 1", self.ty(value))));
        }
        let sizes: Vec<u64> =
            sizes.iter().enumerate().filter(|(axis, _)| !is_in(axes, *axis)).map(|(_, &size)| size).collect();
        self.reshape(value, &sizes)
    }

    // --- errors -----------------------------------------------------------------------------------------------------

    pub(crate) fn unsupported(&self, hint: &str) -> OpError {
        OpError::Unsupported { hint: hint.to_owned() }
    }

    pub(crate) fn invalid(&self, why: &str) -> OpError {
        OpError::Invalid { why: why.to_owned() }
    }

    /// Product of sizes, checked.
    pub(crate) fn count(&self, sizes: &[u64]) -> Result<u64, OpError> {
        element_count(sizes).ok_or_else(|| self.invalid(&format!("the product of sizes {sizes:?} overflows")))
    }
}

fn is_in(axes: &[u8], axis: usize) -> bool {
    axes.iter().any(|&other| usize::from(other) == axis)
}

/// A constant inside an expression.
pub(crate) fn number(dtype: DType, value: f64) -> Expr {
    Expr::constant(Scalar::from_f64(dtype, value))
}
