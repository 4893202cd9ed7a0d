//! Writing to a store. Every function here needs its regions marked (`begin_marks`), writes data before
//! entries, and leaves entries in memory until `commit`.

use crate::canary::{self, Canary};
use crate::checksum::{block_checksum, ENTRY_ABSENT, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS};

use super::error::{ErrorKind, Result, StoreError};
use super::files::BlockFile;
use super::format::{bit, set_bit, Bits, BIT_WORDS};
use super::read::Plan;
use super::store::{pieces, Store};

const BLOCK: usize = BLOCK_BYTES as usize;

impl<F: BlockFile> Store<F> {
    /// Writes whole blocks whose checksums the caller has verified: one u64 per block in `checksums`.
    pub fn write_blocks(
        &mut self,
        first_block: u64,
        checksums: &[u8],
        data: &[u8],
        request_id: u64,
    ) -> Result<()> {
        self.note_fresh(first_block, (data.len() / BLOCK) as u64);
        self.put_blocks(first_block, checksums, data, request_id)
    }

    fn put_blocks(&mut self, first_block: u64, checksums: &[u8], data: &[u8], request_id: u64) -> Result<()> {
        assert_eq!(checksums.len() / 8, data.len() / BLOCK);
        self.check_alive()?;
        let count = (data.len() / BLOCK) as u64;
        self.load_chunks(first_block, count)?;
        self.note_write(first_block, count, request_id);
        let entry = |index: usize| {
            u64::from_le_bytes(checksums[index * 8..index * 8 + 8].try_into().expect("8 bytes"))
        };
        match self.layers[0].data.write_at(data, first_block * BLOCK_BYTES) {
            Ok(()) => self.set_entries(first_block, count, entry),
            Err(short) => {
                // What arrived is a write whose outcome nobody promised; its entries must say what is there.
                let whole = (short.written_bytes / BLOCK) as u64;
                self.set_entries(first_block, whole, entry)?;
                if short.written_bytes % BLOCK != 0 {
                    self.settle_torn(first_block + whole)?;
                }
                return Err(StoreError::from_io("writing data", &short.error));
            }
        }?;
        self.counters.writes += 1;
        self.counters.write_bytes += data.len() as u64;
        Ok(())
    }

    /// Read, modify, write within one block. A resync still copies the block: what the fragment left of it
    /// is as stale as before.
    pub fn write_partial(&mut self, offset_bytes: u64, fragment: &[u8], request_id: u64) -> Result<()> {
        self.check_alive()?;
        let block = offset_bytes / BLOCK_BYTES;
        let mut data = [0; BLOCK];
        if self.read_block(block, &mut data)?.is_none() {
            self.note_damaged(block);
            return Err(StoreError::new(ErrorKind::Damaged, format!("block {block} has no good copy here")));
        }
        let at = (offset_bytes % BLOCK_BYTES) as usize;
        data[at..at + fragment.len()].copy_from_slice(fragment);
        let checksum = block_checksum(block, &data);
        self.put_blocks(block, &checksum.to_le_bytes(), &data, request_id)
    }

    /// Makes blocks read as zero. `keep` leaves (or makes) their space allocated.
    pub fn zero_blocks(&mut self, first_block: u64, count: u64, keep: bool, request_id: u64) -> Result<()> {
        self.check_alive()?;
        // Also blocks that read as zero already: the source may not have zeroed them yet.
        self.note_fresh(first_block, count);
        for (region, first, end) in pieces(first_block, count) {
            if let Some((first, end)) = self.zero_extent(region, first, end, keep)? {
                self.zero_piece(region, first, end, keep, request_id)?;
            }
        }
        self.counters.writes += 1;
        Ok(())
    }

    /// The part of a region that a zeroing must touch; `None` when it reads as zero already.
    fn zero_extent(
        &mut self,
        region: u32,
        first: usize,
        end: usize,
        keep: bool,
    ) -> Result<Option<(usize, usize)>> {
        let alone = self.layers.len() == 1;
        let place = self.chunk(0, region)?;
        let entries = self.layers[0].map.chunk(place).entries();
        let must = |index: &usize| match entries[*index] {
            ENTRY_ABSENT => keep || !alone,
            ENTRY_ZERO => keep,
            _ => true,
        };
        let low = (first..end).find(must);
        let high = (first..end).rev().find(must);
        Ok(low.zip(high).map(|(low, high)| (low, high + 1)))
    }

    /// Would zeroing this range change nothing? Then it needs no mark either.
    pub fn zero_is_noop(&mut self, first_block: u64, count: u64, keep: bool) -> Result<bool> {
        for (region, first, end) in pieces(first_block, count) {
            if self.zero_extent(region, first, end, keep)?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The hole first, then the entries. A crash between leaves checksums over zeroes, in a dirty region:
    /// recovery finds the mismatch. The other way round would leave a zero entry over old data.
    fn zero_piece(
        &mut self,
        region: u32,
        first: usize,
        end: usize,
        keep: bool,
        request_id: u64,
    ) -> Result<()> {
        let block = u64::from(region) * REGION_BLOCKS + first as u64;
        let (offset, length) = (block * BLOCK_BYTES, (end - first) as u64 * BLOCK_BYTES);
        self.note_write(block, (end - first) as u64, request_id);
        if canary::is_set(Canary::PunchAfterEntry) {
            self.set_entries(block, (end - first) as u64, |_| ENTRY_ZERO)?;
            self.commit()?;
            let result = self.layers[0].data.punch(offset, length);
            return result.map_err(|error| StoreError::from_io("zeroing", &error));
        }
        let data = &self.layers[0].data;
        let result = if keep { data.zero(offset, length) } else { data.punch(offset, length) };
        match result {
            Ok(()) => self.set_entries(block, (end - first) as u64, |_| ENTRY_ZERO),
            Err(error) => {
                // By hand it may have come part of the way.
                for torn in block..block + (end - first) as u64 {
                    self.settle_torn(torn)?;
                }
                Err(StoreError::from_io("zeroing", &error))
            }
        }
    }

    /// Writes a block only if the copy here does not verify now. Returns whether it did.
    pub fn repair(&mut self, block: u64, checksum: &[u8], data: &[u8], request_id: u64) -> Result<bool> {
        self.check_alive()?;
        let mut found = [0; BLOCK];
        let good = self.read_block(block, &mut found)?.is_some();
        if good && !canary::is_set(Canary::RepairUnconditional) {
            return Ok(false);
        }
        self.write_blocks(block, checksum, data, request_id)?;
        self.counters.repairs += 1;
        Ok(true)
    }

    /// A run of blocks of one region, copied by a resync: written where no live write was since.
    /// `copy` is checksums and data, or `None` for blocks that read as zero. Returns how many were written.
    pub fn write_pulled(
        &mut self,
        first_block: u64,
        count: u64,
        copy: Option<(&[u8], &[u8])>,
    ) -> Result<u64> {
        let region = (first_block / REGION_BLOCKS) as u32;
        // Taken out while this writes: a copy is not a live write.
        let fresh = self.resync.remove(&region);
        let fresh_index = |at: u64| ((first_block + at) % REGION_BLOCKS) as usize;
        let is_fresh = |at: u64| {
            !canary::is_set(Canary::PullOverFresh) && fresh.is_some_and(|bits| bit(&bits, fresh_index(at)))
        };
        let mut written = 0;
        let mut result = Ok(());
        let mut low = 0;
        while low < count && result.is_ok() {
            let high = (low..count).find(|at| is_fresh(*at)).unwrap_or(count);
            if high > low {
                let (start, blocks) = (first_block + low, high - low);
                result = match copy {
                    Some((checksums, data)) => {
                        let (low, high) = (low as usize, high as usize);
                        self.write_blocks(
                            start,
                            &checksums[low * 8..high * 8],
                            &data[low * BLOCK..high * BLOCK],
                            0,
                        )
                    }
                    None => self.zero_blocks(start, blocks, false, 0),
                };
                written += blocks;
            }
            low = high + 1;
        }
        if let Some(fresh) = fresh {
            self.resync.insert(region, fresh);
        }
        result?;
        let mut settled = self.settled_blocks(region);
        let first = (first_block % REGION_BLOCKS) as usize;
        (first..first + count as usize).for_each(|index| set_bit(&mut settled, index));
        self.settle_blocks(region, &settled);
        Ok(written)
    }

    /// A block of which no good copy is to be had: readers are told so. Its region must be marked.
    pub(super) fn set_damaged(&mut self, block: u64) -> Result<()> {
        self.check_alive()?;
        self.load_chunks(block, 1)?;
        self.note_write(block, 1, 0);
        self.set_entries(block, 1, |_| ENTRY_DAMAGED)?;
        self.note_damaged(block);
        Ok(())
    }

    /// The blocks of a region that a resync must not touch, if it is being resynced.
    pub fn fresh_blocks(&self, region: u32) -> Bits {
        if canary::is_set(Canary::PullOverFresh) {
            return [0; BIT_WORDS];
        }
        self.resync.get(&region).copied().unwrap_or([0; BIT_WORDS])
    }

    /// Blocks of a region that are as some source of this resync has them: another source that has no good
    /// copy of one takes nothing away.
    pub(super) fn settled_blocks(&self, region: u32) -> Bits {
        self.settled.get(&region).copied().unwrap_or([0; BIT_WORDS])
    }

    pub(super) fn settle_blocks(&mut self, region: u32, settled: &Bits) {
        if self.resync.contains_key(&region) {
            self.settled.insert(region, *settled);
        }
    }

    fn load_chunks(&mut self, first_block: u64, count: u64) -> Result<()> {
        for (region, _, _) in pieces(first_block, count) {
            self.chunk(0, region)?;
        }
        Ok(())
    }

    fn note_write(&mut self, first_block: u64, count: u64, request_id: u64) {
        self.write_seq += 1;
        self.data_unsynced = true;
        for (region, _, _) in pieces(first_block, count) {
            let first_here = self.log.dirty().get(&region).is_some_and(|known| known.last_write_id == 0);
            self.log.note_write(region, request_id, self.now_ms);
            if first_here && request_id != 0 {
                self.mark_ahead(region);
            }
        }
    }

    /// A live write has replaced these whole blocks: a resync must not touch them any more.
    fn note_fresh(&mut self, first_block: u64, count: u64) {
        if self.resync.is_empty() {
            return;
        }
        for (region, first, end) in pieces(first_block, count) {
            if let Some(fresh) = self.resync.get_mut(&region) {
                (first..end).for_each(|index| set_bit(fresh, index));
            }
        }
    }

    fn set_entries(&mut self, first_block: u64, count: u64, entry: impl Fn(usize) -> u64) -> Result<()> {
        let mut at = 0;
        for (region, first, end) in pieces(first_block, count) {
            let place = match self.chunk(0, region) {
                Ok(place) => place,
                Err(error) => {
                    // The data is there and its entries cannot be: only recovery can put that right.
                    self.fail(&error.message);
                    return Err(error);
                }
            };
            let map = &mut self.layers[0].map;
            let mut unstable = [0; BIT_WORDS];
            let mut any = false;
            for index in first..end {
                if !map.set(place, index, entry(at)) {
                    set_bit(&mut unstable, index);
                    any = true;
                }
                at += 1;
            }
            if any {
                let known = self.unstable.entry(region).or_insert([0; BIT_WORDS]);
                known.iter_mut().zip(unstable).for_each(|(word, added)| *word |= added);
            }
        }
        Ok(())
    }

    /// A block of which unknown parts were written: its entry becomes what the data says now.
    fn settle_torn(&mut self, block: u64) -> Result<()> {
        let mut plan = Plan::default();
        let mut data = [0; BLOCK];
        let place = self.chunk(0, (block / REGION_BLOCKS) as u32)?;
        plan.entries.push(self.layers[0].map.chunk(place).entries()[(block % REGION_BLOCKS) as usize]);
        let offset = block * BLOCK_BYTES;
        if plan.entries[0] <= ENTRY_ZERO {
            // Unseen so far, and to stay so; beneath such an entry data must be zero.
            return match self.layers[0].data.punch(offset, BLOCK_BYTES) {
                Ok(()) => Ok(()),
                Err(error) => {
                    self.fail(&format!("undoing a write: {error}"));
                    Err(StoreError::from_io("undoing a write", &error))
                }
            };
        }
        let found = match self.layers[0].data.read_at(&mut data, offset) {
            Ok(BLOCK) => block_checksum(block, &data),
            Ok(_) | Err(_) => ENTRY_DAMAGED,
        };
        if plan.entries[0] == ENTRY_DAMAGED {
            return Ok(());
        }
        self.set_entries(block, 1, |_| found)
    }
}
