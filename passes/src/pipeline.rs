//! The passes in their order, with the verifier after each.

use cpu::recipe::WeightBytes;
use ir::{Module, verify::verify};
use planfile::{DType, Target};

use crate::error::PassError;
use crate::shard::{self, ShardOptions};
use crate::{biases, exchange, fuse, layout, precision, recognise, select, simplify};

/// One row of the pipeline: a function over the module, by value, so that nobody sees a half-rewritten one.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    pub name: &'static str,
    pub run: fn(Module, &Settings<'_>) -> Result<Module, PassError>,
}

/// From the imported module to the one that is scheduled.
pub const PIPELINE: &[Pass] = &[
    Pass { name: "simplify", run: simplify::run },
    Pass { name: "recognise", run: recognise::run },
    Pass { name: "precision", run: precision::run },
    Pass { name: "shard", run: shard::run },
    Pass { name: "fuse", run: fuse::run },
    Pass { name: "biases", run: biases::run },
    Pass { name: "layout", run: layout::run },
    Pass { name: "exchange", run: exchange::run },
    Pass { name: "select", run: select::run },
];

/// What passes know beside the module.
#[derive(Clone)]
pub struct Settings<'a> {
    /// The files behind the module's weights.
    pub weights: &'a dyn WeightBytes,
    pub options: Options,
    pub shard: ShardOptions,
    /// The machine that is compiled for.
    pub target: &'a Target,
}

/// What the command line says about the pipeline itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Name of the last pass to run; all if none.
    pub stop_after: Option<String>,
    /// Name of the pass whose result is shown. [`run`] only checks that there is one: who observes shows.
    pub print_after: Option<String>,
    /// Element type to convert the model to; as the model says if none.
    pub dtype: Option<DType>,
    /// Whether products of `f32` may round their operands to TF32, where the device is faster so.
    pub allow_tf32: bool,
}

impl Options {
    /// Checks the names of passes.
    ///
    /// # Errors
    /// [`PassError::UnknownPass`], which lists the names there are.
    pub fn check(&self) -> Result<(), PassError> {
        let known: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).collect();
        let named = [&self.stop_after, &self.print_after].into_iter().flatten();
        match named.into_iter().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(PassError::UnknownPass { name: name.clone(), known: known.join(", ") }),
        }
    }

    /// Whether the result of this pass is to be shown.
    pub fn prints_after(&self, pass: &str) -> bool {
        self.print_after.as_deref() == Some(pass)
    }

    /// Whether this pass is the last.
    pub fn stops_after(&self, pass: &str) -> bool {
        self.stop_after.as_deref() == Some(pass)
    }
}

/// Runs the passes up to the one that the options name. `observer` sees the result of each, verified.
///
/// # Errors
/// [`PassError::UnknownPass`] before anything runs; [`PassError::Ir`] when the module that comes in is wrong;
/// [`PassError::Invalid`] when a pass made a wrong one; whatever the passes report.
pub fn run(
    module: Module,
    settings: &Settings<'_>,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<Module, PassError> {
    settings.options.check()?;
    verify(&module)?;
    advance(module, PIPELINE, settings, observer).map(|(module, _)| module)
}

/// Runs these rows; says whether one of them was to be the last.
pub(crate) fn advance(
    mut module: Module,
    rows: &[Pass],
    settings: &Settings<'_>,
    observer: &mut dyn FnMut(&str, &Module),
) -> Result<(Module, bool), PassError> {
    for pass in rows {
        module = (pass.run)(module, settings)?;
        verify(&module).map_err(|error| PassError::Invalid { pass: pass.name, why: error.to_string() })?;
        observer(pass.name, &module);
        if settings.options.stops_after(pass.name) {
            return Ok((module, true));
        }
    }
    Ok((module, false))
}

#[cfg(test)]
mod tests {
    use cpu::recipe::NoFiles;
    use ir::Mesh;

    use super::*;
    use crate::shard::{MeshChoice, SPLIT_TABLE_BYTES};

    const CPU: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/targets/cpu.json"));

    fn run_with(options: Options) -> Result<Vec<String>, PassError> {
        let mut seen = Vec::new();
        let target = Target::from_json(CPU).unwrap();
        let mesh = MeshChoice::Fixed(Mesh::default());
        let shard = ShardOptions { mesh, split_table_bytes: SPLIT_TABLE_BYTES, batch_dim: 0 };
        let settings = Settings { weights: &NoFiles, options, shard, target: &target };
        run(Module::default(), &settings, &mut |pass, _| seen.push(pass.to_owned()))?;
        Ok(seen)
    }

    #[test]
    fn stops_where_it_is_told() {
        let options = Options { stop_after: Some("simplify".to_owned()), ..Options::default() };
        assert_eq!(run_with(options).unwrap(), ["simplify"]);
    }

    #[test]
    fn lists_the_passes_when_one_is_unknown() {
        let options = Options { print_after: Some("simplfy".to_owned()), ..Options::default() };
        let message = run_with(options).unwrap_err().to_string();
        assert!(message.contains("no pass `simplfy`") && message.contains("simplify"), "{message}");
    }
}
