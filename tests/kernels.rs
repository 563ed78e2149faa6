//! Every sample of a kernel becomes machine code for three generations of GPUs, without one; code and launches verify.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "gpu/sample_plan.rs"]
mod sample_plan;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cuda::nvrtc::{self, Compiled, Nvrtc};
use kernels::samples::samples;
use planfile::replace::Replacement;
use planfile::verify;

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

/// What was compiled before for one architecture, since compiling is nearly all that these tests take. It depends on
/// nothing but what names a file here, so that a new source, flag or NVRTC compiles again.
struct Kept {
    folder: PathBuf,
    /// All that is compiled with, but for the source.
    with: String,
}

impl Kept {
    fn new(nvrtc: &Nvrtc, architecture: &str) -> Self {
        // A version has more than one build.
        let bytes = fs::metadata(nvrtc.path()).map_or(0, |file| file.len());
        let with = format!("{} of {bytes} bytes, {}, {architecture}, with reports", nvrtc.version(), nvrtc::FLAGS);
        Self { folder: Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels").join(architecture), with }
    }

    fn path(&self, (symbol, source): (&str, &str)) -> PathBuf {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.with, symbol, source] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        self.folder.join(hasher.finalize().to_hex().as_str())
    }

    /// The log, a zero byte, and the cubin.
    fn read(&self, source: (&str, &str)) -> Option<Compiled> {
        let bytes = fs::read(self.path(source)).ok()?;
        let end = bytes.iter().position(|&byte| byte == 0)?;
        let log = String::from_utf8(bytes[..end].to_vec()).ok()?;
        Some(Compiled { log, cubin: bytes[end + 1..].to_vec() })
    }

    fn write(&self, source: (&str, &str), compiled: &Compiled) {
        let mut file = Replacement::new(&self.path(source), ".kernel-").unwrap();
        file.file().write_all(&[compiled.log.as_bytes(), b"\0", &compiled.cubin].concat()).unwrap();
        file.finish().unwrap();
    }

    /// Compiles what is not kept, and keeps nothing else.
    fn compile(&self, nvrtc: &Nvrtc, sources: &[(&str, &str)], architecture: &str) -> Vec<Compiled> {
        fs::create_dir_all(&self.folder).unwrap();
        let mut compiled: Vec<Option<Compiled>> = sources.iter().map(|&source| self.read(source)).collect();
        let missing: Vec<usize> = (0..sources.len()).filter(|&index| compiled[index].is_none()).collect();
        let options = nvrtc::Options { architecture, report: true };
        let list: Vec<(&str, &str)> = missing.iter().map(|&index| sources[index]).collect();
        let made = nvrtc.compile_with(&list, options).unwrap_or_else(|error| panic!("{error}"));
        for (index, made) in missing.into_iter().zip(made) {
            self.write(sources[index], &made);
            compiled[index] = Some(made);
        }
        let used: BTreeSet<PathBuf> = sources.iter().map(|&source| self.path(source)).collect();
        for entry in fs::read_dir(&self.folder).unwrap() {
            let path = entry.unwrap().path();
            if !used.contains(&path) {
                fs::remove_file(path).unwrap();
            }
        }
        compiled.into_iter().map(Option::unwrap).collect()
    }
}

fn check(architecture: &str) {
    let nvrtc =
        Nvrtc::load().unwrap_or_else(|error| panic!("{error}; `python3 fixtures/fetch.py` brings the compiler"));
    let kept = Kept::new(&nvrtc, architecture);
    let mut failures = Vec::new();
    let compile = |sources: &[(&str, &str)]| {
        assert!(sources.len() > 100, "{} kernels", sources.len());
        let compiled = kept.compile(&nvrtc, sources, architecture);
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
fn what_is_compiled_with_anything_else_is_compiled_again() {
    let folder = tempfile::tempdir().unwrap();
    let kept = |with: &str| Kept { folder: folder.path().to_owned(), with: with.to_owned() };
    let compiled = Compiled { log: "Used 8 registers".to_owned(), cubin: b"\x7fELF\0".to_vec() };
    kept("13.0").write(("f", "void f() {}"), &compiled);
    assert_eq!(kept("13.0").read(("f", "void f() {}")), Some(compiled));
    assert_eq!(kept("13.0").read(("f", "void f() { }")), None);
    assert_eq!(kept("13.0").read(("g", "void f() {}")), None);
    assert_eq!(kept("13.1").read(("f", "void f() {}")), None);
}

#[test]
fn spills_are_read_from_a_report() {
    let log = "ptxas info    : Compiling entry function 'f'\n    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill \
               loads\nptxas info    : Used 255 registers";
    assert_eq!(spilled(log), 32);
    assert_eq!(spilled("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), 0);
}
