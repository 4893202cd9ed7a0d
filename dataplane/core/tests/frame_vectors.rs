//! The golden vectors that tests/protocol/test_frames.py reads as well: both languages must agree
//! with the file, and so with each other and with every earlier release of the same version.

use dolmen_core::checksum::{block_checksum, fragment_checksum};
use dolmen_core::frame::{BadHeader, Header, HEADER_BYTES};

const VECTORS: &str = include_str!("../../../tests/protocol/vectors.txt");

/// The rows that begin with `word`, without it.
fn rows(word: &str) -> Vec<Vec<&'static str>> {
    let rows: Vec<Vec<&str>> = VECTORS
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|row| row.first() == Some(&word))
        .map(|row| row[1..].to_vec())
        .collect();
    assert!(!rows.is_empty(), "no row {word}");
    rows
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} is not a number of this size"))
}

fn header_bytes(text: &str) -> [u8; HEADER_BYTES] {
    assert_eq!(text.len(), 2 * HEADER_BYTES);
    let mut bytes = [0; HEADER_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).expect("hexadecimal");
    }
    bytes
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| ((31 * i + seed) % 256) as u8).collect()
}

#[test]
fn golden_frames_decode_and_encode() {
    for row in rows("frame") {
        let [name, kind, flags, request_id, epoch, offset, length, payload, status, bytes] = row[..] else {
            panic!("a row of {} columns", row.len());
        };
        let expected = Header {
            kind: number(kind),
            flags: number(flags),
            request_id: number(request_id),
            epoch: number(epoch),
            offset_bytes: number(offset),
            length_bytes: number(length),
            payload_bytes: number(payload),
            status: number(status),
        };
        let bytes = header_bytes(bytes);
        assert_eq!(Header::decode(&bytes), Ok(expected), "{name}");
        assert_eq!(expected.encode(), bytes, "{name}");
    }
}

#[test]
fn golden_bad_headers_are_refused() {
    for row in rows("refused") {
        let expected = match row[0] {
            "magic" => BadHeader::Magic,
            "version" => BadHeader::Version,
            "check" => BadHeader::Check,
            "payload" => BadHeader::PayloadTooLarge,
            other => panic!("unknown reason {other}"),
        };
        assert_eq!(Header::decode(&header_bytes(row[1])), Err(expected), "{}", row[0]);
    }
}

#[test]
fn golden_checksums_hold() {
    for row in rows("block") {
        let data = pattern(number(row[1]), number(row[2]));
        assert_eq!(block_checksum(number(row[0]), &data), number::<u64>(row[3]));
    }
    for row in rows("fragment") {
        let data = pattern(number(row[1]), number(row[2]));
        assert_eq!(fragment_checksum(number(row[0]), &data), number::<u64>(row[3]));
    }
}
