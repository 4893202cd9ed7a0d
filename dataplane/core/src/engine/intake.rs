//! From a client's bytes to frames on all links. A chapter of `shell`.
//!
//! Promises: a payload is dispatched frame by frame as it arrives, never held whole; past a limit the
//! client is not read; what one client does wrong is answered to it alone.

use std::io::IoSliceMut;
use std::rc::Rc;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::answers::{ReadJob, ReadOp};
use super::buffers::Buf;
use super::client::{Filling, Intake};
use super::limits::{CACHE_BYTES_MAX, ENGINE_BYTES_MAX, ENGINE_REQUESTS_MAX, ZERO_PARTS_IN_FLIGHT_MAX};
use super::nbd::{self, Command, RawRequest, Terms, REQUEST_BYTES};
use super::plan::{self, Piece};
use super::reading::PartData;
use super::regions::Touch;
use super::requests::{each, NewWrite};
use super::shell::{Parked, Shell};
use crate::checksum::{block_checksum, fragment_checksum};
use crate::frame::{flag, kind, Header, HEADER_BYTES};
use crate::limits::{BLOCK_BYTES, NBD_REQUEST_BYTES_MAX, REGION_BYTES};

/// An NBD request between its header and its reply.
pub struct Request {
    pub client: u32,
    /// Tells this client from a later one with the same key.
    pub client_id: u64,
    pub cookie: u64,
    pub command: Command,
    pub flags: u16,
    pub offset: u64,
    pub end: u64,
    /// Parts under way, and one more while parts may still be added.
    pub pending: u32,
    pub error: u32,
    /// Data counted against the client.
    pub charged: u64,
    pub started_us: u64,
    /// WRITE_ZEROES and TRIM: where the next part begins.
    pub next_offset: u64,
    /// Reads that must be answered in one piece: the parts so far.
    pub parts: Vec<PartData>,
}

/// A write, zeroes, trim or flush frame before it has an id. `buf` has room for the header in front.
pub struct Mutation {
    pub kind: u8,
    pub flags: u16,
    pub offset: u64,
    pub length: u64,
    pub buf: Buf,
    pub request: u32,
}

impl Mutation {
    fn touch(&self) -> Touch {
        if self.kind == kind::WRITE_PARTIAL {
            Touch::Partial
        } else {
            Touch::Whole
        }
    }
}

/// Where a piece's data stands in its frame: behind the header and the checksums.
fn data_start(piece: &Piece) -> usize {
    let sums = if piece.partial { 1 } else { (piece.length / BLOCK_BYTES) as usize };
    HEADER_BYTES + 8 * sums
}

/// Write the checksums of a complete piece in front of its data.
fn seal(piece: &Piece, buf: &mut Buf) {
    let start = data_start(piece);
    let (head, data) = buf.split_at_mut(start);
    let sums = &mut head[HEADER_BYTES..];
    if piece.partial {
        sums.copy_from_slice(&fragment_checksum(piece.offset, data).to_le_bytes());
        return;
    }
    let first = piece.offset / BLOCK_BYTES;
    for (index, block) in data.chunks_exact(BLOCK_BYTES as usize).enumerate() {
        let sum = block_checksum(first + index as u64, block);
        sums[index * 8..index * 8 + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

impl Shell {
    pub(super) fn on_client_ready(&mut self, key: u32, flags: EventFlags) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if flags.contains(EventFlags::OUT) {
            client.out_blocked = false;
            self.send_client(key);
        }
        if flags.contains(EventFlags::IN) {
            let mut scratch = std::mem::take(&mut self.scratch);
            let outcome = self.read_client(key, &mut scratch);
            self.scratch = scratch;
            if let Err(reason) = outcome {
                self.close_client(key, &reason);
                return;
            }
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.close_client(key, "the client hung up");
        }
    }

    /// One read: first into a payload that has begun, the rest into `scratch`.
    fn read_client(&mut self, key: u32, scratch: &mut [u8]) -> Result<(), String> {
        let Some(client) = self.clients.get_mut(key) else { return Ok(()) };
        if client.blocked || client.closing.is_some() {
            return Ok(());
        }
        let carried = client.stash.len();
        scratch[..carried].copy_from_slice(&client.stash);
        let mut direct = 0;
        let result = match &mut client.intake {
            Intake::Payload { filling: Some(filling), .. } if carried == 0 => {
                let target = &mut filling.buf[filling.next..];
                direct = target.len();
                rustix::io::readv(&client.fd, &mut [IoSliceMut::new(target), IoSliceMut::new(scratch)])
            }
            _ => rustix::io::read(&client.fd, &mut scratch[carried..]),
        };
        let count = match result {
            Ok(0) => {
                client.closing = Some("the client closed the connection");
                let intake = std::mem::replace(&mut client.intake, Intake::Header);
                self.drop_intake(intake);
                return self.understand(key, &[]);
            }
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(format!("receive: {error}")),
        };
        client.progress_us = self.now_us;
        client.stash.clear();
        let placed = count.min(direct);
        if let Intake::Payload { filling: Some(filling), .. } = &mut client.intake {
            filling.next += placed;
        }
        self.understand(key, &scratch[..carried + count - placed])
    }

    /// Take in `data`; keep what is incomplete or held back by a limit.
    pub(super) fn understand(&mut self, key: u32, data: &[u8]) -> Result<(), String> {
        let used = self.parse(key, data)?;
        let Some(client) = self.clients.get_mut(key) else { return Ok(()) };
        if used < data.len() && client.closing.is_none() {
            client.stash.extend_from_slice(&data[used..]);
        } else if client.stash.capacity() > REQUEST_BYTES {
            client.stash = Vec::new(); // it was large because of a limit
        }
        if client.is_done() {
            return Err(client.closing.unwrap_or_default().into());
        }
        self.update_client_interest(key);
        Ok(())
    }

    /// Returns how many bytes were understood.
    fn parse(&mut self, key: u32, data: &[u8]) -> Result<usize, String> {
        let mut at = 0;
        loop {
            let Some(client) = self.clients.get_mut(key) else { return Ok(at) };
            match &mut client.intake {
                Intake::Header => {
                    let Some(bytes) = data.get(at..at + REQUEST_BYTES) else { return Ok(at) };
                    if client.closing.is_some() {
                        return Ok(at);
                    }
                    let bytes: &[u8; REQUEST_BYTES] = bytes.try_into().expect("28 bytes");
                    let raw = RawRequest::decode(bytes).map_err(|_| "not an NBD request".to_string())?;
                    let need = match raw.command {
                        Some(Command::Read) => u64::from(raw.length).min(NBD_REQUEST_BYTES_MAX),
                        _ => 0,
                    };
                    if !self.admit(key, need) {
                        return Ok(at);
                    }
                    at += REQUEST_BYTES;
                    self.begin(key, &raw);
                }
                Intake::Drain { remaining, cookie, error } => {
                    let count = (data.len() - at).min(*remaining as usize);
                    at += count;
                    *remaining -= count as u64;
                    if *remaining > 0 {
                        return Ok(at);
                    }
                    let (cookie, error) = (*cookie, *error);
                    client.intake = Intake::Header;
                    self.refuse(key, cookie, error, false);
                }
                Intake::Payload { filling: Some(filling), .. } => {
                    let count = (data.len() - at).min(filling.buf.len() - filling.next);
                    filling.buf[filling.next..filling.next + count].copy_from_slice(&data[at..at + count]);
                    filling.next += count;
                    at += count;
                    if !filling.is_full() {
                        return Ok(at);
                    }
                    self.payload_piece_done(key);
                }
                Intake::Payload { filling: None, .. } => {
                    // A buffer only for bytes that are there: a header alone costs nothing.
                    if at == data.len() {
                        return Ok(at);
                    }
                    if !self.begin_piece(key) {
                        return Ok(at);
                    }
                }
            }
        }
    }

    pub(super) fn engine_has_room(&self, need: u64) -> bool {
        let used = self.pool.live_bytes() + self.reads_reserved;
        self.requests.len() < ENGINE_REQUESTS_MAX && used + need <= ENGINE_BYTES_MAX
    }

    /// May this client take so much? If not, it is held back until it may, or until the pause ends.
    fn admit(&mut self, key: u32, need: u64) -> bool {
        if !self.paused && self.clients[key].has_room(need) && self.engine_has_room(need) {
            return true;
        }
        let client = &mut self.clients[key];
        client.blocked_need = need;
        if !client.blocked {
            client.blocked = true;
            self.blocked.push_back(key);
        }
        false
    }

    fn refuse(&mut self, key: u32, cookie: u64, error: u32, structured: bool) {
        self.counters.errors += 1;
        let client = &mut self.clients[key];
        if structured {
            client.out.push_copy(&self.pool, &nbd::error_chunk(cookie, error));
        } else {
            client.out.push_copy(&self.pool, &nbd::simple_reply(cookie, error));
        }
        self.mark_client_dirty(key);
    }

    fn terms(&self, key: u32) -> Terms {
        let terms = &self.clients[key].terms;
        Terms {
            size_bytes: self.size_bytes,
            read_only: terms.read_only,
            structured: terms.structured,
            meta_context: terms.meta_context,
        }
    }

    /// A request's header is here: refuse it, or set its parts going.
    fn begin(&mut self, key: u32, raw: &RawRequest) {
        let terms = self.terms(key);
        let command = match nbd::check(raw, &terms) {
            Ok(command) => command,
            Err(error) => {
                let remaining = raw.payload_bytes();
                if remaining > 0 {
                    self.clients[key].intake = Intake::Drain { remaining, cookie: raw.cookie, error };
                } else {
                    // Only these two must be answered by chunks where chunks were negotiated.
                    let chunks = matches!(raw.command, Some(Command::Read | Command::BlockStatus));
                    self.refuse(key, raw.cookie, error, terms.structured && chunks);
                }
                return;
            }
        };
        if command == Command::Disconnect {
            self.clients[key].closing = Some("disconnected");
            return;
        }
        let (offset, end) = (raw.offset, raw.offset.saturating_add(u64::from(raw.length)));
        let client = &mut self.clients[key];
        client.requests += 1;
        let request = self.requests.insert(Request {
            client: key,
            client_id: client.client_id,
            cookie: raw.cookie,
            command,
            flags: raw.flags,
            offset,
            end,
            pending: 1,
            error: 0,
            charged: 0,
            started_us: self.now_us,
            next_offset: offset,
            parts: Vec::new(),
        });
        match command {
            Command::Flush => {
                self.requests[request].pending += 1;
                self.submit_bare(kind::FLUSH, 0, 0, 0, request);
            }
            _ if offset == end => {}
            Command::Write => {
                self.clients[key].intake = Intake::Payload { request, offset, end, filling: None };
                return; // the first count stays until the payload is complete
            }
            Command::Read => self.begin_read(request),
            Command::Trim => self.begin_trim(request),
            Command::WriteZeroes => self.continue_zeroes(request),
            Command::Cache => self.begin_cache(request),
            Command::BlockStatus => self.begin_status(request),
            Command::Disconnect => unreachable!("returned above"),
        }
        self.part_done(request, 0);
    }

    fn begin_read(&mut self, key: u32) {
        self.ask_lease();
        let request = &mut self.requests[key];
        let (offset, end) = (request.offset, request.end);
        request.charged = end - offset;
        self.clients[request.client].bytes += end - offset;
        self.reads_reserved += end - offset;
        let mut at = offset;
        while at < end {
            let piece = plan::cut_read(at, end);
            self.requests[key].pending += 1;
            self.start_read(ReadOp::new(ReadJob::Data { request: key }, piece.offset, piece.length));
            at = piece.end();
        }
    }

    fn begin_cache(&mut self, key: u32) {
        let request = &self.requests[key];
        let end = request.end.min(request.offset + CACHE_BYTES_MAX);
        let mut at = request.offset;
        while at < end && self.any_reader() {
            let piece = plan::cut_read(at, end);
            self.requests[key].pending += 1;
            self.start_read(ReadOp::new(ReadJob::Cache { request: key }, piece.offset, piece.length));
            at = piece.end();
        }
    }

    fn begin_status(&mut self, key: u32) {
        self.ask_lease();
        let request = &mut self.requests[key];
        let piece = plan::cut_status(request.offset, request.end, !self.regions.is_quiet());
        request.pending += 1;
        self.start_read(ReadOp::new(ReadJob::Status { request: key }, piece.offset, piece.length));
    }

    fn begin_trim(&mut self, key: u32) {
        let request = &mut self.requests[key];
        let Some((first, last)) = plan::round_trim(request.offset, request.end) else {
            request.next_offset = request.end;
            return;
        };
        (request.next_offset, request.end) = (first, last);
        self.continue_zeroes(key);
    }

    /// Send the next parts of a WRITE_ZEROES or TRIM, a bounded number at a time.
    pub(super) fn continue_zeroes(&mut self, key: u32) {
        // What a pause holds back may meet a region that is waited for when it goes on.
        let by_region = self.paused || !self.regions.is_quiet();
        loop {
            let request = &mut self.requests[key];
            if request.next_offset >= request.end || request.pending > ZERO_PARTS_IN_FLIGHT_MAX {
                return;
            }
            let piece = plan::cut_zeroes(request.next_offset, request.end, by_region);
            request.next_offset = piece.end();
            request.pending += 1;
            let fua = request.flags & nbd::flag::FUA != 0;
            let keep = request.flags & nbd::flag::NO_HOLE != 0;
            let mut flags = if fua { flag::FUA } else { 0 };
            if piece.partial {
                let mut buf = self.pool.take(data_start(&piece) + piece.length as usize);
                buf[data_start(&piece)..].fill(0);
                self.submit_data(piece, buf, flags, key);
            } else {
                let trim = request.command == Command::Trim;
                if keep && !trim {
                    flags |= flag::NO_HOLE;
                }
                let kind = if trim { kind::TRIM } else { kind::WRITE_ZEROES };
                self.submit_bare(kind, flags, piece.offset, piece.length, key);
            }
        }
    }

    /// Take a buffer for the next piece of a WRITE's payload. False: a limit forbids it now.
    fn begin_piece(&mut self, key: u32) -> bool {
        let Intake::Payload { request, offset, end, .. } = self.clients[key].intake else { return true };
        let piece = plan::cut_write(offset, end);
        if !self.admit(key, piece.length) {
            return false;
        }
        let start = data_start(&piece);
        let buf = self.pool.take(start + piece.length as usize);
        let client = &mut self.clients[key];
        client.bytes += piece.length;
        self.requests[request].charged += piece.length;
        let filling = Some(Filling { piece, buf, next: start });
        client.intake = Intake::Payload { request, offset, end, filling };
        true
    }

    /// A piece of a WRITE's payload is complete: send it.
    fn payload_piece_done(&mut self, key: u32) {
        let client = &mut self.clients[key];
        let Intake::Payload { request, end, filling, .. } = &mut client.intake else { return };
        let (request, end) = (*request, *end);
        let Some(Filling { piece, buf, .. }) = filling.take() else { return };
        let last = piece.end() == end;
        client.intake = if last {
            Intake::Header
        } else {
            Intake::Payload { request, offset: piece.end(), end, filling: None }
        };
        let fua = self.requests[request].flags & nbd::flag::FUA != 0;
        self.requests[request].pending += 1;
        self.submit_data(piece, buf, if fua { flag::FUA } else { 0 }, request);
        if last {
            self.part_done(request, 0);
        }
    }

    /// The client is gone: a payload that did not arrive whole goes no further.
    pub(super) fn drop_intake(&mut self, intake: Intake) {
        if let Intake::Payload { request, .. } = intake {
            self.part_done(request, nbd::errno::EIO);
        }
    }

    fn submit_data(&mut self, piece: Piece, mut buf: Buf, flags: u16, request: u32) {
        seal(&piece, &mut buf);
        let kind = if piece.partial { kind::WRITE_PARTIAL } else { kind::WRITE };
        self.submit(Mutation { kind, flags, offset: piece.offset, length: piece.length, buf, request });
    }

    fn submit_bare(&mut self, kind: u8, flags: u16, offset: u64, length: u64, request: u32) {
        let buf = self.pool.take(HEADER_BYTES);
        self.submit(Mutation { kind, flags, offset, length, buf, request });
    }

    /// Send a write unless its region or a pause holds it back.
    pub(super) fn submit(&mut self, mutation: Mutation) {
        if !self.regions.is_quiet() && mutation.kind != kind::FLUSH {
            let region = (mutation.offset / REGION_BYTES) as u32;
            let touch = mutation.touch();
            if self.regions.must_wait(region, touch) {
                self.park(region, touch, Parked::Mutation(mutation));
                return;
            }
        }
        if self.paused {
            self.held.push_back(mutation);
        } else {
            self.dispatch(mutation);
        }
    }

    pub(super) fn park(&mut self, region: u32, touch: Touch, parked: Parked) {
        if self.regions.park(region, touch, parked) {
            self.events.push(super::commands::Event::RegionWanted { region_index: region });
        }
    }

    /// One frame, one id, every attached link.
    fn dispatch(&mut self, mutation: Mutation) {
        let Mutation { kind, flags, offset, length, mut buf, request } = mutation;
        self.spoil_repairs(offset, length);
        let header = Header {
            kind,
            flags,
            request_id: self.table.next_id(),
            epoch: self.epoch,
            offset_bytes: offset,
            length_bytes: length as u32,
            payload_bytes: (buf.len() - HEADER_BYTES) as u32,
            status: 0,
        };
        buf[..HEADER_BYTES].copy_from_slice(&header.encode());
        let frame = Rc::new(buf);
        for slot in each(self.attached) {
            self.send_frame(slot, frame.clone());
        }
        let new = NewWrite { kind, flags, offset, length, frame, request };
        self.table.add(new, self.attached, self.now_us);
    }

    pub(super) fn send_frame(&mut self, slot: usize, frame: Rc<Buf>) {
        let Some(link) = &mut self.links[slot] else { return };
        let length = frame.len();
        link.out.push_whole(frame, 0, length);
        link.writes_in_flight += 1;
        link.dirty = true;
        self.slot_stats[slot].requests += 1;
    }

    /// Try again with clients that a limit or a pause held back.
    pub(super) fn resume_blocked(&mut self) {
        if self.paused {
            return;
        }
        for _ in 0..self.blocked.len() {
            if !self.engine_has_room(0) {
                return;
            }
            let Some(key) = self.blocked.pop_front() else { return };
            let need = self.clients[key].blocked_need;
            if !self.clients[key].has_room(need) || !self.engine_has_room(need) {
                self.blocked.push_back(key);
                continue;
            }
            let client = &mut self.clients[key];
            client.blocked = false;
            client.progress_us = self.now_us;
            let stash = std::mem::take(&mut client.stash);
            if let Err(reason) = self.understand(key, &stash) {
                self.close_client(key, &reason);
            }
        }
    }
}
