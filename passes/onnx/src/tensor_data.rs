//! Tensors of a model: element type, dimensions, and where the bytes are. Every number of the file is checked here.

use std::sync::Arc;

use planfile::DType;

use crate::error::{OnnxError, TensorProblem};
use crate::messages::{SparseTensorProto, TensorProto};
use crate::source_files::{FileIndex, SourceFiles};

/// Largest dense form of a sparse tensor that is built, in bytes.
pub const SPARSE_LIMIT_BYTES: u64 = 1 << 20;

/// Where a tensor's bytes are: little-endian, row-major, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorSource {
    /// Small data, or data of the fields that are decoded on loading.
    Bytes(Arc<[u8]>),
    /// `length` bytes of a source file, from byte `offset` on; not read yet.
    FileRange { file: FileIndex, offset: u64, length: u64 },
}

impl TensorSource {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::FileRange { length, .. } => *length,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A tensor whose data has exactly the bytes that type and dimensions take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub dtype: DType,
    /// Outermost first; empty for a scalar.
    pub dims: Vec<u64>,
    pub source: TensorSource,
}

impl Tensor {
    /// A tensor held in memory.
    pub(crate) fn inline(dtype: DType, dims: Vec<u64>, bytes: Vec<u8>) -> Self {
        Self { dtype, dims, source: TensorSource::Bytes(bytes.into()) }
    }
}

/// Element type by its number in ONNX, supported or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ElemType(pub i32);

impl ElemType {
    pub const UNDEFINED: Self = Self(0);

    /// ONNX's name, in lower case; `None` for a number that ONNX does not know.
    pub fn name(self) -> Option<&'static str> {
        const NAMES: [&str; 29] = [
            "undefined",
            "float",
            "uint8",
            "int8",
            "uint16",
            "int16",
            "int32",
            "int64",
            "string",
            "bool",
            "float16",
            "double",
            "uint32",
            "uint64",
            "complex64",
            "complex128",
            "bfloat16",
            "float8e4m3fn",
            "float8e4m3fnuz",
            "float8e5m2",
            "float8e5m2fnuz",
            "uint4",
            "int4",
            "float4e2m1",
            "float8e8m0",
            "uint2",
            "int2",
            "float6e2m3",
            "float6e3m2",
        ];
        NAMES.get(usize::try_from(self.0).ok()?).copied()
    }

    /// Our element type.
    ///
    /// # Errors
    /// When we have none, or the number is not one of ONNX.
    pub fn dtype(self) -> Result<DType, TensorProblem> {
        match self.0 {
            1 => Ok(DType::F32),
            2 => Ok(DType::U8),
            3 => Ok(DType::I8),
            4 => Ok(DType::U16),
            5 => Ok(DType::I16),
            6 => Ok(DType::I32),
            7 => Ok(DType::I64),
            9 => Ok(DType::Bool),
            10 => Ok(DType::F16),
            11 => Ok(DType::F64),
            12 => Ok(DType::U32),
            13 => Ok(DType::U64),
            16 => Ok(DType::BF16),
            number => Err(match self.name() {
                Some("undefined") | None => TensorProblem::UnknownType { number },
                Some(name) => TensorProblem::UnsupportedType { name },
            }),
        }
    }
}

/// Reads a tensor's type, dimensions and place, without reading long data. `name` is what messages call it.
pub(crate) fn tensor(proto: &TensorProto, name: &str, files: &mut SourceFiles<'_>) -> Result<Tensor, OnnxError> {
    let fail = |problem| OnnxError::Tensor { tensor: name.to_owned(), problem };
    if proto.segment.is_some() {
        return Err(fail(TensorProblem::Segmented));
    }
    let dtype = ElemType(proto.data_type).dtype().map_err(fail)?;
    let dims = checked_dims(&proto.dims).map_err(fail)?;
    let (elements, bytes) = sizes(&dims, dtype).map_err(fail)?;
    if proto.data_location == 1 {
        if raw(proto).is_some() || proto.file_range.is_some() || typed(proto, dtype).is_some() {
            return Err(fail(TensorProblem::Ambiguous));
        }
        let source = files.external(&proto.external_data, name, bytes)?;
        raw_length(&source, dtype, &dims, bytes).map_err(fail)?;
        return Ok(Tensor { dtype, dims, source });
    }
    let source = local_source(proto, dtype, &dims, elements, bytes).map_err(fail)?;
    Ok(Tensor { dtype, dims, source })
}

/// Data that lies in the model file, decoded or not.
fn local_source(
    proto: &TensorProto,
    dtype: DType,
    dims: &[u64],
    elements: u64,
    bytes: u64,
) -> Result<TensorSource, TensorProblem> {
    let typed = typed(proto, dtype);
    let source = match (raw(proto), proto.file_range, typed) {
        (Some(raw), None, None) => TensorSource::Bytes(raw.into()),
        (None, Some(range), None) => {
            let field = match (range.field, dtype) {
                (9, _) | (4, DType::F32) | (10, DType::F64) => None,
                (4, _) => Some("float_data"),
                (_, _) => Some("double_data"),
            };
            if let Some(field) = field {
                return Err(TensorProblem::WrongField { field, dtype: dtype.name() });
            }
            TensorSource::FileRange { file: FileIndex(0), offset: range.offset, length: range.length }
        }
        (None, None, Some((field, found))) => {
            if found != elements {
                return Err(TensorProblem::ElementCount { field, dims: dims.to_vec(), expected: elements, found });
            }
            TensorSource::Bytes(decode_typed(proto, dtype)?.into())
        }
        (None, None, None) => TensorSource::Bytes(Vec::new().into()),
        _ => return Err(TensorProblem::Ambiguous),
    };
    raw_length(&source, dtype, dims, bytes)?;
    Ok(source)
}

/// Raw data inside the message; some writers put an empty one beside typed data.
fn raw(proto: &TensorProto) -> Option<&[u8]> {
    proto.raw_data.as_deref().filter(|raw| !raw.is_empty())
}

fn raw_length(source: &TensorSource, dtype: DType, dims: &[u64], expected_bytes: u64) -> Result<(), TensorProblem> {
    if source.len() == expected_bytes {
        return Ok(());
    }
    let found_bytes = source.len();
    Err(TensorProblem::RawLength { dtype: dtype.name(), dims: dims.to_vec(), expected_bytes, found_bytes })
}

fn checked_dims(dims: &[i64]) -> Result<Vec<u64>, TensorProblem> {
    let dim = |(axis, &value)| u64::try_from(value).map_err(|_| TensorProblem::NegativeDim { axis, value });
    dims.iter().enumerate().map(dim).collect()
}

/// Elements and bytes of a dense tensor. Both fit an `i64`.
fn sizes(dims: &[u64], dtype: DType) -> Result<(u64, u64), TensorProblem> {
    let overflow = || TensorProblem::Overflow { dims: dims.to_vec() };
    let elements = if dims.contains(&0) {
        0
    } else {
        dims.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim)).ok_or_else(overflow)?
    };
    let bytes = elements.checked_mul(dtype.bytes() as u64).filter(|&bytes| i64::try_from(bytes).is_ok());
    Ok((elements, bytes.ok_or_else(overflow)?))
}

/// The typed field that holds the data of a `dtype` tensor, if it has any, and its number of elements.
fn typed(proto: &TensorProto, dtype: DType) -> Option<(&'static str, u64)> {
    let (field, count) = match dtype {
        DType::F32 => ("float_data", proto.float_data.len()),
        DType::F64 => ("double_data", proto.double_data.len()),
        DType::I64 => ("int64_data", proto.int64_data.len()),
        DType::U32 | DType::U64 => ("uint64_data", proto.uint64_data.len()),
        DType::Bool | DType::U8 | DType::U16 | DType::I8 | DType::I16 | DType::I32 | DType::F16 | DType::BF16 => {
            ("int32_data", proto.int32_data.len())
        }
    };
    (count > 0).then_some((field, count as u64))
}

/// The typed field's elements as little-endian bytes. Half floats lie in `int32_data` by their bits.
fn decode_typed(proto: &TensorProto, dtype: DType) -> Result<Vec<u8>, TensorProblem> {
    let narrow = |field, value: i64| TensorProblem::ValueRange { field, value, dtype: dtype.name() };
    macro_rules! int32_as {
        ($target:ty) => {{
            let mut bytes = Vec::with_capacity(proto.int32_data.len() * dtype.bytes());
            for &value in &proto.int32_data {
                let value = <$target>::try_from(value).map_err(|_| narrow("int32_data", i64::from(value)))?;
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            bytes
        }};
    }
    Ok(match dtype {
        DType::F32 => proto.float_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F64 => proto.double_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::I64 => proto.int64_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::U64 => proto.uint64_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::U32 => {
            let mut bytes = Vec::with_capacity(proto.uint64_data.len() * dtype.bytes());
            for &value in &proto.uint64_data {
                let narrowed = u32::try_from(value)
                    .map_err(|_| narrow("uint64_data", i64::try_from(value).unwrap_or(i64::MAX)))?;
                bytes.extend_from_slice(&narrowed.to_le_bytes());
            }
            bytes
        }
        DType::I32 => int32_as!(i32),
        DType::I16 => int32_as!(i16),
        DType::I8 => int32_as!(i8),
        DType::U8 => int32_as!(u8),
        DType::U16 | DType::F16 | DType::BF16 => int32_as!(u16),
        DType::Bool => {
            if let Some(&value) = proto.int32_data.iter().find(|value| !matches!(value, 0 | 1)) {
                return Err(narrow("int32_data", i64::from(value)));
            }
            int32_as!(u8)
        }
    })
}

/// Reads a sparse tensor into a dense one of at most [`SPARSE_LIMIT_BYTES`].
pub(crate) fn sparse_tensor(
    proto: &SparseTensorProto,
    name: &str,
    files: &mut SourceFiles<'_>,
) -> Result<Tensor, OnnxError> {
    let fail = |problem| OnnxError::Tensor { tensor: name.to_owned(), problem };
    let sparse = |problem: &str| fail(TensorProblem::Sparse { problem: problem.to_owned() });
    let (Some(values), Some(indices)) = (&proto.values, &proto.indices) else {
        return Err(sparse("values or indices are not given"));
    };
    let dims = checked_dims(&proto.dims).map_err(fail)?;
    let values = tensor(values, name, files)?;
    let indices = tensor(indices, name, files)?;
    let (elements, bytes) = sizes(&dims, values.dtype).map_err(fail)?;
    if bytes > SPARSE_LIMIT_BYTES {
        return Err(sparse(&format!("its dense form takes {bytes} bytes, more than {SPARSE_LIMIT_BYTES}")));
    }
    let count = match values.dims.as_slice() {
        &[count] if count <= elements => count,
        _ => return Err(sparse("there are more values than elements, or values are not a list")),
    };
    let rank = dims.len() as u64;
    let coordinates = match indices.dims.as_slice() {
        [found] if *found == count => false,
        [found, axes] if *found == count && *axes == rank => true,
        _ => return Err(sparse("indices are neither [nnz] nor [nnz, rank]")),
    };
    if indices.dtype != DType::I64 {
        return Err(sparse("indices are not int64"));
    }
    let opened = files.open_for([&values.source, &indices.source])?;
    // Within the limit above: at most a megabyte of values, and of indices eight bytes per axis and value.
    let read = |source: &TensorSource| {
        let mut bytes = vec![0; usize::try_from(source.len()).unwrap_or(0)];
        opened.read_tensor(source, 0, &mut bytes).map(|()| bytes)
    };
    let (value_bytes, index_bytes) = (read(&values.source)?, read(&indices.source)?);
    let width = values.dtype.bytes();
    let mut dense = vec![0; usize::try_from(bytes).unwrap_or(0)];
    let (numbers, _) = index_bytes.as_chunks::<8>();
    let bounds = if coordinates { dims.as_slice() } else { &[elements] };
    let outside = || sparse("an index is outside of its dimension");
    for (position, value) in value_bytes.chunks_exact(width).enumerate() {
        let mut flat = 0_u64;
        for (axis, &bound) in bounds.iter().enumerate() {
            let number = numbers.get(position * bounds.len() + axis).map(|bytes| i64::from_le_bytes(*bytes));
            let number = number.and_then(|number| u64::try_from(number).ok()).filter(|&number| number < bound);
            // Below `elements`, since each number is below its bound.
            flat = flat * bound + number.ok_or_else(outside)?;
        }
        let start = usize::try_from(flat).unwrap_or(usize::MAX).saturating_mul(width);
        dense.get_mut(start..start.saturating_add(width)).ok_or_else(outside)?.copy_from_slice(value);
    }
    Ok(Tensor::inline(values.dtype, dims, dense))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::load::LoadOptions;
    use crate::messages::Segment;
    use crate::samples;

    fn read(proto: &TensorProto) -> Result<Tensor, TensorProblem> {
        let options = LoadOptions::default();
        let mut files = SourceFiles::new(Path::new("model.onnx"), 100, Vec::new(), &options);
        tensor(proto, &proto.name, &mut files).map_err(|error| match error {
            OnnxError::Tensor { tensor, problem } if tensor == "w" => problem,
            other => panic!("{other:?}"),
        })
    }

    fn of_type(data_type: i32, dims: &[i64]) -> TensorProto {
        TensorProto { name: "w".into(), data_type, dims: dims.to_vec(), ..TensorProto::default() }
    }

    fn bytes(tensor: &Tensor) -> &[u8] {
        match &tensor.source {
            TensorSource::Bytes(bytes) => bytes,
            TensorSource::FileRange { .. } => panic!("not inline"),
        }
    }

    #[test]
    fn reads_every_typed_field() {
        let halves = TensorProto { int32_data: vec![0x3c00, 0xc000], ..of_type(10, &[2]) };
        let bytes_of_i8 = TensorProto { int32_data: vec![-1, 127], ..of_type(3, &[2]) };
        let u32s = TensorProto { uint64_data: vec![0xffff_ffff], ..of_type(12, &[1]) };
        let i64s = TensorProto { int64_data: vec![-2], ..of_type(7, &[]) };
        let floats = TensorProto { float_data: vec![1.0], ..of_type(1, &[1, 1]) };
        let bools = TensorProto { int32_data: vec![1, 0], ..of_type(9, &[2]) };
        for (proto, dtype, expected) in [
            (halves, DType::F16, vec![0x00, 0x3c, 0x00, 0xc0]),
            (bytes_of_i8, DType::I8, vec![0xff, 0x7f]),
            (u32s, DType::U32, vec![0xff; 4]),
            (i64s, DType::I64, (-2_i64).to_le_bytes().to_vec()),
            (floats, DType::F32, 1.0_f32.to_le_bytes().to_vec()),
            (bools, DType::Bool, vec![1, 0]),
        ] {
            let tensor = read(&proto).unwrap();
            assert_eq!((tensor.dtype, bytes(&tensor)), (dtype, expected.as_slice()));
        }
    }

    #[test]
    fn an_empty_tensor_needs_no_data() {
        let tensor = read(&of_type(1, &[0, i64::MAX, i64::MAX])).unwrap();
        assert!(tensor.source.is_empty());
    }

    #[test]
    fn refuses_what_does_not_add_up() {
        let raw = |proto: TensorProto, len: usize| TensorProto { raw_data: Some(vec![0; len]), ..proto };
        let typed = |proto: TensorProto, values: Vec<i32>| TensorProto { int32_data: values, ..proto };
        let cases = [
            (raw(of_type(1, &[2, -1]), 8), "dimension 1 is -1"),
            (raw(of_type(1, &[1 << 40, 1 << 40]), 8), "overflows"),
            (raw(of_type(1, &[1 << 62]), 8), "overflows"),
            (raw(of_type(1, &[3]), 8), "wrong length: 8 bytes for f32[3], which takes 12"),
            (of_type(1, &[3]), "wrong length: 0 bytes"),
            (typed(of_type(6, &[3]), vec![1]), "`int32_data` holds 1 element for"),
            (raw(of_type(99, &[1]), 4), "number 99"),
            (raw(of_type(0, &[1]), 4), "number 0"),
            (raw(of_type(8, &[1]), 4), "string is not supported"),
            (raw(of_type(22, &[2]), 1), "int4 is not supported"),
            (raw(of_type(17, &[2]), 2), "float8e4m3fn is not supported"),
            (typed(of_type(2, &[1]), vec![256]), "256, which does not fit u8"),
            (typed(of_type(9, &[1]), vec![2]), "2, which does not fit bool"),
            (raw(typed(of_type(6, &[1]), vec![1]), 4), "more than one field"),
            (TensorProto { segment: Some(Segment::default()), ..of_type(1, &[1]) }, "segments"),
        ];
        for (proto, part) in cases {
            let problem = read(&proto).unwrap_err().to_string();
            assert!(problem.contains(part), "{problem}");
        }
    }

    fn sparse(indices: TensorProto, dims: &[i64]) -> Result<Tensor, OnnxError> {
        let proto = SparseTensorProto {
            values: Some(samples::tensor("w", &[2], &[5.0, 6.0])),
            indices: Some(indices),
            dims: dims.to_vec(),
        };
        let saved = samples::save_bytes(b"any");
        let options = LoadOptions::default();
        sparse_tensor(&proto, "w", &mut SourceFiles::new(&saved.path, 3, Vec::new(), &options))
    }

    #[test]
    fn sparse_tensors_become_dense() {
        let linear = TensorProto { int64_data: vec![1, 3], ..of_type(7, &[2]) };
        let coordinates = TensorProto { int64_data: vec![0, 1, 1, 1], ..of_type(7, &[2, 2]) };
        let expected: Vec<u8> = [0.0_f32, 5.0, 0.0, 6.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        for indices in [linear, coordinates] {
            assert_eq!(bytes(&sparse(indices, &[2, 2]).unwrap()), expected);
        }
    }

    #[test]
    fn sparse_tensors_are_checked() {
        let outside = TensorProto { int64_data: vec![1, 4], ..of_type(7, &[2]) };
        let error = sparse(outside, &[2, 2]).unwrap_err().to_string();
        assert!(error.contains("outside of its dimension"), "{error}");
        let large = TensorProto { int64_data: vec![1, 4], ..of_type(7, &[2]) };
        let error = sparse(large, &[1 << 20, 2]).unwrap_err().to_string();
        assert!(error.contains("store it dense"), "{error}");
    }
}
