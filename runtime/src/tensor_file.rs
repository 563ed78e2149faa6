//! Files with tensors: what can be wrong with them, and folders with the inputs and outputs of a test.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use planfile::Tensor;
use planfile::replace::{ReplaceError, advice};

use crate::tensor_proto::read_tensor_proto;

/// Why a file with tensors could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFileError {
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a regular file; name a file with a tensor", path.display())]
    NotAFile { path: PathBuf },
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    #[error("{} takes {bytes} bytes, more than there is memory; use a machine with more of it", path.display())]
    Memory { path: PathBuf, bytes: u64 },
    #[error("{} is there and {} is not; give one file for each", path.display(), missing.display())]
    Gap { path: PathBuf, missing: PathBuf },
    #[error("{} has {bytes} bytes, the format's limit is {limit}; store the tensor in an .npz file", path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{} is no file with an ONNX tensor: {what}; store it again", path.display())]
    NotATensor { path: PathBuf, what: String },
    #[error("{} is no .npz archive: {what}; write it with `numpy.savez`", path.display())]
    NotAnArchive { path: PathBuf, what: String },
    #[error("array `{array}` in {}: {what}", path.display())]
    Array { path: PathBuf, array: String, what: String },
    #[error("{} has no input_0.pb; name a folder with input_0.pb, input_1.pb, …", path.display())]
    NoInputs { path: PathBuf },
}

/// Sample inputs and expected outputs of a model, in the order of its signature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TestData {
    pub inputs: Vec<Tensor>,
    /// Empty where only inputs are given.
    pub outputs: Vec<Tensor>,
}

impl TestData {
    /// Reads `input_0.pb`, `input_1.pb`, … and `output_0.pb`, … from an ONNX test-data folder.
    ///
    /// # Errors
    /// A folder without `input_0.pb`, or a file that is not a tensor.
    pub fn read(folder: &Path) -> Result<Self, TensorFileError> {
        let inputs = numbered(folder, "input")?;
        if inputs.is_empty() {
            return Err(TensorFileError::NoInputs { path: folder.to_owned() });
        }
        Ok(Self { inputs, outputs: numbered(folder, "output")? })
    }
}

/// The tensors in `KIND_0.pb`, `KIND_1.pb`, … up to the last. One that is there must be readable: a link to nowhere is
/// no end of the list.
fn numbered(folder: &Path, kind: &str) -> Result<Vec<Tensor>, TensorFileError> {
    let failed = |source| TensorFileError::Io { action: "read folder", path: folder.to_owned(), source };
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        numbers.extend(name.to_str().and_then(|name| number(name, kind)));
    }
    let path = |number: usize| folder.join(format!("{kind}_{number}.pb"));
    if let Some((missing, &found)) = numbers.iter().enumerate().find(|(expected, found)| expected != *found) {
        return Err(TensorFileError::Gap { path: path(found), missing: path(missing) });
    }
    numbers.into_iter().map(|number| read_tensor_proto(&path(number))).collect()
}

/// The number in `KIND_7.pb`.
fn number(name: &str, kind: &str) -> Option<usize> {
    let digits = name.strip_prefix(kind)?.strip_prefix('_')?.strip_suffix(".pb")?;
    let number = digits.parse().ok()?;
    // Not `07`, nor `+7`.
    (digits == format!("{number}")).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/onnx").join(name)
    }

    #[test]
    fn folders_are_read_in_order() {
        let data = TestData::read(&fixture("tiny_bert/test_data_set_0")).unwrap();
        assert_eq!((data.inputs.len(), data.outputs.len()), (3, 1));
        assert!(data.outputs[0].elements::<f32>().unwrap().iter().all(|value| value.is_finite()));
    }

    #[test]
    fn every_file_of_the_list_must_be_readable() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let copy =
            |name: &str| fs::copy(fixture("tiny_bert/test_data_set_0/input_0.pb"), path(name)).map(drop).unwrap();
        ["input_0.pb", "input_01.pb", "output_x.pb", "input_+1.pb"].into_iter().for_each(copy);
        let read = || TestData::read(folder.path());
        assert_eq!(read().unwrap().inputs.len(), 1);
        copy("input_2.pb");
        assert!(read().unwrap_err().to_string().contains("input_1.pb is not; give one file for each"));
        for name in ["input_1.pb", "output_0.pb"] {
            std::os::unix::fs::symlink("nowhere", path(name)).unwrap();
            assert!(matches!(read(), Err(TensorFileError::Io { path: at, .. }) if at == path(name)));
            fs::remove_file(path(name)).unwrap();
            fs::create_dir(path(name)).unwrap();
            assert!(matches!(read(), Err(TensorFileError::NotAFile { path: at }) if at == path(name)));
            fs::remove_dir(path(name)).unwrap();
            copy(name);
        }
        assert_eq!(read().unwrap().inputs.len(), 3);
    }

    #[test]
    fn folders_without_inputs_are_refused() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(TestData::read(empty.path()), Err(TensorFileError::NoInputs { .. })));
        assert!(matches!(TestData::read(&empty.path().join("none")), Err(TensorFileError::Io { .. })));
    }
}
