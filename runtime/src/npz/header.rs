//! The header of an array in NumPy's `.npy` format: a magic number, a version, and a Python dictionary as text.
//!
//! ```text
//! \x93NUMPY 1 0 length {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } spaces \n
//! ```
//!
//! The dictionary has three keys with values of one kind each, so it is read by a cursor without recursion.

use std::io::{self, Read};

use planfile::{DType, TensorType};

/// Longest text of a header, in bytes. NumPy itself refuses more than 10,000 unless told otherwise.
const HEADER_BYTES: usize = 64 << 10;
/// Where NumPy lets data begin: at multiples of this.
const ALIGNMENT: usize = 64;
const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// What a header says of the bytes behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub ty: TensorType,
    /// Whether elements are stored big-endian.
    pub big_endian: bool,
    /// Bytes of the header itself.
    pub bytes: u64,
}

/// Reads a header and nothing behind it.
///
/// # Errors
/// What is wrong with it, or what it says that tensors cannot be.
pub(super) fn read_header(entry: &mut impl Read) -> Result<Header, String> {
    let cut = |error: io::Error| format!("its header: {error}");
    let mut start = [0; 8];
    entry.read_exact(&mut start).map_err(cut)?;
    if &start[..6] != MAGIC {
        return Err("it does not begin like an array of NumPy".to_owned());
    }
    let mut length = [0; 4];
    let width = match start[6] {
        1 => 2,
        2 | 3 => 4,
        version => return Err(format!("its format version {version} is not supported")),
    };
    entry.read_exact(&mut length[..width]).map_err(cut)?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > HEADER_BYTES {
        return Err(format!("its header takes {bytes} bytes, at most {HEADER_BYTES} are read"));
    }
    let mut text = vec![0; bytes];
    entry.read_exact(&mut text).map_err(cut)?;
    let text = std::str::from_utf8(&text).map_err(|_| "its header is not text".to_owned())?;
    let (ty, big_endian) = parse(text)?;
    Ok(Header { ty, big_endian, bytes: (start.len() + width + bytes) as u64 })
}

/// The type that a dictionary describes, and whether it is stored big-endian.
fn parse(text: &str) -> Result<(TensorType, bool), String> {
    let (mut descr, mut column_major, mut sizes) = (None, None, None);
    let mut rest = Cursor(text);
    rest.expect('{')?;
    while !rest.takes('}') {
        let key = rest.string()?;
        rest.expect(':')?;
        match key {
            "descr" => descr = Some(element_type(&mut rest)?),
            "fortran_order" => column_major = Some(rest.boolean()?),
            "shape" => sizes = Some(rest.sizes()?),
            _ => return Err(format!("its header has an unknown key `{}`", key.escape_debug())),
        }
        if !rest.takes(',') {
            rest.expect('}')?;
            break;
        }
    }
    if !rest.0.trim_start().is_empty() {
        return Err("its header goes on behind the dictionary".to_owned());
    }
    let missing = |key| move || format!("its header has no `{key}`");
    let (dtype, big_endian) = descr.ok_or_else(missing("descr"))?;
    let sizes = sizes.ok_or_else(missing("shape"))?;
    // One dimension, or none, has one order.
    if column_major.ok_or_else(missing("fortran_order"))? && sizes.iter().filter(|&&size| size != 1).count() > 1 {
        return Err("it is in column-major order; store `numpy.ascontiguousarray` of it".to_owned());
    }
    Ok((TensorType::new(dtype, &sizes), big_endian))
}

/// The element type of the type string that comes next, and whether it is big-endian.
fn element_type(rest: &mut Cursor<'_>) -> Result<(DType, bool), String> {
    let unsupported = |text: &str| Err(format!("element type {text} is not supported; convert it"));
    // Structures are lists of fields.
    if !rest.0.trim_start().starts_with(['\'', '"']) {
        return unsupported("with fields");
    }
    let text = rest.string()?;
    let mut kind = text.chars();
    let order = kind.next();
    let dtype =
        DType::ALL.into_iter().find(|&dtype| type_string(dtype).strip_prefix(['|', '<']) == Some(kind.as_str()));
    match (dtype, order) {
        (Some(dtype), Some('<' | '|' | '=')) => Ok((dtype, false)),
        (Some(dtype), Some('>')) => Ok((dtype, true)),
        _ => unsupported(&format!("'{}'", text.escape_debug())),
    }
}

/// What is left of a header's text. Blanks before a token do not count.
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn takes(&mut self, token: char) -> bool {
        self.0 = self.0.trim_start();
        self.0.strip_prefix(token).is_some_and(|rest| {
            self.0 = rest;
            true
        })
    }

    fn expect(&mut self, token: char) -> Result<(), String> {
        if self.takes(token) { Ok(()) } else { Err(self.unexpected(&format!("`{token}`"))) }
    }

    fn unexpected(&self, wanted: &str) -> String {
        let found: String = self.0.chars().take(20).collect();
        format!("its header has `{}` where {wanted} should be", found.escape_debug())
    }

    /// The text between quotes. None that NumPy writes here has escapes.
    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.takes('\'') { '\'' } else { self.expect('"').map(|()| '"')? };
        let (text, rest) = self.0.split_once(quote).ok_or_else(|| self.unexpected("a closed string"))?;
        self.0 = rest;
        Ok(text)
    }

    fn boolean(&mut self) -> Result<bool, String> {
        self.0 = self.0.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.0.strip_prefix(word) {
                self.0 = rest;
                return Ok(value);
            }
        }
        Err(self.unexpected("`True` or `False`"))
    }

    /// A tuple of numbers.
    fn sizes(&mut self) -> Result<Vec<u64>, String> {
        let mut sizes = Vec::new();
        self.expect('(')?;
        while !self.takes(')') {
            sizes.push(self.number()?);
            // Python 2 marks its long numbers so.
            self.takes('L');
            if !self.takes(',') {
                self.expect(')')?;
                break;
            }
        }
        let too_large = || "it does not fit in memory".to_owned();
        // Products with a zero as well: strides are computed from the other sizes.
        let product = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size.max(1)));
        product.filter(|&product| product <= i64::MAX as u64).map(|_| sizes).ok_or_else(too_large)
    }

    fn number(&mut self) -> Result<u64, String> {
        self.0 = self.0.trim_start();
        let end = self.0.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(end);
        if digits.is_empty() {
            return Err(self.unexpected("a number"));
        }
        self.0 = rest;
        digits.parse().map_err(|_| "it does not fit in memory".to_owned())
    }
}

/// Type string of NumPy's array interface. There is none for bfloat16: two-byte voids, as `ml_dtypes` writes them.
const fn type_string(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "|b1",
        DType::U8 => "|u1",
        DType::U16 => "<u2",
        DType::U32 => "<u4",
        DType::U64 => "<u8",
        DType::I8 => "|i1",
        DType::I16 => "<i2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::F16 => "<f2",
        DType::BF16 => "|V2",
        DType::F32 => "<f4",
        DType::F64 => "<f8",
    }
}

/// The header of an array in rows.
pub(super) fn header(ty: &TensorType) -> Vec<u8> {
    let sizes: String = ty.sizes().iter().map(|size| format!("{size}, ")).collect();
    // As Python prints a tuple: one element has a comma behind it, more have none.
    let sizes = if ty.rank() == 1 { sizes.trim_end() } else { sizes.trim_end_matches(", ") };
    let text = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({sizes}), }}", type_string(ty.dtype));
    // Version 2 exists for headers that are too long for version 1; each pads its text to the alignment, line end last.
    let (version, width) = if text.len() + ALIGNMENT <= usize::from(u16::MAX) { (1, 2) } else { (2, 4) };
    let start = MAGIC.len() + 2 + width;
    let length = (start + text.len() + 1).next_multiple_of(ALIGNMENT) - start;
    let mut bytes = MAGIC.to_vec();
    bytes.extend([version, 0]);
    bytes.extend(&(length as u32).to_le_bytes()[..width]);
    bytes.extend(text.bytes());
    bytes.resize(start + length - 1, b' ');
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Header, String> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.bytes());
        read_header(&mut bytes.as_slice())
    }

    #[test]
    fn headers_round_trip_and_align_the_data() {
        for dtype in DType::ALL {
            for sizes in [&[][..], &[7], &[2, 3], &[0, 4], &[1; 40]] {
                let ty = TensorType::new(dtype, sizes);
                let bytes = header(&ty);
                assert_eq!((bytes.len() % ALIGNMENT, bytes.last()), (0, Some(&b'\n')));
                let read = read_header(&mut bytes.as_slice()).unwrap();
                assert_eq!(read, Header { ty, big_endian: false, bytes: bytes.len() as u64 });
            }
        }
    }

    #[test]
    fn headers_are_what_numpy_writes() {
        let text =
            |sizes: &[u64]| String::from_utf8(header(&TensorType::new(DType::F32, sizes))[10..].to_vec()).unwrap();
        assert!(text(&[]).starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (), }  "));
        assert!(text(&[3]).starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }  "));
        assert!(text(&[3, 4]).starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }  "));
    }

    #[test]
    fn a_rank_beyond_the_first_version_takes_the_second() {
        let ty = TensorType::new(DType::U8, &[1; 40_000]);
        assert_eq!(header(&ty)[6], 2);
        // Ours reads no header as long as that, whoever wrote it.
        assert!(read_header(&mut header(&ty).as_slice()).unwrap_err().contains("takes 120"));
    }

    #[test]
    fn keys_come_in_any_order_with_any_blanks() {
        let header = of("{ \"shape\" :( 2L , 3L ) ,'fortran_order':False, 'descr': '=i8'}").unwrap();
        assert_eq!(header.ty, TensorType::new(DType::I64, &[2, 3]));
        let vector = of("{'descr': '>f2', 'fortran_order': True, 'shape': (1, 5), }\n").unwrap();
        assert!(vector.big_endian && vector.ty == TensorType::new(DType::F16, &[1, 5]));
    }

    #[test]
    fn hostile_headers_are_refused() {
        for shape in ["(4294967296, 4294967296, 4)", "(0, 18446744073709551615, 3)", "(99999999999999999999,)"] {
            let overflow = of(&format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n")).unwrap_err();
            assert!(overflow.contains("does not fit"), "{overflow}");
        }
        let deep = of(&format!("{{'descr': {}", "[".repeat(50_000))).unwrap_err();
        assert!(deep.contains("element type with fields is not supported"), "{deep}");
        let fields = of("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}").unwrap_err();
        assert!(fields.contains("convert it"), "{fields}");
        for (text, part) in [
            ("{'descr': '|u1'}\n", "no `shape`"),
            ("{'descr': '|u1', 'shape': ()}\n", "no `fortran_order`"),
            ("", "`{` should be"),
            ("{'descr", "a closed string should be"),
            ("{'\u{1b}[2J': 1}", "unknown key `\\u{1b}[2J`"),
            ("{'descr': '\u{1b}'}", "element type '\\u{1b}' is not supported"),
            ("{'shape': (-1,)}", "a number should be"),
            ("{'shape': (1 2)}", "`)` should be"),
            ("{'fortran_order': 0}", "`True` or `False` should be"),
            ("{'shape': ()} {}", "behind the dictionary"),
        ] {
            let message = of(text).unwrap_err();
            assert!(message.contains(part), "{text:?}: {message}");
        }
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_reading() {
        let mut start = b"\x93NUMPY\x02\x00".to_vec();
        start.extend(u32::MAX.to_le_bytes());
        let error = read_header(&mut start.as_slice()).unwrap_err();
        assert!(error.contains("takes 4294967295 bytes"), "{error}");
        for length in 0..start.len() {
            assert!(read_header(&mut &start[..length]).is_err());
        }
        assert!(read_header(&mut &b"\x93NUMPY\x09\x00\x00\x00"[..]).unwrap_err().contains("version 9"));
        assert!(read_header(&mut &b"PK\x03\x04 not one"[..]).unwrap_err().contains("does not begin"));
    }
}
