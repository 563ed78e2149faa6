//! What each pass makes of each model in `fixtures/onnx`, as text to review: the imported module, the simplified one,
//! the graph of each rank on a mesh, and the plan.

use std::path::Path;

use passes::shard::{MeshChoice, parse_mesh};
use planfile::{Target, text};
use planwright::compiler::Request;
use runtime::tensor_file::TestData;

/// Small, and with every kind of placement: a split batch, split heads and features, partial sums.
const MESH: &str = "data=2,tensor=2";

#[test]
fn models() {
    let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
    insta::glob!("../fixtures/onnx", "*/model.onnx", |model| {
        let folder = model.parent().unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut request = Request::new(model, target.clone());
        request.samples = TestData::read(&folder.join("test_data_set_0")).unwrap().inputs;
        request.mesh = MeshChoice::Fixed(parse_mesh(MESH).unwrap());
        let mut stages = Vec::new();
        let observed = |pass: &str, module: &ir::Module| stages.push((pass.to_owned(), module.summary_text()));
        let compiled = request.compile(&mut { observed }).unwrap().unwrap();
        stages.push(("plan".to_owned(), text::text(&compiled.plan)));
        for (stage, text) in stages {
            check(&name, &stage, &text);
        }
    });
}

/// The pattern of Megatron on four devices, with two key and value heads on the outer half of the axis.
#[test]
fn grouped_heads_on_four_devices() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx/tiny_llama");
    let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
    let mut request = Request::new(&folder.join("model.onnx"), target);
    request.samples = TestData::read(&folder.join("test_data_set_0")).unwrap().inputs;
    request.mesh = MeshChoice::Fixed(parse_mesh("tensor=4").unwrap());
    let mut sharded = String::new();
    let mut observer = |pass: &str, module: &ir::Module| {
        if pass == "shard" {
            sharded = module.summary_text();
        }
    };
    request.compile(&mut observer).unwrap();
    check("tiny_llama", "shard.tensor4", &sharded);
}

fn check(model: &str, stage: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.remove_snapshot_suffix();
    settings.remove_input_file();
    settings.set_snapshot_path("snapshots");
    settings.bind(|| insta::assert_snapshot!(format!("{model}.{stage}"), text));
}
