//! The block map of one layer: one u64 entry per 4 KiB block, and which entries are stable.
//!
//! Owns the `map` file. Keeps a bounded cache of chunks (a region's entries), written through:
//! `commit` brings every changed entry to the file, and must be called before anything that
//! depends on them is answered. Does not own what an entry means for data; that is store.rs.

use std::io;
use std::sync::Arc;

use crate::checksum::ENTRY_DAMAGED;
use crate::limits::REGION_BLOCKS;
use crate::region_map::RegionMap;

use super::files::BlockFile;
use super::format::{
    bit, chunk_at, chunk_check, header_at, set_bit, Bits, RegionHeader, BIT_WORDS, CHUNK_BYTES, ENTRY_BYTES,
    REGION_HEADER_BYTES,
};

/// Chunks held in memory per layer: 8 MiB, the working set of 4 GiB of volume. Past it, a block's entry
/// costs one more read from the page cache.
pub const CHUNKS_CACHED_MAX: usize = 1024;
/// One frame touches at most 17 regions; its chunks must all fit.
pub const CHUNKS_CACHED_MIN: usize = 32;

/// What the region log knows about a region whose chunk is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Its record says never marked: header and entries must be zero.
    Never,
    /// Marked once, clean now (or sealed): the header must vouch for the entries.
    Clean,
    /// A sealed layer has no region log: never written, or clean.
    Sealed,
    /// The entries are as they are; recovery has looked at them.
    Dirty,
}

/// What a load found wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The entries are vouched for, but the region's record was lost.
    RecordLost,
    /// Nothing vouches for the entries: every block of the region now is damaged.
    ChunkDamaged,
}

pub struct Chunk {
    region: u32,
    referenced: bool,
    stable: Bits,
    entries: Box<[u64; REGION_BLOCKS as usize]>,
}

impl Chunk {
    pub fn entries(&self) -> &[u64; REGION_BLOCKS as usize] {
        &self.entries
    }

    pub fn stable(&self) -> &Bits {
        &self.stable
    }

    fn present(&self) -> Bits {
        let mut bits = [0; BIT_WORDS];
        for (index, entry) in self.entries.iter().enumerate() {
            if *entry != 0 {
                set_bit(&mut bits, index);
            }
        }
        bits
    }
}

/// Entries of one region that the file does not hold yet.
#[derive(Clone, Copy)]
struct PendingRun {
    region: u32,
    first: usize,
    end: usize,
}

pub struct BlockMap<F> {
    file: Arc<F>,
    chunks: Vec<Chunk>,
    places: RegionMap<usize>,
    capacity: usize,
    hand: usize,
    pending: Vec<PendingRun>,
    scratch: Vec<u8>,
    /// Something was written since the last time somebody took this flag to sync the file.
    pub unsynced: bool,
}

impl<F: BlockFile> BlockMap<F> {
    pub fn new(file: Arc<F>, capacity: usize) -> Self {
        assert!(capacity >= CHUNKS_CACHED_MIN);
        Self {
            file,
            chunks: Vec::new(),
            places: RegionMap::default(),
            capacity,
            hand: 0,
            pending: Vec::new(),
            scratch: Vec::new(),
            unsynced: false,
        }
    }

    pub fn file(&self) -> &Arc<F> {
        &self.file
    }

    pub fn chunk(&self, place: usize) -> &Chunk {
        &self.chunks[place]
    }

    #[inline]
    pub fn find(&mut self, region: u32) -> Option<usize> {
        let place = *self.places.get(&region)?;
        self.chunks[place].referenced = true;
        Some(place)
    }

    /// Does the next `load` take another chunk's place? Then everything must be committed before it.
    pub fn must_evict(&self) -> bool {
        self.chunks.len() >= self.capacity
    }

    /// Brings a region's chunk into the cache. A fault is repaired in memory and, for a writable
    /// layer, in the file; the caller marks the region dirty.
    pub fn load(&mut self, region: u32, trust: Trust) -> io::Result<(usize, Option<Fault>)> {
        if let Some(place) = self.find(region) {
            return Ok((place, None));
        }
        let header = self.read_header(region)?;
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(CHUNK_BYTES, 0);
        let read = self.file.read_at(&mut bytes, chunk_at(region));
        let fault = match &read {
            Ok(CHUNK_BYTES) => judge(region, trust, &header, &bytes),
            Ok(_) => Some(Fault::ChunkDamaged),
            Err(_) => None,
        };
        let mut entries = Box::new([0; REGION_BLOCKS as usize]);
        for (entry, place) in entries.iter_mut().zip(bytes.chunks_exact(ENTRY_BYTES)) {
            *entry = u64::from_le_bytes(place.try_into().expect("8 bytes"));
        }
        self.scratch = bytes;
        read?;
        let stable = match header {
            RegionHeader::Known { stable, .. } => stable,
            // Unknown means not stable: the next flush settles it.
            RegionHeader::Never | RegionHeader::Damaged => [0; BIT_WORDS],
        };
        let place = self.insert(Chunk { region, referenced: true, stable, entries });
        if fault == Some(Fault::ChunkDamaged) {
            self.chunks[place].entries.fill(ENTRY_DAMAGED);
            if trust != Trust::Sealed {
                self.pending.push(PendingRun { region, first: 0, end: REGION_BLOCKS as usize });
            }
        }
        Ok((place, fault))
    }

    pub fn read_header(&self, region: u32) -> io::Result<RegionHeader> {
        let mut bytes = [0; REGION_HEADER_BYTES];
        let count = self.file.read_at(&mut bytes, header_at(region))?;
        Ok(if count < bytes.len() { RegionHeader::Damaged } else { RegionHeader::decode(region, &bytes) })
    }

    fn insert(&mut self, chunk: Chunk) -> usize {
        let region = chunk.region;
        let place = if self.chunks.len() < self.capacity {
            self.chunks.push(chunk);
            self.chunks.len() - 1
        } else {
            assert!(self.pending.is_empty(), "a chunk was evicted before it was committed");
            let place = self.pick_victim();
            self.places.remove(&self.chunks[place].region);
            self.chunks[place] = chunk;
            place
        };
        self.places.insert(region, place);
        place
    }

    /// Second chance: the first chunk nobody touched since the hand last passed.
    fn pick_victim(&mut self) -> usize {
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.chunks.len();
            if !std::mem::take(&mut self.chunks[place].referenced) {
                return place;
            }
        }
    }

    /// Sets one entry in memory; `commit` brings it to the file. Returns whether it was stable.
    ///
    /// # Panics
    /// If `place` is not a cached chunk or `index` is past a region.
    #[inline]
    pub fn set(&mut self, place: usize, index: usize, entry: u64) -> bool {
        let chunk = &mut self.chunks[place];
        chunk.entries[index] = entry;
        let region = chunk.region;
        let stable = bit(&chunk.stable, index);
        match self.pending.last_mut() {
            Some(run) if run.region == region && run.end == index => run.end += 1,
            Some(run) if run.region == region && (run.first..run.end).contains(&index) => {}
            _ => self.pending.push(PendingRun { region, first: index, end: index + 1 }),
        }
        stable
    }

    /// Every entry set so far is in the file when this returns.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.unsynced = true;
        let mut bytes = std::mem::take(&mut self.scratch);
        let mut result = Ok(());
        for run in self.pending.drain(..) {
            let chunk = &self.chunks[self.places[&run.region]];
            bytes.clear();
            bytes.extend(chunk.entries[run.first..run.end].iter().flat_map(|entry| entry.to_le_bytes()));
            let at = chunk_at(run.region) + (run.first * ENTRY_BYTES) as u64;
            if let Err(short) = self.file.write_at(&bytes, at) {
                result = Err(short.error);
            }
        }
        self.scratch = bytes;
        result
    }

    /// Adds stable bits to a region's header and writes it.
    pub fn mark_stable(&mut self, place: usize, bits: &Bits) -> io::Result<()> {
        let chunk = &mut self.chunks[place];
        for (word, added) in chunk.stable.iter_mut().zip(bits) {
            *word |= added;
        }
        self.write_header(place, None)
    }

    /// All present entries are stable and the header vouches for the chunk. Call it only when the data
    /// is synced and the entries are committed.
    pub fn mark_clean(&mut self, place: usize) -> io::Result<()> {
        assert!(self.pending.is_empty(), "a chunk was vouched for before it was committed");
        let chunk = &mut self.chunks[place];
        chunk.stable = chunk.present();
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        bytes.extend(chunk.entries.iter().flat_map(|entry| entry.to_le_bytes()));
        let check = chunk_check(chunk.region, &bytes);
        self.scratch = bytes;
        self.write_header(place, Some(check))
    }

    /// Recovery: exactly the present entries among `bits` are stable.
    pub fn reset_stable(&mut self, place: usize, bits: &Bits) -> io::Result<()> {
        let present = self.chunks[place].present();
        let chunk = &mut self.chunks[place];
        for (index, word) in chunk.stable.iter_mut().enumerate() {
            *word = bits[index] & present[index];
        }
        self.write_header(place, None)
    }

    fn write_header(&mut self, place: usize, clean: Option<u64>) -> io::Result<()> {
        let chunk = &self.chunks[place];
        let bytes = RegionHeader::encode(chunk.region, &chunk.stable, clean);
        self.unsynced = true;
        self.file.write_at(&bytes, header_at(chunk.region)).map_err(|short| short.error)
    }

    /// Makes sure that a region which was never marked can be written to when the disk is full.
    pub fn reserve(&self, region: u32) -> io::Result<()> {
        self.file.reserve(header_at(region), REGION_HEADER_BYTES as u64)?;
        self.file.reserve(chunk_at(region), CHUNK_BYTES as u64)
    }
}

fn judge(region: u32, trust: Trust, header: &RegionHeader, bytes: &[u8]) -> Option<Fault> {
    let never = || *header == RegionHeader::Never && bytes.iter().all(|byte| *byte == 0);
    let vouched = || matches!(header, RegionHeader::Known { clean: Some(check), .. } if *check == chunk_check(region, bytes));
    match trust {
        Trust::Dirty => None,
        Trust::Never if never() => None,
        Trust::Never if vouched() => Some(Fault::RecordLost),
        Trust::Clean if vouched() => None,
        Trust::Sealed if vouched() || never() => None,
        Trust::Never | Trust::Clean | Trust::Sealed => Some(Fault::ChunkDamaged),
    }
}
