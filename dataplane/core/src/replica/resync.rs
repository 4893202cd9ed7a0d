//! What a resync does to a store, region by region: compare with a source's summary, then take what
//! differs. No socket and no thread: `pull` brings the bytes, and the simulator does it its own way.
//!
//! Never writes over a block that a live write made fresh, and nothing that does not verify.

use crate::checksum::{block_checksum, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::limits::{BLOCK_BYTES, FRAME_DATA_BYTES_MAX, REGION_BLOCKS};

use super::error::{ErrorKind, Result, StoreError};
use super::files::BlockFile;
use super::format::{bit, set_bit};
use super::read::Plan;
use super::store::Store;

const BLOCK: usize = BLOCK_BYTES as usize;

/// A pull's claim on the store: what was true when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    pub epoch: u64,
    pub generation: u64,
    /// Blocks of which the source has no good copy become damaged here too.
    pub take_damaged: bool,
}

/// What happened to blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub blocks_compared: u64,
    pub blocks_copied: u64,
    pub bytes_copied: u64,
    /// The source has no good copy of these; they were left as they are.
    pub blocks_unreadable: u64,
    /// The source has no good copy of these, and now this replica says so as well.
    pub blocks_damaged: u64,
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.blocks_compared += other.blocks_compared;
        self.blocks_copied += other.blocks_copied;
        self.bytes_copied += other.bytes_copied;
        self.blocks_unreadable += other.blocks_unreadable;
        self.blocks_damaged += other.blocks_damaged;
    }
}

/// One region on its way to be equal.
#[derive(Debug)]
pub struct RegionPull {
    region: u32,
    reads_left: usize,
    unreadable: bool,
}

impl RegionPull {
    pub fn reads_are_done(&self) -> bool {
        self.reads_left == 0
    }

    pub fn region(&self) -> u32 {
        self.region
    }
}

fn bad_source(why: &str) -> StoreError {
    StoreError::new(ErrorKind::SourceFailed, format!("the source failed: {why}"))
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect()
}

/// A READ's reply, taken apart and verified: entries and data. The error blames the source.
pub fn verified_reply(first_block: u64, count: u64, payload: &[u8]) -> Result<(Vec<u64>, &[u8])> {
    let Some((entries, data)) = payload.split_at_checked(count as usize * 8) else {
        return Err(bad_source("a short reply"));
    };
    let entries = words(entries);
    let present = entries.iter().filter(|entry| **entry > ENTRY_DAMAGED).count();
    if data.len() != present * BLOCK {
        return Err(bad_source("a reply of another length"));
    }
    let mut blocks = data.chunks_exact(BLOCK);
    for (block, entry) in (first_block..).zip(&entries) {
        if *entry > ENTRY_DAMAGED && blocks.next().map(|data| block_checksum(block, data)) != Some(*entry) {
            return Err(bad_source(&format!("block {block} did not verify on arrival")));
        }
    }
    Ok((entries, data))
}

impl<F: BlockFile> Store<F> {
    pub fn pass(&self, take_damaged: bool) -> Pass {
        Pass { epoch: self.epoch(), generation: self.resync_generation(), take_damaged }
    }

    /// Before anything is changed: does this pull still serve the resync that it was begun for? What an
    /// earlier one has read may be older than what was written since.
    pub fn check_pass(&self, pass: &Pass) -> Result<()> {
        if self.epoch() != pass.epoch {
            let why = format!("epoch {} was claimed here", self.epoch());
            return Err(StoreError::new(ErrorKind::StaleEpoch, why));
        }
        if self.resync_generation() != pass.generation {
            return Err(StoreError::new(ErrorKind::Closed, "the resync that this pull belongs to is over"));
        }
        Ok(())
    }

    /// Zeroes what the source's summary says is zero, and lists what must be read: (first block, count).
    /// The region must be marked; call `commit` before anything is answered.
    pub fn compare_region(
        &mut self,
        pass: &Pass,
        region: u32,
        summary: &[u8],
        tally: &mut Tally,
    ) -> Result<(RegionPull, Vec<(u64, u64)>)> {
        self.check_pass(pass)?;
        let first_block = u64::from(region) * REGION_BLOCKS;
        let count = REGION_BLOCKS.min(self.block_count() - first_block);
        if summary.len() as u64 != count * 8 {
            return Err(bad_source("a summary of another length"));
        }
        let fresh = self.fresh_blocks(region);
        let mut settled = self.settled_blocks(region);
        let mut plan = Plan::default();
        self.locate(first_block, count, &mut plan)?;
        let mut pull = RegionPull { region, reads_left: 0, unreadable: false };
        let (mut to_zero, mut to_read) = (Vec::new(), Vec::new());
        for (index, (mine, theirs)) in plan.entries.iter().zip(words(summary)).enumerate() {
            let block = first_block + index as u64;
            let both_zero = *mine <= ENTRY_ZERO && theirs <= ENTRY_ZERO;
            let equal = both_zero || (*mine == theirs && *mine != ENTRY_DAMAGED);
            if equal {
                set_bit(&mut settled, index);
            }
            if equal || bit(&fresh, index) || (theirs == ENTRY_DAMAGED && bit(&settled, index)) {
                continue;
            }
            match theirs {
                ENTRY_DAMAGED => self.take_unreadable(pass, &mut pull, block, tally)?,
                theirs if theirs <= ENTRY_ZERO => extend(&mut to_zero, block),
                _ => extend(&mut to_read, block),
            }
        }
        self.settle_blocks(region, &settled);
        for (low, high) in to_zero {
            tally.blocks_copied += self.write_pulled(low, high - low, None)?;
        }
        tally.blocks_compared += count;
        let most = FRAME_DATA_BYTES_MAX / BLOCK_BYTES;
        let cut = |(low, high): (u64, u64)| {
            (low..high).step_by(most as usize).map(move |at| (at, most.min(high - at)))
        };
        let runs: Vec<(u64, u64)> = to_read.into_iter().flat_map(cut).collect();
        pull.reads_left = runs.len();
        Ok((pull, runs))
    }

    /// Writes one run that was read and verified. The region must be marked; `commit` before an answer.
    pub fn copy_run(
        &mut self,
        pass: &Pass,
        pull: &mut RegionPull,
        first_block: u64,
        (entries, data): (&[u64], &[u8]),
        tally: &mut Tally,
    ) -> Result<()> {
        self.check_pass(pass)?;
        let class = |entry: u64| entry.clamp(ENTRY_ZERO, ENTRY_DAMAGED + 1);
        let (mut at, mut data_at) = (0, 0);
        while at < entries.len() {
            let other = (at..entries.len()).find(|i| class(entries[*i]) != class(entries[at]));
            let end = other.unwrap_or(entries.len());
            let (block, run) = (first_block + at as u64, (end - at) as u64);
            match entries[at] {
                ENTRY_DAMAGED => {
                    for block in block..block + run {
                        self.take_unreadable(pass, pull, block, tally)?;
                    }
                }
                entry if entry <= ENTRY_ZERO => {
                    tally.blocks_copied += self.write_pulled(block, run, None)?;
                }
                _ => {
                    let sums: Vec<u8> = entries[at..end].iter().flat_map(|sum| sum.to_le_bytes()).collect();
                    let bytes = &data[data_at..data_at + (end - at) * BLOCK];
                    let written = self.write_pulled(block, run, Some((&sums, bytes)))?;
                    tally.blocks_copied += written;
                    tally.bytes_copied += written * BLOCK_BYTES;
                    data_at += bytes.len();
                }
            }
            at = end;
        }
        pull.reads_left -= 1;
        Ok(())
    }

    /// The source has no good copy of this block.
    fn take_unreadable(
        &mut self,
        pass: &Pass,
        pull: &mut RegionPull,
        block: u64,
        tally: &mut Tally,
    ) -> Result<()> {
        let index = (block % REGION_BLOCKS) as usize;
        if bit(&self.fresh_blocks(pull.region), index) {
            return Ok(());
        }
        if pass.take_damaged {
            self.set_damaged(block)?;
            tally.blocks_damaged += 1;
        } else {
            pull.unreadable = true;
            tally.blocks_unreadable += 1;
        }
        Ok(())
    }

    /// All runs of the region are here. Returns whether it is equal now. If not it stays in the set:
    /// another source may have the rest, and then it must still be known which blocks are fresh.
    pub fn finish_region(&mut self, pass: &Pass, pull: &RegionPull) -> Result<bool> {
        assert!(pull.reads_are_done());
        self.check_pass(pass)?;
        if !pull.unreadable {
            self.resync_done(pull.region);
        }
        Ok(!pull.unreadable)
    }
}

/// Adds a block to the last run, or begins one. No equal block is read along: a resync copies what differs.
fn extend(runs: &mut Vec<(u64, u64)>, block: u64) {
    match runs.last_mut() {
        Some((_, end)) if block == *end => *end = block + 1,
        _ => runs.push((block, block + 1)),
    }
}
