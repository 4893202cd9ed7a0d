//! A read that is late is asked of a second reader as well. A chapter of `shell`.
//!
//! Promises: the first good answer is the answer, and the other is dropped when it comes; at most one read in
//! HEDGE_EVERY_READS is asked twice, and a burst; a reader that is clearly slower than another is asked only
//! when there is no better one, and measured now and then with a read that goes to both.
//!
//! It changes nothing about what a read may see: both readers are in sync, and each link keeps its order.

use std::collections::VecDeque;

use super::answers::ReadJob;
use super::limits::{HEDGE_DELAY_MAX_US, LINK_SYNC_TIMEOUT_US, SLOW_TRY_US};
use super::pace::{hedge_delay_us, Budget};
use super::requests::{bit, each, Entry};
use super::shell::Shell;

/// The same read asked of another slot.
#[derive(Debug, Clone, Copy)]
pub struct Second {
    pub id: u64,
    pub slot: usize,
    pub sent_at_us: u64,
    /// Only to measure a slow reader.
    pub probe: bool,
}

/// An answer that nobody waits for any more, but that tells how long it took.
#[derive(Debug, Clone, Copy)]
pub struct Late {
    pub id: u64,
    pub sent_at_us: u64,
}

pub struct Hedging {
    /// Reads in the order in which they were sent (id, key, when); those answered are dropped at the front.
    queue: VecDeque<(u64, u32, u64)>,
    budget: Budget,
    delay_us: u64,
    any_slow: bool,
}

impl Hedging {
    pub fn new() -> Self {
        let queue = VecDeque::new();
        Hedging { queue, budget: Budget::new(), delay_us: HEDGE_DELAY_MAX_US, any_slow: false }
    }

    /// When the next read is late. The front is alive, or was when this turn began.
    pub fn deadline_us(&self, not_before_us: u64) -> Option<u64> {
        self.queue.front().map(|(_, _, sent_at_us)| (*sent_at_us).max(not_before_us) + self.delay_us)
    }
}

impl Shell {
    /// A read was sent to its first slot: watch it, and let a slow reader show whether it still is.
    pub(super) fn watch_read(&mut self, key: u32) {
        let op = &self.reads[key];
        if self.readers & (self.readers - 1) == 0
            || !matches!(op.job, ReadJob::Data { .. } | ReadJob::Fix { .. } | ReadJob::Status { .. })
        {
            return;
        }
        self.hedging.budget.earn();
        self.hedging.queue.push_back((op.id, key, op.sent_at_us));
        if self.hedging.any_slow {
            self.probe(key);
        }
    }

    fn probe(&mut self, key: u32) {
        let now_us = self.now_us;
        let op = &self.reads[key];
        let unasked = self.readers & self.attached & !op.tried & !bit(op.slot);
        let due = each(unasked).find(|slot| {
            self.links[*slot].as_ref().is_some_and(|link| {
                let missed = link.late.is_some_and(|late| now_us < late.sent_at_us + LINK_SYNC_TIMEOUT_US);
                link.sync && link.slow && !missed && now_us >= link.tried_us + SLOW_TRY_US
            })
        });
        if let Some(slot) = due {
            self.send_second(key, slot, true);
        }
    }

    /// Ask a second reader for what is late.
    pub(super) fn hedge_late_reads(&mut self, not_before_us: u64) {
        while let Some((id, key, _)) = self.hedging.queue.front().copied() {
            let waits = self.table.entry(id) == Entry::Read(key)
                && self.reads.get(key).is_some_and(|op| op.id == id && op.second.is_none());
            if waits && self.hedging.deadline_us(not_before_us).is_some_and(|at| self.now_us < at) {
                return;
            }
            self.hedging.queue.pop_front();
            if waits {
                self.hedge(key);
            }
        }
    }

    fn hedge(&mut self, key: u32) {
        let op = &self.reads[key];
        let (first, asked) = (op.slot, op.tried | bit(op.slot));
        let Some(slot) = self.fastest_reader(asked) else { return };
        let measured = self.links[first].as_ref().is_some_and(|link| link.pace.is_known());
        let better = self.links[slot].as_ref().is_some_and(|link| !link.slow || !measured);
        if better && self.hedging.budget.spend() {
            self.counters.hedged_reads += 1;
            self.send_second(key, slot, false);
        }
    }

    fn send_second(&mut self, key: u32, slot: usize, probe: bool) {
        let id = self.table.add_read(key);
        let sent_at_us = self.now_us;
        self.reads[key].second = Some(Second { id, slot, sent_at_us, probe });
        let header = self.read_header(&self.reads[key], id).encode();
        let Some(link) = self.links[slot].as_mut() else { return };
        link.out.push_copy(&self.pool, &header);
        link.reads_in_flight += 1;
        link.tried_us = sent_at_us;
        link.dirty = true;
        self.slot_stats[slot].requests += 1;
    }

    /// A slot answered under one of the numbers of this read. From now on it is asked of this slot alone; whoever
    /// else was asked comes too late.
    pub(super) fn settle_race(&mut self, key: u32, slot: usize, id: u64) {
        let op = &mut self.reads[key];
        let Some(second) = op.second.take() else { return };
        let (loser_id, loser, loser_sent_us) = if second.id == id {
            let first = (op.id, op.slot, op.sent_at_us);
            (op.id, op.slot, op.sent_at_us) = (second.id, second.slot, second.sent_at_us);
            first
        } else {
            (second.id, second.slot, second.sent_at_us)
        };
        debug_assert_eq!(op.slot, slot);
        self.table.drop_read(loser_id);
        self.leave_read(loser, loser_id, loser_sent_us);
        if second.id == id && !second.probe {
            self.counters.hedge_wins += 1;
            let age_us = self.now_us.saturating_sub(loser_sent_us);
            if let Some(link) = self.links[loser].as_mut() {
                link.pace.at_least(age_us);
            }
            self.compare_paces();
        }
    }

    /// One of two slots cannot say, or its link is gone: the other is waited for. False if there is none.
    pub(super) fn fall_back(&mut self, key: u32, slot: usize) -> bool {
        let op = &mut self.reads[key];
        let Some(second) = op.second.take() else { return false };
        if second.slot == slot {
            self.table.drop_read(second.id);
        } else {
            let id = op.id;
            (op.id, op.slot, op.sent_at_us) = (second.id, second.slot, second.sent_at_us);
            self.table.drop_read(id);
        }
        true
    }

    /// A link's answer is not waited for any more. It still tells how long it took.
    pub(super) fn leave_read(&mut self, slot: usize, id: u64, sent_at_us: u64) {
        if let Some(link) = self.links[slot].as_mut() {
            link.reads_in_flight = link.reads_in_flight.saturating_sub(1);
            link.late.get_or_insert(Late { id, sent_at_us });
        }
    }

    /// An answer that nobody waits for.
    pub(super) fn on_late_answer(&mut self, slot: usize, id: u64) {
        let Some(link) = self.links[slot].as_mut() else { return };
        if let Some(late) = link.late.take_if(|late| late.id == id) {
            link.pace.took(self.now_us.saturating_sub(late.sent_at_us), link.slow);
            self.compare_paces();
        }
    }

    /// Who is slow beside the others, and how long to wait before a second one is asked.
    pub(super) fn compare_paces(&mut self) {
        let readers = self.readers;
        let paces = || {
            let links = self.links.iter().enumerate().filter(move |(slot, _)| readers & bit(*slot) != 0);
            links.filter_map(|(_, link)| link.as_ref()).filter(|link| link.sync).map(|link| link.pace)
        };
        self.hedging.delay_us = hedge_delay_us(paces());
        // One that was not measured yet may be the fastest: it is asked, and then it is known.
        let fastest_us = paces().map(|pace| pace.mean_us()).min().unwrap_or(0);
        self.hedging.any_slow = false;
        for link in self.links.iter_mut().flatten() {
            link.slow = link.pace.is_known() && link.pace.is_slow(fastest_us, link.slow);
            self.hedging.any_slow |= link.slow;
        }
    }
}
