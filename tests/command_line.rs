//! The command lines `compile` and `plan`: what they print, what they leave behind, and how they end.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use onnx::messages::{
    Dimension, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, type_proto,
};
use planfile::PlanFile;
use prost::Message as _;
use tempfile::TempDir;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx").join(path)
}

/// A folder to work in.
struct Desk(TempDir);

/// What a command printed, and its exit code.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn compile<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ended {
        self.run(Command::new(env!("CARGO_BIN_EXE_compile")).args(arguments))
    }

    fn run(&self, command: &mut Command) -> Ended {
        let Output { status, stdout, stderr } = command.current_dir(self.0.path()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let (out, err) = (text(stdout), text(stderr));
        let code = status.code().unwrap_or_else(|| panic!("{command:?} was killed: {err}"));
        assert!(!err.contains("panicked"), "{err}");
        Ended { code, out, err }
    }

    /// Names of the files, sorted.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
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
        // Quiet where standard error is no terminal.
        assert_eq!(self.err, "");
        self.out
    }
}

fn bert(file: &str) -> String {
    fixture("tiny_bert").join(file).display().to_string()
}

#[test]
fn a_model_is_compiled_run_and_compared() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let out = desk.compile(&[&model, "--like", &data, "--mesh", "tensor=2", "--run"]).succeeds();
    for words in [["2 devices:", "cpu"], ["all_reduce", "main"], ["ok", "f32["]] {
        assert!(out.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?} in\n{out}");
    }
    assert_eq!(desk.files(), ["model.plan"]);
}

#[test]
fn the_summary_is_there_for_programs() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let arguments = [&model, "--like", &data, "--mesh", "data=1,tensor=2", "-o", "x.plan", "--run", "--json"];
    let report: serde_json::Value = serde_json::from_str(&desk.compile(&arguments).succeeds()).unwrap();
    assert_eq!(report["path"], "x.plan");
    assert_eq!(report["plan"]["ranks"], 2);
    assert_eq!(report["plan"]["mesh"][0]["name"], "tensor");
    let output = &report["run"]["outputs"][0];
    assert_eq!(output["comparison"]["passed"], true);
    assert!(output["comparison"]["max_relative_error"].as_f64().unwrap() < 1e-5, "{output}");
}

#[test]
fn the_same_bytes_from_any_folder_and_any_time() {
    let desks = [Desk::new(), Desk::new()];
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let plans = desks.map(|desk| {
        desk.compile(&[&model, "--like", &data, "--gpus", "4"]).succeeds();
        fs::read(desk.path("model.plan")).unwrap()
    });
    assert!(plans[0] == plans[1]);
}

#[test]
fn a_comparison_beyond_its_tolerance_ends_with_1() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let data_of_another = desk.path("data");
    fs::create_dir(&data_of_another).unwrap();
    for file in ["input_0.pb", "input_1.pb", "input_2.pb", "output_0.pb"] {
        fs::copy(Path::new(&data).join(file), data_of_another.join(file)).unwrap();
    }
    let path = data_of_another.join("output_0.pb");
    let mut bytes = fs::read(&path).unwrap();
    // The last float's exponent: raw data is the last field.
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    let ended = desk.compile(&[&model, "--like", &data, "--run", "--test-data", "data"]);
    assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("BEYOND TOLERANCE"), "{}", ended.out);
}

#[test]
fn half_types_pass_with_their_own_test_data_and_say_within_what() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    for (dtype, type_name) in [("f16", "to f16"), ("bf16", "to bf16"), ("f32", "to f32")] {
        let out = desk.compile(&[&model, "--like", &data, "--dtype", dtype, "--run"]).succeeds();
        let told = out.lines().find(|line| line.starts_with("tolerance: what rounding explains")).unwrap();
        assert!(told.contains(type_name) && told.contains("sums of up to 256 terms"), "{told}");
    }
    // Judged element by element, bf16 is not `f32`; what the failure says would pass does.
    let line = [&model[..], "--like", &data, "--dtype", "bf16", "--run"];
    let ended = desk.compile(&[&line[..], &["--rtol", "1e-3", "--atol", "1e-5"]].concat());
    assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("tolerance: each element within 1e-3 of its size plus 1e-5"), "{}", ended.out);
    assert!(ended.out.contains("looks like rounding") && ended.out.contains("cosine 1 - "), "{}", ended.out);
    let flags = ended.out.lines().find_map(|line| line.trim().strip_prefix("would pass: ")).unwrap();
    let flags: Vec<&str> = flags.split(' ').collect();
    desk.compile(&[&line[..], &flags].concat()).succeeds();
    let json = desk.compile(&[&line[..], &["--json"]].concat()).succeeds();
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let (tolerance, comparison) = (&report["run"]["tolerance"], &report["run"]["outputs"][0]["comparison"]);
    assert_eq!((&tolerance["kind"], &tolerance["coarsest_type"]), (&"rounding".into(), &"bf16".into()));
    assert_eq!(tolerance["longest_sum"], 256);
    let allowed = tolerance["whole"].as_f64().unwrap();
    assert!(comparison["norm_error"].as_f64().unwrap() < allowed && allowed < 0.15, "{tolerance} {comparison}");
}

#[test]
fn axes_that_split_nothing_are_told_of() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let line = [&model[..], "--like", &data, "--mesh"];
    let why = "data=3 splits nothing: a batch of 2 (dimension 0 of the inputs) cannot be split 3 ways";
    let ended = desk.compile(&[&line[..], &["data=3"]].concat());
    assert_eq!((ended.code, ended.err), (0, format!("warning: {why}\n")));
    assert!(ended.out.contains("100 % of the weights and 100 % of the operations stay whole"), "{}", ended.out);
    // Once, on standard error; whoever has the plan alone reads it there.
    assert!(!ended.out.contains(why), "{}", ended.out);
    let plan = PlanFile::open(&desk.path("model.plan")).unwrap_or_else(|error| panic!("{error}"));
    assert!(plan.plan().explanations.sharding.contains(&why.to_owned()));
    let ended = desk.compile(&[&line[..], &["data=3", "--json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    let warning = &report["warnings"][0];
    assert_eq!(
        (&warning["kind"], &warning["axis"], &warning["ways"]),
        (&"idle_axis".into(), &"data".into(), &1.into())
    );
    assert_eq!(warning["text"], why);
    fs::remove_file(desk.path("model.plan")).unwrap();
    desk.compile(&[&line[..], &["data=3", "--strict-mesh"]].concat()).fails(2, &[why, "--strict-mesh"]);
    assert!(desk.files().is_empty());
    desk.compile(&[&line[..], &["data=2,tensor=2", "--strict-mesh"]].concat()).succeeds();
}

#[test]
fn more_devices_than_are_worth_it_are_told_of() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let ended = desk.compile(&[&model, "--like", &data, "--gpus", "64"]);
    let told = ended.out.lines().find(|line| line.starts_with("64 devices are predicted to take")).unwrap_or_default();
    assert!(told.contains("one device takes") && told.contains("a plan for one device is faster"), "{}", ended.out);
    let ended = desk.compile(&[&model, "--like", &data, "--gpus", "64", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    let warnings = report["warnings"].as_array().unwrap();
    let slower = warnings.iter().find(|warning| warning["kind"] == "slower").unwrap();
    assert!(slower["one_device_ns"].as_u64() < slower["predicted_ns"].as_u64(), "{slower}");
}

#[test]
fn passes_are_shown_in_text_form() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let shown = desk.compile(&[&model, "--like", &data, "--stop-after", "simplify"]).succeeds();
    assert!(ir::text::parse(&shown).is_ok(), "the text form does not parse");
    assert!(desk.files().is_empty(), "{:?}", desk.files());
    let imported = desk.compile(&[&model, "--like", &data, "--print-after", "import"]).succeeds();
    assert!(imported.starts_with("module ") && desk.files() == ["model.plan"]);
}

#[test]
fn wrong_command_lines_end_with_2() {
    let desk = Desk::new();
    let model = bert("model.onnx");
    desk.compile::<&str>(&[]).fails(2, &["MODEL.onnx"]);
    desk.compile(&[&model, "--fast"]).fails(2, &["--fast"]);
    desk.compile(&[&model, "--gpus", "two"]).fails(2, &["two", "--gpus"]);
    desk.compile(&[&model, "--mesh", "tensor=2", "--gpus", "3"]).fails(2, &["--mesh tensor=2", "--gpus says 3"]);
    desk.compile(&[&model, "--dim", "nobody=3"]).fails(2, &["no dimension `nobody`", "batch"]);
    desk.compile(&[&model]).fails(2, &["`batch`", "--dim batch=N", "--like DIR"]);
    desk.compile(&[&model, "--stop-after", "sharding"]).fails(2, &["no pass `sharding`", "simplify"]);
    assert!(desk.files().is_empty());
}

#[test]
fn invalid_models_and_inputs_end_with_3() {
    let desk = Desk::new();
    let data = bert("test_data_set_0");
    fs::write(desk.path("text.onnx"), "this is not a model").unwrap();
    desk.compile(&["text.onnx"]).fails(3, &["text.onnx", "is not an ONNX model"]);
    let whole = fs::read(bert("model.onnx")).unwrap();
    fs::write(desk.path("cut.onnx"), &whole[..whole.len() / 2]).unwrap();
    desk.compile(&["cut.onnx"]).fails(3, &["cut.onnx", "truncated"]);
    let other = fixture("tiny_resnet/test_data_set_0").display().to_string();
    desk.compile(&[&bert("model.onnx"), "--like", &other]).fails(3, &["1 sample input,", "3"]);
    let ended = desk.compile(&[&bert("model.onnx"), "--like", &data, "--run", "--test-data", &other]);
    ended.fails(3, &["1 input,", "has 3"]);
    fs::write(desk.path("input_0.pb"), whole).unwrap();
    desk.compile(&[&bert("model.onnx"), "--like", "."]).fails(3, &["input_0.pb", "no file with an ONNX tensor"]);
    fs::write(desk.path("target.json"), "{}").unwrap();
    desk.compile(&[&bert("model.onnx"), "--target", "target.json"]).fails(3, &["target.json", "missing field"]);
}

#[test]
fn cuda_targets_need_the_compiler_of_kernels() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    fs::create_dir(desk.path("cache")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_compile"));
    command.env("PLANWRIGHT_NVRTC", desk.path("absent.so")).env("PLANWRIGHT_CACHE", desk.path("cache"));
    command.args([&model, "--like", &data, "--target", "h200x4"]);
    desk.run(&mut command).fails(5, &["NVRTC was not found", "absent.so", "pip install", "CUDA_HOME"]);
    assert_eq!(desk.files(), ["cache"]);
    assert_eq!(fs::read_dir(desk.path("cache")).unwrap().count(), 0);
}

#[test]
fn files_that_cannot_be_read_or_written_end_with_4() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    desk.compile(&["nothing.onnx"]).fails(4, &["nothing.onnx", "No such file"]);
    desk.compile(&[&model, "--like", "nothing"]).fails(4, &["nothing"]);
    desk.compile(&[&model, "--target", "nothing.json"]).fails(4, &["nothing.json"]);
    let like = [&model, "--like", &data];
    desk.compile(&[&like[..], &["-o", "/dev/full"]].concat()).fails(4, &["/dev/full", "not a regular file"]);
    let no_folder = ["cannot write no/folder/x.plan", "there is no folder no/folder; make it"];
    desk.compile(&[&like[..], &["-o", "no/folder/x.plan"]].concat()).fails(4, &no_folder);
    fs::write(desk.path("folder"), "").unwrap();
    desk.compile(&[&like[..], &["-o", "folder/x.plan"]].concat()).fails(4, &["there is no folder folder"]);
    // Before any work: there is no model.
    desk.compile(&["nothing.onnx", "-o", "no/folder/x.plan"]).fails(4, &no_folder);
    // A sample that is there and cannot be read is not left out.
    fs::create_dir(desk.path("data")).unwrap();
    for number in 0..3 {
        let name = format!("input_{number}.pb");
        fs::copy(Path::new(&data).join(&name), desk.path("data").join(&name)).unwrap();
    }
    std::os::unix::fs::symlink("nowhere", desk.path("data/output_0.pb")).unwrap();
    desk.compile(&[&model, "--like", "data", "--run"]).fails(4, &["data/output_0.pb", "No such file"]);
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn pipes_and_sockets_are_not_waited_for() {
    let desk = Desk::new();
    let data = bert("test_data_set_0");
    let folders = ["pipes", "sockets"].map(|name| desk.path(name));
    let files = ["m.onnx", "input_0.pb", "target.json", "w.bin"];
    folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
    files.iter().for_each(|file| pipe(&folders[0].join(file)));
    let _listening = files.map(|file| std::os::unix::net::UnixListener::bind(folders[1].join(file)).unwrap());
    for folder in folders {
        let path = |file: &str| folder.join(file).display().to_string();
        let words = ["not a regular file"];
        desk.compile(&[&path("m.onnx")]).fails(4, &words);
        desk.compile(&[&path("m.onnx"), "--check-support"]).fails(4, &words);
        let folder = folder.display().to_string();
        desk.compile(&[&bert("model.onnx"), "--like", &folder]).fails(4, &words);
        desk.compile(&[&bert("model.onnx"), "--like", &data, "--run", "--test-data", &folder]).fails(4, &words);
        desk.compile(&[&bert("model.onnx"), "--target", &path("target.json")]).fails(4, &words);
        fs::write(Path::new(&folder).join("external.onnx"), model_with_external_weights()).unwrap();
        desk.compile(&[&path("external.onnx")]).fails(3, &["w.bin", "not a regular file"]);
    }
}

/// Part of a file's name that is no UTF-8.
const NO_TEXT: &[u8] = b"m\xff";

#[test]
fn paths_need_not_be_text() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let path = |extension: &str| OsString::from_vec([NO_TEXT, extension.as_bytes()].concat());
    fs::copy(model, desk.0.path().join(path(".onnx"))).unwrap();
    let (like, json) = (OsString::from("--like"), OsString::from("--json"));
    let compile = |more: &[OsString]| {
        let arguments = [&[path(".onnx"), like.clone(), OsString::from(&data), json.clone()], more].concat();
        let report: serde_json::Value = serde_json::from_str(&desk.compile(&arguments).succeeds()).unwrap();
        report
    };
    assert_eq!(compile(&[])["path"], "m\u{fffd}.plan");
    assert!(desk.0.path().join(path(".plan")).exists());
    assert_eq!(compile(&["-o".into(), path(".other")])["path"], "m\u{fffd}.other");
    assert_eq!(compile(&["--check-support".into()])["model"], "m\u{fffd}.onnx");
    let plan = PlanFile::open(&desk.0.path().join(path(".plan"))).unwrap().into_plan();
    let (weights, out) = (desk.0.path().join(path(".onnx")), desk.path("new.plan"));
    let sources = runtime::refit::Sources { weights: &weights, external_data_root: None };
    runtime::refit::refit(plan, sources, &out, |_| {}).unwrap();
}

#[test]
fn a_root_for_external_data_of_none_is_said() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let ended = desk.compile(&[&model, "--like", &data, "--external-data-root", "."]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(ended.err, "warning: --external-data-root has no effect: the model has no external data\n");
    desk.compile(&[&model, "--like", &data, "--external-data-root", "none"]).fails(4, &["none", "No such file"]);
    fs::write(desk.path("m.onnx"), model_with_external_weights()).unwrap();
    fs::write(desk.path("w.bin"), [0; 16]).unwrap();
    desk.compile(&["m.onnx", "--external-data-root", "."]).succeeds();
}

#[test]
fn plans_have_the_permissions_that_the_user_gives_new_files() {
    let desk = Desk::new();
    fs::write(desk.path("m.onnx"), model_with_external_weights()).unwrap();
    fs::write(desk.path("w.bin"), [0; 16]).unwrap();
    let mode = || fs::metadata(desk.path("m.plan")).unwrap().permissions().mode() & 0o777;
    for (mask, expected) in [("027", 0o640), ("022", 0o640), ("077", 0o640)] {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("umask {mask} && exec \"$0\" m.onnx"), env!("CARGO_BIN_EXE_compile")]);
        desk.run(&mut command).succeeds();
        // Once it is there, it keeps what it has.
        assert_eq!(mode(), expected, "{mask}");
    }
}

/// A file system without room is imitated by a limit on the size of files.
#[test]
fn a_full_disk_leaves_the_old_plan() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    desk.compile(&[&model, "--like", &data]).succeeds();
    let before = fs::read(desk.path("model.plan")).unwrap();
    let script = "ulimit -f 8; exec \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash", env!("CARGO_BIN_EXE_compile"), &model, "--like", &data, "--gpus", "2"]);
    desk.run(&mut command).fails(4, &["model.plan", "File too large"]);
    assert!(fs::read(desk.path("model.plan")).unwrap() == before);
    assert_eq!(desk.files(), ["model.plan"]);
}

/// A field of a protocol-buffers message: bytes of some length.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

/// `y = x + w`, all `f32[4]`, with `w` in the file `w.bin`.
fn model_with_external_weights() -> Vec<u8> {
    let pair = |key: &[u8], value: &[u8]| field(13, &[field(1, key), field(2, value)].concat());
    let weight = [&[0x08, 4, 0x10, 1, 0x70, 1][..], &field(8, b"w"), &pair(b"location", b"w.bin")].concat();
    let ty = field(1, &[&[0x08, 1][..], &field(2, &field(1, &[0x08, 4]))].concat());
    let port = |name: &[u8]| [field(1, name), field(2, &ty)].concat();
    let node = [field(1, b"x"), field(1, b"w"), field(2, b"y"), field(4, b"Add")].concat();
    let graph = [field(1, &node), field(2, b"g"), field(5, &weight), field(11, &port(b"x")), field(12, &port(b"y"))];
    [vec![0x08, 8], field(7, &graph.concat()), field(8, &[0x10, 17])].concat()
}

#[test]
fn absent_weights_may_be_noise() {
    let desk = Desk::new();
    fs::write(desk.path("m.onnx"), model_with_external_weights()).unwrap();
    desk.compile(&["m.onnx"]).fails(4, &["w.bin", "--weights random:SEED"]);
    let plan = |seed: &str| {
        desk.compile(&["m.onnx", "--weights", seed, "--run"]).succeeds();
        fs::read(desk.path("m.plan")).unwrap()
    };
    let (first, second) = (plan("random:1"), plan("random:2"));
    assert!(first != second, "the seed decides");
    assert!(first == plan("random:1"), "the same seed, the same plan");
}

#[test]
fn a_plan_takes_new_external_weights() {
    let desk = Desk::new();
    fs::write(desk.path("m.onnx"), model_with_external_weights()).unwrap();
    let weights = |elements: [f32; 4]| {
        let bytes: Vec<u8> = elements.iter().flat_map(|element| element.to_le_bytes()).collect();
        fs::write(desk.path("w.bin"), bytes).unwrap();
    };
    weights([1.0, 2.0, 3.0, 4.0]);
    desk.compile(&["m.onnx", "-o", "old.plan"]).succeeds();
    weights([5.0, 5.0, 5.0, 5.0]);
    desk.compile(&["m.onnx", "-o", "compiled.plan"]).succeeds();
    let old = PlanFile::open(&desk.path("old.plan")).unwrap().into_plan();
    let sources = runtime::refit::Sources { weights: &desk.path("m.onnx"), external_data_root: None };
    runtime::refit::refit(old, sources, &desk.path("new.plan"), |_| {}).unwrap();
    let [old, compiled, new] =
        ["old", "compiled", "new"].map(|name| fs::read(desk.path(&format!("{name}.plan"))).unwrap());
    assert!(new == compiled && new != old);
}

#[test]
fn operators_are_listed_with_their_status() {
    let desk = Desk::new();
    let (model, data) = (bert("model.onnx"), bert("test_data_set_0"));
    let out = desk.compile(&[&model, "--check-support"]).succeeds();
    assert!(out.contains("MatMul") && out.contains("unknown until bound") && out.contains("--dim batch=N"), "{out}");
    let out = desk.compile(&[&model, "--check-support", "--like", &data, "--json"]).succeeds();
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["supported"], report["unbound"].as_array().unwrap().len()), (&true.into(), 0));
    let operators = report["operators"].as_array().unwrap();
    let product = operators.iter().find(|row| row["op"] == "MatMul").unwrap();
    assert!(product["count"].as_u64().unwrap() > 1 && product["status"] == "supported", "{product}");
    // An operator that nobody has, of the same length as the one it replaces.
    let mut other = model_with_external_weights();
    let at = other.windows(3).position(|bytes| bytes == b"Add").unwrap();
    other[at..at + 3].copy_from_slice(b"Odd");
    fs::write(desk.path("other.onnx"), other).unwrap();
    fs::write(desk.path("w.bin"), [0; 16]).unwrap();
    let ended = desk.compile(&["other.onnx", "--check-support"]);
    assert_eq!(ended.code, 3, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("NOT SUPPORTED: no such operator"), "{}", ended.out);
    desk.compile(&["other.onnx", "--check-support", "--run"]).fails(2, &["--check-support", "--run"]);
    desk.compile(&["nothing.onnx", "--check-support"]).fails(4, &["nothing.onnx"]);
    let files = desk.files();
    assert_eq!(files, ["other.onnx", "w.bin"]);
}

/// From `x: f32[2]` and `n: i64[1]` to `y`, with these nodes.
fn model_of(nodes: Vec<NodeProto>, opsets: &[(&str, i64)]) -> Vec<u8> {
    let value = |name: &str, elem_type, size| {
        let dim = Dimension { value: Some(DimensionValue::DimValue(size)) };
        let tensor = type_proto::Tensor { elem_type, shape: Some(TensorShapeProto { dim: vec![dim] }) };
        let r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) });
        ValueInfoProto { name: name.to_owned(), r#type }
    };
    let graph = GraphProto {
        name: "main".to_owned(),
        node: nodes,
        input: vec![value("x", 1, 2), value("n", 7, 1)],
        output: vec![value("y", 1, 4)],
        ..GraphProto::default()
    };
    let opset = |&(domain, version): &(&str, i64)| OperatorSetIdProto { domain: domain.to_owned(), version };
    let opset_import = opsets.iter().map(opset).collect();
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..ModelProto::default() }.encode_to_vec()
}

fn node(op: &str, domain: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.to_owned(),
        domain: domain.to_owned(),
        name: format!("/{op}"),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

/// A tensor file.
fn tensor_file(data_type: i32, size: i64, raw_data: Vec<u8>) -> Vec<u8> {
    TensorProto { dims: vec![size], data_type, raw_data: Some(raw_data), ..TensorProto::default() }.encode_to_vec()
}

#[test]
fn inputs_that_samples_freeze_are_named() {
    let desk = Desk::new();
    fs::write(desk.path("m.onnx"), model_of(vec![node("Tile", "", &["x", "n"], "y")], &[("", 17)])).unwrap();
    fs::create_dir(desk.path("like")).unwrap();
    let x = [1f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    fs::write(desk.path("like/input_0.pb"), tensor_file(1, 2, x)).unwrap();
    fs::write(desk.path("like/input_1.pb"), tensor_file(7, 1, 2i64.to_le_bytes().to_vec())).unwrap();
    desk.compile(&["m.onnx"]).fails(3, &["`/Tile`", "input `n`", "--like DIR"]);
    let listed = desk.compile(&["m.onnx", "--check-support"]).succeeds();
    assert!(listed.contains("unknown: a shape or a branch depends on the data in input `n`"), "{listed}");
    let line = "n: i64[1] = [2], which node `/Tile` needs";
    let listed = desk.compile(&["m.onnx", "--check-support", "--like", "like"]).succeeds();
    assert!(listed.contains("frozen inputs") && listed.contains(line), "{listed}");
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&desk.compile(arguments).succeeds()).unwrap()
    };
    let report = json(&["m.onnx", "--check-support", "--like", "like", "--json"]);
    assert_eq!((&report["frozen"][0]["input"], &report["frozen"][0]["value"]), (&"n".into(), &"[2]".into()));
    let compiled = desk.compile(&["m.onnx", "--like", "like"]).succeeds();
    assert!(compiled.contains("frozen inputs") && compiled.contains(line), "{compiled}");
    let report = json(&["m.onnx", "--like", "like", "--json"]);
    assert_eq!(report["plan"]["entries"][0]["frozen"][0]["node"], "/Tile");
}

#[test]
fn what_is_not_supported_comes_with_what_replaces_it() {
    let desk = Desk::new();
    let nodes = vec![
        node("FastGelu", "com.microsoft", &["x"], "a"),
        node("Loop", "", &["n", "", "x"], "b"),
        node("Neg", "", &["x"], "y"),
    ];
    fs::write(desk.path("m.onnx"), model_of(nodes, &[("", 17), ("com.microsoft", 1)])).unwrap();
    let ended = desk.compile(&["m.onnx", "--check-support"]);
    assert_eq!(ended.code, 3, "{}{}", ended.out, ended.err);
    for words in ["com.microsoft.FastGelu", "Gelu (opset 20)", "--optimize", "loop around the plan", "2 not supported"]
    {
        assert!(ended.out.contains(words), "`{words}` is not in\n{}", ended.out);
    }
    let ended = desk.compile(&["m.onnx", "--check-support", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!(report["supported"], false);
    let operators = report["operators"].as_array().unwrap();
    let gelu = operators.iter().find(|row| row["op"] == "FastGelu").unwrap();
    assert_eq!((&gelu["status"], &gelu["reasons"][0]["node"]), (&"not supported".into(), &"/FastGelu".into()));
    // The same words from `compile`, broken into lines.
    let ended = desk.compile(&["m.onnx"]);
    let said = ended.err.replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(ended.code, 3, "{said}");
    for words in ["com.microsoft.FastGelu (opset 1)", "Gelu (opset 20)", "--optimize", "`--check-support` lists"] {
        assert!(said.contains(words), "`{words}` is not in\n{said}");
    }
}

#[test]
fn shells_complete_every_flag() {
    let desk = Desk::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = desk.compile(&["--completions", shell]).succeeds();
        assert!(script.contains("compile") && script.contains("external-data-root"), "{script}");
    }
    desk.compile(&["--completions", "shell"]).fails(2, &["bash", "zsh", "fish"]);
    desk.compile(&["--completions", "bash", "m.onnx"]).fails(2, &["--completions"]);
}
