//! Archives as others write them, and as nobody should.

use std::io::Cursor;

use super::*;

/// One entry of an archive: what is stored, by which method, and what the directory says of it.
struct Given<'a> {
    name: &'a str,
    method: u16,
    packed: &'a [u8],
    bytes: u64,
    checksum: u32,
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut checksum = Checksum::default();
    checksum.update(bytes);
    checksum.value()
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    miniz_oxide::deflate::compress_to_vec(bytes, 6)
}

/// An archive whose directory has its sizes in 64 bits, as `force_zip64` of Python does for local headers.
fn archive(given: &Given<'_>) -> Vec<u8> {
    let mut local = LOCAL.to_le_bytes().to_vec();
    local.extend([0; 22]);
    local.extend((given.name.len() as u16).to_le_bytes());
    local.extend([0; 2]);
    local.extend(given.name.bytes());
    local.extend(given.packed);
    let at = local.len() as u32;
    let mut central = CENTRAL.to_le_bytes().to_vec();
    central.extend([0; 6]);
    central.extend(given.method.to_le_bytes());
    central.extend([0; 4]);
    central.extend(given.checksum.to_le_bytes());
    central.extend([0xff; 8]);
    central.extend((given.name.len() as u16).to_le_bytes());
    // A field that others define comes first.
    central.extend(26u16.to_le_bytes());
    central.extend([0; 14]);
    central.extend(given.name.bytes());
    central.extend([0x55, 0x54, 2, 0, 1, 2]);
    central.extend([1, 0, 16, 0]);
    central.extend(given.bytes.to_le_bytes());
    central.extend((given.packed.len() as u64).to_le_bytes());
    let mut end = END.to_le_bytes().to_vec();
    end.extend([0, 0, 0, 0, 1, 0, 1, 0]);
    end.extend((central.len() as u32).to_le_bytes());
    end.extend(at.to_le_bytes());
    end.extend([7, 0]);
    end.extend(b"comment");
    [local, central, end].concat()
}

fn unpack(archive: Vec<u8>) -> Result<Vec<u8>, String> {
    let mut archive = Archive::open(Cursor::new(archive))?;
    let entry = archive.entries.first().ok_or("it is empty")?.clone();
    let mut bytes = Vec::new();
    archive.read(&entry)?.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn message(given: &Given<'_>) -> String {
    unpack(archive(given)).unwrap_err()
}

#[test]
fn stored_and_deflated_entries_are_read() {
    let text: Vec<u8> = (0..100_000u32).flat_map(|number| number.wrapping_mul(number).to_le_bytes()).collect();
    let (packed, checksum) = (deflated(&text), checksum(&text));
    let bytes = text.len() as u64;
    let stored = Given { name: "x", method: STORED, packed: &text, bytes, checksum };
    assert!(unpack(archive(&stored)).unwrap() == text);
    let deflated = Given { name: "x", method: DEFLATED, packed: &packed, bytes, checksum };
    assert!(unpack(archive(&deflated)).unwrap() == text);
}

#[test]
fn lies_about_sizes_and_bytes_are_refused() {
    let text = [7; 1000];
    let packed = deflated(&text);
    let honest = || Given { name: "x", method: DEFLATED, packed: &packed, bytes: 1000, checksum: checksum(&text) };
    assert_eq!(unpack(archive(&honest())).unwrap(), text);
    let bomb = message(&Given { bytes: 1 << 40, ..honest() });
    assert!(bomb.contains("cannot unpack to 1099511627776"), "{bomb}");
    assert_eq!(message(&Given { bytes: 999, ..honest() }), "it unpacks to more than it says");
    assert_eq!(message(&Given { bytes: 1001, ..honest() }), "it unpacks to less than it says");
    assert_eq!(message(&Given { checksum: 1, ..honest() }), "its bytes do not match their checksum");
    assert!(message(&Given { packed: &packed[..packed.len() / 2], ..honest() }).contains("end of file"));
    assert!(message(&Given { packed: &[0xff; 9], ..honest() }).contains("damaged"));
    assert!(message(&Given { method: STORED, ..honest() }).contains("cannot unpack"));
    assert!(message(&Given { method: 12, ..honest() }).contains("method 12 is not supported"));
}

#[test]
fn no_cut_and_no_flipped_byte_of_an_archive_panics() {
    let text = b"some bytes, some more bytes";
    let (packed, checksum) = (deflated(text), checksum(text));
    let whole = archive(&Given { name: "x", method: DEFLATED, packed: &packed, bytes: text.len() as u64, checksum });
    for cut in 0..whole.len() {
        assert!(Archive::open(Cursor::new(&whole[..cut])).is_err());
    }
    for at in 0..whole.len() {
        for flip in [1, 0x80, 0xff] {
            let mut flipped = whole.clone();
            flipped[at] ^= flip;
            // Names, times and comments may differ, never what is read.
            if let Ok(bytes) = unpack(flipped) {
                assert_eq!(bytes, text, "byte {at}");
            }
        }
    }
}

#[test]
fn what_is_split_encrypted_or_elsewhere_is_refused() {
    let whole = archive(&Given { name: "x", method: STORED, packed: b"abc", bytes: 3, checksum: checksum(b"abc") });
    assert_eq!(unpack(whole.clone()).unwrap(), b"abc");
    let central = LOCAL_BYTES + 1 + 3;
    let end = whole.len() - END_BYTES - 7;
    let changed = |at: usize, byte: u8| {
        let mut changed = whole.clone();
        changed[at] = byte;
        unpack(changed).unwrap_err()
    };
    assert_eq!(changed(central + 8, 1), "it is encrypted");
    assert_eq!(changed(end + 4, 1), "it is split over several files");
    assert_eq!(changed(central + 42, 1), "no entry begins where the directory says");
    assert!(changed(end + 10, 2).contains("entry 1 of its directory"));
    assert!(changed(LOCAL_BYTES - 2, 0xff).contains("outside of the file"));
    assert!(changed(central + CENTRAL_BYTES, 0xff).contains("not UTF-8"));
    assert_eq!(unpack(b"not an archive".to_vec()).unwrap_err(), "it has no directory at its end");
}

#[test]
fn more_entries_than_16_bits_count_round_trip() {
    let mut file = Cursor::new(Vec::new());
    let mut writer = Writer::new(&mut file);
    for number in 0..70_000u32 {
        writer.add(&number.to_string(), &[&number.to_le_bytes()[..2], &number.to_le_bytes()[2..]]).unwrap();
    }
    writer.finish().unwrap();
    let mut archive = Archive::open(file).unwrap();
    assert_eq!(archive.entries.len(), 70_000);
    let last = archive.entries[69_999].clone();
    let mut bytes = Vec::new();
    archive.read(&last).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((last.name.as_str(), bytes), ("69999", 69_999u32.to_le_bytes().to_vec()));
}
