//! What a client may see: data only under a lease (C11), and only of writes that cannot vanish (C9).

mod engine_support;

use std::time::Duration;

use dolmen_core::engine::{Closed, Event};
use dolmen_core::frame::{kind, status};
use engine_support::*;

const SIZE: u64 = 16 << 20;
/// Long enough for a wrong reply to arrive, short enough to wait for in vain.
const MOMENT: Duration = Duration::from_millis(30);
const MINUTE: Duration = Duration::from_secs(60);
/// A step of time that does not look like a pause of the engine.
const STEP: Duration = Duration::from_millis(200);

fn hold(rig: &Rig, slot: usize, kinds: &[u8]) {
    rig.replicas[slot].store().held_kinds.extend(kinds);
}

fn count(rig: &Rig, slot: usize, wanted: u8) -> usize {
    frames_in(&rig.replicas[slot].store(), wanted)
}

fn frames_in(store: &Store, wanted: u8) -> usize {
    store.log.iter().filter(|(_, kind)| *kind == wanted).count()
}

/// Two of three must have answered; only slot 0 serves reads.
fn two_of_three() -> (Rig, Time) {
    let (rig, time) = Rig::with_time(SIZE, 3);
    rig.engine.set_readers(&[0]).expect("open");
    rig.engine.set_lease(&[(vec![0, 1, 2], 2)]).expect("open");
    rig.settle();
    (rig, time)
}

#[test]
fn a_read_that_one_of_three_answers_is_held_until_a_second_answers_as_well() {
    let (rig, _) = two_of_three();
    let mut client = rig.client();
    for slot in [1, 2] {
        hold(&rig, slot, &[kind::LEASE]);
    }
    let read = client.send(READ, 0, 0, 4096, &[]);
    for slot in 0..3 {
        rig.replicas[slot].wait_until("a LEASE", |store| frames_in(store, kind::LEASE) == 1);
    }
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 1);
    assert!(!client.has_reply_within(MOMENT));
    let stats = rig.engine.stats().expect("open");
    assert_eq!((stats.counters.lease_waits, stats.counters.lease_frames, stats.waiting), (1, 3, 1));
    rig.replicas[2].release();
    assert_eq!(client.read_reply(read, 0, 4096), Ok(vec![0; 4096]));
    assert_eq!(client.read(0, 4096), Ok(vec![0; 4096]), "while the lease is young nobody is asked again");
    assert_eq!(rig.engine.stats().expect("open").counters.lease_frames, 3);
}

#[test]
fn an_engine_that_slept_gives_nothing_before_a_majority_has_answered_anew() {
    let (rig, time) = two_of_three();
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert!(client.read(0, 4096).expect("covered by the write's answers") == pattern(1, 4096));
    hold(&rig, 0, &[kind::READ]);
    let before = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 2);
    // The others are out of reach: somebody else may have claimed them meanwhile.
    for slot in [1, 2] {
        hold(&rig, slot, &[kind::LEASE]);
    }
    time.pass(MINUTE);
    rig.replicas[0].release();
    rig.replicas[0].wait_until("a LEASE", |store| frames_in(store, kind::LEASE) == 1);
    let after = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 3);
    assert!(!client.has_reply_within(MOMENT), "one replica alone is no majority");
    rig.replicas[1].release();
    assert!(client.read_reply(before, 0, 4096).expect("held, then given") == pattern(1, 4096));
    assert!(client.read_reply(after, 0, 4096).expect("held, then given") == pattern(1, 4096));
}

#[test]
fn an_answer_to_a_lease_from_before_the_sleep_proves_nothing_after_it() {
    let (rig, time) = two_of_three();
    let mut client = rig.client();
    for slot in 0..3 {
        hold(&rig, slot, &[kind::LEASE]);
    }
    let read = client.send(READ, 0, 0, 4096, &[]);
    for slot in 0..3 {
        rig.replicas[slot].wait_until("a LEASE", |store| frames_in(store, kind::LEASE) == 1);
    }
    time.pass(MINUTE);
    rig.replicas[1].release();
    rig.replicas[1].wait_until("another LEASE", |store| frames_in(store, kind::LEASE) == 2);
    assert!(!client.has_reply_within(MOMENT));
    rig.replicas[2].release();
    assert_eq!(client.read_reply(read, 0, 4096), Ok(vec![0; 4096]));
    assert_eq!(count(&rig, 2, kind::LEASE), 2, "its first answer came too late");
}

#[test]
fn nobody_is_asked_for_a_lease_while_idle_or_only_writing() {
    let (rig, time) = two_of_three();
    let mut client = rig.client();
    for index in 0..20 {
        assert_eq!(client.write(0, &pattern(index, 4096)), 0);
        time.pass(STEP);
        rig.settle();
    }
    assert_eq!(client.command(CACHE, 0, 0, 4096), 0, "a hint gives no data");
    time.pass(MINUTE);
    rig.settle();
    assert_eq!(rig.engine.stats().expect("open").counters.lease_frames, 0);
    assert!(client.read(0, 4096).expect("readable") == pattern(19, 4096));
    assert!(client.read(0, 4096).expect("readable") == pattern(19, 4096));
    assert_eq!(rig.engine.stats().expect("open").counters.lease_frames, 3, "one round");
    time.pass(MINUTE);
    rig.settle();
    assert_eq!(rig.engine.stats().expect("open").counters.lease_frames, 3);
}

#[test]
fn under_writes_the_lease_stays_young_by_itself() {
    let (rig, time) = two_of_three();
    let mut client = rig.client();
    for index in 0..20 {
        assert_eq!(client.write(0, &pattern(index, 4096)), 0);
        assert!(client.read(0, 4096).expect("readable") == pattern(index, 4096));
        time.pass(STEP);
        rig.settle();
    }
    let counters = rig.engine.stats().expect("open").counters;
    assert_eq!((counters.lease_frames, counters.lease_waits), (0, 0));
}

#[test]
fn without_a_quorum_no_read_is_answered_and_every_write_is() {
    let (rig, _) = Rig::with_time(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_lease(&[]).expect("open");
    rig.settle();
    let read = client.send(READ, 0, 4096, 4096, &[]);
    let mut other = rig.client();
    let extents = other.send(BLOCK_STATUS, 0, 0, 8192, &[]);
    let mut writer = rig.client();
    assert_eq!(writer.write(0, &pattern(1, 4096)), 0);
    assert_eq!(writer.command(FLUSH, 0, 0, 0), 0);
    assert_eq!(writer.command(CACHE, 0, 0, 4096), 0);
    assert!(!client.has_reply_within(MOMENT) && !other.has_reply_within(MOMENT));
    assert_eq!(rig.engine.stats().expect("open").waiting, 2);
    rig.engine.set_lease(&[(vec![0, 1], 2)]).expect("open");
    assert_eq!(client.read_reply(read, 4096, 4096), Ok(vec![0; 4096]));
    let chunk = other.chunk();
    assert_eq!((chunk.cookie, chunk.kind), (extents, 5));
}

#[test]
fn a_replica_that_was_claimed_says_so_to_a_lease_and_the_read_stays_held() {
    let (mut rig, _) = two_of_three();
    let mut client = rig.client();
    rig.replicas[1].store().statuses.insert(kind::LEASE, status::STALE_EPOCH);
    hold(&rig, 2, &[kind::LEASE]);
    client.send(READ, 0, 0, 4096, &[]);
    let event = rig.event("link_failed", |event| matches!(event, Event::LinkFailed { .. }));
    assert_eq!(event, Event::LinkFailed { slot: 1, generation: 2, status: status::STALE_EPOCH });
    assert!(!client.has_reply_within(MOMENT));
}

#[test]
fn a_silent_replica_that_a_read_waits_for_is_closed_after_a_second() {
    let (mut rig, time) = Rig::with_time(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    rig.engine.set_lease(&[(vec![0, 1], 2)]).expect("open");
    rig.settle();
    hold(&rig, 1, &[kind::LEASE]);
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[1].wait_until("a LEASE", |store| frames_in(store, kind::LEASE) == 1);
    while rig.engine.stats().expect("open").counters.lease_waits == 0 {
        std::thread::yield_now(); // the other replica's answer is on its way
    }
    for _ in 0..5 {
        time.pass(STEP);
        rig.settle();
    }
    assert!(!rig.has_event(|event| matches!(event, Event::LinkStalled { .. })), "a second is not over");
    // A step that the loop takes for a pause of its own counts for nothing: time goes on.
    for _ in 0..10 {
        time.pass(STEP);
        rig.settle();
        if rig.has_event(|event| matches!(event, Event::LinkStalled { .. })) {
            break;
        }
    }
    let event = rig.event("link_stalled", |event| matches!(event, Event::LinkStalled { .. }));
    assert_eq!(event, Event::LinkStalled { slot: 1, generation: 2 });
    assert!(!client.has_reply_within(MOMENT), "nobody has committed a record without it");
    rig.engine.set_members(&[0]).expect("open");
    rig.engine.set_lease(&[(vec![0], 1)]).expect("open");
    assert_eq!(client.read_reply(read, 0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn what_an_earlier_link_proved_does_not_count_for_the_next_one() {
    let (mut rig, _) = Rig::with_time(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    rig.engine.set_lease(&[(vec![0, 1], 2)]).expect("open");
    rig.settle();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    assert!(client.read(0, 4096).expect("readable") == pattern(1, 4096));
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    assert!(client.read(0, 4096).expect("its last answer still counts") == pattern(1, 4096));
    hold(&rig, 1, &[kind::LEASE]);
    rig.attach(1, true);
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[1].wait_until("a LEASE", |store| frames_in(store, kind::LEASE) == 1);
    assert!(!client.has_reply_within(MOMENT));
    rig.replicas[1].release();
    assert!(client.read_reply(read, 0, 4096).expect("readable") == pattern(1, 4096));
}

#[test]
fn a_quorum_that_cannot_be_is_refused() {
    let (rig, _) = Rig::with_time(SIZE, 2);
    for quorum in [(vec![0, 1], 0), (vec![0, 1], 3), (vec![0, 0], 2), (vec![], 1), (vec![2], 1)] {
        assert!(matches!(rig.engine.set_lease(&[quorum]), Err(Closed::BadRequest(_))));
    }
}

#[test]
fn a_read_that_shows_a_write_which_not_all_hold_waits_for_that_write() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    hold(&rig, 1, &[kind::WRITE]);
    let mut writer = rig.client();
    let write = writer.send(WRITE, 0, 4096, 4096, &pattern(1, 4096));
    rig.replicas[1].wait_until("the write", |store| frames_in(store, kind::WRITE) == 1);
    let read = client.send(READ, 0, 0, 8192, &[]);
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 1);
    assert!(!client.has_reply_within(MOMENT), "with replica 0 the write could still vanish");
    assert_eq!(rig.engine.stats().expect("open").counters.order_waits, 1);
    let mut other = rig.client();
    assert_eq!(other.read(8192, 4096), Ok(vec![0; 4096]), "its neighbours are free");
    rig.replicas[1].release();
    assert_eq!(writer.simple(), (write, 0));
    let data = client.read_reply(read, 0, 8192).expect("readable");
    assert!(data[..4096] == vec![0; 4096] && data[4096..] == pattern(1, 4096));
}

#[test]
fn a_read_in_front_of_a_write_does_not_wait_for_it() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    hold(&rig, 0, &[kind::READ]);
    hold(&rig, 1, &[kind::WRITE]);
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 1);
    let mut writer = rig.client();
    let write = writer.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    rig.replicas[1].wait_until("the write", |store| frames_in(store, kind::WRITE) == 1);
    rig.replicas[0].release();
    assert_eq!(client.read_reply(read, 0, 4096), Ok(vec![0; 4096]));
    assert!(!writer.has_reply_within(MOMENT));
    rig.replicas[1].release();
    assert_eq!(writer.simple(), (write, 0));
}

#[test]
fn a_held_read_is_given_when_the_replica_that_lacks_the_write_is_no_member_any_more() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    hold(&rig, 1, &[kind::WRITE]);
    let mut writer = rig.client();
    let write = writer.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    rig.replicas[1].wait_until("the write", |store| frames_in(store, kind::WRITE) == 1);
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[1].die();
    rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot: 1, .. }));
    assert!(!client.has_reply_within(MOMENT));
    rig.engine.set_members(&[0]).expect("open");
    assert_eq!(writer.simple(), (write, 0));
    assert!(client.read_reply(read, 0, 4096).expect("readable") == pattern(1, 4096));
}

#[test]
fn a_held_read_of_a_region_that_was_made_equal_meanwhile_is_asked_again() {
    let mut rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    rig.engine.set_readers(&[0]).expect("open");
    rig.engine.set_lease(&[]).expect("open");
    rig.settle();
    for slot in [0, 1] {
        hold(&rig, slot, &[kind::WRITE]);
        rig.replicas[slot].store().statuses.insert(kind::WRITE, status::IO_ERROR);
    }
    // The write will fail everywhere, but replica 0 has some of it.
    rig.replicas[0].store().put(0, &pattern(1, 4096));
    let mut writer = rig.client();
    let write = writer.send(WRITE, 0, 0, 4096, &pattern(1, 4096));
    for slot in [0, 1] {
        rig.replicas[slot].wait_until("the write", |store| store.frames_seen > 0);
    }
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[0].wait_until("the read", |store| frames_in(store, kind::READ) == 1);
    while rig.engine.stats().expect("open").waiting == 0 {}
    for slot in [0, 1] {
        rig.replicas[slot].release();
    }
    assert_eq!(writer.simple(), (write, 5));
    rig.event("region_diverged", |event| matches!(event, Event::RegionDiverged { region_index: 0 }));
    // It was decided that the write did not happen.
    rig.replicas[0].store().put(0, &[0; 4096]);
    rig.engine.regions_equal(vec![0], 1).expect("open");
    rig.engine.set_lease(&[(vec![0, 1], 2)]).expect("open");
    assert!(client.read_reply(read, 0, 4096).expect("readable") == vec![0; 4096], "what was decided");
}
