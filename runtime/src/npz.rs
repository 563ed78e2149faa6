//! Tensors by name in NumPy's `.npz` archives.
//!
//! NumPy has no bfloat16; such tensors are written as two-byte voids (`V2`), as its extension package `ml_dtypes` does,
//! and two-byte voids are read as bfloat16.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;

use npyz::npz::{NpzArchive, NpzWriter};
use npyz::zip::write::FileOptions;
use npyz::zip::{CompressionMethod, DateTime};
use npyz::{Endianness, NpyHeader, Order, TypeChar, WriterBuilder};
use planfile::replace::Replacement;
use planfile::{DType, Tensor, TensorType, regular};

use crate::memory::allocate;
use crate::tensor_file::TensorFileError;

/// Reads all arrays of the archive at `path`.
///
/// # Errors
/// [`TensorFileError`]: a file that cannot be read, is no archive, or holds arrays of another kind than tensors.
pub fn read_npz(path: &Path) -> Result<BTreeMap<String, Tensor>, TensorFileError> {
    let opened = regular::open(path);
    let opened = opened.map_err(|source| TensorFileError::Io { action: "open", path: path.to_owned(), source })?;
    let (file, _) = opened.ok_or_else(|| TensorFileError::NotAFile { path: path.to_owned() })?;
    let mut archive = NpzArchive::new(BufReader::new(file))
        .map_err(|error| TensorFileError::NotAnArchive { path: path.to_owned(), what: error.to_string() })?;
    let names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    let mut tensors = BTreeMap::new();
    for name in names {
        let failed = |what| TensorFileError::Array { path: path.to_owned(), array: name.clone(), what };
        let tensor = read_array(&mut archive, &name).map_err(failed)?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(failed("it is there twice".to_owned()));
        }
    }
    Ok(tensors)
}

fn read_array<R: Read + Seek>(archive: &mut NpzArchive<R>, name: &str) -> Result<Tensor, String> {
    let file = npyz::npz::file_name_from_array_name(name);
    let mut entry = archive.zip_archive().by_name(&file).map_err(|error| error.to_string())?;
    let header = read_header(&mut entry)?;
    let (dtype, swapped) = element_type(&header)?;
    let shape = header.shape();
    if header.order() == Order::Fortran && shape.iter().filter(|&&size| size != 1).count() > 1 {
        return Err("it is in column-major order; store `numpy.ascontiguousarray` of it".to_owned());
    }
    let ty = TensorType::new(dtype, shape);
    let bytes = ty.bytes().ok_or_else(|| format!("{ty} does not fit in memory"))?;
    let mut data = allocate(bytes, || ty.to_string()).map_err(|error| error.to_string())?;
    entry.read_exact(data.bytes_mut()).map_err(|error| format!("{ty} takes {bytes} bytes: {error}"))?;
    if entry.read(&mut [0]).map_err(|error| error.to_string())? != 0 {
        return Err(format!("it has more bytes than {ty} takes"));
    }
    if swapped {
        data.bytes_mut().chunks_exact_mut(dtype.bytes()).for_each(<[u8]>::reverse);
    }
    if dtype == DType::Bool && data.bytes().iter().any(|&byte| byte > 1) {
        return Err("a boolean is neither 0 nor 1".to_owned());
    }
    Ok(Tensor { ty, data })
}

/// Longest text of a header, in bytes. NumPy itself refuses more than 10,000 unless told otherwise.
const HEADER_BYTES: usize = 64 << 10;
/// Brackets in brackets that a header may have: a dictionary with a tuple, or with a list of tuples.
const HEADER_DEPTH: usize = 8;

/// Reads a header. Its text is parsed by recursion and its sizes are multiplied unchecked, so both are looked at first.
fn read_header(entry: &mut impl Read) -> Result<NpyHeader, String> {
    let cut = |error: std::io::Error| format!("its header: {error}");
    let mut start = [0; 8];
    entry.read_exact(&mut start).map_err(cut)?;
    let mut length = [0; 4];
    let width = if start[6] == 1 { 2 } else { 4 };
    entry.read_exact(&mut length[..width]).map_err(cut)?;
    let bytes = u32::from_le_bytes(length) as usize;
    if bytes > HEADER_BYTES {
        return Err(format!("its header takes {bytes} bytes, at most {HEADER_BYTES} are read"));
    }
    let mut text = vec![0; bytes];
    entry.read_exact(&mut text).map_err(cut)?;
    check_header(&text)?;
    let whole = [&start, &length[..width], &text].concat();
    NpyHeader::from_reader(whole.as_slice()).map_err(|error| error.to_string())
}

/// Whether a header's text is flat enough to parse, and no product of its numbers overflows.
fn check_header(text: &[u8]) -> Result<(), String> {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > HEADER_DEPTH {
        return Err(format!("its header nests {deepest} deep, at most {HEADER_DEPTH} is read"));
    }
    let mut numbers = text.split(|byte| !byte.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse::<u64>().ok();
    let product = numbers.try_fold(1u64, |product, digits| product.checked_mul(number(digits)?.max(1)));
    product
        .filter(|&product| product <= i64::MAX as u64)
        .map(drop)
        .ok_or_else(|| "it does not fit in memory".to_owned())
}

/// The element type, and whether it is stored big-endian.
fn element_type(header: &NpyHeader) -> Result<(DType, bool), String> {
    let descr = header.dtype();
    let unsupported = || format!("element type {} is not supported; convert it", descr.descr());
    let npyz::DType::Plain(plain) = &descr else { return Err(unsupported()) };
    let dtype = match (plain.type_char(), plain.size_field()) {
        (TypeChar::Bool, 1) => DType::Bool,
        (TypeChar::Uint, 1) => DType::U8,
        (TypeChar::Uint, 2) => DType::U16,
        (TypeChar::Uint, 4) => DType::U32,
        (TypeChar::Uint, 8) => DType::U64,
        (TypeChar::Int, 1) => DType::I8,
        (TypeChar::Int, 2) => DType::I16,
        (TypeChar::Int, 4) => DType::I32,
        (TypeChar::Int, 8) => DType::I64,
        (TypeChar::Float, 2) => DType::F16,
        (TypeChar::Float, 4) => DType::F32,
        (TypeChar::Float, 8) => DType::F64,
        (TypeChar::RawData, 2) => DType::BF16,
        _ => return Err(unsupported()),
    };
    Ok((dtype, plain.endianness() == Endianness::Big))
}

/// Type string of the array interface.
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

/// How the names of unfinished archives begin.
const PREFIX: &str = ".npz-";

/// Writes tensors to the archive at `path`, uncompressed: beside it first, so that an older file there is replaced by a
/// whole one or not at all.
///
/// # Errors
/// [`TensorFileError::Io`], disk full included; a place that no file can go to.
pub fn write_npz<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<(), TensorFileError> {
    let mut file = Replacement::new(path, PREFIX)?;
    let written = write_archive(file.file(), tensors);
    written.map_err(|source| TensorFileError::Io { action: "write", path: path.to_owned(), source })?;
    Ok(file.finish_durably()?)
}

fn write_archive<'a>(file: &mut File, tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>) -> std::io::Result<()> {
    let mut buffered = BufWriter::new(file);
    let mut writer = NpzWriter::new(&mut buffered);
    // The same time in every archive: the same tensors are the same bytes.
    let options = FileOptions::default().last_modified_time(DateTime::default());
    let options = options.compression_method(CompressionMethod::Stored).large_file(true);
    for (name, tensor) in tensors {
        let entry = npyz::npz::file_name_from_array_name(name);
        writer.zip_writer().start_file(entry, options)?;
        let header = header(&tensor.ty)?;
        writer.zip_writer().write_all(&header)?;
        writer.zip_writer().write_all(tensor.data.bytes())?;
    }
    writer.zip_writer().finish()?;
    drop(writer);
    buffered.flush()
}

/// The header of an array.
fn header(ty: &TensorType) -> std::io::Result<Vec<u8>> {
    let invalid = |error: &dyn ToString| std::io::Error::other(error.to_string());
    let plain = type_string(ty.dtype).parse().map_err(|error: npyz::ParseTypeStrError| invalid(&error))?;
    let mut bytes = Vec::new();
    npyz::WriteOptions::new_header_only()
        .dtype(npyz::DType::Plain(plain))
        .shape(&ty.sizes())
        .writer(&mut bytes)
        .write_header_only()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(dtype: DType) -> Tensor {
        let ty = TensorType::new(dtype, &[2, 3]);
        let bytes: Vec<u8> =
            (0..6 * dtype.bytes()).map(|byte| if dtype == DType::Bool { 1 } else { byte as u8 }).collect();
        Tensor::from_bytes(ty, &bytes).unwrap()
    }

    #[test]
    fn every_type_round_trips() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        let mut tensors: BTreeMap<String, Tensor> =
            DType::ALL.into_iter().map(|dtype| (format!("a/{dtype}"), sample(dtype))).collect();
        tensors.insert("scalar".to_owned(), Tensor::from_elements(&[], &[1.5f32]).unwrap());
        tensors.insert("empty".to_owned(), Tensor::from_elements::<i64>(&[0, 4], &[]).unwrap());
        write_npz(&path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))).unwrap();
        assert_eq!(read_npz(&path).unwrap(), tensors);
    }

    #[test]
    fn archives_do_not_say_when_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        write_npz(&path, [("x", &sample(DType::F32))]).unwrap();
        // Time and date in the header of the first entry: the first moment that the format knows.
        assert_eq!(std::fs::read(&path).unwrap()[10..14], [0, 0, 0x21, 0]);
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        assert!(matches!(read_npz(&path), Err(TensorFileError::Io { .. })));
        assert!(matches!(read_npz(folder.path()), Err(TensorFileError::NotAFile { .. })));
        std::fs::write(&path, b"not an archive").unwrap();
        assert!(matches!(read_npz(&path), Err(TensorFileError::NotAnArchive { .. })));
    }

    /// An archive of one array with this header text and data.
    fn archive(folder: &Path, header: &str, data: &[u8]) -> Result<BTreeMap<String, Tensor>, TensorFileError> {
        let path = folder.join("x.npz");
        let mut writer = npyz::zip::ZipWriter::new(File::create(&path).unwrap());
        writer.start_file("x.npy", FileOptions::default()).unwrap();
        writer.write_all(b"\x93NUMPY\x01\x00").unwrap();
        writer.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        writer.write_all(header.as_bytes()).unwrap();
        writer.write_all(data).unwrap();
        writer.finish().unwrap();
        read_npz(&path)
    }

    #[test]
    fn other_layouts_are_read_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let read = |header: &str, data: &[u8]| archive(folder.path(), header, data);
        let big = read("{'descr': '>i2', 'fortran_order': False, 'shape': (2,)}\n", &[1, 0, 0, 2]).unwrap();
        assert_eq!(big["x"].elements::<i16>().unwrap(), [256, 2]);
        let message = |header: &str, data: &[u8]| read(header, data).unwrap_err().to_string();
        let columns = message("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2)}\n", &[0; 4]);
        assert!(columns.contains("column-major"), "{columns}");
        let complex = message("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}\n", &[0; 8]);
        assert!(complex.contains("'<c8' is not supported"), "{complex}");
        let short = message("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n", &[0; 7]);
        assert!(short.contains("f32[2] takes 8 bytes"), "{short}");
        let long = message("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n", &[0; 8]);
        assert!(long.contains("more bytes"), "{long}");
        let huge = message("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904,)}\n", &[]);
        assert!(huge.contains("does not fit"), "{huge}");
    }

    #[test]
    fn hostile_headers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let message = |header: &str| archive(folder.path(), header, &[]).unwrap_err().to_string();
        for shape in ["(4294967296, 4294967296, 4)", "(0, 18446744073709551615, 3)", "(99999999999999999999,)"] {
            let overflow = message(&format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n"));
            assert!(overflow.contains("does not fit"), "{overflow}");
        }
        let deep = message(&format!("{{'descr': {}", "[".repeat(50_000)));
        assert!(deep.contains("nests 50001 deep"), "{deep}");
        let missing = message("{'descr': '|u1'}\n");
        assert!(missing.contains("fortran_order"), "{missing}");
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_reading() {
        let mut start = b"\x93NUMPY\x02\x00".to_vec();
        start.extend(u32::MAX.to_le_bytes());
        let error = read_header(&mut start.as_slice()).err().unwrap();
        assert!(error.contains("takes 4294967295 bytes"), "{error}");
        for length in 0..start.len() {
            assert!(read_header(&mut &start[..length]).is_err());
        }
    }
}
