//! Where things stand in a store's files: superblocks, the block map's groups, the region records.
//! FORMAT.md holds the byte tables; tests compare the two. Does no I/O and keeps no state.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::frame::{le_u32, le_u64};
use crate::limits::{REGION_BLOCKS, REGION_BYTES};

pub const FORMAT_VERSION: u32 = 1;
pub const SUPERBLOCK_BYTES: u64 = 4096;
/// All a superblock says stands in its first sector, so that it cannot be torn.
pub const SUPERBLOCK_USED_BYTES: usize = 512;
pub const MAP_MAGIC: [u8; 8] = *b"DLMNMAP1";
pub const REGIONS_MAGIC: [u8; 8] = *b"DLMNREG1";

pub const ENTRY_BYTES: usize = 8;
pub const CHUNK_BYTES: usize = REGION_BLOCKS as usize * ENTRY_BYTES;
pub const REGION_HEADER_BYTES: usize = 256;
pub const GROUP_REGIONS: u64 = 16;
pub const GROUP_HEADER_BYTES: u64 = GROUP_REGIONS * REGION_HEADER_BYTES as u64;
pub const GROUP_BYTES: u64 = GROUP_HEADER_BYTES + GROUP_REGIONS * CHUNK_BYTES as u64;
pub const RECORD_BYTES: usize = 32;

const HEADER_CLEAN: u32 = 1;
const RECORD_DIRTY: u32 = 1;

/// One bit per block of a region.
pub const BIT_WORDS: usize = REGION_BLOCKS as usize / 64;
pub type Bits = [u64; BIT_WORDS];

#[inline]
pub fn bit(bits: &Bits, index: usize) -> bool {
    bits[index / 64] & (1 << (index % 64)) != 0
}

#[inline]
pub fn set_bit(bits: &mut Bits, index: usize) {
    bits[index / 64] |= 1 << (index % 64);
}

pub fn region_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(REGION_BYTES)
}

pub fn map_bytes(size_bytes: u64) -> u64 {
    SUPERBLOCK_BYTES + region_count(size_bytes).div_ceil(GROUP_REGIONS) * GROUP_BYTES
}

pub fn regions_bytes(size_bytes: u64) -> u64 {
    SUPERBLOCK_BYTES + (region_count(size_bytes) * RECORD_BYTES as u64).next_multiple_of(4096)
}

#[inline]
pub fn header_at(region: u32) -> u64 {
    let region = u64::from(region);
    let group = SUPERBLOCK_BYTES + region / GROUP_REGIONS * GROUP_BYTES;
    group + region % GROUP_REGIONS * REGION_HEADER_BYTES as u64
}

#[inline]
pub fn chunk_at(region: u32) -> u64 {
    let region = u64::from(region);
    let group = SUPERBLOCK_BYTES + region / GROUP_REGIONS * GROUP_BYTES;
    group + GROUP_HEADER_BYTES + region % GROUP_REGIONS * CHUNK_BYTES as u64
}

#[inline]
pub fn record_at(region: u32) -> u64 {
    SUPERBLOCK_BYTES + u64::from(region) * RECORD_BYTES as u64
}

/// The first page of `map` and of `regions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    pub magic: [u8; 8],
    pub size_bytes: u64,
    /// `regions` only: the boot under which the store was last opened.
    pub boot_id: [u8; 16],
}

impl Superblock {
    pub fn encode(&self) -> [u8; SUPERBLOCK_USED_BYTES] {
        let mut bytes = [0; SUPERBLOCK_USED_BYTES];
        bytes[0..8].copy_from_slice(&self.magic);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size_bytes.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.boot_id);
        let check = xxh3_64(&bytes[..504]);
        bytes[504..512].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The reason is for people.
    pub fn decode(bytes: &[u8; SUPERBLOCK_USED_BYTES], magic: [u8; 8]) -> Result<Self, String> {
        if bytes[0..8] != magic {
            return Err("its magic is not ours".to_owned());
        }
        if le_u64(bytes, 504) != xxh3_64(&bytes[..504]) {
            return Err("its superblock does not match its check".to_owned());
        }
        let version = le_u32(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(format!("format version {version}; this program knows {FORMAT_VERSION}"));
        }
        let mut boot_id = [0; 16];
        boot_id.copy_from_slice(&bytes[24..40]);
        Ok(Self { magic, size_bytes: le_u64(bytes, 16), boot_id })
    }
}

/// What the map says about one region beside its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionHeader {
    /// All zero: no flush ever covered this region.
    Never,
    /// `clean`: the checksum of the entry chunk when the region was last cleaned.
    Known { stable: Bits, clean: Option<u64> },
    /// It does not match its check.
    Damaged,
}

impl RegionHeader {
    pub fn encode(region: u32, stable: &Bits, clean: Option<u64>) -> [u8; REGION_HEADER_BYTES] {
        let mut bytes = [0; REGION_HEADER_BYTES];
        for (word, place) in stable.iter().zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let flags = if clean.is_some() { HEADER_CLEAN } else { 0 };
        bytes[128..132].copy_from_slice(&flags.to_le_bytes());
        bytes[136..144].copy_from_slice(&clean.unwrap_or(0).to_le_bytes());
        let check = xxh3_64_with_seed(&bytes[..144], u64::from(region));
        bytes[144..152].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    pub fn decode(region: u32, bytes: &[u8; REGION_HEADER_BYTES]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::Never;
        }
        if le_u64(bytes, 144) != xxh3_64_with_seed(&bytes[..144], u64::from(region)) {
            return Self::Damaged;
        }
        let mut stable = [0; BIT_WORDS];
        for (index, word) in stable.iter_mut().enumerate() {
            *word = le_u64(bytes, index * 8);
        }
        let clean = (le_u32(bytes, 128) & HEADER_CLEAN != 0).then(|| le_u64(bytes, 136));
        Self::Known { stable, clean }
    }
}

/// Checksum of a region's 8192 bytes of entries; seeded, so that a chunk in another's place is noticed.
pub fn chunk_check(region: u32, chunk: &[u8]) -> u64 {
    xxh3_64_with_seed(chunk, u64::from(region))
}

/// When a region was last marked: epoch, then version of the membership record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Stamp {
    pub epoch: u64,
    pub version: u32,
}

/// One record of the `regions` file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// All zero: never marked.
    Never,
    Marked {
        stamp: Stamp,
        dirty: bool,
    },
    Damaged,
}

impl Record {
    pub fn encode(region: u32, stamp: Stamp, dirty: bool) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&stamp.epoch.to_le_bytes());
        bytes[8..12].copy_from_slice(&stamp.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&(if dirty { RECORD_DIRTY } else { 0 }).to_le_bytes());
        let check = xxh3_64_with_seed(&bytes[..24], u64::from(region));
        bytes[24..32].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    pub fn decode(region: u32, bytes: &[u8; RECORD_BYTES]) -> Self {
        if *bytes == [0; RECORD_BYTES] {
            return Self::Never;
        }
        if le_u64(bytes, 24) != xxh3_64_with_seed(&bytes[..24], u64::from(region)) {
            return Self::Damaged;
        }
        let stamp = Stamp { epoch: le_u64(bytes, 0), version: le_u32(bytes, 8) };
        Self::Marked { stamp, dirty: le_u32(bytes, 12) & RECORD_DIRTY != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_one_header_page_and_sixteen_chunks() {
        assert_eq!(GROUP_BYTES, 135_168);
        assert_eq!(header_at(0), 4096);
        assert_eq!(chunk_at(0), 8192);
        assert_eq!(chunk_at(15) + CHUNK_BYTES as u64, header_at(16));
        assert_eq!(map_bytes(17 * REGION_BYTES), 4096 + 2 * GROUP_BYTES);
    }

    #[test]
    fn any_flipped_bit_of_a_record_a_header_or_a_superblock_is_noticed() {
        let record = Record::encode(7, Stamp { epoch: 3, version: 9 }, true);
        for bit in 0..RECORD_BYTES * 8 {
            let mut damaged = record;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(7, &damaged), Record::Damaged, "bit {bit}");
        }
        assert_eq!(Record::decode(8, &record), Record::Damaged);
        let header = RegionHeader::encode(7, &[5; BIT_WORDS], Some(11));
        for bit in 0..152 * 8 {
            let mut damaged = header;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(RegionHeader::decode(7, &damaged), RegionHeader::Damaged, "bit {bit}");
        }
        let superblock = Superblock { magic: MAP_MAGIC, size_bytes: 1 << 30, boot_id: [1; 16] };
        let bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes, MAP_MAGIC), Ok(superblock));
        assert!(Superblock::decode(&bytes, REGIONS_MAGIC).is_err());
        for bit in 0..SUPERBLOCK_USED_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&damaged, MAP_MAGIC).is_err(), "bit {bit}");
        }
    }
}
