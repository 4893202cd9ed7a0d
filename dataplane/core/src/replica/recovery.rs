//! Creating, opening and growing a replica's files.
//!
//! Opening formats nothing: a file that is missing, short or not ours is an error, "damaged" (C22).
//! After an unclean stop only dirty regions are looked at. The table of outcomes is in FORMAT.md,
//! "Recovery".

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::canary::{self, Canary};
use crate::checksum::{block_checksum, ENTRY_ABSENT, ENTRY_DAMAGED, ENTRY_ZERO};
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS, REGION_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

use super::error::{ErrorKind, Result, StoreError};
use super::failure;
use super::files::{sync, BlockFile, Disk};
use super::format::{
    bit, map_bytes, region_count, regions_bytes, RegionHeader, Stamp, Superblock, BIT_WORDS, MAP_MAGIC,
    REGIONS_MAGIC, SUPERBLOCK_USED_BYTES,
};
use super::map::{BlockMap, CHUNKS_CACHED_MAX};
use super::regions::RegionLog;
use super::store::{Counters, Layer, Store};
use crate::region_map::RegionMap;

const BLOCK: usize = BLOCK_BYTES as usize;
/// A regions file up to this size is written out at creation, so that a mark never has to allocate:
/// 128 GiB of volume.
const REGIONS_BYTES_PREALLOCATED_MAX: u64 = 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    pub size_bytes: u64,
    pub epoch: u64,
    pub stamp: Stamp,
    pub chunks_cached_max: usize,
}

impl OpenOptions {
    pub fn new(size_bytes: u64, epoch: u64, stamp: Stamp) -> Self {
        Self { size_bytes, epoch, stamp, chunks_cached_max: CHUNKS_CACHED_MAX }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Opened {
    pub dirty_regions: u64,
    pub blocks_verified: u64,
    pub blocks_recomputed: u64,
    pub blocks_dropped: u64,
    pub regions_damaged: u64,
    /// 1: a sync had failed when the store was last open, or when it was opened in vain.
    pub sync_failed: u64,
}

fn damaged(path: &Path, why: &str) -> StoreError {
    StoreError::new(ErrorKind::Damaged, format!("{}: {why}", path.display()))
}

fn at(path: &Path) -> impl Fn(io::Error) -> StoreError + '_ {
    move |error| StoreError::from_io(&path.display().to_string(), &error)
}

/// Sizes are whole blocks and within the volume's limits.
pub fn check_size(size_bytes: u64) -> Result<()> {
    if size_bytes % BLOCK_BYTES == 0 && (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size_bytes) {
        return Ok(());
    }
    Err(StoreError::new(ErrorKind::BadRequest, format!("a volume cannot have {size_bytes} bytes")))
}

/// Layer names become directory names.
fn check_layer_name(layer: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !layer.is_empty() && layer.len() <= 128 && layer.chars().all(plain) && !layer.starts_with('.') {
        return Ok(());
    }
    Err(StoreError::new(ErrorKind::BadRequest, format!("{layer:?} is no name for a layer")))
}

/// Makes the files of an empty replica. Fails if any exists. Durable when it returns.
pub fn create_store<D: Disk>(disk: &D, path: &Path, layer: &str, size_bytes: u64) -> Result<()> {
    check_size(size_bytes)?;
    check_layer_name(layer)?;
    let (regions_path, layer_path) = (path.join("regions"), path.join(layer));
    for existing in [&regions_path, &layer_path] {
        if disk.exists(existing).map_err(at(existing))? {
            return Err(StoreError::new(ErrorKind::BadRequest, format!("{} exists", existing.display())));
        }
    }
    disk.create_dir(&layer_path).map_err(at(&layer_path))?;
    let data = disk.create(&layer_path.join("data")).map_err(at(&layer_path))?;
    data.set_len(size_bytes).and_then(|()| data.sync_data()).map_err(at(&layer_path))?;
    let map_path = layer_path.join("map");
    let map = disk.create(&map_path).map_err(at(&map_path))?;
    write_superblock(&map, &map_path, MAP_MAGIC, size_bytes, [0; 16], map_bytes(size_bytes))?;
    disk.sync_dir(&layer_path).map_err(at(&layer_path))?;
    // Last: a replica with a regions file is complete.
    let regions = disk.create(&regions_path).map_err(at(&regions_path))?;
    let bytes = regions_bytes(size_bytes);
    if bytes <= REGIONS_BYTES_PREALLOCATED_MAX {
        let zeroes = vec![0; bytes as usize];
        regions.write_at(&zeroes, 0).map_err(|short| short.error).map_err(at(&regions_path))?;
    }
    write_superblock(&regions, &regions_path, REGIONS_MAGIC, size_bytes, disk.boot_id(), bytes)?;
    disk.sync_dir(path).map_err(at(path))
}

fn write_superblock<F: BlockFile>(
    file: &F,
    path: &Path,
    magic: [u8; 8],
    size_bytes: u64,
    boot_id: [u8; 16],
    file_bytes: u64,
) -> Result<()> {
    let used = Superblock { magic, size_bytes, boot_id }.encode();
    if file.len().map_err(at(path))? < file_bytes {
        // First the length, durably: a superblock never promises more than there is.
        file.set_len(file_bytes).map_err(at(path))?;
        sync(file).map_err(|error| sync_error(path, &error))?;
    }
    file.write_at(&used, 0).map_err(|short| short.error).map_err(at(path))?;
    sync(file).map_err(|error| sync_error(path, &error))
}

/// Never "no space", whatever the kernel says: data is lost, not refused.
fn sync_error(path: &Path, error: &io::Error) -> StoreError {
    StoreError::new(ErrorKind::IoError, format!("fdatasync of {}: {error}", path.display()))
}

/// Opens a file and believes its superblock, if that is sound and the file is as long as it says.
fn open_checked<D: Disk>(
    disk: &D,
    path: &Path,
    magic: [u8; 8],
    file_bytes: impl Fn(u64) -> u64,
) -> Result<(D::File, Superblock)> {
    let file = match disk.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged(path, "it is missing")),
        Err(error) => return Err(at(path)(error)),
    };
    let mut bytes = [0; SUPERBLOCK_USED_BYTES];
    if file.read_at(&mut bytes, 0).map_err(at(path))? < bytes.len() {
        return Err(damaged(path, "it is too short for a superblock"));
    }
    let superblock = Superblock::decode(&bytes, magic).map_err(|why| damaged(path, &why))?;
    check_size(superblock.size_bytes).map_err(|error| damaged(path, &error.message))?;
    let (length, wanted) = (file.len().map_err(at(path))?, file_bytes(superblock.size_bytes));
    if length < wanted {
        return Err(damaged(path, &format!("it has {length} bytes and should have {wanted}")));
    }
    Ok((file, superblock))
}

/// Opens and recovers a replica.
pub fn open_store<D: Disk>(
    disk: &D,
    path: &Path,
    chain: &[String],
    options: OpenOptions,
) -> Result<(Store<D::File>, Opened)> {
    check_size(options.size_bytes)?;
    if chain.is_empty() || chain.len() > usize::from(u8::MAX) {
        return Err(StoreError::new(ErrorKind::BadRequest, format!("a chain of {} layers", chain.len())));
    }
    if !disk.exists(path).map_err(at(path))? {
        return Err(StoreError::new(ErrorKind::NotFound, format!("{} does not exist", path.display())));
    }
    let lock_path = path.join("lock");
    let Some(lock) = disk.lock(&lock_path).map_err(at(&lock_path))? else {
        return Err(StoreError::new(ErrorKind::IoError, format!("{} is open elsewhere", path.display())));
    };
    let regions_path = path.join("regions");
    let (regions, superblock) = open_checked(disk, &regions_path, REGIONS_MAGIC, regions_bytes)?;
    let mut layers = Vec::new();
    let mut size_bytes = superblock.size_bytes;
    for name in chain {
        check_layer_name(name)?;
        let layer_path = path.join(name);
        let (map, described) = open_checked(disk, &layer_path.join("map"), MAP_MAGIC, map_bytes)?;
        let data_path = layer_path.join("data");
        let data = disk.open(&data_path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => damaged(&data_path, "it is missing"),
            _ => at(&data_path)(error),
        })?;
        if layers.is_empty() {
            size_bytes = size_bytes.min(described.size_bytes);
        }
        let map = BlockMap::new(Arc::new(map), options.chunks_cached_max);
        layers.push(Layer { data: Arc::new(data), map, block_count: described.size_bytes / BLOCK_BYTES });
    }
    let sync_failed = superblock.boot_id == failure::BOOT_FAILED;
    if sync_failed {
        // Only what the disk itself holds counts. The note may have been in the page cache alone.
        for layer in &layers {
            layer.data.drop_cache().map_err(at(path))?;
            layer.map.file().drop_cache().map_err(at(path))?;
        }
        regions.drop_cache().map_err(at(path))?;
        failure::note_failure(&regions).map_err(at(path))?;
    }
    let regions = Arc::new(regions);
    let log = RegionLog::new(Arc::clone(&regions), region_count(options.size_bytes) as u32, options.stamp);
    let mut store = Store::assemble(options.size_bytes, layers, log, options.epoch, lock);
    if size_bytes < options.size_bytes {
        // A growth that was decided, and cut short before these files had it.
        let head = &store.layers[0];
        let files = (&*head.data, &**head.map.file(), &**store.log.file());
        let grown = grow_files(files, path, options.size_bytes, superblock.boot_id);
        if grown.as_ref().is_err_and(|error| error.kind == ErrorKind::IoError) {
            let _ = failure::note_failure(&*regions);
        }
        grown?;
    }
    let boot_id = disk.boot_id();
    let same_boot = boot_id == superblock.boot_id && boot_id != [0; 16];
    let recovered = store.recover(same_boot);
    if store.check_alive().is_err() {
        // Also where the failure cannot be noted the caller hears of it, and opens again.
        let _ = failure::note_failure(&*regions);
    }
    let mut opened = recovered?;
    if sync_failed {
        opened.sync_failed = 1;
        store.boot_to_trust = Some(boot_id);
    } else if !same_boot {
        // Needs no sync: if it is lost, so is the boot that it names.
        failure::write_boot_id(&*regions, boot_id).map_err(at(&regions_path))?;
    }
    Ok((store, opened))
}

/// Makes `data`, `map` and `regions` long enough for a larger volume. Idempotent. Needs no lock: nobody
/// looks past the old size until `set_size`.
pub fn grow_files<F: BlockFile>(
    (data, map, regions): (&F, &F, &F),
    path: &Path,
    size_bytes: u64,
    boot_id: [u8; 16],
) -> Result<()> {
    if data.len().map_err(at(path))? < size_bytes {
        data.set_len(size_bytes).map_err(at(path))?;
        sync(data).map_err(|error| sync_error(path, &error))?;
    }
    write_superblock(map, path, MAP_MAGIC, size_bytes, [0; 16], map_bytes(size_bytes))?;
    write_superblock(regions, path, REGIONS_MAGIC, size_bytes, boot_id, regions_bytes(size_bytes))
}

impl<F: BlockFile> Store<F> {
    fn assemble(size_bytes: u64, layers: Vec<Layer<F>>, log: RegionLog<F>, epoch: u64, lock: F) -> Self {
        Self {
            size_bytes,
            layers,
            log,
            epoch,
            completed_id: 0,
            failed: None,
            boot_to_trust: None,
            lost_entries: None,
            unstable: RegionMap::default(),
            data_unsynced: false,
            write_seq: 0,
            flushed_seq: 0,
            resync: RegionMap::default(),
            settled: RegionMap::default(),
            resync_generation: 0,
            now_ms: 0,
            counters: Counters::default(),
            events: Vec::new(),
            lock: Some(lock),
        }
    }

    /// Looks at every dirty region. `same_boot`: the page cache has lived since the store was last open.
    fn recover(&mut self, same_boot: bool) -> Result<Opened> {
        let mut opened = Opened::default();
        let wrap = |error: io::Error| StoreError::from_io("reading regions", &error);
        let unknown = self.log.load().map_err(wrap)?;
        let regions = self.log.dirty_sorted();
        opened.dirty_regions = regions.len() as u64;
        if !regions.is_empty() {
            // A mark that a killed process wrote may be in the page cache only. From here on it counts.
            let marks = self.regions_file();
            self.synced("regions", sync(&*marks))?;
        }
        if !same_boot {
            self.reserve_again(&regions)?;
        }
        let mut buffer = vec![0; REGION_BYTES as usize];
        let mut punched = false;
        for region in &regions {
            punched |= self.recover_region(*region, same_boot, &mut buffer, &mut opened)?;
        }
        self.commit()?;
        if !regions.is_empty() {
            // A FLUSH also covers what earlier processes answered (C5).
            self.write_seq = 1;
            self.data_unsynced = true;
            self.layers[0].map.unsynced = true;
        }
        if punched || (!same_boot && !regions.is_empty()) {
            // What is here came from the disk, or was decided just now: it must not change again. A
            // write that was cut off before its entry, above all, must not come back in parts.
            let data = Arc::clone(&self.layers[0].data);
            self.synced("data", sync(&*data))?;
        }
        if !same_boot && !regions.is_empty() {
            for region in &regions {
                let place = self.chunk(0, *region)?;
                let wrap = |error: io::Error| StoreError::from_io("writing the map", &error);
                self.layers[0].map.reset_stable(place, &[u64::MAX; BIT_WORDS]).map_err(wrap)?;
            }
            let map = self.map_file();
            self.synced("map", sync(&*map))?;
        }
        for region in unknown {
            opened.regions_damaged += 1;
            self.mark_now(region..=region, true)?;
        }
        Ok(opened)
    }

    /// A reservation may have been lost with the power, and its region's mark not (I7). On a full disk the
    /// store opens all the same; writes to such a region are refused until there is room.
    fn reserve_again(&mut self, regions: &[u32]) -> Result<()> {
        for region in regions {
            match self.layers[0].map.reserve(*region) {
                Ok(()) => {}
                Err(error) => match StoreError::from_io("reserving the map", &error) {
                    full if full.kind == ErrorKind::NoSpace => self.log.note_unreserved(*region),
                    other => return Err(other),
                },
            }
        }
        Ok(())
    }

    fn recover_region(
        &mut self,
        region: u32,
        same_boot: bool,
        buffer: &mut [u8],
        opened: &mut Opened,
    ) -> Result<bool> {
        let wrap = |error: io::Error| StoreError::from_io("reading the map", &error);
        let header = self.layers[0].map.read_header(region).map_err(wrap)?;
        let place = self.chunk(0, region)?;
        let entries = *self.layers[0].map.chunk(place).entries();
        let first_block = u64::from(region) * REGION_BLOCKS;
        for (low, high) in runs(&entries, |entry| entry > ENTRY_DAMAGED) {
            let offset = (first_block + low as u64) * BLOCK_BYTES;
            let wanted = &mut buffer[..(high - low) * BLOCK];
            // What cannot be read is damaged, not wrong: it must not be recomputed.
            let got = self.layers[0].data.read_at(wanted, offset).unwrap_or(0);
            for (index, data) in (low..high).zip(wanted.chunks_exact(BLOCK)) {
                let found = block_checksum(first_block + index as u64, data);
                opened.blocks_verified += 1;
                if found == entries[index] || canary::is_set(Canary::RecoverTrustsMap) {
                    continue;
                }
                let readable = (index - low + 1) * BLOCK <= got;
                let entry = match &header {
                    RegionHeader::Damaged => ENTRY_DAMAGED,
                    _ if !readable => ENTRY_DAMAGED,
                    RegionHeader::Known { stable, .. } if bit(stable, index) => found,
                    // The page cache lived: this is a write whose entry was cut off, not lost data.
                    _ if same_boot || canary::is_set(Canary::RecomputeNeverStable) => found,
                    RegionHeader::Never | RegionHeader::Known { .. } => ENTRY_ABSENT,
                };
                match entry {
                    ENTRY_ABSENT => opened.blocks_dropped += 1,
                    ENTRY_DAMAGED => self.note_damaged(first_block + index as u64),
                    _ => opened.blocks_recomputed += 1,
                }
                self.layers[0].map.set(place, index, entry);
            }
        }
        self.commit()?;
        let punched = self.punch_unseen(region, place)?;
        if same_boot && header != RegionHeader::Never {
            self.forget_stale_stable(region, place, &header)?;
        }
        let unstable = self.unstable_of(region)?;
        if unstable != [0; BIT_WORDS] {
            self.unstable.insert(region, unstable);
        }
        Ok(punched)
    }

    /// Where no data is seen there must be none: a later write that is lost must not show older bytes.
    /// Returns whether there was any.
    fn punch_unseen(&mut self, region: u32, place: usize) -> Result<bool> {
        let mut punched = false;
        let entries = *self.layers[0].map.chunk(place).entries();
        let first_block = u64::from(region) * REGION_BLOCKS;
        let here = (self.layers[0].block_count.saturating_sub(first_block)).min(REGION_BLOCKS) as usize;
        for (low, high) in runs(&entries[..here], |entry| entry <= ENTRY_ZERO) {
            let (offset, length) =
                ((first_block + low as u64) * BLOCK_BYTES, (high - low) as u64 * BLOCK_BYTES);
            if self.layers[0].data.holds_data(offset, length) {
                let result = self.layers[0].data.punch(offset, length);
                result.map_err(|error| StoreError::from_io("punching a hole", &error))?;
                punched = true;
            }
        }
        Ok(punched)
    }

    /// A stable bit without an entry (the header reached the disk, the entry did not) must not vouch
    /// for a later write.
    fn forget_stale_stable(&mut self, region: u32, place: usize, header: &RegionHeader) -> Result<()> {
        let RegionHeader::Known { stable, .. } = header else { return Ok(()) };
        let entries = self.layers[0].map.chunk(place).entries();
        if (0..REGION_BLOCKS as usize).all(|index| !bit(stable, index) || entries[index] != ENTRY_ABSENT) {
            return Ok(());
        }
        let wrap =
            |error: io::Error| StoreError::from_io(&format!("writing the map of region {region}"), &error);
        self.layers[0].map.reset_stable(place, stable).map_err(wrap)
    }
}

/// Runs of indices whose entry is `wanted`: (first, end).
fn runs(entries: &[u64], wanted: impl Fn(u64) -> bool) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        if wanted(*entry) {
            match found.last_mut() {
                Some((_, end)) if *end == index => *end += 1,
                _ => found.push((index, index + 1)),
            }
        }
    }
    found
}
