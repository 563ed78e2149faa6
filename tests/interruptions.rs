//! What ends `compile` before its work is done: signals, limits, too little memory. It says so by its exit code, leaves
//! nothing behind, and an older plan stays.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use onnx::messages::{
    AttributeProto, AttributeType, Dimension, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use prost::Message as _;
use tempfile::TempDir;

/// A folder with `m.onnx`, whose weights take so many MiB, and `m.plan`, which is no plan.
struct Desk(TempDir);

fn value(name: &str, elem_type: i32, sizes: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| Dimension { value: Some(DimensionValue::DimValue(size)) };
    let tensor =
        type_proto::Tensor { elem_type, shape: Some(TensorShapeProto { dim: sizes.iter().map(dim).collect() }) };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) }) }
}

fn node(op: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    let input = inputs.iter().map(|&name| name.to_owned()).collect();
    NodeProto { op_type: op.into(), input, output: vec![output.into()], attribute, ..NodeProto::default() }
}

/// `y = w[i]`, with `w: f32[rows, 1024]` in a file; `nodes` make `w` of `v`, which has that type.
fn table(rows: i64, nodes: Vec<NodeProto>) -> Vec<u8> {
    let location = StringStringEntryProto { key: "location".into(), value: "v.bin".into() };
    let weight = TensorProto {
        name: "v".into(),
        dims: vec![rows, 1024],
        data_type: 1,
        data_location: 1,
        external_data: vec![location],
        ..TensorProto::default()
    };
    let graph = GraphProto {
        name: "g".into(),
        node: [nodes, vec![node("Gather", &["w", "i"], "y", vec![])]].concat(),
        initializer: vec![weight],
        input: vec![value("i", 7, &[1])],
        output: vec![value("y", 1, &[1, 1024])],
        ..GraphProto::default()
    };
    let opset_import = vec![OperatorSetIdProto { domain: String::new(), version: 17 }];
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..ModelProto::default() }.encode_to_vec()
}

impl Desk {
    fn new(mebibytes: u64) -> Self {
        let same = node("Identity", &["v"], "w", vec![]);
        Self::with_model(mebibytes, &table(mebibytes as i64 * 256, vec![same]))
    }

    fn with_model(mebibytes: u64, model: &[u8]) -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        fs::write(desk.path("m.onnx"), model).unwrap();
        File::create(desk.path("v.bin")).unwrap().set_len(mebibytes << 20).unwrap();
        fs::write(desk.path("m.plan"), "old").unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `compile m.onnx`, begun by a shell with this before it.
    fn begin(&self, before: &str) -> Child {
        let script = format!("{before}\nexec \"$0\" m.onnx");
        let mut command = Command::new("bash");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_compile")]).current_dir(self.0.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn unfinished(&self) -> Vec<PathBuf> {
        let paths = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(".plan-")).collect()
    }

    /// Ends the command by a signal while it writes the plan.
    fn signalled(&self, before: &str, signal: &str) -> (ExitStatus, String) {
        let mut child = self.begin(before);
        while self.unfinished().is_empty() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it wrote");
            std::thread::sleep(Duration::from_millis(2));
        }
        let sent = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        ended(child)
    }
}

fn ended(child: Child) -> (ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn signals_end_with_their_number_and_leave_nothing() {
    let desk = Desk::new(2048);
    for (signal, number) in [("HUP", 1), ("INT", 2), ("TERM", 15), ("XCPU", 24)] {
        let (status, said) = desk.signalled("", signal);
        assert_eq!(status.code(), Some(128 + number), "{signal}: {status} {said}");
        assert_eq!(desk.unfinished(), [] as [PathBuf; 0], "{signal}");
        assert_eq!(fs::read(desk.path("m.plan")).unwrap(), b"old", "{signal}");
    }
}

#[test]
fn a_signal_that_is_ignored_ends_nothing() {
    let desk = Desk::new(128);
    let (status, said) = desk.signalled("trap '' HUP", "HUP");
    assert_eq!(status.code(), Some(0), "{status} {said}");
    assert!(fs::metadata(desk.path("m.plan")).unwrap().len() > 128 << 20);
}

#[test]
fn what_a_killed_process_left_goes_with_the_next_one() {
    let desk = Desk::new(2048);
    let (status, _) = desk.signalled("", "KILL");
    assert_eq!(status.signal(), Some(9));
    assert_eq!(desk.unfinished().len(), 1);
    // While a process writes, its file is no left one.
    let writing = planfile::replace::Replacement::new(&desk.path("other.plan"), ".other-").unwrap();
    File::create(desk.path("v.bin")).unwrap().set_len(1 << 20).unwrap();
    fs::write(desk.path("m.onnx"), table(256, vec![node("Identity", &["v"], "w", vec![])])).unwrap();
    let (status, said) = ended(desk.begin(""));
    assert_eq!(status.code(), Some(0), "{said}");
    assert_eq!(desk.unfinished(), [] as [PathBuf; 0]);
    writing.finish().unwrap();
}

#[test]
fn a_limit_on_the_size_of_files_is_an_error() {
    let desk = Desk::new(4);
    // As a signal, and as an error where the signal is ignored.
    for before in ["ulimit -f 1000", "trap '' XFSZ; ulimit -f 1000"] {
        let (status, said) = ended(desk.begin(before));
        assert_eq!(status.code(), Some(4), "{status} {said}");
        assert!(said.contains("File too large") && said.contains("ulimit -f"), "{said}");
        assert_eq!(desk.unfinished(), [] as [PathBuf; 0]);
        assert_eq!(fs::read(desk.path("m.plan")).unwrap(), b"old");
    }
}

/// A transposed table is made in tall tiles, and its recipe evaluated with as much again.
#[test]
fn too_little_memory_ends_with_3() {
    let permutation = AttributeProto {
        name: "perm".into(),
        ints: vec![1, 0],
        r#type: AttributeType::Ints as i32,
        ..AttributeProto::default()
    };
    let flat = TensorProto {
        name: "s".into(),
        dims: vec![2],
        data_type: 7,
        raw_data: Some([-1i64, 1024].iter().flat_map(|size| size.to_le_bytes()).collect()),
        ..TensorProto::default()
    };
    let shape = AttributeProto {
        name: "value".into(),
        t: Some(Box::new(flat)),
        r#type: AttributeType::Tensor as i32,
        ..AttributeProto::default()
    };
    let nodes = vec![
        node("Transpose", &["v"], "t", vec![permutation]),
        node("Exp", &["t"], "e", vec![]),
        node("Constant", &[], "s", vec![shape]),
        node("Reshape", &["e", "s"], "w", vec![]),
    ];
    let desk = Desk::with_model(256, &table(1 << 16, nodes));
    let mut codes = Vec::new();
    for mebibytes in [60, 90, 120, 160, 220, 300, 400, 550] {
        let (status, said) = ended(desk.begin(&format!("ulimit -v {}", mebibytes << 10)));
        let code = status.code().unwrap_or_else(|| panic!("{mebibytes} MiB: {status} {said}"));
        assert!(code == 0 || code == 3, "{mebibytes} MiB: {code} {said}");
        assert!(code == 0 || said.contains("memory"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(desk.unfinished().len(), 0, "{said}");
        codes.push(code);
        if code == 0 {
            break;
        }
    }
    assert!(codes.contains(&3), "{codes:?}");
}
