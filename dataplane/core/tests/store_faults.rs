//! A store on a disk that is full, that fails, or that has more than one layer.

mod common;

use std::path::Path;

use common::{block, blocks, write_payload, BLOCK, REGION};
use dolmen_core::replica::error::{ErrorKind, StoreError};
use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::{chunk_at, record_at, Stamp};
use dolmen_core::replica::recovery::{create_store, open_store, OpenOptions, Opened};
use dolmen_core::replica::store::{regions_of, Store, StoreEvent};
use dolmen_core::simdisk::{Loss, MemoryDisk, MemoryFile};

const SIZE: u64 = 3 * REGION;
const STAMP: Stamp = Stamp { epoch: 1, version: 1 };

fn open(disk: &MemoryDisk, chain: &[&str]) -> (Store<MemoryFile>, Opened) {
    let chain: Vec<String> = chain.iter().map(|layer| (*layer).to_owned()).collect();
    open_store(disk, Path::new("/r"), &chain, OpenOptions::new(SIZE, 1, STAMP)).unwrap()
}

fn fresh() -> (MemoryDisk, Store<MemoryFile>) {
    let disk = MemoryDisk::new();
    create_store(&disk, Path::new("/r"), "head", SIZE).unwrap();
    let store = open(&disk, &["head"]).0;
    (disk, store)
}

fn write(store: &mut Store<MemoryFile>, first: u64, data: &[u8]) -> Result<(), StoreError> {
    let offset = first * BLOCK as u64;
    store.mark_now(regions_of(offset, data.len() as u64), false)?;
    let payload = write_payload(offset, data);
    let (sums, data) = payload.split_at(data.len() / BLOCK * 8);
    let result = store.write_blocks(first, sums, data, 1);
    store.commit()?;
    result
}

fn zero(store: &mut Store<MemoryFile>, first: u64, count: u64) {
    store.mark_now(regions_of(first * BLOCK as u64, count * BLOCK as u64), false).unwrap();
    store.zero_blocks(first, count, false, 1).unwrap();
    store.commit().unwrap();
}

/// `None`: no good copy.
fn read(store: &mut Store<MemoryFile>, at: u64) -> Option<Vec<u8>> {
    let mut data = [0; BLOCK];
    store.read_block(at, &mut data).unwrap().map(|_| data.to_vec())
}

#[test]
fn a_full_disk_is_said_to_be_full_and_nothing_lies() {
    for left in [0, 100, 4096, 6000, 8192] {
        let (disk, mut store) = fresh();
        write(&mut store, 1, &block(1)).unwrap();
        disk.fill_up("data", left);
        assert_eq!(write(&mut store, 0, &blocks([10, 11, 12])).unwrap_err().kind, ErrorKind::NoSpace);
        // Each block is whole: the old one, the new one, or for the one that was cut a mix that verifies.
        let found: Vec<Vec<u8>> = (0..3).map(|at| read(&mut store, at).expect("it verifies")).collect();
        assert!(found[0] == block(10) || found[0] == vec![0; BLOCK], "{left} bytes");
        let cut = left % BLOCK;
        let mixed = [&block(11)[..cut], &block(1)[cut..]].concat();
        assert!([block(1), block(11), mixed].contains(&found[1]), "{left} bytes");
        assert_eq!(found[2], vec![0; BLOCK]);
        disk.make_room();
        write(&mut store, 0, &blocks([10, 11, 12])).unwrap();
        drop(store);
        let (mut store, opened) = open(&disk, &["head"]);
        assert_eq!(opened.blocks_recomputed + opened.blocks_dropped, 0);
        assert_eq!(read(&mut store, 2).unwrap(), block(12));
    }
}

#[test]
fn a_disk_without_room_for_metadata_refuses_before_anything_is_applied() {
    for file in ["map", "regions"] {
        let (disk, mut store) = fresh();
        write(&mut store, 0, &block(1)).unwrap();
        disk.fill_up(file, 0);
        let far = 2 * REGION / BLOCK as u64;
        assert_eq!(write(&mut store, far, &block(2)).unwrap_err().kind, ErrorKind::NoSpace, "{file}");
        assert_eq!(read(&mut store, far).unwrap(), vec![0; BLOCK]);
        store.check_alive().unwrap();
        disk.make_room();
        write(&mut store, far, &block(2)).unwrap();
        assert_eq!(read(&mut store, far).unwrap(), block(2));
    }
}

#[test]
fn after_a_failed_sync_nothing_is_served_until_the_store_is_opened_again() {
    for file in ["data", "map", "regions"] {
        let (disk, mut store) = fresh();
        if file != "regions" {
            write(&mut store, 0, &block(1)).unwrap();
        }
        disk.fail_syncs(Some(file));
        let failed = write(&mut store, 0, &block(1)).and_then(|()| store.flush_now(Clean::Nothing));
        assert_eq!(failed.unwrap_err().kind, ErrorKind::IoError, "{file}");
        assert!(matches!(&store.take_events()[..], [StoreEvent::Failed(_)]));
        disk.fail_syncs(None);
        // Trying again must not help: the kernel may have dropped what it could not write.
        assert_eq!(store.flush_now(Clean::Nothing).unwrap_err().kind, ErrorKind::IoError);
        assert!(store.write_partial(0, &[1], 1).is_err());
        drop(store);
        let (mut store, _) = open(&disk, &["head"]);
        write(&mut store, 0, &block(2)).unwrap();
        store.flush_now(Clean::Nothing).unwrap();
    }
}

#[test]
fn a_damaged_map_is_noticed_and_not_believed() {
    let (disk, mut store) = fresh();
    write(&mut store, 0, &blocks(0..10)).unwrap();
    store.flush_now(Clean::All).unwrap();
    drop(store);
    disk.flip(Path::new("/r/head/map"), chunk_at(0) as usize + 3 * 8);
    let (mut store, opened) = open(&disk, &["head"]);
    assert_eq!(opened.dirty_regions, 0);
    assert_eq!(read(&mut store, 5), None, "the whole region is in doubt");
    write(&mut store, 5, &block(5)).unwrap();
    assert_eq!(read(&mut store, 5).unwrap(), block(5));
    assert!(store.log().dirty_sorted().contains(&0));
    drop(store);
    disk.lose_power(Loss::All, 1, true);
    let (mut store, _) = open(&disk, &["head"]);
    assert_eq!(read(&mut store, 4), None, "doubt is not forgotten");
}

#[test]
fn a_lost_record_makes_its_region_dirty_again() {
    let (disk, mut store) = fresh();
    write(&mut store, 0, &block(7)).unwrap();
    store.flush_now(Clean::All).unwrap();
    drop(store);
    disk.flip(Path::new("/r/regions"), record_at(0) as usize);
    let (mut store, opened) = open(&disk, &["head"]);
    assert_eq!((opened.dirty_regions, opened.regions_damaged), (1, 1));
    assert_eq!(read(&mut store, 0).unwrap(), block(7));
    assert_eq!(store.log().changed_since(Stamp { epoch: 0, version: 9 }).unwrap(), [0]);
}

/// A replica whose chain is an empty head over a sealed layer with ten blocks.
fn chained() -> (MemoryDisk, Store<MemoryFile>) {
    let (disk, mut store) = fresh();
    write(&mut store, 0, &blocks(0..10)).unwrap();
    store.flush_now(Clean::All).unwrap();
    drop(store);
    disk.rename(Path::new("/r/head"), Path::new("/aside"));
    disk.rename(Path::new("/r"), Path::new("/gone"));
    create_store(&disk, Path::new("/r"), "head", SIZE).unwrap();
    disk.rename(Path::new("/aside"), Path::new("/r/base"));
    let store = open(&disk, &["head", "base"]).0;
    (disk, store)
}

#[test]
fn a_block_belongs_to_the_first_layer_that_has_it() {
    let (disk, mut store) = chained();
    write(&mut store, 3, &block(33)).unwrap();
    zero(&mut store, 4, 2);
    store.mark_now(0..=0, false).unwrap();
    store.write_partial(6 * BLOCK as u64 + 100, &[9; 50], 1).unwrap();
    store.commit().unwrap();
    let mut mixed = block(6);
    mixed[100..150].fill(9);
    let check = |store: &mut Store<MemoryFile>| {
        assert_eq!(read(store, 2).unwrap(), block(2));
        assert_eq!(read(store, 3).unwrap(), block(33));
        assert_eq!(read(store, 4).unwrap(), vec![0; BLOCK], "a trim never reveals what is below");
        assert_eq!(read(store, 6).unwrap(), mixed);
    };
    check(&mut store);
    store.flush_now(Clean::Nothing).unwrap();
    drop(store);
    disk.lose_power(Loss::All, 1, true);
    check(&mut open(&disk, &["head", "base"]).0);
}

#[test]
fn a_write_that_power_loss_took_shows_the_older_layer_again() {
    for loss in [Loss::All, Loss::AllOrNothing, Loss::Torn] {
        for seed in 0..40 {
            let (disk, mut store) = chained();
            zero(&mut store, 8, 1);
            store.flush_now(Clean::Nothing).unwrap();
            write(&mut store, 0, &block(50)).unwrap();
            write(&mut store, 8, &block(58)).unwrap();
            drop(store);
            disk.lose_power(loss, seed, true);
            let (mut store, _) = open(&disk, &["head", "base"]);
            let first = read(&mut store, 0).expect("it verifies");
            assert!([block(0), block(50)].contains(&first), "the layer below or the write, {loss:?} {seed}");
            let zeroed = read(&mut store, 8).expect("it verifies");
            let sectors =
                zeroed.chunks(512).zip(block(58).chunks(512).map(<[u8]>::to_vec).collect::<Vec<_>>());
            assert!(sectors
                .into_iter()
                .all(|(found, new)| found == new || found.iter().all(|byte| *byte == 0)));
        }
    }
}

#[test]
fn entries_that_are_lost_when_a_chunk_must_go_fail_the_whole_batch() {
    const REGIONS: u64 = 34;
    let (disk, size) = (MemoryDisk::new(), REGIONS * REGION);
    create_store(&disk, Path::new("/r"), "head", size).unwrap();
    let options = OpenOptions { chunks_cached_max: 32, ..OpenOptions::new(size, 1, STAMP) };
    let mut store = open_store(&disk, Path::new("/r"), &["head".to_owned()], options).unwrap().0;
    store.mark_now(0..=REGIONS as u32 - 1, false).unwrap();
    store.commit().unwrap();
    let payload = write_payload(0, &block(1));
    store.write_blocks(0, &payload[..8], &payload[8..], 1).unwrap();
    disk.fill_up("map", 0);
    // Later requests of the same batch: more chunks than the cache holds.
    let mut data = [0; BLOCK];
    let first_blocks = (0..REGIONS).map(|region| region * REGION / BLOCK as u64);
    let results: Vec<bool> = first_blocks.map(|at| store.read_block(at, &mut data).is_ok()).collect();
    assert!(results.contains(&false));
    disk.make_room();
    assert!(store.commit().is_err(), "the write must not be answered");
    assert!(store.check_alive().is_err());
    assert!(matches!(&store.take_events()[..], [StoreEvent::Failed(_)]));
}

#[test]
fn a_sync_that_fails_while_damage_is_recorded_fails_the_store() {
    let (disk, mut store) = fresh();
    write(&mut store, 0, &block(0)).unwrap();
    store.flush_now(Clean::All).unwrap();
    drop(store);
    disk.flip(Path::new("/r/head/map"), chunk_at(0) as usize);
    let (mut store, _) = open(&disk, &["head"]);
    disk.fail_syncs(Some("map"));
    assert!(store.read_block(0, &mut [0; BLOCK]).is_err());
    disk.fail_syncs(None);
    assert!(store.check_alive().is_err());
    assert!(store.take_events().iter().any(|event| matches!(event, StoreEvent::Failed(_))));
}
