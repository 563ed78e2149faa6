//! Reads plan files. Nothing is believed before its hash was checked, and nothing is checked that is not read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeOwned;

use crate::codec;
use crate::container::{self, FIXED_BYTES, Hash, Layout, Section, Span};
use crate::error::PlanError;
use crate::plan::Plan;
use crate::regular;
use crate::tensor::try_zeroed;
use crate::verify::verify;

/// Verified chunks kept in memory, so that small reads in a row hash each chunk about once.
const CACHED_CHUNKS: usize = 8;

/// An open plan: decoded and verified, but for the weights, which are read on demand. Threads may share it.
pub struct PlanFile {
    bytes: Chunks,
    plan: Plan,
}

impl PlanFile {
    /// Opens, checks and decodes a plan; of the weights, only their place and size are looked at.
    ///
    /// # Errors
    /// No plan, another format version, a cut or damaged file, or a plan that [`verify`] refuses.
    pub fn open(path: &Path) -> Result<Self, PlanError> {
        let bytes = Chunks::open(path)?;
        let plan = Plan {
            manifest: bytes.decode(Section::Manifest)?,
            programs: bytes.decode(Section::Programs)?,
            kernels: bytes.decode(Section::Kernels)?,
            code: bytes.decode(Section::Code)?,
            explanations: bytes.decode(Section::Explanations)?,
        };
        let weights = bytes.layout.span(Section::Weights);
        if plan.manifest.image_bytes != weights.bytes {
            let what = format!("the manifest says that it has {} bytes", plan.manifest.image_bytes);
            return Err(PlanError::Decode { section: Section::Weights.name(), offset: weights.offset, what });
        }
        verify(&plan).map_err(PlanError::Invalid)?;
        Ok(Self { bytes, plan })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan without its file.
    pub fn into_plan(self) -> Plan {
        self.plan
    }

    /// Where a section is in the file.
    pub fn span(&self, section: Section) -> Span {
        self.bytes.layout.span(section)
    }

    /// Copies verified bytes of the weights section, from `offset` on, into `out`.
    ///
    /// # Errors
    /// A range beyond the section, damaged bytes, or the file system's. `out` then holds nothing of use.
    pub fn read_weights(&self, offset: u64, out: &mut [u8]) -> Result<(), PlanError> {
        let span = self.span(Section::Weights);
        match offset.checked_add(out.len() as u64) {
            Some(end) if end <= span.bytes => self.bytes.read(span.offset + offset, out, Section::Weights.name()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(PlanError::OutsideWeights { first: offset, end, bytes: span.bytes })
            }
        }
    }

    /// Checks every byte of the file. `progress` is told the number of bytes checked so far, after each chunk.
    ///
    /// # Errors
    /// The first damaged chunk, or the file system's.
    pub fn verify_all(&self, mut progress: impl FnMut(u64)) -> Result<(), PlanError> {
        let (_, longest) = self.bytes.layout.chunk(0);
        let mut buffer = zeroed(longest - self.bytes.layout.body, "a chunk of the plan")?;
        for chunk in 0..self.bytes.layout.chunks {
            let (first, end) = self.bytes.layout.chunk(chunk);
            // Only the last one is shorter.
            buffer.truncate((end - first) as usize);
            self.bytes.read_chunk(chunk, &mut buffer, "body")?;
            progress(end);
        }
        Ok(())
    }
}

/// A file whose bytes are given out only after their chunks' hashes were checked.
struct Chunks {
    file: File,
    path: PathBuf,
    layout: Layout,
    hashes: Vec<Hash>,
    /// Private copies, oldest first. Copies and not marks, as the file may change after it was checked.
    cache: Mutex<Vec<(u64, Arc<Vec<u8>>)>>,
}

impl Chunks {
    fn open(path: &Path) -> Result<Self, PlanError> {
        let failed = |source| PlanError::Io { action: "open", path: path.to_owned(), source };
        let opened = regular::open(path).map_err(failed)?;
        let (file, actual) = opened.ok_or_else(|| PlanError::NotAFile { path: path.to_owned() })?;
        let mut start = vec![0; FIXED_BYTES.min(usize::try_from(actual).unwrap_or(FIXED_BYTES))];
        file.read_exact_at(&mut start, 0).map_err(failed)?;
        let fixed = container::parse_fixed(&start, actual)?;
        let mut head = zeroed(fixed.head_bytes, "the header of the plan")?;
        file.read_exact_at(&mut head, 0).map_err(failed)?;
        let (layout, hashes) = container::parse_head(&fixed, &head)?;
        Ok(Self { file, path: path.to_owned(), layout, hashes, cache: Mutex::default() })
    }

    fn decode<T: DeserializeOwned>(&self, section: Section) -> Result<T, PlanError> {
        let Span { offset, bytes } = self.layout.span(section);
        if bytes > codec::MAX_SECTION_BYTES {
            return Err(PlanError::TooLarge { section: section.name(), bytes, limit: codec::MAX_SECTION_BYTES });
        }
        let mut encoded = zeroed(bytes, section.name())?;
        self.read(offset, &mut encoded, section.name())?;
        codec::decode(&encoded).map_err(|what| PlanError::Decode { section: section.name(), offset, what })
    }

    /// Fills `out` from `offset` of the file; the range lies inside the body.
    fn read(&self, offset: u64, out: &mut [u8], what: &'static str) -> Result<(), PlanError> {
        let mut done = 0;
        while done < out.len() {
            let position = offset + done as u64;
            let chunk = (position - self.layout.body) / container::CHUNK_BYTES;
            let (first, end) = self.layout.chunk(chunk);
            let skipped = (position - first) as usize;
            let count = (end - position).min((out.len() - done) as u64) as usize;
            let target = &mut out[done..done + count];
            if count as u64 == end - first {
                // `out` is a private copy itself.
                self.read_chunk(chunk, target, what)?;
            } else {
                target.copy_from_slice(&self.cached(chunk, what)?[skipped..skipped + count]);
            }
            done += count;
        }
        Ok(())
    }

    /// A verified copy of a chunk.
    fn cached(&self, chunk: u64, what: &'static str) -> Result<Arc<Vec<u8>>, PlanError> {
        // A panic elsewhere leaves the list whole: every change of it is one call.
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = lock().iter().find(|entry| entry.0 == chunk) {
            return Ok(Arc::clone(bytes));
        }
        let (first, end) = self.layout.chunk(chunk);
        let mut bytes = zeroed(end - first, "a chunk of the plan")?;
        self.read_chunk(chunk, &mut bytes, what)?;
        let bytes = Arc::new(bytes);
        let mut cache = lock();
        if cache.len() >= CACHED_CHUNKS {
            cache.remove(0);
        }
        cache.push((chunk, Arc::clone(&bytes)));
        Ok(bytes)
    }

    /// Reads a whole chunk and checks it. `out` has its length.
    fn read_chunk(&self, chunk: u64, out: &mut [u8], what: &'static str) -> Result<(), PlanError> {
        let (first, end) = self.layout.chunk(chunk);
        self.file.read_exact_at(out, first).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => PlanError::Damaged { first, end, what },
            _ => PlanError::Io { action: "read", path: self.path.clone(), source },
        })?;
        let hash = blake3::hash(out);
        match self.hashes.get(chunk as usize) {
            Some(expected) if hash.as_bytes() == expected => Ok(()),
            _ => Err(PlanError::Damaged { first, end, what }),
        }
    }
}

fn zeroed(bytes: u64, what: &'static str) -> Result<Vec<u8>, PlanError> {
    usize::try_from(bytes).ok().and_then(try_zeroed).ok_or(PlanError::Memory { what, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;
    use crate::writer::write_plan;
    use proptest::prelude::*;

    fn written() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.plan");
        write_plan(&path, &sample::plan(), sample::push_weights).unwrap();
        (folder, path)
    }

    /// What opening and verifying a file with these bytes says.
    fn check(path: &Path, bytes: &[u8]) -> Result<(), PlanError> {
        std::fs::write(path, bytes).unwrap();
        PlanFile::open(path)?.verify_all(|_| {})
    }

    #[test]
    fn plans_round_trip() {
        let (_folder, path) = written();
        let file = PlanFile::open(&path).unwrap();
        assert_eq!(*file.plan(), sample::plan());
        let mut image = vec![0; 320];
        file.read_weights(0, &mut image).unwrap();
        assert_eq!(image, sample::image());
        let mut part = [0; 3];
        file.read_weights(255, &mut part).unwrap();
        assert_eq!(part, [0, 0xee, 0xee]);
        let mut checked = 0;
        file.verify_all(|bytes| checked = bytes).unwrap();
        assert_eq!(checked, std::fs::metadata(&path).unwrap().len());
    }

    #[test]
    fn writing_twice_gives_the_same_bytes() {
        let (_a, first) = written();
        let (_b, second) = written();
        assert_eq!(std::fs::read(first).unwrap(), std::fs::read(second).unwrap());
    }

    #[test]
    fn reads_beyond_the_weights_are_refused() {
        let (_folder, path) = written();
        let file = PlanFile::open(&path).unwrap();
        for offset in [318, 320, u64::MAX] {
            let error = file.read_weights(offset, &mut [0; 3]).unwrap_err();
            assert!(matches!(error, PlanError::OutsideWeights { bytes: 320, .. }), "{error}");
        }
        file.read_weights(320, &mut []).unwrap();
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let (_folder, path) = written();
        let bytes = std::fs::read(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let check = || PlanFile::open(&path)?.verify_all(|_| {});
        for (position, byte) in bytes.iter().enumerate() {
            file.write_all_at(&[byte ^ 1 << (position % 8)], position as u64).unwrap();
            assert!(check().is_err(), "byte {position}");
            file.write_all_at(&[*byte], position as u64).unwrap();
        }
        check().unwrap();
    }

    #[test]
    fn every_cut_is_found() {
        let (_folder, path) = written();
        let file = PlanFile::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let spans = container::SECTIONS.map(|section| file.span(section));
        let ends = spans.iter().flat_map(|span| [span.offset, span.offset + span.bytes]);
        for length in ends.chain((0..bytes.len() as u64).step_by(97)).chain(0..80).filter(|&at| at < bytes.len() as u64)
        {
            let error = check(&path, &bytes[..length as usize]).unwrap_err();
            let fine = if length == 0 {
                matches!(error, PlanError::NotAPlan)
            } else {
                matches!(error, PlanError::Cut { actual, .. } if actual == length)
            };
            assert!(fine, "{length}: {error}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(check(&path, &longer).unwrap_err(), PlanError::Trailing { extra: 1 }));
    }

    #[test]
    fn other_versions_are_named_before_anything_else() {
        let (_folder, path) = written();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        bytes[12..64].fill(0xff);
        let newer = check(&path, &bytes).unwrap_err().to_string();
        assert_eq!(newer, "the plan has format version 7, this program reads version 5; update this program");
        bytes[8..12].fill(0);
        assert!(check(&path, &bytes).unwrap_err().to_string().contains("compile the model again"));
        bytes[1] = b'P';
        assert!(matches!(check(&path, &bytes).unwrap_err(), PlanError::NotAPlan));
        assert!(matches!(PlanFile::open(path.parent().unwrap()), Err(PlanError::NotAFile { .. })));
    }

    /// Replaces a section's bytes, with hashes to match, as someone who wants to be believed would.
    fn forge(path: &Path, section: Section, change: impl FnOnce(&mut Vec<u8>)) -> PlanError {
        let file = PlanFile::open(path).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let mut parts = container::SECTIONS.map(|section| {
            let span = file.span(section);
            bytes[span.offset as usize..(span.offset + span.bytes) as usize].to_vec()
        });
        change(&mut parts[container::SECTIONS.iter().position(|&other| other == section).unwrap()]);
        let sizes = [0, 1, 2, 3, 4, 5].map(|position: usize| parts[position].len() as u64);
        let layout = Layout::new(sizes).unwrap();
        let mut body = vec![0; (layout.file_bytes - layout.body) as usize];
        for (part, span) in parts.iter().zip(layout.spans) {
            let first = (span.offset - layout.body) as usize;
            body[first..first + part.len()].copy_from_slice(part);
        }
        let hash: Hash = *blake3::hash(&body).as_bytes();
        check(path, &[layout.head(&[hash]), body].concat()).unwrap_err()
    }

    #[test]
    fn forged_sections_are_refused() {
        let (_folder, path) = written();
        let counts = [253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let hostile = forge(&path, Section::Programs, |bytes| *bytes = counts.to_vec());
        assert!(hostile.to_string().contains("section programs"), "{hostile}");
        let (_folder, path) = written();
        let trailing = forge(&path, Section::Kernels, |bytes| bytes.push(0));
        assert!(trailing.to_string().contains("1 byte left over"), "{trailing}");
        let (_folder, path) = written();
        let short = forge(&path, Section::Weights, |bytes| bytes.truncate(319));
        assert!(short.to_string().contains("the manifest says that it has 320 bytes"), "{short}");
        let (_folder, path) = written();
        let other = forge(&path, Section::Explanations, |bytes| *bytes = vec![0, 0, 0]);
        assert!(matches!(other, PlanError::Invalid(_)), "{other}");
    }

    #[test]
    fn damage_outside_of_what_is_read_does_no_harm() {
        let (_folder, path) = written();
        let (first, second) = (0xa5, container::CHUNK_BYTES as usize + 5);
        let image_bytes = container::CHUNK_BYTES * 2;
        let mut plan = sample::plan();
        plan.manifest.image_bytes = image_bytes;
        write_plan(&path, &plan, sample::push_weights).unwrap();
        let weights = PlanFile::open(&path).unwrap().span(Section::Weights).offset as usize;
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[weights + second] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let file = PlanFile::open(&path).unwrap();
        file.read_weights(first, &mut [0; 64]).unwrap();
        let error = file.read_weights(second as u64 + 9, &mut [0; 4]).unwrap_err();
        assert!(matches!(error, PlanError::Damaged { what: "weights", .. }), "{error}");
        let error = file.read_weights(0, &mut vec![0; image_bytes as usize]).unwrap_err();
        assert!(matches!(error, PlanError::Damaged { .. }), "{error}");
        assert!(file.verify_all(|_| {}).is_err());
    }

    #[test]
    fn threads_share_a_plan() {
        let (_folder, path) = written();
        let file = PlanFile::open(&path).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    for offset in (thread..300).step_by(7) {
                        let mut part = [0; 20];
                        file.read_weights(offset, &mut part).unwrap();
                        assert_eq!(part, sample::image()[offset as usize..offset as usize + 20]);
                    }
                });
            }
        });
    }

    /// The plan whose encoded sections were changed, if they still decode.
    fn mutated(changes: &[(usize, u8)]) -> Option<Plan> {
        fn change<T: serde::Serialize + DeserializeOwned>(value: &T, changes: &[(usize, u8)]) -> Option<T> {
            let mut bytes = codec::encode(value).ok()?;
            for &(position, byte) in changes {
                let position = position % bytes.len();
                bytes[position] = byte;
            }
            codec::decode(&bytes).ok()
        }
        let plan = sample::plan();
        let (half, rest) = changes.split_at(changes.len() / 2);
        Some(Plan {
            manifest: change(&plan.manifest, half)?,
            programs: change(&plan.programs, rest)?,
            kernels: change(&plan.kernels, half)?,
            code: plan.code,
            explanations: change(&plan.explanations, rest)?,
        })
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = codec::decode::<crate::plan::Manifest>(&bytes);
            let _ = codec::decode::<Vec<crate::plan::Program>>(&bytes);
            let _ = codec::decode::<Vec<crate::plan::Kernel>>(&bytes);
            let mut start = container::MAGIC.to_vec();
            start.extend(container::FORMAT_VERSION.to_le_bytes());
            start.extend(&bytes);
            let fixed = container::parse_fixed(&start[..FIXED_BYTES.min(start.len())], start.len() as u64);
            prop_assert!(fixed.is_err());
        }

        #[test]
        fn random_changes_never_panic(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
            if let Some(plan) = mutated(&changes) {
                let _ = verify(&plan);
                let _ = crate::text::text(&plan);
                let _ = crate::summary::summary(&plan);
            }
        }
    }
}
