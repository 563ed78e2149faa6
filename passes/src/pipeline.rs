//! The passes in their order, with the verifier after each.

use ir::{Module, verify::verify};

use crate::error::PassError;
use crate::settings::{Options, Settings};
use crate::{biases, exchange, fuse, layout, narrow, precision, recognise, select, shard, simplify};

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
    Pass { name: "narrow", run: narrow::run },
    Pass { name: "select", run: select::run },
];

/// Checks the names of passes.
///
/// # Errors
/// [`PassError::UnknownPass`], which lists the names there are.
pub fn check(options: &Options) -> Result<(), PassError> {
    let known: Vec<&str> = PIPELINE.iter().map(|pass| pass.name).collect();
    let named = [&options.stop_after, &options.print_after].into_iter().flatten();
    match named.into_iter().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(PassError::UnknownPass { name: name.clone(), known: known.join(", ") }),
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
    check(&settings.options)?;
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
        // What came in was verified: where the graph is wrong now, the pass is.
        module = (pass.run)(module, settings).map_err(|error| match error {
            PassError::Ir(error) => PassError::invalid(pass.name, error),
            error => error,
        })?;
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
    use super::*;
    use crate::harness::{CPU, Machine};

    fn run_with(options: Options) -> Result<Vec<String>, PassError> {
        let mut seen = Vec::new();
        let machine = Machine { options, ..Machine::new(CPU) };
        run(Module::default(), &machine.settings(), &mut |pass, _| seen.push(pass.to_owned()))?;
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

    #[test]
    fn what_is_wrong_with_a_graph_is_the_fault_of_its_pass() {
        fn wrong(module: Module, _: &Settings<'_>) -> Result<Module, PassError> {
            Err(ir::IrError::Graph { graph: module.name, why: "something".to_owned() }.into())
        }
        let row = Pass { name: "wrong", run: wrong };
        let error = advance(Module::default(), &[row], &Machine::new(CPU).settings(), &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, PassError::Invalid { pass: "wrong", .. }), "{error}");
    }
}
