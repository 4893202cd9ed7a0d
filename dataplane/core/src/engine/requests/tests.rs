//! The table, driven by events: answers in any order, links that die and return.

use std::collections::HashMap;

use proptest::prelude::*;

use super::super::buffers::Pool;
use super::*;
use crate::limits::BLOCK_BYTES;

const ALL: Slots = 0b111;

struct Bench {
    table: Table,
    pool: Pool,
    out: Vec<Outcome>,
    next_request: u32,
}

impl Bench {
    fn new(members: Slots) -> Self {
        let mut bench =
            Bench { table: Table::new(), pool: Pool::default(), out: Vec::new(), next_request: 0 };
        bench.table.set_members(members, &mut bench.out);
        bench
    }

    /// Add a write of one kind; returns its id. Its request number is the count of writes before it.
    fn add(&mut self, kind: u8, offset: u64, length: u64, links: Slots) -> u64 {
        let mut frame = self.pool.take(16);
        frame[..8].copy_from_slice(&self.table.next_id().to_le_bytes());
        let request = self.next_request;
        self.next_request += 1;
        let new = NewWrite { kind, flags: 0, offset, length, frame: Rc::new(frame), request };
        self.table.add(new, links, 0)
    }

    fn write(&mut self, offset: u64) -> u64 {
        self.add(kind::WRITE, offset, BLOCK_BYTES, ALL)
    }

    fn answer(&mut self, slot: usize, id: u64, status: u32) -> Vec<Outcome> {
        self.table.answer(slot, id, status, &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn members(&mut self, members: Slots) -> Vec<Outcome> {
        self.table.set_members(members, &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn gone(&mut self, slot: usize) -> Vec<Outcome> {
        self.table.link_gone(slot, &mut self.out);
        std::mem::take(&mut self.out)
    }

    fn resent(&mut self, slot: usize) -> Vec<u64> {
        let id = |again: &Again| match again {
            Again::Frame(frame) => crate::frame::le_u64(frame, 0),
            Again::Flush(id) => *id,
        };
        self.table.resend(slot).iter().map(id).collect()
    }

    /// The ids whose data is sent again.
    fn rewritten(&mut self, slot: usize) -> Vec<u64> {
        let frames = self.table.resend(slot);
        let data = frames.iter().filter_map(|again| match again {
            Again::Frame(frame) => Some(crate::frame::le_u64(frame, 0)),
            Again::Flush(_) => None,
        });
        data.collect()
    }
}

fn finished(request: u32, error: u32) -> Outcome {
    Outcome::Finished { request, error }
}

#[test]
fn a_write_is_finished_by_the_last_member_and_then_forgotten() {
    let mut bench = Bench::new(ALL);
    let id = bench.write(0);
    assert!(bench.answer(2, id, status::OK).is_empty());
    assert!(bench.answer(0, id, status::OK).is_empty());
    assert!(bench.answer(0, id, status::OK).is_empty(), "said twice counts once");
    assert_eq!(bench.answer(1, id, status::OK), [finished(0, 0)]);
    assert_eq!((bench.table.entry(id), bench.table.completed_id()), (Entry::None, id));
    assert!(bench.answer(1, id, status::OK).is_empty(), "nobody waits for it");
    assert_eq!(bench.pool.live_bytes(), 0);
}

#[test]
fn without_members_nothing_is_finished_and_a_smaller_set_finishes_what_waited() {
    let mut bench = Bench::new(0);
    let id = bench.write(0);
    for slot in 0..2 {
        assert!(bench.answer(slot, id, status::OK).is_empty());
    }
    assert!(bench.members(ALL).is_empty());
    assert_eq!(bench.members(0b011), [finished(0, 0)]);
    assert_eq!(bench.table.completed_id(), 0, "slot 2 has still not answered: its link is attached");
    assert!(bench.gone(2).is_empty());
    assert_eq!(bench.table.completed_id(), id);
}

#[test]
fn what_one_fails_and_another_holds_costs_the_first_its_link() {
    let mut bench = Bench::new(ALL);
    let id = bench.write(0);
    assert!(bench.answer(1, id, status::IO_ERROR).is_empty(), "perhaps all fail");
    let close = Outcome::CloseLink { slot: 1, status: status::IO_ERROR };
    assert_eq!(bench.answer(0, id, status::OK), [close]);
    assert!(bench.gone(1).is_empty());
    assert!(bench.answer(2, id, status::OK).is_empty());
    assert_eq!(bench.members(0b101), [finished(0, 0)]);
}

#[test]
fn what_all_fail_is_an_error_and_holds_completed_back_until_the_region_is_equal() {
    let mut bench = Bench::new(ALL);
    let first = bench.write(0);
    let failing = bench.add(kind::WRITE_ZEROES, REGION_BYTES, 2 * REGION_BYTES, ALL);
    let after = bench.write(0);
    for slot in 0..3 {
        bench.answer(slot, first, status::OK);
        bench.answer(slot, after, status::OK);
    }
    bench.answer(0, failing, status::IO_ERROR);
    bench.answer(1, failing, status::NO_SPACE);
    let outcomes = bench.answer(2, failing, status::IO_ERROR);
    let diverged = |region| Outcome::Diverged { region };
    assert_eq!(outcomes, [finished(1, errno::ENOSPC), diverged(1), diverged(2)]);
    assert_eq!(bench.table.completed_id(), first);
    bench.table.regions_equal(&[1]);
    assert_eq!(bench.table.completed_id(), first);
    bench.table.regions_equal(&[2, 9]);
    assert_eq!(bench.table.completed_id(), after);
}

#[test]
fn a_link_that_is_no_member_is_asked_but_not_waited_for_and_may_not_fail() {
    let mut bench = Bench::new(0b011);
    let id = bench.write(0);
    bench.answer(0, id, status::OK);
    assert_eq!(bench.answer(1, id, status::OK), [finished(0, 0)]);
    assert_eq!(bench.table.entry(id), Entry::Write(0), "kept until the third has answered");
    let close = Outcome::CloseLink { slot: 2, status: status::NO_SPACE };
    assert_eq!(bench.answer(2, id, status::NO_SPACE), [close]);
    bench.gone(2);
    assert_eq!(bench.table.entry(id), Entry::None);
}

#[test]
fn writes_sent_before_a_slot_became_a_member_count_for_the_barrier() {
    let mut bench = Bench::new(0b011);
    let id = bench.write(0);
    bench.answer(0, id, status::OK);
    bench.answer(1, id, status::OK);
    bench.members(ALL);
    bench.table.barrier(5);
    bench.write(REGION_BYTES);
    assert!(bench.table.take_drained().is_empty());
    assert!(bench.answer(2, id, status::OK).is_empty(), "the client was answered long ago");
    assert_eq!(bench.table.take_drained(), [5], "a later write is not waited for");
    assert!(bench.table.take_drained().is_empty());
}

#[test]
fn a_returning_link_gets_what_its_replica_has_not_answered_and_nothing_under_what_it_has() {
    let mut bench = Bench::new(ALL);
    let old = bench.write(0);
    let over = bench.write(0);
    let elsewhere = bench.write(REGION_BYTES);
    let flush = bench.add(kind::FLUSH, 0, 0, ALL);
    for id in [over, elsewhere] {
        for slot in 0..3 {
            bench.answer(slot, id, status::OK);
        }
    }
    bench.answer(0, old, status::OK);
    bench.answer(1, old, status::OK);
    bench.gone(2);
    assert_eq!(bench.rewritten(2), [flush], "an engine that dies now has undone nothing");
    bench.gone(2);
    assert_eq!(bench.resent(2), [old, flush], "the old one as a flush: it was applied before the newer");
    assert_eq!(bench.answer(2, old, status::OK), [finished(0, 0)]);
    assert_eq!(bench.table.entry(over), Entry::None);
}

#[test]
fn what_was_not_answered_is_sent_again_in_order_and_what_is_over_a_refused_one_follows_it() {
    let mut bench = Bench::new(0b001);
    let first = bench.write(0);
    let second = bench.write(0);
    bench.gone(0);
    assert_eq!(bench.rewritten(0), [first, second]);
    let mut bench = Bench::new(0b110);
    let refused = bench.write(0);
    let over = bench.write(0);
    let elsewhere = bench.write(REGION_BYTES);
    bench.answer(1, refused, status::OK);
    bench.answer(2, refused, status::NO_SPACE);
    for id in [over, elsewhere] {
        bench.answer(2, id, status::OK);
    }
    bench.gone(2);
    assert_eq!(bench.rewritten(2), [refused, over], "part of the refused one may be missing");
}

#[test]
fn stalls_are_told_apart_from_slow_disks() {
    let mut bench = Bench::new(ALL);
    let id = bench.write(0);
    bench.add(kind::FLUSH, 0, 0, ALL);
    assert_eq!(bench.table.oldest_unanswered(0), (Some(0), Some(0)));
    bench.answer(0, id, status::OK);
    assert_eq!(bench.table.oldest_unanswered(0), (None, Some(0)));
}

#[test]
fn ids_of_reads_do_not_hold_anything_up_once_they_are_dropped() {
    let mut bench = Bench::new(ALL);
    let read = bench.table.add_read(7);
    let id = bench.write(0);
    for slot in 0..3 {
        bench.answer(slot, id, status::OK);
    }
    assert_eq!(bench.table.entry(read), Entry::Read(7));
    bench.table.drop_read(read);
    bench.table.drop_read(read);
    assert_eq!((bench.table.completed_id(), bench.table.next_id()), (id, id + 1));
}

/// A replica that applies in order of arrival and answers whenever it likes.
#[derive(Default)]
struct Model {
    attached: bool,
    /// Id, block, and whether it carries data: a flush under the id of a write does not.
    queue: VecDeque<(u64, u64, bool)>,
    applied: HashMap<u64, u64>,
    unanswered: Vec<u64>,
    /// Of each block the newest that it has answered.
    answered: HashMap<u64, u64>,
}

impl Model {
    fn apply_all(&mut self) {
        while self.apply_one() {}
    }

    fn apply_one(&mut self) -> bool {
        let Some((id, block, data)) = self.queue.pop_front() else { return false };
        if data {
            self.applied.insert(block, id);
        }
        self.unanswered.push(id);
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever dies and returns: once a link's frames are applied, its replica holds the newest
    /// write of every block, and every write is finished exactly once.
    #[test]
    fn a_member_whose_frames_are_applied_holds_the_newest_of_everything(
        steps in proptest::collection::vec((0u8..40, 0usize..3, any::<u16>()), 1..200),
    ) {
        let mut bench = Bench::new(ALL);
        let mut models: Vec<Model> = (0..3).map(|_| Model { attached: true, ..Model::default() }).collect();
        let mut newest: HashMap<u64, u64> = HashMap::new();
        let mut blocks: HashMap<u64, u64> = HashMap::new();
        let mut replies: HashMap<u32, u32> = HashMap::new();
        let note = |outcomes: Vec<Outcome>, replies: &mut HashMap<u32, u32>| {
            for outcome in outcomes {
                match outcome {
                    Outcome::Finished { request, error } => {
                        assert_eq!(error, 0);
                        *replies.entry(request).or_default() += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
        };
        // In the end all return, apply and answer.
        let settle = (0..steps.len() * 16 + 24).map(|index| (if index % 4 == 0 { 40 } else { 41 }, index % 3, 0));
        let settle: Vec<(u8, usize, u16)> = settle.collect();
        for (what, slot, pick) in steps.into_iter().chain(settle) {
            match what {
                0..=5 => {
                    let block = u64::from(pick % 3) * (REGION_BYTES / BLOCK_BYTES / 2);
                    let links = (0..3).filter(|slot| models[*slot].attached).fold(0, |set, slot| set | bit(slot));
                    let id = bench.add(kind::WRITE, block * BLOCK_BYTES, BLOCK_BYTES, links);
                    newest.insert(block, id);
                    blocks.insert(id, block);
                    for model in models.iter_mut().filter(|model| model.attached) {
                        model.queue.push_back((id, block, true));
                    }
                }
                6..=9 => drop(models[slot].apply_one()),
                10..=13 | 40 => models[slot].apply_all(),
                // Several answers at once, out of order.
                14..=36 | 41 => {
                    for turn in 0..3 {
                        let model = &mut models[slot];
                        if model.unanswered.is_empty() {
                            break;
                        }
                        let next = usize::from(pick >> (turn * 4)) % model.unanswered.len();
                        let id = model.unanswered.remove(next);
                        let newest = model.answered.entry(blocks[&id]).or_default();
                        *newest = id.max(*newest);
                        let outcomes = bench.answer(slot, id, status::OK);
                        note(outcomes, &mut replies);
                    }
                }
                37 if models[slot].attached => {
                    models[slot].attached = false;
                    models[slot].queue.clear();
                    models[slot].unanswered.clear();
                    let outcomes = bench.gone(slot);
                    note(outcomes, &mut replies);
                }
                _ => {}
            }
            let returns = what >= 38;
            if returns && !models[slot].attached {
                models[slot].attached = true;
                for again in bench.table.resend(slot) {
                    let (id, data) = match again {
                        Again::Frame(frame) => (crate::frame::le_u64(&frame, 0), true),
                        Again::Flush(id) => (id, false),
                    };
                    models[slot].queue.push_back((id, blocks[&id], data));
                }
            }
            for model in models.iter().filter(|model| model.attached) {
                let mut content = model.applied.clone();
                let data = model.queue.iter().filter(|(_, _, data)| *data);
                content.extend(data.map(|(id, block, _)| (*block, *id)));
                prop_assert_eq!(&content, &newest);
            }
            // Whoever is killed now, engine or replica: what it has answered is there.
            for model in &models {
                prop_assert!(model.answered.iter().all(|(block, id)| model.applied[block] >= *id));
            }
        }
        prop_assert!(replies.values().all(|count| *count == 1));
        prop_assert_eq!(replies.len() as u32, bench.next_request);
        prop_assert_eq!(bench.table.completed_id(), bench.table.next_id() - 1);
        prop_assert_eq!(bench.pool.live_bytes(), 0);
    }
}
