//! Tensors in host memory.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::dtype::DType;
use crate::types::TensorType;

/// So many zeros; `None` where the machine has no room for them.
pub fn try_zeroed<T: bytemuck::Zeroable>(len: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_slice_box(len).ok().map(Vec::from)
}

/// Bytes aligned for every element type.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(8)], len }
    }

    /// As [`Self::zeroed`]; `None` where the machine has no room for it.
    pub fn try_zeroed(len: usize) -> Option<Self> {
        Some(Self { words: try_zeroed(len.div_ceil(8))?, len })
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }

    /// As [`Self::from_bytes`]; `None` where the machine has no room for them.
    pub fn try_from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut buffer = Self::try_zeroed(bytes.len())?;
        buffer.bytes_mut().copy_from_slice(bytes);
        Some(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

impl Serialize for Buffer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.bytes())
    }
}

impl<'de> Deserialize<'de> for Buffer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<u8>::deserialize(deserializer).map(|bytes| Self::from_bytes(&bytes))
    }
}

/// A dense row-major tensor in host memory, little-endian; booleans are bytes 0 and 1.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tensor {
    pub ty: TensorType,
    pub data: Buffer,
}

/// Types a tensor's bytes can be viewed as.
pub trait Element: bytemuck::Pod {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($rust:ty => $dtype:ident),*) => {
        $(impl Element for $rust { const DTYPE: DType = DType::$dtype; })*
    };
}
elements!(u8 => U8, u16 => U16, u32 => U32, u64 => U64, i8 => I8, i16 => I16, i32 => I32, i64 => I64,
          half::f16 => F16, half::bf16 => BF16, f32 => F32, f64 => F64);

impl Tensor {
    /// Zeros. `None` where the machine has no room for as many bytes as the type says.
    pub fn zeroed(ty: TensorType) -> Option<Self> {
        let len = usize::try_from(ty.bytes()?).ok()?;
        Some(Self { ty, data: Buffer::try_zeroed(len)? })
    }

    /// A tensor from its elements; `None` unless there are as many as the sizes say.
    pub fn from_elements<T: Element>(sizes: &[u64], elements: &[T]) -> Option<Self> {
        let ty = TensorType::new(T::DTYPE, sizes);
        (ty.elements()? == elements.len() as u64)
            .then(|| Self { ty, data: Buffer::from_bytes(bytemuck::cast_slice(elements)) })
    }

    /// A tensor from little-endian bytes; `None` unless there are as many as the type says.
    pub fn from_bytes(ty: TensorType, bytes: &[u8]) -> Option<Self> {
        (ty.bytes()? == bytes.len() as u64).then(|| Self { ty, data: Buffer::from_bytes(bytes) })
    }

    /// The elements, if `T` is the element type (`Bool` is viewed as `u8`).
    pub fn elements<T: Element>(&self) -> Option<&[T]> {
        let same = self.ty.dtype == T::DTYPE || (self.ty.dtype == DType::Bool && T::DTYPE == DType::U8);
        same.then(|| bytemuck::cast_slice(self.data.bytes()))
    }

    /// All elements as `i64`, for integer and boolean tensors whose values fit; `None` otherwise.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        fn widen<T: Element + TryInto<i64>>(tensor: &Tensor) -> Option<Vec<i64>> {
            tensor.elements::<T>()?.iter().map(|&value| value.try_into().ok()).collect()
        }
        match self.ty.dtype {
            DType::Bool | DType::U8 => widen::<u8>(self),
            DType::U16 => widen::<u16>(self),
            DType::U32 => widen::<u32>(self),
            DType::U64 => widen::<u64>(self),
            DType::I8 => widen::<i8>(self),
            DType::I16 => widen::<i16>(self),
            DType::I32 => widen::<i32>(self),
            DType::I64 => widen::<i64>(self),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => None,
        }
    }
}
