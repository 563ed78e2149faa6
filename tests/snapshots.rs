//! What each pass makes of each model in `fixtures/onnx`, as text to review: the imported module, the simplified one,
//! the graph of each rank on a mesh, and the plan.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::{DType, Target, text};
use planwright::compiler::Request;
use runtime::tensor_file::TestData;

/// Small, and with every kind of placement: a split batch, split heads and features, partial sums.
const MESH: &str = "data=2,tensor=2";

/// Passes that leave alone what the host executes.
const FOR_CUDA: [&str; 5] = ["recognise", "biases", "layout", "exchange", "narrow"];

#[test]
fn models() {
    insta::glob!("../fixtures/onnx", "*/model.onnx", |model| {
        let folder = model.parent().unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let mut request = request(folder);
        request.mesh = MeshChoice::Fixed(parse_mesh(MESH).unwrap());
        let mut stages = Vec::new();
        let mut before = String::new();
        // Passes that change little here have a test of their own below.
        let observed = |pass: &str, module: &ir::Module| {
            let text = module.summary_text();
            if FOR_CUDA.contains(&pass) {
                assert_eq!(text, before, "{name}: {pass} is for CUDA devices, and this is a plan for the host");
            } else if ["fuse", "select", "schedule"].contains(&pass) {
                assert_eq!(text, before, "{name}: {pass} decides and rewrites nothing");
            } else if !["precision", "merge", "panels"].contains(&pass) {
                stages.push((pass.to_owned(), text.clone()));
            }
            before = text;
        };
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
    let mut request = request(&fixture("tiny_llama"));
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

/// Which values are of the half type, and which stay in `f32`: spelled-out norms, composites, masks, routing.
#[test]
fn half_types() {
    for model in ["tiny_bert", "tiny_llama"] {
        let mut request = request(&fixture(model));
        request.options.dtype = Some(DType::BF16);
        request.options.stop_after = Some("precision".to_owned());
        let mut converted = String::new();
        request.compile(&mut |_, module| converted = module.summary_text()).unwrap();
        check(model, "precision.bf16", &converted);
    }
}

/// Expressions merged, and weights in panels with what undoes them in front of their product.
#[test]
fn fused_and_laid_out_for_the_host() {
    for model in ["tiny_bert", "tiny_resnet"] {
        let request = request(&fixture(model));
        let mut selected = String::new();
        request.compile(&mut |_, module| selected = module.summary_text()).unwrap();
        check(model, "panels", &selected);
    }
}

/// Biases in the type that libraries add, channels last around convolutions, exchanges along the outermost dimension.
#[test]
fn rewritten_for_cuda_devices() {
    for (model, mesh) in [("tiny_bert", "tensor=2"), ("tiny_resnet", "data=2"), ("tiny_vit", "tensor=2")] {
        let mut request = request(&fixture(model));
        request.target = Target::from_json(include_str!("../fixtures/targets/h200x4.json")).unwrap();
        request.mesh = MeshChoice::Fixed(parse_mesh(mesh).unwrap());
        request.options.dtype = Some(DType::BF16);
        request.options.stop_after = Some("exchange".to_owned());
        let mut stages = Vec::new();
        request.compile(&mut |pass, module| stages.push((pass.to_owned(), module.summary_text()))).unwrap();
        let [.., (last, text)] = &stages[..] else { panic!("no pass was observed") };
        check(model, &format!("{last}.cuda"), text);
    }
}

fn fixture(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx").join(model)
}

/// The model of a folder, bound as its test data are.
fn request(folder: &Path) -> Request {
    let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
    let mut request = Request::new(&folder.join("model.onnx"), target);
    request.samples = TestData::read(&folder.join("test_data_set_0")).unwrap().inputs;
    request
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
