//! Repairs by order: blocks that nobody reads, too.

mod engine_support;

use std::time::{Duration, Instant};

use dolmen_core::engine::{Closed, Event};
use dolmen_core::frame::kind;
use engine_support::*;

const SIZE: u64 = 16 << 20;
/// engine/limits.rs REPAIRS_QUEUED_MAX.
const QUEUED_MAX: u64 = 1024;

fn reads(store: &Store) -> usize {
    store.log.iter().filter(|(_, found)| *found == kind::READ).count()
}

fn rig_with_data(replica_count: usize) -> (Rig, NbdClient) {
    let rig = Rig::new(SIZE, replica_count);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 1 << 20)), 0);
    (rig, client)
}

fn block_of(data: &[u8], block: usize) -> &[u8] {
    &data[block * BLOCK..(block + 1) * BLOCK]
}

#[test]
fn a_block_that_nobody_reads_gets_the_good_copy_of_another_replica() {
    let (mut rig, _client) = rig_with_data(2);
    rig.replicas[1].store().flipped.insert(7);
    rig.replicas[1].store().damaged.insert(300);
    rig.engine.repair_block(1, 7).expect("room");
    rig.engine.repair_block(1, 300).expect("room");
    for block_index in [7, 300] {
        rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index });
    }
    let store = rig.replicas[1].store();
    assert_eq!((store.repairs, reads(&store)), (2, 0), "the bad copy was not asked");
    assert!(store.block(7) == block_of(&pattern(1, 1 << 20), 7));
    assert!(store.block(300) == vec![0; BLOCK], "never written: it reads as zeroes");
}

#[test]
fn a_repair_takes_whichever_copy_verifies_and_says_so_when_none_does() {
    let (mut rig, _client) = rig_with_data(3);
    rig.replicas[0].store().flipped.insert(7);
    rig.replicas[2].store().damaged.insert(7);
    rig.engine.repair_block(2, 7).expect("room");
    rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 2, block_index: 7 });
    assert!(rig.replicas[2].store().block(7) == block_of(&pattern(1, 1 << 20), 7));
    for slot in 0..3 {
        rig.replicas[slot].store().damaged.insert(9);
    }
    rig.engine.repair_block(1, 9).expect("room");
    rig.event("block_unreadable", |event| *event == Event::BlockUnreadable { block_index: 9 });
    assert_eq!(rig.replicas[1].store().repairs, 0, "it was given nothing");
}

#[test]
fn orders_wait_for_a_reader_in_a_queue_that_is_bounded() {
    let (mut rig, _client) = rig_with_data(2);
    rig.engine.set_readers(&[]).expect("open");
    for block_index in 0..QUEUED_MAX {
        rig.engine.repair_block(1, block_index).expect("room");
    }
    assert!(matches!(rig.engine.repair_block(1, 0), Err(Closed::BadRequest(_))));
    rig.engine.set_readers(&[0, 1]).expect("open");
    for block_index in 0..QUEUED_MAX {
        rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index });
    }
    rig.engine.repair_block(1, 0).expect("room again");
    assert!(matches!(rig.engine.repair_block(2, 0), Err(Closed::BadRequest(_))), "there is no slot 2");
    assert!(matches!(rig.engine.repair_block(1, SIZE / 4096), Err(Closed::BadRequest(_))));
}

#[test]
fn orders_for_a_replica_that_is_gone_are_forgotten() {
    let (mut rig, _client) = rig_with_data(2);
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    let deadline = Instant::now() + PATIENCE;
    for block_index in 0..3 * QUEUED_MAX {
        while rig.engine.repair_block(1, block_index).is_err() {
            assert!(Instant::now() < deadline, "forgotten orders still hold their place");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    rig.replicas[1].store().damaged.insert(7);
    rig.attach(1, true);
    rig.settle();
    while rig.engine.repair_block(1, 7).is_err() {
        assert!(Instant::now() < deadline);
    }
    rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index: 7 });
    assert!(rig.replicas[1].store().block(7) == block_of(&pattern(1, 1 << 20), 7));
}

#[test]
fn a_repair_never_brings_back_what_was_overwritten_meanwhile() {
    let (mut rig, mut client) = rig_with_data(2);
    rig.replicas[0].store().held_kinds.insert(kind::READ);
    rig.replicas[1].store().damaged.insert(7);
    rig.engine.repair_block(1, 7).expect("room");
    rig.replicas[0].wait_until("the read", |store| reads(store) == 1);
    assert_eq!(client.write(7 * BLOCK as u64, &pattern(2, BLOCK)), 0);
    // The new copy goes bad at once: the replica would take any repair.
    rig.replicas[1].store().damaged.insert(7);
    rig.replicas[0].release();
    rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index: 7 });
    assert!(rig.replicas[1].store().block(7) == pattern(2, BLOCK));
    assert_eq!(reads(&rig.replicas[0].store()), 2);
}

#[test]
fn a_bad_copy_found_by_a_read_is_not_overwritten_with_what_is_old() {
    let (rig, mut client) = rig_with_data(2);
    rig.replicas[1].store().damaged.insert(7);
    rig.engine.set_readers(&[1]).expect("open");
    rig.settle();
    rig.replicas[0].store().held_kinds.insert(kind::READ);
    rig.replicas[1].store().held_kinds.insert(kind::READ);
    let read = client.send(READ, 0, 7 * BLOCK as u64, BLOCK as u32, &[]);
    // The bad copy is told of only when there is somebody else to ask.
    rig.replicas[1].wait_until("the read", |store| reads(store) == 1);
    rig.engine.set_readers(&[0, 1]).expect("open");
    rig.settle();
    rig.replicas[1].release();
    rig.replicas[0].wait_until("the good copy is asked for", |store| reads(store) == 1);
    let mut writer = rig.client();
    assert_eq!(writer.write(7 * BLOCK as u64, &pattern(2, BLOCK)), 0);
    rig.replicas[1].store().damaged.insert(7);
    rig.replicas[0].release();
    let old = pattern(1, 1 << 20);
    assert!(client.read_reply(read, 7 * BLOCK as u64, BLOCK as u32).expect("readable") == block_of(&old, 7));
    assert_eq!(rig.replicas[1].store().repairs, 0);
    assert!(client.read(7 * BLOCK as u64, BLOCK as u32).expect("readable") == pattern(2, BLOCK));
}

#[test]
fn a_repair_waits_until_its_region_is_equal() {
    let (mut rig, _client) = rig_with_data(2);
    rig.replicas[1].store().damaged.insert(7);
    rig.engine.set_unequal(vec![0]).expect("open");
    rig.engine.repair_block(1, 7).expect("room");
    rig.event("region_wanted", |event| *event == Event::RegionWanted { region_index: 0 });
    assert_eq!(rig.replicas[1].store().repairs, 0);
    rig.engine.regions_equal(vec![0], u64::MAX).expect("open");
    rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index: 7 });
}
