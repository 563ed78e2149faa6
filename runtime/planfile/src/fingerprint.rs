//! What of a model's files decided a plan, so that new weights can be told from another model.
//!
//! A plan copies most bytes of its source files without looking at them: the ranges that recipes name. All others it
//! depends on: the graph itself, constants kept in the plan, and weights whose values the compiler looked at. While
//! those are the same, compiling again makes the same plan but for the bytes of its weights.

use serde::{Deserialize, Serialize};

use crate::plan::PlanWeight;
use crate::spec::{Source, SourceFile};

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

/// The ranges that decide a plan: all but what only recipes copy. `looked_at` is what the compiler read.
pub fn decisive(files: &[SourceFile], weights: &[PlanWeight], looked_at: &[FileRange]) -> Vec<FileRange> {
    let inputs = weights.iter().flat_map(|weight| &weight.recipe.inputs);
    let copied = inputs.filter_map(|input| match input.source {
        Source::File { file, offset } => {
            Some(FileRange { file, first: offset, end: offset.saturating_add(input.ty.bytes().unwrap_or(0)) })
        }
        Source::Inline(_) | Source::Random { .. } => None,
    });
    let copied = merged(copied.collect());
    let mut ranges = looked_at.to_vec();
    for (file, bytes) in (0..).zip(files.iter().map(|file| file.bytes)) {
        let mut at = 0;
        for range in copied.iter().filter(|range| range.file == file) {
            ranges.push(FileRange { file, first: at, end: range.first });
            at = range.end;
        }
        ranges.push(FileRange { file, first: at, end: bytes });
    }
    merged(ranges)
}

/// The same bytes as disjoint ascending ranges; empty ones left out.
fn merged(mut ranges: Vec<FileRange>) -> Vec<FileRange> {
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
    /// Whether the ranges are as [`decisive`] makes them for these files, so that hashing reads no byte twice.
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
    use crate::sample;

    fn range(file: u32, first: u64, end: u64) -> FileRange {
        FileRange { file, first, end }
    }

    #[test]
    fn all_but_what_is_only_copied_decides() {
        // The sample copies bytes 64..192 and 0..16 of its file.
        let manifest = sample::plan().manifest;
        let files = [manifest.files.clone(), vec![SourceFile { name: "absent".to_owned(), bytes: 0 }]].concat();
        assert_eq!(decisive(&files, &manifest.weights, &[]), [range(0, 16, 64), range(0, 192, 4096)]);
        let looked_at = [range(0, 100, 110), range(0, 105, 120), range(0, 180, 192)];
        let found = decisive(&files, &manifest.weights, &looked_at);
        assert_eq!(found, [range(0, 16, 64), range(0, 100, 120), range(0, 180, 4096)]);
        let print = |ranges: &[FileRange]| Fingerprint { ranges: ranges.to_vec(), digest: [0; 32] };
        assert!(print(&found).fits(&files));
        for wrong in [range(0, 4096, 4097), range(2, 0, 1), range(0, 5, 5)] {
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
