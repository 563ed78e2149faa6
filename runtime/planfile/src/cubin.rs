//! Machine code as compilers write it: an ELF file that says what each kernel in it takes and needs.
//!
//! Read strictly: every table lies inside of the file, the file ends where the last of them does, and segments are made
//! of sections. What the instructions do is not looked at. Layout: ELF-64 (System V ABI, 2013); NVIDIA's own sections
//! and attributes as NVRTC 12.8 and 13.0 write them and `cuobjdump -elf` names them.

use crate::launch::{LABEL_BYTES, LABELS};
use crate::text::count;

/// ELF machine number of CUDA.
const EM_CUDA: u16 = 190;
/// `e_ident[EI_OSABI]` and `e_ident[EI_ABIVERSION]` of CUDA 12, and of CUDA 12.8 for newer architectures and 13.
const OLD_ABI: [u8; 2] = [0x33, 7];
const NEW_ABI: [u8; 2] = [0x41, 8];

/// Most sections, symbols and segments of a file; compilers write a few dozen.
const SECTIONS_MAX: u16 = 1024;
const SYMBOLS_MAX: usize = 4096;
const SEGMENTS_MAX: u16 = 64;
const SECTION_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SYMBOL_BYTES: usize = 24;
/// Section without bytes in the file.
const SHT_NOBITS: u32 = 8;
/// Section that is in the device's memory.
const SHF_ALLOC: u64 = 2;
/// A part that is loaded, and the table of parts itself.
const PT_LOAD: u32 = 1;
const PT_PHDR: u32 = 6;
const STT_OBJECT: u8 = 1;
/// A function that other programs see: global, and of type `STT_FUNC`.
const GLOBAL_FUNCTION: u8 = 0x12;
/// In `st_other`: the function can be launched.
const STO_CUDA_ENTRY: u8 = 0x10;

/// Attributes of `.nv.info` sections.
mod attribute {
    pub(super) const MAX_THREADS: u8 = 0x05;
    pub(super) const PARAM_CBANK: u8 = 0x0a;
    pub(super) const REQUIRED_THREADS: u8 = 0x10;
    pub(super) const PARAMETER: u8 = 0x17;
    pub(super) const PARAMETER_BYTES: u8 = 0x19;
    pub(super) const REGISTERS: u8 = 0x2f;
    pub(super) const CLUSTER: u8 = 0x3d;
}

/// A file of machine code.
pub struct Cubin<'a> {
    bytes: &'a [u8],
    /// The number of the architecture, such as 90.
    pub architecture: u32,
    sections: Vec<Section<'a>>,
    symbols: Vec<Symbol<'a>>,
}

struct Section<'a> {
    name: &'a str,
    kind: u32,
    flags: u64,
    offset: u64,
    bytes: u64,
    link: u32,
    info: u32,
    align: u64,
}

struct Symbol<'a> {
    name: &'a str,
    info: u8,
    other: u8,
    section: u16,
    value: u64,
    bytes: u64,
}

/// What a kernel takes and needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Bytes of each parameter, in order; they lie without gaps.
    pub parameters: Vec<u64>,
    /// Most threads of a block, by dimension; their product counts.
    pub max_threads: Option<[u32; 3]>,
    /// The threads that a block must have.
    pub required_threads: Option<[u32; 3]>,
    /// Blocks of a cluster.
    pub cluster: Option<[u32; 3]>,
    /// Of a thread.
    pub registers: u32,
    /// Static shared memory of a block, with what the system keeps of it.
    pub shared_bytes: u64,
}

type Read<T> = Result<T, String>;

/// `1 byte`, `2 bytes`.
fn size(bytes: &[u8]) -> String {
    count(bytes.len() as u64, "byte")
}

/// Little-endian numbers and ranges of a file, each checked to be there.
#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn range(self, offset: u64, bytes: u64) -> Read<&'a [u8]> {
        let first = usize::try_from(offset).ok();
        let end = offset.checked_add(bytes).and_then(|end| usize::try_from(end).ok());
        let range = first.zip(end).and_then(|(first, end)| self.0.get(first..end));
        range.ok_or_else(|| format!("{} at {offset} of {}", count(bytes, "byte"), self.0.len()))
    }

    fn array<const N: usize>(self, offset: usize) -> Read<[u8; N]> {
        let found = self.0.get(offset..).and_then(|rest| rest.first_chunk::<N>());
        found.copied().ok_or_else(|| format!("{N} bytes at {offset} of {}", self.0.len()))
    }

    fn u16(self, offset: usize) -> Read<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    fn u32(self, offset: usize) -> Read<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn u64(self, offset: usize) -> Read<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }

    /// Three numbers, one after the other.
    fn triple(self) -> Read<[u32; 3]> {
        Ok([self.u32(0)?, self.u32(4)?, self.u32(8)?])
    }

    /// The text from `offset` on, up to a zero.
    fn text(self, offset: u32) -> Read<&'a str> {
        let rest = self.0.get(offset as usize..).unwrap_or_default();
        let end = rest.iter().position(|&byte| byte == 0);
        let text = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
        text.ok_or_else(|| format!("no name at {offset} of {}", self.0.len()))
    }
}

impl<'a> Cubin<'a> {
    /// Reads all tables.
    ///
    /// # Errors
    /// What contradicts, in a sentence.
    pub fn parse(bytes: &'a [u8]) -> Read<Self> {
        let file = Bytes(bytes);
        let identity: [u8; 9] = file.array(0).map_err(|_| format!("is no ELF file: it has {}", size(bytes)))?;
        // 64-bit, little-endian, version 1.
        if identity[..7] != *b"\x7fELF\x02\x01\x01" {
            return Err("is no 64-bit ELF file".to_owned());
        }
        let (kind, machine, flags) = (file.u16(16)?, file.u16(18)?, file.u32(48)?);
        if (kind, machine) != (2, EM_CUDA) {
            return Err(format!("is an ELF file of type {kind} for machine {machine}, not a program for CUDA"));
        }
        let architecture = match [identity[7], identity[8]] {
            OLD_ABI => flags & 0xff,
            NEW_ABI => flags >> 8 & 0xff,
            [system, version] => return Err(format!("is by a compiler that is not known (ABI {system}, {version})")),
        };
        let mut cubin = Self { bytes, architecture, sections: Vec::new(), symbols: Vec::new() };
        cubin.read_sections()?;
        cubin.read_symbols()?;
        cubin.check_segments()?;
        cubin.check_end()?;
        Ok(cubin)
    }

    fn header(&self) -> Bytes<'a> {
        Bytes(self.bytes)
    }

    fn read_sections(&mut self) -> Read<()> {
        let file = self.header();
        let (offset, each, count) = (file.u64(40)?, file.u16(58)?, file.u16(60)?);
        if usize::from(each) != SECTION_HEADER_BYTES || count > SECTIONS_MAX {
            return Err(format!("{count} section headers of {each} bytes"));
        }
        let table = Bytes(file.range(offset, u64::from(each) * u64::from(count))?);
        let names = usize::from(file.u16(62)?);
        if names >= usize::from(count) {
            return Err(format!("names are in section {names} of {count}"));
        }
        let names = Bytes({
            let at = names * SECTION_HEADER_BYTES;
            file.range(table.u64(at + 24)?, table.u64(at + 32)?)?
        });
        for at in (0..usize::from(count)).map(|index| index * SECTION_HEADER_BYTES) {
            let section = Section {
                name: names.text(table.u32(at)?)?,
                kind: table.u32(at + 4)?,
                flags: table.u64(at + 8)?,
                offset: table.u64(at + 24)?,
                bytes: table.u64(at + 32)?,
                link: table.u32(at + 40)?,
                info: table.u32(at + 44)?,
                align: table.u64(at + 48)?,
            };
            let stored = if section.kind == SHT_NOBITS { 0 } else { section.bytes };
            file.range(section.offset, stored).map_err(|what| format!("section `{}`: {what}", section.name))?;
            self.sections.push(section);
        }
        Ok(())
    }

    /// The section of that name; there is no other.
    fn section(&self, name: &str) -> Read<Option<(usize, &Section<'a>)>> {
        let mut found = self.sections.iter().enumerate().filter(|(_, section)| section.name == name);
        let first = found.next();
        match found.next() {
            Some(_) => Err(format!("two sections are named `{name}`")),
            None => Ok(first),
        }
    }

    fn contents(&self, section: &Section<'a>) -> Read<Bytes<'a>> {
        if section.kind == SHT_NOBITS {
            return Err(format!("section `{}` has no bytes", section.name));
        }
        Bytes(self.bytes).range(section.offset, section.bytes).map(Bytes)
    }

    fn read_symbols(&mut self) -> Read<()> {
        let Some((_, table)) = self.section(".symtab")? else { return Err("has no symbols".to_owned()) };
        let names = self.sections.get(table.link as usize).ok_or("names of symbols are in no section")?;
        let (names, table) = (self.contents(names)?, self.contents(table)?);
        if !table.0.len().is_multiple_of(SYMBOL_BYTES) || table.0.len() > SYMBOLS_MAX * SYMBOL_BYTES {
            return Err(format!("{} of symbols", size(table.0)));
        }
        let mut symbols = Vec::with_capacity(table.0.len() / SYMBOL_BYTES);
        for at in (0..table.0.len()).step_by(SYMBOL_BYTES) {
            let [info, other] = table.array(at + 4)?;
            symbols.push(Symbol {
                name: names.text(table.u32(at)?)?,
                info,
                other,
                section: table.u16(at + 6)?,
                value: table.u64(at + 8)?,
                bytes: table.u64(at + 16)?,
            });
        }
        self.symbols = symbols;
        Ok(())
    }

    /// Segments are what the driver loads: each is the table of them, or whole sections that lie one after the other.
    fn check_segments(&self) -> Read<()> {
        let file = self.header();
        let (first, each, count) = (file.u64(32)?, file.u16(54)?, file.u16(56)?);
        if usize::from(each) != PROGRAM_HEADER_BYTES || count == 0 || count > SEGMENTS_MAX {
            return Err(format!("{count} segment headers of {each} bytes"));
        }
        let bytes = u64::from(each) * u64::from(count);
        let table = Bytes(file.range(first, bytes)?);
        let in_memory = || self.sections.iter().filter(|section| section.flags & SHF_ALLOC != 0);
        let reserved = in_memory().filter(|section| section.kind == SHT_NOBITS);
        let reserved = reserved.fold(0u64, |end, section| {
            let first = end.checked_next_multiple_of(section.align.max(1));
            first.unwrap_or(u64::MAX).saturating_add(section.bytes)
        });
        for (number, at) in (0..usize::from(count)).map(|number| (number, number * PROGRAM_HEADER_BYTES)) {
            let (kind, flags) = (table.u32(at)?, table.u32(at + 4)?);
            let [offset, virtual_address, physical_address, stored, loaded, align] =
                [8, 16, 24, 32, 40, 48].map(|field| table.u64(at + field).unwrap_or(u64::MAX));
            let is_table = (offset, stored) == (first, bytes);
            let of_sections = offset.checked_add(stored).is_some_and(|end| {
                in_memory().any(|section| section.offset == offset)
                    && in_memory().any(|section| {
                        let own = if section.kind == SHT_NOBITS { 0 } else { section.bytes };
                        section.offset.saturating_add(own) == end
                    })
            });
            let fine = match kind {
                PT_PHDR => is_table,
                PT_LOAD => is_table || of_sections,
                _ => false,
            };
            // All that has no bytes in the file is in one segment.
            let sized = loaded == stored || (!is_table && loaded.checked_sub(stored) == Some(reserved));
            let plain = (virtual_address, physical_address, align) == (0, 0, 8) && (1..8).contains(&flags);
            if !(fine && sized && plain) {
                return Err(format!("segment {number}, of {stored} bytes at {offset}, is none of its sections"));
            }
        }
        Ok(())
    }

    /// Nothing is missing at the end of the file, and nothing follows.
    fn check_end(&self) -> Read<()> {
        let file = self.header();
        let table = |offset: u64, each: u16, count: u16| offset.saturating_add(u64::from(each) * u64::from(count));
        let sections = self.sections.iter().filter(|section| section.kind != SHT_NOBITS);
        let end = sections.map(|section| section.offset.saturating_add(section.bytes)).max().unwrap_or(0);
        let end = end.max(table(file.u64(40)?, file.u16(58)?, file.u16(60)?));
        let end = end.max(table(file.u64(32)?, file.u16(54)?, file.u16(56)?));
        let fine = end == self.bytes.len() as u64;
        fine.then_some(()).ok_or_else(|| format!("has {}, its tables end at {end}", size(self.bytes)))
    }

    /// The kernel of that name.
    ///
    /// # Errors
    /// There is none, or what contradicts in its description.
    pub fn function(&self, name: &str) -> Read<Function> {
        let is_kernel = |symbol: &Symbol<'_>| {
            symbol.name == name && symbol.info == GLOBAL_FUNCTION && symbol.other & STO_CUDA_ENTRY != 0
        };
        let found = self.symbols.iter().position(is_kernel).ok_or_else(|| format!("has no kernel `{name}`"))?;
        let (number, symbol) = (found as u32, &self.symbols[found]);
        let text = self.section(&format!(".text.{name}"))?;
        let text = text.filter(|(index, section)| {
            *index == usize::from(symbol.section) && (symbol.value, symbol.bytes) == (0, section.bytes)
        });
        let Some((text, _)) = text else { return Err(format!("the code of `{name}` is no section of its own")) };
        let mut function = Function {
            parameters: Vec::new(),
            max_threads: None,
            required_threads: None,
            cluster: None,
            registers: self.registers(number)?,
            shared_bytes: self.section(&format!(".nv.shared.{name}"))?.map_or(0, |(_, section)| section.bytes),
        };
        let info = self.section(&format!(".nv.info.{name}"))?.filter(|(_, info)| info.info as usize == text);
        let Some((_, info)) = info else { return Err(format!("nothing describes `{name}`")) };
        let mut parameters: Vec<(u16, u16, u64)> = Vec::new();
        let (mut bank, mut parameter_bytes) = (None, 0);
        attributes(self.contents(info)?, |which, value| {
            match which {
                attribute::MAX_THREADS => function.max_threads = Some(value.triple()?),
                attribute::REQUIRED_THREADS => function.required_threads = Some(value.triple()?),
                attribute::CLUSTER => function.cluster = Some(value.triple()?),
                // Number, offset, and the size above flags.
                attribute::PARAMETER => {
                    parameters.push((value.u16(4)?, value.u16(6)?, u64::from(value.u32(8)? >> 18)));
                }
                attribute::PARAMETER_BYTES => parameter_bytes = u64::from(value.u16(0)?),
                attribute::PARAM_CBANK => bank = Some((value.u16(4)?, value.u16(6)?)),
                _ => {}
            }
            Ok(())
        })?;
        parameters.sort_unstable();
        let mut end = 0u64;
        for (position, (ordinal, offset, bytes)) in parameters.into_iter().enumerate() {
            if usize::from(ordinal) != position || u64::from(offset) != end {
                return Err(format!("parameters of `{name}` are not one after the other"));
            }
            function.parameters.push(bytes);
            end += bytes;
        }
        let (bank_offset, bank_bytes) = bank.unwrap_or_default();
        let constants = self.section(&format!(".nv.constant0.{name}"))?.map_or(0, |(_, section)| section.bytes);
        let agree = parameter_bytes == end
            && u64::from(bank_bytes) == end
            && (end == 0 || constants == u64::from(bank_offset) + end);
        agree.then_some(function).ok_or_else(|| format!("parameters of `{name}` do not have one size"))
    }

    /// Registers of each thread of a function, by the number of its symbol.
    fn registers(&self, symbol: u32) -> Read<u32> {
        let Some((_, info)) = self.section(".nv.info")? else { return Err("nothing tells registers".to_owned()) };
        let mut found = None;
        attributes(self.contents(info)?, |which, value| {
            if which == attribute::REGISTERS && value.u32(0)? == symbol {
                found = Some(value.u32(4)?);
            }
            Ok(())
        })?;
        found.ok_or_else(|| "nothing tells the registers of the kernel".to_owned())
    }

    /// The labels of what its kernels are said to be; see [`crate::launch::label`].
    ///
    /// # Errors
    /// They are not where such a constant is.
    pub fn labels(&self) -> Read<Vec<&'a [u8; LABEL_BYTES]>> {
        let is_labels = |symbol: &&Symbol<'_>| symbol.name == LABELS && symbol.info & 15 == STT_OBJECT;
        let Some(symbol) = self.symbols.iter().find(is_labels) else { return Ok(Vec::new()) };
        let section = self.sections.get(usize::from(symbol.section)).ok_or("its labels are in no section")?;
        let labels = self.contents(section)?.range(symbol.value, symbol.bytes)?;
        match labels.as_chunks() {
            (labels, []) => Ok(labels.iter().collect()),
            _ => Err(format!("{} of labels", size(labels))),
        }
    }
}

/// Calls `each` with every attribute and its value.
fn attributes(section: Bytes<'_>, mut each: impl FnMut(u8, Bytes<'_>) -> Read<()>) -> Read<()> {
    let mut at = 0;
    while at < section.0.len() {
        let [format, which] = section.array(at)?;
        let value = match format {
            // No value, a byte, two bytes: in place.
            1..=3 => section.range(at as u64 + 2, 2)?,
            4 => {
                let bytes = section.u16(at + 2)?;
                section.range(at as u64 + 4, u64::from(bytes))?
            }
            _ => return Err(format!("an attribute of format {format}")),
        };
        each(which, Bytes(value))?;
        at += if format == 4 { 4 + value.len() } else { 4 };
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod forge;
#[cfg(test)]
mod tests;
