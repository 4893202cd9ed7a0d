//! Reads that are late: asked of a second replica, answered once, within a budget.

mod engine_support;

use std::time::Duration;

use dolmen_core::engine::Event;
use dolmen_core::frame::{kind, status};
use engine_support::*;

const SIZE: u64 = 16 << 20;
/// Long enough for a wrong reply to arrive, short enough to wait for in vain.
const MOMENT: Duration = Duration::from_millis(30);
/// The least that a second reader is asked after (engine/limits.rs HEDGE_DELAY_MIN_US).
const DELAY: Duration = Duration::from_millis(8);
/// How often a slow reader is tried.
const TRY: Duration = Duration::from_millis(500);
/// Hedges at once (engine/limits.rs HEDGES_AT_ONCE_MAX).
const BURST: u64 = 32;

fn hold(rig: &Rig, slot: usize, kinds: &[u8]) {
    rig.replicas[slot].store().held_kinds.extend(kinds);
}

fn reads(store: &Store) -> usize {
    store.log.iter().filter(|(_, found)| *found == kind::READ).count()
}

fn reads_at(rig: &Rig, slot: usize) -> usize {
    reads(&rig.replicas[slot].store())
}

/// Two readers that answered one read each, at once: the next read goes to slot 0.
fn two_fast_readers() -> (Rig, Time, NbdClient) {
    let (rig, time) = Rig::with_time(SIZE, 2);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 4096)), 0);
    for _ in 0..2 {
        assert!(client.read(0, 4096).expect("readable") == pattern(1, 4096));
    }
    assert_eq!((reads_at(&rig, 0), reads_at(&rig, 1)), (1, 1));
    (rig, time, client)
}

/// A read that slot 0 has and does not answer.
fn late_read(rig: &Rig, client: &mut NbdClient) -> u64 {
    hold(rig, 0, &[kind::READ]);
    let (before, others) = (reads_at(rig, 0), reads_at(rig, 1));
    let read = client.send(READ, 0, 0, 4096, &[]);
    rig.replicas[0].wait_until("the read", |store| reads(store) == before + 1);
    assert_eq!(reads_at(rig, 1), others);
    read
}

/// Let time pass and the engine notice.
fn pass(rig: &Rig, time: &Time, by: Duration) {
    time.pass(by);
    rig.settle();
    rig.settle();
}

fn hedges(rig: &Rig) -> (u64, u64) {
    let counters = rig.engine.stats().expect("open").counters;
    (counters.hedged_reads, counters.hedge_wins)
}

#[test]
fn a_late_read_is_answered_by_the_other_reader_after_the_delay_and_not_before() {
    let (rig, time, mut client) = two_fast_readers();
    let read = late_read(&rig, &mut client);
    pass(&rig, &time, DELAY - Duration::from_micros(1));
    assert_eq!((hedges(&rig), reads_at(&rig, 1)), ((0, 0), 1));
    pass(&rig, &time, Duration::from_micros(1));
    assert!(client.read_reply(read, 0, 4096).expect("answered by slot 1") == pattern(1, 4096));
    assert_eq!((hedges(&rig), reads_at(&rig, 1)), ((1, 1), 2));
}

#[test]
fn the_loser_is_avoided_then_tried_now_and_then_and_taken_back_when_it_is_fast_again() {
    let (rig, time, mut client) = two_fast_readers();
    let read = late_read(&rig, &mut client);
    pass(&rig, &time, Duration::from_millis(100));
    client.read_reply(read, 0, 4096).expect("answered by slot 1");
    assert!(rig.engine.stats().expect("open").slots[0].slow);
    for _ in 0..20 {
        client.read(0, 4096).expect("readable");
    }
    pass(&rig, &time, TRY);
    client.read(0, 4096).expect("readable");
    assert_eq!(reads_at(&rig, 0), 2, "nothing new for who still owes an answer");
    rig.replicas[0].release();
    let mut rounds = 0;
    while rig.engine.stats().expect("open").slots[0].slow {
        let before = reads_at(&rig, 0);
        assert!(client.read(0, 4096).expect("readable") == pattern(1, 4096));
        assert!(client.read(0, 4096).expect("readable") == pattern(1, 4096));
        assert!(reads_at(&rig, 0) <= before + 2, "a try, and a share if it was the last");
        pass(&rig, &time, TRY);
        rounds += 1;
        assert!(rounds < 1000);
    }
    let tries = reads_at(&rig, 0) - 2;
    // Not after one good answer. How many more depends on how much of the jumped time each seems to have taken.
    assert!(tries >= 3, "{tries}");
    let before = reads_at(&rig, 0);
    for _ in 0..4 {
        client.read(0, 4096).expect("readable");
    }
    assert_eq!(reads_at(&rig, 0), before + 2, "they share the load again");
    assert_eq!(hedges(&rig), (1, 1), "tries are no hedges");
}

#[test]
fn when_all_are_slow_only_the_budget_is_asked_twice_and_each_read_is_answered_once() {
    let (rig, time, mut client) = two_fast_readers();
    for slot in 0..2 {
        hold(&rig, slot, &[kind::READ]);
    }
    let cookies: Vec<u64> = (0..100).map(|_| client.send(READ, 0, 0, 4096, &[])).collect();
    for slot in 0..2 {
        rig.replicas[slot].wait_until("half of them", |store| reads(store) == 51);
    }
    pass(&rig, &time, Duration::from_millis(20));
    assert_eq!(hedges(&rig).0, BURST);
    pass(&rig, &time, Duration::from_millis(20));
    assert_eq!(hedges(&rig).0, BURST);
    let both = |rig: &Rig| reads_at(rig, 0) + reads_at(rig, 1);
    while both(&rig) < 102 + BURST as usize {
        std::thread::yield_now();
    }
    for slot in 0..2 {
        rig.replicas[slot].release();
    }
    let mut answered = Vec::new();
    for _ in 0..100 {
        let chunk = client.chunk();
        assert!(chunk.body[8..] == pattern(1, 4096));
        answered.push(chunk.cookie);
    }
    answered.sort_unstable();
    assert_eq!(answered, cookies);
    assert!(!client.has_reply_within(MOMENT), "not one twice");
    assert_eq!(both(&rig), 102 + BURST as usize);
    let slots = rig.engine.stats().expect("open").slots;
    assert_eq!((slots[0].in_flight, slots[1].in_flight), (0, 0));
}

#[test]
fn the_answer_of_the_one_that_came_too_late_changes_nothing() {
    let (rig, time, mut client) = two_fast_readers();
    let read = late_read(&rig, &mut client);
    let mut writer = rig.client();
    assert_eq!(writer.write(0, &pattern(2, 4096)), 0, "behind the read on both links");
    pass(&rig, &time, DELAY);
    assert!(
        client.read_reply(read, 0, 4096).expect("by slot 1") == pattern(2, 4096),
        "asked after the write"
    );
    rig.replicas[0].release();
    for _ in 0..4 {
        assert!(client.read(0, 4096).expect("readable") == pattern(2, 4096), "never what was before");
    }
    assert!(!client.has_reply_within(MOMENT));
}

#[test]
fn the_second_answer_may_show_a_later_write_and_waits_for_it() {
    let (rig, time, mut client) = two_fast_readers();
    let read = late_read(&rig, &mut client);
    hold(&rig, 0, &[kind::WRITE]);
    let mut writer = rig.client();
    let write = writer.send(WRITE, 0, 0, 4096, &pattern(2, 4096));
    rig.replicas[1].wait_until("the write", |store| store.block(0) == pattern(2, 4096));
    pass(&rig, &time, DELAY);
    rig.replicas[1].wait_until("the read", |store| reads(store) == 2);
    assert!(!client.has_reply_within(MOMENT), "only slot 1 holds the write for sure");
    assert_eq!(rig.engine.stats().expect("open").counters.order_waits, 1);
    rig.replicas[0].release();
    assert_eq!(writer.simple(), (write, 0));
    assert!(client.read_reply(read, 0, 4096).expect("readable") == pattern(2, 4096));
}

#[test]
fn one_of_two_that_cannot_read_leaves_it_to_the_other() {
    let (rig, time, mut client) = two_fast_readers();
    let read = late_read(&rig, &mut client);
    rig.replicas[1].store().statuses.insert(kind::READ, status::IO_ERROR);
    pass(&rig, &time, DELAY);
    rig.settle();
    assert!(!client.has_reply_within(MOMENT));
    assert_eq!(hedges(&rig), (1, 0));
    rig.replicas[0].release();
    assert!(client.read_reply(read, 0, 4096).expect("by slot 0") == pattern(1, 4096));
}

#[test]
fn when_one_of_two_links_ends_the_other_answers_without_being_asked_again() {
    for dying in 0..2 {
        let (mut rig, time, mut client) = two_fast_readers();
        let read = late_read(&rig, &mut client);
        hold(&rig, 1, &[kind::READ]);
        pass(&rig, &time, DELAY);
        rig.replicas[1].wait_until("the read", |store| reads(store) == 2);
        rig.replicas[dying].die();
        rig.event("link_lost", |event| matches!(event, Event::LinkLost { slot, .. } if *slot == dying));
        assert!(!client.has_reply_within(MOMENT));
        rig.replicas[1 - dying].release();
        assert!(client.read_reply(read, 0, 4096).expect("readable") == pattern(1, 4096));
        assert_eq!((reads_at(&rig, 0), reads_at(&rig, 1)), (2, 2));
    }
}
