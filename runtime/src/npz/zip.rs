//! Archives in the ZIP format, as far as NumPy uses it: stored or deflated entries, 64-bit sizes included.
//!
//! ```text
//! { local header, name, bytes }*    central directory: { header, name }*    end record
//! ```
//!
//! The directory at the end decides. What it says of an entry is held against the file before anything is read, so
//! that a lie about a size costs no memory: an entry lies inside the file, and deflate makes at most [`RATIO`] bytes
//! of one. Checksums are compared once an entry was read to its end.

mod checksum;
mod inflate;
mod write;

use std::io::{self, BufRead, Read, Seek, SeekFrom};

use checksum::Checksum;
use inflate::Inflate;
pub(super) use write::Writer;

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;

const LOCAL_BYTES: usize = 30;
const CENTRAL_BYTES: usize = 46;
const END_BYTES: usize = 22;
const LOCATOR_64_BYTES: usize = 20;
const END_64_BYTES: usize = 56;

/// A 32-bit field with this value has its own in the extra field for 64 bits.
const ESCAPE: u64 = u32::MAX as u64;
/// The extra field that holds 64-bit values, by its number.
const EXTRA_64: u16 = 1;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;
/// Flag of entries that are encrypted.
const ENCRYPTED: u16 = 1;

/// Bytes that deflate makes of one at most: a match of 258 bytes takes two bits or more.
const RATIO: u64 = 1032;

/// One entry of the directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    flags: u16,
    method: u16,
    checksum: u32,
    packed_bytes: u64,
    /// Bytes once unpacked.
    pub bytes: u64,
    at: u64,
}

/// An archive whose directory was read.
pub(super) struct Archive<R> {
    file: R,
    file_bytes: u64,
    pub entries: Vec<Entry>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn text(error: io::Error) -> String {
    error.to_string()
}

impl<R: BufRead + Seek> Archive<R> {
    /// Reads the directory.
    ///
    /// # Errors
    /// What is wrong with the archive.
    pub(super) fn open(mut file: R) -> Result<Self, String> {
        let file_bytes = file.seek(SeekFrom::End(0)).map_err(text)?;
        let (at, count) = directory(&mut file, file_bytes)?;
        file.seek(SeekFrom::Start(at)).map_err(text)?;
        let mut entries = Vec::new();
        for number in 0..count {
            let entry = entry(&mut file).map_err(|why| format!("entry {number} of its directory: {why}"))?;
            entries.push(entry);
        }
        Ok(Self { file, file_bytes, entries })
    }

    /// The unpacked bytes of an entry, which end with an error unless they are as many as the directory says, with
    /// its checksum.
    ///
    /// # Errors
    /// What is wrong with the entry.
    pub(super) fn read(&mut self, entry: &Entry) -> Result<Unpacked<'_, R>, String> {
        if entry.flags & ENCRYPTED != 0 {
            return Err("it is encrypted".to_owned());
        }
        let outside = || "it lies outside of the file".to_owned();
        self.file.seek(SeekFrom::Start(entry.at)).map_err(text)?;
        let mut local = [0; LOCAL_BYTES];
        self.file.read_exact(&mut local).map_err(text)?;
        if u32_at(&local, 0) != LOCAL {
            return Err("no entry begins where the directory says".to_owned());
        }
        let names = u64::from(u16_at(&local, 26)) + u64::from(u16_at(&local, 28));
        let first = entry.at.checked_add(LOCAL_BYTES as u64 + names).ok_or_else(outside)?;
        let end = first.checked_add(entry.packed_bytes).ok_or_else(outside)?;
        if end > self.file_bytes {
            return Err(outside());
        }
        self.file.seek(SeekFrom::Start(first)).map_err(text)?;
        let packed = self.file.by_ref().take(entry.packed_bytes);
        let most = match entry.method {
            STORED => entry.packed_bytes,
            DEFLATED => entry.packed_bytes.saturating_mul(RATIO),
            method => return Err(format!("its compression method {method} is not supported; use `numpy.savez`")),
        };
        if entry.bytes > most {
            return Err(format!("{} bytes cannot unpack to {}", entry.packed_bytes, entry.bytes));
        }
        let stream = match entry.method {
            STORED => Stream::Stored(packed),
            _ => Stream::Deflated(Inflate::new(packed)),
        };
        Ok(Unpacked { stream, left: entry.bytes, checksum: Checksum::default(), expected: entry.checksum })
    }
}

/// Where the directory begins and how many entries it has.
fn directory<R: Read + Seek>(file: &mut R, file_bytes: u64) -> Result<(u64, u64), String> {
    // A comment may follow the end record, so its place is searched from behind.
    let tail_bytes = file_bytes.min((LOCATOR_64_BYTES + END_BYTES + usize::from(u16::MAX)) as u64);
    let mut tail = vec![0; tail_bytes as usize];
    file.seek(SeekFrom::Start(file_bytes - tail_bytes)).map_err(text)?;
    file.read_exact(&mut tail).map_err(text)?;
    let ends_here =
        |at: usize| u32_at(&tail, at) == END && at + END_BYTES + usize::from(u16_at(&tail, at + 20)) == tail.len();
    let last = tail.len().checked_sub(END_BYTES);
    let end = last.and_then(|last| (0..=last).rev().find(|&at| ends_here(at)));
    let end = end.ok_or_else(|| "it has no directory at its end".to_owned())?;
    let several = || Err("it is split over several files".to_owned());
    let locator = end.checked_sub(LOCATOR_64_BYTES).filter(|&at| u32_at(&tail, at) == LOCATOR_64);
    let Some(locator) = locator else {
        if u16_at(&tail, end + 4) != 0 || u16_at(&tail, end + 6) != 0 {
            return several();
        }
        return Ok((u32_at(&tail, end + 16).into(), u16_at(&tail, end + 10).into()));
    };
    let at = u64_at(&tail, locator + 8);
    let mut record = [0; END_64_BYTES];
    file.seek(SeekFrom::Start(at)).map_err(text)?;
    file.read_exact(&mut record).map_err(|error| format!("its 64-bit end record: {error}"))?;
    if u32_at(&record, 0) != END_64 {
        return Err("its 64-bit end record is not where it should be".to_owned());
    }
    if u32_at(&record, 16) != 0 || u32_at(&record, 20) != 0 {
        return several();
    }
    Ok((u64_at(&record, 48), u64_at(&record, 32)))
}

/// Reads the entry of the directory that comes next.
fn entry(file: &mut impl Read) -> Result<Entry, String> {
    let mut central = [0; CENTRAL_BYTES];
    file.read_exact(&mut central).map_err(text)?;
    if u32_at(&central, 0) != CENTRAL {
        return Err("it does not begin like one".to_owned());
    }
    let lengths = [28, 30, 32].map(|at| usize::from(u16_at(&central, at)));
    let mut names = vec![0; lengths.iter().sum()];
    file.read_exact(&mut names).map_err(text)?;
    let (name, rest) = names.split_at(lengths[0]);
    let mut wide = extra_64(&rest[..lengths[1]]);
    let mut widened = |at| match u64::from(u32_at(&central, at)) {
        ESCAPE => match wide.split_first_chunk::<8>() {
            Some((value, rest)) => {
                wide = rest;
                u64::from_le_bytes(*value)
            }
            None => ESCAPE,
        },
        narrow => narrow,
    };
    // In the order in which the extra field holds them.
    let (bytes, packed_bytes, at) = (widened(24), widened(20), widened(42));
    let name = String::from_utf8(name.to_vec()).map_err(|_| "its name is not UTF-8".to_owned())?;
    let (flags, method, checksum) = (u16_at(&central, 8), u16_at(&central, 10), u32_at(&central, 16));
    Ok(Entry { name, flags, method, checksum, packed_bytes, bytes, at })
}

/// The 64-bit values among the extra fields of an entry.
fn extra_64(mut fields: &[u8]) -> &[u8] {
    while fields.len() >= 4 {
        let (number, length) = (u16_at(fields, 0), usize::from(u16_at(fields, 2)));
        let Some(field) = fields.get(4..4 + length) else { break };
        if number == EXTRA_64 {
            return field;
        }
        fields = &fields[4 + length..];
    }
    &[]
}

enum Stream<R> {
    Stored(R),
    Deflated(Inflate<R>),
}

/// The bytes of an entry. The last read checks what the directory says of them.
pub(super) struct Unpacked<'a, R> {
    stream: Stream<io::Take<&'a mut R>>,
    left: u64,
    checksum: Checksum,
    expected: u32,
}

impl<R: BufRead> Read for Unpacked<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        if out.is_empty() {
            return Ok(0);
        }
        let read = match &mut self.stream {
            Stream::Stored(stream) => stream.read(out)?,
            Stream::Deflated(stream) => stream.read(out)?,
        };
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| invalid("it unpacks to more than it says"))?;
        self.checksum.update(&out[..read]);
        if read == 0 {
            if self.left > 0 {
                return Err(invalid("it unpacks to less than it says"));
            }
            if self.checksum.value() != self.expected {
                return Err(invalid("its bytes do not match their checksum"));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests;
