//! The files whose bytes a model's weights are: the model file itself, then its external data, each named once.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use planfile::fingerprint::FileRange;
use planfile::printable::printable;
use planfile::regular;

use crate::error::{ExternalProblem, OnnxError};
use crate::load::LoadOptions;
use crate::messages::StringStringEntryProto;
use crate::tensor_data::TensorSource;

/// Index into [`crate::load::Model::files`]; 0 is the model file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex(pub u32);

/// A file that holds weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Relative to the model's folder, so the same from any working folder: the model file's name, or the location that
    /// the model gives.
    pub path: String,
    /// Bytes; 0 when absent.
    pub len: u64,
    /// The file is not there, which [`LoadOptions::allow_missing_weights`] allowed; ranges in it cannot be read.
    pub absent: bool,
    /// First byte and end of what loading read of it, which counts as looked at: see [`WeightFiles::end_of_decisions`].
    pub read_on_loading: Vec<(u64, u64)>,
    /// Where it is opened on this machine.
    opened: PathBuf,
}

/// Collects source files while a model is read.
#[derive(Debug)]
pub(crate) struct SourceFiles<'a> {
    files: Vec<SourceFile>,
    by_location: BTreeMap<String, FileIndex>,
    folder: PathBuf,
    options: &'a LoadOptions,
}

impl<'a> SourceFiles<'a> {
    /// `read`: what was read of the model file to make its messages.
    pub(crate) fn new(model: &Path, len: u64, read: Vec<(u64, u64)>, options: &'a LoadOptions) -> Self {
        let folder = match model.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            Some(_) | None => PathBuf::from("."),
        };
        let name = model.file_name().map(|name| printable(&name.to_string_lossy()).into_owned()).unwrap_or_default();
        let file = SourceFile { path: name, len, absent: false, read_on_loading: read, opened: model.to_owned() };
        Self { files: vec![file], by_location: BTreeMap::new(), folder, options }
    }

    /// Whether the model names any file besides itself.
    pub(crate) fn have_external(&self) -> bool {
        self.files.len() > 1
    }

    pub(crate) fn into_files(self) -> Vec<SourceFile> {
        self.files
    }

    /// Opens all files, to read data of `sources` now.
    pub(crate) fn open_for(&mut self, sources: [&TensorSource; 2]) -> Result<WeightFiles, OnnxError> {
        for source in sources {
            if let TensorSource::FileRange { file, offset, length } = source
                && let Some(file) = self.files.get_mut(file.0 as usize)
            {
                file.read_on_loading.push((*offset, offset.saturating_add(*length)));
            }
        }
        WeightFiles::open(&self.files)
    }

    /// Resolves the external data of `tensor`, which takes `expected` bytes.
    pub(crate) fn external(
        &mut self,
        entries: &[StringStringEntryProto],
        tensor: &str,
        expected: u64,
    ) -> Result<TensorSource, OnnxError> {
        let mut location = None;
        let (mut offset, mut length) = (0, None);
        for entry in entries {
            let number = || {
                entry.value.parse::<u64>().map_err(|_| {
                    let problem = ExternalProblem::NotANumber { key: entry.key.clone(), value: entry.value.clone() };
                    external_error(tensor, location.unwrap_or_default(), problem)
                })
            };
            match entry.key.as_str() {
                "location" => location = Some(entry.value.as_str()),
                "offset" => offset = number()?,
                "length" => length = Some(number()?),
                // A checksum, or an exporter's own key.
                _ => {}
            }
        }
        let location = location.filter(|location| !location.is_empty());
        let location = location.ok_or_else(|| external_error(tensor, "", ExternalProblem::NoLocation))?;
        let file = match self.by_location.get(location) {
            Some(&file) => file,
            None => {
                let source_file = self.resolve(tensor, location)?;
                let file = FileIndex(u32::try_from(self.files.len()).unwrap_or(u32::MAX));
                self.files.push(source_file);
                self.by_location.insert(location.to_owned(), file);
                file
            }
        };
        let SourceFile { len, absent, .. } = self.files[file.0 as usize];
        let length = length.unwrap_or(expected);
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > len && !absent) {
            let problem = ExternalProblem::PastEnd { offset, length, file_bytes: len };
            return Err(external_error(tensor, location, problem));
        }
        Ok(TensorSource::FileRange { file, offset, length })
    }

    /// Finds the file at `location` and makes sure that it is one the model may read: otherwise a model from elsewhere
    /// could have any readable file of this machine copied into a plan.
    fn resolve(&self, tensor: &str, location: &str) -> Result<SourceFile, OnnxError> {
        let fail = |problem| external_error(tensor, location, problem);
        let relative = Path::new(location);
        let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if location.contains('\\') || location.contains(char::is_control) || !relative.components().all(plain) {
            return Err(fail(ExternalProblem::NotRelative));
        }
        let path: PathBuf = relative.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        let joined = self.folder.join(&path);
        let name = path.to_string_lossy().into_owned();
        let opened = match joined.canonicalize() {
            Ok(opened) => opened,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if self.options.allow_missing_weights {
                    let read_on_loading = Vec::new();
                    return Ok(SourceFile { path: name, len: 0, absent: true, read_on_loading, opened: joined });
                }
                return Err(OnnxError::MissingWeights { tensor: tensor.to_owned(), path: joined });
            }
            Err(source) => return Err(OnnxError::Io { path: joined, action: "find", source }),
        };
        let is_below = |root: &PathBuf| -> Result<bool, OnnxError> {
            let canonical = root.canonicalize();
            let found = canonical.map_err(|source| OnnxError::Io { path: root.clone(), action: "find", source })?;
            Ok(opened.starts_with(&found))
        };
        let root = self.options.external_data_root.as_ref();
        let is_trusted = root.map(is_below).transpose()?.unwrap_or(false);
        if !is_trusted && !is_below(&self.folder)? {
            let root = root.unwrap_or(&self.folder).clone();
            return Err(fail(ExternalProblem::Outside { root }));
        }
        let about =
            opened.metadata().map_err(|source| OnnxError::Io { path: opened.clone(), action: "look at", source })?;
        if !about.is_file() {
            return Err(fail(ExternalProblem::NotAFile));
        }
        if about.nlink() > 1 && !is_trusted {
            return Err(fail(ExternalProblem::HardLinked { links: about.nlink() }));
        }
        Ok(SourceFile { path: name, len: about.len(), absent: false, read_on_loading: Vec::new(), opened })
    }
}

fn external_error(tensor: &str, location: &str, problem: ExternalProblem) -> OnnxError {
    let location = printable(location).into_owned();
    OnnxError::ExternalData { tensor: tensor.to_owned(), location, problem }
}

/// The source files of a model, open for positioned reads from any thread.
#[derive(Debug)]
pub struct WeightFiles {
    /// `None`: absent.
    files: Vec<(SourceFile, Option<File>)>,
    /// What was read so far, in order; `None` once nobody asks any more.
    looked_at: Mutex<Option<Vec<FileRange>>>,
}

impl WeightFiles {
    /// Opens `files` ([`crate::load::Model::files`]); absent ones fail only when they are read.
    ///
    /// # Errors
    /// When a file cannot be opened, or its length is no longer that which was loaded.
    pub fn open(files: &[SourceFile]) -> Result<Self, OnnxError> {
        let open = |file: &SourceFile| {
            if file.absent {
                return Ok((file.clone(), None));
            }
            let io_error = |action, source| OnnxError::Io { path: file.opened.clone(), action, source };
            let opened = regular::open(&file.opened).map_err(|source| io_error("open", source))?;
            let not_a_file = || OnnxError::NotAFile { path: file.opened.clone() };
            let (handle, found_bytes) = opened.ok_or_else(not_a_file)?;
            if found_bytes != file.len {
                let path = file.opened.clone();
                return Err(OnnxError::FileChanged { path, expected_bytes: file.len, found_bytes });
            }
            Ok((file.clone(), Some(handle)))
        };
        let range = |file, &(first, end): &(u64, u64)| FileRange { file, first, end };
        let of_file = |(number, file): (u32, &SourceFile)| -> Vec<FileRange> {
            file.read_on_loading.iter().map(|read| range(number, read)).collect()
        };
        let looked_at = (0..).zip(files).flat_map(of_file).collect();
        Ok(Self { files: files.iter().map(open).collect::<Result<_, _>>()?, looked_at: Mutex::new(Some(looked_at)) })
    }

    /// Everything that was read so far, which a plan made from it depends on; reads from here on are not recorded.
    pub fn end_of_decisions(&self) -> Vec<FileRange> {
        // A panic elsewhere leaves the list whole: every change of it is one call.
        self.looked_at.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }

    /// Fills `buffer` from byte `offset` of `file` on.
    ///
    /// # Errors
    /// When the file is absent, shorter than that, or cannot be read.
    pub fn read_at(&self, file: FileIndex, offset: u64, buffer: &mut [u8]) -> Result<(), OnnxError> {
        let length = buffer.len() as u64;
        let Some((source_file, handle)) = self.files.get(file.0 as usize) else {
            return Err(OnnxError::OutOfRange { file: file.0, offset, length, file_bytes: 0 });
        };
        let Some(handle) = handle else {
            return Err(OnnxError::AbsentFile { path: source_file.opened.clone() });
        };
        if offset.checked_add(length).is_none_or(|end| end > source_file.len) {
            return Err(OnnxError::OutOfRange { file: file.0, offset, length, file_bytes: source_file.len });
        }
        let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(looked_at) = looked_at.as_mut() {
            looked_at.push(FileRange { file: file.0, first: offset, end: offset + length });
        }
        drop(looked_at);
        handle.read_exact_at(buffer, offset).map_err(|source| OnnxError::Io {
            path: source_file.opened.clone(),
            action: "read",
            source,
        })
    }

    /// Fills `buffer` from byte `offset` of a tensor's data on, wherever that lies.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn read_tensor(&self, source: &TensorSource, offset: u64, buffer: &mut [u8]) -> Result<(), OnnxError> {
        let wanted = buffer.len() as u64;
        let outside = |file_bytes| OnnxError::OutOfRange { file: u32::MAX, offset, length: wanted, file_bytes };
        match source {
            TensorSource::Bytes(bytes) => {
                let start = usize::try_from(offset).map_err(|_| outside(bytes.len() as u64))?;
                let end = start.checked_add(buffer.len()).ok_or_else(|| outside(bytes.len() as u64))?;
                let part = bytes.get(start..end).ok_or_else(|| outside(bytes.len() as u64))?;
                buffer.copy_from_slice(part);
                Ok(())
            }
            TensorSource::FileRange { file, offset: base, length } => {
                if offset.checked_add(wanted).is_none_or(|end| end > *length) {
                    return Err(outside(*length));
                }
                self.read_at(*file, base + offset, buffer)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::load::load;
    use crate::messages::ModelProto;
    use crate::samples::{Saved, external, graph, model, node, save};

    /// `y = x + w`, with `w: f32[2]` in another file.
    fn with_external(entries: &[(&str, &str)]) -> ModelProto {
        let mut graph = graph(vec![node("Add", &["x", "w"], &["y"])]);
        graph.initializer.push(external("w", &[2], entries));
        model(graph)
    }

    fn problem(saved: &Saved) -> ExternalProblem {
        match load(&saved.path, &LoadOptions::default()).unwrap_err() {
            OnnxError::ExternalData { tensor, problem, .. } if tensor == "w" => problem,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_ranges_of_another_file() {
        let saved = save(&with_external(&[("location", "sub/w.bin"), ("offset", "4"), ("checksum", "ignored")]));
        fs::create_dir(saved.folder.path().join("sub")).unwrap();
        fs::write(saved.folder.path().join("sub/w.bin"), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]).unwrap();
        let model = load(&saved.path, &LoadOptions::default()).unwrap();
        let names: Vec<&str> = model.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(names, ["model.onnx", "sub/w.bin"]);
        let files = WeightFiles::open(&model.files).unwrap();
        let source = &model.graph.initializers[0].tensor.source;
        let mut buffer = [0; 3];
        files.read_tensor(source, 5, &mut buffer).unwrap();
        assert_eq!(buffer, [9, 10, 11]);
        assert!(matches!(files.read_tensor(source, 6, &mut buffer), Err(OnnxError::OutOfRange { .. })));
        fs::write(saved.folder.path().join("sub/w.bin"), [0]).unwrap();
        assert!(matches!(WeightFiles::open(&model.files), Err(OnnxError::FileChanged { found_bytes: 1, .. })));
    }

    #[test]
    fn locations_outside_of_the_folder_are_refused() {
        for location in ["/etc/passwd", "../w.bin", "sub/../../w.bin", "a\\b", "w\u{1b}[2J.bin", "w\n", "w\0"] {
            assert_eq!(problem(&save(&with_external(&[("location", location)]))), ExternalProblem::NotRelative);
        }
        assert_eq!(problem(&save(&with_external(&[("offset", "0")]))), ExternalProblem::NoLocation);
    }

    #[test]
    fn links_that_lead_outside_need_a_root() {
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("w.bin");
        fs::write(&target, [0; 8]).unwrap();
        let saved = save(&with_external(&[("location", "w.bin")]));
        let link = saved.folder.path().join("w.bin");
        let with_root = LoadOptions { external_data_root: Some(elsewhere.path().to_owned()), ..LoadOptions::default() };
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(matches!(problem(&saved), ExternalProblem::Outside { .. }));
        load(&saved.path, &with_root).unwrap();
        // A root elsewhere does not forbid what lies beside the model.
        fs::remove_file(&link).unwrap();
        fs::write(&link, [0; 8]).unwrap();
        load(&saved.path, &with_root).unwrap();
        fs::remove_file(&link).unwrap();
        fs::hard_link(&target, &link).unwrap();
        assert_eq!(problem(&saved), ExternalProblem::HardLinked { links: 2 });
        // Nor does it allow a hard link outside of itself.
        assert!(matches!(load(&saved.path, &with_root), Err(OnnxError::ExternalData { .. })));
        let with_root =
            LoadOptions { external_data_root: Some(saved.folder.path().to_owned()), ..LoadOptions::default() };
        load(&saved.path, &with_root).unwrap();
    }

    #[test]
    fn a_folder_is_not_a_weight_file() {
        let saved = save(&with_external(&[("location", "w.bin")]));
        fs::create_dir(saved.folder.path().join("w.bin")).unwrap();
        assert_eq!(problem(&saved), ExternalProblem::NotAFile);
    }

    #[test]
    fn ranges_are_checked() {
        for (offset, length) in [("4", "8"), ("18446744073709551615", "8"), ("9", "0")] {
            let saved = save(&with_external(&[("location", "w.bin"), ("offset", offset), ("length", length)]));
            fs::write(saved.folder.path().join("w.bin"), [0; 8]).unwrap();
            assert!(matches!(problem(&saved), ExternalProblem::PastEnd { file_bytes: 8, .. }));
        }
        let negative = save(&with_external(&[("location", "w.bin"), ("offset", "-4")]));
        assert!(matches!(problem(&negative), ExternalProblem::NotANumber { .. }));
        let short = save(&with_external(&[("location", "w.bin"), ("length", "4")]));
        fs::write(short.folder.path().join("w.bin"), [0; 8]).unwrap();
        let error = load(&short.path, &LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("wrong length: 4 bytes for f32[2]"), "{error}");
    }

    #[test]
    fn missing_weights_are_an_error_unless_allowed() {
        let saved = save(&with_external(&[("location", "w.bin"), ("offset", "64")]));
        let error = load(&saved.path, &LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("w.bin") && error.contains("--weights random:SEED"), "{error}");
        let options = LoadOptions { allow_missing_weights: true, ..LoadOptions::default() };
        let model = load(&saved.path, &options).unwrap();
        assert!(model.files[1].absent);
        let files = WeightFiles::open(&model.files).unwrap();
        let source = &model.graph.initializers[0].tensor.source;
        assert!(matches!(files.read_tensor(source, 0, &mut [0; 8]), Err(OnnxError::AbsentFile { .. })));
    }

    #[test]
    fn weight_files_may_be_shared_between_threads() {
        fn assert_shared<T: Send + Sync>() {}
        assert_shared::<WeightFiles>();
    }
}
