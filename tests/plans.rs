//! Plan files: the same input gives the same bytes, wherever it lies and whenever it is compiled.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]

use std::fs;
use std::path::Path;

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::Target;
use planwright::compiler::Request;
use runtime::tensor_file::TestData;

fn request(model: &Path, data: &TestData) -> Request {
    let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
    let mut request = Request::new(model, target);
    request.samples.clone_from(&data.inputs);
    request.mesh = MeshChoice::Fixed(parse_mesh("data=2,tensor=2").unwrap());
    request
}

fn bytes(model: &Path, data: &TestData) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.plan");
    request(model, data).compile(&mut |_, _| {}).unwrap().unwrap().write(&path, |_| {}).unwrap();
    fs::read(path).unwrap()
}

#[test]
fn same_bytes_in_every_run_and_folder() {
    for name in ["tiny_mixtral", "tiny_resnet"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx").join(name);
        let data = TestData::read(&folder.join("test_data_set_0")).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let copy = elsewhere.path().join("model.onnx");
        fs::copy(folder.join("model.onnx"), &copy).unwrap();
        let first = bytes(&folder.join("model.onnx"), &data);
        assert!(first == bytes(&folder.join("model.onnx"), &data), "{name}: two runs differ");
        assert!(first == bytes(&copy, &data), "{name}: two folders differ");
    }
}
