//! Damaged files: bytes of `regions`, `map` or `data` changed anywhere, the file cut short, then opened. It is an
//! error or a store; what a region that was clean reads without complaint was once written there, or is zeroes.
//! (A region that was being written when the replica died believes its data where they differ: FORMAT.md,
//! "Recovery".)
#![no_main]

use std::cell::OnceCell;

use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::Stamp;
use dolmen_core::simdisk::Loss;
use dolmen_core::simstore::SimStore;
use dolmen_fuzz::{Input, BLOCK};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 8 << 20;
const REGION_BLOCKS: u64 = 1024;
/// With what each file may hold: places are drawn below it.
const FILES: [(&str, u64); 3] = [("regions", 8192), ("map", 32768), ("data", SIZE)];

thread_local! {
    static TEMPLATE: OnceCell<SimStore> = const { OnceCell::new() };
}

/// Half of the blocks 0 to 7 and 1020 to 1027 are written; region 0 is clean, region 1 is not.
fn content(block: u64) -> Vec<u8> {
    vec![block as u8 ^ 0x5a; BLOCK]
}

fn written() -> impl Iterator<Item = u64> {
    (0..8).chain(1020..1028).filter(|block| block % 2 == 0)
}

fn template() -> SimStore {
    let mut store = SimStore::new();
    store.create(SIZE).unwrap();
    store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).unwrap();
    for block in written() {
        store.write(block * BLOCK as u64, &content(block), block + 1, None, None).unwrap();
        if block == 1022 {
            store.flush(Clean::All).unwrap();
        }
    }
    store.crash();
    store
}

fn damage(input: &mut Input<'_>, store: &SimStore, (file, length): (&str, u64)) {
    let path = store.path_of(file);
    let place = input.number(3) % length;
    match input.byte() % 4 {
        0 => store.disk().truncate(&path, place),
        // Sector for sector, as a disk that mixes up two of them.
        1 => store.disk().swap(&path, place / 512 * 512, input.number(3) % length / 512 * 512, 512),
        2 => {
            let count = usize::from(input.byte()) * 16 + 1;
            store.disk().damage(&path, place, |bytes| bytes.fill(0), count);
        }
        _ => {
            let new = input.bytes(16).to_vec();
            store.disk().damage(&path, place, |bytes| bytes.copy_from_slice(&new[..bytes.len()]), new.len());
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut store = TEMPLATE.with(|made| made.get_or_init(template).copy());
    // One file: a clean region's record and its data are two witnesses, and one of them is to be believed.
    let file = FILES[usize::from(input.byte()) % FILES.len()];
    if input.byte() & 1 == 1 {
        store.power_loss(Loss::Prefix, 1);
    }
    while !input.is_empty() {
        damage(&mut input, &store, file);
    }
    if store.open(SIZE, 2, Stamp { epoch: 2, version: 1 }).is_err() {
        return;
    }
    for block in (0..8).chain(1020..1028) {
        let Ok(found) = store.read(block * BLOCK as u64, BLOCK as u64, None) else { continue };
        if found.entries[0] > 2 && block < REGION_BLOCKS {
            assert!(found.data == content(block), "block {block} reads as what was never written there");
        }
    }
});
