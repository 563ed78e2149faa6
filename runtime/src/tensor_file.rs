//! Files with tensors: what can be wrong with them, and folders with the inputs and outputs of a test.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use planfile::Tensor;

use crate::tensor_proto::read_tensor_proto;

/// Why a file with tensors could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFileError {
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not a regular file; name a file with a tensor", path.display())]
    NotAFile { path: PathBuf },
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

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; free some space, a file that was there before is unchanged",
        io::ErrorKind::NotFound => "; check the path",
        _ => "",
    }
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
        let io_error = |source| TensorFileError::Io { action: "read folder", path: folder.to_owned(), source };
        fs::read_dir(folder).map_err(io_error)?;
        let inputs = numbered(folder, "input")?;
        if inputs.is_empty() {
            return Err(TensorFileError::NoInputs { path: folder.to_owned() });
        }
        Ok(Self { inputs, outputs: numbered(folder, "output")? })
    }
}

/// The tensors in `KIND_0.pb`, `KIND_1.pb`, … up to the first that is not there.
fn numbered(folder: &Path, kind: &str) -> Result<Vec<Tensor>, TensorFileError> {
    let paths = (0..).map(|number| folder.join(format!("{kind}_{number}.pb")));
    paths.take_while(|path| path.exists()).map(|path| read_tensor_proto(&path)).collect()
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
    fn folders_without_inputs_are_refused() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(TestData::read(empty.path()), Err(TensorFileError::NoInputs { .. })));
        assert!(matches!(TestData::read(&empty.path().join("none")), Err(TensorFileError::Io { .. })));
    }
}
