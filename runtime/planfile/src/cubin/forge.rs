//! Machine code for tests: files that say what a kernel takes and needs, as compilers write them, without instructions.

use super::attribute;
use crate::launch::{LABEL_BYTES, LABELS};

/// What the file says of its one kernel.
#[derive(Clone)]
pub(crate) struct Forged {
    pub(crate) architecture: u32,
    pub(crate) symbol: String,
    pub(crate) parameters: u16,
    pub(crate) threads: u32,
    pub(crate) registers: u32,
    pub(crate) shared_bytes: u64,
    pub(crate) cluster: u32,
    pub(crate) labels: Vec<[u8; LABEL_BYTES]>,
}

/// Name, kind, flags, link, info, contents or, of sections without, their size.
struct Part {
    name: String,
    kind: u32,
    flags: u64,
    link: u32,
    info: u32,
    contents: Vec<u8>,
    reserved: u64,
}

fn part(name: &str, kind: u32, flags: u64, contents: Vec<u8>) -> Part {
    Part { name: name.to_owned(), kind, flags, link: 0, info: 0, contents, reserved: 0 }
}

fn value(which: u8, words: &[u32]) -> Vec<u8> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    [&[4, which][..], &(bytes.len() as u16).to_le_bytes(), &bytes].concat()
}

/// Bytes before the parameters in the constants of a kernel.
const BEFORE: u32 = 0x210;

/// The file.
pub(crate) fn forge(forged: &Forged) -> Vec<u8> {
    let symbol = &forged.symbol;
    // Sections: 1 names, 2 names of symbols, 3 symbols, 4 and 5 attributes, 6 labels, 7 code, 8 shared, 9 constants.
    let (code, function) = (7u16, 2u32);
    let names = format!("\0{LABELS}\0{symbol}\0").into_bytes();
    let mut symbols = vec![0; 24];
    let mut add = |name: u32, info: u8, other: u8, section: u16, bytes: u64| {
        symbols.extend(name.to_le_bytes());
        symbols.extend([info, other]);
        symbols.extend(section.to_le_bytes());
        symbols.extend(0u64.to_le_bytes());
        symbols.extend(bytes.to_le_bytes());
    };
    add(1, 1, 0, 6, (forged.labels.len() * LABEL_BYTES) as u64);
    add(2 + LABELS.len() as u32, 0x12, 0x10, code, 128);
    let bytes = u32::from(forged.parameters) * 8;
    let mut info = Vec::new();
    for ordinal in (0..u32::from(forged.parameters)).rev() {
        info.extend(value(attribute::PARAMETER, &[0, ordinal | (ordinal * 8) << 16, 8 << 18 | 0x1_f000]));
    }
    info.extend(value(attribute::MAX_THREADS, &[forged.threads, 1, 1]));
    if forged.cluster > 1 {
        info.extend(value(attribute::CLUSTER, &[forged.cluster, 1, 1]));
    }
    info.extend([3, attribute::PARAMETER_BYTES]);
    info.extend((bytes as u16).to_le_bytes());
    info.extend(value(attribute::PARAM_CBANK, &[9, BEFORE | bytes << 16]));
    let parts = [
        part("", 0, 0, vec![]),
        part(".shstrtab", 3, 0, vec![]),
        part(".strtab", 3, 0, names),
        Part { link: 2, ..part(".symtab", 2, 0, symbols) },
        part(".nv.info", 0x7000_0000, 0, value(attribute::REGISTERS, &[function, forged.registers])),
        Part { info: u32::from(code), ..part(&format!(".nv.info.{symbol}"), 0x7000_0000, 0, info) },
        part(".nv.constant3", 1, 2, forged.labels.concat()),
        part(&format!(".text.{symbol}"), 1, 6, vec![0; 128]),
        Part { reserved: forged.shared_bytes, ..part(&format!(".nv.shared.{symbol}"), 8, 3, vec![]) },
        part(&format!(".nv.constant0.{symbol}"), 1, 2, vec![0; (BEFORE + bytes) as usize]),
    ];
    assemble(forged.architecture, parts)
}

fn assemble<const N: usize>(architecture: u32, mut parts: [Part; N]) -> Vec<u8> {
    let mut names = 0u32;
    let offsets = parts.each_ref().map(|part| {
        names += part.name.len() as u32 + 1;
        names - part.name.len() as u32 - 1
    });
    parts[1].contents = parts.iter().flat_map(|part| part.name.bytes().chain([0])).collect();
    let mut file = vec![0u8; 64];
    let mut headers = Vec::new();
    let mut segments: Vec<[u64; 3]> = Vec::new();
    for (part, name) in parts.iter().zip(&offsets) {
        let offset = if part.kind == 0 { 0 } else { file.len() as u64 };
        let bytes = if part.kind == 8 { part.reserved } else { part.contents.len() as u64 };
        headers.extend([*name, part.kind].iter().flat_map(|word| word.to_le_bytes()));
        headers.extend([part.flags, 0, offset, bytes].iter().flat_map(|word| word.to_le_bytes()));
        headers.extend([part.link, part.info].iter().flat_map(|word| word.to_le_bytes()));
        headers.extend([8u64, 0].iter().flat_map(|word| word.to_le_bytes()));
        if part.flags & 2 != 0 {
            segments.push([offset, part.contents.len() as u64, bytes]);
        }
        file.extend(&part.contents);
    }
    let section_table = file.len() as u64;
    file.extend(headers);
    let segment_table = file.len() as u64;
    let count = segments.len() as u64 + 1;
    segments.push([segment_table, count * 56, count * 56]);
    for [offset, stored, loaded] in segments {
        file.extend([1u32, 4].iter().flat_map(|word| word.to_le_bytes()));
        file.extend([offset, 0, 0, stored, loaded, 8].iter().flat_map(|word| word.to_le_bytes()));
    }
    file[..9].copy_from_slice(b"\x7fELF\x02\x01\x01\x41\x08");
    file[16..20].copy_from_slice(&[2, 0, 190, 0]);
    file[32..40].copy_from_slice(&segment_table.to_le_bytes());
    file[40..48].copy_from_slice(&section_table.to_le_bytes());
    file[48..52].copy_from_slice(&(architecture << 8 | 0x0600_0004).to_le_bytes());
    for (at, number) in [(52, 64), (54, 56), (56, count as u16), (58, 64), (60, N as u16), (62, 1)] {
        file[at..at + 2].copy_from_slice(&number.to_le_bytes());
    }
    file
}
