//! Blocks that are given a good copy by order, whether anybody reads them or not. A chapter of `shell`.
//!
//! ```text
//!   waiting ──► read from another reader ──► REPAIR to the slot ──► block_repaired
//!                     └── no other has a good copy ──► block_unreadable
//! ```
//!
//! Promises: a repair never brings back what was overwritten: when a write of the block was sent after it was read
//! for the repair, it is read again (the replica itself takes a repair only while its copy does not verify, but
//! that copy may be a newer one gone bad). At most REPAIRS_AT_ONCE_MAX are under way, REPAIRS_QUEUED_MAX in all.
//! An order whose slot has no link in sync is forgotten: whoever resyncs it compares everything that counts.

use std::collections::VecDeque;

use super::answers::{Payload, ReadJob, ReadOp};
use super::commands::Event;
use super::limits::{REPAIRS_AT_ONCE_MAX, REPAIR_READS_MAX};
use super::link::LinkEnd;
use super::readout;
use super::requests::bit;
use super::shell::Shell;
use super::slab::Slab;
use crate::limits::BLOCK_BYTES;

const BLOCK: usize = BLOCK_BYTES as usize;

struct Order {
    slot: usize,
    offset: u64,
    /// A write of this block was sent after it was read.
    overwritten: bool,
    reads: u32,
}

pub struct Repairing {
    /// (slot, block index), oldest first.
    waiting: VecDeque<(usize, u64)>,
    orders: Slab<Order>,
}

impl Repairing {
    pub fn new() -> Self {
        Repairing { waiting: VecDeque::new(), orders: Slab::new() }
    }
}

impl Shell {
    pub(super) fn order_repair(&mut self, slot: usize, block_index: u64) {
        self.repairing.waiting.push_back((slot, block_index));
    }

    /// Begin what waits, as far as the limit goes.
    pub(super) fn start_orders(&mut self) {
        while self.repairing.orders.len() < REPAIRS_AT_ONCE_MAX {
            let Some((slot, block_index)) = self.repairing.waiting.pop_front() else { return };
            let offset = block_index * BLOCK_BYTES;
            let order = self.repairing.orders.insert(Order { slot, offset, overwritten: false, reads: 1 });
            let mut op = ReadOp::new(ReadJob::Order { order }, offset, BLOCK_BYTES);
            op.tried = bit(slot);
            self.start_read(op);
        }
    }

    /// Whatever became of it, its place is free.
    pub(super) fn end_order(&mut self, order: u32) {
        if self.repairing.orders.remove(order).is_some() {
            self.shared.repair_ended();
            // The next one begins in the turn after this: ending may go on inside of beginning.
            self.again |= !self.repairing.waiting.is_empty();
        }
    }

    /// No reader but the damaged one has a good copy.
    pub(super) fn give_up_order(&mut self, order: u32, block_index: u64) {
        self.events.push(Event::BlockUnreadable { block_index });
        self.end_order(order);
    }

    pub(super) fn on_order(
        &mut self,
        key: u32,
        order: u32,
        ok: bool,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        let mut segments = std::mem::take(&mut self.segments);
        let mut bad = std::mem::take(&mut self.bad_blocks);
        segments.clear();
        let offset = self.reads[key].offset;
        let outcome = if ok {
            readout::verify(offset, BLOCK_BYTES, payload.bytes(), &mut segments, &mut bad)
        } else {
            Ok(())
        };
        let found = segments.first().copied();
        (self.segments, self.bad_blocks) = (segments, bad);
        if outcome.is_err() {
            self.requeue_answered(key);
            return Err(LinkEnd::Lost("malformed reply to READ".into()));
        }
        let op = &mut self.reads[key];
        op.id = 0;
        let Some(segment) = found else {
            op.tried |= bit(op.slot);
            self.issue(key);
            return Ok(());
        };
        let entry = &mut self.repairing.orders[order];
        let (slot, stale) = (entry.slot, std::mem::take(&mut entry.overwritten));
        if stale && entry.reads < REPAIR_READS_MAX {
            entry.reads += 1;
            self.issue(key);
            return Ok(());
        }
        self.reads.remove(key);
        let in_sync = self.links[slot].as_ref().is_some_and(|link| link.sync);
        if stale || !in_sync {
            self.end_order(order);
            return Ok(());
        }
        let mut block = [0; BLOCK];
        if let Some(at) = segment.at {
            block.copy_from_slice(&payload.bytes()[at..at + BLOCK]);
        }
        self.send_repair(slot, offset, &block, Some(order));
        Ok(())
    }

    /// A write of these bytes goes out: what was read of them before is no repair any more.
    #[inline]
    pub(super) fn spoil_repairs(&mut self, offset: u64, length: u64) {
        if self.fixes.len() + self.repairing.orders.len() > 0 {
            self.spoil(offset, offset + length);
        }
    }

    fn spoil(&mut self, offset: u64, end: u64) {
        for key in self.repairing.orders.keys() {
            let order = &mut self.repairing.orders[key];
            order.overwritten |= order.offset < end && offset < order.offset + BLOCK_BYTES;
        }
        for key in self.fixes.keys() {
            self.fixes[key].spoil(offset, end);
        }
    }
}
