//! One replica's store on a disk in memory, driven call by call: the code of `replica` itself, without
//! threads, sockets and clocks. For tests and the simulator: compiled with the cargo feature `sim` only.
//!
//! Owns the disk and, while it is open, the store. Every call does what the server does for the same
//! request, in the same order. A process that dies in the middle (`MemoryDisk::kill_after`) shows as
//! "closed"; the next thing to do is to open again.

use std::path::{Path, PathBuf};

use crate::canary::{self, Canary};
use crate::checksum::{block_checksum, fragment_checksum, ENTRY_DAMAGED};
use crate::frame::{kind, le_u64, status, Header, HEADER_BYTES};
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS};
use crate::replica::apply::check_frame;
use crate::replica::buffers::OutBuffer;
use crate::replica::error::{ErrorKind, Result, StoreError};
use crate::replica::failure::note_failure;
use crate::replica::files::{sync, Disk};
use crate::replica::flush::{Clean, FlushPlan};
use crate::replica::format::{chunk_at, Stamp, ENTRY_BYTES};
use crate::replica::read::Plan;
use crate::replica::recovery::{create_store, grow_files, open_store, OpenOptions, Opened};
use crate::replica::resync::{verified_reply, Pass, RegionPull, Tally};
use crate::replica::store::{regions_of, Store, StoreEvent};
use crate::simdisk::{Loss, MemoryDisk, MemoryFile};

const BLOCK: usize = BLOCK_BYTES as usize;
const LAYER: &str = "layer-1";

/// Which step of a flush comes next.
#[derive(Clone, Copy)]
enum Step {
    SyncData,
    SettleMap,
    SyncMap,
    Finish,
}

/// What a READ finds.
pub struct Found {
    /// One per block; see `checksum::ENTRY_*`.
    pub entries: Vec<u64>,
    /// The whole range. Zeroes where an entry says zero or damaged.
    pub data: Vec<u8>,
}

/// A region being pulled by hand.
pub struct Pull {
    pass: Pass,
    pull: RegionPull,
    pub reads: Vec<(u64, u64)>,
    pub tally: Tally,
}

#[derive(Default)]
pub struct SimStore {
    disk: MemoryDisk,
    path: PathBuf,
    store: Option<Store<MemoryFile>>,
    flush: Option<(FlushPlan, Step, Clean)>,
    events: Vec<StoreEvent>,
    failure_noted: bool,
    now_ms: u64,
}

fn closed(why: &str) -> StoreError {
    StoreError::new(ErrorKind::Closed, why)
}

impl SimStore {
    /// An empty disk.
    pub fn new() -> Self {
        Self { disk: MemoryDisk::new(), path: PathBuf::from("/r"), ..Self::default() }
    }

    pub fn disk(&self) -> &MemoryDisk {
        &self.disk
    }

    /// Where a file of the store stands: `data`, `map` or `regions`.
    pub fn path_of(&self, file: &str) -> PathBuf {
        if file == "regions" {
            self.path.join(file)
        } else {
            self.path.join(LAYER).join(file)
        }
    }

    /// A closed store on a copy of the disk as it is now.
    pub fn copy(&self) -> Self {
        Self { disk: self.disk.copy(), path: self.path.clone(), now_ms: self.now_ms, ..Self::default() }
    }

    pub fn set_now_ms(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    pub fn create(&mut self, size_bytes: u64) -> Result<()> {
        let result = create_store(&self.disk, &self.path, LAYER, size_bytes);
        self.or_killed(result)
    }

    pub fn open(&mut self, size_bytes: u64, epoch: u64, stamp: Stamp) -> Result<Opened> {
        if self.store.is_some() {
            return Err(StoreError::new(ErrorKind::BadRequest, "it is open already"));
        }
        self.flush = None;
        let options = OpenOptions::new(size_bytes, epoch, stamp);
        let result = open_store(&self.disk, &self.path, &[LAYER.to_owned()], options);
        let (store, opened) = self.or_killed(result)?;
        self.store = Some(store);
        self.failure_noted = false;
        self.run(|_| Ok(opened))
    }

    pub fn is_open(&self) -> bool {
        self.store.is_some()
    }

    /// Flush, then close.
    pub fn close(&mut self) -> Result<()> {
        let flushed = self.flush(Clean::Nothing);
        if let Some(store) = &mut self.store {
            store.release_lock();
        }
        self.store = None;
        self.flush = None;
        flushed
    }

    /// The process dies; the page cache lives.
    pub fn crash(&mut self) {
        self.store = None;
        self.flush = None;
        self.disk.restart_process();
    }

    /// The machine dies and starts again.
    pub fn power_loss(&mut self, loss: Loss, seed: u64) {
        self.crash();
        self.disk.lose_power(loss, seed, true);
    }

    pub fn take_events(&mut self) -> Vec<StoreEvent> {
        std::mem::take(&mut self.events)
    }

    fn or_killed<T>(&mut self, result: Result<T>) -> Result<T> {
        if !self.disk.is_dead() {
            return result;
        }
        self.store = None;
        self.flush = None;
        Err(closed("the process was killed"))
    }

    fn run<T>(&mut self, call: impl FnOnce(&mut Store<MemoryFile>) -> Result<T>) -> Result<T> {
        let store = self.store.as_mut().ok_or_else(|| closed("the store is not open"))?;
        store.set_now_ms(self.now_ms);
        let result = call(store);
        self.events.append(&mut store.take_events());
        if store.check_alive().is_err() && !self.failure_noted {
            // Where this fails too, nothing more can be done: the store stays failed.
            self.failure_noted = true;
            let _ = note_failure(&*store.regions_file());
        }
        self.or_killed(result)
    }

    /// One request that changes blocks, as the server applies and answers it.
    fn request(
        &mut self,
        header: Header,
        payload: &[u8],
        apply: impl FnOnce(&mut Store<MemoryFile>) -> Result<()>,
    ) -> Result<()> {
        self.run(|store| {
            check(store, &header, payload)?;
            store.mark_now(regions_of(header.offset_bytes, u64::from(header.length_bytes)), false)?;
            let applied = apply(store);
            store.commit().and(applied)
        })
    }

    fn header(&self, kind: u8, epoch: Option<u64>, offset: u64, length: usize, id: u64) -> Header {
        let ours = self.store.as_ref().map_or(0, Store::epoch);
        Header {
            kind,
            request_id: id,
            epoch: epoch.unwrap_or(ours),
            offset_bytes: offset,
            length_bytes: length as u32,
            ..Header::default()
        }
    }

    /// Whole blocks, or a part of one. `checksums`: what the engine sent along, where it is not right.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        request_id: u64,
        epoch: Option<u64>,
        checksums: Option<&[u8]>,
    ) -> Result<()> {
        let whole = offset % BLOCK_BYTES == 0 && data.len() % BLOCK == 0;
        let kind = if whole { kind::WRITE } else { kind::WRITE_PARTIAL };
        let header = self.header(kind, epoch, offset, data.len(), request_id);
        let sums = match checksums {
            Some(given) => given.to_vec(),
            None if whole => checksums_of(offset / BLOCK_BYTES, data),
            None => fragment_checksum(offset, data).to_le_bytes().to_vec(),
        };
        let payload = [&sums, data].concat();
        self.request(header, &payload, |store| {
            if whole {
                store.write_blocks(offset / BLOCK_BYTES, &sums, data, request_id)
            } else {
                store.write_partial(offset, data, request_id)
            }
        })
    }

    /// WRITE_ZEROES, or TRIM. `keep_space`: WRITE_ZEROES with NO_HOLE.
    pub fn zero(
        &mut self,
        offset: u64,
        length: u64,
        keep_space: bool,
        request_id: u64,
        epoch: Option<u64>,
    ) -> Result<()> {
        let header = self.header(kind::WRITE_ZEROES, epoch, offset, length as usize, request_id);
        let (first, count) = (offset / BLOCK_BYTES, length / BLOCK_BYTES);
        let noop = self.run(|store| {
            check(store, &header, &[])?;
            store.zero_is_noop(first, count, keep_space)
        })?;
        if noop {
            // Needs no mark. A resync must know of it all the same.
            return self.run(|store| store.zero_blocks(first, count, keep_space, request_id));
        }
        self.request(header, &[], |store| store.zero_blocks(first, count, keep_space, request_id))
    }

    /// REPAIR: whether the block was bad and is written now.
    pub fn repair(&mut self, block: u64, data: &[u8], epoch: Option<u64>) -> Result<bool> {
        let header = self.header(kind::REPAIR, epoch, block * BLOCK_BYTES, data.len(), 0);
        let sums = checksums_of(block, data);
        let mut done = false;
        self.request(header, &[&sums, data].concat(), |store| {
            done = store.repair(block, &sums, data, 0)?;
            Ok(())
        })?;
        Ok(done)
    }

    pub fn read(&mut self, offset: u64, length: u64, epoch: Option<u64>) -> Result<Found> {
        let (header, reply) = self.read_reply(offset, length, epoch)?;
        let count = u64::from(header.length_bytes) / BLOCK_BYTES;
        let (entries, present) = verified_reply(offset / BLOCK_BYTES, count, &reply)?;
        let mut data = vec![0; length as usize];
        let present_blocks = present.chunks_exact(BLOCK);
        let places = data.chunks_exact_mut(BLOCK).zip(&entries).filter(|(_, entry)| **entry > ENTRY_DAMAGED);
        places.zip(present_blocks).for_each(|((place, _), block)| place.copy_from_slice(block));
        Ok(Found { entries, data })
    }

    /// The payload of a READ's answer.
    pub fn read_reply(&mut self, offset: u64, length: u64, epoch: Option<u64>) -> Result<(Header, Vec<u8>)> {
        let header = self.header(kind::READ, epoch, offset, length as usize, 0);
        self.run(|store| {
            check(store, &header, &[])?;
            let (mut plan, mut out) = (Plan::default(), OutBuffer::default());
            store.read_into(&header, &mut plan, &mut out, true)?;
            store.commit()?;
            Ok((header, out.unsent()[HEADER_BYTES..].to_vec()))
        })
    }

    pub fn flush(&mut self, clean: Clean) -> Result<()> {
        self.run(|store| store.check_alive())?;
        while self.flush.is_some() {
            self.flush_step(clean)?;
        }
        while !self.flush_step(clean)? {}
        Ok(())
    }

    /// Begins a flush, or takes the one that is under way a step further; others overtake between the steps.
    /// Whether it is done: then what was answered before it began is durable.
    pub fn flush_step(&mut self, clean: Clean) -> Result<bool> {
        let under_way = self.flush.take();
        let next = self.run(|store| {
            let Some((mut plan, step, clean)) = under_way else {
                store.check_alive()?;
                return Ok(Some((store.begin_flush(clean), Step::SyncData, clean)));
            };
            let next = match step {
                Step::SyncData => {
                    if plan.sync_data {
                        let result = sync(&*store.data_files()[0]);
                        store.synced("data", result)?;
                    }
                    Step::SettleMap
                }
                Step::SettleMap => {
                    store.after_data_sync(&mut plan)?;
                    Step::SyncMap
                }
                Step::SyncMap => {
                    if plan.sync_map {
                        let result = sync(&*store.map_file());
                        store.synced("map", result)?;
                    }
                    Step::Finish
                }
                Step::Finish => {
                    if store.finish_flush(plan)? > 0 && clean == Clean::All {
                        let result = sync(&*store.regions_file());
                        store.synced("regions", result)?;
                    }
                    return Ok(None);
                }
            };
            Ok(Some((plan, next, clean)))
        })?;
        self.flush = next;
        Ok(self.flush.is_none())
    }

    pub fn dirty_regions(&mut self) -> Result<Vec<u32>> {
        self.run(|store| Ok(store.log().dirty_sorted()))
    }

    pub fn changed_since(&mut self, stamp: Stamp) -> Result<Vec<u32>> {
        let wrap = |error: std::io::Error| StoreError::from_io("reading regions", &error);
        self.run(|store| store.log().changed_since(stamp).map_err(wrap))
    }

    pub fn set_epoch(&mut self, epoch: u64) -> Result<()> {
        self.run(|store| match store.set_epoch(epoch) {
            true => Ok(()),
            false => Err(StoreError::new(ErrorKind::StaleEpoch, format!("epoch {epoch} is older"))),
        })
    }

    pub fn set_stamp(&mut self, stamp: Stamp) -> Result<()> {
        self.run(|store| {
            store.begin_set_stamp(stamp)?;
            let result = sync(&*store.regions_file());
            store.synced("regions", result)
        })
    }

    pub fn completed(&mut self, request_id: u64) -> Result<()> {
        self.run(|store| {
            store.note_completed(request_id);
            Ok(())
        })
    }

    pub fn complete_regions(&mut self, regions: &[u32]) -> Result<()> {
        self.run(|store| {
            store.complete_regions(regions);
            Ok(())
        })
    }

    pub fn begin_resync(&mut self, regions: &[u32]) -> Result<()> {
        self.run(|store| {
            let count = store.log().count();
            if let Some(region) = regions.iter().find(|region| **region >= count) {
                return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {region}")));
            }
            store.check_alive()?;
            for region in regions {
                store.mark_now(*region..=*region, true)?;
            }
            store.track_fresh(regions);
            store.commit()
        })
    }

    pub fn end_resync(&mut self) -> Result<()> {
        self.flush(Clean::Nothing)?;
        self.run(|store| {
            store.end_resync();
            Ok(())
        })
    }

    pub fn resize(&mut self, size_bytes: u64) -> Result<()> {
        let (boot_id, path) = (self.disk.boot_id(), self.path.clone());
        self.run(|store| {
            store.check_alive()?;
            if size_bytes < store.size_bytes() {
                return Err(StoreError::new(ErrorKind::BadRequest, "a volume only grows"));
            }
            let (data, map, regions) =
                (store.data_files()[0].clone(), store.map_file(), store.regions_file());
            let grown = grow_files((&*data, &*map, &*regions), &path, size_bytes, boot_id);
            if let Some(error) = grown.as_ref().err().filter(|error| error.kind == ErrorKind::IoError) {
                store.fail(&error.message);
            }
            grown?;
            store.set_size(size_bytes);
            Ok(())
        })
    }

    /// REGION_SUMMARY's answer: the region's entries.
    pub fn summary(&mut self, region: u32) -> Result<Vec<u8>> {
        self.run(|store| {
            store.check_alive()?;
            let first = u64::from(region) * REGION_BLOCKS;
            if first >= store.block_count() {
                return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {region}")));
            }
            let mut plan = Plan::default();
            store.locate(first, REGION_BLOCKS.min(store.block_count() - first), &mut plan)?;
            store.commit()?;
            Ok(plan.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect())
        })
    }

    /// The right to pull for the resync that is under way now.
    pub fn pull_pass(&mut self, take_damaged: bool) -> Result<Pass> {
        self.run(|store| Ok(store.pass(take_damaged)))
    }

    /// First step of a pull: `summary` came from the source. Then each of `reads` must be copied.
    pub fn pull_compare(&mut self, pass: Pass, region: u32, summary: &[u8]) -> Result<Pull> {
        self.run(|store| {
            store.mark_now(region..=region, true)?;
            let mut tally = Tally::default();
            let compared = store.compare_region(&pass, region, summary, &mut tally);
            let committed = store.commit();
            let (pull, reads) = compared?;
            committed?;
            Ok(Pull { pass, pull, reads, tally })
        })
    }

    /// Second step, for each of the reads: `reply` is the payload of the source's answer.
    pub fn pull_copy(&mut self, pull: &mut Pull, first_block: u64, count: u64, reply: &[u8]) -> Result<()> {
        let (entries, data) = verified_reply(first_block, count, reply)?;
        let region = pull.pull.region();
        self.run(|store| {
            store.mark_now(region..=region, true)?;
            let copied =
                store.copy_run(&pull.pass, &mut pull.pull, first_block, (&entries, data), &mut pull.tally);
            store.commit().and(copied)
        })
    }

    /// Last step: whether the region is equal to the source now.
    pub fn pull_finish(&mut self, pull: &Pull) -> Result<bool> {
        if !pull.pull.reads_are_done() {
            return Err(StoreError::new(ErrorKind::BadRequest, "reads of this region are missing"));
        }
        self.run(|store| store.finish_region(&pull.pass, &pull.pull))
    }

    /// All steps for one region.
    pub fn pull_region(
        &mut self,
        source: &mut SimStore,
        region: u32,
        take_damaged: bool,
    ) -> Result<(bool, Tally)> {
        let pass = self.pull_pass(take_damaged)?;
        let summary = source.summary(region)?;
        let mut pull = self.pull_compare(pass, region, &summary)?;
        for (first_block, count) in pull.reads.clone() {
            let (_, reply) = source.read_reply(first_block * BLOCK_BYTES, count * BLOCK_BYTES, None)?;
            self.pull_copy(&mut pull, first_block, count, &reply)?;
        }
        Ok((self.pull_finish(&pull)?, pull.tally))
    }

    // -- what happens to disks

    /// The block's bytes change on the disk.
    pub fn rot_block(&self, block: u64, bit: u64) {
        let at = block * BLOCK_BYTES + bit / 8 % BLOCK_BYTES;
        self.disk.damage(&self.path_of("data"), at, |bytes| bytes[0] ^= 1 << (bit % 8), 1);
    }

    /// Two blocks change places on the disk, their entries as well.
    pub fn swap_blocks(&self, one: u64, other: u64) {
        self.disk.swap(&self.path_of("data"), one * BLOCK_BYTES, other * BLOCK_BYTES, BLOCK);
        let entry_at = |block: u64| {
            chunk_at((block / REGION_BLOCKS) as u32) + block % REGION_BLOCKS * ENTRY_BYTES as u64
        };
        self.disk.swap(&self.path_of("map"), entry_at(one), entry_at(other), ENTRY_BYTES);
    }

    pub fn allocated_blocks(&self) -> u64 {
        use crate::replica::files::BlockFile;
        let file = self.disk.open(Path::new(&self.path_of("data")));
        file.and_then(|file| file.allocated_bytes()).unwrap_or(0) / BLOCK_BYTES
    }
}

/// The checksums that an engine sends with these blocks.
pub fn checksums_of(first_block: u64, data: &[u8]) -> Vec<u8> {
    let blocks = (first_block..).zip(data.chunks(BLOCK));
    blocks.flat_map(|(block, data)| block_checksum(block, data).to_le_bytes()).collect()
}

/// Turns a bug on or off, in this process. False: there is none of that name.
pub fn set_canary(name: &str, on: bool) -> bool {
    Canary::named(name).map(|canary| canary::set(canary, on)).is_some()
}

/// What the server checks before it applies a frame.
fn check(store: &Store<MemoryFile>, header: &Header, payload: &[u8]) -> Result<()> {
    if header.epoch != store.epoch() {
        let why = format!("a request of epoch {}, the store is at {}", header.epoch, store.epoch());
        return Err(StoreError::new(ErrorKind::StaleEpoch, why));
    }
    let code = check_frame(header, payload, store.size_bytes());
    if code != status::OK {
        return Err(StoreError::new(ErrorKind::BadRequest, format!("status {code}")));
    }
    store.check_alive()
}

/// Entries as numbers.
pub fn entries_of(summary: &[u8]) -> Vec<u64> {
    summary.chunks_exact(8).map(|word| le_u64(word, 0)).collect()
}
