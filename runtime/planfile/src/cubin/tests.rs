//! Files as compilers write them are read, and all others are refused with a reason.

use super::forge::{Forged, forge};
use super::*;

fn forged() -> Forged {
    Forged {
        architecture: 90,
        symbol: "k".to_owned(),
        parameters: 3,
        threads: 128,
        registers: 12,
        shared_bytes: 1424,
        cluster: 2,
        labels: vec![[7; LABEL_BYTES], [9; LABEL_BYTES]],
    }
}

fn why(bytes: &[u8]) -> String {
    Cubin::parse(bytes).err().unwrap_or_else(|| "is fine".to_owned())
}

#[test]
fn says_what_a_kernel_takes_and_needs() {
    let bytes = forge(&forged());
    let cubin = Cubin::parse(&bytes).unwrap();
    assert_eq!(cubin.architecture, 90);
    assert_eq!(cubin.labels().unwrap(), [&[7; LABEL_BYTES], &[9; LABEL_BYTES]]);
    let expected = Function {
        parameters: vec![8; 3],
        max_threads: Some([128, 1, 1]),
        required_threads: None,
        cluster: Some([2, 1, 1]),
        registers: 12,
        shared_bytes: 1424,
    };
    assert_eq!(cubin.function("k"), Ok(expected));
    assert_eq!(cubin.function("l").unwrap_err(), "has no kernel `l`");
    assert_eq!(cubin.function(LABELS).unwrap_err(), format!("has no kernel `{LABELS}`"));
}

#[test]
fn no_part_of_a_file_is_a_file() {
    let bytes = forge(&forged());
    for end in 0..bytes.len() {
        assert!(Cubin::parse(&bytes[..end]).is_err(), "{end} of {} bytes", bytes.len());
    }
    assert_eq!(why(&bytes[..1]), "is no ELF file: it has 1 byte");
    let longer = [&bytes[..], &[0]].concat();
    assert_eq!(why(&longer), format!("has {} bytes, its tables end at {}", longer.len(), bytes.len()));
}

#[test]
fn no_byte_of_the_last_table_is_free() {
    let bytes = forge(&forged());
    for at in bytes.len() - PROGRAM_HEADER_BYTES..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x80;
        assert!(why(&changed).starts_with("segment "), "byte {at}: {}", why(&changed));
    }
}

/// Whatever a byte says, reading ends with an answer.
#[test]
fn changed_bytes_do_no_harm() {
    let bytes = forge(&forged());
    for at in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            if let Ok(cubin) = Cubin::parse(&changed) {
                let _ = (cubin.function("k"), cubin.labels());
            }
        }
    }
}

#[test]
fn other_files_are_named() {
    let changed = |at: usize, byte: u8| {
        let mut bytes = forge(&forged());
        bytes[at] = byte;
        why(&bytes)
    };
    assert_eq!(why(b"MZ\x90\0\0\0\0\0\0"), "is no 64-bit ELF file");
    assert_eq!(changed(4, 1), "is no 64-bit ELF file");
    assert_eq!(changed(18, 62), "is an ELF file of type 2 for machine 62, not a program for CUDA");
    assert_eq!(changed(8, 9), "is by a compiler that is not known (ABI 65, 9)");
}

/// CUDA 12 keeps the architecture elsewhere.
#[test]
fn older_compilers_are_known() {
    let mut bytes = forge(&forged());
    bytes[7..9].copy_from_slice(&OLD_ABI);
    bytes[48..52].copy_from_slice(&0x005a_0d5au32.to_le_bytes());
    assert_eq!(Cubin::parse(&bytes).unwrap().architecture, 90);
}
