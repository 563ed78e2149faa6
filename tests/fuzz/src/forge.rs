//! Plan files with valid hashes over any content, as someone who wants to be believed would write them.
//!
//! Written from the description of the format, not with the code that is tested.

/// Bytes of everything before the body, in a file of at most 122 chunks.
pub const HEAD_BYTES: usize = 4096;
/// Sections of a plan file.
pub const SECTIONS: usize = 6;
/// Position of the weights among the sections.
pub const WEIGHTS: usize = 5;
/// Kinds of the sections, in the order of the file.
const KINDS: [u32; SECTIONS] = [1, 2, 3, 4, 6, 5];
/// Bytes of the body that one hash covers.
const CHUNK_BYTES: usize = 16 << 20;

/// The file that holds these sections, hashed.
pub fn assemble(parts: &[Vec<u8>; SECTIONS]) -> Vec<u8> {
    let mut bytes = vec![0; HEAD_BYTES];
    bytes[..8].copy_from_slice(b"\x89plan\r\n\x1a");
    bytes[8..12].copy_from_slice(&planfile::container::FORMAT_VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(SECTIONS as u32).to_le_bytes());
    for (position, part) in parts.iter().enumerate() {
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let row = 64 + position * 24;
        let (kind, offset, length) = (KINDS[position], bytes.len() as u64, part.len() as u64);
        bytes[row..row + 4].copy_from_slice(&kind.to_le_bytes());
        bytes[row + 8..row + 16].copy_from_slice(&offset.to_le_bytes());
        bytes[row + 16..row + 24].copy_from_slice(&length.to_le_bytes());
        bytes.extend(part);
    }
    let (length, chunks) = (bytes.len() as u64, (bytes.len() - HEAD_BYTES).div_ceil(CHUNK_BYTES) as u64);
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    bytes[24..32].copy_from_slice(&chunks.to_le_bytes());
    rehash(&mut bytes);
    bytes
}

/// Makes the hashes match the content, whatever the header says. Files that are too short for that stay as they are.
pub fn rehash(bytes: &mut [u8]) {
    if bytes.len() < HEAD_BYTES {
        return;
    }
    let (head, body) = bytes.split_at_mut(HEAD_BYTES);
    for (number, chunk) in body.chunks(CHUNK_BYTES).take(122).enumerate() {
        head[208 + number * 32..][..32].copy_from_slice(blake3::hash(chunk).as_bytes());
    }
    head[32..64].fill(0);
    let root = blake3::hash(head);
    head[32..64].copy_from_slice(root.as_bytes());
}

/// The sections of a whole file; `None` for what is none.
pub fn sections(bytes: &[u8]) -> Option<[Vec<u8>; SECTIONS]> {
    let number = |at: usize| -> Option<usize> {
        usize::try_from(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)).ok()
    };
    let mut parts: [Vec<u8>; SECTIONS] = Default::default();
    for (position, part) in parts.iter_mut().enumerate() {
        let row = 64 + position * 24;
        let (first, length) = (number(row + 8)?, number(row + 16)?);
        *part = bytes.get(first..first.checked_add(length)?)?.to_vec();
    }
    Some(parts)
}
