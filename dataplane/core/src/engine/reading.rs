//! Reads: who is asked, is the answer good, what if not. A chapter of `shell`.
//!
//! Promises (C16): data that does not verify never reaches a client; a block that one replica cannot
//! give is read from another and given back to the first; EIO only when no replica that may serve
//! reads has a good copy. A read without a connected reader waits.

use std::rc::Rc;

use super::answers::{Payload, ReadJob, ReadOp};
use super::buffers::Buf;
use super::commands::Event;
use super::intake::Request;
use super::link::LinkEnd;
use super::nbd::{self, chunk, errno};
use super::readout::{self, Segment};
use super::regions::Touch;
use super::requests::{bit, each, Slots};
use super::shell::{Parked, Shell};
use crate::checksum::block_checksum;
use crate::frame::HEADER_BYTES;
use crate::limits::{BLOCK_BYTES, REGION_BYTES};

const BLOCK: usize = BLOCK_BYTES as usize;

/// A run of zeroes this long is told as a hole; a shorter one is sent as data, because each
/// chunk costs the client a header to read.
const HOLE_BYTES_MIN: u64 = 16 * 1024;

/// Verified bytes of one READ frame, kept until the whole reply can go out.
pub struct PartData {
    pub segments: Vec<Segment>,
    pub payload: Rc<Buf>,
}

/// A part of a read in which some blocks were bad: filled up block by block from others.
pub struct Fix {
    request: u32,
    offset: u64,
    data: Buf,
    pending: u32,
    failed: bool,
    /// Parts written since they were read (from, to): no repair any more.
    spoiled: Vec<(u64, u64)>,
}

impl Fix {
    pub fn spoil(&mut self, offset: u64, end: u64) {
        if self.offset < end && offset < self.offset + self.data.len() as u64 {
            self.spoiled.push((offset, end));
        }
    }
}

enum Choice {
    Slot(usize),
    /// A reader may return, or be named.
    Wait,
    /// Every reader was asked.
    NoneLeft,
}

impl Shell {
    fn choose_reader(&mut self, tried: Slots) -> Choice {
        if self.readers & !tried == 0 {
            return if self.readers == 0 { Choice::Wait } else { Choice::NoneLeft };
        }
        self.fastest_reader(tried).map_or(Choice::Wait, Choice::Slot)
    }

    /// Who of the readers not tried yet should be asked: no slow one if there is another, and of equals the
    /// one with the least to do.
    pub(super) fn fastest_reader(&mut self, tried: Slots) -> Option<usize> {
        let untried = self.readers & !tried;
        let count = self.links.len();
        let mut best: Option<(bool, u32, usize)> = None;
        for step in 0..count {
            let slot = (self.reader_turn + step) % count;
            if untried & bit(slot) == 0 {
                continue;
            }
            if let Some(link) = self.links[slot].as_ref().filter(|link| link.sync) {
                let load = (link.slow, link.reads_in_flight, slot);
                if best.is_none_or(|best| (load.0, load.1) < (best.0, best.1)) {
                    best = Some(load);
                }
            }
        }
        let (_, _, slot) = best?;
        self.reader_turn = (slot + 1) % count;
        Some(slot)
    }

    /// The region a client's read must wait for, if any: until it is equal, replicas may answer
    /// differently, and the first answer would bind all later ones (C9).
    fn gate(&self, key: u32) -> Option<u32> {
        if self.regions.is_quiet() {
            return None;
        }
        let op = &self.reads[key];
        match op.job {
            ReadJob::Data { .. } | ReadJob::Fix { .. } | ReadJob::Status { .. } | ReadJob::Order { .. } => {}
            ReadJob::Cache { .. } | ReadJob::Repair { .. } => return None,
        }
        let last = (op.offset + op.length - 1) / REGION_BYTES;
        (op.offset / REGION_BYTES..=last)
            .map(|region| region as u32)
            .find(|region| self.regions.must_wait(*region, Touch::Read))
    }

    /// Keep a read until its region is equal. True if it must wait.
    pub(super) fn park_at_gate(&mut self, key: u32) -> bool {
        let Some(region) = self.gate(key) else { return false };
        let Some(mut op) = self.reads.remove(key) else { return false };
        op.id = 0;
        self.park(region, Touch::Read, Parked::Read(op));
        true
    }

    /// Ask a replica, now or as soon as one may answer. The gate is looked at each time: a read may have
    /// come before anybody knew that its region is unequal, or may have to be asked again since.
    pub(super) fn issue(&mut self, key: u32) {
        if self.park_at_gate(key) {
            return;
        }
        let tried = self.reads[key].tried;
        match self.choose_reader(tried) {
            Choice::Slot(slot) => self.send_read(key, slot),
            Choice::Wait => self.waiting_reads.push(key),
            Choice::NoneLeft if self.reads[key].unsure != 0 => {
                let op = &mut self.reads[key];
                op.tried &= !std::mem::take(&mut op.unsure);
                self.issue(key);
            }
            Choice::NoneLeft => self.give_up(key),
        }
    }

    /// A slot answered a read with an error.
    pub(super) fn note_failed_whole(&mut self, key: u32, slot: usize) {
        let op = &mut self.reads[key];
        op.tried |= bit(slot);
        if op.length > BLOCK_BYTES {
            op.unsure |= bit(slot);
        }
    }

    fn send_read(&mut self, key: u32, slot: usize) {
        let id = self.table.add_read(key);
        let op = &mut self.reads[key];
        (op.id, op.slot, op.sent_at_us) = (id, slot, self.now_us);
        let header = self.read_header(&self.reads[key], id).encode();
        let Some(link) = self.links[slot].as_mut() else { return };
        link.out.push_copy(&self.pool, &header);
        link.reads_in_flight += 1;
        link.dirty = true;
        self.slot_stats[slot].requests += 1;
        self.watch_read(key);
    }

    /// Its link is gone or too slow: ask another, under a new id. Hints and repairs are let go.
    pub(super) fn reissue(&mut self, key: u32) {
        let op = &mut self.reads[key];
        let (id, slot, sent_at_us) = (op.id, op.slot, op.sent_at_us);
        self.leave_read(slot, id, sent_at_us);
        if self.fall_back(key, slot) {
            return;
        }
        self.reads[key].id = 0;
        self.table.drop_read(id);
        match self.reads[key].job {
            ReadJob::Repair { order } => {
                self.reads.remove(key);
                if let Some(order) = order {
                    self.end_order(order);
                }
            }
            ReadJob::Cache { request } => {
                self.reads.remove(key);
                self.part_done(request, 0);
            }
            _ => self.issue(key),
        }
    }

    pub(super) fn retry_waiting_reads(&mut self) {
        for key in std::mem::take(&mut self.waiting_reads) {
            self.issue(key);
        }
    }

    /// No reader can answer this one.
    fn give_up(&mut self, key: u32) {
        let Some(op) = self.reads.remove(key) else { return };
        match op.job {
            ReadJob::Fix { fix } => {
                self.events.push(Event::BlockUnreadable { block_index: op.offset / BLOCK_BYTES });
                self.fixes[fix].failed = true;
                self.fix_progress(fix);
            }
            ReadJob::Data { request } | ReadJob::Status { request } => self.part_done(request, errno::EIO),
            ReadJob::Cache { request } => self.part_done(request, 0),
            ReadJob::Order { order } => self.give_up_order(order, op.offset / BLOCK_BYTES),
            ReadJob::Repair { order } => {
                if let Some(order) = order {
                    self.end_order(order);
                }
            }
        }
    }

    pub(super) fn on_data(
        &mut self,
        key: u32,
        request: u32,
        ok: bool,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        let (offset, length) = (self.reads[key].offset, self.reads[key].length);
        let mut segments = std::mem::take(&mut self.segments);
        let mut bad = std::mem::take(&mut self.bad_blocks);
        let outcome = if ok {
            readout::verify(offset, length, payload.bytes(), &mut segments, &mut bad)
        } else {
            segments.clear();
            bad.clear();
            bad.extend(offset / BLOCK_BYTES..(offset + length) / BLOCK_BYTES);
            self.note_failed_whole(key, self.reads[key].slot);
            Ok(())
        };
        if outcome.is_err() {
            // The link ends, and what it was asked is asked again elsewhere.
            (self.segments, self.bad_blocks) = (segments, bad);
            self.requeue_answered(key);
            return Err(LinkEnd::Lost("malformed reply to READ".into()));
        }
        if let Some(op) = self.reads.remove(key) {
            if bad.is_empty() {
                self.deliver(request, &segments, payload);
            } else {
                self.begin_fix(&op, request, &segments, &bad, payload.bytes());
            }
        }
        (self.segments, self.bad_blocks) = (segments, bad);
        Ok(())
    }

    /// An answer was useless as a whole: do not ask that slot again, and go on elsewhere.
    pub(super) fn requeue_answered(&mut self, key: u32) {
        let op = &mut self.reads[key];
        op.id = 0;
        // Not now: the link is about to close, and then all that wait are asked again.
        self.waiting_reads.push(key);
    }

    fn begin_fix(&mut self, op: &ReadOp, request: u32, segments: &[Segment], bad: &[u64], payload: &[u8]) {
        let mut data = self.pool.take(op.length as usize);
        for segment in segments {
            let start = (segment.offset - op.offset) as usize;
            let target = &mut data[start..start + segment.length as usize];
            match segment.at {
                Some(at) => target.copy_from_slice(&payload[at..at + segment.length as usize]),
                None => target.fill(0),
            }
        }
        let pending = bad.len() as u32;
        let fix = self.fixes.insert(Fix {
            request,
            offset: op.offset,
            data,
            pending,
            failed: false,
            spoiled: Vec::new(),
        });
        for block in bad {
            let mut one = ReadOp::new(ReadJob::Fix { fix }, block * BLOCK_BYTES, BLOCK_BYTES);
            (one.tried, one.unsure) = (op.tried | bit(op.slot), op.unsure);
            self.start_read(one);
        }
    }

    pub(super) fn on_fix(
        &mut self,
        key: u32,
        fix: u32,
        ok: bool,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        let mut segments = std::mem::take(&mut self.segments);
        let mut bad = std::mem::take(&mut self.bad_blocks);
        let offset = self.reads[key].offset;
        let outcome = if ok {
            readout::verify(offset, BLOCK_BYTES, payload.bytes(), &mut segments, &mut bad)
        } else {
            segments.clear();
            Ok(())
        };
        let found = segments.first().copied();
        (self.segments, self.bad_blocks) = (segments, bad);
        if outcome.is_err() {
            self.requeue_answered(key);
            return Err(LinkEnd::Lost("malformed reply to READ".into()));
        }
        let Some(segment) = found else {
            let op = &mut self.reads[key];
            op.id = 0;
            op.tried |= bit(op.slot);
            self.issue(key);
            return Ok(());
        };
        let Some(op) = self.reads.remove(key) else { return Ok(()) };
        let start = (offset - self.fixes[fix].offset) as usize;
        let target = &mut self.fixes[fix].data[start..start + BLOCK];
        match segment.at {
            Some(at) => target.copy_from_slice(&payload.bytes()[at..at + BLOCK]),
            None => target.fill(0),
        }
        let block = <[u8; BLOCK]>::try_from(&*target).expect("one block");
        let spoiled = |(from, to): &(u64, u64)| *from < offset + BLOCK_BYTES && offset < *to;
        if !self.fixes[fix].spoiled.iter().any(spoiled) {
            for slot in each(op.tried & self.attached) {
                self.send_repair(slot, offset, &block, None);
            }
        }
        self.fix_progress(fix);
        Ok(())
    }

    /// Give a slot the good copy. The replica takes it only if its own does not verify at that moment.
    pub(super) fn send_repair(&mut self, slot: usize, offset: u64, block: &[u8; BLOCK], order: Option<u32>) {
        let mut buf = self.pool.take(HEADER_BYTES + 8 + BLOCK);
        let sum = block_checksum(offset / BLOCK_BYTES, block);
        buf[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&sum.to_le_bytes());
        buf[HEADER_BYTES + 8..].copy_from_slice(block);
        let mut op = ReadOp::new(ReadJob::Repair { order }, offset, BLOCK_BYTES);
        (op.slot, op.sent_at_us) = (slot, self.now_us);
        let key = self.reads.insert(op);
        let id = self.table.add_read(key);
        self.reads[key].id = id;
        let mut header = self.read_header(&self.reads[key], id);
        header.payload_bytes = (8 + BLOCK) as u32;
        buf[..HEADER_BYTES].copy_from_slice(&header.encode());
        let Some(link) = self.links[slot].as_mut() else { return };
        let length = buf.len();
        link.out.push_whole(Rc::new(buf), 0, length);
        link.reads_in_flight += 1;
        link.dirty = true;
        self.slot_stats[slot].requests += 1;
    }

    fn fix_progress(&mut self, key: u32) {
        let fix = &mut self.fixes[key];
        fix.pending -= 1;
        if fix.pending > 0 {
            return;
        }
        let Some(fix) = self.fixes.remove(key) else { return };
        if fix.failed {
            self.part_done(fix.request, errno::EIO);
            return;
        }
        let whole = Segment { offset: fix.offset, length: fix.data.len() as u64, at: Some(0) };
        self.deliver(fix.request, &[whole], Payload::Owned(Rc::new(fix.data)));
    }

    /// A part of a READ is verified: queue it, or keep it until the reply is whole.
    fn deliver(&mut self, key: u32, segments: &[Segment], payload: Payload<'_>) {
        let request = &mut self.requests[key];
        let Some(client) =
            self.clients.get_mut(request.client).filter(|client| client.client_id == request.client_id)
        else {
            self.part_done(key, 0);
            return;
        };
        let in_one = !client.terms.structured || request.flags & nbd::flag::DF != 0;
        // The last part, and none before it: the reply needs no waiting for others.
        let only = request.pending == 1 && request.parts.is_empty();
        if in_one && request.error != 0 {
            // The reply will be that error alone.
        } else if in_one && !only {
            let payload = match payload {
                Payload::Owned(buf) => buf,
                Payload::Borrowed(bytes) => {
                    let mut buf = self.pool.take(bytes.len());
                    buf.copy_from_slice(bytes);
                    Rc::new(buf)
                }
            };
            request.parts.push(PartData { segments: segments.to_vec(), payload });
        } else if in_one {
            self.queue_whole_header(key);
            self.queue_segments(key, segments, &payload);
        } else {
            self.queue_chunks(key, segments, &payload);
        }
        self.part_done(key, 0);
    }

    /// Header in front of all the data of a reply in one piece.
    fn queue_whole_header(&mut self, key: u32) {
        let request = &self.requests[key];
        let (cookie, offset, end) = (request.cookie, request.offset, request.end);
        let client = &mut self.clients[request.client];
        if client.terms.structured {
            let length = (end - offset) as u32 + 8;
            let header = nbd::chunk_header(cookie, chunk::FLAG_DONE, chunk::OFFSET_DATA, length);
            client.out.push_copy(&self.pool, &header);
            client.out.push_copy(&self.pool, &offset.to_be_bytes());
        } else {
            client.out.push_copy(&self.pool, &nbd::simple_reply(cookie, 0));
        }
    }

    fn queue_segments(&mut self, key: u32, segments: &[Segment], payload: &Payload<'_>) {
        let request = &self.requests[key];
        let out = &mut self.clients[request.client].out;
        for segment in segments.iter().filter_map(|segment| segment.clip(request.offset, request.end)) {
            queue_segment(out, &self.pool, &self.zeroes, &segment, payload);
        }
    }

    /// Queue verified bytes as chunks: holes for long runs of zeroes, data for the rest.
    fn queue_chunks(&mut self, key: u32, segments: &[Segment], payload: &Payload<'_>) {
        let request = &self.requests[key];
        let (cookie, offset, end) = (request.cookie, request.offset, request.end);
        let done = request.pending == 1 && request.error == 0;
        let out = &mut self.clients[request.client].out;
        let mut clipped: Vec<Segment> = Vec::with_capacity(segments.len());
        clipped.extend(segments.iter().filter_map(|segment| segment.clip(offset, end)));
        let is_hole = |segment: &Segment| {
            segment.at.is_none() && (segment.length >= HOLE_BYTES_MIN || clipped.len() == 1)
        };
        let mut next = 0;
        while let Some(first) = clipped.get(next) {
            let mut stop = next + 1;
            if !is_hole(first) {
                stop += clipped[stop..].iter().take_while(|segment| !is_hole(segment)).count();
            }
            let flags = if done && stop == clipped.len() { chunk::FLAG_DONE } else { 0 };
            if is_hole(first) {
                out.push_copy(&self.pool, &nbd::chunk_header(cookie, flags, chunk::OFFSET_HOLE, 12));
                out.push_copy(&self.pool, &first.offset.to_be_bytes());
                out.push_copy(&self.pool, &(first.length as u32).to_be_bytes());
            } else {
                let length: u64 = clipped[next..stop].iter().map(|segment| segment.length).sum();
                let header = nbd::chunk_header(cookie, flags, chunk::OFFSET_DATA, length as u32 + 8);
                out.push_copy(&self.pool, &header);
                out.push_copy(&self.pool, &first.offset.to_be_bytes());
                for segment in &clipped[next..stop] {
                    queue_segment(out, &self.pool, &self.zeroes, segment, payload);
                }
            }
            next = stop;
        }
        let client = request.client;
        self.mark_client_dirty(client);
    }

    /// All parts of a READ are in (or failed): whatever of its reply is not queued yet.
    pub(super) fn finish_read_reply(&mut self, mut request: Request, structured: bool) {
        let out = &mut self.clients[request.client].out;
        if request.error != 0 {
            if structured {
                out.push_copy(&self.pool, &nbd::error_chunk(request.cookie, request.error));
            } else {
                out.push_copy(&self.pool, &nbd::simple_reply(request.cookie, request.error));
            }
            return;
        }
        if request.offset == request.end {
            let empty = nbd::chunk_header(request.cookie, chunk::FLAG_DONE, chunk::NONE, 0);
            let simple = nbd::simple_reply(request.cookie, 0);
            out.push_copy(&self.pool, if structured { &empty } else { &simple });
            return;
        }
        if request.parts.is_empty() {
            return;
        }
        if structured {
            let length = (request.end - request.offset) as u32 + 8;
            let header = nbd::chunk_header(request.cookie, chunk::FLAG_DONE, chunk::OFFSET_DATA, length);
            out.push_copy(&self.pool, &header);
            out.push_copy(&self.pool, &request.offset.to_be_bytes());
        } else {
            out.push_copy(&self.pool, &nbd::simple_reply(request.cookie, 0));
        }
        request.parts.sort_unstable_by_key(|part| part.segments.first().map_or(0, |s| s.offset));
        for part in request.parts {
            let payload = Payload::Owned(part.payload);
            for segment in part.segments.iter().filter_map(|s| s.clip(request.offset, request.end)) {
                queue_segment(out, &self.pool, &self.zeroes, &segment, &payload);
            }
        }
    }

    pub(super) fn on_status(
        &mut self,
        key: u32,
        request_key: u32,
        ok: bool,
        payload: Payload<'_>,
    ) -> Result<(), LinkEnd> {
        if !ok {
            let op = &mut self.reads[key];
            op.id = 0;
            op.tried |= bit(op.slot);
            self.issue(key);
            return Ok(());
        }
        let request = &self.requests[request_key];
        let (from, end) = (self.reads[key].offset, self.reads[key].offset + self.reads[key].length);
        let one = request.flags & nbd::flag::REQ_ONE != 0;
        let stop = request.end.min(end);
        let Ok(extents) = readout::extents(from, request.offset, stop, one, payload.bytes()) else {
            self.requeue_answered(key);
            return Err(LinkEnd::Lost("malformed reply to BLOCK_STATUS".into()));
        };
        self.reads.remove(key);
        let client = self.clients.get_mut(request.client).filter(|c| c.client_id == request.client_id);
        if let Some(client) = client {
            let length = 4 + 8 * extents.len() as u32;
            let header = nbd::chunk_header(request.cookie, chunk::FLAG_DONE, chunk::BLOCK_STATUS, length);
            client.out.push_copy(&self.pool, &header);
            client.out.push_copy(&self.pool, &client.terms.meta_context.to_be_bytes());
            for (length, state) in extents {
                client.out.push_copy(&self.pool, &length.to_be_bytes());
                client.out.push_copy(&self.pool, &state.to_be_bytes());
            }
        }
        self.part_done(request_key, 0);
        Ok(())
    }
}

fn queue_segment(
    out: &mut super::buffers::SendQueue,
    pool: &super::buffers::Pool,
    zeroes: &Rc<Buf>,
    segment: &Segment,
    payload: &Payload<'_>,
) {
    let length = segment.length as usize;
    match (segment.at, payload) {
        (Some(at), Payload::Owned(buf)) => out.push_shared(pool, buf, at, at + length),
        (Some(at), Payload::Borrowed(bytes)) => out.push_copy(pool, &bytes[at..at + length]),
        (None, _) => {
            let mut left = length;
            while left > 0 {
                let count = left.min(zeroes.len());
                out.push_shared(pool, zeroes, 0, count);
                left -= count;
            }
        }
    }
}
