//! The table of frames under way: ids, who has answered what, when a write is done, what is sent
//! again to a link that returns. Pure: events in, outcomes out; no sockets, no clock of its own.
//!
//! Life of a write (also zeroes, trim, flush):
//!
//! ```text
//!   add ──► asked of every attached link ──► answers ──► finished: the client gets its reply
//!                                                └──► released: nobody may need its bytes again
//! ```
//!
//! *Finished* when every member answered OK, or every member answered with an error. One that fails
//! where another succeeded loses its link; the write then waits for Python to change the members.
//!
//! *Released* later than finished: when every attached link has answered and no earlier write that
//! touches the same region is unreleased. The second condition makes sending again exact: whatever is over
//! an unreleased write is still known.
//!
//! A link that returns gets what its replica has not answered, in order. Never what is under a write that
//! it has answered: whoever dies between that and the newer one would leave an acknowledged write undone
//! there, and the next engine may find this replica alone (C7, C12).
//!
//! Invariants: ids grow by one per frame; `ring[i]` is the frame `base_id + i`; the ring's first
//! entry is not None; a region's queue holds exactly its unreleased writes, oldest first.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use super::buffers::Buf;
use super::nbd::errno;
use super::slab::Slab;
use crate::frame::{flag, kind, status};
use crate::limits::REGION_BYTES;
use crate::region_map::RegionMap;

/// A set of slots, one bit each.
pub type Slots = u32;

pub const SLOTS_MAX: usize = 32;

/// Empty queues kept for their memory: as many regions as a busy client touches at once.
const SPARE_QUEUES_MAX: usize = 64;

#[inline]
pub fn bit(slot: usize) -> Slots {
    1 << slot
}

/// Slots of a set, lowest first.
pub fn each(mut set: Slots) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if set == 0 {
            return None;
        }
        let slot = set.trailing_zeros() as usize;
        set &= set - 1;
        Some(slot)
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    None,
    Write(u32),
    Read(u32),
}

/// A write as it enters the table.
#[derive(Debug)]
pub struct NewWrite {
    pub kind: u8,
    pub flags: u16,
    pub offset: u64,
    pub length: u64,
    pub frame: Rc<Buf>,
    /// Whose part this is; returned in `Outcome::Finished`.
    pub request: u32,
}

#[derive(Debug)]
struct Write {
    id: u64,
    kind: u8,
    flags: u16,
    offset: u64,
    /// 0 for a flush.
    length: u64,
    first_region: u32,
    /// 0 for a flush.
    region_count: u32,
    frame: Rc<Buf>,
    request: u32,
    sent_at_us: u64,
    /// Links that hold this frame and have not answered.
    asked: Slots,
    ok: Slots,
    failed: Slots,
    /// Failed it once: what is over it says nothing of what is beside that.
    refused: Slots,
    no_space: bool,
    finished: bool,
    error: u32,
}

impl Write {
    fn regions(&self) -> std::ops::Range<u32> {
        self.first_region..self.first_region + self.region_count
    }

    fn answered_by(&self, members: Slots) -> bool {
        self.finished && (self.error != 0 || members & !self.ok == 0)
    }

    /// Waits for a disk's cache, not only for the link.
    fn syncs(&self) -> bool {
        self.kind == kind::FLUSH || self.flags & flag::FUA != 0
    }
}

/// What a link that returns gets.
#[derive(Debug)]
pub enum Again {
    Frame(Rc<Buf>),
    /// A FLUSH under the id of a write that the replica has applied.
    Flush(u64),
}

/// What the shell must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// One part of a request is done; `error` is an NBD error value or 0.
    Finished { request: u32, error: u32 },
    /// This slot failed what others did: close its link.
    CloseLink { slot: usize, status: u32 },
    /// Replicas may differ here, and nobody holds the truth.
    Diverged { region: u32 },
}

pub struct Table {
    ring: VecDeque<Entry>,
    base_id: u64,
    writes: Slab<Write>,
    by_region: RegionMap<VecDeque<u32>>,
    spare_queues: Vec<VecDeque<u32>>,
    members: Slots,
    /// Regions that diverged, with the id of the first write that failed there: replicas must not
    /// take that write for done (COMPLETED) before the region is equal again.
    diverged: BTreeMap<u32, u64>,
    /// (token, last id it waits for).
    barriers: Vec<(u64, u64)>,
    /// Kept for its memory.
    release_pending: Vec<u32>,
}

impl Table {
    pub fn new() -> Self {
        Table {
            ring: VecDeque::new(),
            base_id: 1,
            writes: Slab::new(),
            by_region: RegionMap::default(),
            spare_queues: Vec::new(),
            members: 0,
            diverged: BTreeMap::new(),
            barriers: Vec::new(),
            release_pending: Vec::new(),
        }
    }

    pub fn members(&self) -> Slots {
        self.members
    }

    /// The id that the next frame gets.
    pub fn next_id(&self) -> u64 {
        self.base_id + self.ring.len() as u64
    }

    pub fn entry(&self, id: u64) -> Entry {
        match id.checked_sub(self.base_id) {
            Some(index) => self.ring.get(index as usize).copied().unwrap_or(Entry::None),
            None => Entry::None,
        }
    }

    /// Give the next id to a frame that goes to one link only (a read, a repair).
    pub fn add_read(&mut self, key: u32) -> u64 {
        let id = self.next_id();
        self.ring.push_back(Entry::Read(key));
        id
    }

    pub fn drop_read(&mut self, id: u64) {
        if let Entry::Read(_) = self.entry(id) {
            self.clear(id);
        }
    }

    fn clear(&mut self, id: u64) {
        self.ring[(id - self.base_id) as usize] = Entry::None;
        while self.ring.front() == Some(&Entry::None) {
            self.ring.pop_front();
            self.base_id += 1;
        }
    }

    /// A write is on its way to all of `links`. Its frame carries `next_id()`.
    pub fn add(&mut self, new: NewWrite, links: Slots, now_us: u64) -> u64 {
        let id = self.next_id();
        let first_region = (new.offset / REGION_BYTES) as u32;
        let region_count = if new.length == 0 {
            0
        } else {
            ((new.offset + new.length - 1) / REGION_BYTES) as u32 - first_region + 1
        };
        let write = Write {
            id,
            kind: new.kind,
            flags: new.flags,
            offset: new.offset,
            length: new.length,
            first_region,
            region_count,
            frame: new.frame,
            request: new.request,
            sent_at_us: now_us,
            asked: links,
            ok: 0,
            failed: 0,
            refused: 0,
            no_space: false,
            finished: false,
            error: 0,
        };
        let regions = write.regions();
        let key = self.writes.insert(write);
        self.ring.push_back(Entry::Write(key));
        for region in regions {
            let spare = &mut self.spare_queues;
            self.by_region.entry(region).or_insert_with(|| spare.pop().unwrap_or_default()).push_back(key);
        }
        id
    }

    /// A link answered a write. `answer` is OK, NO_SPACE or IO_ERROR; others end the link before they
    /// come here. Returns when the frame was sent, or None if this link was not asked.
    pub fn answer(&mut self, slot: usize, id: u64, answer: u32, out: &mut Vec<Outcome>) -> Option<u64> {
        let Entry::Write(key) = self.entry(id) else {
            return None;
        };
        let write = &mut self.writes[key];
        if write.asked & bit(slot) == 0 {
            return None;
        }
        write.asked &= !bit(slot);
        if answer == status::OK {
            write.ok |= bit(slot);
        } else {
            write.failed |= bit(slot);
            write.refused |= bit(slot);
            write.no_space |= answer == status::NO_SPACE;
        }
        let sent_at_us = write.sent_at_us;
        self.judge(key, out);
        Some(sent_at_us)
    }

    /// Decide one write again after its answers or the members changed.
    fn judge(&mut self, key: u32, out: &mut Vec<Outcome>) {
        let members = self.members;
        let write = &mut self.writes[key];
        let held = write.ok & members;
        if !write.finished && members != 0 {
            let missing = members & !write.ok;
            if missing == 0 {
                write.finished = true;
                out.push(Outcome::Finished { request: write.request, error: 0 });
            } else if held == 0 && missing & !write.failed == 0 {
                write.finished = true;
                write.error = if write.no_space { errno::ENOSPC } else { errno::EIO };
                out.push(Outcome::Finished { request: write.request, error: write.error });
                for region in write.regions() {
                    self.diverged.entry(region).or_insert(write.id);
                    out.push(Outcome::Diverged { region });
                }
            }
        }
        // A member that failed what another holds, or a link that is no member: its copy is behind.
        let behind = if held != 0 && write.error == 0 { write.failed } else { write.failed & !members };
        if behind != 0 {
            let status = if write.no_space { status::NO_SPACE } else { status::IO_ERROR };
            out.extend(each(behind).map(|slot| Outcome::CloseLink { slot, status }));
        }
        self.release(key);
    }

    fn releasable(&self, key: u32) -> bool {
        let write = &self.writes[key];
        write.asked == 0
            && write.answered_by(self.members)
            && write
                .regions()
                .all(|region| self.by_region.get(&region).is_some_and(|queue| queue.front() == Some(&key)))
    }

    /// Forget a write if nobody can need it again, and then those that waited behind it.
    fn release(&mut self, key: u32) {
        if !self.releasable(key) {
            return;
        }
        let mut pending = std::mem::take(&mut self.release_pending);
        pending.push(key);
        while let Some(key) = pending.pop() {
            if self.writes.get(key).is_none() || !self.releasable(key) {
                continue;
            }
            let Some(write) = self.writes.remove(key) else { continue };
            self.clear(write.id);
            for region in write.regions() {
                let Some(queue) = self.by_region.get_mut(&region) else { continue };
                queue.pop_front();
                if let Some(next) = queue.front() {
                    pending.push(*next);
                } else if let Some(queue) = self.by_region.remove(&region) {
                    if self.spare_queues.len() < SPARE_QUEUES_MAX {
                        self.spare_queues.push(queue);
                    }
                }
            }
        }
        self.release_pending = pending;
    }

    fn write_keys(&self) -> Vec<u32> {
        self.ring
            .iter()
            .filter_map(|entry| if let Entry::Write(key) = entry { Some(*key) } else { None })
            .collect()
    }

    /// A link is closed: it will answer nothing more, and what it failed it may hold next time.
    pub fn link_gone(&mut self, slot: usize, out: &mut Vec<Outcome>) {
        for key in self.write_keys() {
            if let Some(write) = self.writes.get_mut(key) {
                write.asked &= !bit(slot);
                write.failed &= !bit(slot);
                self.judge(key, out);
            }
        }
    }

    /// Every write and flush now needs the answers of these slots.
    pub fn set_members(&mut self, members: Slots, out: &mut Vec<Outcome>) {
        self.members = members;
        for key in self.write_keys() {
            if self.writes.get(key).is_some() {
                self.judge(key, out);
            }
        }
    }

    /// What a returning link must get before new frames, oldest first. What its replica answered on an
    /// earlier link it holds: a replica that may have lost anything returns by a resync.
    pub fn resend(&mut self, slot: usize) -> Vec<Again> {
        let mut again = Vec::new();
        // Ranges of frames that were refused once. What is over them is undone by them, and follows.
        let mut undone: Vec<std::ops::Range<u64>> = Vec::new();
        for key in self.write_keys() {
            let write = &self.writes[key];
            let (range, id) = (write.offset..write.offset + write.length, write.id);
            let held = write.ok & bit(slot) != 0;
            if write.kind == kind::FLUSH {
                if write.finished || held {
                    continue;
                }
                again.push(Again::Frame(write.frame.clone()));
            } else {
                let follows = undone.iter().any(|old| range.start < old.end && old.start < range.end);
                if held && !follows {
                    continue;
                }
                let refused = write.refused & bit(slot) != 0;
                if !follows && !refused && self.is_under_what_it_holds(slot, key) {
                    // It was applied, for the newer one came after it; only its own durability may lack.
                    again.push(Again::Flush(id));
                } else {
                    again.push(Again::Frame(write.frame.clone()));
                    if follows || refused {
                        undone.push(range);
                    }
                }
            }
            let write = &mut self.writes[key];
            write.asked |= bit(slot);
            write.ok &= !bit(slot);
            write.failed &= !bit(slot);
        }
        again
    }

    /// Has this slot answered a newer write that overlaps this one? Frames of a region are applied in order.
    fn is_under_what_it_holds(&self, slot: usize, key: u32) -> bool {
        let write = &self.writes[key];
        let over = |other: &u32| {
            let other = &self.writes[*other];
            other.id > write.id
                && other.ok & bit(slot) != 0
                && other.offset < write.offset + write.length
                && write.offset < other.offset + other.length
        };
        write.regions().any(|region| self.by_region.get(&region).is_some_and(|queue| queue.iter().any(over)))
    }

    /// When the oldest unanswered frames of a link were sent: plain ones, and those that wait for a
    /// disk's cache. None: nothing is outstanding of that sort.
    pub fn oldest_unanswered(&self, slot: usize) -> (Option<u64>, Option<u64>) {
        let (mut plain, mut syncing) = (None, None);
        for entry in &self.ring {
            let Entry::Write(key) = entry else { continue };
            let write = &self.writes[*key];
            if write.asked & bit(slot) == 0 {
                continue;
            }
            let oldest = if write.syncs() { &mut syncing } else { &mut plain };
            if oldest.is_none() {
                *oldest = Some(write.sent_at_us);
            }
            if plain.is_some() && syncing.is_some() {
                break;
            }
        }
        (plain, syncing)
    }

    /// May what a replica read under this id, of these bytes, show a write that not all members hold? Links
    /// keep the order, so a write with a later id is not in it.
    pub fn shows_unfinished(&self, offset: u64, end: u64, id: u64) -> bool {
        if self.by_region.is_empty() {
            return false;
        }
        let shown = |key: &u32| {
            let write = &self.writes[*key];
            !write.finished && write.offset < end && offset < write.offset + write.length
        };
        (offset / REGION_BYTES..=(end - 1) / REGION_BYTES).any(|region| {
            let Some(queue) = self.by_region.get(&(region as u32)) else { return false };
            queue.iter().take_while(|key| self.writes[**key].id < id).any(shown)
        })
    }

    /// Every frame up to this id is answered by all members, and none of them left replicas unequal.
    pub fn completed_id(&self) -> u64 {
        let first_failed = self.diverged.values().min().copied().unwrap_or(u64::MAX);
        (self.base_id - 1).min(first_failed.saturating_sub(1))
    }

    pub fn regions_equal(&mut self, regions: &[u32]) {
        for region in regions {
            self.diverged.remove(region);
        }
    }

    /// Remember to say when every write that has an id now is done at all members.
    pub fn barrier(&mut self, token: u64) {
        self.barriers.push((token, self.next_id() - 1));
    }

    /// Barriers that are reached, in the order they were set. Cheap while there are none.
    pub fn take_drained(&mut self) -> Vec<u64> {
        if self.barriers.is_empty() {
            return Vec::new();
        }
        let first_undone = self.ring.iter().find_map(|entry| match entry {
            Entry::Write(key) if !self.writes[*key].answered_by(self.members) => Some(self.writes[*key].id),
            _ => None,
        });
        let first_undone = first_undone.unwrap_or(u64::MAX);
        let mut drained = Vec::new();
        self.barriers.retain(|(token, last_id)| {
            let done = *last_id < first_undone;
            if done {
                drained.push(*token);
            }
            !done
        });
        drained
    }
}

#[cfg(test)]
mod tests;
