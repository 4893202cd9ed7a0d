//! A map keyed by region numbers. Used by the engine's request table and by the replica's store.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Region numbers are small, dense, and of our own arithmetic: one multiplication spreads them, and
/// nobody can choose colliding ones.
#[derive(Default)]
pub struct RegionHasher(u64);

impl Hasher for RegionHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0 ^ u64::from(value)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}

pub type RegionMap<V> = HashMap<u32, V, BuildHasherDefault<RegionHasher>>;
