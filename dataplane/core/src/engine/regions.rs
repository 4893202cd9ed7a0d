//! Which regions may not be touched yet, and who waits for them. Pure.
//!
//! ```text
//!                  region unequal      region waited for by partial writes
//!   read           waits               goes
//!   partial write  waits               waits
//!   whole blocks   goes, unless a partial write waits in the region: never past that one
//! ```
//!
//! Promises: what waits in a region is released in the order in which it came, before anything newer.

use std::collections::{HashMap, HashSet, VecDeque};

/// What a piece does to its region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    Read,
    Partial,
    Whole,
}

struct Queue<T> {
    waiting: VecDeque<T>,
    partial_count: usize,
}

/// Pieces released together, region by region; each must pass the gate again.
pub type Released<T> = Vec<VecDeque<T>>;

pub struct Regions<T> {
    unequal: HashSet<u32>,
    /// Regions that diverged, with the number of the last time: Python counts the same events.
    diverged_at: HashMap<u32, u64>,
    diverged_count: u64,
    partial_wait: HashSet<u32>,
    queues: HashMap<u32, Queue<T>>,
    /// Regions whose event was sent.
    wanted: HashSet<u32>,
    waiting_count: usize,
}

impl<T> Regions<T> {
    pub fn new() -> Self {
        Regions {
            unequal: HashSet::new(),
            diverged_at: HashMap::new(),
            diverged_count: 0,
            partial_wait: HashSet::new(),
            queues: HashMap::new(),
            wanted: HashSet::new(),
            waiting_count: 0,
        }
    }

    /// Nothing is held back anywhere: the common case, one comparison.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.unequal.is_empty() && self.partial_wait.is_empty()
    }

    pub fn waiting_count(&self) -> usize {
        self.waiting_count
    }

    pub fn must_wait(&self, region: u32, touch: Touch) -> bool {
        match touch {
            Touch::Read => self.unequal.contains(&region),
            Touch::Partial => self.unequal.contains(&region) || self.partial_wait.contains(&region),
            Touch::Whole => self.queues.get(&region).is_some_and(|queue| queue.partial_count > 0),
        }
    }

    /// Keep a piece until its region is equal. True if Python was not told yet that somebody waits.
    pub fn park(&mut self, region: u32, touch: Touch, piece: T) -> bool {
        debug_assert!(self.must_wait(region, touch));
        let queue =
            self.queues.entry(region).or_insert_with(|| Queue { waiting: VecDeque::new(), partial_count: 0 });
        queue.waiting.push_back(piece);
        if touch == Touch::Partial {
            queue.partial_count += 1;
        }
        self.waiting_count += 1;
        self.wanted.insert(region)
    }

    /// A write failed on all replicas in this region.
    pub fn add_unequal(&mut self, region: u32) {
        self.diverged_count += 1;
        self.diverged_at.insert(region, self.diverged_count);
        self.unequal.insert(region);
    }

    /// More regions to make equal. Those that diverged by themselves stay.
    pub fn set_unequal(&mut self, regions: &[u32]) {
        self.unequal.extend(regions);
    }

    #[must_use]
    pub fn set_partial_wait(&mut self, regions: &[u32]) -> Released<T> {
        self.partial_wait = regions.iter().copied().collect();
        self.release_all()
    }

    /// Of these regions, those that are equal now: not one that diverged again, of which Python, that has
    /// seen this many such events, did not know when it said so.
    pub fn settled(&self, regions: &[u32], diverged_seen: u64) -> Vec<u32> {
        let known = |region: &u32| self.diverged_at.get(region).is_none_or(|number| *number <= diverged_seen);
        regions.iter().copied().filter(known).collect()
    }

    #[must_use]
    pub fn equal(&mut self, regions: &[u32]) -> Released<T> {
        let mut released = Vec::new();
        for region in regions {
            self.diverged_at.remove(region);
            self.unequal.remove(region);
            self.partial_wait.remove(region);
            self.wanted.remove(region);
            released.extend(self.take(*region));
        }
        released
    }

    /// Resync: parts of blocks may be written here again. A region that diverged meanwhile stays unequal.
    #[must_use]
    pub fn partial_done(&mut self, regions: &[u32]) -> Released<T> {
        let mut released = Vec::new();
        for region in regions {
            if self.partial_wait.remove(region) {
                self.wanted.remove(region);
                released.extend(self.take(*region));
            }
        }
        released
    }

    fn take(&mut self, region: u32) -> Option<VecDeque<T>> {
        let queue = self.queues.remove(&region)?;
        self.waiting_count -= queue.waiting.len();
        Some(queue.waiting)
    }

    /// After a set was replaced: everything passes the gate again, and who still waits is told again.
    fn release_all(&mut self) -> Released<T> {
        self.wanted.clear();
        let mut regions: Vec<u32> = self.queues.keys().copied().collect();
        regions.sort_unstable();
        regions.into_iter().filter_map(|region| self.take(region)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Touch::{Partial, Read, Whole};
    use super::*;

    #[test]
    fn in_an_unequal_region_only_whole_blocks_go() {
        let mut regions: Regions<u8> = Regions::new();
        assert!(regions.is_quiet());
        regions.set_unequal(&[3]);
        assert!(regions.must_wait(3, Read) && regions.must_wait(3, Partial) && !regions.must_wait(3, Whole));
        assert!(!regions.must_wait(4, Read));
        assert!(regions.park(3, Read, 1), "the first to wait is told");
        assert!(!regions.park(3, Read, 2), "the second is not");
        assert!(!regions.must_wait(3, Whole), "whole blocks may pass a waiting read");
        assert_eq!(regions.equal(&[3]), vec![VecDeque::from([1, 2])]);
        assert!(regions.is_quiet() && regions.waiting_count() == 0);
    }

    #[test]
    fn whole_blocks_never_pass_a_waiting_partial_write() {
        let mut regions: Regions<u8> = Regions::new();
        assert!(regions.set_partial_wait(&[0, 1]).is_empty());
        assert!(!regions.must_wait(0, Read));
        assert!(!regions.must_wait(0, Whole));
        assert!(regions.park(0, Partial, 1));
        assert!(regions.must_wait(0, Whole) && !regions.must_wait(1, Whole));
        regions.park(0, Whole, 2);
        regions.park(0, Partial, 3);
        assert_eq!(regions.waiting_count(), 3);
        assert_eq!(regions.equal(&[1, 0]), vec![VecDeque::from([1, 2, 3])]);
        assert!(!regions.must_wait(0, Whole));
    }

    #[test]
    fn replacing_a_set_lets_all_try_again_and_says_again_who_waits() {
        let mut regions: Regions<u8> = Regions::new();
        assert!(regions.set_partial_wait(&[1, 2]).is_empty());
        regions.park(1, Partial, 1);
        regions.park(2, Partial, 2);
        let released = regions.set_partial_wait(&[2]);
        assert_eq!(released, vec![VecDeque::from([1]), VecDeque::from([2])]);
        assert!(!regions.must_wait(1, Partial));
        assert!(regions.park(2, Partial, 2));
    }

    #[test]
    fn a_region_that_diverged_stays_unequal_through_a_resync_and_another_reconcile() {
        let mut regions: Regions<u8> = Regions::new();
        assert!(regions.set_partial_wait(&[1]).is_empty());
        regions.park(1, Partial, 1);
        regions.add_unequal(1);
        assert_eq!(regions.partial_done(&[1]), vec![VecDeque::from([1])]);
        assert!(regions.must_wait(1, Partial) && regions.must_wait(1, Read));
        regions.set_unequal(&[2]);
        assert!(regions.must_wait(1, Read) && regions.must_wait(2, Read));
    }

    #[test]
    fn a_region_that_diverged_again_is_not_equal_for_who_has_not_heard() {
        let mut regions: Regions<u8> = Regions::new();
        regions.add_unequal(1);
        regions.add_unequal(2);
        regions.add_unequal(1);
        assert_eq!(regions.settled(&[1, 2, 3], 2), [2, 3]);
        assert_eq!(regions.settled(&[1, 2, 3], 3), [1, 2, 3]);
    }
}
