//! Tensors by name in NumPy's `.npz` archives.
//!
//! NumPy has no bfloat16; such tensors are written as two-byte voids (`V2`), as its extension package `ml_dtypes` does,
//! and two-byte voids are read as bfloat16.

mod header;
mod zip;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek};
use std::path::Path;

use planfile::replace::Replacement;
use planfile::{DType, Tensor, TensorType, regular};

use crate::memory::allocate;
use crate::tensor_file::TensorFileError;
use header::{header, read_header};
use zip::{Archive, Entry, Writer};

/// Ending of the files in an archive that hold arrays.
const ARRAY: &str = ".npy";

/// Reads all arrays of the archive at `path`.
///
/// # Errors
/// [`TensorFileError`]: a file that cannot be read, is no archive, or holds arrays of another kind than tensors.
pub fn read_npz(path: &Path) -> Result<BTreeMap<String, Tensor>, TensorFileError> {
    read_npz_with(path, |_, _| Ok(()))
}

/// Reads all arrays of the archive at `path`. `expect` sees the name and type of each before memory is taken for it,
/// and what it refuses ends the reading.
///
/// # Errors
/// Those of `expect` and of [`read_npz`].
pub fn read_npz_with<E: From<TensorFileError>>(
    path: &Path,
    mut expect: impl FnMut(&str, &TensorType) -> Result<(), E>,
) -> Result<BTreeMap<String, Tensor>, E> {
    let opened = regular::open(path);
    let opened = opened.map_err(|source| TensorFileError::Io { action: "open", path: path.to_owned(), source })?;
    let (file, _) = opened.ok_or_else(|| TensorFileError::NotAFile { path: path.to_owned() })?;
    let mut archive = Archive::open(BufReader::new(file))
        .map_err(|what| TensorFileError::NotAnArchive { path: path.to_owned(), what })?;
    let mut tensors = BTreeMap::new();
    for entry in std::mem::take(&mut archive.entries) {
        let Some(name) = entry.name.strip_suffix(ARRAY) else { continue };
        let failed = |what| TensorFileError::Array { path: path.to_owned(), array: name.to_owned(), what };
        let array = Array::open(&mut archive, &entry).map_err(failed)?;
        expect(name, &array.ty)?;
        let tensor = array.read().map_err(failed)?;
        if tensors.insert(name.to_owned(), tensor).is_some() {
            return Err(failed("it is there twice".to_owned()).into());
        }
    }
    Ok(tensors)
}

/// An array whose header was read, and is as long as its entry.
struct Array<'a, R> {
    ty: TensorType,
    bytes: u64,
    big_endian: bool,
    data: zip::Unpacked<'a, R>,
}

impl<'a, R: BufRead + Seek> Array<'a, R> {
    fn open(archive: &'a mut Archive<R>, entry: &Entry) -> Result<Self, String> {
        let mut data = archive.read(entry)?;
        let header = read_header(&mut data)?;
        let ty = header.ty;
        let bytes = ty.bytes().ok_or_else(|| format!("{ty} does not fit in memory"))?;
        let left = entry.bytes - header.bytes.min(entry.bytes);
        if left != bytes {
            return Err(format!("{ty} takes {bytes} bytes, it has {left}"));
        }
        Ok(Self { ty, bytes, big_endian: header.big_endian, data })
    }

    fn read(mut self) -> Result<Tensor, String> {
        let Self { ty, bytes, .. } = self;
        let mut data = allocate(bytes, || ty.to_string()).map_err(|error| error.to_string())?;
        self.data.read_exact(data.bytes_mut()).map_err(|error| error.to_string())?;
        // The end of an entry is where its checksum is compared.
        if self.data.read(&mut [0]).map_err(|error| error.to_string())? != 0 {
            return Err(format!("it has more bytes than {ty} takes"));
        }
        if self.big_endian {
            data.bytes_mut().chunks_exact_mut(ty.dtype.bytes()).for_each(<[u8]>::reverse);
        }
        if ty.dtype == DType::Bool && data.bytes().iter().any(|&byte| byte > 1) {
            return Err("a boolean is neither 0 nor 1".to_owned());
        }
        Ok(Tensor { ty, data })
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
    let mut archive = Writer::new(BufWriter::new(file));
    for (name, tensor) in tensors {
        archive.add(&format!("{name}{ARRAY}"), &[&header(&tensor.ty), tensor.data.bytes()])?;
    }
    archive.finish()
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
        let mut start = b"\x93NUMPY\x01\x00".to_vec();
        start.extend((header.len() as u16).to_le_bytes());
        let mut archive = Writer::new(File::create(&path).unwrap());
        archive.add("x.npy", &[&start, header.as_bytes(), data]).unwrap();
        archive.finish().unwrap();
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
        assert!(short.contains("f32[2] takes 8 bytes, it has 7"), "{short}");
        let long = message("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n", &[0; 8]);
        assert!(long.contains("takes 4 bytes, it has 8"), "{long}");
        let huge = message("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904,)}\n", &[]);
        assert!(huge.contains("does not fit"), "{huge}");
    }

    #[test]
    fn archives_of_numpy_are_read() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/npz");
        for name in ["savez.npz", "savez_compressed.npz"] {
            let read = read_npz(&fixtures.join(name)).unwrap();
            assert_eq!(read.len(), DType::ALL.len() + 3, "{name}");
            for dtype in DType::ALL {
                // One element each of 0 and 1, twelve times.
                let array = &read[&dtype.to_string()];
                assert_eq!(array.ty, TensorType::new(dtype, &[4, 6]));
                let (zero, one) = array.data.bytes().split_at(dtype.bytes());
                assert!(zero.iter().all(|&byte| byte == 0) && one.iter().any(|&byte| byte != 0), "{name}: {dtype}");
                assert!(
                    array
                        .data
                        .bytes()
                        .chunks(2 * dtype.bytes())
                        .all(|pair| pair == &array.data.bytes()[..2 * dtype.bytes()])
                );
            }
            assert_eq!(read["scalar"].elements::<f32>().unwrap(), [1.5]);
            assert_eq!(read["empty"].ty, TensorType::new(DType::I64, &[0, 4]));
            assert_eq!(read["größe"].elements::<i32>().unwrap(), [7, 8, 9]);
        }
    }

    #[test]
    fn an_array_that_is_not_expected_takes_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        write_npz(&path, [("x", &sample(DType::F32))]).unwrap();
        let mut seen = Vec::new();
        let refused = read_npz_with(&path, |name, ty| {
            seen.push(format!("{name}: {ty}"));
            Err(TensorFileError::NoInputs { path: path.clone() })
        });
        assert!(matches!(refused, Err(TensorFileError::NoInputs { .. })));
        assert_eq!(seen, ["x: f32[2, 3]"]);
    }

    #[test]
    fn an_array_that_is_there_twice_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        let tensor = sample(DType::F32);
        write_npz(&path, [("x", &tensor), ("x", &tensor)]).unwrap();
        assert!(read_npz(&path).unwrap_err().to_string().contains("twice"));
    }
}
