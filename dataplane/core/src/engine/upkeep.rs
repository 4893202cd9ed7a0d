//! Timers, and what is counted. A chapter of `shell`.
//!
//! Promises: nothing is armed while nothing is outstanding: an idle engine is never woken by itself.

use super::limits::{
    CLIENT_OUTPUT_STALL_US, COMPLETED_INTERVAL_US, LINK_STALL_TIMEOUT_US, LINK_SYNC_TIMEOUT_US, POOL_TRIM_US,
    READ_REISSUE_US, SELF_PAUSE_US, STALL_CHECK_US,
};
use super::link::LinkEnd;
use super::requests::{bit, each, Slots};
use super::shell::Shell;
use super::stats::{SlotStats, StatsReport};
use crate::frame::{kind, Header};

#[derive(Debug, Default)]
pub(super) struct Timers {
    /// When links were last looked at.
    stall_checked_us: u64,
    /// Nothing sent before this may be called late: we were not running ourselves.
    not_before_us: u64,
    last_turn_us: u64,
    was_waiting: bool,
    completed_sent_us: u64,
    completed_sent_id: u64,
    shortage_checked_us: u64,
    trimmed_us: u64,
}

impl Timers {
    /// A new link has heard nothing yet.
    pub fn tell_completed_again(&mut self) {
        self.completed_sent_id = 0;
    }
}

impl Shell {
    fn links_busy(&self) -> bool {
        self.links.iter().flatten().any(|link| link.is_busy())
    }

    fn completed_due(&self) -> bool {
        self.attached != 0 && self.table.completed_id() != self.timers.completed_sent_id
    }

    /// When the loop must wake up by itself. None: only for an event.
    pub(super) fn next_deadline_us(&self) -> Option<u64> {
        let timers = &self.timers;
        let mut next: Option<u64> = None;
        let mut at = |deadline: u64| next = Some(next.map_or(deadline, |next: u64| next.min(deadline)));
        if self.links_busy() {
            at(timers.stall_checked_us + STALL_CHECK_US);
        }
        if let Some(deadline) = self.hedging.deadline_us(timers.not_before_us) {
            at(deadline);
        }
        if self.completed_due() {
            at(timers.completed_sent_us + COMPLETED_INTERVAL_US);
        }
        if !self.blocked.is_empty() && !self.paused {
            at(timers.shortage_checked_us + CLIENT_OUTPUT_STALL_US / 4);
        }
        if self.pool.free_bytes() > 0 {
            at(timers.trimmed_us + POOL_TRIM_US);
        }
        next
    }

    /// A turn that comes much later than its timer means that this process was stopped.
    pub(super) fn notice_own_pause(&mut self) {
        let timers = &mut self.timers;
        if timers.was_waiting && self.now_us > timers.last_turn_us + SELF_PAUSE_US {
            timers.not_before_us = self.now_us;
        }
        timers.last_turn_us = self.now_us;
    }

    pub(super) fn upkeep(&mut self) {
        let now_us = self.now_us;
        if now_us >= self.timers.stall_checked_us + STALL_CHECK_US {
            self.timers.stall_checked_us = now_us;
            if self.links_busy() {
                self.check_links();
                self.reissue_slow_reads();
                self.compare_paces();
            }
        }
        self.hedge_late_reads(self.timers.not_before_us);
        if now_us >= self.timers.completed_sent_us + COMPLETED_INTERVAL_US && self.completed_due() {
            self.send_completed();
        }
        if !self.blocked.is_empty()
            && !self.paused
            && now_us >= self.timers.shortage_checked_us + CLIENT_OUTPUT_STALL_US / 4
        {
            self.timers.shortage_checked_us = now_us;
            self.close_stuck_clients();
        }
        if now_us >= self.timers.trimmed_us + POOL_TRIM_US && self.pool.free_bytes() > 0 {
            self.timers.trimmed_us = now_us;
            self.pool.trim();
        }
        self.timers.was_waiting = self.links_busy();
    }

    /// How long a link owes an answer, relative to what it is allowed.
    fn overdue(&self, slot: usize, lease_missed: bool) -> Overdue {
        let Some(link) = &self.links[slot] else { return Overdue::No };
        if link.writes_in_flight == 0 && link.lease_asked.is_none() {
            return Overdue::No;
        }
        let floor = link.attached_us.max(self.timers.not_before_us);
        let age = |sent: Option<u64>| sent.map_or(0, |sent| self.now_us.saturating_sub(sent.max(floor)));
        let (plain, syncing) = self.table.oldest_unanswered(slot);
        let (plain_us, syncing_us) = (age(plain), age(syncing));
        // Nobody may wait for a lease: then it says little that one is not answered.
        let lease_us = age(link.lease_asked.map(|asked| asked.sent_at_us));
        if plain_us.max(syncing_us).max(lease_us) > LINK_SYNC_TIMEOUT_US {
            Overdue::Hopeless
        } else if plain_us > LINK_STALL_TIMEOUT_US || (lease_missed && lease_us > LINK_STALL_TIMEOUT_US) {
            Overdue::Late
        } else {
            Overdue::No
        }
    }

    /// Close links that owe an answer for too long. When no member does better, closing brings
    /// nothing (no write could be finished without them): then only the long limit counts.
    fn check_links(&mut self) {
        let members = self.table.members();
        let lease_missed = self.lease_is_missed();
        let overdue: Vec<Overdue> =
            (0..self.links.len()).map(|slot| self.overdue(slot, lease_missed)).collect();
        let healthy: Slots = each(self.attached & members)
            .filter(|slot| overdue[*slot] == Overdue::No)
            .fold(0, |set, s| set | bit(s));
        for (slot, overdue) in overdue.into_iter().enumerate() {
            let Some(generation) = self.links[slot].as_ref().map(|link| link.generation) else { continue };
            let dispensable = healthy != 0 || members & bit(slot) == 0;
            if overdue == Overdue::Hopeless || (overdue == Overdue::Late && dispensable) {
                self.close_link(slot, generation, LinkEnd::Stalled);
            }
        }
    }

    fn reissue_slow_reads(&mut self) {
        let now_us = self.now_us;
        let floor = self.timers.not_before_us;
        let slow: Vec<(u32, usize, u64)> = self
            .reads
            .iter()
            .filter(|(_, op)| op.id != 0)
            .map(|(key, op)| (key, op.slot, now_us.saturating_sub(op.sent_at_us.max(floor))))
            .filter(|(_, _, age_us)| *age_us > READ_REISSUE_US)
            .collect();
        for (key, slot, age_us) in slow {
            let others = self.readers & self.attached & !bit(slot);
            let other = each(others).any(|slot| self.links[slot].as_ref().is_some_and(|l| l.sync && !l.slow));
            if age_us > LINK_SYNC_TIMEOUT_US {
                if let Some(generation) = self.links[slot].as_ref().map(|link| link.generation) {
                    self.close_link(slot, generation, LinkEnd::Stalled);
                }
            } else if other && self.reads.get(key).is_some_and(|op| op.id != 0 && op.slot == slot) {
                if let Some(link) = &mut self.links[slot] {
                    link.pace.at_least(age_us);
                }
                self.compare_paces();
                self.reissue(key);
            }
        }
    }

    fn send_completed(&mut self) {
        let request_id = self.table.completed_id();
        self.timers.completed_sent_us = self.now_us;
        self.timers.completed_sent_id = request_id;
        let header = Header { kind: kind::COMPLETED, request_id, epoch: self.epoch, ..Header::default() };
        for link in self.links.iter_mut().flatten() {
            link.out.push_copy(&self.pool, &header.encode());
            link.dirty = true;
        }
    }

    /// Memory is short: close the clients that hold some and do not move.
    fn close_stuck_clients(&mut self) {
        let now_us = self.now_us;
        let missed = self.blocked.iter().any(|key| {
            let client = &self.clients[*key];
            client.has_room(client.blocked_need) && !self.engine_has_room(client.blocked_need)
        });
        if !missed {
            return; // who is held back has only himself to wait for
        }
        let stuck: Vec<u32> = self
            .clients
            .iter()
            .filter(|(_, client)| {
                client.is_stuck_since().is_some_and(|since| now_us > since + CLIENT_OUTPUT_STALL_US)
            })
            .map(|(key, _)| key)
            .collect();
        for key in stuck {
            self.close_client(key, "stuck while memory is short");
        }
    }

    pub(super) fn report(&self) -> StatsReport {
        let slot_stats = self.slot_stats.iter().zip(&self.links).map(|(stats, link)| SlotStats {
            connected: link.is_some(),
            mode: link.as_ref().map_or("none", |link| link.mode()),
            slow: link.as_ref().is_some_and(|link| link.slow),
            in_flight: link.as_ref().map_or(0, |l| u64::from(l.reads_in_flight + l.writes_in_flight)),
            ..stats.clone()
        });
        StatsReport {
            counters: self.counters.clone(),
            clients: self.clients.len() as u64,
            in_flight: self.requests.len() as u64,
            in_flight_bytes: self.pool.live_bytes() + self.reads_reserved,
            waiting: (self.regions.waiting_count()
                + self.waiting_reads.len()
                + self.held_answers.len()
                + self.held.len()) as u64,
            slots: slot_stats.collect(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overdue {
    No,
    /// Past the limit for plain writes.
    Late,
    /// Past every limit.
    Hopeless,
}
