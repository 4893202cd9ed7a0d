//! Any 48 bytes: refused, or a header that encodes to the same bytes and keeps to the limits.
#![no_main]

use dolmen_core::checksum::short_check;
use dolmen_core::frame::{Header, HEADER_BYTES};
use dolmen_core::limits::FRAME_PAYLOAD_BYTES_MAX;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(bytes) = data.first_chunk::<HEADER_BYTES>() else { return };
    let mut bytes = *bytes;
    check(&bytes);
    // The same with a check that fits: random bytes alone would never get past it.
    let check_field = short_check(&bytes[..44]);
    bytes[44..].copy_from_slice(&check_field.to_le_bytes());
    check(&bytes);
});

fn check(bytes: &[u8; HEADER_BYTES]) {
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(&header.encode(), bytes, "a header that was accepted is not what was sent");
        assert!(u64::from(header.payload_bytes) <= FRAME_PAYLOAD_BYTES_MAX);
    }
}
