//! The write-intent log of one replica: which regions were written since they were last clean, and
//! under which membership record each was last written.
//!
//! Owns the `regions` file. Only dirty regions are held in memory. Never syncs by itself: marking is
//! `begin_marks`, a sync of the file by whoever may block, then `finish_marks`.

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::canary::{self, Canary};

use super::files::BlockFile;
use super::format::{record_at, Record, Stamp, RECORD_BYTES, SUPERBLOCK_BYTES};
use super::map::Trust;
use crate::region_map::RegionMap;

/// Records read at once when the whole file is looked through: 64 KiB.
const RECORDS_PER_READ: u64 = 2048;

/// A region that may differ from other replicas, or whose entries may lag its data.
#[derive(Debug, Clone, Copy)]
pub struct DirtyRegion {
    pub stamp: Stamp,
    /// Highest request id that wrote here in this epoch; 0 when none did.
    pub last_write_id: u64,
    pub touched_ms: u64,
    /// Grows with every write here: tells a cleaner that it was overtaken.
    pub write_count: u64,
    /// Not to be cleaned before `complete`: written before this session, or being resynced.
    pub held: bool,
}

pub struct RegionLog<F> {
    file: Arc<F>,
    count: u32,
    stamp: Stamp,
    dirty: RegionMap<DirtyRegion>,
    /// Record written, not yet durable. The value: hold it once it is.
    marking: RegionMap<bool>,
    unsynced: Vec<u32>,
    /// Dirty regions whose map pages could not be reserved when the store was opened: not ready, whatever
    /// their stamp.
    unreserved: BTreeSet<u32>,
    write_count: u64,
}

impl<F: BlockFile> RegionLog<F> {
    pub fn new(file: Arc<F>, count: u32, stamp: Stamp) -> Self {
        Self {
            file,
            count,
            stamp,
            dirty: RegionMap::default(),
            marking: RegionMap::default(),
            unsynced: Vec::new(),
            unreserved: BTreeSet::new(),
            write_count: 0,
        }
    }

    pub fn file(&self) -> &Arc<F> {
        &self.file
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn grow(&mut self, count: u32) {
        assert!(count >= self.count);
        self.count = count;
    }

    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    pub fn dirty(&self) -> &RegionMap<DirtyRegion> {
        &self.dirty
    }

    pub fn dirty_sorted(&self) -> Vec<u32> {
        let mut regions: Vec<u32> = self.dirty.keys().chain(self.marking.keys()).copied().collect();
        regions.sort_unstable();
        regions.dedup();
        regions
    }

    /// Reads every record; dirty and damaged ones become dirty regions, held.
    /// Returns the regions whose records are damaged.
    pub fn load(&mut self) -> io::Result<Vec<u32>> {
        let (mut dirty, mut damaged) = (Vec::new(), Vec::new());
        self.scan(|region, record| match record {
            Record::Marked { dirty: true, stamp } => dirty.push((region, stamp)),
            Record::Damaged => damaged.push(region),
            Record::Never | Record::Marked { dirty: false, .. } => {}
        })?;
        dirty.extend(damaged.iter().map(|region| (*region, Stamp::default())));
        for (region, stamp) in dirty {
            self.insert(region, stamp, true, 0);
        }
        Ok(damaged)
    }

    /// Calls `visit` for every record in order.
    pub fn scan(&self, visit: impl FnMut(u32, Record)) -> io::Result<()> {
        scan_records(&*self.file, self.count, visit)
    }

    fn insert(&mut self, region: u32, stamp: Stamp, held: bool, now_ms: u64) {
        self.write_count += 1;
        let fresh =
            DirtyRegion { stamp, last_write_id: 0, touched_ms: now_ms, write_count: self.write_count, held };
        self.dirty
            .entry(region)
            .and_modify(|known| {
                known.stamp = stamp;
                known.held |= held;
            })
            .or_insert(fresh);
    }

    /// May data be written to this region now?
    #[inline]
    pub fn ready(&self, region: u32) -> bool {
        self.dirty.get(&region).is_some_and(|known| known.stamp == self.stamp)
            && (self.unreserved.is_empty() || !self.unreserved.contains(&region))
    }

    pub fn note_unreserved(&mut self, region: u32) {
        self.unreserved.insert(region);
    }

    pub fn note_reserved(&mut self, region: u32) {
        self.unreserved.remove(&region);
    }

    pub fn is_unreserved(&self, region: u32) -> bool {
        self.unreserved.contains(&region)
    }

    pub fn all_ready(&self, mut regions: RangeInclusive<u32>) -> bool {
        regions.all(|region| self.ready(region))
    }

    pub fn is_marking(&self, region: u32) -> bool {
        self.marking.contains_key(&region)
    }

    /// How far a chunk of this region is vouched for.
    pub fn trust(&self, region: u32) -> io::Result<Trust> {
        if self.dirty.contains_key(&region) || self.marking.contains_key(&region) {
            return Ok(Trust::Dirty);
        }
        Ok(match self.read_record(region)? {
            Record::Never => Trust::Never,
            // A damaged record on a running store: the header decides, as for a clean one.
            Record::Marked { .. } | Record::Damaged => Trust::Clean,
        })
    }

    pub fn read_record(&self, region: u32) -> io::Result<Record> {
        let mut bytes = [0; RECORD_BYTES];
        let count = self.file.read_at(&mut bytes, record_at(region))?;
        Ok(if count < RECORD_BYTES { Record::Damaged } else { Record::decode(region, &bytes) })
    }

    /// Writes the record "dirty, current stamp" for one region that is not ready. It counts once the
    /// file was synced and `finish_marks` called.
    pub fn begin_mark(&mut self, region: u32, held: bool) -> io::Result<()> {
        if let Some(known) = self.marking.get_mut(&region) {
            *known |= held;
            return Ok(());
        }
        self.write_record(region, self.stamp, true)?;
        self.marking.insert(region, held);
        self.unsynced.push(region);
        Ok(())
    }

    /// The marks a sync that starts now makes durable.
    pub fn take_unsynced(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.unsynced)
    }

    pub fn has_unsynced(&self) -> bool {
        !self.unsynced.is_empty()
    }

    pub fn finish_marks(&mut self, regions: &[u32], now_ms: u64) {
        for region in regions {
            if let Some(held) = self.marking.remove(region) {
                self.insert(*region, self.stamp, held, now_ms);
            }
        }
    }

    /// Every dirty or marking region gets the new stamp. Durable after the caller's sync.
    pub fn restamp(&mut self, stamp: Stamp) -> io::Result<()> {
        self.stamp = stamp;
        if !canary::is_set(Canary::StampNotRenewed) {
            for region in self.dirty_sorted() {
                self.write_record(region, stamp, true)?;
            }
        }
        for known in self.dirty.values_mut() {
            known.stamp = stamp;
        }
        Ok(())
    }

    #[inline]
    pub fn note_write(&mut self, region: u32, request_id: u64, now_ms: u64) {
        self.write_count += 1;
        let write_count = self.write_count;
        let known = self.dirty.get_mut(&region).expect("a write reached a region that is not marked");
        known.last_write_id = known.last_write_id.max(request_id);
        known.touched_ms = now_ms;
        known.write_count = write_count;
    }

    pub fn hold(&mut self, region: u32) {
        if let Some(known) = self.dirty.get_mut(&region) {
            known.held = true;
        }
    }

    /// A new epoch: ids start again, and what the old one left may differ between replicas.
    pub fn hold_all(&mut self) {
        for known in self.dirty.values_mut() {
            known.held = true;
            known.last_write_id = 0;
        }
        for held in self.marking.values_mut() {
            *held = true;
        }
    }

    pub fn complete(&mut self, region: u32) {
        if let Some(known) = self.dirty.get_mut(&region) {
            known.held = false;
        }
        if let Some(held) = self.marking.get_mut(&region) {
            *held = false;
        }
    }

    /// Clears the mark if nothing was written since `write_count` was noted. Needs no sync: a lost clear
    /// leaves the region dirty, which is always true enough.
    pub fn clear_if_untouched(&mut self, region: u32, write_count: u64) -> io::Result<bool> {
        match self.dirty.get(&region) {
            Some(known) if known.write_count == write_count && !self.marking.contains_key(&region) => {
                self.write_record(region, known.stamp, false)?;
                self.dirty.remove(&region);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    pub fn changed_since(&self, stamp: Stamp) -> io::Result<Vec<u32>> {
        let mut regions = Vec::new();
        self.scan(|region, record| match record {
            Record::Marked { stamp: found, .. } if found > stamp => regions.push(region),
            // Nobody knows when it changed.
            Record::Damaged => regions.push(region),
            Record::Marked { .. } | Record::Never => {}
        })?;
        Ok(regions)
    }

    fn write_record(&self, region: u32, stamp: Stamp, dirty: bool) -> io::Result<()> {
        let bytes = Record::encode(region, stamp, dirty);
        self.file.write_at(&bytes, record_at(region)).map_err(|short| short.error)
    }
}

fn scan_records<F: BlockFile>(file: &F, count: u32, mut visit: impl FnMut(u32, Record)) -> io::Result<()> {
    let mut bytes = vec![0; RECORDS_PER_READ as usize * RECORD_BYTES];
    let mut first = 0;
    while first < u64::from(count) {
        let records = RECORDS_PER_READ.min(u64::from(count) - first);
        let wanted = &mut bytes[..records as usize * RECORD_BYTES];
        wanted.fill(0xff); // what cannot be read is damaged
        file.read_at(wanted, SUPERBLOCK_BYTES + first * RECORD_BYTES as u64)?;
        for (index, record) in wanted.chunks_exact(RECORD_BYTES).enumerate() {
            let region = (first + index as u64) as u32;
            visit(region, Record::decode(region, record.try_into().expect("32 bytes")));
        }
        first += records;
    }
    Ok(())
}
