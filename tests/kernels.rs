//! Every sample of a kernel becomes machine code for three generations of GPUs, without one; code and launches verify.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "gpu/sample_plan.rs"]
mod sample_plan;

use kernels::samples::samples;
use planfile::verify;
use runtime::cuda::nvrtc;

/// Kernels that keep some registers in memory, by symbol, and why that is fine.
const SPILLS: &[(&str, &str)] = &[];

/// Ampere, Hopper and Blackwell.
const ARCHITECTURES: &[&str] = &["sm_80", "sm_90a", "sm_100a"];

/// Bytes that a report of ptxas says are spilled, stores and loads together.
fn spilled(log: &str) -> u64 {
    let lines = log.lines().filter(|line| line.contains("bytes spill"));
    let numbers = lines.flat_map(|line| line.split(',').filter(|part| part.contains("spill")));
    numbers.filter_map(|part| part.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

fn check(architecture: &str) {
    let options = nvrtc::Options { architecture, report: true };
    let mut failures = Vec::new();
    let compile = |sources: &[(&str, &str)]| {
        assert!(sources.len() > 100, "{} kernels", sources.len());
        let compiled = nvrtc::Nvrtc::load()
            .and_then(|nvrtc| nvrtc.compile_with(sources, options))
            .unwrap_or_else(|error| panic!("{error}; `python3 fixtures/fetch.py` brings the compiler"));
        for ((symbol, _), compiled) in sources.iter().zip(&compiled) {
            assert!(compiled.log.contains("registers"), "{symbol}: no report of registers: {}", compiled.log);
            let allowed = SPILLS.iter().any(|(known, _)| known == symbol);
            let bytes = spilled(&compiled.log);
            if bytes > 0 && !allowed {
                failures.push(format!("{symbol} spills {bytes} bytes"));
            }
        }
        compiled.into_iter().map(|compiled| compiled.cubin).collect()
    };
    let plan = sample_plan::plan(&samples(), architecture, false, compile);
    assert!(failures.is_empty(), "{architecture}: {failures:#?}");
    assert_eq!(verify(&plan), Ok(()), "{architecture}");
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
