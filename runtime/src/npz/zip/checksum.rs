//! The checksum of ZIP archives: CRC-32 with the polynomial of IEEE 802.3, bits reflected, eight bytes at a time.

/// What a byte contributes that lies `distance` bytes before the end of a word: `TABLES[distance][byte]`.
static TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ if value & 1 == 1 { 0xedb8_8320 } else { 0 };
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut distance = 1;
    while distance < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[distance - 1][byte];
            tables[distance][byte] = (before >> 8) ^ tables[0][(before & 255) as usize];
            byte += 1;
        }
        distance += 1;
    }
    tables
}

/// The checksum of the bytes so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Checksum(u32);

impl Checksum {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        let mut value = !self.0;
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            let mixed = u64::from_le_bytes(*word) ^ u64::from(value);
            value = 0;
            for (table, byte) in TABLES.iter().rev().zip(mixed.to_le_bytes()) {
                value ^= table[usize::from(byte)];
            }
        }
        for &byte in rest {
            value = (value >> 8) ^ TABLES[0][usize::from(value as u8 ^ byte)];
        }
        self.0 = !value;
    }

    pub(super) fn value(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_one_everyone_computes() {
        let mut whole = Checksum::default();
        whole.update(b"123456789");
        assert_eq!(whole.value(), 0xcbf4_3926);
        let text = b"The quick brown fox jumps over the lazy dog";
        for cut in 0..text.len() {
            let mut parts = Checksum::default();
            parts.update(&text[..cut]);
            parts.update(&text[cut..]);
            assert_eq!(parts.value(), 0x414f_a339);
        }
        assert_eq!(Checksum::default().value(), 0);
    }
}
