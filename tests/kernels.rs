//! Every sample of a kernel becomes machine code for three generations of GPUs, without one.

#![expect(clippy::panic, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use kernels::cuda::{Options, Selected, select};
use kernels::samples::samples;
use runtime::cuda::nvrtc;

/// Kernels that keep some registers in memory, by symbol, and why that is fine.
const SPILLS: &[(&str, &str)] = &[];

/// Ampere, Hopper and Blackwell.
const ARCHITECTURES: &[&str] = &["sm_80", "sm_90a", "sm_100a"];

/// Sources of all samples, without those that libraries execute: the name of the first sample by symbol and source.
fn sources(architecture: &str) -> BTreeMap<(String, String), String> {
    let options = Options { architecture: architecture.to_owned(), allow_tf32: false };
    let mut sources = BTreeMap::new();
    for (name, spec) in samples() {
        match select(&spec, &options).unwrap_or_else(|why| panic!("{name}: {why}")) {
            (_, Selected::Launch(launch)) => {
                sources.entry((launch.symbol, launch.source)).or_insert(name);
            }
            (_, Selected::Library { .. }) => {}
        }
    }
    sources
}

/// Bytes that a report of ptxas says are spilled, stores and loads together.
fn spilled(log: &str) -> u64 {
    let lines = log.lines().filter(|line| line.contains("bytes spill"));
    let numbers = lines.flat_map(|line| line.split(',').filter(|part| part.contains("spill")));
    numbers.filter_map(|part| part.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

fn check(architecture: &str) {
    let sources = sources(architecture);
    assert!(sources.len() > 100, "{} kernels", sources.len());
    let list: Vec<(&str, &str)> = sources.keys().map(|(symbol, source)| (symbol.as_str(), source.as_str())).collect();
    let options = nvrtc::Options { architecture, report: true };
    let nvrtc = nvrtc::Nvrtc::load();
    let compiled = nvrtc
        .and_then(|nvrtc| nvrtc.compile_with(&list, options))
        .unwrap_or_else(|error| panic!("{error}; `python3 fixtures/fetch.py` brings the compiler"));
    let mut failures = Vec::new();
    for (((symbol, _), name), compiled) in sources.iter().zip(&compiled) {
        assert!(compiled.log.contains("registers"), "{name}: no report of registers: {}", compiled.log);
        let allowed = SPILLS.iter().any(|(known, _)| known == symbol);
        let bytes = spilled(&compiled.log);
        if bytes > 0 && !allowed {
            failures.push(format!("{symbol} ({name}) spills {bytes} bytes"));
        }
    }
    assert!(failures.is_empty(), "{architecture}: {failures:#?}");
}

#[test]
fn kernels_compile_for_ampere() {
    check(ARCHITECTURES[0]);
}

#[test]
fn kernels_compile_for_hopper() {
    check(ARCHITECTURES[1]);
}

#[test]
fn kernels_compile_for_blackwell() {
    check(ARCHITECTURES[2]);
}

#[test]
fn spills_are_read_from_a_report() {
    let log = "ptxas info    : Compiling entry function 'f'\n    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill \
               loads\nptxas info    : Used 255 registers";
    assert_eq!(spilled(log), 32);
    assert_eq!(spilled("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), 0);
}
