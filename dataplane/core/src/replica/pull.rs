//! Making regions of this replica equal to a source's: the resync puller.
//!
//! Blocking client code on a thread of Python's. Compares checksums first, copies only what differs,
//! verifies every copied block, and never writes over a block that a live write made fresh. What is done
//! stays done when it fails. Called by replica/io_path.py through service.rs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{recv, send, RecvFlags, SendFlags};

use crate::checksum::{block_checksum, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::frame::{kind, status, Header, HEADER_BYTES, REPLY};
use crate::limits::{BLOCK_BYTES, FRAME_DATA_BYTES_MAX, REGION_BLOCKS, REGION_BYTES};

use super::error::{ErrorKind, Result, StoreError};
use super::format::bit;
use super::handle::{RealFile, Shared, StoreHandle};
use super::read::Plan;
use super::store::Store;

const BLOCK: usize = BLOCK_BYTES as usize;
/// A source that says nothing for this long is given up; the caller tries another.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// READs under way: enough to fill a fast link, little enough not to crowd out clients.
const READS_IN_FLIGHT_MAX: usize = 4;
/// Regions being compared ahead of the copying.
const SUMMARIES_IN_FLIGHT_MAX: usize = 4;
/// Runs waiting to be read before another region is compared.
const RUNS_WAITING_MAX: usize = 256;
/// Equal blocks between two differing ones that are read along, to save a request.
const GAP_BLOCKS_MAX: u64 = 2;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pulled {
    pub regions: u64,
    pub blocks_compared: u64,
    pub blocks_copied: u64,
    pub bytes_copied: u64,
    /// The source has no good copy of these; they were left as they are.
    pub blocks_unreadable: u64,
}

enum Asked {
    Summary { region: u32 },
    Read { region: u32, first_block: u64, count: u64 },
}

#[derive(Default)]
struct Region {
    reads_left: usize,
    unreadable: bool,
}

struct Puller<'a> {
    shared: &'a Shared,
    handle: &'a Arc<StoreHandle>,
    epoch: u64,
    /// The store's when this pull began.
    generation: u64,
    size_bytes: u64,
    source: Source,
    asked: HashMap<u64, Asked>,
    reads_in_flight: usize,
    runs: VecDeque<(u32, u64, u64)>,
    open: HashMap<u32, Region>,
    pulled: Pulled,
}

pub fn pull_regions(
    shared: &Shared,
    handle: &Arc<StoreHandle>,
    fd: OwnedFd,
    epoch: u64,
    regions: &[u32],
) -> Result<Pulled> {
    let (size_bytes, generation) = {
        let guarded = handle.lock(shared);
        (guarded.store.size_bytes(), guarded.store.resync_generation())
    };
    let mut puller = Puller {
        shared,
        handle,
        epoch,
        generation,
        size_bytes,
        source: Source { fd, epoch, next_id: 1, input: vec![0; 256 * 1024], start: 0, end: 0 },
        asked: HashMap::new(),
        reads_in_flight: 0,
        runs: VecDeque::new(),
        open: HashMap::new(),
        pulled: Pulled::default(),
    };
    let mut waiting: VecDeque<u32> = regions.iter().copied().collect();
    while !(waiting.is_empty() && puller.asked.is_empty() && puller.runs.is_empty()) {
        puller.ask(&mut waiting)?;
        puller.take_reply()?;
    }
    Ok(puller.pulled)
}

impl Puller<'_> {
    /// Keeps the source busy, within limits.
    fn ask(&mut self, waiting: &mut VecDeque<u32>) -> Result<()> {
        while self.reads_in_flight < READS_IN_FLIGHT_MAX {
            let Some((region, first_block, count)) = self.runs.pop_front() else { break };
            let id = self.source.ask(kind::READ, first_block * BLOCK_BYTES, count * BLOCK_BYTES)?;
            self.asked.insert(id, Asked::Read { region, first_block, count });
            self.reads_in_flight += 1;
        }
        while self.asked.len() - self.reads_in_flight < SUMMARIES_IN_FLIGHT_MAX
            && self.runs.len() < RUNS_WAITING_MAX
        {
            let Some(region) = waiting.pop_front() else { break };
            let offset = u64::from(region) * REGION_BYTES;
            if offset >= self.size_bytes {
                return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {region}")));
            }
            let length = REGION_BYTES.min(self.size_bytes - offset);
            let id = self.source.ask(kind::REGION_SUMMARY, offset, length)?;
            self.asked.insert(id, Asked::Summary { region });
        }
        Ok(())
    }

    fn take_reply(&mut self) -> Result<()> {
        let (header, payload) = self.source.receive()?;
        let Some(asked) = self.asked.remove(&header.request_id) else {
            return Err(source_failed("it answered what was not asked"));
        };
        match header.status {
            status::OK => {}
            status::STALE_EPOCH => {
                return Err(StoreError::new(ErrorKind::StaleEpoch, "the source is in another epoch"));
            }
            code => return Err(source_failed(&format!("it answered with status {code}"))),
        }
        match asked {
            Asked::Summary { region } => self.compare(region, &payload),
            Asked::Read { region, first_block, count } => {
                self.reads_in_flight -= 1;
                self.copy(region, first_block, count, &payload)
            }
        }
    }

    /// With the store locked, before anything is changed: does this pull still serve the resync that it was
    /// begun for? What an earlier one has read may be older than what was written since.
    fn check_current(&self, store: &Store<RealFile>) -> Result<()> {
        if store.epoch() != self.epoch {
            let why = format!("epoch {} was claimed here", store.epoch());
            return Err(StoreError::new(ErrorKind::StaleEpoch, why));
        }
        if store.resync_generation() != self.generation {
            return Err(StoreError::new(ErrorKind::Closed, "the resync that this pull belongs to is over"));
        }
        Ok(())
    }

    /// Zeroes what must be zero, and lists what must be read.
    fn compare(&mut self, region: u32, summary: &[u8]) -> Result<()> {
        let first_block = u64::from(region) * REGION_BLOCKS;
        let count = REGION_BLOCKS.min(self.size_bytes / BLOCK_BYTES - first_block);
        if summary.len() as u64 != count * 8 {
            return Err(source_failed("a summary of another length"));
        }
        let theirs: Vec<u64> = summary
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
            .collect();
        let mut guarded = self.handle.ensure_marked(self.shared, region..=region, true)?;
        self.check_current(&guarded.store)?;
        let fresh = guarded.store.fresh_blocks(region);
        let mut plan = Plan::default();
        guarded.store.locate(first_block, count, &mut plan)?;
        let mut state = Region::default();
        let (mut to_zero, mut to_read) = (Vec::new(), Vec::new());
        for (index, (mine, theirs)) in plan.entries.iter().zip(&theirs).enumerate() {
            let block = first_block + index as u64;
            let both_zero = *mine <= ENTRY_ZERO && *theirs <= ENTRY_ZERO;
            if bit(&fresh, index) || both_zero || (mine == theirs && *mine != ENTRY_DAMAGED) {
                continue;
            }
            match *theirs {
                ENTRY_DAMAGED => {
                    state.unreadable = true;
                    self.pulled.blocks_unreadable += 1;
                }
                theirs if theirs <= ENTRY_ZERO => extend(&mut to_zero, block, 0),
                _ => extend(&mut to_read, block, GAP_BLOCKS_MAX),
            }
        }
        for (low, high) in to_zero {
            self.pulled.blocks_copied += guarded.store.write_pulled(low, high - low, None)?;
        }
        let committed = guarded.store.commit();
        self.shared.settle(self.handle, &mut guarded);
        drop(guarded);
        committed?;
        self.pulled.blocks_compared += count;
        for (low, high) in to_read {
            let mut at = low;
            while at < high {
                let blocks = (high - at).min(FRAME_DATA_BYTES_MAX / BLOCK_BYTES);
                self.runs.push_back((region, at, blocks));
                state.reads_left += 1;
                at += blocks;
            }
        }
        self.open.insert(region, state);
        self.close_if_done(region)
    }

    /// Verifies what was read and writes it.
    fn copy(&mut self, region: u32, first_block: u64, count: u64, payload: &[u8]) -> Result<()> {
        let entries_bytes = count as usize * 8;
        let Some((entries, data)) = payload.split_at_checked(entries_bytes) else {
            return Err(source_failed("a short reply"));
        };
        let entries: Vec<u64> = entries
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
            .collect();
        let present = entries.iter().filter(|entry| **entry > ENTRY_DAMAGED).count();
        if data.len() != present * BLOCK {
            return Err(source_failed("a reply of another length"));
        }
        let mut blocks = data.chunks_exact(BLOCK);
        for (block, entry) in (first_block..).zip(&entries) {
            if *entry > ENTRY_DAMAGED && blocks.next().map(|data| block_checksum(block, data)) != Some(*entry)
            {
                return Err(source_failed(&format!("block {block} did not verify on arrival")));
            }
        }
        let mut guarded = self.handle.ensure_marked(self.shared, region..=region, true)?;
        self.check_current(&guarded.store)?;
        let mut at = 0;
        let mut data_at = 0;
        let mut copied = 0;
        let mut unreadable = 0;
        while at < entries.len() {
            let class = |entry: u64| entry.clamp(ENTRY_ZERO, ENTRY_DAMAGED + 1);
            let end = (at..entries.len())
                .find(|i| class(entries[*i]) != class(entries[at]))
                .unwrap_or(entries.len());
            let (block, run) = (first_block + at as u64, (end - at) as u64);
            match entries[at] {
                ENTRY_DAMAGED => unreadable += run,
                entry if entry <= ENTRY_ZERO => copied += guarded.store.write_pulled(block, run, None)?,
                _ => {
                    let sums = &payload[at * 8..end * 8];
                    let bytes = &data[data_at..data_at + (end - at) * BLOCK];
                    let written = guarded.store.write_pulled(block, run, Some((sums, bytes)))?;
                    copied += written;
                    self.pulled.bytes_copied += written * BLOCK_BYTES;
                    data_at += bytes.len();
                }
            }
            at = end;
        }
        let committed = guarded.store.commit();
        self.shared.settle(self.handle, &mut guarded);
        drop(guarded);
        committed?;
        self.pulled.blocks_copied += copied;
        self.pulled.blocks_unreadable += unreadable;
        let state = self.open.get_mut(&region).expect("a region that is read is open");
        state.reads_left -= 1;
        state.unreadable |= unreadable > 0;
        self.close_if_done(region)
    }

    /// A region with unreadable blocks stays in the set: another source may have them, and then it must
    /// still be known which blocks are fresh.
    fn close_if_done(&mut self, region: u32) -> Result<()> {
        if self.open.get(&region).is_some_and(|state| state.reads_left == 0) {
            let state = self.open.remove(&region).expect("it is there");
            if !state.unreadable {
                let mut guarded = self.handle.lock(self.shared);
                self.check_current(&guarded.store)?;
                guarded.store.resync_done(region);
                drop(guarded);
                self.pulled.regions += 1;
            }
        }
        Ok(())
    }
}

/// Adds a block to the last run, or begins one.
fn extend(runs: &mut Vec<(u64, u64)>, block: u64, gap_max: u64) {
    match runs.last_mut() {
        Some((_, end)) if block <= *end + gap_max => *end = block + 1,
        _ => runs.push((block, block + 1)),
    }
}

fn source_failed(why: &str) -> StoreError {
    StoreError::new(ErrorKind::SourceFailed, format!("the source failed: {why}"))
}

fn unreachable(why: &str) -> StoreError {
    StoreError::new(ErrorKind::Unreachable, format!("the source is gone: {why}"))
}

/// The connection to the source.
struct Source {
    fd: OwnedFd,
    epoch: u64,
    next_id: u64,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

impl Source {
    fn ask(&mut self, kind: u8, offset_bytes: u64, length_bytes: u64) -> Result<u64> {
        let request_id = self.next_id;
        self.next_id += 1;
        let header = Header {
            kind,
            request_id,
            epoch: self.epoch,
            offset_bytes,
            length_bytes: length_bytes as u32,
            ..Header::default()
        };
        let bytes = header.encode();
        let mut sent = 0;
        while sent < bytes.len() {
            match send(&self.fd, &bytes[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(unreachable(&error.to_string())),
            }
        }
        Ok(request_id)
    }

    fn receive(&mut self) -> Result<(Header, Vec<u8>)> {
        let mut first = [0; HEADER_BYTES];
        self.receive_exactly(&mut first)?;
        let header = Header::decode(&first).map_err(|why| source_failed(&format!("a bad frame: {why:?}")))?;
        if header.kind & REPLY == 0 {
            return Err(source_failed("a request where replies belong"));
        }
        let mut payload = vec![0; header.payload_bytes as usize];
        self.receive_exactly(&mut payload)?;
        Ok((header, payload))
    }

    fn receive_exactly(&mut self, wanted: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < wanted.len() {
            if self.start == self.end {
                // The rest of a large payload goes straight to its place.
                let direct = wanted.len() - done >= self.input.len();
                let place = if direct { &mut wanted[done..] } else { &mut self.input[..] };
                match recv(&self.fd, place, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => return Err(unreachable("it closed the connection")),
                    Ok((count, _)) if direct => done += count,
                    Ok((count, _)) => (self.start, self.end) = (0, count),
                    Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(unreachable(&error.to_string())),
                }
                continue;
            }
            let count = (self.end - self.start).min(wanted.len() - done);
            wanted[done..done + count].copy_from_slice(&self.input[self.start..self.start + count]);
            self.start += count;
            done += count;
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags) -> Result<()> {
        let deadline = Instant::now() + SILENCE_MAX;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.fd, flags)], Some(&timeout)) {
                Ok(0) => return Err(unreachable("it said nothing for 10 s")),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(unreachable(&error.to_string())),
            }
        }
    }
}
