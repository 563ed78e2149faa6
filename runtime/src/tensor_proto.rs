//! Reads a file with one ONNX `TensorProto`, such as `input_0.pb` of a test-data folder.
//!
//! A walk over the message's fields, whose numbers are those of the ONNX specification: the library links no protocol
//! buffers. Data may be raw or typed; external data, segments and strings are refused.

use std::borrow::Cow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use planfile::regular;
use planfile::tensor::try_zeroed;
use planfile::text::count;
use planfile::{Buffer, DType, Tensor, TensorType};

use crate::tensor_file::TensorFileError;

/// No protocol-buffers message is longer than this.
const MAX_FILE_BYTES: u64 = (1 << 31) - 1;

/// Reads the tensor in the file at `path`.
///
/// # Errors
/// [`TensorFileError`]: a file that cannot be read or holds no tensor of a supported type.
pub fn read_tensor_proto(path: &Path) -> Result<Tensor, TensorFileError> {
    let io_error = |action, source| TensorFileError::Io { action, path: path.to_owned(), source };
    let opened = regular::open(path).map_err(|source| io_error("open", source))?;
    let (file, length) = opened.ok_or_else(|| TensorFileError::NotAFile { path: path.to_owned() })?;
    if length > MAX_FILE_BYTES {
        return Err(TensorFileError::TooLarge { path: path.to_owned(), bytes: length, limit: MAX_FILE_BYTES });
    }
    let memory = || TensorFileError::Memory { path: path.to_owned(), bytes: length };
    let mut bytes: Vec<u8> = try_zeroed(length as usize).ok_or_else(memory)?;
    file.read_exact_at(&mut bytes, 0).map_err(|source| io_error("read", source))?;
    decode(&bytes).map_err(|what| TensorFileError::NotATensor { path: path.to_owned(), what })
}

/// Decodes the bytes of a `TensorProto`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn decode(bytes: &[u8]) -> Result<Tensor, String> {
    let proto = fields(bytes)?;
    let dtype = dtype(proto.data_type.ok_or("it states no element type")?)?;
    let mut sizes = Vec::with_capacity(proto.dims.len());
    for &dim in &proto.dims {
        sizes.push(u64::try_from(dim as i64).map_err(|_| format!("dimension {} is negative", dim as i64))?);
    }
    let ty = TensorType::new(dtype, &sizes);
    let expected = ty.bytes().ok_or_else(|| format!("{ty} does not fit in memory"))?;
    let data = match (proto.raw, proto.typed) {
        (Some(_), Some(field)) => return Err(format!("data is given both raw and in field {}", field.number)),
        (Some(raw), None) => Cow::Borrowed(raw),
        (None, Some(typed)) => Cow::Owned(typed.elements(dtype)?),
        (None, None) => Cow::default(),
    };
    if data.len() as u64 != expected {
        return Err(format!("data has {}, {ty} takes {expected}", count(data.len() as u64, "byte")));
    }
    if dtype == DType::Bool && data.iter().any(|&byte| byte > 1) {
        return Err("a boolean is neither 0 nor 1".to_owned());
    }
    let memory = || format!("{ty} takes {expected} bytes, more than there is memory; use a machine with more of it");
    Ok(Tensor { data: Buffer::try_from_bytes(&data).ok_or_else(memory)?, ty })
}

/// Numbers of `TensorProto.DataType`.
fn dtype(number: u64) -> Result<DType, String> {
    Ok(match number {
        1 => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        4 => DType::U16,
        5 => DType::I16,
        6 => DType::I32,
        7 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        11 => DType::F64,
        12 => DType::U32,
        13 => DType::U64,
        16 => DType::BF16,
        8 => return Err("it holds strings, which are not supported".to_owned()),
        other => return Err(format!("element type number {other} is not supported")),
    })
}

/// What is read of a `TensorProto`.
#[derive(Default)]
struct Proto<'a> {
    dims: Vec<u64>,
    data_type: Option<u64>,
    raw: Option<&'a [u8]>,
    typed: Option<Typed>,
}

/// A repeated field of numbers, as the bits of its wire type.
struct Typed {
    number: u64,
    values: Vec<u64>,
}

fn fields(bytes: &[u8]) -> Result<Proto<'_>, String> {
    let mut proto = Proto::default();
    let mut wire = Wire { bytes, position: 0 };
    while wire.position < bytes.len() {
        let at = wire.position;
        let key = wire.varint()?;
        let (number, field) = (key >> 3, wire.field(key & 7)?);
        match (number, field) {
            (1, field) => field.varints(&mut proto.dims)?,
            (2, Field::Varint(value)) => proto.data_type = Some(value),
            (3, _) => return Err("it is a segment of a larger tensor".to_owned()),
            (4 | 5 | 7 | 10 | 11, field) => {
                let typed = proto.typed.get_or_insert(Typed { number, values: Vec::new() });
                if typed.number != number {
                    return Err(format!("data is given both in field {} and in field {number}", typed.number));
                }
                match number {
                    4 => field.fixed(&mut typed.values, 4)?,
                    10 => field.fixed(&mut typed.values, 8)?,
                    _ => field.varints(&mut typed.values)?,
                }
            }
            (9, Field::Bytes(raw)) => proto.raw = Some(raw),
            (14, Field::Varint(1)) => return Err("its data is in another file".to_owned()),
            (1..=16, Field::Varint(_) | Field::Bytes(_)) => {}
            _ => return Err(format!("the field at byte {at} is none of a tensor")),
        }
    }
    Ok(proto)
}

impl Typed {
    /// Little-endian elements, from the field that the specification gives this element type.
    fn elements(&self, dtype: DType) -> Result<Vec<u8>, String> {
        let field = match dtype {
            DType::F32 => 4,
            DType::F64 => 10,
            DType::I64 => 7,
            DType::U32 | DType::U64 => 11,
            DType::Bool | DType::U8 | DType::U16 | DType::I8 | DType::I16 | DType::I32 | DType::F16 | DType::BF16 => 5,
        };
        if field != self.number {
            return Err(format!("{dtype} is in field {}, expected in {field}", self.number));
        }
        let width = dtype.bytes();
        let mut bytes = Vec::with_capacity(self.values.len().saturating_mul(width));
        for &value in &self.values {
            let signed = value as i64;
            let fits = match dtype {
                DType::I8 => i8::try_from(signed).is_ok(),
                DType::I16 => i16::try_from(signed).is_ok(),
                DType::I32 => i32::try_from(signed).is_ok(),
                _ => width == 8 || value >> (8 * width) == 0,
            };
            if !fits {
                return Err(format!("{signed} is no {dtype}"));
            }
            bytes.extend_from_slice(&value.to_le_bytes()[..width]);
        }
        Ok(bytes)
    }
}

enum Field<'a> {
    Varint(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
}

impl Field<'_> {
    /// Appends a number, or packed numbers.
    fn varints(self, values: &mut Vec<u64>) -> Result<(), String> {
        match self {
            Self::Varint(value) => values.push(value),
            Self::Bytes(bytes) => {
                let mut wire = Wire { bytes, position: 0 };
                while wire.position < bytes.len() {
                    values.push(wire.varint()?);
                }
            }
            Self::Fixed(_) => return Err("a list of integers holds something else".to_owned()),
        }
        Ok(())
    }

    /// Appends a number of `width` bytes, or packed numbers.
    fn fixed(self, values: &mut Vec<u64>, width: usize) -> Result<(), String> {
        match self {
            Self::Fixed(value) => values.push(value),
            Self::Bytes(bytes) if bytes.len().is_multiple_of(width) => {
                values.extend(bytes.chunks_exact(width).map(little_endian));
            }
            Self::Bytes(_) | Self::Varint(_) => return Err("a list of numbers holds something else".to_owned()),
        }
        Ok(())
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The wire format of protocol buffers.
struct Wire<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Wire<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let end = usize::try_from(count).ok().and_then(|count| self.position.checked_add(count));
        let taken = end.and_then(|end| self.bytes.get(self.position..end));
        let taken = taken.ok_or_else(|| {
            format!("it is cut: a field at byte {} takes more bytes ({count}) than there are", self.position)
        })?;
        self.position += taken.len();
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(format!("the number before byte {} has more than 64 bits", self.position))
    }

    fn field(&mut self, wire_type: u64) -> Result<Field<'a>, String> {
        Ok(match wire_type {
            0 => Field::Varint(self.varint()?),
            1 => Field::Fixed(little_endian(self.take(8)?)),
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed(little_endian(self.take(4)?)),
            other => return Err(format!("byte {} states wire type {other}", self.position)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/onnx").join(path)
    }

    /// `dims` and `data_type`, then the fields given.
    fn proto(dims: &[u8], data_type: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = dims.iter().flat_map(|&dim| [0x08, dim]).collect();
        bytes.extend([0x10, data_type]);
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn reads_what_exporters_write() {
        let ids = read_tensor_proto(&fixture("tiny_bert/test_data_set_0/input_0.pb")).unwrap();
        assert_eq!((ids.ty.dtype, ids.ty.rank()), (DType::I64, 2));
        let ids = ids.to_i64s().unwrap();
        assert!(ids.iter().all(|id| (0..100_000).contains(id)) && ids.iter().any(|&id| id > 0), "{ids:?}");
        let image = read_tensor_proto(&fixture("tiny_resnet/test_data_set_0/input_0.pb")).unwrap();
        assert_eq!((image.ty.dtype, image.ty.rank()), (DType::F32, 4));
        assert!(image.elements::<f32>().unwrap().iter().all(|value| value.abs() < 100.0));
    }

    #[test]
    fn typed_fields_are_read_packed_and_not() {
        // float_data, packed: 1.0, -2.0.
        let packed = decode(&proto(&[2], 1, &[0x22, 8, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0])).unwrap();
        assert_eq!(packed.elements::<f32>().unwrap(), [1.0, -2.0]);
        let apart = decode(&proto(&[2], 1, &[0x25, 0, 0, 0x80, 0x3f, 0x25, 0, 0, 0, 0xc0])).unwrap();
        assert_eq!(apart, packed);
        // int32_data of an int8 tensor: 5, -1.
        let minus_one = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        let bytes = [&[0x2a, 11, 5][..], &minus_one].concat();
        assert_eq!(decode(&proto(&[2], 3, &bytes)).unwrap().elements::<i8>().unwrap(), [5, -1]);
        // A scalar of bfloat16 bits.
        let half = decode(&proto(&[], 16, &[0x28, 0x80, 0x7f])).unwrap();
        assert_eq!(half.elements::<half::bf16>().unwrap()[0].to_f32(), 1.0);
        assert_eq!(decode(&proto(&[0, 3], 1, &[])).unwrap().ty.to_string(), "f32[0, 3]");
    }

    #[test]
    fn what_is_no_tensor_is_refused() {
        let cases: [(&[u8], &str); 10] = [
            (b"", "no element type"),
            (b"PK\x03\x04", "a list of numbers"),
            (&proto(&[2], 1, &[0x4a, 4, 0, 0, 0, 0]), "data has 4 bytes, f32[2] takes 8"),
            (&proto(&[1], 8, &[]), "strings"),
            (&proto(&[1], 99, &[]), "element type number 99"),
            (&proto(&[1], 1, &[0x4a, 200, 1, 0]), "it is cut"),
            (&proto(&[1], 1, &[0x4a, 4, 0, 0, 0, 0, 0x25, 0, 0, 0, 0]), "both raw and in field 4"),
            (&proto(&[1], 7, &[0x25, 0, 0, 0, 0]), "i64 is in field 4"),
            (&proto(&[1], 3, &[0x28, 0xff, 1]), "255 is no i8"),
            (&proto(&[1], 9, &[0x4a, 1, 2]), "neither 0 nor 1"),
        ];
        for (bytes, expected) in cases {
            let message = decode(bytes).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        let huge = [&[0x08][..], &[0xff; 8], &[0x7f, 0x08, 4, 0x10, 1]].concat();
        assert!(decode(&huge).unwrap_err().contains("does not fit"), "{:?}", decode(&huge));
        let negative = [&[0x08][..], &[0xff; 9], &[1, 0x10, 1]].concat();
        assert!(decode(&negative).unwrap_err().contains("dimension -1 is negative"));
    }

    #[test]
    fn a_model_is_not_a_tensor() {
        let error = read_tensor_proto(&fixture("tiny_bert/model.onnx")).unwrap_err();
        assert!(matches!(error, TensorFileError::NotATensor { .. }), "{error}");
        let error = read_tensor_proto(&fixture("tiny_bert")).unwrap_err();
        assert!(matches!(error, TensorFileError::NotAFile { .. }), "{error}");
    }

    #[test]
    fn any_cut_is_noticed_or_harmless() {
        let whole = proto(&[2], 1, &[0x22, 8, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        for end in 0..whole.len() {
            assert!(decode(&whole[..end]).is_err(), "{end}");
        }
    }
}
