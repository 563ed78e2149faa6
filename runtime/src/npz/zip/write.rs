//! Writes archives of stored entries. The same entries are the same bytes: none says when it was written.

use std::io::{self, Write};

use super::checksum::Checksum;
use super::{CENTRAL, END, END_64, ESCAPE, EXTRA_64, LOCAL, LOCATOR_64, STORED};

/// The first day that the format knows: 1980-01-01.
const DATE: u16 = 0x21;
/// Names are UTF-8.
const UTF_8: u16 = 1 << 11;
/// Version of the format that knows 64-bit sizes.
const VERSION: u16 = 45;

/// An archive under construction.
pub(in super::super) struct Writer<W> {
    out: W,
    at: u64,
    directory: Vec<u8>,
    entries: u64,
}

impl<W: Write> Writer<W> {
    pub(in super::super) fn new(out: W) -> Self {
        Self { out, at: 0, directory: Vec::new(), entries: 0 }
    }

    /// Writes an entry: these parts, one behind the other.
    ///
    /// # Errors
    /// What `out` says; a name that is too long for the format.
    pub(in super::super) fn add(&mut self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let too_long =
            |_| io::Error::new(io::ErrorKind::InvalidInput, "the name of an array is longer than 65,535 bytes");
        let name_bytes = u16::try_from(name.len()).map_err(too_long)?;
        let mut checksum = Checksum::default();
        parts.iter().for_each(|part| checksum.update(part));
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        // Both sizes are in the local header's extra field or neither is; the offset only in the directory's.
        let wide: Vec<u64> = if bytes >= ESCAPE { vec![bytes, bytes] } else { vec![] };
        let narrow = |value: u64| value.min(ESCAPE) as u32;
        let common = |extra_bytes: u16| {
            let mut fields = Vec::new();
            [VERSION, UTF_8, STORED, 0, DATE].iter().for_each(|field| fields.extend(field.to_le_bytes()));
            [checksum.value(), narrow(bytes), narrow(bytes)]
                .iter()
                .for_each(|field| fields.extend(field.to_le_bytes()));
            [name_bytes, extra_bytes].iter().for_each(|field| fields.extend(field.to_le_bytes()));
            fields
        };
        let extra = extra_64(&wide);
        let mut local = LOCAL.to_le_bytes().to_vec();
        local.extend(common(extra.len() as u16));
        local.extend(name.bytes());
        local.extend(extra);
        let offset = if self.at >= ESCAPE { vec![self.at] } else { vec![] };
        let extra = extra_64(&[wide, offset].concat());
        self.directory.extend(CENTRAL.to_le_bytes());
        self.directory.extend(VERSION.to_le_bytes());
        self.directory.extend(common(extra.len() as u16));
        // No comment, first file, no attributes.
        self.directory.extend([0; 10]);
        self.directory.extend(narrow(self.at).to_le_bytes());
        self.directory.extend(name.bytes());
        self.directory.extend(extra);
        self.out.write_all(&local)?;
        for part in parts {
            self.out.write_all(part)?;
        }
        self.at += local.len() as u64 + bytes;
        self.entries += 1;
        Ok(())
    }

    /// Writes the directory.
    ///
    /// # Errors
    /// What `out` says.
    pub(in super::super) fn finish(mut self) -> io::Result<()> {
        self.out.write_all(&self.directory)?;
        let (first, bytes) = (self.at, self.directory.len() as u64);
        let most = u64::from(u16::MAX);
        let mut end = Vec::new();
        if self.entries >= most || first >= ESCAPE || bytes >= ESCAPE {
            end.extend(END_64.to_le_bytes());
            // Bytes of the record behind this field.
            end.extend(44u64.to_le_bytes());
            [VERSION, VERSION].iter().for_each(|field| end.extend(field.to_le_bytes()));
            end.extend([0; 8]);
            [self.entries, self.entries, bytes, first].iter().for_each(|field| end.extend(field.to_le_bytes()));
            end.extend(LOCATOR_64.to_le_bytes());
            end.extend(0u32.to_le_bytes());
            end.extend((first + bytes).to_le_bytes());
            end.extend(1u32.to_le_bytes());
        }
        end.extend(END.to_le_bytes());
        end.extend([0; 4]);
        [self.entries; 2].iter().for_each(|&entries| end.extend((entries.min(most) as u16).to_le_bytes()));
        [bytes, first].iter().for_each(|&field| end.extend((field.min(ESCAPE) as u32).to_le_bytes()));
        end.extend([0; 2]);
        self.out.write_all(&end)?;
        self.out.flush()
    }
}

/// The extra field of these values; none of none.
fn extra_64(values: &[u64]) -> Vec<u8> {
    if values.is_empty() {
        return Vec::new();
    }
    let mut field = EXTRA_64.to_le_bytes().to_vec();
    field.extend((8 * values.len() as u16).to_le_bytes());
    values.iter().for_each(|value| field.extend(value.to_le_bytes()));
    field
}
