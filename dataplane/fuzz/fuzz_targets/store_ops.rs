//! A store against an array: writes, parts of blocks, zeroes, flushes, kills and power losses in any order. What
//! was answered is there after a kill; after a power loss each sector is what it was at the last flush or since.
#![no_main]

use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::Stamp;
use dolmen_core::simdisk::Loss;
use dolmen_core::simstore::SimStore;
use dolmen_fuzz::{Input, BLOCK};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 8 << 20;
const SECTOR: usize = 512;
/// Four blocks on each side of the border of two regions.
const FIRST_BLOCK: u64 = 1020;
const BLOCKS: usize = 8;
const OPERATIONS_MAX: u64 = 64;

/// What each sector is, and what it may be after a power loss. A sector is filled with one byte.
struct Model {
    now: [u8; BLOCKS * 8],
    since_flush: Vec<Vec<u8>>,
}

impl Model {
    fn set(&mut self, sectors: std::ops::Range<usize>, value: u8) {
        for sector in sectors {
            self.now[sector] = value;
            self.since_flush[sector].push(value);
        }
    }

    fn flushed(&mut self) {
        self.since_flush = self.now.iter().map(|value| vec![*value]).collect();
    }
}

fn check(store: &mut SimStore, model: &mut Model, power_was_lost: bool) {
    let found = store.read(FIRST_BLOCK * BLOCK as u64, (BLOCKS * BLOCK) as u64, None).unwrap();
    assert!(!found.entries.contains(&2), "a block is damaged that nobody damaged: {:?}", found.entries);
    for (sector, bytes) in found.data.chunks(SECTOR).enumerate() {
        let value = bytes[0];
        assert!(bytes.iter().all(|byte| *byte == value), "sector {sector} is a mix");
        if power_was_lost {
            assert!(
                model.since_flush[sector].contains(&value),
                "sector {sector} is {value}, not one of {:?}",
                model.since_flush[sector]
            );
            model.now[sector] = value;
        }
        assert_eq!(value, model.now[sector], "sector {sector}");
    }
    if power_was_lost {
        // What was read once does not change again.
        model.flushed();
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut store = SimStore::new();
    store.create(SIZE).unwrap();
    let mut epoch = 1;
    store.open(SIZE, epoch, Stamp { epoch, version: 1 }).unwrap();
    let mut model = Model { now: [0; BLOCKS * 8], since_flush: vec![vec![0]; BLOCKS * 8] };
    let mut now_ms = 0;
    for id in 1..=OPERATIONS_MAX {
        if input.is_empty() {
            break;
        }
        let operation = input.byte();
        let block = usize::from(operation >> 4) % BLOCKS;
        let offset = (FIRST_BLOCK + block as u64) * BLOCK as u64;
        match operation & 7 {
            0 | 1 => {
                let value = id as u8;
                store.write(offset, &[value; BLOCK], id, None, None).unwrap();
                model.set(block * 8..block * 8 + 8, value);
            }
            2 => {
                let (value, sector) = (id as u8, usize::from(input.byte()) % 8);
                store.write(offset + (sector * SECTOR) as u64, &[value; SECTOR], id, None, None).unwrap();
                model.set(block * 8 + sector..block * 8 + sector + 1, value);
            }
            3 => {
                store.zero(offset, BLOCK as u64, operation & 8 != 0, id, None).unwrap();
                model.set(block * 8..block * 8 + 8, 0);
            }
            4 => {
                let clean = if operation & 8 == 0 { Clean::Nothing } else { Clean::All };
                store.flush(clean).unwrap();
                model.flushed();
            }
            5 => {
                now_ms += 4000;
                store.set_now_ms(now_ms);
                store.completed(id).unwrap();
                store.flush(Clean::Idle).unwrap();
                model.flushed();
            }
            lost => {
                let power_was_lost = lost == 7;
                if power_was_lost {
                    let loss = Loss::ALL[usize::from(operation >> 4) % Loss::ALL.len()].1;
                    store.power_loss(loss, input.number(2));
                } else {
                    store.crash();
                }
                epoch += 1;
                store.open(SIZE, epoch, Stamp { epoch, version: 1 }).unwrap();
                check(&mut store, &mut model, power_was_lost);
            }
        }
    }
    check(&mut store, &mut model, false);
});
