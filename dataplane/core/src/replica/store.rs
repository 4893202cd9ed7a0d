//! One open replica: its layers, its region log, and what is known about both.
//!
//! Owns the state that every operation shares; reads are in read.rs, writes in write.rs, flushing and
//! cleaning in flush.rs, opening in recovery.rs. Does no locking: one lock around the whole store is
//! held by whoever calls, and never while a file is synced.
//! Promises: what `commit` covers survives the death of the process; what a finished flush covers
//! survives power loss. Crash outcomes: FORMAT.md.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::frame::status;
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS};

use super::error::{ErrorKind, Result, StoreError};
use super::files::{sync, BlockFile};
use super::format::{region_count, Bits, Record, Stamp};
use super::map::{BlockMap, Fault, Trust};
use super::regions::RegionLog;
use crate::region_map::RegionMap;

/// Regions marked ahead of a sequential writer: 32 MiB, what a fast writer fills while a mark is synced.
pub const MARK_AHEAD_REGIONS: u32 = 8;
/// Events kept until somebody takes them; damaged blocks past it are only counted.
const EVENTS_MAX: usize = 1024;

pub struct Layer<F> {
    pub data: Arc<F>,
    pub map: BlockMap<F>,
    pub block_count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    Failed(String),
    BlockDamaged(u64),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub checksum_errors: u64,
    pub repairs: u64,
    pub regions_damaged: u64,
    pub damage_events_dropped: u64,
}

pub struct Store<F> {
    pub(super) size_bytes: u64,
    /// Head first.
    pub(super) layers: Vec<Layer<F>>,
    pub(super) log: RegionLog<F>,
    pub(super) epoch: u64,
    /// Every request of this epoch up to here is answered by all in-sync replicas.
    pub(super) completed_id: u64,
    pub(super) failed: Option<String>,
    /// The superblock says that the page cache lied. The first flush that succeeds puts this boot there.
    pub(super) boot_to_trust: Option<[u8; 16]>,
    /// Entries were lost before the end of their batch: what `commit` will answer.
    pub(super) lost_entries: Option<StoreError>,
    /// Blocks whose entry is newer than the last flush and not stable yet.
    pub(super) unstable: RegionMap<Bits>,
    pub(super) data_unsynced: bool,
    pub(super) write_seq: u64,
    pub(super) flushed_seq: u64,
    /// Regions being resynced: which of their blocks live writes have made fresh.
    pub(super) resync: RegionMap<Bits>,
    /// Of those: which blocks are as one of the sources has them.
    pub(super) settled: RegionMap<Bits>,
    /// Changes with every claim and every begin and end of a resync: a pull that began before may not write.
    pub(super) resync_generation: u64,
    pub(super) now_ms: u64,
    pub counters: Counters,
    pub(super) events: Vec<StoreEvent>,
    /// Held while the store is open: two processes never open one replica.
    pub(super) lock: Option<F>,
}

/// The blocks `first..first + count`, cut at regions: (region, first index, end index).
pub fn pieces(first_block: u64, block_count: u64) -> impl Iterator<Item = (u32, usize, usize)> {
    let end = first_block + block_count;
    let mut at = first_block;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let region = at / REGION_BLOCKS;
        let stop = end.min((region + 1) * REGION_BLOCKS);
        let piece = (region as u32, (at % REGION_BLOCKS) as usize, (stop - region * REGION_BLOCKS) as usize);
        at = stop;
        Some(piece)
    })
}

/// The regions that `length_bytes` (at least 1) from `offset_bytes` touch.
pub fn regions_of(offset_bytes: u64, length_bytes: u64) -> RangeInclusive<u32> {
    let region_bytes = REGION_BLOCKS * BLOCK_BYTES;
    (offset_bytes / region_bytes) as u32..=((offset_bytes + length_bytes - 1) / region_bytes) as u32
}

/// Makes marks durable. No region may be written to before.
pub fn sync_marks<F: BlockFile>(file: &F) -> io::Result<()> {
    if canary::is_set(Canary::MarkNotSynced) {
        return Ok(());
    }
    sync(file)
}

/// What the peer is told. One table for all errors.
pub fn status_of(error: &StoreError) -> u32 {
    match error.kind {
        ErrorKind::NoSpace => status::NO_SPACE,
        ErrorKind::StaleEpoch => status::STALE_EPOCH,
        ErrorKind::BadRequest => status::BAD_REQUEST,
        ErrorKind::Closed => status::SHUTTING_DOWN,
        ErrorKind::IoError
        | ErrorKind::Damaged
        | ErrorKind::NotFound
        | ErrorKind::Unreachable
        | ErrorKind::SourceFailed => status::IO_ERROR,
    }
}

impl<F: BlockFile> Store<F> {
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub fn block_count(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn log(&self) -> &RegionLog<F> {
        &self.log
    }

    /// Data files, head first: what a reader without the lock may read from.
    pub fn data_files(&self) -> Vec<Arc<F>> {
        self.layers.iter().map(|layer| Arc::clone(&layer.data)).collect()
    }

    pub fn map_file(&self) -> Arc<F> {
        Arc::clone(self.layers[0].map.file())
    }

    pub fn regions_file(&self) -> Arc<F> {
        Arc::clone(self.log.file())
    }

    pub fn set_now_ms(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    pub fn check_alive(&self) -> Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(reason) => Err(StoreError::new(ErrorKind::IoError, format!("the store failed: {reason}"))),
        }
    }

    /// After this every operation is refused until the store is opened again: what the page cache holds
    /// is no longer known (C15).
    pub fn fail(&mut self, reason: &str) {
        if self.failed.is_none() {
            self.failed = Some(reason.to_owned());
            self.events.push(StoreEvent::Failed(reason.to_owned()));
        }
    }

    /// Another process may open the replica from now on.
    pub fn release_lock(&mut self) {
        self.fail("it was closed");
        self.events.clear();
        self.lock = None;
    }

    pub fn take_events(&mut self) -> Vec<StoreEvent> {
        std::mem::take(&mut self.events)
    }

    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub fn note_damaged(&mut self, block: u64) {
        self.counters.checksum_errors += 1;
        if self.events.len() < EVENTS_MAX {
            self.events.push(StoreEvent::BlockDamaged(block));
        } else {
            self.counters.damage_events_dropped += 1;
        }
    }

    /// A region's chunk, cached; verified when it had to be read.
    pub(super) fn chunk(&mut self, layer: usize, region: u32) -> Result<usize> {
        if let Some(place) = self.layers[layer].map.find(region) {
            return Ok(place);
        }
        self.load_chunk(layer, region)
    }

    fn load_chunk(&mut self, layer: usize, region: u32) -> Result<usize> {
        let wrap = |error: io::Error| StoreError::from_io("reading the map", &error);
        if self.layers[layer].map.must_evict() {
            // The chunk that goes may have entries that the file does not hold yet.
            self.commit_early()?;
        }
        let trust = if layer == 0 { self.log.trust(region).map_err(wrap)? } else { Trust::Sealed };
        let (place, fault) = self.layers[layer].map.load(region, trust).map_err(wrap)?;
        let Some(fault) = fault else { return Ok(place) };
        if fault == Fault::ChunkDamaged {
            self.counters.regions_damaged += 1;
            self.note_damaged(u64::from(region) * REGION_BLOCKS);
        }
        if layer == 0 {
            // Once the region is dirty nobody checks the chunk again: the damaged entries must be
            // durable before the mark can be.
            self.commit_early()?;
            let result = sync(&**self.layers[0].map.file());
            self.synced("map", result)?;
            self.log
                .begin_mark(region, true)
                .map_err(|error| StoreError::from_io("marking a region", &error))?;
        }
        Ok(place)
    }

    /// Starts marking those regions that may not be written to yet. `true`: all are ready.
    /// Otherwise somebody must sync the regions file and call `finish_marks`.
    pub fn begin_marks(&mut self, regions: RangeInclusive<u32>, held: bool) -> Result<bool> {
        let mut ready = true;
        for region in regions {
            if self.log.ready(region) {
                continue;
            }
            ready = false;
            self.start_mark(region, held)?;
            self.mark_ahead(region);
        }
        Ok(ready)
    }

    fn start_mark(&mut self, region: u32, held: bool) -> Result<()> {
        // The chunk is verified by its header now, or never: a dirty region's header says nothing.
        self.chunk(0, region)?;
        let wrap = |error: io::Error| StoreError::from_io("marking a region", &error);
        let marking = self.log.is_marking(region);
        if !marking
            && (self.log.is_unreserved(region)
                || self.log.read_record(region).map_err(wrap)? == Record::Never)
        {
            self.layers[0].map.reserve(region).map_err(wrap)?;
            self.log.note_reserved(region);
        }
        self.log.begin_mark(region, held).map_err(wrap)
    }

    /// A sequential writer should not wait at each region for a sync. Best effort: a failure here is
    /// met again, and reported, when the region is really written to.
    pub(super) fn mark_ahead(&mut self, region: u32) {
        let known = |log: &RegionLog<F>, region| log.ready(region) || log.is_marking(region);
        let last = region.saturating_add(MARK_AHEAD_REGIONS).min(self.log.count() - 1);
        let half = region.saturating_add(MARK_AHEAD_REGIONS / 2).min(last);
        if region == 0 || !known(&self.log, region - 1) || known(&self.log, half) {
            return;
        }
        for ahead in region + 1..=last {
            if !known(&self.log, ahead) && self.start_mark(ahead, false).is_err() {
                return;
            }
        }
    }

    pub fn take_unsynced_marks(&mut self) -> Vec<u32> {
        self.log.take_unsynced()
    }

    pub fn finish_marks(&mut self, regions: &[u32]) {
        self.log.finish_marks(regions, self.now_ms);
    }

    /// `begin_marks`, sync and `finish_marks` in one, for callers that may block with the store.
    pub fn mark_now(&mut self, regions: RangeInclusive<u32>, held: bool) -> Result<()> {
        if self.begin_marks(regions, held)? {
            return Ok(());
        }
        let marks = self.take_unsynced_marks();
        let result = sync_marks(&**self.log.file());
        self.synced("regions", result)?;
        self.finish_marks(&marks);
        Ok(())
    }

    /// Everything written so far is in the page cache when this returns, entries included: call it
    /// before anything is answered. A failure fails the store.
    pub fn commit(&mut self) -> Result<()> {
        if canary::is_set(Canary::EntryAfterAnswer) {
            return Ok(());
        }
        let lost = self.lost_entries.take();
        self.write_entries()?;
        lost.map_or(Ok(()), Err)
    }

    /// Within a batch. If it fails, so will the batch's `commit`: requests before this one must not be
    /// answered as done either.
    fn commit_early(&mut self) -> Result<()> {
        let result = self.write_entries();
        if let Err(error) = &result {
            self.lost_entries = Some(error.clone());
        }
        result
    }

    fn write_entries(&mut self) -> Result<()> {
        self.layers[0].map.commit().map_err(|error| {
            self.fail(&format!("writing the map: {error}"));
            StoreError::from_io("writing the map", &error)
        })
    }

    /// Returns false, and changes nothing, when a newer epoch is known.
    pub fn set_epoch(&mut self, epoch: u64) -> bool {
        if epoch < self.epoch {
            return false;
        }
        self.resync_generation += 1;
        if epoch > self.epoch {
            self.epoch = epoch;
            self.completed_id = 0;
            self.log.hold_all();
        }
        true
    }

    /// Writes the new stamp for all dirty regions; the caller syncs the regions file.
    pub fn begin_set_stamp(&mut self, stamp: Stamp) -> Result<()> {
        self.check_alive()?;
        self.log.restamp(stamp).map_err(|error| StoreError::from_io("restamping regions", &error))
    }

    pub fn note_completed(&mut self, request_id: u64) {
        self.completed_id = self.completed_id.max(request_id);
    }

    pub fn complete_regions(&mut self, regions: &[u32]) {
        for region in regions {
            self.log.complete(*region);
        }
    }

    /// Begins remembering fresh blocks. The caller has marked the regions.
    pub fn track_fresh(&mut self, regions: &[u32]) {
        self.resync_generation += 1;
        self.settled = RegionMap::default();
        self.resync = regions.iter().map(|region| (*region, Bits::default())).collect();
        for region in regions {
            self.log.hold(*region);
        }
    }

    pub fn hold_region(&mut self, region: u32) {
        self.log.hold(region);
    }

    pub fn resync_done(&mut self, region: u32) {
        self.resync.remove(&region);
        self.settled.remove(&region);
    }

    pub fn resync_generation(&self) -> u64 {
        self.resync_generation
    }

    pub fn end_resync(&mut self) {
        self.resync_generation += 1;
        self.resync = RegionMap::default();
        self.settled = RegionMap::default();
    }

    /// Grows the in-memory picture; the files have grown already.
    pub fn set_size(&mut self, size_bytes: u64) {
        assert!(size_bytes >= self.size_bytes);
        self.size_bytes = size_bytes;
        self.layers[0].block_count = size_bytes / BLOCK_BYTES;
        self.log.grow(region_count(size_bytes) as u32);
    }
}
