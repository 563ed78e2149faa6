//! How a command ends: its exit code, and what is said about a failure.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use cpu::recipe::RecipeError;
use planfile::PlanError;
use planfile::printable::{printable_json, printable_lines};
use planfile::replace::ReplaceError;
use serde_json::Value;

use super::framed;
use crate::error::{RuntimeError, StepError};
use crate::image::ImageError;
use crate::refit::RefitError;
use crate::tensor_file::TensorFileError;
use cuda::CudaError;

/// Exit codes, as README.md states them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Success = 0,
    /// A comparison was beyond its tolerance, verification failed, or plans differ.
    Beyond = 1,
    /// The command line was wrong. clap uses the same.
    Usage = 2,
    /// The model, plan or input is invalid or not supported.
    Invalid = 3,
    /// A file could not be read or written.
    File = 4,
    /// A driver, a library or a GPU is missing, or does not fit the plan.
    Machine = 5,
    /// Our bug.
    Internal = 70,
}

impl Exit {
    /// Every exit code with what it means, as `--help` and README.md say it.
    pub const MEANINGS: [(&str, &str); 8] = [
        ("0", "success"),
        ("1", "a comparison was beyond its tolerance, verification failed, or plans differ"),
        ("2", "the command line was wrong"),
        ("3", "the model, plan or input is invalid or not supported, or there is too little memory for it"),
        (
            "4",
            "a file could not be read or written, a full disk and `ulimit -f` included; an older file at that place is untouched",
        ),
        ("5", "a driver, a library or a GPU is missing, or does not fit the plan"),
        ("70", "internal error: our bug"),
        ("128 + n", "signal n ended it: SIGHUP (1), SIGINT (2), SIGTERM (15) or SIGXCPU (24)"),
    ];
}

/// A command that failed. The message says what, where, and what to do next.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Self {
        let exit = match &error {
            PlanError::Io { source, .. } => exit_of_io(source),
            PlanError::Replace(error) => exit_of_replacing(error),
            PlanError::NotAFile { .. } => Exit::File,
            PlanError::OutsideWeights { .. } | PlanError::Weights { .. } => Exit::Internal,
            _ => Exit::Invalid,
        };
        Self::new(exit, error)
    }
}

/// A file that does not fit in memory could be read.
pub fn exit_of_io(error: &io::Error) -> Exit {
    if error.kind() == io::ErrorKind::OutOfMemory { Exit::Invalid } else { Exit::File }
}

fn exit_of_replacing(error: &ReplaceError) -> Exit {
    match error {
        ReplaceError::Io { source, .. } => exit_of_io(source),
        _ => Exit::File,
    }
}

impl From<ReplaceError> for Failure {
    fn from(error: ReplaceError) -> Self {
        Self::new(exit_of_replacing(&error), error)
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let error = match error {
            RuntimeError::Plan(error) => return error.into(),
            other => other,
        };
        let exit = match &error {
            RuntimeError::Step { source: StepError::Contradiction { .. } | StepError::Abandoned, .. }
            | RuntimeError::Contradiction { .. }
            | RuntimeError::Broken
            | RuntimeError::Panicked { .. } => Exit::Internal,
            RuntimeError::Cuda(source)
            | RuntimeError::Rank { source, .. }
            | RuntimeError::Step { source: StepError::Cuda(source), .. } => exit_of(source),
            RuntimeError::TooFewGpus { .. }
            | RuntimeError::NoSuchGpu { .. }
            | RuntimeError::Architecture { .. }
            | RuntimeError::GpuMemory { .. }
            | RuntimeError::OtherVersion { .. } => Exit::Machine,
            RuntimeError::GpuCount { .. }
            | RuntimeError::SameGpu { .. }
            | RuntimeError::OnlyOnGpus { .. }
            | RuntimeError::TooManyThreads { .. } => Exit::Usage,
            RuntimeError::Plan(_)
            | RuntimeError::Step { .. }
            | RuntimeError::NotForGpus { .. }
            | RuntimeError::UnknownEntry { .. }
            | RuntimeError::MissingInput { .. }
            | RuntimeError::UnknownInput { .. }
            | RuntimeError::InputDType { .. }
            | RuntimeError::InputShape { .. }
            | RuntimeError::FrozenInput { .. }
            | RuntimeError::Memory { .. }
            | RuntimeError::Thread { .. }
            | RuntimeError::Threads { .. } => Exit::Invalid,
        };
        Self::new(exit, error)
    }
}

/// Whose fault an error of a CUDA library is.
fn exit_of(error: &CudaError) -> Exit {
    match error {
        CudaError::Contradiction { .. } | CudaError::Compile { .. } | CudaError::Abandoned => Exit::Internal,
        CudaError::Absent { .. }
        | CudaError::GivenAbsent { .. }
        | CudaError::Symbol { .. }
        | CudaError::Call { .. }
        | CudaError::Refused { .. } => Exit::Machine,
    }
}

impl From<RefitError> for Failure {
    fn from(error: RefitError) -> Self {
        let exit = match error {
            RefitError::Plan(error) | RefitError::Image(ImageError::Sink(error)) => return error.into(),
            RefitError::NotAFile { .. }
            | RefitError::Read(_)
            | RefitError::Image(ImageError::Recipe { source: RecipeError::Read(_), .. }) => Exit::File,
            RefitError::Io { ref source, .. } => exit_of_io(source),
            RefitError::NoFiles
            | RefitError::Location { .. }
            | RefitError::Outside { .. }
            | RefitError::HardLinked { .. }
            | RefitError::Size { .. }
            | RefitError::Changed
            | RefitError::Fingerprint
            | RefitError::Image(_) => Exit::Invalid,
        };
        Self::new(exit, error)
    }
}

impl From<TensorFileError> for Failure {
    fn from(error: TensorFileError) -> Self {
        let exit = match &error {
            TensorFileError::Io { source, .. } => exit_of_io(source),
            TensorFileError::Replace(error) => exit_of_replacing(error),
            TensorFileError::NotAFile { .. } => Exit::File,
            TensorFileError::TooLarge { .. }
            | TensorFileError::Memory { .. }
            | TensorFileError::Gap { .. }
            | TensorFileError::NotATensor { .. }
            | TensorFileError::NotAnArchive { .. }
            | TensorFileError::Array { .. }
            | TensorFileError::NoInputs { .. } => Exit::Invalid,
        };
        Self::new(exit, error)
    }
}

/// Reports a failure on standard error; the exit code.
pub fn finish(outcome: Result<Exit, Failure>) -> ExitCode {
    let exit = outcome.unwrap_or_else(|failure| {
        let message = printable_lines(&failure.message);
        let _ = write!(io::stderr(), "{}", framed::for_standard_error(&message));
        failure.exit
    });
    ExitCode::from(exit as u8)
}

/// Says something on standard error that does not end the command.
pub fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "warning: {}", printable_lines(text));
}

/// Writes to standard output, control characters shown: names of a model or plan must not command a terminal. A reader
/// that has gone, such as `head`, is no failure.
///
/// # Errors
/// [`Exit::File`], disk full included.
pub fn print(text: &str) -> Result<(), Failure> {
    write(&printable_lines(text))
}

/// As [`print`], a report for programs.
///
/// # Errors
/// As [`print`].
pub fn print_json(report: &Value) -> Result<(), Failure> {
    write(&printable_json(&format!("{report:#}\n")))
}

fn write(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::File, format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use cpu::CpuError;

    use super::*;

    #[test]
    fn faults_of_files_of_users_and_of_ours_are_told_apart() {
        let io = |kind| PlanError::Io { action: "write", path: PathBuf::from("x.plan"), source: io::Error::from(kind) };
        assert_eq!(Failure::from(io(io::ErrorKind::StorageFull)).exit, Exit::File);
        assert_eq!(Failure::from(RuntimeError::from(PlanError::NotAPlan)).exit, Exit::Invalid);
        let step = |source| RuntimeError::Step { rank: 0, program: 0, step: 0, origin: vec![], source };
        let index = CpuError::Index { op: "gather", axis: 0, index: 9, bound: 4 };
        assert_eq!(Failure::from(step(index.into())).exit, Exit::Invalid);
        assert_eq!(Failure::from(step(StepError::Abandoned)).exit, Exit::Internal);
        let error = TensorFileError::NoInputs { path: PathBuf::from("x") };
        assert_eq!(Failure::from(error).exit, Exit::Invalid);
    }
}
