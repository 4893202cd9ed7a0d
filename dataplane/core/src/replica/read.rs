//! Reading from a store: finding each block's owner through the chain, and verifying what is read.

use std::sync::Arc;

use crate::checksum::{block_checksum, ENTRY_ABSENT, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::frame::{Header, HEADER_BYTES};
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS};

use super::buffers::OutBuffer;
use super::error::Result;
use super::files::{BlockFile, Nowait};
use super::store::{pieces, Store};

const BLOCK: usize = BLOCK_BYTES as usize;

/// NBD's block status flags, as in PROTOCOL.md.
const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Who owns each block of a range, and its entry there.
#[derive(Debug, Default, Clone)]
pub struct Plan {
    pub first_block: u64,
    pub entries: Vec<u64>,
    pub layers: Vec<u8>,
}

impl Plan {
    pub fn present_count(&self) -> usize {
        self.entries.iter().filter(|entry| **entry > ENTRY_DAMAGED).count()
    }

    /// Runs of adjacent present blocks with one owner: (first, end).
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let count = self.entries.len();
            while at < count && self.entries[at] <= ENTRY_DAMAGED {
                at += 1;
            }
            if at == count {
                return None;
            }
            let first = at;
            while at < count && self.entries[at] > ENTRY_DAMAGED && self.layers[at] == self.layers[first] {
                at += 1;
            }
            Some((first, at))
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadResult {
    Done,
    /// The page cache does not hold it all.
    WouldWait,
}

/// Reads the present blocks of `plan` into `data`, back to back. Returns the indices of blocks that do
/// not verify, or `None` when it would have to wait and must not.
pub fn read_present<F: BlockFile>(
    files: &[Arc<F>],
    plan: &Plan,
    data: &mut [u8],
    may_wait: bool,
) -> Option<Vec<usize>> {
    let mut bad = Vec::new();
    let mut at = 0;
    for (first, end) in plan.runs() {
        let file = &files[usize::from(plan.layers[first])];
        let wanted = &mut data[at..at + (end - first) * BLOCK];
        let offset = (plan.first_block + first as u64) * BLOCK_BYTES;
        let got = if may_wait {
            // What could not be read counts as damaged: another replica answers.
            file.read_at(wanted, offset).unwrap_or(0)
        } else {
            match file.read_at_nowait(wanted, offset) {
                Nowait::Done(count) => count,
                Nowait::WouldWait => return None,
                Nowait::Failed(_) => 0,
            }
        };
        for (block, index) in wanted.chunks_exact(BLOCK).zip(first..end) {
            let whole = (index - first + 1) * BLOCK <= got;
            if !whole || block_checksum(plan.first_block + index as u64, block) != plan.entries[index] {
                bad.push(index);
            }
        }
        at += wanted.len();
    }
    Some(bad)
}

/// Turns bad blocks into damaged entries and closes the gaps in `data`. Returns the data's new length.
pub fn drop_bad(plan: &mut Plan, bad: &[usize], data: &mut [u8]) -> usize {
    let (mut from, mut to) = (0, 0);
    for index in 0..plan.entries.len() {
        if plan.entries[index] <= ENTRY_DAMAGED {
            continue;
        }
        if bad.contains(&index) {
            plan.entries[index] = ENTRY_DAMAGED;
        } else {
            data.copy_within(from..from + BLOCK, to);
            to += BLOCK;
        }
        from += BLOCK;
    }
    to
}

/// Lays out the reply to a READ: header, entries, room for the data. Returns the place of the data.
pub fn begin_read_reply<'a>(out: &'a mut OutBuffer, plan: &Plan) -> &'a mut [u8] {
    let entries_bytes = plan.entries.len() * 8;
    let total = HEADER_BYTES + entries_bytes + plan.present_count() * BLOCK;
    &mut out.reserve(total)[HEADER_BYTES + entries_bytes..]
}

/// Fills in header and entries and appends the reply.
pub fn finish_read_reply(out: &mut OutBuffer, header: &Header, plan: &Plan, data_bytes: usize) {
    let entries_bytes = plan.entries.len() * 8;
    let total = HEADER_BYTES + entries_bytes + data_bytes;
    let place = out.reserve(total);
    let mut reply = header.reply(crate::frame::status::OK);
    reply.payload_bytes = (entries_bytes + data_bytes) as u32;
    place[..HEADER_BYTES].copy_from_slice(&reply.encode());
    for (entry, bytes) in plan.entries.iter().zip(place[HEADER_BYTES..].chunks_exact_mut(8)) {
        bytes.copy_from_slice(&entry.to_le_bytes());
    }
    out.append_reserved(total);
}

impl<F: BlockFile> Store<F> {
    /// Fills `plan` for `count` blocks. The owner of a block is the first layer whose entry is not absent.
    pub fn locate(&mut self, first_block: u64, count: u64, plan: &mut Plan) -> Result<()> {
        plan.first_block = first_block;
        plan.entries.clear();
        plan.layers.clear();
        for (region, first, end) in pieces(first_block, count) {
            let place = self.chunk(0, region)?;
            plan.entries.extend_from_slice(&self.layers[0].map.chunk(place).entries()[first..end]);
        }
        plan.layers.resize(plan.entries.len(), 0);
        for layer in 1..self.layers.len() {
            if !plan.entries.contains(&ENTRY_ABSENT) {
                break;
            }
            self.locate_below(layer, plan)?;
        }
        Ok(())
    }

    fn locate_below(&mut self, layer: usize, plan: &mut Plan) -> Result<()> {
        let mut at = 0;
        let (first_block, count) = (plan.first_block, plan.entries.len() as u64);
        for (region, first, end) in pieces(first_block, count) {
            // A sealed layer may be shorter than a head that has grown since.
            if u64::from(region) * REGION_BLOCKS < self.layers[layer].block_count {
                let place = self.chunk(layer, region)?;
                let entries = &self.layers[layer].map.chunk(place).entries()[first..end];
                for (index, entry) in entries.iter().enumerate() {
                    if plan.entries[at + index] == ENTRY_ABSENT && *entry != ENTRY_ABSENT {
                        plan.entries[at + index] = *entry;
                        plan.layers[at + index] = layer as u8;
                    }
                }
            }
            at += end - first;
        }
        Ok(())
    }

    /// Answers a READ into `out`. With `may_wait` false nothing is appended when the disk would be needed.
    pub fn read_into(
        &mut self,
        header: &Header,
        plan: &mut Plan,
        out: &mut OutBuffer,
        may_wait: bool,
    ) -> Result<ReadResult> {
        self.check_alive()?;
        let count = u64::from(header.length_bytes) / BLOCK_BYTES;
        self.locate(header.offset_bytes / BLOCK_BYTES, count, plan)?;
        let mut data_bytes = plan.present_count() * BLOCK;
        if data_bytes > 0 {
            let files: Vec<Arc<F>>;
            let files = if let [only] = self.layers.as_slice() {
                std::slice::from_ref(&only.data)
            } else {
                files = self.data_files();
                &files
            };
            let data = begin_read_reply(out, plan);
            let Some(bad) = read_present(files, plan, data, may_wait) else {
                return Ok(ReadResult::WouldWait);
            };
            if !bad.is_empty() {
                data_bytes = drop_bad(plan, &bad, data);
                for index in bad {
                    self.note_damaged(plan.first_block + index as u64);
                }
            }
        }
        finish_read_reply(out, header, plan, data_bytes);
        self.note_read(header.length_bytes);
        Ok(ReadResult::Done)
    }

    pub fn note_read(&mut self, length_bytes: u32) {
        self.counters.reads += 1;
        self.counters.read_bytes += u64::from(length_bytes);
    }

    /// One block as a reader sees it, or `None` if no good copy is here.
    pub fn read_block(&mut self, block: u64, data: &mut [u8; BLOCK]) -> Result<Option<u64>> {
        let mut plan = Plan::default();
        self.locate(block, 1, &mut plan)?;
        match plan.entries[0] {
            ENTRY_ABSENT | ENTRY_ZERO => {
                data.fill(0);
                Ok(Some(plan.entries[0]))
            }
            ENTRY_DAMAGED => Ok(None),
            entry => {
                let bad = read_present(&self.data_files(), &plan, data, true).expect("it may wait");
                Ok(bad.is_empty().then_some(entry))
            }
        }
    }

    /// Is this block in the page cache, or none to be read at all?
    pub fn is_warm(&mut self, block: u64, plan: &mut Plan) -> Result<bool> {
        self.locate(block, 1, plan)?;
        if plan.present_count() == 0 {
            return Ok(true);
        }
        let mut data = [0; BLOCK];
        let file = &self.layers[usize::from(plan.layers[0])].data;
        Ok(!matches!(file.read_at_nowait(&mut data, block * BLOCK_BYTES), Nowait::WouldWait))
    }

    /// Runs of equal state, as BLOCK_STATUS answers them.
    pub fn block_status(
        &mut self,
        offset_bytes: u64,
        length_bytes: u64,
        plan: &mut Plan,
    ) -> Result<Vec<(u32, u32)>> {
        self.check_alive()?;
        self.locate(offset_bytes / BLOCK_BYTES, length_bytes / BLOCK_BYTES, plan)?;
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for entry in &plan.entries {
            let state = if *entry <= ENTRY_ZERO { STATE_HOLE | STATE_ZERO } else { 0 };
            match runs.last_mut() {
                Some((count, last)) if *last == state => *count += 1,
                _ => runs.push((1, state)),
            }
        }
        Ok(runs)
    }
}
