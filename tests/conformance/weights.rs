//! Makes weights of a case's inputs: node tests have inputs alone, and the tensor axis splits weights.

use std::fs;
use std::path::{Path, PathBuf};

use onnx::load::{LoadOptions, load};
use planfile::DType;
use prost::encoding::encode_varint;
use runtime::tensor_file::TestData;
use tempfile::TempDir;

/// A case some of whose inputs are weights.
pub(crate) struct Fixed {
    folder: TempDir,
    /// The inputs that are left.
    pub(crate) data: TestData,
}

impl Fixed {
    pub(crate) fn model(&self) -> PathBuf {
        self.folder.path().join("model.onnx")
    }
}

/// Which inputs to make weights of: all but the first, then the first alone. Integers of 32 bits and more stay: they
/// are indexes and shapes.
pub(crate) fn choices(data: &TestData) -> Vec<Vec<usize>> {
    let fit = |&position: &usize| {
        let ty = &data.inputs[position].ty;
        let number = ty.dtype.is_float() || matches!(ty.dtype, DType::I8 | DType::U8);
        number && ty.rank() > 0 && !ty.sizes().contains(&0)
    };
    let count = data.inputs.len();
    let others: Vec<usize> = (1..count).filter(fit).collect();
    let first: Vec<usize> = (0..count.min(1)).filter(fit).collect();
    let left = |chosen: &Vec<usize>| !chosen.is_empty() && chosen.len() < count;
    [others, first].into_iter().filter(left).collect()
}

/// The case with the chosen inputs as initializers.
pub(crate) fn fix(folder: &Path, data: &TestData, chosen: &[usize]) -> Result<Fixed, String> {
    let path = folder.join("model.onnx");
    let names = load(&path, &LoadOptions::default()).map_err(|error| error.to_string())?.graph.inputs;
    let mut initializers = Vec::new();
    for &position in chosen {
        let file = folder.join(format!("test_data_set_0/input_{position}.pb"));
        let mut tensor = fs::read(file).map_err(|error| error.to_string())?;
        // The file may name the tensor otherwise; of a repeated field the last counts.
        let name = names.get(position).ok_or("the model has fewer inputs than the case")?;
        tensor.extend(chunk(TENSOR_NAME, name.name.as_bytes()));
        initializers.extend(chunk(GRAPH_INITIALIZER, &tensor));
    }
    let mut model = fs::read(&path).map_err(|error| error.to_string())?;
    // A message that comes twice is merged.
    model.extend(chunk(MODEL_GRAPH, &initializers));
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    fs::write(folder.path().join("model.onnx"), model).map_err(|error| error.to_string())?;
    let mut data = TestData { inputs: data.inputs.clone(), outputs: data.outputs.clone() };
    for &position in chosen.iter().rev() {
        data.inputs.remove(position);
    }
    Ok(Fixed { folder, data })
}

// Field numbers of ONNX's messages.
const MODEL_GRAPH: u64 = 7;
const GRAPH_INITIALIZER: u64 = 5;
const TENSOR_NAME: u64 = 8;

/// A length-delimited field.
fn chunk(field: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_varint(field << 3 | 2, &mut bytes);
    encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}
