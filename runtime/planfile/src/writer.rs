//! Writes plan files: beside the target, then renamed (see [`crate::replace`]), so that a plan is either whole or not there.

use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Serialize;

use crate::codec;
use crate::container::{CHUNK_BYTES, HASH_BYTES, Hash, Layout, SECTIONS, Section};
use crate::error::PlanError;
use crate::plan::{Manifest, Plan};
use crate::replace::Replacement;
use crate::verify::verify;

/// How the names of unfinished plans begin.
pub const PREFIX: &str = ".plan-";

/// Writes `plan` to `path`. `weights` pushes the bytes of the weights section, front to back.
///
/// The same plan and weights give the same bytes. The file at `path` is replaced at the very end, in one step: after
/// an error it is what it was.
///
/// # Errors
/// A plan that [`verify`] refuses, weights that do not fill their images, or the file system's; and whatever
/// `weights` returns.
pub fn write_plan<E: From<PlanError>>(
    path: &Path,
    plan: &Plan,
    weights: impl FnOnce(&mut WeightSink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    verify(plan).map_err(PlanError::Invalid)?;
    let mut beside = Replacement::new(path, PREFIX).map_err(PlanError::from)?;
    write_to(beside.file(), path, plan, weights)?;
    Ok(beside.finish_durably().map_err(PlanError::from)?)
}

/// Writes a plan to anything seekable, from its current beginning on; `path` is for messages.
fn write_to<W: Write + Seek, E: From<PlanError>>(
    out: W,
    path: &Path,
    plan: &Plan,
    weights: impl FnOnce(&mut WeightSink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |source| PlanError::Io { action: "write", path: path.to_owned(), source };
    let encoded = [
        encode(Section::Manifest, &plan.manifest)?,
        encode(Section::Programs, &plan.programs)?,
        encode(Section::Kernels, &plan.kernels)?,
        encode(Section::Code, &plan.code)?,
        encode(Section::Explanations, &plan.explanations)?,
    ];
    let mut sizes = [0; SECTIONS.len()];
    for (size, bytes) in sizes.iter_mut().zip(&encoded) {
        *size = bytes.len() as u64;
    }
    sizes[SECTIONS.len() - 1] = plan.manifest.image_bytes;
    let layout = Layout::new(sizes).ok_or(PlanError::TooLarge {
        section: Section::Weights.name(),
        bytes: plan.manifest.image_bytes,
        limit: i64::MAX as u64,
    })?;

    let mut body = Body::new(BufWriter::with_capacity(1 << 20, out), path, layout.body)?;
    for (span, bytes) in layout.spans.iter().zip(&encoded) {
        body.zeros_to(span.offset)?;
        body.write(bytes)?;
    }
    let first = layout.span(Section::Weights).offset;
    body.zeros_to(first)?;
    let mut sink =
        WeightSink { out: &mut body, first, bytes: plan.manifest.image_bytes, images: images(&plan.manifest) };
    weights(&mut sink)?;
    sink.finish()?;

    let (mut out, hashes) = body.finish();
    let head = layout.head(&hashes);
    out.seek(SeekFrom::Start(0)).map_err(failed)?;
    out.write_all(&head).map_err(failed)?;
    out.flush().map_err(failed)?;
    Ok(())
}

fn encode<T: Serialize>(section: Section, value: &T) -> Result<Vec<u8>, PlanError> {
    let encoded = codec::encode(value);
    let bytes = encoded.map_err(|what| PlanError::Decode { section: section.name(), offset: 0, what })?;
    if bytes.len() as u64 > codec::MAX_SECTION_BYTES {
        let (bytes, limit) = (bytes.len() as u64, codec::MAX_SECTION_BYTES);
        return Err(PlanError::TooLarge { section: section.name(), bytes, limit });
    }
    Ok(bytes)
}

/// Ranges of the weights section that some rank reads, ascending and disjoint.
fn images(manifest: &Manifest) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    for placed in &manifest.placed {
        let bytes = placed.ty.bytes().unwrap_or(0);
        ranges.extend(placed.images.iter().map(|&first| (first, first.saturating_add(bytes))));
    }
    ranges.retain(|&(first, end)| first < end);
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, end) in ranges {
        match merged.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((first, end)),
        }
    }
    merged
}

/// Takes the bytes of the weights section in ascending order, in pieces of any size.
pub struct WeightSink<'a> {
    out: &'a mut dyn Sequential,
    /// Where the section begins in the file.
    first: u64,
    bytes: u64,
    /// Ranges of the section that must be pushed; those before the position are gone from the front.
    images: Vec<(u64, u64)>,
}

impl WeightSink<'_> {
    /// First byte of the section that was not pushed yet.
    pub fn position(&self) -> u64 {
        self.out.position().saturating_sub(self.first)
    }

    /// Pushes `bytes` for `offset` of the section; bytes between the last push and `offset` become zeros.
    ///
    /// # Errors
    /// An offset before [`Self::position`], an end beyond the section, a gap where a rank's weight should be, or the
    /// file system's.
    pub fn push(&mut self, offset: u64, bytes: &[u8]) -> Result<(), PlanError> {
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| end <= self.bytes);
        let (Some(_), true) = (end, offset >= self.position()) else {
            let what = format!("{} bytes at {offset} of {}, after {} bytes", bytes.len(), self.bytes, self.position());
            return Err(PlanError::Weights { what });
        };
        self.skip_to(offset)?;
        self.out.write(bytes)
    }

    fn skip_to(&mut self, offset: u64) -> Result<(), PlanError> {
        let position = self.position();
        let passed = self.images.iter().take_while(|image| image.1 <= position).count();
        self.images.drain(..passed);
        if let Some(&(first, end)) = self.images.first()
            && first.max(position) < offset
        {
            let what = format!("bytes {}..{} of the section were left out", first.max(position), end.min(offset));
            return Err(PlanError::Weights { what });
        }
        self.out.zeros_to(self.first + offset)
    }

    fn finish(mut self) -> Result<(), PlanError> {
        self.skip_to(self.bytes)
    }
}

/// A file written front to back: what [`WeightSink`] needs of [`Body`], whatever it writes to.
trait Sequential {
    fn position(&self) -> u64;
    fn write(&mut self, bytes: &[u8]) -> Result<(), PlanError>;
    fn zeros_to(&mut self, offset: u64) -> Result<(), PlanError>;
}

/// Everything after the head, hashed by chunk as it is written.
struct Body<'a, W: Write + Seek> {
    out: BufWriter<W>,
    path: &'a Path,
    /// In the file.
    position: u64,
    hasher: blake3::Hasher,
    /// Bytes in `hasher`.
    hashed: u64,
    hashes: Vec<Hash>,
}

impl<'a, W: Write + Seek> Body<'a, W> {
    fn new(mut out: BufWriter<W>, path: &'a Path, first: u64) -> Result<Self, PlanError> {
        let seek = out.seek(SeekFrom::Start(first));
        seek.map_err(|source| PlanError::Io { action: "write", path: path.to_owned(), source })?;
        Ok(Self { out, path, position: first, hasher: blake3::Hasher::new(), hashed: 0, hashes: Vec::new() })
    }

    fn end_chunk(&mut self) {
        let hash: [u8; HASH_BYTES] = *self.hasher.finalize().as_bytes();
        self.hashes.push(hash);
        self.hasher.reset();
        self.hashed = 0;
    }

    fn finish(mut self) -> (BufWriter<W>, Vec<Hash>) {
        if self.hashed > 0 {
            self.end_chunk();
        }
        (self.out, self.hashes)
    }

    fn failed(&self, source: io::Error) -> PlanError {
        PlanError::Io { action: "write", path: self.path.to_owned(), source }
    }
}

impl<W: Write + Seek> Sequential for Body<'_, W> {
    fn position(&self) -> u64 {
        self.position
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), PlanError> {
        while !bytes.is_empty() {
            let room = CHUNK_BYTES - self.hashed;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.out.write_all(now).map_err(|source| self.failed(source))?;
            self.hasher.update(now);
            self.hashed += now.len() as u64;
            self.position += now.len() as u64;
            if self.hashed == CHUNK_BYTES {
                self.end_chunk();
            }
            bytes = later;
        }
        Ok(())
    }

    /// `offset` is not before the position.
    fn zeros_to(&mut self, offset: u64) -> Result<(), PlanError> {
        const ZEROS: [u8; 1 << 14] = [0; 1 << 14];
        while self.position < offset {
            let count = (offset - self.position).min(ZEROS.len() as u64);
            self.write(&ZEROS[..count as usize])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Cursor;

    use super::*;
    use crate::sample;

    /// Has room for so many bytes, like a full disk.
    struct Full {
        inner: Cursor<Vec<u8>>,
        room: u64,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.inner.position() + bytes.len() as u64 > self.room {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.inner.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Full {
        fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
            self.inner.seek(position)
        }
    }

    #[test]
    fn a_full_disk_is_an_error_at_every_point() {
        let plan = sample::plan();
        let mut whole = Cursor::new(Vec::new());
        write_to(&mut whole, Path::new("x"), &plan, sample::push_weights).unwrap();
        let needed = whole.into_inner().len() as u64;
        for room in [0, 100, 5000, needed - 1] {
            let full = Full { inner: Cursor::new(Vec::new()), room };
            let error = write_to(full, Path::new("x"), &plan, sample::push_weights).unwrap_err();
            assert!(error.to_string().contains("free some space"), "{error}");
        }
        let enough = Full { inner: Cursor::new(Vec::new()), room: needed };
        write_to(enough, Path::new("x"), &plan, sample::push_weights).unwrap();
    }

    #[test]
    fn after_a_failure_the_old_plan_is_there_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.plan");
        fs::write(&path, "old").unwrap();
        let error = write_plan(&path, &sample::plan(), |sink| {
            sink.push(0, &[1; 64])?;
            let source = io::ErrorKind::StorageFull.into();
            Err::<(), _>(PlanError::Io { action: "write", path: path.clone(), source })
        });
        assert!(matches!(error, Err(PlanError::Io { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_plan_that_contradicts_itself_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.plan");
        let mut plan = sample::plan();
        plan.programs[0].arena_bytes = 0;
        assert!(matches!(write_plan(&path, &plan, sample::push_weights), Err(PlanError::Invalid(_))));
        assert!(!path.exists());
    }

    #[test]
    fn devices_and_folders_are_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path(), Path::new("/dev/full")] {
            let error = write_plan(path, &sample::plan(), sample::push_weights).unwrap_err();
            assert!(error.to_string().contains("is not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("model.plan"), folder.path().join("link.plan"));
        fs::write(&path, "old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_plan(&link, &sample::plan(), sample::push_weights).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read(&path).unwrap().starts_with(&crate::container::MAGIC));
    }

    #[test]
    fn the_same_plan_has_the_same_bytes_however_weights_are_cut() {
        let plan = sample::plan();
        let mut once = Cursor::new(Vec::new());
        write_to(&mut once, Path::new("x"), &plan, sample::push_weights).unwrap();
        let mut bytewise = Cursor::new(Vec::new());
        let image = sample::image();
        write_to(&mut bytewise, Path::new("y"), &plan, |sink| {
            image.iter().enumerate().try_for_each(|(offset, byte)| sink.push(offset as u64, &[*byte]))
        })
        .unwrap();
        assert_eq!(once.into_inner(), bytewise.into_inner());
    }

    #[test]
    fn weights_must_come_whole_and_in_order() {
        let refused = |push: &dyn Fn(&mut WeightSink<'_>) -> Result<(), PlanError>| {
            write_to(Cursor::new(Vec::new()), Path::new("x"), &sample::plan(), push).unwrap_err().to_string()
        };
        let nothing = refused(&|_| Ok(()));
        assert!(nothing.contains("bytes 0..80 of the section were left out"), "{nothing}");
        let back = refused(&|sink| sink.push(0, &[0; 64]).and_then(|()| sink.push(8, &[0; 8])));
        assert!(back.contains("8 bytes at 8 of 320, after 64 bytes"), "{back}");
        let beyond = refused(&|sink| sink.push(0, &[0; 321]));
        assert!(beyond.contains("321 bytes at 0 of 320"), "{beyond}");
        let short = refused(&|sink| sink.push(0, &[0; 80]).and_then(|()| sink.push(256, &[0; 63])));
        assert!(short.contains("bytes 319..320 of the section were left out"), "{short}");
    }
}
