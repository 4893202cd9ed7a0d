//! Every limit two processes share. Twin: protocol/limits.py, which gives the reasons;
//! tests/protocol/test_spec.py compares the two.

pub const BLOCK_BYTES: u64 = 4096;
pub const REGION_BYTES: u64 = 4 * 1024 * 1024;
pub const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK_BYTES;
pub const VOLUME_BYTES_MIN: u64 = REGION_BYTES;
pub const VOLUME_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024 * 1024;
pub const FRAME_DATA_BYTES_MAX: u64 = 1024 * 1024;
pub const FRAME_PAYLOAD_BYTES_MAX: u64 = FRAME_DATA_BYTES_MAX + 8 * (FRAME_DATA_BYTES_MAX / BLOCK_BYTES);
pub const ZERO_BYTES_MAX: u64 = 64 * 1024 * 1024;
pub const NBD_REQUEST_BYTES_MAX: u64 = 32 * 1024 * 1024;
