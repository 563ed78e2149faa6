//! Operands and results: typed windows into memory that somebody else owns.

use std::borrow::Cow;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use planfile::{DType, Tensor, TensorType};

use crate::error::CpuError;
use crate::number::Number;

/// A tensor somewhere in memory. Bytes are row-major, little-endian; bounded dimensions take their capacity.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub ty: &'a TensorType,
    pub bytes: &'a [u8],
}

/// A tensor somewhere in memory, to be written. Its earlier content does not matter.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub ty: &'a TensorType,
    pub bytes: &'a mut [u8],
}

impl<'a> From<&'a Tensor> for View<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { ty: &tensor.ty, bytes: tensor.data.bytes() }
    }
}

impl<'a> From<&'a mut Tensor> for ViewMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        Self { ty: &tensor.ty, bytes: tensor.data.bytes_mut() }
    }
}

/// Elements converted between half types and `f32` at a time.
const CHUNK: usize = 512;

/// Capacities as `usize`: every count that is used to address memory was checked against its length before.
pub(crate) fn sizes(ty: &TensorType) -> Vec<usize> {
    ty.dims.iter().map(|dim| usize::try_from(dim.capacity()).unwrap_or(usize::MAX)).collect()
}

/// Product of sizes: exact for a part of a tensor in memory, saturating where a zero elsewhere permits any size.
pub(crate) fn product(sizes: &[usize]) -> usize {
    if sizes.contains(&0) { 0 } else { sizes.iter().fold(1, |product, &size| product.saturating_mul(size)) }
}

/// Sizes before, at and after `axis`.
pub(crate) fn split_at_axis(sizes: &[usize], axis: usize) -> (usize, usize, usize) {
    (product(&sizes[..axis]), sizes[axis], product(&sizes[axis + 1..]))
}

/// Bytes as elements.
pub(crate) fn slice<T: Pod>(bytes: &[u8], dtype: DType) -> Result<&[T], CpuError> {
    if bytes.is_empty() {
        return Ok(&[]);
    }
    bytemuck::try_cast_slice(bytes).map_err(|_| CpuError::Alignment { dtype })
}

/// Bytes as elements to write.
pub(crate) fn slice_mut<T: Pod>(bytes: &mut [u8], dtype: DType) -> Result<&mut [T], CpuError> {
    if bytes.is_empty() {
        return Ok(&mut []);
    }
    bytemuck::try_cast_slice_mut(bytes).map_err(|_| CpuError::Alignment { dtype })
}

/// Half-precision elements, as bits, to `f32`. `dtype` must be one of the half types.
pub(crate) fn widen_half(dtype: DType, from: &[u16], to: &mut [f32]) {
    if dtype == DType::F16 {
        bytemuck::cast_slice::<u16, f16>(from).convert_to_f32_slice(to);
    } else {
        bytemuck::cast_slice::<u16, bf16>(from).convert_to_f32_slice(to);
    }
}

/// `f32` elements rounded to half precision, as bits. `dtype` must be one of the half types.
pub(crate) fn narrow_half(dtype: DType, from: &[f32], to: &mut [u16]) {
    if dtype == DType::F16 {
        bytemuck::cast_slice_mut::<u16, f16>(to).convert_from_f32_slice(from);
    } else {
        bytemuck::cast_slice_mut::<u16, bf16>(to).convert_from_f32_slice(from);
    }
}

/// Whether `dtype` is computed in `f32` and rounded.
pub(crate) const fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// Elements of a half type as `f32`. Not generic, as what follows is for each type and each reader.
fn widened(view: &View<'_>) -> Result<Vec<f32>, CpuError> {
    let bits: &[u16] = slice(view.bytes, view.ty.dtype)?;
    let mut elements = vec![0f32; bits.len()];
    for (bits, elements) in bits.chunks(CHUNK).zip(elements.chunks_mut(CHUNK)) {
        widen_half(view.ty.dtype, bits, elements);
    }
    Ok(elements)
}

/// The elements in the type they are computed in: half types as `f32`, `Bool` as `u8`, others as they are.
pub(crate) fn read<'a, T: Number>(view: &View<'a>) -> Result<Cow<'a, [T]>, CpuError> {
    let dtype = view.ty.dtype;
    if !is_half(dtype) {
        return slice(view.bytes, dtype).map(Cow::Borrowed);
    }
    let elements = bytemuck::allocation::try_cast_vec(widened(view)?);
    elements.map(Cow::Owned).map_err(|_| CpuError::Alignment { dtype })
}

/// Lets `fill` write the result in the type it is computed in, see [`read`]; rounds to a half type at the end.
pub(crate) fn write<T: Number>(
    result: &mut ViewMut<'_>,
    fill: impl FnOnce(&mut [T]) -> Result<(), CpuError>,
) -> Result<(), CpuError> {
    let dtype = result.ty.dtype;
    if !is_half(dtype) {
        return fill(slice_mut(result.bytes, dtype)?);
    }
    let bits: &mut [u16] = slice_mut(result.bytes, dtype)?;
    let mut elements = vec![0f32; bits.len()];
    fill(bytemuck::try_cast_slice_mut(&mut elements).map_err(|_| CpuError::Alignment { dtype })?)?;
    narrow_half(dtype, &elements, bits);
    Ok(())
}
