//! How a request is cut into frames. Pure.
//!
//! Promises: pieces follow each other without gap or overlap; a piece with data never leaves its
//! 1 MiB window, and so never its region; a `Partial` never leaves its block.

use crate::limits::{BLOCK_BYTES, FRAME_DATA_BYTES_MAX, REGION_BYTES, ZERO_BYTES_MAX};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub length: u64,
    /// Less than whole blocks.
    pub partial: bool,
}

impl Piece {
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

const fn down(value: u64, unit: u64) -> u64 {
    value / unit * unit
}

const fn up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

/// The next piece of what is written from `offset` to `end`; whole blocks end at a multiple of `window`.
fn cut(offset: u64, end: u64, window: u64) -> Piece {
    debug_assert!(offset < end);
    if offset % BLOCK_BYTES != 0 || end - offset < BLOCK_BYTES {
        let stop = end.min(down(offset, BLOCK_BYTES) + BLOCK_BYTES);
        return Piece { offset, length: stop - offset, partial: true };
    }
    let stop = down(end, BLOCK_BYTES).min(down(offset, window) + window);
    Piece { offset, length: stop - offset, partial: false }
}

pub fn cut_write(offset: u64, end: u64) -> Piece {
    cut(offset, end, FRAME_DATA_BYTES_MAX)
}

/// `by_region`: some region is waited for, and only a piece inside one region can wait for one.
pub fn cut_zeroes(offset: u64, end: u64, by_region: bool) -> Piece {
    cut(offset, end, if by_region { REGION_BYTES } else { ZERO_BYTES_MAX })
}

/// Whole blocks inside the range: a TRIM may leave its edges alone. None if there is no whole block.
pub fn round_trim(offset: u64, end: u64) -> Option<(u64, u64)> {
    let (first, last) = (up(offset, BLOCK_BYTES), down(end, BLOCK_BYTES));
    (first < last).then_some((first, last))
}

/// The next READ frame for `offset` to `end`: whole blocks around it, inside one 1 MiB window.
pub fn cut_read(offset: u64, end: u64) -> Piece {
    debug_assert!(offset < end);
    let start = down(offset, BLOCK_BYTES);
    let stop = up(end, BLOCK_BYTES).min(down(start, FRAME_DATA_BYTES_MAX) + FRAME_DATA_BYTES_MAX);
    Piece { offset: start, length: stop - start, partial: false }
}

/// The one BLOCK_STATUS frame of a request: its answer may be shorter than what was asked.
pub fn cut_status(offset: u64, end: u64, by_region: bool) -> Piece {
    let start = down(offset, BLOCK_BYTES);
    let longest = if by_region { down(start, REGION_BYTES) + REGION_BYTES } else { start + ZERO_BYTES_MAX };
    let stop = up(end, BLOCK_BYTES).min(longest);
    Piece { offset: start, length: stop - start, partial: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn writes_are_covered_exactly(offset in 0u64..(9 << 20), length in 1u64..(5 << 20)) {
            let end = offset + length;
            let mut at = offset;
            while at < end {
                let piece = cut_write(at, end);
                prop_assert_eq!(piece.offset, at);
                prop_assert!(piece.length > 0 && piece.end() <= end);
                if piece.partial {
                    prop_assert_eq!(at / BLOCK_BYTES, (piece.end() - 1) / BLOCK_BYTES);
                    prop_assert!(piece.length < BLOCK_BYTES);
                } else {
                    prop_assert_eq!(piece.offset % BLOCK_BYTES + piece.length % BLOCK_BYTES, 0);
                    prop_assert_eq!(at / FRAME_DATA_BYTES_MAX, (piece.end() - 1) / FRAME_DATA_BYTES_MAX);
                }
                at = piece.end();
            }
            prop_assert_eq!(at, end);
        }

        #[test]
        fn reads_are_covered_by_whole_blocks(offset in 0u64..(9 << 20), length in 1u64..(5 << 20)) {
            let end = offset + length;
            let mut at = offset;
            while at < end {
                let piece = cut_read(at, end);
                prop_assert!(piece.offset <= at && piece.end() > at);
                prop_assert_eq!(piece.offset % BLOCK_BYTES + piece.length % BLOCK_BYTES, 0);
                prop_assert!(piece.length <= FRAME_DATA_BYTES_MAX);
                prop_assert_eq!(piece.offset / REGION_BYTES, (piece.end() - 1) / REGION_BYTES);
                at = piece.end();
            }
            prop_assert!(at - end < BLOCK_BYTES);
        }
    }
}
