//! Runs the passes in their order, with the verifier after each.

use ir::{Module, verify::verify};

use crate::error::PassError;
use crate::phase::{Logical, Phase, Scheduled, Sharded};
use crate::settings::{Options, Settings};
use crate::{FUSE, LOGICAL, SCHEDULE, SELECT, SHARD, SHARDED};

/// One row of the pipeline: from one phase to the next or within one, by value, so that nobody sees a half-rewritten
/// module.
#[derive(Clone, Copy, Debug)]
pub struct Pass<Before, After = Before> {
    pub name: &'static str,
    pub run: fn(Before, &Settings<'_>) -> Result<After, PassError>,
}

/// Names of all passes, in order.
pub fn names() -> impl Iterator<Item = &'static str> {
    let logical = LOGICAL.iter().map(|pass| pass.name).chain([SHARD.name]);
    logical.chain(SHARDED.iter().map(|pass| pass.name)).chain([FUSE.name, SELECT.name, SCHEDULE.name])
}

/// Checks the names of passes.
///
/// # Errors
/// [`PassError::UnknownPass`], which lists the names there are.
pub fn check(options: &Options) -> Result<(), PassError> {
    let named = [&options.stop_after, &options.print_after].into_iter().flatten();
    match named.into_iter().find(|name| !names().any(|known| known == name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let known = names().collect::<Vec<_>>().join(", ");
            Err(PassError::UnknownPass { name: name.clone(), known })
        }
    }
}

/// Runs passes one by one. Each result is verified and shown to the observer.
pub struct Pipeline<'a> {
    pub settings: Settings<'a>,
    pub observer: &'a mut dyn FnMut(&str, &Module),
}

impl Pipeline<'_> {
    /// One pass. `None` where the options make it the last.
    ///
    /// # Errors
    /// [`PassError::Invalid`] when the pass made a wrong module; whatever the pass reports.
    pub fn pass<Before, After: Phase>(
        &mut self,
        pass: &Pass<Before, After>,
        before: Before,
    ) -> Result<Option<After>, PassError> {
        let after = run(pass, before, &self.settings)?;
        verify(after.module()).map_err(|error| PassError::invalid(pass.name, error))?;
        (self.observer)(pass.name, after.module());
        Ok((!self.settings.options.stops_after(pass.name)).then_some(after))
    }

    /// Passes of one phase.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub fn passes<P: Phase>(&mut self, passes: &[Pass<P>], mut module: P) -> Result<Option<P>, PassError> {
        for pass in passes {
            match self.pass(pass, module)? {
                Some(after) => module = after,
                None => return Ok(None),
            }
        }
        Ok(Some(module))
    }

    /// From a rank's graph to memory.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub fn finish(&mut self, sharded: Sharded) -> Result<Option<Scheduled>, PassError> {
        let Some(sharded) = self.passes(SHARDED, sharded)? else { return Ok(None) };
        let Some(fused) = self.pass(&FUSE, sharded)? else { return Ok(None) };
        let Some(selected) = self.pass(&SELECT, fused)? else { return Ok(None) };
        self.pass(&SCHEDULE, selected)
    }
}

/// From whole tensors on the settings' mesh to memory, unseen and unverified: to know what it would cost.
///
/// # Errors
/// Whatever the passes report.
pub fn trial(logical: Logical, settings: &Settings<'_>) -> Result<Scheduled, PassError> {
    let mut sharded = run(&SHARD, logical, settings)?;
    for pass in SHARDED {
        sharded = run(pass, sharded, settings)?;
    }
    let selected = run(&SELECT, run(&FUSE, sharded, settings)?, settings)?;
    run(&SCHEDULE, selected, settings)
}

/// What came in was right: where the graph is wrong now, the pass is.
fn run<Before, After>(pass: &Pass<Before, After>, before: Before, settings: &Settings<'_>) -> Result<After, PassError> {
    (pass.run)(before, settings).map_err(|error| match error {
        PassError::Ir(error) => PassError::invalid(pass.name, error),
        error => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::{CPU, Machine};

    #[test]
    fn stops_where_it_is_told() {
        for last in names() {
            let options = Options { stop_after: Some(last.to_owned()), ..Options::default() };
            let machine = Machine { options, ..Machine::new(CPU) };
            let mut seen = Vec::new();
            let mut observer = |pass: &str, _: &Module| seen.push(pass.to_owned());
            let mut pipeline = Pipeline { settings: machine.settings(), observer: &mut observer };
            let logical = pipeline.passes(LOGICAL, Logical(Module::default())).unwrap();
            let sharded = logical.and_then(|logical| pipeline.pass(&SHARD, logical).unwrap());
            assert!(sharded.and_then(|sharded| pipeline.finish(sharded).unwrap()).is_none());
            assert_eq!(seen, names().take_while(|name| *name != last).chain([last]).collect::<Vec<_>>());
        }
    }

    #[test]
    fn lists_the_passes_when_one_is_unknown() {
        let options = Options { print_after: Some("simplfy".to_owned()), ..Options::default() };
        let message = check(&options).unwrap_err().to_string();
        assert!(message.contains("no pass `simplfy`") && message.contains("simplify"), "{message}");
    }

    #[test]
    fn what_is_wrong_with_a_graph_is_the_fault_of_its_pass() {
        fn wrong(logical: Logical, _: &Settings<'_>) -> Result<Logical, PassError> {
            Err(ir::IrError::Graph { graph: logical.0.name, why: "something".to_owned() }.into())
        }
        let row = Pass { name: "wrong", run: wrong };
        let error = run(&row, Logical(Module::default()), &Machine::new(CPU).settings()).unwrap_err();
        assert!(matches!(error, PassError::Invalid { pass: "wrong", .. }), "{error}");
    }
}
