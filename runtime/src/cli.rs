//! What the command lines `plan` and `compile` share: exit codes, reports, progress, and running a plan on given data.

mod bench;
mod check;
mod completions;
mod doctor;
mod exit;
mod progress;
mod report;
mod run;

pub use bench::{BenchFlags, BenchReport, StepReport, bench};
pub use check::{CheckReport, CheckedOutput, CheckedStep, check};
pub use completions::{Shell, completions};
pub use doctor::{DoctorReport, GpuFinding, LibraryFinding, doctor};
pub use exit::{Exit, Failure, finish, print};
pub use progress::{bytes_bar, spinner};
pub use report::{frozen_text, summary_text};
pub use run::{Data, DeviceFlags, OutputReport, RunReport, ToleranceFlags, choose_entry, run};
