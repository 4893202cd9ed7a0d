//! Until when may a client be given what a replica read? Pure: told which frames were answered.
//!
//! A newer engine may have claimed the replicas while this one was stopped or cut off, all but one that
//! still answers us. So data goes to a client only while enough replicas have lately shown that nobody
//! claimed them: an OK answer to a frame sent at `t` shows it for some moment after `t`. A newer engine
//! claims as many, so that at least one of them is among ours, and serves only when READ_LEASE_S and a
//! margin have passed since: what we gave until then was given before its first write.
//!
//! Writes need none of this: every member answers them, and one that was claimed refuses.

use super::limits::{READ_LEASE_RENEW_US, READ_LEASE_US};
use super::requests::{each, Slots, SLOTS_MAX};

/// At least `need` of `slots` must have answered lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quorum {
    pub slots: Slots,
    pub need: usize,
}

pub struct Lease {
    /// None: nobody has said yet what is needed, and nothing is held back.
    quorums: Option<Vec<Quorum>>,
    /// By slot: when what it showed counts no more. 0: it has shown nothing.
    ends_us: [u64; SLOTS_MAX],
    /// Given what was shown when this was last looked at, the lease holds before this time. Never too late:
    /// between two looks the ends only move on.
    until_us: u64,
}

impl Lease {
    pub fn new() -> Self {
        Lease { quorums: None, ends_us: [0; SLOTS_MAX], until_us: u64::MAX }
    }

    pub fn set(&mut self, quorums: Vec<Quorum>) {
        self.quorums = Some(quorums);
        self.look();
    }

    /// A slot answered OK to a frame that was sent at this time, or later.
    #[inline]
    pub fn shown(&mut self, slot: usize, sent_at_us: u64) {
        let end = &mut self.ends_us[slot];
        *end = (*end).max(sent_at_us + READ_LEASE_US);
    }

    /// Another process, or another replica, may stand behind this slot from now on.
    pub fn forget(&mut self, slot: usize) {
        self.ends_us[slot] = 0;
        self.look();
    }

    /// May data be given at this time?
    #[inline]
    pub fn covers(&mut self, now_us: u64) -> bool {
        now_us < self.until_us || {
            self.look();
            now_us < self.until_us
        }
    }

    /// Slots to ask because a read has come and the lease is not young. Mostly none: other answers keep it so.
    #[inline]
    pub fn aging(&mut self, now_us: u64) -> Slots {
        if now_us + READ_LEASE_RENEW_US < self.until_us || self.covers(now_us + READ_LEASE_RENEW_US) {
            return 0;
        }
        let named = self.quorums.iter().flatten().fold(0, |set, quorum| set | quorum.slots);
        each(named)
            .filter(|slot| self.ends_us[*slot] <= now_us + READ_LEASE_RENEW_US)
            .fold(0, |set, slot| set | 1 << slot)
    }

    fn look(&mut self) {
        self.until_us = match self.quorums.as_deref() {
            None => u64::MAX,
            // Without a record nobody knows who would have to be asked.
            Some([]) => 0,
            Some(quorums) => quorums.iter().map(|quorum| self.end_of(quorum)).min().unwrap_or(0),
        };
    }

    /// When too few of a quorum will be left.
    fn end_of(&self, quorum: &Quorum) -> u64 {
        let mut ends = [0; SLOTS_MAX];
        let mut count = 0;
        for slot in each(quorum.slots) {
            ends[count] = self.ends_us[slot];
            count += 1;
        }
        debug_assert!((1..=count).contains(&quorum.need), "checked by the door");
        ends[..count].sort_unstable_by(|a, b| b.cmp(a));
        ends[quorum.need - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = READ_LEASE_US;

    fn of(slots: Slots, need: usize) -> Quorum {
        Quorum { slots, need }
    }

    #[test]
    fn until_it_is_said_who_is_needed_nothing_is_held_back_and_without_a_quorum_everything() {
        let mut lease = Lease::new();
        assert!(lease.covers(0) && lease.covers(u64::MAX / 2));
        assert_eq!(lease.aging(0), 0);
        lease.set(vec![]);
        lease.shown(0, 10 * S);
        assert!(!lease.covers(0) && !lease.covers(10 * S));
        assert_eq!(lease.aging(10 * S), 0, "there is nobody to ask");
    }

    #[test]
    fn it_ends_with_the_answer_without_which_too_few_are_left() {
        let mut lease = Lease::new();
        lease.set(vec![of(0b111, 2)]);
        assert!(!lease.covers(0));
        lease.shown(2, 10 * S);
        assert!(!lease.covers(10 * S), "one of three");
        lease.shown(0, 9 * S + S / 2);
        assert!(lease.covers(10 * S + S / 2 - 1));
        assert!(!lease.covers(10 * S + S / 2));
        lease.shown(0, 8 * S);
        assert!(lease.covers(10 * S + S / 2 - 1), "an older answer takes nothing away");
        lease.shown(1, 10 * S + S / 4);
        assert!(lease.covers(11 * S - 1), "slot 1 came in for slot 0");
        assert!(!lease.covers(11 * S));
    }

    #[test]
    fn every_quorum_must_be_there() {
        let mut lease = Lease::new();
        lease.set(vec![of(0b0011, 2), of(0b0111, 2)]);
        lease.shown(1, S);
        lease.shown(2, S);
        assert!(!lease.covers(S), "the first names slot 0 as well");
        lease.shown(0, S);
        assert!(lease.covers(S));
        lease.forget(1);
        assert!(!lease.covers(S));
    }

    #[test]
    fn only_those_whose_answer_is_old_are_asked_and_only_when_it_matters() {
        let mut lease = Lease::new();
        lease.set(vec![of(0b111, 2)]);
        assert_eq!(lease.aging(10 * S), 0b111);
        lease.shown(0, 10 * S);
        assert_eq!(lease.aging(10 * S), 0b110);
        lease.shown(1, 10 * S);
        assert_eq!(lease.aging(10 * S + S / 2 - 1), 0, "two young answers are enough");
        lease.shown(0, 10 * S + S / 4);
        assert_eq!(lease.aging(10 * S + S / 2), 0b110);
    }
}
