//! What of a model's files decided a plan, so that new weights can be told from another model.
//!
//! A plan copies most bytes of its source files without looking at them, or has no use for them: a file may hold the
//! weights of other models too. It depends on what was read while it was compiled: the graph itself, constants kept in
//! the plan, and weights whose values the compiler looked at. While those are the same, compiling again makes the same
//! plan but for the bytes of its weights. Nothing else is read, however long a file is.

use serde::{Deserialize, Serialize};

use crate::spec::SourceFile;

/// Bytes hashed in one go.
const BLOCK_BYTES: u64 = 1 << 20;

/// The ranges that decided a plan, and the hash of what they held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// By file, then ascending; apart from each other.
    pub ranges: Vec<FileRange>,
    /// BLAKE3 over the ranges with their numbers. See [`digest`].
    pub digest: [u8; 32],
}

/// Bytes `first..end` of a source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileRange {
    /// Index into [`crate::plan::Manifest::files`].
    pub file: u32,
    pub first: u64,
    pub end: u64,
}

/// The same bytes as disjoint ascending ranges; empty ones left out.
pub fn merged(mut ranges: Vec<FileRange>) -> Vec<FileRange> {
    ranges.retain(|range| range.first < range.end);
    ranges.sort_unstable();
    let mut merged: Vec<FileRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.file == range.file && range.first <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Hashes each range: file number, first byte and end, each as 8 bytes little-endian, then the bytes.
///
/// # Errors
/// What `read` reports; it is given file, offset and the memory to fill.
pub fn digest<E>(
    ranges: &[FileRange],
    mut read: impl FnMut(u32, u64, &mut [u8]) -> Result<(), E>,
) -> Result<[u8; 32], E> {
    let mut hasher = blake3::Hasher::new();
    let mut block = Vec::new();
    for &FileRange { file, first, end } in ranges {
        for number in [u64::from(file), first, end] {
            hasher.update(&number.to_le_bytes());
        }
        let mut at = first;
        while at < end {
            let count = (end - at).min(BLOCK_BYTES);
            block.resize(count as usize, 0);
            read(file, at, &mut block)?;
            hasher.update(&block);
            at += count;
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

impl Fingerprint {
    /// Whether the ranges are as [`merged`] makes them for these files, so that hashing reads no byte twice.
    pub fn fits(&self, files: &[SourceFile]) -> bool {
        let inside = |range: &FileRange| {
            let bytes = files.get(range.file as usize).map_or(0, |file| file.bytes);
            range.first < range.end && range.end <= bytes
        };
        let apart = |pair: &[FileRange]| (pair[0].file, pair[0].end) < (pair[1].file, pair[1].first);
        self.ranges.iter().all(inside) && self.ranges.windows(2).all(apart)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn range(file: u32, first: u64, end: u64) -> FileRange {
        FileRange { file, first, end }
    }

    #[test]
    fn ranges_are_disjoint_and_inside_of_their_files() {
        let files =
            [SourceFile { name: "a".to_owned(), bytes: 100 }, SourceFile { name: "absent".to_owned(), bytes: 0 }];
        let read = vec![range(0, 90, 100), range(0, 0, 16), range(0, 40, 50), range(0, 7, 7), range(0, 45, 60)];
        let found = merged(read);
        assert_eq!(found, [range(0, 0, 16), range(0, 40, 60), range(0, 90, 100)]);
        let print = |ranges: &[FileRange]| Fingerprint { ranges: ranges.to_vec(), digest: [0; 32] };
        assert!(print(&found).fits(&files));
        for wrong in [range(0, 100, 101), range(1, 0, 1), range(0, 5, 5)] {
            assert!(!print(&[wrong]).fits(&files), "{wrong:?}");
        }
        assert!(!print(&[range(0, 0, 9), range(0, 9, 10)]).fits(&files));
    }

    #[test]
    fn the_hash_is_of_the_ranges_alone() {
        let bytes: Vec<u8> = (0..3 << 20).map(|index: u32| index as u8).collect();
        let hash = |ranges: &[FileRange], bytes: &[u8]| {
            let read = |_: u32, offset: u64, into: &mut [u8]| -> Result<(), Infallible> {
                let first = offset as usize;
                into.copy_from_slice(&bytes[first..first + into.len()]);
                Ok(())
            };
            digest(ranges, read).unwrap()
        };
        let ranges = [range(0, 3, 2 << 20), range(0, (2 << 20) + 1, 3 << 20)];
        let first = hash(&ranges, &bytes);
        let mut changed = bytes.clone();
        changed[2 << 20] ^= 1;
        assert_eq!(hash(&ranges, &changed), first);
        changed[(2 << 20) - 1] ^= 1;
        assert_ne!(hash(&ranges, &changed), first);
        assert_ne!(hash(&ranges[..1], &bytes), first);
    }
}
