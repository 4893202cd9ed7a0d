//! What a replica's reply to READ or BLOCK_STATUS says. Pure: payload in, layout out.
//!
//! Promises: no data leaves here as good unless it verifies against its entry and its place.

use crate::checksum::{block_checksum, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::frame::{le_u32, le_u64};
use crate::limits::BLOCK_BYTES;

const BLOCK: usize = BLOCK_BYTES as usize;

/// A run of bytes of the volume, and where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub length: u64,
    /// Where the bytes stand in the payload; None: they are zeroes.
    pub at: Option<usize>,
}

impl Segment {
    /// The part of this segment between two offsets.
    pub fn clip(&self, from: u64, to: u64) -> Option<Segment> {
        let start = self.offset.max(from);
        let end = (self.offset + self.length).min(to);
        (start < end).then(|| Segment {
            offset: start,
            length: end - start,
            at: self.at.map(|at| at + (start - self.offset) as usize),
        })
    }
}

/// The payload does not have the shape that PROTOCOL.md gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

fn append(segments: &mut Vec<Segment>, offset: u64, at: Option<usize>) {
    if let Some(last) = segments.last_mut() {
        let joins = match (last.at, at) {
            (None, None) => true,
            (Some(last_at), Some(at)) => last_at + last.length as usize == at,
            _ => false,
        };
        if joins && last.offset + last.length == offset {
            last.length += BLOCK_BYTES;
            return;
        }
    }
    segments.push(Segment { offset, length: BLOCK_BYTES, at });
}

/// Verify a READ reply for `offset` and `length` (whole blocks). Good runs go to `segments`, block
/// numbers without a good copy to `bad`; both are emptied first.
pub fn verify(
    offset: u64,
    length: u64,
    payload: &[u8],
    segments: &mut Vec<Segment>,
    bad: &mut Vec<u64>,
) -> Result<(), Malformed> {
    segments.clear();
    bad.clear();
    let first = offset / BLOCK_BYTES;
    let count = (length / BLOCK_BYTES) as usize;
    let mut at = count * 8;
    if payload.len() < at {
        return Err(Malformed);
    }
    for index in 0..count {
        let block = first + index as u64;
        let entry = le_u64(payload, index * 8);
        if entry <= ENTRY_ZERO {
            append(segments, block * BLOCK_BYTES, None);
        } else if entry == ENTRY_DAMAGED {
            bad.push(block);
        } else {
            let Some(data) = payload.get(at..at + BLOCK) else {
                return Err(Malformed);
            };
            if block_checksum(block, data) == entry {
                append(segments, block * BLOCK_BYTES, Some(at));
            } else {
                bad.push(block);
            }
            at += BLOCK;
        }
    }
    if at == payload.len() {
        Ok(())
    } else {
        Err(Malformed)
    }
}

/// NBD extents (length, flags) of `offset` to `end` from a BLOCK_STATUS reply for the whole blocks
/// around it. Neighbours that are alike are joined; with `one` only the first is given.
pub fn extents(
    blocks_offset: u64,
    offset: u64,
    end: u64,
    one: bool,
    payload: &[u8],
) -> Result<Vec<(u32, u32)>, Malformed> {
    if payload.is_empty() || payload.len() % 8 != 0 {
        return Err(Malformed);
    }
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let mut at = blocks_offset;
    for run in payload.chunks_exact(8) {
        let (blocks, state) = (le_u32(run, 0), le_u32(run, 4));
        if blocks == 0 || state > 3 {
            return Err(Malformed);
        }
        let stop = at + u64::from(blocks) * BLOCK_BYTES;
        let (from, to) = (at.max(offset), stop.min(end));
        at = stop;
        if from >= to {
            continue;
        }
        match extents.last_mut() {
            Some((length, last)) if *last == state => *length += (to - from) as u32,
            Some(_) if one => break,
            _ => extents.push(((to - from) as u32, state)),
        }
    }
    if extents.is_empty() {
        return Err(Malformed);
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(first_block: u64, blocks: &[Option<u8>]) -> Vec<u8> {
        let mut entries = Vec::new();
        let mut data = Vec::new();
        for (index, block) in blocks.iter().enumerate() {
            match block {
                None => entries.extend_from_slice(&1u64.to_le_bytes()),
                Some(byte) => {
                    let bytes = vec![*byte; BLOCK];
                    let entry = block_checksum(first_block + index as u64, &bytes);
                    entries.extend_from_slice(&entry.to_le_bytes());
                    data.extend_from_slice(&bytes);
                }
            }
        }
        entries.extend_from_slice(&data);
        entries
    }

    #[test]
    fn runs_are_joined_and_a_flipped_bit_or_a_damaged_entry_is_bad() {
        let (mut segments, mut bad) = (Vec::new(), Vec::new());
        let mut payload = reply(8, &[Some(1), Some(2), None, None, Some(3)]);
        verify(8 * 4096, 5 * 4096, &payload, &mut segments, &mut bad).expect("well formed");
        assert_eq!(
            segments,
            [
                Segment { offset: 8 * 4096, length: 8192, at: Some(40) },
                Segment { offset: 10 * 4096, length: 8192, at: None },
                Segment { offset: 12 * 4096, length: 4096, at: Some(40 + 8192) },
            ]
        );
        payload[40 + 4096] ^= 1;
        verify(8 * 4096, 5 * 4096, &payload, &mut segments, &mut bad).expect("well formed");
        assert_eq!(bad, [9]);
        verify(9 * 4096, 5 * 4096, &payload, &mut segments, &mut bad).expect("well formed");
        assert_eq!(bad, [9, 10, 13], "right data in the wrong place does not verify");
        payload[0] = 2;
        payload[1..8].fill(0);
        assert_eq!(verify(8 * 4096, 5 * 4096, &payload, &mut segments, &mut bad), Err(Malformed));
    }

    #[test]
    fn extents_are_cut_to_the_request() {
        let mut payload = Vec::new();
        for (blocks, state) in [(2u32, 0u32), (3, 3), (1, 3), (4, 0)] {
            payload.extend_from_slice(&blocks.to_le_bytes());
            payload.extend_from_slice(&state.to_le_bytes());
        }
        let all = extents(0, 100, 10 * 4096 - 100, false, &payload).expect("well formed");
        assert_eq!(all, [(8192 - 100, 0), (4 * 4096, 3), (4 * 4096 - 100, 0)]);
        assert_eq!(extents(0, 8192, 40960, true, &payload), Ok(vec![(4 * 4096, 3)]));
        assert_eq!(extents(0, 50_000, 60_000, false, &payload), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_payload_makes_it_panic(payload in proptest::collection::vec(any::<u8>(), 0..9000), blocks in 0u64..4) {
            let (mut segments, mut bad) = (Vec::new(), Vec::new());
            let _ = verify(4096, blocks * 4096, &payload, &mut segments, &mut bad);
            let _ = extents(0, 0, 4096, false, &payload);
        }
    }
}
