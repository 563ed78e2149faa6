//! Bytes as a plan file: the container and the decoder of every section, whatever `verify` would say; then the text dump
//! and the summary of what was decoded.
#![no_main]

use fuzz::{forge, mutation, workplace};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use planfile::plan::Plan;
use planfile::{PlanFile, codec};

fuzz_target!(|data: &[u8]| {
    // As it is, and as if its hashes were right.
    let _ = PlanFile::open(&workplace::file("model.plan", data));
    let mut hashed = data.to_vec();
    forge::rehash(&mut hashed);
    if let Ok(file) = PlanFile::open(&workplace::file("model.plan", &hashed)) {
        let bytes = file.plan().manifest.image_bytes;
        let _ = file.read_weights(bytes / 2, &mut [0; 64]);
        file.verify_all(|_| {}).expect("the hashes were made to match");
    }
    let Some([manifest, programs, kernels, code, explanations, _]) = forge::sections(data) else { return };
    let decoded = (
        codec::decode(&manifest),
        codec::decode(&programs),
        codec::decode(&kernels),
        codec::decode(&code),
        codec::decode(&explanations),
    );
    if let (Ok(manifest), Ok(programs), Ok(kernels), Ok(code), Ok(explanations)) = decoded {
        let plan = Plan { manifest, programs, kernels, code, explanations };
        let _ = planfile::text::text(&plan);
        let _ = planfile::summary::summary(&plan);
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = mutation::Random(u64::from(seed));
    let parts = forge::sections(&data[..size]).filter(|_| random.below(6) > 0);
    let Some(mut parts) = parts else { return libfuzzer_sys::fuzzer_mutate(data, size, max_size) };
    for _ in 0..=random.below(3) {
        let chosen = random.below(forge::SECTIONS);
        mutation::mutate_section(&mut parts[chosen], &mut random);
    }
    mutation::hand_back(&mut data[..max_size], size, &forge::assemble(&parts))
});
