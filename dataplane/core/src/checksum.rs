//! The one checksum: xxh3_64 of a block, seeded with where the block belongs.
//! Used by both loops; the Python twin is replica/checksum.py.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::canary::{self, Canary};

/// Block map entries below the smallest checksum.
pub const ENTRY_ABSENT: u64 = 0;
pub const ENTRY_ZERO: u64 = 1;
pub const ENTRY_DAMAGED: u64 = 2;
/// Checksums of 0, 1 or 2 are stored as this value.
pub const CHECKSUM_MIN: u64 = 3;

/// Checksum of one whole block. `block_index` is the block's number in the volume: a block that
/// lands in the wrong place does not verify there (C16).
#[inline]
pub fn block_checksum(block_index: u64, data: &[u8]) -> u64 {
    let place = if canary::is_set(Canary::ChecksumWithoutPlace) { 0 } else { block_index };
    xxh3_64_with_seed(data, place).max(CHECKSUM_MIN)
}

/// Checksum of part of a block, which travels with a WRITE_PARTIAL frame; seeded with the byte offset.
#[inline]
pub fn fragment_checksum(offset_bytes: u64, data: &[u8]) -> u64 {
    xxh3_64_with_seed(data, offset_bytes)
}

/// Low half of xxh3_64: guards headers and records against damage.
#[inline]
pub fn short_check(data: &[u8]) -> u32 {
    xxh3_64(data) as u32
}
