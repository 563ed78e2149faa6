//! Loads a model file into a flat graph whose weights stay ranges of their files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use planfile::regular;
use prost::Message as _;

use crate::error::OnnxError;
use crate::flat::Graph;
use crate::inline::{canonical_domain, flatten};
use crate::messages::{DeviceConfigurationProto, ModelProto, OperatorSetIdProto, TensorProto};
use crate::order::order;
use crate::shown_names;
use crate::source_files::{SourceFile, SourceFiles};
use crate::tensor_data::{Tensor, tensor};
use crate::wire::{self, Thinned};

/// Versions of the file format that are read.
pub const IR_VERSIONS: RangeInclusive<i64> = 3..=14;

/// Versions of ONNX's own operators that are read.
pub const OPSETS: RangeInclusive<i64> = 1..=28;

/// Largest file with a single tensor that is read, in bytes.
pub const TENSOR_FILE_LIMIT_BYTES: u64 = 1 << 30;

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// External data may also lie below this folder (through links in the model's folder, hard ones included); without it,
    /// only in the model's folder.
    pub external_data_root: Option<PathBuf>,
    /// External data whose file is not there is recorded as absent, for planning with random weights.
    pub allow_missing_weights: bool,
}

/// A model: its graph with functions inlined, and the files its weights lie in.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub ir_version: i64,
    /// By domain; ONNX's own is the empty string.
    pub opsets: BTreeMap<String, i64>,
    pub producer_name: String,
    pub producer_version: String,
    pub graph: Graph,
    /// `domain.name` of the functions that the model defines; those that are called are inlined in `graph`.
    pub functions: Vec<String>,
    /// [`crate::source_files::FileIndex`] counts these; the first is the model file.
    pub files: Vec<SourceFile>,
    /// A folder for external data was named ([`LoadOptions::external_data_root`]), and there is no external data.
    pub external_data_root_unused: bool,
    /// Free-form pairs of the model.
    pub metadata: BTreeMap<String, String>,
    /// Kept as the model has them.
    pub device_configurations: Vec<DeviceConfigurationProto>,
}

/// Loads the model at `path`. Reads the graph; long weights are left where they are.
///
/// # Errors
/// When the file is not a valid model of a supported version, or its weights are not there.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Model, OnnxError> {
    if let Some(root) = &options.external_data_root {
        let listed = std::fs::read_dir(root);
        listed.map_err(|source| OnnxError::Io { path: root.clone(), action: "read the folder", source })?;
    }
    let (file, len) = open(path)?;
    let Thinned { message, read } = wire::thin(path, &file, len)?;
    let mut proto =
        ModelProto::decode(message.as_slice()).map_err(|source| OnnxError::Decode { path: path.to_owned(), source })?;
    drop(message);
    shown_names::show(&mut proto);
    let missing = |field| OnnxError::Missing { path: path.to_owned(), field };
    let ir_version = proto.ir_version.ok_or_else(|| missing("ir_version"))?;
    if !IR_VERSIONS.contains(&ir_version) {
        return Err(OnnxError::IrVersion { path: path.to_owned(), found: ir_version });
    }
    let graph = proto.graph.as_ref().ok_or_else(|| missing("graph"))?;
    if proto.opset_import.is_empty() {
        return Err(missing("opset_import"));
    }
    let opsets = opsets(&proto.opset_import)?;
    let mut files = SourceFiles::new(path, len, read, options);
    let mut graph = flatten(graph, &proto.functions, &opsets, &mut files)?;
    order(&mut graph)?;
    let functions = proto.functions.iter().map(|function| format!("{}.{}", function.domain, function.name)).collect();
    Ok(Model {
        ir_version,
        opsets,
        producer_name: proto.producer_name,
        producer_version: proto.producer_version,
        graph,
        functions,
        external_data_root_unused: options.external_data_root.is_some() && !files.have_external(),
        files: files.into_files(),
        metadata: proto.metadata_props.into_iter().map(|entry| (entry.key, entry.value)).collect(),
        device_configurations: proto.configuration,
    })
}

/// Loads a file with a single tensor, such as `input_0.pb` of a test-data folder, into memory. The name may be empty.
///
/// # Errors
/// When the file is not a tensor of a supported type, or larger than [`TENSOR_FILE_LIMIT_BYTES`].
pub fn load_tensor(path: &Path) -> Result<(String, Tensor), OnnxError> {
    let (file, len) = open(path)?;
    if len > TENSOR_FILE_LIMIT_BYTES {
        let limit_bytes = TENSOR_FILE_LIMIT_BYTES;
        return Err(OnnxError::TensorFileTooLarge { path: path.to_owned(), file_bytes: len, limit_bytes });
    }
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes).map_err(|source| OnnxError::Io {
        path: path.to_owned(),
        action: "read",
        source,
    })?;
    let mut proto =
        TensorProto::decode(bytes.as_slice()).map_err(|source| OnnxError::Decode { path: path.to_owned(), source })?;
    drop(bytes);
    // Ours alone: a file that has this field cannot point anywhere with it.
    proto.file_range = None;
    shown_names::shown(&mut proto.name);
    let options = LoadOptions::default();
    let name = if proto.name.is_empty() { path.display().to_string() } else { proto.name.clone() };
    if proto.data_location != 0 {
        return Err(OnnxError::Tensor { tensor: name, problem: crate::error::TensorProblem::ExternalHere });
    }
    let tensor = tensor(&proto, &name, &mut SourceFiles::new(path, len, Vec::new(), &options))?;
    Ok((proto.name, tensor))
}

fn open(path: &Path) -> Result<(File, u64), OnnxError> {
    match regular::open(path).map_err(|source| OnnxError::Io { path: path.to_owned(), action: "open", source })? {
        None => Err(OnnxError::NotAFile { path: path.to_owned() }),
        Some((_, 0)) => Err(OnnxError::Empty { path: path.to_owned() }),
        Some(opened) => Ok(opened),
    }
}

fn opsets(imports: &[OperatorSetIdProto]) -> Result<BTreeMap<String, i64>, OnnxError> {
    let mut opsets = BTreeMap::new();
    for import in imports {
        let domain = canonical_domain(&import.domain);
        let first = opsets.insert(domain.to_owned(), import.version);
        if let Some(first) = first.filter(|first| *first != import.version) {
            return Err(OnnxError::DuplicateName {
                place: "the model's `opset_import`".into(),
                name: if domain.is_empty() { "ai.onnx" } else { domain }.to_owned(),
                first: format!("version {first}"),
                second: format!("version {}", import.version),
            });
        }
    }
    if let Some(&version) = opsets.get("") {
        check_opset("the model", version)?;
    }
    Ok(opsets)
}

/// Checks the version of ONNX's own operators.
pub(crate) fn check_opset(place: &str, found: i64) -> Result<(), OnnxError> {
    if OPSETS.contains(&found) { Ok(()) } else { Err(OnnxError::Opset { place: place.to_owned(), found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::{Attribute, DimSpec};
    use crate::messages::{AttributeType, NodeDeviceConfigurationProto, ShardingSpecProto, StringStringEntryProto};
    use crate::samples::{attribute, graph, model, node, opset, reload, save, save_bytes, tensor, value, with};
    use crate::source_files::WeightFiles;

    fn identity() -> ModelProto {
        model(graph(vec![node("Identity", &["x"], &["y"])]))
    }

    #[test]
    fn loads_a_model_with_its_metadata() {
        let mut proto = identity();
        proto.metadata_props.push(StringStringEntryProto { key: "k".into(), value: "v".into() });
        proto.configuration.push(DeviceConfigurationProto { name: "two".into(), num_devices: 2, device: vec![] });
        let spec = ShardingSpecProto { tensor_name: "x".into(), device: vec![0, 1], ..ShardingSpecProto::default() };
        let on_node = NodeDeviceConfigurationProto {
            configuration_id: "two".into(),
            sharding_spec: vec![spec],
            pipeline_stage: Some(1),
        };
        proto.graph.as_mut().unwrap().node[0].device_configurations.push(on_node.clone());
        let loaded = reload(&proto).unwrap();
        assert_eq!((loaded.ir_version, loaded.opsets[""]), (8, 17));
        assert_eq!(loaded.metadata["k"], "v");
        assert_eq!(loaded.device_configurations, proto.configuration);
        assert_eq!(loaded.graph.nodes[0].device_configurations, [on_node]);
        assert_eq!(loaded.graph.inputs[0].dims, Some(vec![DimSpec::Param("n".into())]));
        assert_eq!((loaded.files[0].path.as_str(), loaded.files.len()), ("model.onnx", 1));
    }

    #[test]
    fn versions_out_of_range_say_the_range() {
        for version in [2, 15] {
            let error = reload(&ModelProto { ir_version: Some(version), ..identity() }).unwrap_err().to_string();
            assert!(error.contains(&format!("IR version {version}, supported are 3 to 14")), "{error}");
        }
        for version in [0, 29] {
            let error =
                reload(&ModelProto { opset_import: vec![opset("ai.onnx", version)], ..identity() }).unwrap_err();
            assert!(error.to_string().contains(&format!("opset {version} of ONNX, supported are 1 to 28")), "{error}");
        }
    }

    #[test]
    fn opset_imports_are_checked() {
        let conflicting = reload(&ModelProto { opset_import: vec![opset("", 17), opset("ai.onnx", 18)], ..identity() });
        assert!(matches!(conflicting, Err(OnnxError::DuplicateName { .. })));
        let none = reload(&ModelProto { opset_import: vec![], ..identity() });
        assert!(matches!(none, Err(OnnxError::Missing { field: "opset_import", .. })));
        let other = reload(&ModelProto { opset_import: vec![opset("my", 1)], ..identity() });
        assert!(matches!(other, Err(OnnxError::NoOpset { .. })));
    }

    #[test]
    fn inputs_with_initializers_are_constants() {
        let mut proto = model(graph(vec![node("Add", &["x", "w"], &["y"])]));
        let parts = proto.graph.as_mut().unwrap();
        parts.input.push(value("w", &[]));
        parts.initializer.push(tensor("w", &[], &[1.0]));
        let loaded = reload(&proto).unwrap();
        let inputs: Vec<&str> = loaded.graph.inputs.iter().map(|input| input.name.as_str()).collect();
        assert_eq!((inputs, loaded.graph.initializers[0].name.as_str()), (vec!["x"], "w"));
    }

    #[test]
    fn constants_of_unsupported_types_stay_nodes() {
        let strings = crate::messages::AttributeProto {
            strings: vec![b"text".to_vec()],
            ..attribute("value_strings", AttributeType::Strings)
        };
        let int4 = crate::messages::AttributeProto {
            t: Some(Box::new(TensorProto { data_type: 22, ..tensor("", &[2], &[]) })),
            ..attribute("value", AttributeType::Tensor)
        };
        let nodes = vec![
            with(node("Constant", &[], &["a"]), strings),
            with(node("Constant", &[], &["b"]), int4),
            node("Fancy", &["x", "a", "b"], &["y"]),
        ];
        let loaded = reload(&model(graph(nodes))).unwrap();
        assert_eq!(loaded.graph.nodes[0].attributes["value_strings"], Attribute::Strings(vec!["text".into()]));
        assert_eq!(
            loaded.graph.nodes[1].attributes["value"],
            Attribute::Unsupported(
                "a tensor of int4, which is not supported: export with 8-bit integers, or in f16 or bf16".into()
            )
        );
    }

    #[test]
    fn a_folder_and_a_missing_file_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(load(folder.path(), &LoadOptions::default()), Err(OnnxError::NotAFile { .. })));
        let error = load(&folder.path().join("none.onnx"), &LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("cannot open") && error.contains("none.onnx"), "{error}");
    }

    #[test]
    fn reads_files_with_one_tensor() {
        let values: Vec<f32> = (0..2000_u16).map(f32::from).collect();
        let saved = save_bytes(&tensor("x", &[2000], &values).encode_to_vec());
        let (name, loaded) = load_tensor(&saved.path).unwrap();
        assert_eq!((name.as_str(), loaded.dims, loaded.source.len()), ("x", vec![2000], 8000));
        let range = crate::messages::FileRange { offset: 0, length: 8, field: 9 };
        let hostile = TensorProto { file_range: Some(range), ..tensor("x", &[2], &[]) };
        let error = load_tensor(&save_bytes(&hostile.encode_to_vec()).path).unwrap_err();
        assert!(error.to_string().contains("wrong length"), "{error}");
        let model = save(&identity());
        assert!(load_tensor(&model.path).is_err());
    }

    #[test]
    fn every_fixture_loads_and_its_weights_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/onnx");
        let mut count = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path().join("model.onnx");
            if !path.exists() {
                continue;
            }
            let loaded = load(&path, &LoadOptions::default()).unwrap_or_else(|error| panic!("{error}"));
            assert!(!loaded.graph.inputs.is_empty() && !loaded.graph.nodes.is_empty(), "{}", path.display());
            let files = WeightFiles::open(&loaded.files).unwrap();
            for initializer in &loaded.graph.initializers {
                let mut bytes = vec![0; usize::try_from(initializer.tensor.source.len()).unwrap()];
                files.read_tensor(&initializer.tensor.source, 0, &mut bytes).unwrap();
            }
            count += 1;
        }
        assert!(count > 0, "no models below {}", folder.display());
    }
}
