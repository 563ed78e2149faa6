//! Mutations that keep nested lengths whole, so that what lies inside is reached.

/// Numbers at the edges of what code counts with.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Steele, Lea and Flood, 2014: the next of a sequence that its seed decides.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// Below `limit`; 0 where that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// A number that code tends to get wrong, or one beside it.
    pub fn edge(&mut self) -> u64 {
        let edge = EDGES[self.below(EDGES.len())];
        match self.below(4) {
            0 => edge.wrapping_add(1),
            1 => edge.wrapping_sub(1),
            2 => self.next() % 64,
            _ => edge,
        }
    }
}

/// libFuzzer's own mutations of some bytes.
pub fn mutate_bytes(bytes: &mut Vec<u8>, room: usize) {
    let length = bytes.len();
    let limit = (length + 16).min(length + room).max(length);
    bytes.resize(limit, 0);
    let length = libfuzzer_sys::fuzzer_mutate(bytes, length, limit);
    bytes.truncate(length);
}

/// Changes one thing in a protocol-buffer message, at any depth, and mends the lengths around it.
pub fn mutate_message(bytes: &mut Vec<u8>, random: &mut Random, depth: usize) {
    let Some(mut fields) = fields(bytes).filter(|fields| !fields.is_empty()) else {
        return mutate_bytes(bytes, 16);
    };
    let chosen = random.below(fields.len());
    let field = &mut fields[chosen];
    match (random.below(16), &mut field.value) {
        (0, _) => {
            fields.remove(chosen);
        }
        (1, _) => {
            let copy = fields[chosen].clone();
            fields.insert(chosen, copy);
        }
        (2, _) => {
            let other = random.below(fields.len());
            fields.swap(chosen, other);
        }
        (3, _) => {
            let other = random.below(fields.len());
            let value = fields[other].value.clone();
            fields[chosen].value = value;
        }
        (_, Value::Varint(number)) => *number = random.edge(),
        (_, Value::Fixed(word)) => mutate_fixed(word, random),
        (_, Value::Nested(inner)) if depth < 24 => mutate_message(inner, random, depth + 1),
        (_, Value::Nested(inner)) => mutate_bytes(inner, 16),
    }
    *bytes = fields.iter().fold(Vec::new(), |mut bytes, field| {
        field.write(&mut bytes);
        bytes
    });
}

fn mutate_fixed(word: &mut [u8], random: &mut Random) {
    let edge = random.edge().to_le_bytes();
    let length = word.len();
    word.copy_from_slice(&edge[..length]);
}

#[derive(Clone)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone)]
enum Value {
    Varint(u64),
    Fixed(Vec<u8>),
    Nested(Vec<u8>),
}

/// The fields of a message; `None` for bytes that are none.
fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Value::Varint(varint(&mut bytes)?),
            1 => Value::Fixed(take(&mut bytes, 8)?),
            2 => {
                let length = varint(&mut bytes)?;
                Value::Nested(take(&mut bytes, usize::try_from(length).ok()?)?)
            }
            5 => Value::Fixed(take(&mut bytes, 4)?),
            _ => return None,
        };
        fields.push(Field { number: key >> 3, value });
    }
    Some(fields)
}

impl Field {
    fn write(&self, into: &mut Vec<u8>) {
        let kind = match &self.value {
            Value::Varint(_) => 0,
            Value::Fixed(word) if word.len() == 8 => 1,
            Value::Fixed(_) => 5,
            Value::Nested(_) => 2,
        };
        write_varint(self.number << 3 | kind, into);
        match &self.value {
            Value::Varint(number) => write_varint(*number, into),
            Value::Fixed(word) => into.extend(word),
            Value::Nested(inner) => {
                write_varint(inner.len() as u64, into);
                into.extend(inner);
            }
        }
    }
}

fn take(bytes: &mut &[u8], count: usize) -> Option<Vec<u8>> {
    let (first, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(first.to_vec())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in 0..10 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (shift * 7);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn write_varint(mut number: u64, into: &mut Vec<u8>) {
    while number >= 0x80 {
        into.push(number as u8 | 0x80);
        number >>= 7;
    }
    into.push(number as u8);
}

/// Changes one encoded section of a plan: a number at a random place, or libFuzzer's own.
pub fn mutate_section(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() || random.below(2) == 0 {
        return mutate_bytes(bytes, 32);
    }
    let at = random.below(bytes.len());
    // The encoding of integers: one byte below 251, else a mark and two, four or eight bytes.
    let old = match bytes[at] {
        251 => 3,
        252 => 5,
        253 => 9,
        _ => 1,
    };
    let end = (at + old).min(bytes.len());
    match random.below(4) {
        0 => bytes[at] = bytes[at].wrapping_add(1),
        1 => bytes[at] = bytes[at].wrapping_sub(1),
        _ => {
            let number = random.edge();
            let mut new = Vec::new();
            match number {
                0..251 => new.push(number as u8),
                251..0x1_0000 => {
                    new.push(251);
                    new.extend((number as u16).to_le_bytes());
                }
                0x1_0000..0x1_0000_0000 => {
                    new.push(252);
                    new.extend((number as u32).to_le_bytes());
                }
                _ => {
                    new.push(253);
                    new.extend(number.to_le_bytes());
                }
            }
            bytes.splice(at..end, new);
        }
    }
}

/// Copies what was mutated to libFuzzer's buffer; the new length. What does not fit stays as it was.
pub fn hand_back(data: &mut [u8], size: usize, mutated: &[u8]) -> usize {
    match data.get_mut(..mutated.len()) {
        Some(target) => {
            target.copy_from_slice(mutated);
            mutated.len()
        }
        None => size,
    }
}
