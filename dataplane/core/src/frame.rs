#![forbid(unsafe_code)]
//! The data link's frame header and its kinds. Twin: protocol/frames.py; byte table in PROTOCOL.md.
//! Used by the engine's links and the replica's sessions.

use crate::checksum::short_check;
use crate::limits::FRAME_PAYLOAD_BYTES_MAX;

pub const MAGIC: [u8; 4] = *b"DLMN";
pub const FRAME_VERSION: u8 = 1;
pub const HEADER_BYTES: usize = 48;
/// Set in `kind` of every reply.
pub const REPLY: u8 = 0x80;

pub mod kind {
    pub const WRITE: u8 = 1;
    pub const WRITE_PARTIAL: u8 = 2;
    pub const READ: u8 = 3;
    pub const WRITE_ZEROES: u8 = 4;
    pub const TRIM: u8 = 5;
    pub const FLUSH: u8 = 6;
    pub const BLOCK_STATUS: u8 = 7;
    pub const CACHE: u8 = 8;
    pub const COMPLETED: u8 = 9;
    pub const REPAIR: u8 = 10;
    pub const LEASE: u8 = 11;
    pub const REGION_SUMMARY: u8 = 16;
}

pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
}

pub mod status {
    pub const OK: u32 = 0;
    pub const STALE_EPOCH: u32 = 1;
    pub const NO_SPACE: u32 = 2;
    pub const IO_ERROR: u32 = 3;
    pub const BAD_CHECKSUM: u32 = 4;
    pub const BAD_REQUEST: u32 = 5;
    pub const OUT_OF_RANGE: u32 = 6;
    pub const SHUTTING_DOWN: u32 = 7;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub kind: u8,
    pub flags: u16,
    pub request_id: u64,
    pub epoch: u64,
    pub offset_bytes: u64,
    pub length_bytes: u32,
    pub payload_bytes: u32,
    pub status: u32,
}

/// Why a header is refused. The connection it came on is closed: framing is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHeader {
    Magic,
    Version,
    Check,
    PayloadTooLarge,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = FRAME_VERSION;
        bytes[5] = self.kind;
        bytes[6..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.request_id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset_bytes.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.length_bytes.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.status.to_le_bytes());
        let check = short_check(&bytes[0..44]);
        bytes[44..48].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        if bytes[0..4] != MAGIC {
            return Err(BadHeader::Magic);
        }
        if bytes[4] != FRAME_VERSION {
            return Err(BadHeader::Version);
        }
        if le_u32(bytes, 44) != short_check(&bytes[0..44]) {
            return Err(BadHeader::Check);
        }
        let header = Header {
            kind: bytes[5],
            flags: u16::from_le_bytes([bytes[6], bytes[7]]),
            request_id: le_u64(bytes, 8),
            epoch: le_u64(bytes, 16),
            offset_bytes: le_u64(bytes, 24),
            length_bytes: le_u32(bytes, 32),
            payload_bytes: le_u32(bytes, 36),
            status: le_u32(bytes, 40),
        };
        if u64::from(header.payload_bytes) > FRAME_PAYLOAD_BYTES_MAX {
            return Err(BadHeader::PayloadTooLarge);
        }
        Ok(header)
    }

    /// The header of the reply to this request, without payload.
    pub fn reply(&self, status: u32) -> Header {
        Header { kind: self.kind | REPLY, payload_bytes: 0, status, ..*self }
    }
}

/// # Panics
/// If fewer than 4 bytes stand at `at`.
pub fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// # Panics
/// If fewer than 8 bytes stand at `at`.
pub fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_round_trip_and_any_flipped_bit_is_refused() {
        let header = Header {
            kind: kind::WRITE,
            flags: flag::FUA,
            request_id: 7,
            epoch: 3,
            offset_bytes: 8192,
            length_bytes: 4096,
            payload_bytes: 4104,
            status: 0,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged).is_err(), "bit {bit}");
        }
    }
}
