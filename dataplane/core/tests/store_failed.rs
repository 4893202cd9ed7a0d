//! A disk that fails or is full, operation by operation: what the store says, what it remembers, and the
//! way back. On the disk in memory; with real processes: tests/replica/test_disk_faults.py.

mod common;

use common::{block, blocks, BLOCK, REGION};
use dolmen_core::replica::error::{ErrorKind, StoreError};
use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::Opened;
use dolmen_core::replica::store::StoreEvent;
use dolmen_core::simdisk::{Fault, Loss, Operation};
use dolmen_core::simstore::SimStore;

const SIZE: u64 = 4 * REGION;
const B: u64 = BLOCK as u64;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn fresh() -> SimStore {
    let mut store = SimStore::new();
    store.create(SIZE).unwrap();
    open(&mut store);
    store
}

fn open(store: &mut SimStore) -> Opened {
    store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).unwrap()
}

fn fault(store: &SimStore, file: &str, operation: Operation, errno: i32, count: u32) {
    let file = file.to_owned();
    store.disk().add_fault(Fault { file, operation, errno, after: 0, count, written_bytes: 0 });
}

fn write(store: &mut SimStore, at: u64, tag: u64) -> Result<(), StoreError> {
    store.write(at * B, &block(tag), tag, None, None)
}

fn read(store: &mut SimStore, at: u64) -> Option<Vec<u8>> {
    let found = store.read(at * B, B, None).unwrap();
    (found.entries[0] != 2).then_some(found.data)
}

/// Data that was written and flushed, then data that was only written, then a flush whose sync of `file`
/// fails.
fn failed_at(file: &str, errno: i32) -> SimStore {
    let mut store = fresh();
    store.write(0, &blocks(1..9), 1, None, None).unwrap();
    store.flush(Clean::Nothing).unwrap();
    store.write(0, &blocks(11..19), 2, None, None).unwrap();
    fault(&store, file, Operation::Sync, errno, 1);
    let failed = if file == "regions" { write(&mut store, 1024, 5) } else { store.flush(Clean::Nothing) };
    // Never "no space": what was to be written is gone, not refused.
    assert_eq!(failed.unwrap_err().kind, ErrorKind::IoError, "{file}");
    store
}

#[test]
fn a_store_whose_sync_failed_serves_nothing_and_remembers_it_over_a_kill() {
    for file in ["data", "map", "regions"] {
        for errno in [EIO, ENOSPC] {
            let mut store = failed_at(file, errno);
            assert!(matches!(&store.take_events()[..], [StoreEvent::Failed(_)]));
            assert_eq!(store.read(0, B, None).err().unwrap().kind, ErrorKind::IoError);
            assert_eq!(write(&mut store, 0, 3).unwrap_err().kind, ErrorKind::IoError);
            assert_eq!(store.flush(Clean::Nothing).unwrap_err().kind, ErrorKind::IoError);
            assert!(store.summary(0).is_err() && store.repair(0, &block(1), None).is_err());
            // Killed at this very moment, and again while it was open without a flush.
            for _ in 0..3 {
                store.crash();
                assert_eq!(open(&mut store).sync_failed, 1, "{file}");
            }
            for at in 0..8 {
                let found = read(&mut store, at).expect("it verifies");
                assert!(found == block(at + 1) || mixed(&found, at + 1, at + 11), "block {at}");
            }
            write(&mut store, 9, 3).unwrap();
            store.flush(Clean::Nothing).unwrap();
            store.crash();
            assert_eq!(open(&mut store).sync_failed, 0, "a flush has made everything durable");
            // Its note may come back with a power loss, which is doubt enough by itself.
            store.power_loss(Loss::All, 1);
            open(&mut store);
            assert_eq!(read(&mut store, 9), Some(block(3)));
        }
    }
}

fn mixed(found: &[u8], one: u64, other: u64) -> bool {
    let (one, other) = (block(one), block(other));
    (0..BLOCK).step_by(512).all(|at| {
        let sector = at..at + 512;
        found[sector.clone()] == one[sector.clone()] || found[sector.clone()] == other[sector]
    })
}

/// What the page cache holds after a failed sync is not what the disk holds. The next open must see the
/// disk, or a flush would vouch for what is not there.
#[test]
fn what_is_served_after_a_failed_sync_is_on_the_disk() {
    for seed in 0..20 {
        for file in ["data", "map"] {
            let mut store = failed_at(file, EIO);
            store.crash();
            open(&mut store);
            let served: Vec<_> = (0..8).map(|at| read(&mut store, at)).collect();
            store.flush(Clean::Nothing).unwrap();
            store.power_loss(Loss::All, seed);
            open(&mut store);
            let kept: Vec<_> = (0..8).map(|at| read(&mut store, at)).collect();
            assert!(served == kept, "{file}, seed {seed}");
        }
    }
}

#[test]
fn a_failure_that_cannot_be_noted_still_outlives_a_kill() {
    let mut store = fresh();
    write(&mut store, 0, 1).unwrap();
    // The note's own sync fails as well; the page cache keeps it.
    fault(&store, "", Operation::Sync, EIO, u32::MAX);
    assert!(store.flush(Clean::Nothing).is_err());
    store.crash();
    assert!(store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).is_err(), "the disk still fails");
    store.disk().clear_faults();
    assert_eq!(open(&mut store).sync_failed, 1);
}

#[test]
fn a_sync_that_fails_during_recovery_is_remembered() {
    for file in ["data", "map", "regions"] {
        let mut store = fresh();
        write(&mut store, 0, 1).unwrap();
        store.power_loss(Loss::Prefix, 3);
        fault(&store, file, Operation::Sync, EIO, 1);
        assert!(store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).is_err(), "{file}");
        assert_eq!(open(&mut store).sync_failed, 1, "{file}");
    }
}

#[test]
fn a_full_disk_refuses_and_nothing_lies_and_with_room_it_goes_on() {
    for (file, operation) in [
        ("data", Operation::Write),
        ("map", Operation::Reserve),
        ("regions", Operation::Write),
        ("data", Operation::Punch),
    ] {
        let mut store = fresh();
        write(&mut store, 0, 1).unwrap();
        fault(&store, file, operation, ENOSPC, u32::MAX);
        let at = 2048; // a region of its own
        let refused = match operation {
            Operation::Punch => store.zero(0, B, false, 2, None),
            _ => write(&mut store, at, 2),
        };
        assert_eq!(refused.unwrap_err().kind, ErrorKind::NoSpace, "{file}");
        assert_eq!(read(&mut store, 0), Some(block(1)));
        assert_eq!(read(&mut store, at), Some(vec![0; BLOCK]));
        store.disk().clear_faults();
        write(&mut store, at, 3).unwrap();
        store.zero(0, B, false, 4, None).unwrap();
        store.flush(Clean::Nothing).unwrap();
        store.power_loss(Loss::All, 1);
        assert_eq!(open(&mut store).sync_failed, 0);
        assert_eq!(read(&mut store, at), Some(block(3)), "{file}");
        assert_eq!(read(&mut store, 0), Some(vec![0; BLOCK]), "{file}");
    }
}

/// The mark reached the disk before the reservation did: on a disk that is full at the next open, the region
/// must not be written to, for its entries would have no place.
#[test]
fn a_lost_reservation_is_made_again_before_anything_is_written() {
    let mut store = fresh();
    write(&mut store, 0, 1).unwrap();
    store.flush(Clean::Nothing).unwrap();
    store.power_loss(Loss::All, 1);
    fault(&store, "map", Operation::Reserve, ENOSPC, u32::MAX);
    open(&mut store);
    assert_eq!(read(&mut store, 0), Some(block(1)), "reads go on");
    assert_eq!(write(&mut store, 1, 2).unwrap_err().kind, ErrorKind::NoSpace);
    store.disk().clear_faults();
    write(&mut store, 1, 2).unwrap();
    assert_eq!(read(&mut store, 1), Some(block(2)));
}

#[test]
fn what_cannot_be_read_is_damaged_and_nothing_is_made_of_it() {
    let mut store = fresh();
    write(&mut store, 0, 1).unwrap();
    store.flush(Clean::All).unwrap();
    fault(&store, "data", Operation::Read, EIO, 1);
    assert_eq!(read(&mut store, 0), None, "another replica answers");
    assert_eq!(read(&mut store, 0), Some(block(1)), "it was the disk's trouble, not the block's");
    // Part of a block cannot be written without the rest of it.
    fault(&store, "data", Operation::Read, EIO, 1);
    assert_eq!(store.write(512, &[7; 512], 2, None, None).unwrap_err().kind, ErrorKind::Damaged);
    assert_eq!(read(&mut store, 0), Some(block(1)));
    store.crash();
    fault(&store, "map", Operation::Read, EIO, 1);
    assert!(
        store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).is_err(),
        "an I/O error is no empty map (C22)"
    );
    open(&mut store);
    let mut store = SimStore::new();
    store.create(SIZE).unwrap();
    open(&mut store);
    fault(&store, "map", Operation::Read, EIO, 1);
    assert_eq!(store.read(0, B, None).err().unwrap().kind, ErrorKind::IoError);
    assert!(store.take_events().is_empty(), "it goes on");
    assert_eq!(read(&mut store, 0), Some(vec![0; BLOCK]));
}

#[test]
fn a_short_write_leaves_whole_blocks_or_what_is_there() {
    for written_bytes in [0, 1, 511, 4096, 5000, 8191] {
        for errno in [EIO, ENOSPC] {
            let mut store = fresh();
            store.write(0, &blocks([1, 2, 3]), 1, None, None).unwrap();
            let (file, operation) = ("data".to_owned(), Operation::Write);
            store.disk().add_fault(Fault { file, operation, errno, after: 0, count: 1, written_bytes });
            assert!(store.write(0, &blocks([11, 12, 13]), 2, None, None).is_err());
            for _ in 0..2 {
                for at in 0..3 {
                    let found = read(&mut store, at).expect("it verifies");
                    let cut = written_bytes.saturating_sub(at as usize * BLOCK).min(BLOCK);
                    let expected = [&block(at + 11)[..cut], &block(at + 1)[cut..]].concat();
                    assert!(found == expected, "block {at} after {written_bytes} bytes");
                }
                store.crash();
                open(&mut store);
            }
        }
    }
}

#[test]
fn entries_that_cannot_be_written_fail_the_store_and_it_comes_back() {
    let mut store = fresh();
    write(&mut store, 0, 1).unwrap();
    fault(&store, "map", Operation::Write, ENOSPC, 1);
    assert!(write(&mut store, 0, 2).is_err());
    assert!(matches!(&store.take_events()[..], [StoreEvent::Failed(_)]));
    assert!(store.read(0, B, None).is_err());
    store.crash();
    open(&mut store);
    let found = read(&mut store, 0).expect("it verifies");
    assert!([block(1), block(2), vec![0; BLOCK]].contains(&found) || mixed(&found, 1, 2));
    write(&mut store, 0, 3).unwrap();
    assert_eq!(read(&mut store, 0), Some(block(3)));
}
