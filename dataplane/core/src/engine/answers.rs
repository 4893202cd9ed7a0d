//! From a link's bytes to outcomes and replies. A chapter of `shell`.
//!
//! Promises: a link that sends anything but frames is closed; an answer nobody waits for is dropped;
//! a reply goes to the client that asked, once.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::buffers::Buf;
use super::commands::Event;
use super::hedging::Second;
use super::link::{Arriving, Link, LinkEnd};
use super::nbd::{self, Command};
use super::requests::{bit, each, Again, Entry, Outcome, Slots};
use super::shell::Shell;
use crate::frame::{kind, status, Header, HEADER_BYTES, REPLY};

/// A frame that goes to one link.
pub enum ReadJob {
    /// Part of an NBD READ.
    Data {
        request: u32,
    },
    /// One block that another replica has no good copy of.
    Fix {
        fix: u32,
    },
    Status {
        request: u32,
    },
    Cache {
        request: u32,
    },
    /// One block that a slot is to be given.
    Order {
        order: u32,
    },
    /// A good copy for a slot that has none. `order`: the one it ends.
    Repair {
        order: Option<u32>,
    },
}

pub struct ReadOp {
    pub job: ReadJob,
    pub offset: u64,
    pub length: u64,
    /// 0 while it waits for a reader.
    pub id: u64,
    pub slot: usize,
    /// Slots that have no good copy, or could not say.
    pub tried: Slots,
    /// Of those: slots that failed a longer read as a whole. Each of its blocks may be good there.
    pub unsure: Slots,
    pub sent_at_us: u64,
    pub second: Option<Second>,
}

impl ReadOp {
    pub fn new(job: ReadJob, offset: u64, length: u64) -> Self {
        ReadOp { job, offset, length, id: 0, slot: 0, tried: 0, unsure: 0, sent_at_us: 0, second: None }
    }
}

/// A reply's payload: in the scratch buffer, or in one of its own when it was long.
pub enum Payload<'a> {
    Borrowed(&'a [u8]),
    Owned(Rc<Buf>),
}

impl Payload<'_> {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Payload::Borrowed(bytes) => bytes,
            Payload::Owned(buf) => buf,
        }
    }
}

impl Shell {
    pub(super) fn attach_link(&mut self, slot: usize, generation: u64, fd: OwnedFd, sync: bool) {
        if let Some(old) = &self.links[slot] {
            let old_generation = old.generation;
            self.close_link(slot, old_generation, LinkEnd::Lost("replaced by a new link".into()));
            self.run_outcomes();
        }
        if !self.watch_link(slot, &fd) {
            let reason = "cannot watch the socket".into();
            self.events.push(Event::LinkLost { slot, generation, reason });
            return;
        }
        let sync = sync || self.table.members() & bit(slot) != 0;
        let mut link = Link::new(generation, fd, sync, self.now_us);
        link.dirty = true;
        self.links[slot] = Some(link);
        self.attached |= bit(slot);
        self.lease.forget(slot);
        self.timers.tell_completed_again();
        if sync {
            for again in self.table.resend(slot) {
                let frame = match again {
                    Again::Frame(frame) => frame,
                    Again::Flush(request_id) => self.flush_frame(request_id),
                };
                self.send_frame(slot, frame);
            }
        }
        self.retry_waiting_reads();
    }

    fn flush_frame(&self, request_id: u64) -> Rc<Buf> {
        let header = Header { kind: kind::FLUSH, request_id, epoch: self.epoch, ..Header::default() };
        let mut buf = self.pool.take(HEADER_BYTES);
        buf.copy_from_slice(&header.encode());
        Rc::new(buf)
    }

    /// End a link if it still is the one of this generation. Its reads go to others at once; its
    /// writes wait for Python's decision.
    pub(super) fn close_link(&mut self, slot: usize, generation: u64, end: LinkEnd) {
        if self.links[slot].as_ref().is_none_or(|link| link.generation != generation) {
            return;
        }
        let Some(link) = self.links[slot].take() else { return };
        self.unwatch(&link.fd);
        self.attached &= !bit(slot);
        match end {
            LinkEnd::Lost(reason) => self.events.push(Event::LinkLost { slot, generation, reason }),
            LinkEnd::Failed(status) => self.events.push(Event::LinkFailed { slot, generation, status }),
            LinkEnd::Stalled => self.events.push(Event::LinkStalled { slot, generation }),
            LinkEnd::Detached => {}
        }
        self.table.link_gone(slot, &mut self.outcomes);
        let asked = |op: &ReadOp| op.slot == slot || op.second.is_some_and(|second| second.slot == slot);
        let lost: Vec<u32> =
            self.reads.iter().filter(|(_, op)| op.id != 0 && asked(op)).map(|(key, _)| key).collect();
        for key in lost {
            if !self.fall_back(key, slot) {
                self.reissue(key);
            }
        }
        self.compare_paces();
        self.retry_waiting_reads();
    }

    pub(super) fn on_link_ready(&mut self, slot: usize, flags: EventFlags) {
        let Some(link) = self.links.get_mut(slot).and_then(Option::as_mut) else { return };
        let generation = link.generation;
        if flags.contains(EventFlags::OUT) {
            link.out_blocked = false;
            self.send_link(slot);
        }
        if flags.contains(EventFlags::IN) {
            let mut scratch = std::mem::take(&mut self.scratch);
            let outcome = self.read_link(slot, generation, &mut scratch);
            self.scratch = scratch;
            if let Err(end) = outcome {
                self.close_link(slot, generation, end);
                return;
            }
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.close_link(slot, generation, LinkEnd::Lost("the replica hung up".into()));
        }
    }

    fn read_link(&mut self, slot: usize, generation: u64, scratch: &mut [u8]) -> Result<(), LinkEnd> {
        let Some(link) = self.links[slot].as_mut() else { return Ok(()) };
        let carried = link.head_bytes;
        let mut direct = 0;
        let result = match &mut link.arriving {
            Some(arriving) => {
                let target = &mut arriving.buf[arriving.filled..];
                direct = target.len();
                rustix::io::readv(&link.fd, &mut [IoSliceMut::new(target), IoSliceMut::new(scratch)])
            }
            None => {
                scratch[..carried].copy_from_slice(&link.head[..carried]);
                rustix::io::read(&link.fd, &mut scratch[carried..])
            }
        };
        self.received_us = self.clock_us();
        let Some(link) = self.links[slot].as_mut() else { return Ok(()) };
        let count = match result {
            Ok(0) => return Err(LinkEnd::Lost("the replica closed the connection".into())),
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(LinkEnd::Lost(format!("receive: {error}"))),
        };
        self.slot_stats[slot].bytes += count as u64;
        let placed = count.min(direct);
        if let Some(mut arriving) = link.arriving.take() {
            arriving.filled += placed;
            if arriving.filled < arriving.buf.len() {
                link.arriving = Some(arriving);
                return Ok(());
            }
            self.on_frame(slot, &arriving.header, Payload::Owned(Rc::new(arriving.buf)))?;
        } else {
            link.head_bytes = 0;
        }
        self.parse_frames(slot, generation, &scratch[..carried + count - placed])
    }

    fn parse_frames(&mut self, slot: usize, generation: u64, data: &[u8]) -> Result<(), LinkEnd> {
        let mut at = 0;
        loop {
            // An answer may have ended this link.
            let Some(link) = self.links[slot].as_mut().filter(|link| link.generation == generation) else {
                return Ok(());
            };
            let Some(head) = data.get(at..at + HEADER_BYTES) else {
                link.head_bytes = data.len() - at;
                link.head[..link.head_bytes].copy_from_slice(&data[at..]);
                return Ok(());
            };
            let head: &[u8; HEADER_BYTES] = head.try_into().expect("48 bytes");
            let header =
                Header::decode(head).map_err(|error| LinkEnd::Lost(format!("bad frame: {error:?}")))?;
            at += HEADER_BYTES;
            let length = header.payload_bytes as usize;
            let Some(payload) = data.get(at..at + length) else {
                let mut buf = self.pool.take(length);
                let filled = data.len() - at;
                buf[..filled].copy_from_slice(&data[at..]);
                link.arriving = Some(Arriving { header, buf, filled });
                return Ok(());
            };
            at += length;
            self.on_frame(slot, &header, Payload::Borrowed(payload))?;
        }
    }

    fn on_frame(&mut self, slot: usize, header: &Header, payload: Payload<'_>) -> Result<(), LinkEnd> {
        if header.kind & REPLY == 0 || header.epoch != self.epoch {
            return Err(LinkEnd::Lost("a frame that is no reply of this epoch".into()));
        }
        if header.status == status::STALE_EPOCH {
            return Err(LinkEnd::Failed(status::STALE_EPOCH));
        }
        if header.kind == kind::LEASE | REPLY {
            return self.on_lease_answer(slot, header);
        }
        match self.table.entry(header.request_id) {
            Entry::Write(_) => self.on_write_answer(slot, header),
            Entry::Read(key) => self.on_read_answer(slot, key, header, payload),
            Entry::None => {
                self.on_late_answer(slot, header.request_id);
                Ok(())
            }
        }
    }

    fn on_lease_answer(&mut self, slot: usize, header: &Header) -> Result<(), LinkEnd> {
        let Some(link) = self.links[slot].as_mut() else { return Ok(()) };
        let Some(asked) = link.lease_asked.filter(|asked| asked.number == header.request_id) else {
            return Ok(());
        };
        link.lease_asked = None;
        if header.status != status::OK {
            return Err(LinkEnd::Failed(header.status));
        }
        self.lease.shown(slot, asked.sent_at_us);
        Ok(())
    }

    fn on_write_answer(&mut self, slot: usize, header: &Header) -> Result<(), LinkEnd> {
        match header.status {
            status::OK | status::NO_SPACE | status::IO_ERROR => {}
            other => return Err(LinkEnd::Failed(other)),
        }
        let answered = self.table.answer(slot, header.request_id, header.status, &mut self.outcomes);
        if let (Some(sent_at_us), Some(link)) = (answered, self.links[slot].as_mut()) {
            link.writes_in_flight = link.writes_in_flight.saturating_sub(1);
            if header.status == status::OK {
                self.lease.shown(slot, sent_at_us);
            }
            let since = sent_at_us.max(link.attached_us);
            self.slot_stats[slot].latency_us_sum += self.now_us.saturating_sub(since);
        }
        Ok(())
    }

    fn on_read_answer(
        &mut self,
        slot: usize,
        key: u32,
        header: &Header,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        let op = &self.reads[key];
        let by_second = op.second.filter(|second| second.id == header.request_id);
        let (id, asked, sent_at_us) = by_second
            .map_or((op.id, op.slot, op.sent_at_us), |second| (second.id, second.slot, second.sent_at_us));
        if asked != slot || id != header.request_id {
            return Ok(());
        }
        match (&op.job, header.status) {
            (_, status::OK | status::IO_ERROR) => {}
            // A hint that is refused does no harm.
            (ReadJob::Cache { .. } | ReadJob::Repair { .. }, _) => {}
            (_, other) => return Err(LinkEnd::Failed(other)),
        }
        let took_us = self.now_us.saturating_sub(sent_at_us);
        self.slot_stats[slot].latency_us_sum += took_us;
        let ok = header.status == status::OK;
        let mut first = false;
        if let Some(link) = self.links[slot].as_mut() {
            link.reads_in_flight = link.reads_in_flight.saturating_sub(1);
            first = !link.pace.is_known();
            link.pace.took(took_us, link.slow);
        }
        if first {
            self.compare_paces();
        }
        if ok {
            self.lease.shown(slot, sent_at_us);
        } else if self.fall_back(key, slot) {
            self.note_failed_whole(key, slot);
            return Ok(());
        }
        self.settle_race(key, slot, id);
        self.table.drop_read(id);
        // Its region diverged while it was under way: what this replica says may not be what remains.
        if self.park_at_gate(key) {
            return Ok(());
        }
        if !ok {
            return self.take_answer(key, slot, false, payload);
        }
        match self.hold_back(key, slot, header.request_id, payload) {
            Some(payload) => self.take_answer(key, slot, true, payload),
            None => Ok(()),
        }
    }

    /// What a replica answered, once it may be seen.
    pub(super) fn take_answer(
        &mut self,
        key: u32,
        slot: usize,
        ok: bool,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        match self.reads[key].job {
            ReadJob::Data { request } => self.on_data(key, request, ok, payload),
            ReadJob::Fix { fix } => self.on_fix(key, fix, ok, payload),
            ReadJob::Status { request } => self.on_status(key, request, ok, payload),
            ReadJob::Cache { request } => {
                self.reads.remove(key);
                self.part_done(request, 0);
                Ok(())
            }
            ReadJob::Order { order } => self.on_order(key, order, ok, payload),
            ReadJob::Repair { order } => {
                if let (Some(op), true) = (self.reads.remove(key), ok) {
                    self.counters.repairs += 1;
                    let block_index = op.offset / crate::limits::BLOCK_BYTES;
                    self.events.push(Event::BlockRepaired { slot, block_index });
                }
                if let Some(order) = order {
                    self.end_order(order);
                }
                Ok(())
            }
        }
    }

    /// Do what the table decided, until it decides nothing more.
    pub(super) fn run_outcomes(&mut self) {
        let mut next = 0;
        while let Some(outcome) = self.outcomes.get(next).copied() {
            next += 1;
            match outcome {
                Outcome::Finished { request, error } => self.part_done(request, error),
                Outcome::CloseLink { slot, status } => {
                    if let Some(generation) = self.links[slot].as_ref().map(|link| link.generation) {
                        self.close_link(slot, generation, LinkEnd::Failed(status));
                    }
                }
                Outcome::Diverged { region } => {
                    self.regions.add_unequal(region);
                    self.events.push(Event::RegionDiverged { region_index: region });
                }
            }
        }
        self.outcomes.clear();
    }

    /// One part of a request is done (or no more parts will come): reply when it was the last.
    pub(super) fn part_done(&mut self, key: u32, error: u32) {
        let Some(request) = self.requests.get_mut(key) else { return };
        request.pending -= 1;
        if error != 0 && request.error == 0 {
            request.error = error;
        }
        if matches!(request.command, Command::Trim | Command::WriteZeroes) {
            if request.error != 0 {
                request.next_offset = request.end;
            }
            self.continue_zeroes(key);
        }
        if self.requests[key].pending == 0 {
            self.complete(key);
        }
    }

    fn complete(&mut self, key: u32) {
        let Some(request) = self.requests.remove(key) else { return };
        if request.command == Command::Read {
            self.reads_reserved -= request.charged;
        }
        let latency_us = self.now_us.saturating_sub(request.started_us);
        let bytes = request.end - request.offset;
        let counters = &mut self.counters;
        counters.errors += u64::from(request.error != 0);
        match request.command {
            Command::Read => {
                counters.reads += 1;
                counters.read_bytes += bytes;
                counters.latency_read.record(latency_us);
            }
            Command::Write => {
                counters.writes += 1;
                counters.write_bytes += bytes;
                counters.latency_write.record(latency_us);
            }
            Command::Flush => {
                counters.flushes += 1;
                counters.latency_flush.record(latency_us);
            }
            Command::Trim => counters.trims += 1,
            Command::WriteZeroes => counters.zeroes += 1,
            Command::Cache | Command::BlockStatus | Command::Disconnect => {}
        }
        let Some(client) = self.clients.get_mut(request.client) else { return };
        if client.client_id != request.client_id {
            return;
        }
        client.requests -= 1;
        client.bytes -= request.charged;
        let structured = client.terms.structured;
        let client_key = request.client;
        match request.command {
            Command::Read => self.finish_read_reply(request, structured),
            // A good answer was queued when it came.
            Command::BlockStatus if request.error == 0 => {}
            Command::BlockStatus => {
                client.out.push_copy(&self.pool, &nbd::error_chunk(request.cookie, request.error));
            }
            _ => client.out.push_copy(&self.pool, &nbd::simple_reply(request.cookie, request.error)),
        }
        self.mark_client_dirty(client_key);
    }

    /// Is any slot connected that may serve reads?
    pub(super) fn any_reader(&self) -> bool {
        each(self.readers & self.attached).any(|slot| self.links[slot].as_ref().is_some_and(|l| l.sync))
    }

    /// Enter a read and ask for it.
    pub(super) fn start_read(&mut self, op: ReadOp) {
        let key = self.reads.insert(op);
        self.issue(key);
    }

    /// The frame of a read: a header only.
    pub(super) fn read_header(&self, op: &ReadOp, id: u64) -> Header {
        Header {
            kind: match op.job {
                ReadJob::Data { .. } | ReadJob::Fix { .. } | ReadJob::Order { .. } => kind::READ,
                ReadJob::Status { .. } => kind::BLOCK_STATUS,
                ReadJob::Cache { .. } => kind::CACHE,
                ReadJob::Repair { .. } => kind::REPAIR,
            },
            flags: 0,
            request_id: id,
            epoch: self.epoch,
            offset_bytes: op.offset,
            length_bytes: op.length as u32,
            payload_bytes: 0,
            status: 0,
        }
    }
}
