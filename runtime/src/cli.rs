//! What the command lines `plan` and `compile` share: exit codes, reports, progress, and running a plan on given data.

mod allocator;
mod bench;
mod check;
mod completions;
mod doctor;
mod exit;
mod progress;
mod report;
mod run;
mod signals;

pub use allocator::Allocator;
pub use bench::{BenchFlags, BenchReport, StepReport, bench};
pub use check::{CheckReport, CheckedOutput, CheckedStep, check};
pub use completions::{Shell, completions};
pub use doctor::{DoctorReport, GpuFinding, LibraryFinding, doctor};
pub use exit::{Exit, Failure, exit_of_io, finish, print, print_json, warn};
pub use progress::{bytes_bar, spinner};
pub use report::{frozen_text, summary_text};
pub use run::{Data, DeviceFlags, OutputReport, RunReport, ToleranceFlags, choose_entry, run};

/// What comes before everything else in a command: how signals and too little memory end it.
pub fn start() {
    allocator::handle();
    signals::handle();
}
