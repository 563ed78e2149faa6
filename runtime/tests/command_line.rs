//! The command line `plan`: what it prints, what it leaves behind, and how it ends.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};

use cuda::LibraryName;
use planfile::fingerprint::{FileRange, Fingerprint, digest};
use planfile::plan::*;
use planfile::{DType, Expr, Op, PlanError, Recipe, Source, SourceFile, Spec, Tensor, TensorType, Unary, write_plan};
use runtime::npz::{read_npz, write_npz};
use serde_json::Value;
use tempfile::TempDir;

/// `y = -x` on two ranks, each with a column of `x`, a 2 × 2 matrix.
fn negation() -> Plan {
    let (whole, part) = (TensorType::new(DType::F32, &[2, 2]), TensorType::new(DType::F32, &[2, 1]));
    let place = |offset| Place { ty: part.clone(), at: Argument::Arena { offset } };
    let piece = |global| vec![PlanPiece { global, local: 0, len: 1 }];
    let splits = vec![SplitDim { dim: 1, pieces: vec![piece(0), piece(1)] }];
    let negate = Op::Pointwise { expr: Expr::operand(0).unary(Unary::Neg), dims: part.dims.clone() };
    let port = |name: &str| PlanPort { name: name.to_owned(), ty: whole.clone() };
    let launch = Action::Launch {
        kernel: 0,
        operands: vec![place(0)],
        results: vec![place(256)],
        scalars: vec![],
        launch: None,
    };
    Plan {
        manifest: Manifest {
            producer: "test".to_owned(),
            model: "negation".to_owned(),
            files: vec![],
            fingerprint: Default::default(),
            mesh: vec![PlanAxis { name: "tensor".to_owned(), size: 2 }],
            ranks: 2,
            target: TargetRef { name: "cpu".to_owned(), architecture: "cpu".to_owned() },
            entries: vec![PlanEntry {
                name: "main".to_owned(),
                inputs: vec![port("x")],
                outputs: vec![port("y")],
                frozen: vec![],
                programs: vec![0],
                predicted_ns: 1500,
            }],
            weights: vec![],
            placed: vec![],
            weight_arena_bytes: vec![0, 0],
            image_bytes: 0,
            states: vec![],
            links: vec![],
        },
        programs: vec![Program {
            entry: 0,
            stage: 0,
            ranks: vec![0, 1],
            inputs: vec![Binding { port: 0, place: place(0), splits: splits.clone() }],
            outputs: vec![Binding { port: 0, place: place(256), splits }],
            steps: vec![Step {
                action: launch,
                stream: 0,
                waits: vec![],
                origin: vec![0],
                cost: StepCost { predicted_ns: 1500, ..Default::default() },
            }],
            arena_bytes: 512,
            peer_arena_bytes: 0,
            streams: 1,
        }],
        kernels: vec![Kernel {
            name: "negate".to_owned(),
            spec: Spec::of(negate, vec![part]).unwrap(),
            implementation: Implementation::Reference,
        }],
        code: vec![],
        explanations: Explanations { names: vec!["/Neg".to_owned()], ..Explanations::default() },
    }
}

/// A folder with `x.plan` in it.
struct Desk(TempDir);

struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Desk {
    fn new() -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        write_plan::<PlanError>(&desk.path("x.plan"), &negation(), |_| Ok(())).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn plan(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plan"));
        // As on a machine without CUDA: the file that a variable names is the only one tried.
        for library in LibraryName::ALL {
            command.env(library.variable(), self.path("absent.so"));
        }
        let Output { status, stdout, stderr } = command.args(arguments).current_dir(self.0.path()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (out, err) = (text(stdout), text(stderr));
        let code = status.code().unwrap_or_else(|| panic!("{arguments:?} was killed: {err}"));
        assert!(!err.contains("panicked"), "{err}");
        Ended { code, out, err }
    }

    fn save(&self, name: &str, arrays: &[(&str, Tensor)]) {
        write_npz(&self.path(name), arrays.iter().map(|(name, tensor)| (*name, tensor))).unwrap();
    }

    /// `data/input_0.pb` and `data/output_0.pb` with these elements.
    fn test_data(&self, input: [f32; 4], output: [f32; 4]) {
        fs::create_dir_all(self.path("data")).unwrap();
        for (file, elements) in [("input_0.pb", input), ("output_0.pb", output)] {
            // dims 2 and 2, data type 1, 16 raw bytes.
            let mut bytes = vec![0x08, 2, 0x08, 2, 0x10, 1, 0x4a, 16];
            bytes.extend(elements.iter().flat_map(|element| element.to_le_bytes()));
            fs::write(self.path("data").join(file), bytes).unwrap();
        }
    }
}

impl Ended {
    /// Ends with `code`, and says each of `words` in its message.
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in\n{}", self.err);
        }
    }

    fn succeeds(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        assert_eq!(self.err, "");
        self.out
    }
}

fn matrix(elements: [f32; 4]) -> Tensor {
    Tensor::from_elements(&[2, 2], &elements).unwrap()
}

#[test]
fn frozen_inputs_are_shown_used_and_held() {
    let desk = Desk::new();
    let tensor = |elements: &[f32; 4]| Tensor::from_elements(&[2, 2], elements).unwrap();
    let mut plan = negation();
    let value = tensor(&[1.0, 2.0, 3.0, 4.0]);
    plan.manifest.entries[0].frozen =
        vec![FrozenInput { input: "x".to_owned(), value, node: "/Reshape".to_owned(), nodes: 3 }];
    write_plan::<PlanError>(&desk.path("x.plan"), &plan, |_| Ok(())).unwrap();
    let line = "x: f32[2, 2] = [1, 2, 3, 4], which node `/Reshape` and 2 more need";
    let inspected = desk.plan(&["inspect", "x.plan"]).succeeds();
    assert!(inspected.contains("frozen inputs") && inspected.contains(line), "{inspected}");
    let report: Value = serde_json::from_str(&desk.plan(&["inspect", "x.plan", "--json"]).succeeds()).unwrap();
    let frozen = &report["entries"][0]["frozen"][0];
    assert_eq!(
        (&frozen["input"], &frozen["value"], &frozen["nodes"]),
        (&"x".into(), &"[1, 2, 3, 4]".into(), &3.into())
    );
    // Left out with all others, left out of an archive, given as it is, and given as another.
    let ran = desk.plan(&["run", "x.plan"]).succeeds();
    assert!(ran.contains("random inputs but for one that is frozen") && ran.contains(line), "{ran}");
    desk.save("none.npz", &[]);
    let ran = desk.plan(&["run", "x.plan", "--inputs", "none.npz", "--outputs", "y.npz"]).succeeds();
    assert!(ran.contains("npz inputs but for one that is frozen") && ran.contains(line), "{ran}");
    assert_eq!(read_npz(&desk.path("y.npz")).unwrap()["y"], tensor(&[-1.0, -2.0, -3.0, -4.0]));
    desk.save("same.npz", &[("x", tensor(&[1.0, 2.0, 3.0, 4.0]))]);
    let ran = desk.plan(&["run", "x.plan", "--inputs", "same.npz"]).succeeds();
    assert!(!ran.contains("frozen"), "{ran}");
    let timed = desk.plan(&["bench", "x.plan", "--runs", "1", "--inputs", "none.npz"]).succeeds();
    assert!(timed.contains(&format!("\nfrozen {line}\n")), "{timed}");
    let timed = desk.plan(&["bench", "x.plan", "--runs", "1", "--json"]).succeeds();
    let timed: Value = serde_json::from_str(&timed).unwrap();
    assert_eq!(timed["frozen"][0]["input"], "x");
    let timed = desk.plan(&["bench", "x.plan", "--runs", "1", "--inputs", "same.npz"]).succeeds();
    assert!(!timed.contains("frozen"), "{timed}");
    desk.save("other.npz", &[("x", tensor(&[1.0, 2.0, 3.0, 5.0]))]);
    let ended = desk.plan(&["run", "x.plan", "--inputs", "other.npz"]);
    ended.fails(3, &["`x` is frozen at [1, 2, 3, 4]", "`/Reshape`", "given is [1, 2, 3, 5]", "--like"]);
}

#[test]
fn archives_go_in_and_out() {
    let desk = Desk::new();
    desk.save("in.npz", &[("x", matrix([1.0, 2.0, 3.0, 4.0]))]);
    let out = desk.plan(&["run", "x.plan", "--inputs", "in.npz", "--outputs", "out.npz"]).succeeds();
    assert!(out.lines().any(|line| line.contains("f32[2, 2]") && line.contains("-4.0")), "{out}");
    let expected = BTreeMap::from([("y".to_owned(), matrix([-1.0, -2.0, -3.0, -4.0]))]);
    assert_eq!(read_npz(&desk.path("out.npz")).unwrap(), expected);
}

#[test]
fn test_data_is_compared() {
    let desk = Desk::new();
    let run = |flags: &[&str]| desk.plan(&[&["run", "x.plan", "--test-data", "data"], flags].concat());
    desk.test_data([1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]);
    assert!(run(&[]).succeeds().contains("ok"));
    desk.test_data([1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.5]);
    let beyond = run(&[]);
    assert_eq!(beyond.code, 1, "{}", beyond.err);
    assert!(beyond.out.contains("element 3: -4 for -4.5"), "{}", beyond.out);
    run(&["--atol", "0.5"]).succeeds();
    let report: Value = serde_json::from_str(&run(&["--json", "--rtol", "0.2"]).succeeds()).unwrap();
    assert_eq!(report["outputs"][0]["comparison"]["max_error"], 0.5);
    run(&["--rtol", "-1"]).fails(2, &["--rtol"]);
    run(&["--rtol", "nan"]).fails(2, &["from 0 up"]);
}

#[test]
fn benchmarks_count_runs_and_name_steps() {
    let desk = Desk::new();
    let out = desk.plan(&["bench", "x.plan", "--runs", "4", "--threads", "2", "--steps"]).succeeds();
    assert!(out.contains("of 4 runs") && out.contains("2 virtual devices, 2 threads each"), "{out}");
    assert!(out.lines().any(|line| line.contains("pointwise f32[2, 1]") && line.contains("/Neg")), "{out}");
    let flags = ["bench", "x.plan", "--runs", "1", "--warm-up", "0", "--steps", "--json"];
    let report: Value = serde_json::from_str(&desk.plan(&flags).succeeds()).unwrap();
    assert_eq!((&report["runs"], &report["steps"][0]["step"]), (&1.into(), &0.into()));
    assert!(report["median_seconds"].as_f64().unwrap() > 0.0);
    desk.plan(&["bench", "x.plan", "--runs", "0"]).fails(2, &["--runs"]);
    desk.plan(&["bench", "x.plan", "--entry", "other"]).fails(3, &["`other`", "`main`"]);
}

#[test]
fn random_inputs_are_the_same_in_every_run() {
    let desk = Desk::new();
    let run = || {
        desk.plan(&["run", "x.plan", "--outputs", "y.npz"]).succeeds();
        fs::read(desk.path("y.npz")).unwrap()
    };
    assert!(run() == run());
}

#[test]
fn inputs_that_do_not_fit_end_with_3() {
    let desk = Desk::new();
    let run = |arrays: &[(&str, Tensor)]| {
        desk.save("in.npz", arrays);
        desk.plan(&["run", "x.plan", "--inputs", "in.npz"])
    };
    let ids = Tensor::from_elements(&[2, 2], &[0i64; 4]).unwrap();
    run(&[("x", ids)]).fails(3, &["`x` must be f32[2, 2], given is i64[2, 2]"]);
    let flat = Tensor::from_elements(&[4], &[0f32; 4]).unwrap();
    run(&[("x", flat)]).fails(3, &["`x` must be f32[2, 2], given is f32[4]"]);
    run(&[]).fails(3, &["`x` (f32[2, 2]) is missing"]);
    run(&[("x", matrix([0.0; 4])), ("z", matrix([0.0; 4]))]).fails(3, &["no input `z`", "`x` (f32[2, 2])"]);
    fs::write(desk.path("in.npz"), "text").unwrap();
    desk.plan(&["run", "x.plan", "--inputs", "in.npz"]).fails(3, &["in.npz is no .npz archive"]);
    desk.plan(&["run", "x.plan", "--entry", "decode"]).fails(3, &["no entry `decode`", "`main`"]);
}

#[test]
fn plans_are_inspected_and_verified() {
    let desk = Desk::new();
    let out = desk.plan(&["inspect", "x.plan"]).succeeds();
    for words in [["negation for cpu", "tensor=2"], ["x: f32[2, 2]", ""], ["0-1", "launch"], ["0-1", "512 B"]] {
        assert!(out.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in\n{out}");
    }
    let summary: Value = serde_json::from_str(&desk.plan(&["inspect", "x.plan", "--json"]).succeeds()).unwrap();
    assert_eq!(summary["devices"][1]["activation_bytes"], 512);
    assert!(desk.plan(&["inspect", "x.plan", "--text"]).succeeds().contains("/Neg"));
    let mut told = negation();
    told.explanations.sharding = vec!["data=3 splits nothing: three are too many".to_owned()];
    write_plan::<PlanError>(&desk.path("told.plan"), &told, |_| Ok(())).unwrap();
    let out = desk.plan(&["inspect", "told.plan"]).succeeds();
    assert!(out.ends_with("\ndata=3 splits nothing: three are too many\n"), "{out}");
    let summary: Value = serde_json::from_str(&desk.plan(&["inspect", "told.plan", "--json"]).succeeds()).unwrap();
    assert_eq!(summary["sharding"][0], told.explanations.sharding[0]);
    let out = desk.plan(&["verify", "x.plan"]).succeeds();
    assert!(out.contains("x.plan is sound") && out.contains("taken on trust:\n  predicted times"), "{out}");
    let verdict: Value = serde_json::from_str(&desk.plan(&["verify", "x.plan", "--json"]).succeeds()).unwrap();
    assert_eq!(verdict["trusted"], serde_json::json!([{ "what": "predictions" }]));
}

#[test]
fn damaged_plans_are_refused() {
    let desk = Desk::new();
    let whole = fs::read(desk.path("x.plan")).unwrap();
    let mut flipped = whole.clone();
    flipped[5000] ^= 1;
    let mut newer = whole.clone();
    newer[8] = 200;
    let broken = [
        (flipped, "do not match their hash"),
        (newer, "format version 200"),
        (whole[..whole.len() - 1].to_vec(), "is cut"),
        (b"no plan".to_vec(), "not a plan"),
    ];
    for (bytes, words) in broken {
        fs::write(desk.path("x.plan"), bytes).unwrap();
        desk.plan(&["run", "x.plan"]).fails(3, &[words]);
        desk.plan(&["verify", "x.plan"]).fails(1, &[words]);
        let verdict = desk.plan(&["verify", "x.plan", "--json"]);
        let json: Value = serde_json::from_str(&verdict.out).unwrap();
        assert_eq!((verdict.code, &json["sound"]), (1, &Value::Bool(false)));
    }
}

#[test]
fn plans_for_gpus_need_a_driver_or_virtual_devices() {
    let desk = Desk::new();
    let mut plan = negation();
    plan.manifest.target.architecture = "sm_90a".to_owned();
    // No code is needed where bytes only move.
    plan.kernels.clear();
    let program = &mut plan.programs[0];
    let (from, to) = (program.inputs[0].place.clone(), program.outputs[0].place.clone());
    program.steps[0].action = Action::Copy { from, to };
    write_plan::<PlanError>(&desk.path("gpu.plan"), &plan, |_| Ok(())).unwrap();
    let words = ["the CUDA driver was not found", "absent.so", "PLANWRIGHT_CUDA_DRIVER", "--devices cpu"];
    for command in ["run", "bench", "check"] {
        desk.plan(&[command, "gpu.plan"]).fails(5, &words);
    }
    desk.plan(&["run", "gpu.plan", "--devices", "cuda"]).fails(5, &words);
    desk.plan(&["run", "gpu.plan", "--devices", "cuda:1,0"]).fails(5, &words);
    desk.plan(&["run", "gpu.plan", "--devices", "cuda:0,0"]).fails(2, &["GPU 0 is given twice"]);
    desk.plan(&["run", "gpu.plan", "--devices", "cuda:1,1"]).fails(2, &["GPU 1 is given twice"]);
    desk.plan(&["run", "gpu.plan", "--devices", "cuda:0,x"]).fails(2, &["`x` is no number of a GPU"]);
    desk.plan(&["run", "gpu.plan", "--devices", "cuda:0"]).fails(2, &["2 ranks", "1 GPU is given"]);
    desk.plan(&["run", "gpu.plan", "--devices", "tpu"]).fails(2, &["`tpu` is none of `cpu`, `cuda`"]);
    assert!(desk.plan(&["run", "gpu.plan", "--devices", "cpu"]).succeeds().contains("on virtual devices"));
}

/// There is nothing to check where the specification itself is executed.
#[test]
fn plans_on_the_cpu_are_not_checked_against_it() {
    let desk = Desk::new();
    desk.plan(&["check", "x.plan"]).fails(2, &["compares GPUs with the CPU", "--target", "--test-data"]);
    desk.plan(&["check", "x.plan", "--devices", "cpu"]).fails(2, &["compares GPUs with the CPU"]);
    desk.plan(&["check", "none.plan"]).fails(4, &["none.plan"]);
}

#[test]
fn the_doctor_names_what_is_missing() {
    let desk = Desk::new();
    let libraries = LibraryName::ALL;
    let ended = desk.plan(&["doctor"]);
    assert_eq!((ended.code, ended.err.as_str()), (5, ""), "{}", ended.out);
    for library in libraries {
        let said: Vec<&str> = ended.out.lines().filter(|line| line.contains(library.advice())).collect();
        let [line] = said[..] else { panic!("{library}: {said:?} in\n{}", ended.out) };
        assert!(line.starts_with(&format!("- {library} was not found")) && line.contains(library.variable()), "{line}");
        let row = ended.out.lines().find(|line| line.contains(&library.to_string()) && line.contains("missing"));
        assert!(row.is_some(), "{library} has no row in\n{}", ended.out);
    }
    assert!(!ended.out.contains("nothing is missing"), "{}", ended.out);
    let ended = desk.plan(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!((ended.code, &report["gpus"]), (5, &Value::Array(vec![])));
    let findings = report["libraries"].as_array().unwrap();
    assert_eq!(findings.len(), libraries.len());
    for (finding, library) in findings.iter().zip(libraries) {
        assert_eq!(finding["library"], library.to_string());
        assert!(finding["path"].is_null() && finding["version"].is_null(), "{finding}");
        assert!(finding["missing"].as_str().unwrap().contains("absent.so"), "{finding}");
    }
    assert!(report["trouble"].as_str().unwrap().contains("the CUDA driver"), "{report}");
}

#[test]
fn files_that_are_not_there_end_with_4_and_wrong_flags_with_2() {
    let desk = Desk::new();
    desk.plan(&["run", "none.plan"]).fails(4, &["none.plan"]);
    desk.plan(&["verify", "."]).fails(4, &["not a regular file"]);
    desk.plan(&["run", "x.plan", "--inputs", "none.npz"]).fails(4, &["none.npz"]);
    desk.plan(&["run", "x.plan", "--outputs", "none/y.npz"]).fails(4, &["none/y.npz", "there is no folder none"]);
    desk.plan(&["run", "x.plan", "--outputs", "/dev/full"]).fails(4, &["/dev/full"]);
    desk.plan(&["run", "x.plan", "--inputs", "a.npz", "--test-data", "data"]).fails(2, &["--test-data"]);
    desk.plan(&["inspect", "x.plan", "--json", "--text"]).fails(2, &["--text"]);
    desk.plan(&["fly"]).fails(2, &["fly"]);
    assert!(desk.plan(&["--help"]).succeeds().contains("Exit codes"));
}

#[test]
fn pipes_and_sockets_are_not_waited_for() {
    let desk = Desk::new();
    with_weight(&desk);
    let folders = ["pipes", "sockets"];
    let files = ["x.plan", "in.npz", "input_0.pb", "w.bin"];
    folders.iter().for_each(|folder| fs::create_dir(desk.path(folder)).unwrap());
    for file in files {
        assert!(Command::new("mkfifo").arg(desk.path("pipes").join(file)).status().unwrap().success());
    }
    let _listening = files.map(|file| UnixListener::bind(desk.path("sockets").join(file)).unwrap());
    for folder in folders {
        let words = ["not a regular file"];
        let [plan, inputs] = ["x.plan", "in.npz"].map(|file| format!("{folder}/{file}"));
        for command in ["run", "bench", "check", "inspect", "verify"] {
            desk.plan(&[command, &plan]).fails(4, &words);
        }
        desk.plan(&["diff", "x.plan", &plan]).fails(4, &words);
        for command in ["run", "bench"] {
            desk.plan(&[command, "x.plan", "--inputs", &inputs]).fails(4, &words);
        }
        desk.plan(&["run", "x.plan", "--test-data", folder]).fails(4, &words);
        desk.plan(&["run", "x.plan", "--outputs", &inputs]).fails(4, &words);
        desk.plan(&["refit", "w.plan", "--weights", folder, "-o", "new.plan"]).fails(4, &words);
        desk.plan(&["refit", "w.plan", "--weights", ".", "-o", &plan]).fails(4, &words);
        // A library that a variable names.
        let mut command = Command::new(env!("CARGO_BIN_EXE_plan"));
        command.env("PLANWRIGHT_CUDA_DRIVER", desk.path(&inputs)).args(["run", "x.plan", "--devices", "cuda"]);
        let output = command.current_dir(desk.0.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(5));
        assert!(String::from_utf8(output.stderr).unwrap().contains("not a regular file"));
    }
}

#[test]
fn threads_are_bounded() {
    let desk = Desk::new();
    for command in ["run", "bench"] {
        desk.plan(&[command, "x.plan", "--threads", "100000"]).fails(2, &["--threads", "1 to 4096"]);
        // On two devices.
        desk.plan(&[command, "x.plan", "--threads", "4096"]).fails(2, &["2 virtual devices", "4096 threads each"]);
        desk.plan(&[command, "x.plan", "--threads", "0"]).fails(2, &["--threads"]);
    }
    desk.plan(&["run", "x.plan", "--threads", "64"]).succeeds();
}

/// Runs `plan` below a shell that was told this first: how it ended, and what it said.
fn below(desk: &Desk, before: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let script = format!("{before} && exec \"$0\" \"$@\"");
    let mut command = Command::new("bash");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_plan")]).args(arguments).current_dir(desk.0.path());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn outputs_have_the_permissions_that_the_user_gives_new_files() {
    let desk = Desk::new();
    let run = ["run", "x.plan", "--outputs", "y.npz"];
    let mode = || fs::metadata(desk.path("y.npz")).unwrap().permissions().mode() & 0o777;
    // Once it is there, it keeps what it has.
    for mask in ["027", "022"] {
        assert_eq!(below(&desk, &format!("umask {mask}"), &run), (Some(0), String::new()));
        assert_eq!(mode(), 0o640, "{mask}");
    }
}

#[test]
fn a_limit_on_the_size_of_files_leaves_what_was_there() {
    let desk = Desk::new();
    with_weight(&desk);
    fs::write(desk.path("y.npz"), "old").unwrap();
    fs::write(desk.path("new.plan"), "old").unwrap();
    let files = || fs::read_dir(desk.0.path()).unwrap().count();
    let before = files();
    let run: &[&str] = &["run", "x.plan", "--outputs", "y.npz"];
    let refit: &[&str] = &["refit", "w.plan", "--weights", ".", "-o", "new.plan"];
    for arguments in [run, refit] {
        let (code, said) = below(&desk, "ulimit -f 0", arguments);
        assert_eq!(code, Some(4), "{said}");
        assert!(said.contains("File too large"), "{said}");
    }
    assert_eq!(files(), before);
    for name in ["y.npz", "new.plan"] {
        assert_eq!(fs::read(desk.path(name)).unwrap(), b"old");
    }
}

#[test]
fn a_root_for_external_data_of_none_is_said() {
    let desk = Desk::new();
    with_weight(&desk);
    let refit =
        |root: &str| desk.plan(&["refit", "w.plan", "--weights", ".", "-o", "new.plan", "--external-data-root", root]);
    let ended = refit(".");
    let said = "warning: --external-data-root has no effect: the plan was made from no external data\n";
    assert_eq!((ended.code, ended.err.as_str()), (0, said));
    refit("none").fails(4, &["none", "No such file"]);
}

/// [`negation`] with a weight of 16 bytes that lies at the start of `w.bin`, which has 24; the last 8 decided the plan.
fn with_weight(desk: &Desk) {
    let source = |bytes: &[u8], into: &mut [u8], offset: u64| -> Result<(), PlanError> {
        let first = offset as usize;
        into.copy_from_slice(&bytes[first..first + into.len()]);
        Ok(())
    };
    let bytes: Vec<u8> = (0..24).collect();
    let ty = TensorType::new(DType::F32, &[4]);
    let mut plan = negation();
    let manifest = &mut plan.manifest;
    manifest.files = vec![SourceFile { name: "w.bin".to_owned(), bytes: 24 }];
    let recipe = Recipe::source(ty.clone(), Source::File { file: 0, offset: 0 });
    manifest.weights = vec![PlanWeight { name: "w".to_owned(), ty: ty.clone(), recipe }];
    let (ranks, images, splits) = (vec![0, 1], vec![0, 0], vec![]);
    manifest.placed = vec![PlacedWeight { weight: 0, stage: 0, ranks, ty, arena_offset: 0, splits, images }];
    (manifest.weight_arena_bytes, manifest.image_bytes) = (vec![256, 256], 16);
    let ranges = vec![FileRange { file: 0, first: 16, end: 24 }];
    let read = |_, offset, into: &mut [u8]| source(&bytes, into, offset);
    manifest.fingerprint = Fingerprint { digest: digest(&ranges, read).unwrap(), ranges };
    write_plan(&desk.path("w.plan"), &plan, |sink| sink.push(0, &bytes[..16])).unwrap();
    fs::write(desk.path("w.bin"), bytes).unwrap();
}

#[test]
fn plans_are_refitted_or_refused() {
    let desk = Desk::new();
    with_weight(&desk);
    let refit = |plan: &str| desk.plan(&["refit", plan, "--weights", ".", "-o", "new.plan"]);
    refit("w.plan").succeeds();
    assert!(fs::read(desk.path("w.plan")).unwrap() == fs::read(desk.path("new.plan")).unwrap());
    desk.plan(&["diff", "w.plan", "new.plan"]).succeeds();
    let mut bytes: Vec<u8> = (0..24).collect();
    bytes[3] = 0xff;
    fs::write(desk.path("w.bin"), &bytes).unwrap();
    refit("w.plan").succeeds();
    let differ = desk.plan(&["diff", "w.plan", "new.plan"]);
    assert_eq!((differ.code, differ.out.as_str()), (1, "weights of other bytes\n  w\n"), "{}", differ.err);
    let differ = desk.plan(&["diff", "w.plan", "new.plan", "--json"]);
    let report: Value = serde_json::from_str(&differ.out).unwrap();
    assert_eq!((differ.code, &report["same"], &report["values"][0]), (1, &false.into(), &"w".into()));
    bytes[20] = 0xff;
    fs::write(desk.path("w.bin"), &bytes).unwrap();
    refit("w.plan").fails(3, &["constants inside", "compile again"]);
    fs::write(desk.path("w.bin"), &bytes[..23]).unwrap();
    refit("w.plan").fails(3, &["w.bin has 23 bytes", "24", "compile the model again"]);
    fs::remove_file(desk.path("w.bin")).unwrap();
    refit("w.plan").fails(4, &["w.bin"]);
    refit("x.plan").fails(3, &["made from no file"]);
}

#[test]
fn plans_are_compared() {
    let desk = Desk::new();
    assert_eq!(desk.plan(&["diff", "x.plan", "x.plan"]).succeeds(), "the plans are the same\n");
    with_weight(&desk);
    let differ = desk.plan(&["diff", "x.plan", "w.plan"]);
    assert_eq!(differ.code, 1, "{}", differ.err);
    for line in ["  + file w.bin: 24 B", "  + w: f32[4] from file 0+0 f32[4]", "  rank 0 weights: 0 B → 256 B"] {
        assert!(differ.out.lines().any(|found| found == line), "`{line}` is not in\n{}", differ.out);
    }
    desk.plan(&["diff", "x.plan", "nothing.plan"]).fails(4, &["nothing.plan"]);
}

#[test]
fn shells_complete_every_command() {
    let desk = Desk::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = desk.plan(&["completions", shell]).succeeds();
        assert!(script.contains("refit") && script.contains("test-data"), "{script}");
    }
    desk.plan(&["completions", "shell"]).fails(2, &["bash", "zsh", "fish"]);
}
