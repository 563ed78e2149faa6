//! Evaluates weight recipes, whole or one box at a time, so that a large weight never has to be in memory at once.
//!
//! A wanted box of the result is pulled backward through the recipe: movement and element-wise primitives turn it into
//! boxes of their operands, so that in the end only the parts of the ingredients that matter are read. Primitives that
//! mix elements (products, reductions) are evaluated on whole operands.

mod demand;
mod ingredient;
mod reshape;

use planfile::{DType, Recipe, Tensor, TensorType};
use thiserror::Error;

use crate::error::CpuError;
use demand::Plan;

/// Positioned reads of the model's files.
pub trait WeightBytes: Sync {
    /// Fills `into` with the bytes of source file number `file` from `offset` on.
    ///
    /// # Errors
    /// When there is no such file, it ends too early or cannot be read.
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError>;
}

/// For recipes that need no file: every read fails.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFiles;

impl WeightBytes for NoFiles {
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        Err(WeightReadError { file, offset, bytes: into.len() as u64, why: "no files were given".to_owned() })
    }
}

/// A read of a source file that failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("reading {bytes} bytes at {offset} of source file {file}: {why}")]
pub struct WeightReadError {
    pub file: u32,
    pub offset: u64,
    pub bytes: u64,
    pub why: String,
}

/// Why a recipe could not be evaluated.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecipeError {
    #[error("the weight's recipe is malformed: {0}")]
    Malformed(String),
    #[error("the box {region} does not fit in {ty}, or the memory for it has another size")]
    Region { region: Region, ty: TensorType },
    #[error("{ty} takes {bytes} bytes, more than there is memory; use a machine with more of it")]
    Memory { ty: TensorType, bytes: u64 },
    #[error(transparent)]
    Read(#[from] WeightReadError),
    #[error(transparent)]
    Evaluate(#[from] CpuError),
}

impl RecipeError {
    /// There is less memory than a tensor of this type takes.
    pub fn memory(ty: &TensorType) -> Self {
        Self::Memory { ty: ty.clone(), bytes: ty.bytes().unwrap_or(u64::MAX) }
    }

    /// Whether it is for want of memory, and with more of it there would be no error.
    pub fn is_memory(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Evaluate(CpuError::Memory { .. }))
    }
}

/// A box within a tensor: first element and number of elements of each dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    pub starts: Vec<u64>,
    pub sizes: Vec<u64>,
}

impl Region {
    /// All of a tensor.
    pub fn whole(ty: &TensorType) -> Self {
        Self { starts: vec![0; ty.rank()], sizes: ty.sizes() }
    }

    /// Number of elements; saturates.
    pub fn elements(&self) -> u64 {
        self.sizes.iter().fold(1, |product: u64, &size| product.saturating_mul(size))
    }

    /// Whether every element of the box is an element of `ty`.
    pub fn fits(&self, ty: &TensorType) -> bool {
        let within =
            |(axis, &size): (usize, &u64)| self.starts[axis].checked_add(size).is_some_and(|end| end <= ty.size(axis));
        self.starts.len() == ty.rank() && self.sizes.len() == ty.rank() && self.sizes.iter().enumerate().all(within)
    }

    /// The type of a tensor that holds just the box.
    pub fn ty(&self, dtype: DType) -> TensorType {
        TensorType::new(dtype, &self.sizes)
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges: Vec<String> =
            self.starts.iter().zip(&self.sizes).map(|(start, size)| format!("{start}+{size}")).collect();
        write!(f, "[{}]", ranges.join(", "))
    }
}

/// Evaluates `region` of the recipe's result, row-major and little-endian, into `out`.
///
/// Holds the parts of the intermediate results that the box needs, and whole operands of primitives that mix elements.
///
/// # Errors
/// [`RecipeError::Region`] when the box or `out` does not fit the result; otherwise what reading or evaluating reports.
pub fn read_region(
    recipe: &Recipe,
    region: &Region,
    bytes: &dyn WeightBytes,
    out: &mut [u8],
) -> Result<(), RecipeError> {
    let plan = Plan::new(recipe, region)?;
    if region.ty(plan.result_type().dtype).bytes() != Some(out.len() as u64) {
        return Err(RecipeError::Region { region: region.clone(), ty: plan.result_type().clone() });
    }
    plan.evaluate_into(bytes, out)
}

/// What reading the ingredients of `region` costs, as bytes of a plain read from front to back: less for boxes that lie
/// in few long runs of the files. To compare boxes by; saturates.
///
/// # Errors
/// As [`read_region`], but nothing is read.
pub fn read_cost(recipe: &Recipe, region: &Region) -> Result<u64, RecipeError> {
    Ok(Plan::new(recipe, region)?.read_cost())
}

/// Evaluates a recipe's whole result.
///
/// # Errors
/// As [`read_region`].
pub fn read_all(recipe: &Recipe, bytes: &dyn WeightBytes) -> Result<Tensor, RecipeError> {
    let ty = demand::result_type(recipe)?;
    let mut tensor = Tensor::zeroed(ty.clone()).ok_or_else(|| RecipeError::memory(&ty))?;
    read_region(recipe, &Region::whole(&ty), bytes, tensor.data.bytes_mut())?;
    Ok(tensor)
}

#[cfg(test)]
mod tests;
