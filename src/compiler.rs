//! From a model file to a plan file: loads, imports, compiles and writes.

use passes::settings::{MeshChoice, Options, SPLIT_TABLE_BYTES, Settings, ShardOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cpu::recipe::{WeightBytes, WeightReadError};
use ir::Module;
use onnx::load::{LoadOptions, Model, load};
use onnx::source_files::{FileIndex, WeightFiles};
use onnx::{Bindings, OnnxError, Status, SupportReport};
use passes::compile::{Outcome, Warning};
use passes::error::PassError;
use planfile::fingerprint::{self, Fingerprint};
use planfile::plan::{Manifest, Plan};
use planfile::text::{count, few};
use planfile::writer::{WeightSink, write_plan};
use planfile::{PlanError, Target, Tensor};
use runtime::image::{self, ImageError};
use thiserror::Error;

use crate::assembler::NvrtcAssembler;

/// What to compile, for what, and how.
#[derive(Clone, Debug)]
pub struct Request {
    pub model: PathBuf,
    pub load: LoadOptions,
    pub bindings: Bindings,
    /// Sample inputs by position: they bind dimensions, and values that shapes depend on.
    pub samples: Vec<Tensor>,
    pub mesh: MeshChoice,
    pub split_table_bytes: u64,
    /// The dimension of inputs that the data axis splits.
    pub batch_dim: usize,
    pub target: Target,
    pub options: Options,
}

/// Why a model was not compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    #[error(transparent)]
    Model(#[from] OnnxError),
    #[error(transparent)]
    Pass(#[from] PassError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Image(#[from] ImageError<PlanError>),
    #[error("{}, but the model has {expected}: {names}; give one input_N.pb for each", count(*given as u64, "sample input"))]
    Samples { given: usize, expected: usize, names: String },
}

/// A plan, and the files that its weights are made from.
pub struct Compiled {
    pub plan: Plan,
    /// What the user should know, one sentence each.
    pub warnings: Vec<String>,
    /// What of the mesh the user may not have meant.
    pub mesh_warnings: Vec<Warning>,
    weights: Weights,
}

impl Request {
    /// A request for one virtual device, with everything else at its default.
    pub fn new(model: &Path, target: Target) -> Self {
        Self {
            model: model.to_owned(),
            load: LoadOptions::default(),
            bindings: Bindings::default(),
            samples: Vec::new(),
            mesh: MeshChoice::Devices(1),
            split_table_bytes: SPLIT_TABLE_BYTES,
            batch_dim: 0,
            target,
            options: Options::default(),
        }
    }

    /// Compiles. `observer` sees the module after `import` and after each pass. `None` when the options stop early.
    ///
    /// # Errors
    /// See [`CompileError`].
    pub fn compile(&self, observer: &mut dyn FnMut(&str, &Module)) -> Result<Option<Compiled>, CompileError> {
        let model = load(&self.model, &self.load)?;
        let files = WeightFiles::open(&model.files)?;
        let bindings = self.bind(&model)?;
        let module = onnx::import(&model, &bindings, &files)?;
        observer("import", &module);
        let weights = Weights { files };
        let outcome = passes::compile::run(module, &self.settings(&weights), &NvrtcAssembler, observer)?;
        let Some(Outcome { mut plan, warnings: mesh_warnings }) = outcome else { return Ok(None) };
        plan.manifest.fingerprint = weights.fingerprint()?;
        let mut warnings = Vec::new();
        if model.external_data_root_unused {
            warnings.push("--external-data-root has no effect: the model has no external data".to_owned());
        }
        warnings.extend(growth(&plan.manifest));
        Ok(Some(Compiled { plan, warnings, mesh_warnings, weights }))
    }

    /// Every operator of the model with its status, and why; where all can be imported and the target is a GPU, also
    /// which nodes no kernel takes.
    ///
    /// # Errors
    /// A model that cannot be loaded, bindings that do not fit it, what passes report.
    pub fn support(&self) -> Result<SupportReport, CompileError> {
        let model = load(&self.model, &self.load)?;
        let files = WeightFiles::open(&model.files)?;
        let bindings = self.bind(&model)?;
        let mut report = onnx::support(&model, &bindings, &files)?;
        if report.status() == Status::Supported && !self.target.device.architecture.is_host() {
            let module = onnx::import(&model, &bindings, &files)?;
            let missing = passes::compile::without_kernels(module, &self.settings(&Weights { files }))?;
            report.refuse(&model, &missing);
        }
        Ok(report)
    }

    fn settings<'a>(&'a self, weights: &'a Weights) -> Settings<'a> {
        Settings {
            weights,
            options: self.options.clone(),
            shard: ShardOptions {
                mesh: self.mesh.clone(),
                split_table_bytes: self.split_table_bytes,
                batch_dim: self.batch_dim,
            },
            target: &self.target,
        }
    }

    /// The bindings, with samples under the names of the inputs they are for.
    fn bind(&self, model: &Model) -> Result<Bindings, CompileError> {
        let mut bindings = self.bindings.clone();
        if self.samples.is_empty() {
            return Ok(bindings);
        }
        let names: Vec<&str> = model.graph.inputs.iter().map(|input| input.name.as_str()).collect();
        if names.len() != self.samples.len() {
            let (given, expected) = (self.samples.len(), names.len());
            return Err(CompileError::Samples { given, expected, names: few(names) });
        }
        let samples = names.iter().zip(&self.samples).map(|(name, sample)| ((*name).to_owned(), sample.clone()));
        bindings.samples.extend(samples.collect::<BTreeMap<_, _>>());
        Ok(bindings)
    }
}

impl Compiled {
    /// Writes the plan to `path`, weights a tile at a time. `progress` is told how many bytes of weights are written.
    ///
    /// # Errors
    /// A source file that cannot be read, or a plan that cannot be written; an old plan at `path` stays.
    pub fn write(&self, path: &Path, mut progress: impl FnMut(u64)) -> Result<(), CompileError> {
        write_plan(path, &self.plan, |sink: &mut WeightSink<'_>| {
            let push = |bytes: &[u8]| {
                let position = sink.position();
                progress(position + bytes.len() as u64);
                sink.push(position, bytes)
            };
            Ok(image::write(&self.plan, &self.weights, push)?)
        })
    }
}

/// A warning where a plan's weights are much larger than the files that they are made from.
fn growth(manifest: &Manifest) -> Option<String> {
    const EXPECTED: u64 = 4;
    const FREE_BYTES: u64 = 64 << 20;
    let (files, weights) = (&manifest.files, manifest.image_bytes);
    // Files that are absent have no bytes, and noise for weights.
    let whole = files.iter().all(|file| file.bytes > 0);
    let bytes = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.bytes));
    (whole && weights > bytes.saturating_mul(EXPECTED).saturating_add(FREE_BYTES)).then(|| {
        format!(
            "the plan's weights take {weights} bytes, the model's files {bytes}: constants of the model are computed \
             from others, or stored in several forms"
        )
    })
}

/// The model's files, as recipes read them.
struct Weights {
    files: WeightFiles,
}

impl Weights {
    /// What of the files decided the plan; reads from here on only copy.
    fn fingerprint(&self) -> Result<Fingerprint, OnnxError> {
        let ranges = fingerprint::merged(self.files.end_of_decisions());
        let read = |file, offset, into: &mut [u8]| self.files.read_at(FileIndex(file), offset, into);
        let digest = fingerprint::digest(&ranges, read)?;
        Ok(Fingerprint { ranges, digest })
    }
}

impl WeightBytes for Weights {
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        let bytes = into.len() as u64;
        let read = self.files.read_at(FileIndex(file), offset, into);
        read.map_err(|error| WeightReadError { file, offset, bytes, why: error.to_string() })
    }
}
