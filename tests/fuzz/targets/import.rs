//! Bytes as a model: loaded, imported and simplified, by the same call as the command `compile` makes.
#![no_main]

use fuzz::{mutation, workplace};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use onnx::OnnxError;
use onnx::load::{LoadOptions, load};
use planfile::Target;
use planwright::compiler::{CompileError, Request};

/// Sizes that unnamed and unbound dimensions get.
const SIZE: u64 = 2;

fuzz_target!(|data: &[u8]| {
    let path = workplace::file("model.onnx", data);
    // Nothing but what lies beside the model is within its reach.
    if let Ok(model) = load(&path, &LoadOptions::default()) {
        for file in &model.files {
            let file = workplace::folder().join(&file.path).canonicalize().expect("the file of a model is there");
            assert!(file.starts_with(workplace::folder()), "{} is outside", file.display());
        }
    }
    let target = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/targets/cpu.json"));
    let mut request = Request::new(&path, Target::from_json(target).expect("the fixture is a target"));
    request.options.stop_after = Some("simplify".to_owned());
    let compiled = request.compile(&mut |_, _| {});
    if let Err(CompileError::Model(OnnxError::UnboundDims(unbound))) = compiled {
        for dim in unbound {
            if let Some(name) = dim.name {
                request.bindings.dims.insert(name, SIZE);
            }
        }
        let compiled = request.compile(&mut |_, _| {});
        drop(compiled.map_err(|error| error.to_string()));
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = mutation::Random(u64::from(seed));
    if random.below(8) == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let mut bytes = data[..size].to_vec();
    for _ in 0..=random.below(3) {
        mutation::mutate_message(&mut bytes, &mut random, 0);
    }
    mutation::hand_back(&mut data[..max_size], size, &bytes)
});
