//! Writes the seeds of the other targets into the folder that `FUZZ_SEEDS` names, from the models below the folder that
//! `FUZZ_MODELS` names. A fuzz target itself, so that it is built with the others: run it with `-runs=0`.
#![no_main]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz::{forge, messages, workplace};
use libfuzzer_sys::fuzz_target;
use planfile::Target;
use planwright::compiler::Request;

/// Most bytes of a seed: mutations of longer ones rarely hit anything.
const SEED_BYTES: usize = 48 << 10;
/// One of so many models becomes a plan for GPUs too.
const GPU_SHARE: u32 = 8;

fuzz_target!(init: write_all(), |_data: &[u8]| {});

fn write_all() {
    let folder = |name: &str| PathBuf::from(std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set")));
    let seeds = folder("FUZZ_SEEDS");
    for target in ["import", "plan", "verify"] {
        fs::create_dir_all(seeds.join(target)).expect("a folder for seeds");
    }
    let mut written = 0;
    for models in std::env::split_paths(&folder("FUZZ_MODELS")) {
        let mut names: Vec<PathBuf> =
            fs::read_dir(models).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        names.sort();
        for (number, folder) in names.iter().enumerate() {
            written += usize::from(write(&seeds, folder, 1 + number as u32 % 2).is_some());
        }
    }
    assert!(written > 0, "no models below FUZZ_MODELS");
    println!("{written} models became seeds");
}

/// Seeds from one model; `None` where it is too long or does not compile for so many devices.
fn write(seeds: &Path, folder: &Path, devices: u32) -> Option<()> {
    let name = folder.file_name()?;
    let model = messages::small(&fs::read(folder.join("model.onnx")).ok()?)?;
    if model.len() <= SEED_BYTES {
        fs::write(seeds.join("import").join(name), &model).ok()?;
    }
    let target = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/targets/cpu.json"));
    let path = workplace::file("model.onnx", &model);
    let mut request = Request::new(&path, Target::from_json(target).ok()?);
    request.mesh = passes::settings::MeshChoice::Devices(devices);
    for dim in ["batch", "seq", "sequence", "past", "batch_size", "sequence_length"] {
        request.bindings.dims.insert(dim.to_owned(), 2);
        if request.compile(&mut |_, _| {}).is_err() {
            request.bindings.dims.remove(dim);
        }
    }
    plans(seeds, name, &request)?;
    // For GPUs as well, a part of them: machine code takes its time.
    if name.to_string_lossy().bytes().map(u32::from).sum::<u32>() % GPU_SHARE == 0 {
        let target = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/targets/h200x4.json"));
        request.target = Target::from_json(target).ok()?;
        let mut name = name.to_owned();
        name.push(".gpu");
        plans(seeds, &name, &request)?;
    }
    Some(())
}

/// Seeds that are the plan of a model.
fn plans(seeds: &Path, name: &OsStr, request: &Request) -> Option<()> {
    let compiled = request.compile(&mut |_, _| {}).ok()??;
    let out = workplace::folder().join("seed.plan");
    compiled.write(&out, |_| {}).ok()?;
    let mut parts = forge::sections(&fs::read(&out).ok()?)?;
    let plan = forge::assemble(&parts);
    if plan.len() <= SEED_BYTES {
        fs::write(seeds.join("plan").join(name), &plan).ok()?;
    }
    // The target `verify` brings weights of its own.
    parts[forge::WEIGHTS].clear();
    let plan = forge::assemble(&parts);
    if plan.len() <= SEED_BYTES {
        fs::write(seeds.join("verify").join(name), &plan).ok()?;
    }
    Some(())
}
