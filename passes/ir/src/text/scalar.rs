//! Numbers with exact bits: the shortest text that reads back to them, bits in hexadecimal where there is none.

use half::{bf16, f16};
use planfile::{Buffer, DType, Real, Scalar, TensorType};

use super::cursor::Cursor;
use crate::error::IrError;

/// Longest data, in elements, that prints as numbers rather than bytes.
const NUMBERS: u64 = 16;

fn bits(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// The scalar that the text stands for in this type: a number, or bits after `0x`.
pub(super) fn scalar(dtype: DType, text: &str) -> Option<Scalar> {
    if let Some(bits) = bits(text) {
        return Some(Scalar { dtype, bits });
    }
    let integral = |low: i128, high: i128| {
        let value: i128 = text.parse().ok()?;
        let wrapped = Scalar::from_i64(dtype, value as u64 as i64);
        (low <= value && value <= high).then_some(wrapped)
    };
    let bits = match dtype {
        DType::Bool => return integral(0, 1),
        DType::U8 => return integral(0, u8::MAX.into()),
        DType::U16 => return integral(0, u16::MAX.into()),
        DType::U32 => return integral(0, u32::MAX.into()),
        DType::U64 => return integral(0, u64::MAX.into()),
        DType::I8 => return integral(i8::MIN.into(), i8::MAX.into()),
        DType::I16 => return integral(i16::MIN.into(), i16::MAX.into()),
        DType::I32 => return integral(i32::MIN.into(), i32::MAX.into()),
        DType::I64 => return integral(i64::MIN.into(), i64::MAX.into()),
        DType::F16 => f16::from_f32(text.parse().ok()?).to_bits().into(),
        DType::BF16 => bf16::from_f32(text.parse().ok()?).to_bits().into(),
        DType::F32 => text.parse::<f32>().ok()?.to_bits().into(),
        DType::F64 => text.parse::<f64>().ok()?.to_bits(),
    };
    Some(Scalar { dtype, bits })
}

/// Text that [`scalar`] reads back to the same bits.
pub(super) fn number(scalar_: Scalar) -> String {
    let bits = scalar_.bits;
    let text = match scalar_.dtype {
        DType::F16 => format!("{:?}", f16::from_bits(bits as u16).to_f32()),
        DType::BF16 => format!("{:?}", bf16::from_bits(bits as u16).to_f32()),
        DType::F32 => format!("{:?}", f32::from_bits(bits as u32)),
        DType::F64 => format!("{:?}", f64::from_bits(bits)),
        DType::U64 => bits.to_string(),
        _ => scalar_.to_i64().unwrap_or_default().to_string(),
    };
    if !text.contains("NaN") && scalar(scalar_.dtype, &text) == Some(scalar_) { text } else { format!("{bits:#x}") }
}

pub(super) fn read_real(text: &str) -> Option<Real> {
    scalar(DType::F64, text).map(|scalar| Real(f64::from_bits(scalar.bits)))
}

/// A constant of an expression. Plain integers are `i64`, plain numbers with a point or an exponent `f32`.
pub(super) fn constant(value: Scalar) -> String {
    let text = number(value);
    let dtype = value.dtype;
    match dtype {
        _ if text.starts_with("0x") => format!("{dtype}:{text}"),
        DType::Bool => if value.bits == 0 { "false" } else { "true" }.to_owned(),
        DType::I64 | DType::F32 => text,
        _ => format!("{text}:{dtype}"),
    }
}

/// The type of a constant that names none.
pub(super) fn plain_dtype(text: &str) -> DType {
    if text.contains(['.', 'e', 'f']) && !text.starts_with("0x") { DType::F32 } else { DType::I64 }
}

/// A tensor's bytes: few as numbers in brackets, more in hexadecimal, or only their length and a hash.
pub(super) fn data(ty: &TensorType, buffer: &Buffer, elide: bool) -> String {
    let (bytes, width) = (buffer.bytes(), ty.dtype.bytes());
    if bytes.len() as u64 <= NUMBERS * width as u64 && ty.bytes() == Some(bytes.len() as u64) {
        let numbers = bytes.chunks_exact(width).filter_map(|chunk| Scalar::from_bytes(ty.dtype, chunk)).map(number);
        return format!("[{}]", numbers.collect::<Vec<_>>().join(", "));
    }
    if elide {
        // FNV-1a: enough to tell one snapshot's constant from another's.
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        return format!("hex <{} bytes, hash {hash:016x}>", bytes.len());
    }
    let digits = |byte: &u8| [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'));
    format!("hex \"{}\"", bytes.iter().flat_map(digits).collect::<String>())
}

/// Whether [`read_data`] can start here.
pub(super) fn is_data(cursor: &Cursor<'_>) -> bool {
    cursor.is_sign("[") || cursor.is_word("hex")
}

/// What [`data`] printed in full.
pub(super) fn read_data(cursor: &mut Cursor<'_>, dtype: DType) -> Result<Buffer, IrError> {
    let mark = cursor.mark();
    if cursor.accept_word("hex") {
        let text = cursor.string("bytes in hexadecimal, in quotes")?;
        let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
        let digits = digits.filter(|digits| digits.len().is_multiple_of(2));
        let digits = digits.ok_or_else(|| cursor.error_at(mark, "expected pairs of hexadecimal digits"))?;
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect();
        return Ok(Buffer::from_bytes(&bytes));
    }
    let scalars = cursor.list("[", "]", |cursor| {
        let mark = cursor.mark();
        let text = cursor.number()?;
        scalar(dtype, &text).ok_or_else(|| cursor.error_at(mark, format!("`{text}` is no {dtype}")))
    })?;
    let bytes: Vec<u8> = scalars.into_iter().flat_map(Scalar::to_bytes).collect();
    Ok(Buffer::from_bytes(&bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_keep_their_bits(dtype in proptest::sample::select(&DType::ALL[..]), bits: u64, narrow: bool) {
            let width = 8 * dtype.bytes() as u32;
            let bits = if narrow { bits & (u64::MAX >> (64 - width)) } else { bits };
            let value = Scalar { dtype, bits };
            prop_assert_eq!(scalar(dtype, &number(value)), Some(value));
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(Scalar::f32(0.1)), "0.1");
        assert_eq!(number(Scalar::f32(-0.0)), "-0.0");
        assert_eq!(number(Scalar::f32(f32::NAN)), "0x7fc00000");
        assert_eq!(constant(Scalar::f32(f32::NEG_INFINITY)), "-inf");
        assert_eq!(constant(Scalar::from_i64(DType::I8, -3)), "-3:i8");
        assert_eq!(constant(Scalar { dtype: DType::Bool, bits: 2 }), "bool:0x2");
        assert_eq!(number(Scalar { dtype: DType::U64, bits: u64::MAX }), "18446744073709551615");
        assert_eq!(scalar(DType::U8, "256"), None);
    }
}
