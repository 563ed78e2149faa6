//! What the command lines `plan` and `compile` share: exit codes, reports, progress, and running a plan on given data.

mod allocator;
mod bench;
mod check;
mod comparison;
mod completions;
mod doctor;
mod exit;
mod framed;
mod help;
mod progress;
mod report;
mod run;
mod signals;

pub use allocator::Allocator;
pub use bench::{BenchFlags, BenchReport, StepReport, bench};
pub use check::{CheckReport, CheckedOutput, CheckedStep, check};
pub use comparison::{ComparisonReport, HistogramBin, PartReport, ToleranceFlags, ToleranceReport, WouldPass};
pub use completions::{Shell, completions};
pub use doctor::{DoctorReport, GpuFinding, LibraryFinding, doctor};
pub use exit::{Exit, Failure, exit_of_io, finish, print, print_json, warn};
pub use help::{ENVIRONMENT, Program, Variable, described, parse, undescribed};
pub use progress::{bytes_bar, spinner};
pub use report::{frozen_text, summary_text};
pub use run::{Data, DeviceFlags, OutputReport, RunReport, choose_entry, run};

/// What comes before everything else in a command: how signals and too little memory end it.
pub fn start() {
    allocator::handle();
    signals::handle();
}

/// Starts the threads that evaluate weights and constants, one for each core. Left to themselves they start when first
/// needed, and a failure is then a panic.
///
/// # Errors
/// [`Exit::Invalid`] where the system has no room for them.
pub fn start_threads() -> Result<(), Failure> {
    let started = rayon::ThreadPoolBuilder::new().build_global();
    started.map_err(|error| {
        let what =
            format!("cannot start threads: {error}; raise `ulimit -v` or `ulimit -u`, or set RAYON_NUM_THREADS=1");
        Failure::new(Exit::Invalid, what)
    })
}
