//! What replicas do to an engine: they die, stall, fail, corrupt, return. Who gets which answer.

mod engine_support;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use dolmen_core::engine::Event;
use dolmen_core::frame::{kind, status};
use engine_support::*;

const SIZE: u64 = 16 << 20;
const REGION: u64 = 4 << 20;
const EIO: u32 = 5;
const ENOSPC: u32 = 28;
/// Long enough for a wrong reply to arrive, short enough to wait for in vain.
const MOMENT: Duration = Duration::from_millis(30);

fn hold(rig: &Rig, slot: usize, kinds: &[u8]) {
    rig.replicas[slot].store().held_kinds.extend(kinds);
}

fn frames_of(rig: &Rig, slot: usize, wanted: u8) -> Vec<u64> {
    let store = rig.replicas[slot].store();
    store.log.iter().filter(|(_, kind)| *kind == wanted).map(|(id, _)| *id).collect()
}

#[test]
fn a_write_is_acked_only_after_a_dead_replica_left_the_members() {
    let mut rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    hold(&rig, 2, &[kind::WRITE]);
    let cookie = client.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    rig.replicas[2].wait_until("the write", |store| !store.log.is_empty());
    rig.replicas[2].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 2, generation: 3, .. }));
    assert!(!client.has_reply_within(MOMENT), "slot 2 is still required");
    rig.engine.set_members(&[0, 1]).expect("open");
    assert_eq!(client.simple(), (cookie, 0));
}

#[test]
fn with_all_replicas_gone_requests_wait_and_go_on_with_the_first_that_may_serve() {
    let mut rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    for replica in &rig.replicas {
        replica.store().held_kinds.insert(kind::WRITE);
    }
    let cookies: Vec<u64> = (0..20u64)
        .map(|index| client.send(WRITE, 0, index % 3 * 4096, 4096, &pattern(index, 4096)))
        .collect();
    for (slot, replica) in rig.replicas.iter().enumerate() {
        replica.wait_until("the writes", |store| store.log.len() >= 10 + slot);
        replica.die();
    }
    for slot in 0..3 {
        rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: lost, .. } if *lost == slot));
    }
    let read = client.send(READ, 0, 0, 4096, &[]);
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.set_members(&[1]).expect("open");
    rig.engine.set_readers(&[1]).expect("open");
    rig.replicas[1].store().held_kinds.clear();
    rig.attach(1, true);
    assert!(client.read_among(read, 0, 4096, &cookies) == pattern(18, 4096));
    for block in 0..3u64 {
        let last = (0..20u64).rev().find(|index| index % 3 == block).expect("written");
        assert!(rig.replicas[1].store().block(block) == pattern(last, 4096), "{block}");
    }
}

#[test]
fn what_a_replica_has_answered_is_never_undone_by_what_is_sent_again() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    hold(&rig, 1, &[kind::WRITE_PARTIAL]);
    let older = client.send(WRITE, 0, 100, 50, &pattern(1, 50));
    assert_eq!(client.write(0, &pattern(2, 4096)), 0, "the newer one is answered first");
    assert_eq!(client.write(REGION, &pattern(3, 4096)), 0, "another region");
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    rig.replicas[1].store().held_kinds.clear();
    rig.attach(1, true);
    assert_eq!(client.simple(), (older, 0));
    // What the client was told about block 0 must hold once everything is quiet.
    assert_eq!(client.command(FLUSH, 0, 0, 0), 0);
    assert!(rig.replicas[1].store().block(0) == pattern(2, 4096));
    let writes = frames_of(&rig, 1, kind::WRITE);
    assert_eq!(writes.len(), 2, "what it had answered was not repeated: {writes:?}");
    assert_eq!(frames_of(&rig, 1, kind::WRITE_PARTIAL).len(), 1, "what is under it came again as a flush");
}

#[test]
fn a_member_that_fails_what_another_holds_loses_its_link() {
    let mut rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    rig.replicas[1].store().statuses.insert(kind::WRITE, status::NO_SPACE);
    let cookie = client.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    let event = rig.event("link_failed", |event| matches!(event, Event::LinkFailed { .. }));
    assert_eq!(event, Event::LinkFailed { slot: 1, generation: 2, status: status::NO_SPACE });
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.set_members(&[0, 2]).expect("open");
    assert_eq!(client.simple(), (cookie, 0));
    assert_eq!(client.write(0, &pattern(2, 4096)), 0);
}

#[test]
fn a_write_that_fails_everywhere_is_an_error_and_leaves_the_region_unequal() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    for replica in &rig.replicas {
        replica.store().statuses.insert(kind::WRITE, status::NO_SPACE);
    }
    assert_eq!(client.write(REGION, &pattern(1, 4096)), ENOSPC);
    rig.event("region_diverged", |event| *event == Event::RegionDiverged { region_index: 1 });
    assert!(!rig.has_event(|event| matches!(event, Event::LinkFailed { .. })));
    let read = client.send(READ, 0, REGION, 4096, &[]);
    rig.event("region_wanted", |event| *event == Event::RegionWanted { region_index: 1 });
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "other regions are free");
    rig.engine.regions_equal(vec![1], u64::MAX).expect("open");
    assert_eq!(client.read_reply(read, REGION, 4096), Ok(vec![0; 4096]));
    for replica in &rig.replicas {
        replica.store().statuses.insert(kind::WRITE, status::IO_ERROR);
    }
    assert_eq!(client.write(0, &pattern(1, 4096)), EIO);
}

#[test]
fn other_refusals_of_a_write_end_the_link() {
    for refusal in [status::BAD_CHECKSUM, status::STALE_EPOCH, status::BAD_REQUEST, status::SHUTTING_DOWN, 99]
    {
        let mut rig = Rig::new(SIZE, 2);
        let mut client = rig.client();
        rig.replicas[0].store().statuses.insert(kind::WRITE, refusal);
        let cookie = client.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
        let event = rig.event("link_failed", |event| matches!(event, Event::LinkFailed { .. }));
        assert_eq!(event, Event::LinkFailed { slot: 0, generation: 1, status: refusal });
        rig.engine.set_members(&[1]).expect("open");
        assert_eq!(client.simple(), (cookie, 0));
    }
}

#[test]
fn a_bad_copy_is_answered_from_another_replica_and_rewritten() {
    let mut rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    let data = pattern(1, 1 << 20);
    assert_eq!(client.write(0, &data), 0);
    rig.replicas[1].store().flipped.extend([3, 4, 200]);
    rig.replicas[1].store().damaged.extend([5, 255]);
    rig.replicas[2].store().flipped.insert(77);
    rig.engine.set_readers(&[1, 2]).expect("open");
    // Whoever is asked first, after a few rounds both were.
    while !(rig.replicas[1].store().repairs == 5 && rig.replicas[2].store().repairs == 1) {
        assert!(client.read(0, 1 << 20).expect("readable") == data);
    }
    for block_index in [3, 4, 5, 200, 255] {
        rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 1, block_index });
    }
    rig.event("block_repaired", |event| *event == Event::BlockRepaired { slot: 2, block_index: 77 });
    assert_eq!(rig.engine.stats().expect("open").counters.repairs, 6);
}

#[test]
fn a_replica_that_cannot_read_is_not_the_clients_problem() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    let data = pattern(1, 40960);
    assert_eq!(client.write(512, &data), 0);
    rig.replicas[0].store().statuses.insert(kind::READ, status::IO_ERROR);
    for _ in 0..4 {
        assert!(client.read(512, 40960).expect("readable") == data);
    }
}

#[test]
fn eio_only_when_no_copy_verifies() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 65536)), 0);
    rig.replicas[0].store().flipped.insert(2);
    rig.replicas[1].store().damaged.insert(2);
    assert_eq!(client.read(0, 65536), Err(EIO));
    rig.event("block_unreadable", |event| *event == Event::BlockUnreadable { block_index: 2 });
    assert!(client.read(0, 8192).expect("its neighbours are good") == pattern(1, 65536)[..8192]);
    assert_eq!(client.write(8192, &pattern(2, 4096)), 0);
    assert!(client.read(8192, 4096).expect("written anew") == pattern(2, 4096));
}

#[test]
fn blocks_that_each_replica_has_are_read_though_neither_can_give_the_whole() {
    for hedged in [false, true] {
        let (rig, time) = Rig::with_time(SIZE, 2);
        let mut client = rig.client();
        assert_eq!(client.write(0, &pattern(1, 65536)), 0);
        rig.replicas[0].store().unreadable.insert(2);
        rig.replicas[1].store().unreadable.insert(9);
        if hedged {
            hold(&rig, 0, &[kind::READ]);
            hold(&rig, 1, &[kind::READ]);
        }
        let read = client.send(READ, 0, 0, 65536, &[]);
        if hedged {
            let seen = |rig: &Rig| rig.replicas.iter().filter(|r| r.store().frames_seen > 1).count();
            while seen(&rig) < 2 {
                time.pass(Duration::from_millis(10));
                rig.settle();
            }
            rig.replicas[0].release();
            rig.replicas[1].release();
        }
        assert!(
            client.read_reply(read, 0, 65536).expect("each block is good somewhere") == pattern(1, 65536)
        );
        rig.replicas[0].store().unreadable.insert(9);
        assert_eq!(client.read(9 * 4096, 4096), Err(EIO));
    }
}

#[test]
fn a_read_of_a_lost_link_goes_to_another_reader_at_once_and_waits_when_there_is_none() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    for slot in [0, 1] {
        hold(&rig, slot, &[kind::READ]);
    }
    let reads: Vec<u64> = (0..4).map(|_| client.send(READ, 0, 0, 4096, &[])).collect();
    rig.replicas[0].wait_until("two reads", |store| store.log.len() >= 3);
    rig.replicas[1].wait_until("two reads", |store| store.log.len() >= 3);
    rig.replicas[0].die();
    rig.replicas[1].wait_until("all four", |store| store.log.len() >= 5);
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    assert!(!client.has_reply_within(MOMENT));
    rig.replicas[0].store().held_kinds.clear();
    rig.attach(0, true);
    for cookie in reads {
        assert!(client.read_reply(cookie, 0, 4096).expect("readable") == pattern(1, 4096));
    }
}

#[test]
fn a_resync_link_gets_new_writes_only_and_counts_once_it_is_a_member() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    rig.engine.set_members(&[0]).expect("open");
    rig.engine.set_readers(&[0]).expect("open");
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    rig.attach(1, false);
    hold(&rig, 1, &[kind::WRITE]);
    assert_eq!(client.write(4096, &pattern(2, 4096)), 0, "it is not waited for");
    rig.replicas[1].wait_until("the new write", |store| frames_in(store, kind::WRITE) == 1);
    rig.engine.set_members(&[0, 1]).expect("open");
    rig.engine.barrier(7).expect("open");
    rig.settle();
    assert!(!rig.has_event(|event| matches!(event, Event::Drained { .. })), "an answer is missing");
    let waits = client.send(WRITE, 0, 8192, 4096, &pattern(3, 4096));
    assert!(!client.has_reply_within(MOMENT));
    rig.replicas[1].release();
    rig.event("drained", |event| *event == Event::Drained { token: 7 });
    assert_eq!(client.simple(), (waits, 0));
    assert!(frames_of(&rig, 1, kind::READ).is_empty());
    assert_eq!(rig.engine.stats().expect("open").slots[1].mode, "sync");
}

fn frames_in(store: &Store, wanted: u8) -> usize {
    store.log.iter().filter(|(_, kind)| *kind == wanted).count()
}

#[test]
fn in_an_unequal_region_all_but_whole_blocks_wait_in_order() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(REGION, &pattern(1, 8192)), 0);
    rig.engine.set_unequal(vec![1, 2]).expect("open");
    rig.settle();
    let read = client.send(READ, 0, REGION, 4096, &[]);
    rig.event("region_wanted", |event| *event == Event::RegionWanted { region_index: 1 });
    assert_eq!(client.write(REGION + 4096, &pattern(2, 4096)), 0, "whole blocks go");
    let partial = client.send(WRITE, 0, REGION + 10, 20, &pattern(3, 20));
    let behind = client.send(WRITE, 0, REGION, 4096, &pattern(4, 4096));
    assert_eq!(client.write(0, &pattern(5, 10)), 0, "other regions are free");
    assert_eq!(rig.engine.stats().expect("open").waiting, 3);
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.regions_equal(vec![1], u64::MAX).expect("open");
    let data = client.read_among(read, REGION, 4096, &[partial, behind]);
    assert!(data == pattern(1, 4096), "the read stood in front");
    assert!(client.read(REGION, 4096).expect("readable") == pattern(4, 4096));
    assert!(!rig.has_event(|event| matches!(event, Event::RegionWanted { .. })), "said once");
}

#[test]
fn a_read_that_came_before_its_region_was_known_to_be_unequal_waits_all_the_same() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[]).expect("open");
    rig.settle();
    let read = client.send(READ, 0, REGION, 4096, &[]);
    rig.settle();
    rig.engine.set_unequal(vec![1]).expect("open");
    rig.engine.set_readers(&[0, 1]).expect("open");
    rig.event("region_wanted", |event| *event == Event::RegionWanted { region_index: 1 });
    assert!(!client.has_reply_within(MOMENT), "no replica may answer yet");
    rig.engine.regions_equal(vec![1], u64::MAX).expect("open");
    assert!(client.read_among(read, REGION, 4096, &[]) == vec![0; 4096]);
}

#[test]
fn a_partial_write_waits_for_its_region_and_nothing_overtakes_it() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_partial_wait(vec![0]).expect("open");
    rig.settle();
    let partial = client.send(WRITE, 0, 100, 20, &pattern(1, 20));
    rig.event("region_wanted", |event| *event == Event::RegionWanted { region_index: 0 });
    let whole = client.send(WRITE, 0, 0, 4096, &pattern(2, 4096));
    let zeroes = client.send(WRITE_ZEROES, 0, 8192, 5 << 20, &[]);
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "reads go");
    rig.engine.barrier(1).expect("open");
    rig.event("drained", |event| *event == Event::Drained { token: 1 });
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.regions_equal(vec![0], u64::MAX).expect("open");
    let mut found = [client.simple(), client.simple(), client.simple()];
    found.sort_unstable();
    assert_eq!(found, [(partial, 0), (whole, 0), (zeroes, 0)]);
    assert!(rig.replicas[1].store().block(0) == pattern(2, 4096), "the whole block came last");
}

#[test]
fn a_stalled_link_is_closed_after_a_second_but_not_the_only_hope() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    for slot in [0, 1] {
        hold(&rig, slot, &[kind::WRITE]);
    }
    let cookie = client.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    assert!(!client.has_reply_within(Duration::from_millis(999)));
    assert!(!client.has_reply_within(Duration::from_millis(500)));
    assert!(!rig.has_event(|event| matches!(event, Event::LinkStalled { .. })), "both stall: neither helps");
    rig.replicas[0].release();
    let event = rig.event("link_stalled", |event| matches!(event, Event::LinkStalled { .. }));
    assert_eq!(event, Event::LinkStalled { slot: 1, generation: 2 });
    rig.engine.set_members(&[0]).expect("open");
    assert_eq!(client.simple(), (cookie, 0));
}

#[test]
fn a_slow_read_is_asked_elsewhere_and_a_slow_flush_is_waited_for() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    hold(&rig, 0, &[kind::READ, kind::FLUSH]);
    let flush = client.send(FLUSH, 0, 0, 0, &[]);
    let mut other = rig.client();
    for _ in 0..2 {
        assert!(other.read(0, 4096).expect("answered by the other") == pattern(1, 4096));
    }
    assert!(!client.has_reply_within(MOMENT));
    assert!(!rig.has_event(|event| matches!(event, Event::LinkStalled { .. })));
    rig.replicas[0].release();
    assert_eq!(client.simple(), (flush, 0));
}

#[test]
fn bytes_that_are_no_frames_end_that_link_alone() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    for seed in 0..20u64 {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let generation = rig.engine.attach_link(1, OwnedFd::from(theirs), true).expect("open");
        let _ = ours.write_all(&pattern(seed, 48 + seed as usize * 1000));
        rig.event(
            "link_lost",
            |event| matches!(event, Event::LinkLost { slot: 1, generation: lost, .. } if *lost == generation),
        );
    }
    rig.engine.set_members(&[0]).expect("open");
    rig.engine.set_readers(&[0]).expect("open");
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert!(client.read(0, 4096).expect("readable") == pattern(1, 4096));
}

#[test]
fn while_paused_nothing_is_sent_and_afterwards_everything() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    rig.engine.pause(true).expect("open");
    rig.settle();
    let before = rig.replicas[0].store().log.len();
    let first = client.send(WRITE, 0, 0, 4096, &pattern(2, 4096));
    let second = client.send(FLUSH, 0, 0, 0, &[]);
    rig.engine.barrier(9).expect("open");
    rig.event("drained", |event| *event == Event::Drained { token: 9 });
    assert!(!client.has_reply_within(MOMENT));
    assert_eq!(rig.replicas[0].store().log.len(), before);
    rig.engine.pause(false).expect("open");
    assert_eq!(client.simple(), (first, 0));
    assert_eq!(client.simple(), (second, 0));
}

#[test]
fn replicas_hear_what_is_completed_and_never_past_a_write_that_failed() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    for index in 0..10u64 {
        assert_eq!(client.write(index * 4096, &pattern(index, 4096)), 0);
    }
    rig.replicas[1].wait_until("the last id", |store| store.completed == 10);
    for replica in &rig.replicas {
        replica.store().statuses.insert(kind::WRITE, status::IO_ERROR);
    }
    assert_eq!(client.write(REGION, &pattern(1, 4096)), EIO);
    for replica in &rig.replicas {
        replica.store().statuses.clear();
    }
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    rig.engine.regions_equal(vec![], u64::MAX).expect("open");
    assert!(!client.has_reply_within(Duration::from_millis(999)));
    assert_eq!(rig.replicas[1].store().completed, 10, "id 11 failed");
    rig.engine.regions_equal(vec![1], u64::MAX).expect("open");
    rig.replicas[1].wait_until("both", |store| store.completed == 12);
}

#[test]
fn without_members_everything_waits() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_members(&[]).expect("open");
    rig.settle();
    let cookie = client.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    rig.replicas[0].wait_until("the write", |store| !store.log.is_empty());
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.set_members(&[0, 1]).expect("open");
    assert_eq!(client.simple(), (cookie, 0));
}

#[test]
fn stopping_answers_nothing_more_and_closes_all() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    rig.engine.stop();
    client.assert_closed();
    assert!(rig.engine.set_members(&[0]).is_err());
    rig.engine.stop();
}
