//! Flushing and cleaning, in steps between which the caller syncs files without the store's lock:
//!
//! `begin_flush` - sync data - `after_data_sync` - sync map - `finish_flush`.
//!
//! Only one flush of a store may be under way; syncer.rs sees to that. The order and what a crash
//! leaves at each step are argued in FORMAT.md, "Flush" and "Clean".

use std::io;

use crate::canary::{self, Canary};
use crate::limits::REGION_BLOCKS;

use super::error::{ErrorKind, Result, StoreError};
use super::failure;
use super::files::{sync, BlockFile};
use super::format::{bit, Bits, BIT_WORDS};
use super::store::Store;
use crate::region_map::RegionMap;

/// A region is cleaned when nobody wrote to it for this long.
pub const CLEAN_IDLE_MS: u64 = 3000;
/// Dirty regions beyond which the oldest are cleaned even if not idle: bounds memory, and recovery.
pub const DIRTY_REGIONS_MAX: usize = 4096;
/// Regions cleaned by one flush: bounds how long the lock is held for their headers (about 10 us each).
const CLEAN_BATCH_MAX: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clean {
    Nothing,
    /// Regions that are equal on all replicas and idle, or too many.
    Idle,
    /// The engine says that all replicas are equal.
    All,
}

pub struct FlushPlan {
    seq: u64,
    pub sync_data: bool,
    pub sync_map: bool,
    /// Blocks that become stable once the data is synced.
    settling: RegionMap<Bits>,
    /// Regions to clean, with the write count at which they were chosen.
    cleaning: Vec<(u32, u64)>,
}

impl<F: BlockFile> Store<F> {
    /// Is everything that was answered durable already?
    pub fn is_flushed(&self) -> bool {
        self.flushed_seq == self.write_seq
    }

    pub fn begin_flush(&mut self, clean: Clean) -> FlushPlan {
        let mut plan = FlushPlan {
            seq: self.write_seq,
            sync_data: std::mem::take(&mut self.data_unsynced),
            sync_map: false,
            settling: std::mem::take(&mut self.unstable),
            cleaning: self.choose_to_clean(clean),
        };
        if canary::is_set(Canary::StableBeforeData) || canary::is_set(Canary::DirtyClearedEarly) {
            self.sing(&mut plan);
        }
        plan
    }

    /// The bugs of two canaries.
    #[cold]
    fn sing(&mut self, plan: &mut FlushPlan) {
        let _ = self.settle_and_vouch(plan);
        if canary::is_set(Canary::DirtyClearedEarly) {
            for (region, write_count) in &plan.cleaning {
                let _ = self.log.clear_if_untouched(*region, *write_count);
            }
        }
    }

    /// Everything else that a cleaner may do waits for this to say so.
    pub fn has_cleanable(&self) -> bool {
        !self.choose_to_clean(Clean::Idle).is_empty()
    }

    fn choose_to_clean(&self, clean: Clean) -> Vec<(u32, u64)> {
        let dirty = self.log.dirty();
        let crowded = dirty.len() > DIRTY_REGIONS_MAX;
        let idle_since = self.now_ms.saturating_sub(CLEAN_IDLE_MS);
        let wanted = |touched_ms: u64| crowded || touched_ms <= idle_since;
        let mut chosen: Vec<(u64, u32, u64)> = match clean {
            Clean::Nothing => return Vec::new(),
            Clean::All => dirty.iter().map(|(region, known)| (0, *region, known.write_count)).collect(),
            Clean::Idle => dirty
                .iter()
                .filter(|(_, known)| {
                    let equal = !known.held && known.last_write_id <= self.completed_id;
                    (equal || canary::is_set(Canary::CleanedUncompleted)) && wanted(known.touched_ms)
                })
                .map(|(region, known)| (known.touched_ms, *region, known.write_count))
                .collect(),
        };
        if clean == Clean::Idle && chosen.len() > CLEAN_BATCH_MAX {
            chosen.sort_unstable();
            chosen.truncate(CLEAN_BATCH_MAX);
        }
        chosen.into_iter().map(|(_, region, write_count)| (region, write_count)).collect()
    }

    /// The data is synced: what was written before is stable, and regions not written since can be
    /// vouched for.
    pub fn after_data_sync(&mut self, plan: &mut FlushPlan) -> Result<()> {
        self.check_alive()?;
        self.settle_and_vouch(plan).map_err(|error| {
            self.fail(&format!("writing the map: {error}"));
            StoreError::from_io("writing the map", &error)
        })
    }

    fn settle_and_vouch(&mut self, plan: &mut FlushPlan) -> io::Result<()> {
        self.layers[0].map.commit()?;
        for (region, bits) in std::mem::take(&mut plan.settling) {
            let place = self.chunk(0, region).map_err(io::Error::other)?;
            self.layers[0].map.mark_stable(place, &bits)?;
        }
        let untouched = |store: &Self, region: u32, count: u64| {
            store.log.dirty().get(&region).is_some_and(|known| known.write_count == count)
        };
        for (region, write_count) in std::mem::take(&mut plan.cleaning) {
            if untouched(self, region, write_count) {
                let place = self.chunk(0, region).map_err(io::Error::other)?;
                self.layers[0].map.mark_clean(place)?;
                plan.cleaning.push((region, write_count));
            }
        }
        plan.sync_map = std::mem::take(&mut self.layers[0].map.unsynced);
        Ok(())
    }

    /// The map is synced as well. Returns how many regions were cleaned.
    pub fn finish_flush(&mut self, plan: FlushPlan) -> Result<usize> {
        self.check_alive()?;
        self.flushed_seq = self.flushed_seq.max(plan.seq);
        self.counters.flushes += 1;
        if let Some(boot_id) = self.boot_to_trust {
            // All that is here is on the disk now. Whoever opened the store has noted the failure for good.
            if failure::write_boot_id(&**self.log.file(), boot_id).is_ok() {
                self.boot_to_trust = None;
            }
        }
        let mut cleaned = 0;
        for (region, write_count) in plan.cleaning {
            match self.log.clear_if_untouched(region, write_count) {
                Ok(done) => cleaned += usize::from(done),
                Err(error) => {
                    self.fail(&format!("writing regions: {error}"));
                    return Err(StoreError::from_io("writing regions", &error));
                }
            }
        }
        Ok(cleaned)
    }

    /// All steps in one, for callers that may block with the store: closing, tests.
    pub fn flush_now(&mut self, clean: Clean) -> Result<usize> {
        self.check_alive()?;
        self.commit()?;
        let mut plan = self.begin_flush(clean);
        let (data, map) = (self.layers[0].data.clone(), self.map_file());
        if plan.sync_data {
            self.synced("data", sync(&*data))?;
        }
        self.after_data_sync(&mut plan)?;
        if plan.sync_map {
            self.synced("map", sync(&*map))?;
        }
        self.finish_flush(plan)
    }

    /// A failed sync ends the store's service: the page cache may have dropped what it could not write.
    pub fn synced(&mut self, file: &str, result: io::Result<()>) -> Result<()> {
        result.map_err(|error| {
            // Also when it says that the disk is full: what was to be written is gone.
            let reason = format!("fdatasync of {file}: {error}");
            self.fail(&reason);
            StoreError::new(ErrorKind::IoError, reason)
        })
    }

    /// Present blocks of a region that were never flushed.
    pub(super) fn unstable_of(&mut self, region: u32) -> Result<Bits> {
        let place = self.chunk(0, region)?;
        let chunk = self.layers[0].map.chunk(place);
        let mut bits = [0; BIT_WORDS];
        for index in 0..REGION_BLOCKS as usize {
            if chunk.entries()[index] != 0 && !bit(chunk.stable(), index) {
                bits[index / 64] |= 1 << (index % 64);
            }
        }
        Ok(bits)
    }
}
