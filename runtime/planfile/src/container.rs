//! The outer form of a plan file: header, section table, chunk hashes, sections.
//!
//! ```text
//! 0    magic                 8 bytes
//! 8    format version        u32
//! 12   number of sections    u32
//! 16   file length           u64
//! 24   number of chunks      u64
//! 32   root                  32 bytes: BLAKE3 of everything before the body, with zeros in this field
//! 64   section table         per section: kind u32, zero u32, offset u64, bytes u64
//! 208  chunk hashes          32 bytes each: BLAKE3 of 16 MiB of the body; the last chunk may be shorter
//!      zeros to a multiple of 4096: here the body begins
//!      sections, each at a multiple of 4096, zeros between them; the file ends with the last one
//! ```
//!
//! Integers are little-endian. Root and chunk hashes together cover every byte of the file.

use crate::error::PlanError;

/// Not text, and damaged by transfers that take it for text.
pub const MAGIC: [u8; 8] = *b"\x89plan\r\n\x1a";
/// Version of the format that this crate writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 5;
/// Bytes of the body that one hash covers.
pub const CHUNK_BYTES: u64 = 16 << 20;
/// Alignment of sections in the file.
pub const SECTION_ALIGN: u64 = 4096;

/// Longest header that is read: the hashes of a file of 128 TiB.
const MAX_HEAD_BYTES: u64 = 256 << 20;

pub(crate) const HASH_BYTES: usize = 32;
pub(crate) const FIXED_BYTES: usize = 64;
const TABLE_ROW_BYTES: usize = 24;
const ROOT_OFFSET: usize = 32;
const HASHES_OFFSET: usize = FIXED_BYTES + SECTIONS.len() * TABLE_ROW_BYTES;

pub(crate) type Hash = [u8; HASH_BYTES];

/// A part of the file. Numbers are the kinds in the section table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    Manifest = 1,
    Programs = 2,
    Kernels = 3,
    Code = 4,
    Weights = 5,
    Explanations = 6,
}

/// Sections in the order of the file: weights last, as they alone are large.
pub const SECTIONS: [Section; 6] =
    [Section::Manifest, Section::Programs, Section::Kernels, Section::Code, Section::Explanations, Section::Weights];

impl Section {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Programs => "programs",
            Self::Kernels => "kernels",
            Self::Code => "code",
            Self::Weights => "weights",
            Self::Explanations => "explanations",
        }
    }
}

/// Where a section is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub offset: u64,
    pub bytes: u64,
}

/// Where everything is; follows from the sections' sizes alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) file_bytes: u64,
    pub(crate) chunks: u64,
    pub(crate) body: u64,
    /// In the order of [`SECTIONS`].
    pub(crate) spans: [Span; SECTIONS.len()],
}

impl Layout {
    /// `None` when the file would exceed 63 bits.
    pub(crate) fn new(sizes: [u64; SECTIONS.len()]) -> Option<Self> {
        let mut spans = [Span::default(); SECTIONS.len()];
        let mut end = 0u64;
        for (span, bytes) in spans.iter_mut().zip(sizes) {
            let offset = end.checked_next_multiple_of(SECTION_ALIGN)?;
            *span = Span { offset, bytes };
            end = offset.checked_add(bytes)?;
        }
        let chunks = end.div_ceil(CHUNK_BYTES);
        let body = body_offset(chunks)?;
        for span in &mut spans {
            span.offset = span.offset.checked_add(body)?;
        }
        let file_bytes = end.checked_add(body).filter(|&bytes| bytes <= i64::MAX as u64)?;
        Some(Self { file_bytes, chunks, body, spans })
    }

    pub(crate) fn span(&self, section: Section) -> Span {
        let position = SECTIONS.iter().position(|&other| other == section);
        position.map_or(Span::default(), |position| self.spans[position])
    }

    /// First byte and end, in the file, of a chunk.
    pub(crate) fn chunk(&self, index: u64) -> (u64, u64) {
        let first = self.body.saturating_add(index.saturating_mul(CHUNK_BYTES));
        (first, first.saturating_add(CHUNK_BYTES).min(self.file_bytes))
    }

    /// Everything before the body.
    pub(crate) fn head(&self, hashes: &[Hash]) -> Vec<u8> {
        let mut head = Vec::new();
        head.extend(MAGIC);
        head.extend(FORMAT_VERSION.to_le_bytes());
        head.extend((SECTIONS.len() as u32).to_le_bytes());
        head.extend(self.file_bytes.to_le_bytes());
        head.extend(self.chunks.to_le_bytes());
        head.extend([0; HASH_BYTES]);
        for (section, span) in SECTIONS.into_iter().zip(self.spans) {
            head.extend((section as u32).to_le_bytes());
            head.extend(0u32.to_le_bytes());
            head.extend(span.offset.to_le_bytes());
            head.extend(span.bytes.to_le_bytes());
        }
        for hash in hashes {
            head.extend(hash);
        }
        head.resize(head.len().next_multiple_of(SECTION_ALIGN as usize), 0);
        let root = blake3::hash(&head);
        head[ROOT_OFFSET..ROOT_OFFSET + HASH_BYTES].copy_from_slice(root.as_bytes());
        head
    }
}

/// Where the body begins in a file of so many chunks.
fn body_offset(chunks: u64) -> Option<u64> {
    let hashes = chunks.checked_mul(HASH_BYTES as u64)?;
    hashes.checked_add(HASHES_OFFSET as u64)?.checked_next_multiple_of(SECTION_ALIGN)
}

/// The fixed first part of a header.
pub(crate) struct Fixed {
    file_bytes: u64,
    chunks: u64,
    /// Length of everything before the body.
    pub(crate) head_bytes: u64,
}

/// Reads the fixed part of a header: `start` is the first bytes of a file of `actual` bytes, at most [`FIXED_BYTES`].
///
/// Allocates nothing, and bounds `head_bytes`: a file may state any length without taking it on disk, so it is little
/// beside that length, and never more than [`MAX_HEAD_BYTES`].
pub(crate) fn parse_fixed(start: &[u8], actual: u64) -> Result<Fixed, PlanError> {
    let known = start.len().min(MAGIC.len());
    if known == 0 || start[..known] != MAGIC[..known] {
        return Err(PlanError::NotAPlan);
    }
    if start.len() < 12 {
        return Err(PlanError::Cut { expected: FIXED_BYTES as u64, actual });
    }
    let found = u32_at(start, 8);
    if found != FORMAT_VERSION {
        return Err(PlanError::Version { found, ours: FORMAT_VERSION });
    }
    if start.len() < FIXED_BYTES {
        return Err(PlanError::Cut { expected: FIXED_BYTES as u64, actual });
    }
    let sections = u32_at(start, 12);
    if sections as usize != SECTIONS.len() {
        return Err(header(12, format!("{sections} sections, version {FORMAT_VERSION} has {}", SECTIONS.len())));
    }
    let (file_bytes, chunks) = (u64_at(start, 16), u64_at(start, 24));
    if actual < file_bytes {
        return Err(PlanError::Cut { expected: file_bytes, actual });
    }
    if actual > file_bytes {
        return Err(PlanError::Trailing { extra: actual - file_bytes });
    }
    let head_bytes = body_offset(chunks).filter(|&head_bytes| head_bytes <= MAX_HEAD_BYTES);
    match head_bytes.and_then(|head_bytes| Some((head_bytes, file_bytes.checked_sub(head_bytes)?))) {
        Some((head_bytes, body)) if body.div_ceil(CHUNK_BYTES) == chunks => {
            Ok(Fixed { file_bytes, chunks, head_bytes })
        }
        _ => Err(header(24, format!("{file_bytes} bytes do not make {chunks} chunks of {CHUNK_BYTES}"))),
    }
}

/// Reads and checks everything before the body: `head` has the length that `fixed` says.
pub(crate) fn parse_head(fixed: &Fixed, head: &[u8]) -> Result<(Layout, Vec<Hash>), PlanError> {
    let mut zeroed = head.to_vec();
    zeroed[ROOT_OFFSET..ROOT_OFFSET + HASH_BYTES].fill(0);
    if blake3::hash(&zeroed).as_bytes() != &head[ROOT_OFFSET..ROOT_OFFSET + HASH_BYTES] {
        return Err(PlanError::Damaged { first: 0, end: head.len() as u64, what: "header" });
    }
    let mut sizes = [0; SECTIONS.len()];
    for (position, section) in SECTIONS.into_iter().enumerate() {
        let row = FIXED_BYTES + position * TABLE_ROW_BYTES;
        let (kind, zero) = (u32_at(head, row), u32_at(head, row + 4));
        if kind != section as u32 || zero != 0 {
            return Err(header(row, format!("section {position} is of kind {kind}, expected {}", section.name())));
        }
        sizes[position] = u64_at(head, row + 16);
    }
    let layout = Layout::new(sizes).ok_or_else(|| header(FIXED_BYTES, "the sections overflow".to_owned()))?;
    if layout.file_bytes != fixed.file_bytes || layout.chunks != fixed.chunks {
        let what = format!("the sections make {} bytes, the header says {}", layout.file_bytes, fixed.file_bytes);
        return Err(header(16, what));
    }
    for (position, span) in layout.spans.iter().enumerate() {
        let row = FIXED_BYTES + position * TABLE_ROW_BYTES;
        let offset = u64_at(head, row + 8);
        if offset != span.offset {
            let name = SECTIONS[position].name();
            let what = format!("section {name} is said to begin at {offset}, but sections end at {}", span.offset);
            return Err(header(row + 8, what));
        }
    }
    let hashes = head[HASHES_OFFSET..].chunks_exact(HASH_BYTES).take(layout.chunks as usize);
    let hashes: Vec<Hash> = hashes.filter_map(|hash| hash.try_into().ok()).collect();
    let padding = &head[HASHES_OFFSET + hashes.len() * HASH_BYTES..];
    if padding.iter().any(|&byte| byte != 0) {
        return Err(header(head.len() - padding.len(), "padding is not zero".to_owned()));
    }
    Ok((layout, hashes))
}

fn header(offset: usize, what: String) -> PlanError {
    PlanError::Header { offset: offset as u64, what }
}

/// `bytes` reaches beyond `offset + 4`.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(word)
}

/// `bytes` reaches beyond `offset + 8`.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(head: &[u8], actual: u64) -> Result<Layout, PlanError> {
        let fixed = parse_fixed(&head[..FIXED_BYTES.min(head.len())], actual)?;
        Ok(parse_head(&fixed, head)?.0)
    }

    /// With the root made to match, as someone who wants to be believed would.
    fn forged(change: impl FnOnce(&mut [u8])) -> String {
        let layout = Layout::new([10, 0, 5000, 1, 2, CHUNK_BYTES]).unwrap();
        let mut head = layout.head(&[[7; HASH_BYTES]; 2]);
        change(&mut head);
        head[ROOT_OFFSET..ROOT_OFFSET + HASH_BYTES].fill(0);
        let root = blake3::hash(&head);
        head[ROOT_OFFSET..ROOT_OFFSET + HASH_BYTES].copy_from_slice(root.as_bytes());
        parse(&head, layout.file_bytes).unwrap_err().to_string()
    }

    #[test]
    fn heads_round_trip() {
        let layout = Layout::new([10, 0, 5000, 1, 2, 40 << 20]).unwrap();
        assert_eq!(layout.chunks, 3);
        let head = layout.head(&[[7; HASH_BYTES]; 3]);
        assert_eq!(parse(&head, layout.file_bytes).unwrap(), layout);
    }

    #[test]
    fn sections_begin_at_aligned_offsets_in_order() {
        let layout = Layout::new([1, 4096, 0, 4097, 1, 1]).unwrap();
        let offsets = layout.spans.map(|span| span.offset - layout.body);
        assert_eq!(offsets, [0, 4096, 8192, 8192, 16384, 20480]);
        assert_eq!(layout.file_bytes, layout.body + 20481);
    }

    #[test]
    fn forged_headers_are_refused() {
        let overlap = forged(|head| head[FIXED_BYTES + TABLE_ROW_BYTES + 8] = 0x7f);
        assert!(overlap.contains("section programs is said to begin at"), "{overlap}");
        let beyond = forged(|head| head[FIXED_BYTES + 5 * TABLE_ROW_BYTES + 23] = 0x7f);
        assert!(beyond.contains("the sections make"), "{beyond}");
        let overflow = forged(|head| head[FIXED_BYTES + 5 * TABLE_ROW_BYTES + 16..][..8].fill(0xff));
        assert!(overflow.contains("the sections overflow"), "{overflow}");
        let longer = forged(|head| head[FIXED_BYTES + 5 * TABLE_ROW_BYTES + 16] = 1);
        assert!(longer.contains("the sections make"), "{longer}");
        let kind = forged(|head| head[FIXED_BYTES] = 9);
        assert!(kind.contains("section 0 is of kind 9, expected manifest"), "{kind}");
        let padding = forged(|head| head[4000] = 1);
        assert!(padding.contains("padding is not zero"), "{padding}");
    }

    #[test]
    fn a_count_of_chunks_that_is_not_the_file_s_is_refused_before_reading() {
        let layout = Layout::new([1; SECTIONS.len()]).unwrap();
        let mut head = layout.head(&[[0; HASH_BYTES]]);
        for chunks in [0, 2, 200, u64::MAX] {
            head[24..32].copy_from_slice(&chunks.to_le_bytes());
            let error = parse(&head, layout.file_bytes).unwrap_err();
            assert!(error.to_string().contains(&format!("do not make {chunks} chunks")), "{error}");
        }
    }

    #[test]
    fn a_header_is_little_beside_the_length_that_it_states() {
        let start = |file_bytes: u64, chunks: u64| {
            let mut start = Layout::new([1; SECTIONS.len()]).unwrap().head(&[]);
            start[16..24].copy_from_slice(&file_bytes.to_le_bytes());
            start[24..32].copy_from_slice(&chunks.to_le_bytes());
            parse_fixed(&start[..FIXED_BYTES], file_bytes)
        };
        // A tebibyte of chunks; as much of hashes; and a length that no header is read for.
        assert_eq!(start(1 << 40, 1 << 16).unwrap().head_bytes, (2 << 20) + 4096);
        assert!(start(1 << 40, (1 << 35) - 1000).is_err());
        assert!(start(1 << 62, 1 << 38).is_err());
    }
}
