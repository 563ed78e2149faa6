//! Values to bytes and back: the only file that names bincode.
//!
//! Little-endian, integers of variable length. Every decode has a limit that follows from the bytes at hand, so a
//! count of 2^64 - 1 is refused before anything is allocated for it. No type of the format nests in itself: decoding
//! does not recurse.

use bincode::config::{Configuration, LittleEndian, NoLimit, Varint, standard};
use bincode::error::DecodeError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::text::count;

/// Largest encoded value, in bytes.
pub const MAX_SECTION_BYTES: u64 = 1 << 30;

/// The decoder charges up to eight bytes (a decoded `u64`) for one encoded byte.
const CHARGE_PER_BYTE: u64 = 8;

fn config() -> Configuration<LittleEndian, Varint, NoLimit> {
    standard().with_little_endian().with_variable_int_encoding()
}

/// The value's bytes: the same for the same value.
///
/// # Errors
/// What the encoder says; the types of a plan give it no reason to.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, String> {
    bincode::serde::encode_to_vec(value, config()).map_err(|error| error.to_string())
}

/// The value that all of `bytes` encode.
///
/// # Errors
/// A sentence: bytes that encode no value, bytes left over, or more than [`MAX_SECTION_BYTES`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    // Limits are part of the decoder's type, hence a ladder of them.
    const TINY: usize = 1 << 12;
    const SMALL: usize = 1 << 16;
    const MEDIUM: usize = 1 << 20;
    const LARGE: usize = 1 << 25;
    const HUGE: usize = (MAX_SECTION_BYTES * CHARGE_PER_BYTE) as usize;
    if bytes.len() as u64 > MAX_SECTION_BYTES {
        return Err(format!("{} bytes, limit {MAX_SECTION_BYTES}", bytes.len()));
    }
    let charge = bytes.len() * CHARGE_PER_BYTE as usize;
    let decoded = match charge {
        _ if charge <= TINY => decode_within::<T, TINY>(bytes),
        _ if charge <= SMALL => decode_within::<T, SMALL>(bytes),
        _ if charge <= MEDIUM => decode_within::<T, MEDIUM>(bytes),
        _ if charge <= LARGE => decode_within::<T, LARGE>(bytes),
        _ => decode_within::<T, HUGE>(bytes),
    };
    let (value, used) = decoded.map_err(|error| describe(&error))?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(format!("{} left over", count(left as u64, "byte"))),
    }
}

fn decode_within<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8]) -> Result<(T, usize), DecodeError> {
    bincode::serde::decode_from_slice(bytes, config().with_limit::<LIMIT>())
}

fn describe(error: &DecodeError) -> String {
    match error {
        DecodeError::LimitExceeded => "a count exceeds the bytes that are there".to_owned(),
        DecodeError::UnexpectedEnd { .. } => "ends before its last value".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TensorType;

    #[test]
    fn integers_are_little_endian_and_short() {
        assert_eq!(encode(&(5u64, 0x1234u32)).unwrap(), [5, 251, 0x34, 0x12]);
    }

    #[test]
    fn left_over_bytes_are_refused() {
        let mut bytes = encode(&"text".to_owned()).unwrap();
        bytes.push(0);
        assert_eq!(decode::<String>(&bytes).unwrap_err(), "1 byte left over");
    }

    #[test]
    fn hostile_counts_are_refused_without_allocating() {
        let mut bytes = vec![253];
        bytes.extend([0xff; 8]);
        assert!(decode::<String>(&bytes).is_err());
        assert!(decode::<Vec<u64>>(&bytes).is_err());
        assert!(decode::<Vec<TensorType>>(&bytes).is_err());
        assert!(decode::<crate::tensor::Buffer>(&bytes).is_err());
    }

    #[test]
    fn densest_values_stay_within_the_limit() {
        for count in [100usize, 2_000, 50_000, 400_000] {
            let value = vec![1u64; count];
            assert_eq!(decode::<Vec<u64>>(&encode(&value).unwrap()).unwrap(), value);
        }
    }
}
