//! Tensor types: an element type and extents.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

/// Names a number in device memory that holds the current size of a bounded dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExtentId(pub u32);

/// One dimension of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dim {
    /// Known at compile time.
    Static(u64),
    /// Memory for `capacity` elements, of which the number in `extent` are meaningful.
    Bounded { capacity: u64, extent: ExtentId },
}

impl Dim {
    /// Elements that memory is reserved for.
    pub const fn capacity(self) -> u64 {
        match self {
            Self::Static(n) | Self::Bounded { capacity: n, .. } => n,
        }
    }

    /// The size, when it is known at compile time.
    pub const fn fixed(self) -> Option<u64> {
        match self {
            Self::Static(n) => Some(n),
            Self::Bounded { .. } => None,
        }
    }
}

impl From<u64> for Dim {
    fn from(n: u64) -> Self {
        Self::Static(n)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static(n) => write!(f, "{n}"),
            Self::Bounded { capacity, extent } => write!(f, "<={capacity}@{}", extent.0),
        }
    }
}

/// Element type and dimensions of a tensor, row-major, outermost dimension first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorType {
    pub dtype: DType,
    pub dims: Vec<Dim>,
}

/// Product of the sizes, or `None` where it does not fit in 63 bits.
pub fn element_count(sizes: &[u64]) -> Option<u64> {
    if sizes.contains(&0) {
        return Some(0);
    }
    let count = sizes.iter().try_fold(1u64, |product, &n| product.checked_mul(n))?;
    (count <= i64::MAX as u64).then_some(count)
}

impl TensorType {
    /// A type whose dimensions are all static.
    pub fn new(dtype: DType, sizes: &[u64]) -> Self {
        Self { dtype, dims: sizes.iter().copied().map(Dim::Static).collect() }
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Capacity of each dimension: the layout in memory.
    pub fn sizes(&self) -> Vec<u64> {
        self.dims.iter().map(|dim| dim.capacity()).collect()
    }

    /// Capacity of one dimension.
    ///
    /// # Panics
    /// If `axis` is not below [`Self::rank`], like slice indexing.
    pub fn size(&self, axis: usize) -> u64 {
        self.dims[axis].capacity()
    }

    /// Number of elements that memory is reserved for; `None` on overflow.
    pub fn elements(&self) -> Option<u64> {
        element_count(&self.sizes())
    }

    /// Bytes that memory is reserved for; `None` on overflow.
    pub fn bytes(&self) -> Option<u64> {
        let bytes = self.elements()?.checked_mul(self.dtype.bytes() as u64)?;
        (bytes <= i64::MAX as u64).then_some(bytes)
    }

    /// The same dimensions with another element type.
    #[must_use]
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, dims: self.dims.clone() }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (position, dim) in self.dims.iter().enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            write!(f, "{comma}{dim}")?;
        }
        f.write_str("]")
    }
}

/// Row-major strides, in elements.
pub fn strides(sizes: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; sizes.len()];
    for axis in (1..sizes.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(sizes[axis].max(1));
    }
    strides
}
