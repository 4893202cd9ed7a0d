//! Answers of replicas that no client may see yet. A chapter of `shell`.
//!
//! Promises: data read by a replica goes to a client only
//! - while the read lease holds (C11; `lease`), looked at after the data was received, and
//! - when every write that it may show is done at all members (C9): a write that only some replicas hold may
//!   be lost with them, and who has read it would see it vanish.
//!
//! Whatever is held goes on as soon as both are true, in the order in which it came. A held read asks the
//! replicas for a lease; nothing here is ever asked for while nobody reads.

use std::rc::Rc;

use super::answers::{Payload, ReadJob};
use super::buffers::Buf;
use super::link::LeaseAsked;
use super::requests::each;
use super::shell::Shell;
use crate::frame::{kind, Header};

/// A good answer to a read, with the number under which it was asked.
pub struct HeldAnswer {
    key: u32,
    id: u64,
    slot: usize,
    generation: u64,
    payload: Rc<Buf>,
}

impl Shell {
    /// Keep an answer that must not be seen yet. Gives it back if it may.
    pub(super) fn hold_back<'a>(
        &mut self,
        key: u32,
        slot: usize,
        id: u64,
        payload: Payload<'a>,
    ) -> Option<Payload<'a>> {
        let op = &mut self.reads[key];
        if !matches!(op.job, ReadJob::Data { .. } | ReadJob::Fix { .. } | ReadJob::Status { .. }) {
            return Some(payload);
        }
        let covered = self.lease.covers(self.received_us);
        let settled = !self.table.shows_unfinished(op.offset, op.offset + op.length, id);
        if covered && settled {
            return Some(payload);
        }
        self.counters.lease_waits += u64::from(!covered);
        self.counters.order_waits += u64::from(covered);
        op.id = 0;
        let payload = match payload {
            Payload::Owned(buf) => buf,
            Payload::Borrowed(bytes) => {
                let mut buf = self.pool.take(bytes.len());
                buf.copy_from_slice(bytes);
                Rc::new(buf)
            }
        };
        let generation = self.links[slot].as_ref().map_or(0, |link| link.generation);
        self.held_answers.push(HeldAnswer { key, id, slot, generation, payload });
        None
    }

    /// Let go what may be seen now; for the rest, ask for what it waits for.
    pub(super) fn release_held(&mut self) {
        if self.held_answers.is_empty() {
            return;
        }
        self.drop_undecided();
        // The clock as it is now: the turn may have begun before a pause of ours.
        if !self.lease.covers(self.clock_us()) {
            self.ask_lease();
            return;
        }
        for answer in std::mem::take(&mut self.held_answers) {
            let HeldAnswer { key, id, slot, generation, payload } = answer;
            let (offset, length) = (self.reads[key].offset, self.reads[key].length);
            if self.table.shows_unfinished(offset, offset + length, id) {
                self.held_answers.push(HeldAnswer { key, id, slot, generation, payload });
            } else if let Err(end) = self.take_answer(key, slot, true, Payload::Owned(payload)) {
                self.close_link(slot, generation, end);
                // Where that link has gone already, nothing else asks again what it answered so badly.
                self.retry_waiting_reads();
            }
        }
    }

    /// May one go now? What it waited for may have come late in a turn, and nothing else may wake the loop.
    pub(super) fn release_is_due(&mut self) -> bool {
        if self.held_answers.is_empty() || !self.lease.covers(self.now_us) {
            return false;
        }
        let settled = |answer: &HeldAnswer| {
            let op = &self.reads[answer.key];
            !self.table.shows_unfinished(op.offset, op.offset + op.length, answer.id)
        };
        self.held_answers.iter().any(settled)
    }

    /// A region that diverged is decided anew, perhaps against what a held answer shows: that one is asked again
    /// afterwards. Also called before a region counts as equal again, whatever the answer still waits for.
    pub(super) fn drop_undecided(&mut self) {
        if self.regions.is_quiet() {
            return;
        }
        let mut held = std::mem::take(&mut self.held_answers);
        held.retain(|answer| !self.park_at_gate(answer.key));
        self.held_answers = held;
    }

    /// Does an answer wait for a lease?
    pub(super) fn lease_is_missed(&mut self) -> bool {
        !self.held_answers.is_empty() && !self.lease.covers(self.now_us)
    }

    /// Ask those whose last answer is too old, one frame under way per link.
    pub(super) fn ask_lease(&mut self) {
        let slots = self.lease.aging(self.now_us) & self.attached;
        for slot in each(slots) {
            let Some(link) = self.links[slot].as_mut().filter(|link| link.lease_asked.is_none()) else {
                continue;
            };
            self.lease_number += 1;
            let request_id = self.lease_number;
            let header = Header { kind: kind::LEASE, request_id, epoch: self.epoch, ..Header::default() };
            link.out.push_copy(&self.pool, &header.encode());
            link.lease_asked = Some(LeaseAsked { number: request_id, sent_at_us: self.now_us });
            link.dirty = true;
            self.counters.lease_frames += 1;
        }
    }
}
