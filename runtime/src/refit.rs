//! Puts new weights of the same graph into a plan, by the recipes that the plan keeps: the same bytes as compiling the
//! new model with the compiler that wrote the plan.
//!
//! That holds only while everything else of the model's files is what it was: the graph, and the constants whose values
//! the compiler looked at or kept. The plan has a hash of those (`planfile::fingerprint`); without a match there is an
//! error and no plan.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use cpu::recipe::{WeightBytes, WeightReadError};
use planfile::fingerprint::digest;
use planfile::plan::Plan;
use planfile::printable::printable;
use planfile::writer::{WeightSink, write_plan};
use planfile::{PlanError, SourceFile, regular, replace};
use thiserror::Error;

use crate::image::{self, ImageError};

/// Where the new weights are.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The folder with files named as those that the plan was made from; or the new model file, with its external data
    /// beside it.
    pub weights: &'a Path,
    /// External data may also lie below this folder, links included.
    pub external_data_root: Option<&'a Path>,
}

/// Why a plan was not refitted.
#[derive(Debug, Error)]
pub enum RefitError {
    #[error("the plan was made from no file, so there is nothing to refit; compile the model")]
    NoFiles,
    #[error("cannot {action} {}: {source}; the plan needs this file with its new weights", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("{} is not a regular file; put the weights there as a file", path.display())]
    NotAFile { path: PathBuf },
    #[error(
        "the plan names the source file `{name}`, which is not a plain path below the model's folder; compile the model"
    )]
    Location { name: String },
    #[error("{} leads outside of {}; move the file there, or allow a wider folder with `--external-data-root DIR`", path.display(), root.display())]
    Outside { path: PathBuf, root: PathBuf },
    #[error("{} has {links} hard links, so it may belong to another folder; copy it, or allow its folder with `--external-data-root DIR`", path.display())]
    HardLinked { path: PathBuf, links: u64 },
    #[error(
        "{} has {found_bytes} bytes, the plan was made from {expected_bytes}: the graph differs, or weights have other shapes or types; compile the model again",
        path.display()
    )]
    Size { path: PathBuf, expected_bytes: u64, found_bytes: u64 },
    #[error("the graph, or constants inside it that decided the plan, are not those it was made from; compile again")]
    Changed,
    #[error(
        "what the plan says of its source files does not fit together; it was not written by this compiler, compile again"
    )]
    Fingerprint,
    #[error(transparent)]
    Read(#[from] WeightReadError),
    #[error(transparent)]
    Image(#[from] ImageError<PlanError>),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Writes `plan` with the weights in `sources` to `out`, which may be the file that the plan came from. `progress` is
/// told how many bytes of weights are written. Where the model file is named itself, the plan takes its name.
///
/// # Errors
/// See [`RefitError`]; an old plan at `out` stays.
pub fn refit(
    mut plan: Plan,
    sources: Sources<'_>,
    out: &Path,
    mut progress: impl FnMut(u64),
) -> Result<(), RefitError> {
    replace::check(out).map_err(PlanError::from)?;
    let files = Files::open(&plan.manifest.files, sources)?;
    if let Some(model) = plan.manifest.files.first_mut() {
        model.name = printable(&files.model).into_owned();
    }
    let fingerprint = &plan.manifest.fingerprint;
    if !fingerprint.fits(&plan.manifest.files) {
        return Err(RefitError::Fingerprint);
    }
    let found = digest(&fingerprint.ranges, |file, offset, into: &mut [u8]| files.read(file, offset, into))?;
    if found != fingerprint.digest {
        return Err(RefitError::Changed);
    }
    write_plan(out, &plan, |sink: &mut WeightSink<'_>| {
        let push = |bytes: &[u8]| {
            let position = sink.position();
            progress(position + bytes.len() as u64);
            sink.push(position, bytes)
        };
        Ok(image::write(&plan, &files, push)?)
    })
}

/// The new files, by their number in the plan.
struct Files {
    /// Name of the model file.
    model: String,
    /// `None`: absent when the plan was made, and now.
    open: Vec<Option<File>>,
}

impl Files {
    fn open(recorded: &[SourceFile], sources: Sources<'_>) -> Result<Self, RefitError> {
        let Some(first) = recorded.first() else { return Err(RefitError::NoFiles) };
        if let Some(root) = sources.external_data_root {
            let failed = |source| RefitError::Io { path: root.to_owned(), action: "read the folder", source };
            fs::read_dir(root).map_err(failed)?;
        }
        let (folder, model, path) = if sources.weights.is_dir() {
            (sources.weights, first.name.clone(), below(sources.weights, &first.name)?)
        } else {
            let not_a_file = || RefitError::NotAFile { path: sources.weights.to_owned() };
            let name = sources.weights.file_name().ok_or_else(not_a_file)?.to_string_lossy().into_owned();
            let parent = sources.weights.parent().filter(|parent| !parent.as_os_str().is_empty());
            (parent.unwrap_or(Path::new(".")), name, sources.weights.to_owned())
        };
        let mut opened = vec![open(folder, path, first.bytes, true, sources)?];
        for SourceFile { name, bytes } in &recorded[1..] {
            opened.push(open(folder, below(folder, name)?, *bytes, false, sources)?);
        }
        Ok(Self { model, open: opened })
    }
}

/// The file that a plan names. A plan from elsewhere must not have any readable file of this machine copied into another
/// plan, so names stay below the folder, as they do for the compiler.
fn below(folder: &Path, name: &str) -> Result<PathBuf, RefitError> {
    let plain = |part| matches!(part, Component::Normal(_));
    if name.is_empty() || name.contains(['\0', '\\']) || !Path::new(name).components().all(plain) {
        return Err(RefitError::Location { name: name.to_owned() });
    }
    Ok(folder.join(name))
}

/// Opens a file of the recorded size.
fn open(
    folder: &Path,
    path: PathBuf,
    bytes: u64,
    is_model: bool,
    sources: Sources<'_>,
) -> Result<Option<File>, RefitError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| RefitError::Io { path, action, source }
    };
    let opened = match path.canonicalize() {
        Ok(opened) => opened,
        // Only a file that was absent when the plan was made has no bytes, and its weights are noise.
        Err(error) if error.kind() == io::ErrorKind::NotFound && bytes == 0 => return Ok(None),
        Err(error) => return Err(failed("find", &path)(error)),
    };
    let Some((file, _)) = regular::open(&opened).map_err(failed("open", &path))? else {
        return Err(RefitError::NotAFile { path });
    };
    let about = file.metadata().map_err(failed("look at", &path))?;
    // The user names the model file, by its folder or itself; the plan names the others.
    if !is_model {
        let root = sources.external_data_root.unwrap_or(folder);
        let canonical = root.canonicalize().map_err(failed("find", root))?;
        if !opened.starts_with(&canonical) {
            return Err(RefitError::Outside { path, root: root.to_owned() });
        }
        if about.nlink() > 1 && sources.external_data_root.is_none() {
            return Err(RefitError::HardLinked { path, links: about.nlink() });
        }
    }
    if about.len() != bytes {
        return Err(RefitError::Size { path, expected_bytes: bytes, found_bytes: about.len() });
    }
    Ok(Some(file))
}

impl WeightBytes for Files {
    fn read(&self, file: u32, offset: u64, into: &mut [u8]) -> Result<(), WeightReadError> {
        let error = |why: String| WeightReadError { file, offset, bytes: into.len() as u64, why };
        match self.open.get(file as usize) {
            Some(Some(handle)) => {
                let read = handle.read_exact_at(into, offset);
                read.map_err(|source| WeightReadError {
                    file,
                    offset,
                    bytes: into.len() as u64,
                    why: source.to_string(),
                })
            }
            Some(None) => Err(error("the file was absent when the plan was made".to_owned())),
            None => Err(error("the plan has no such file".to_owned())),
        }
    }
}
