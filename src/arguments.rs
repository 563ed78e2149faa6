//! The command line of `compile`, and what it asks of the compiler.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use clap::Parser;
use onnx::Bindings;
use onnx::load::LoadOptions;
use passes::precision::DTYPES;
use passes::settings::{MeshChoice, Options};
use passes::shard::{MAX_RANKS, parse_mesh};
use planfile::printable::printable;
use planfile::text::count;
use planfile::{DType, Target, regular};
use planwright::compiler::Request;
use runtime::Devices;
use runtime::cli::{Exit, Failure, Shell, ToleranceFlags};
use runtime::tensor_file::TestData;

/// Machines that `--target` knows by name.
const TARGETS: &[(&str, &str)] = &[
    ("cpu", include_str!("../fixtures/targets/cpu.json")),
    ("h200x4", include_str!("../fixtures/targets/h200x4.json")),
    ("h200x8", include_str!("../fixtures/targets/h200x8.json")),
];

/// Compiles an ONNX model into one plan file for N devices.
#[derive(Debug, Parser)]
#[command(name = "compile", version)]
pub(crate) struct Arguments {
    /// The model
    #[arg(value_name = "MODEL.onnx", required_unless_present = "completions")]
    pub(crate) model: Option<PathBuf>,
    /// Number of devices; picks a mesh
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS)))]
    pub(crate) gpus: Option<u32>,
    /// The mesh: batch split on `data`, stages on `pipe`, products, heads and channels on `tensor`
    #[arg(long, value_name = "data=2,tensor=2")]
    pub(crate) mesh: Option<String>,
    /// An axis of the mesh that splits nothing, or less than it says, is an error instead of a warning
    #[arg(long)]
    pub(crate) strict_mesh: bool,
    /// Where the plan goes [default: the model's name with .plan, in this folder]
    #[arg(short, long, value_name = "OUT.plan")]
    pub(crate) output: Option<PathBuf>,
    /// Binds a symbolic dimension; may be repeated
    #[arg(long = "dim", value_name = "NAME=N", value_parser = dim)]
    pub(crate) dims: Vec<(String, u64)>,
    /// Binds every dimension of an input; may be repeated
    #[arg(long = "shape", value_name = "INPUT=1,3,224,224", value_parser = shape)]
    pub(crate) shapes: Vec<(String, Vec<u64>)>,
    /// Binds dimensions from input_0.pb, … of an ONNX test-data folder, and freezes inputs on whose values shapes or
    /// branches depend
    #[arg(long, value_name = "DIR")]
    pub(crate) like: Option<PathBuf>,
    /// Noise of that seed in place of weights whose file is absent
    #[arg(long, value_name = "random:SEED", value_parser = seed)]
    pub(crate) weights: Option<u64>,
    /// Converts the model: weights and products in this type, statistics and accumulations in f32 [default: as it is]
    #[arg(long, value_name = "f32|f16|bf16", value_parser = dtype)]
    pub(crate) dtype: Option<DType>,
    /// The machine to plan for: cpu, h200x4, h200x8 or a description
    #[arg(long, value_name = "NAME|FILE.json", default_value = "cpu")]
    pub(crate) target: String,
    /// Products of f32 may round their operands to TF32, where the target is faster so
    #[arg(long)]
    pub(crate) allow_tf32: bool,
    /// External data may also lie below this folder, links included
    #[arg(long, value_name = "DIR")]
    pub(crate) external_data_root: Option<PathBuf>,
    /// Shows the module after a pass, in text form
    #[arg(long, value_name = "PASS", conflicts_with = "json")]
    pub(crate) print_after: Option<String>,
    /// Ends after a pass and shows the module; no plan is written
    #[arg(long, value_name = "PASS", conflicts_with_all = ["json", "run", "output"])]
    pub(crate) stop_after: Option<String>,
    /// Lists every operator of the model with its status, and why not, and ends; what open dimensions decide is unknown.
    /// With a GPU as target, also what no kernel takes
    #[arg(long, conflicts_with_all = ["run", "output", "print_after", "stop_after"])]
    pub(crate) check_support: bool,
    /// Runs the plan on the devices that it is for; with the data of --test-data or --like, else with random inputs
    #[arg(long)]
    pub(crate) run: bool,
    /// Runs it elsewhere: on `cpu` for virtual devices, `cuda`, or `cuda:0,2` for GPUs by number
    #[arg(long, value_name = "WHERE", requires = "run")]
    pub(crate) devices: Option<Devices>,
    /// Folder with input_0.pb, … and output_0.pb, … to compare with
    #[arg(long, value_name = "DIR", requires = "run")]
    pub(crate) test_data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tolerance: ToleranceFlags,
    /// The summary for programs
    #[arg(long)]
    pub(crate) json: bool,
    /// Prints a script that completes this command line
    #[arg(long, value_name = "SHELL", exclusive = true)]
    pub(crate) completions: Option<Shell>,
}

/// A description with a link for every pair of [`MAX_RANKS`] devices is shorter.
const TARGET_FILE_BYTES_MAX: u64 = 16 << 20;

/// `NAME=N`.
fn dim(text: &str) -> Result<(String, u64), String> {
    let (name, size) = text.rsplit_once('=').ok_or("expected NAME=N, such as batch=8")?;
    let size = size.trim().parse().map_err(|_| format!("`{size}` is not a number from 0 up"))?;
    // As the importer does with the model's names.
    Ok((printable(name.trim()).into_owned(), size))
}

/// `INPUT=1,3,224,224`; `INPUT=` is a scalar.
fn shape(text: &str) -> Result<(String, Vec<u64>), String> {
    let (name, sizes) = text.rsplit_once('=').ok_or("expected INPUT=D0,D1,…, such as x=1,3,224,224")?;
    let size = |size: &str| size.trim().parse().map_err(|_| format!("`{size}` is not a number from 0 up"));
    let sizes = if sizes.trim().is_empty() { Ok(Vec::new()) } else { sizes.split(',').map(size).collect() };
    Ok((printable(name).into_owned(), sizes?))
}

/// One of the types that a model can be converted to.
fn dtype(text: &str) -> Result<DType, String> {
    let known = DTYPES.into_iter().find(|dtype| dtype.name() == text);
    known.ok_or_else(|| format!("expected one of {}", DTYPES.map(DType::name).join(", ")))
}

/// `random:SEED`.
fn seed(text: &str) -> Result<u64, String> {
    let seed = text.strip_prefix("random:").and_then(|seed| seed.parse().ok());
    seed.ok_or_else(|| "expected random:SEED with a number from 0 up, such as random:1".to_owned())
}

fn wrong(message: String) -> Failure {
    Failure::new(Exit::Usage, message)
}

/// Pairs as a map.
fn unique<T>(flag: &str, pairs: &[(String, T)]) -> Result<BTreeMap<String, T>, Failure>
where
    T: Clone,
{
    let mut map = BTreeMap::new();
    for (name, value) in pairs {
        if map.insert(name.clone(), value.clone()).is_some() {
            return Err(wrong(format!("{flag} binds `{name}` twice; bind it once")));
        }
    }
    Ok(map)
}

impl Arguments {
    /// What to compile. `like`: the data of `--like`.
    ///
    /// # Errors
    /// Flags that contradict each other, or a target that cannot be read.
    pub(crate) fn request(&self, like: Option<&TestData>) -> Result<Request, Failure> {
        let mesh = self.mesh_choice()?;
        let devices = match &mesh {
            MeshChoice::Fixed(mesh) => mesh.ranks(),
            MeshChoice::Devices(devices) => *devices,
        };
        let mut request = Request::new(self.model()?, self.target(devices)?);
        request.mesh = mesh;
        request.load = LoadOptions {
            external_data_root: self.external_data_root.clone(),
            allow_missing_weights: self.weights.is_some(),
        };
        request.bindings = Bindings {
            dims: unique("--dim", &self.dims)?,
            shapes: unique("--shape", &self.shapes)?,
            samples: BTreeMap::new(),
            random_weights: self.weights,
        };
        request.samples = like.map(|data| data.inputs.clone()).unwrap_or_default();
        // The import is no pass, but worth a look.
        let pass = |name: &Option<String>| name.clone().filter(|name| name != "import");
        let (stop_after, print_after) = (pass(&self.stop_after), pass(&self.print_after));
        request.options = Options { stop_after, print_after, dtype: self.dtype, allow_tf32: self.allow_tf32 };
        passes::pipeline::check(&request.options).map_err(|error| wrong(error.to_string()))?;
        if self.stop_after.as_deref() == Some("import") {
            return Err(wrong("--stop-after names a pass; to see the import, use --print-after import".to_owned()));
        }
        Ok(request)
    }

    fn model(&self) -> Result<&Path, Failure> {
        self.model.as_deref().ok_or_else(|| wrong("no model is given; name a file".to_owned()))
    }

    fn mesh_choice(&self) -> Result<MeshChoice, Failure> {
        let Some(text) = &self.mesh else { return Ok(MeshChoice::Devices(self.gpus.unwrap_or(1))) };
        let mesh = parse_mesh(text).map_err(|why| wrong(format!("--mesh {text}: {why}")))?;
        match self.gpus {
            Some(gpus) if gpus != mesh.ranks() => {
                let devices = count(u64::from(mesh.ranks()), "device");
                Err(wrong(format!("--mesh {text} has {devices}, --gpus says {gpus}; make them agree")))
            }
            _ => Ok(MeshChoice::Fixed(mesh)),
        }
    }

    /// The machine, with as many devices as are asked for.
    fn target(&self, devices: u32) -> Result<Target, Failure> {
        let name = &self.target;
        let known = TARGETS.iter().find(|(known, _)| known == name);
        let text = match known {
            Some((_, text)) => (*text).to_owned(),
            None if Path::new(name).extension().is_some_and(|extension| extension == "json") => {
                let read = regular::read_text(Path::new(name), TARGET_FILE_BYTES_MAX);
                let read = read.and_then(|text| text.ok_or_else(|| io::Error::other("it is not a regular file")));
                read.map_err(|error| {
                    Failure::new(Exit::File, format!("cannot read target {name}: {error}; check the path"))
                })?
            }
            None => {
                let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
                let names = names.join(", ");
                return Err(wrong(format!("--target {name}: there are {names}; a description ends in .json")));
            }
        };
        let target = Target::from_json(&text)
            .map_err(|why| Failure::new(Exit::Invalid, format!("target {name}: {why}; see fixtures/targets")))?;
        // Threads are devices enough; machines have as many as they have.
        if target.device.architecture.is_host() && devices != target.devices {
            return Ok(target.with_devices(devices));
        }
        if devices > target.devices {
            let message = format!(
                "target {name} has {}, not the {devices} asked for; ask for fewer",
                count(u64::from(target.devices), "device")
            );
            return Err(wrong(message));
        }
        Ok(target)
    }

    /// Where the plan goes.
    ///
    /// # Errors
    /// A model path without a file name.
    pub(crate) fn output(&self) -> Result<PathBuf, Failure> {
        if let Some(output) = &self.output {
            return Ok(output.clone());
        }
        let model = self.model()?;
        let stem = model.file_stem();
        let stem = stem.ok_or_else(|| wrong(format!("{} is no file; name one", model.display())))?;
        // Whatever its characters are: a path need not be text.
        Ok([stem, OsStr::new(".plan")].into_iter().collect::<OsString>().into())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use runtime::cli::{Program, described, undescribed};
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn parse(flags: &[&str]) -> Result<Request, Failure> {
        let line = ["compile", "folder/m.onnx"].iter().chain(flags);
        let arguments = Arguments::try_parse_from(line).map_err(|error| wrong(error.to_string()))?;
        arguments.request(None)
    }

    fn message(flags: &[&str]) -> String {
        let failure = parse(flags).map(drop).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        failure.message
    }

    #[test]
    fn flags_become_a_request() {
        let request = parse(&["--dim", "a=b=3", "--shape", "x=1,2", "--shape", "s=", "--weights", "random:7"]).unwrap();
        assert_eq!(request.bindings.dims, BTreeMap::from([("a=b".to_owned(), 3)]));
        assert_eq!(request.bindings.shapes["x"], [1, 2]);
        assert!(request.bindings.shapes["s"].is_empty());
        assert_eq!((request.bindings.random_weights, request.load.allow_missing_weights), (Some(7), true));
        assert_eq!((request.mesh, request.target.devices), (MeshChoice::Devices(1), 1));
        assert_eq!(request.options.dtype, None);
        assert!(!request.options.allow_tf32 && parse(&["--allow-tf32"]).unwrap().options.allow_tf32);
        assert_eq!(parse(&["--dtype", "bf16"]).unwrap().options.dtype, Some(DType::BF16));
    }

    #[test]
    fn meshes_and_counts_must_agree() {
        let request = parse(&["--mesh", "data=2,tensor=3", "--gpus", "6"]).unwrap();
        let MeshChoice::Fixed(mesh) = request.mesh else { panic!("a mesh was given") };
        assert_eq!((mesh.ranks(), request.target.devices), (6, 6));
        assert!(message(&["--mesh", "data=2", "--gpus", "4"]).contains("has 2 devices, --gpus says 4"));
        assert!(message(&["--mesh", "rows=2"]).contains("--mesh rows=2"));
        assert!(message(&["--gpus", "0"]).contains("--gpus"));
    }

    #[test]
    fn wrong_flags_say_what_is_expected() {
        assert!(message(&["--dim", "batch"]).contains("expected NAME=N"));
        assert!(message(&["--dim", "n=1", "--dim", "n=2"]).contains("binds `n` twice"));
        assert!(message(&["--shape", "x=1,-2"]).contains("not a number from 0 up"));
        assert!(message(&["--weights", "zeros"]).contains("expected random:SEED"));
        assert!(message(&["--print-after", "simplfy"]).contains("no pass `simplfy`"));
        assert!(message(&["--dtype", "f64"]).contains("expected one of f32, f16, bf16"));
        assert!(message(&["--target", "h100"]).contains("cpu, h200x4, h200x8"));
        assert!(message(&["--target", "h200x4", "--gpus", "8"]).contains("has 4 devices, not the 8 asked for"));
        assert!(message(&["--test-data", "x"]).contains("--run"));
        assert!(message(&["--devices", "cpu"]).contains("--run"));
        assert!(message(&["--run", "--devices", "gpu"]).contains("none of `cpu`, `cuda`"));
    }

    #[test]
    fn every_argument_is_described() {
        let command = described(Arguments::command(), Program::Compile);
        assert_eq!(undescribed(&command), Vec::<String>::new());
    }

    #[test]
    fn the_plan_is_named_after_the_model() {
        let output = |model: &OsStr| {
            Arguments::try_parse_from([OsStr::new("compile"), model]).unwrap().output().unwrap().into_os_string()
        };
        assert_eq!(output(OsStr::new("folder/m.v2.onnx")), "m.v2.plan");
        assert_eq!(output(OsStr::from_bytes(b"folder/m\xff.onnx")), OsStr::from_bytes(b"m\xff.plan"));
    }
}
