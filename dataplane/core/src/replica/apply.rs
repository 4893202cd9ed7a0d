//! What each frame does to a store. Called by the loop, with the store locked.
//!
//! Frames that touch a region are applied in the order of arrival: one that must wait for its mark is
//! held, and so is every later one that shares a region with a held one. Everything else goes on.

use std::collections::{HashSet, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::checksum::{block_checksum, fragment_checksum};
use crate::frame::{flag, kind, le_u64, status, Header};
use crate::limits::{BLOCK_BYTES, FRAME_DATA_BYTES_MAX, REGION_BYTES, ZERO_BYTES_MAX};

use super::error::Result;
use super::handle::{FrameId, Guarded, ReadDone, ReadJob, Shared, Waiter};
use super::read::{begin_read_reply, finish_read_reply, Plan, ReadResult};
use super::session::Session;
use super::store::{regions_of, status_of};
use crate::region_map::RegionMap;

const BLOCK: usize = BLOCK_BYTES as usize;

pub struct HeldFrame {
    pub session: u64,
    pub header: Header,
    pub payload: Vec<u8>,
}

impl HeldFrame {
    fn id(&self) -> FrameId {
        (self.session, self.header.request_id)
    }
}

/// Frames of one store that wait, in order, and how many wait in each region.
#[derive(Default)]
pub struct Held {
    frames: VecDeque<HeldFrame>,
    regions: RegionMap<u32>,
    /// Partial writes whose block the read pool fetches. Once fetched they may wait for the disk, so
    /// that each is fetched once only.
    warming: HashSet<FrameId>,
    warmed: HashSet<FrameId>,
}

impl Held {
    fn blocks(&self, regions: RangeInclusive<u32>) -> bool {
        !self.frames.is_empty() && regions.into_iter().any(|region| self.regions.contains_key(&region))
    }

    fn push(&mut self, frame: HeldFrame, regions: RangeInclusive<u32>) {
        for region in regions {
            *self.regions.entry(region).or_insert(0) += 1;
        }
        self.frames.push_back(frame);
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub fn note_warmed(&mut self, frame: FrameId) {
        if self.warming.remove(&frame) {
            self.warmed.insert(frame);
        }
    }

    /// All of them, to be applied again in order; those that still cannot come back by themselves.
    pub fn take(&mut self) -> VecDeque<HeldFrame> {
        self.regions.clear();
        // Those of sessions that have gone go as well.
        let known: HashSet<FrameId> = self.frames.iter().map(HeldFrame::id).collect();
        self.warming.retain(|frame| known.contains(frame));
        self.warmed.retain(|frame| known.contains(frame));
        std::mem::take(&mut self.frames)
    }
}

/// One store, locked for a batch of frames.
pub struct Turn<'a> {
    pub shared: &'a Shared,
    pub guarded: &'a mut Guarded,
    pub held: &'a mut Held,
    pub plan: &'a mut Plan,
}

fn changes(kind: u8) -> bool {
    matches!(kind, kind::WRITE | kind::WRITE_PARTIAL | kind::WRITE_ZEROES | kind::TRIM | kind::REPAIR)
}

impl Turn<'_> {
    /// Applies one frame: replies, or remembers who will.
    pub fn apply(&mut self, session: &mut Session, header: &Header, payload: &[u8]) {
        let code = self.check(session, header, payload);
        if header.kind == kind::COMPLETED {
            if code == status::OK {
                self.guarded.store.note_completed(header.request_id);
            }
            return;
        }
        if code != status::OK {
            return session.reply(header, code);
        }
        match header.kind {
            kind::FLUSH => self.flush_then_reply(session, header),
            // Reading ahead is a hint; the page cache does what it can. LEASE asks only whether the epoch still
            // is the newest, and it is, for `check` has passed.
            kind::CACHE | kind::LEASE => session.reply(header, status::OK),
            _ => {
                if let Err(error) = self.apply_in_order(session, header, payload) {
                    session.reply(header, status_of(&error));
                }
            }
        }
    }

    fn check(&self, session: &Session, header: &Header, payload: &[u8]) -> u32 {
        let store = &self.guarded.store;
        if header.epoch != store.epoch() || session.epoch != store.epoch() {
            return status::STALE_EPOCH;
        }
        if self.guarded.closed {
            return status::SHUTTING_DOWN;
        }
        if session.peer && !matches!(header.kind, kind::READ | kind::REGION_SUMMARY) {
            return status::BAD_REQUEST;
        }
        let code = check_frame(header, payload, store.size_bytes());
        if code == status::OK && store.check_alive().is_err() {
            return status::IO_ERROR;
        }
        code
    }

    fn flush_then_reply(&mut self, session: &mut Session, header: &Header) {
        if self.guarded.store.is_flushed() {
            return session.reply(header, status::OK);
        }
        session.defer(0);
        self.guarded.waiters.push(Waiter::Frame { session: session.id, header: *header });
    }

    fn apply_in_order(&mut self, session: &mut Session, header: &Header, payload: &[u8]) -> Result<()> {
        let regions = regions_of(header.offset_bytes, u64::from(header.length_bytes));
        let may_write = !changes(header.kind) || self.is_ready(header, regions.clone())?;
        if !may_write || self.held.blocks(regions.clone()) || self.is_cold(session, header)? {
            session.defer(payload.len());
            let frame = HeldFrame { session: session.id, header: *header, payload: payload.to_vec() };
            self.held.push(frame, regions);
            return Ok(());
        }
        self.execute(session, header, payload)
    }

    /// Are all regions marked, so that this frame may change them? If not, marks are begun.
    fn is_ready(&mut self, header: &Header, regions: RangeInclusive<u32>) -> Result<bool> {
        let store = &mut self.guarded.store;
        if store.log().all_ready(regions.clone()) {
            return Ok(true);
        }
        if matches!(header.kind, kind::TRIM | kind::WRITE_ZEROES) {
            let (first, count) = blocks_of(header);
            if store.zero_is_noop(first, count, keeps_space(header))? {
                return Ok(true);
            }
        }
        store.begin_marks(regions, false)
    }

    /// Must this frame wait for a block from the disk? Then the read pool has been asked for it.
    fn is_cold(&mut self, session: &Session, header: &Header) -> Result<bool> {
        let frame = (session.id, header.request_id);
        if !matches!(header.kind, kind::WRITE_PARTIAL | kind::REPAIR) || self.held.warmed.remove(&frame) {
            return Ok(false);
        }
        if self.guarded.store.is_warm(header.offset_bytes / BLOCK_BYTES, self.plan)? {
            return Ok(false);
        }
        if self.held.warming.insert(frame) {
            self.shared.reads.push(ReadJob {
                handle: Arc::clone(&session.handle),
                session: session.id,
                header: *header,
                plan: self.plan.clone(),
                warm: true,
            });
        }
        Ok(true)
    }

    fn execute(&mut self, session: &mut Session, header: &Header, payload: &[u8]) -> Result<()> {
        let store = &mut self.guarded.store;
        let (first, count) = blocks_of(header);
        let id = header.request_id;
        match header.kind {
            kind::WRITE => {
                let (checksums, data) = payload.split_at(count as usize * 8);
                store.write_blocks(first, checksums, data, id)?;
            }
            kind::WRITE_PARTIAL => store.write_partial(header.offset_bytes, &payload[8..], id)?,
            kind::WRITE_ZEROES | kind::TRIM => store.zero_blocks(first, count, keeps_space(header), id)?,
            kind::REPAIR => {
                store.repair(first, &payload[..8], &payload[8..], id)?;
            }
            kind::READ => return self.read(session, header),
            kind::BLOCK_STATUS => {
                let runs =
                    store.block_status(header.offset_bytes, u64::from(header.length_bytes), self.plan)?;
                let mut reply = Vec::with_capacity(runs.len() * 8);
                for (blocks, state) in runs {
                    reply.extend(blocks.to_le_bytes());
                    reply.extend(state.to_le_bytes());
                }
                session.reply_with(header, &reply);
                return Ok(());
            }
            kind::REGION_SUMMARY => {
                store.locate(first, count, self.plan)?;
                let reply: Vec<u8> = self.plan.entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
                session.reply_with(header, &reply);
                return Ok(());
            }
            _ => unreachable!("check_frame lets no other kind pass"),
        }
        if header.flags & flag::FUA != 0 {
            self.flush_then_reply(session, header);
        } else {
            session.reply(header, status::OK);
        }
        Ok(())
    }

    fn read(&mut self, session: &mut Session, header: &Header) -> Result<()> {
        match self.guarded.store.read_into(header, self.plan, &mut session.out, false)? {
            ReadResult::Done => {}
            ReadResult::WouldWait => {
                session.defer(header.length_bytes as usize);
                self.shared.reads.push(ReadJob {
                    handle: Arc::clone(&session.handle),
                    session: session.id,
                    header: *header,
                    plan: self.plan.clone(),
                    warm: false,
                });
            }
        }
        Ok(())
    }

    /// A read came back from the pool. The epoch may have changed meanwhile (C11), and so may a block.
    pub fn finish_read(&mut self, session: &mut Session, done: ReadDone) {
        let ReadDone { job, data, verified } = done;
        session.undefer(job.header.length_bytes as usize);
        let code = self.check(session, &job.header, &[]);
        if code != status::OK {
            return session.reply(&job.header, code);
        }
        if verified {
            begin_read_reply(&mut session.out, &job.plan).copy_from_slice(&data);
            finish_read_reply(&mut session.out, &job.header, &job.plan, data.len());
            self.guarded.store.note_read(job.header.length_bytes);
        } else if let Err(error) =
            self.guarded.store.read_into(&job.header, self.plan, &mut session.out, true)
        {
            session.reply(&job.header, status_of(&error));
        }
    }
}

fn keeps_space(header: &Header) -> bool {
    header.kind == kind::WRITE_ZEROES && header.flags & flag::NO_HOLE != 0
}

fn blocks_of(header: &Header) -> (u64, u64) {
    (header.offset_bytes / BLOCK_BYTES, u64::from(header.length_bytes) / BLOCK_BYTES)
}

/// Everything that can be wrong with a frame by itself: kind, range, payload, checksums.
pub fn check_frame(header: &Header, payload: &[u8], size_bytes: u64) -> u32 {
    let length = u64::from(header.length_bytes);
    let aligned = header.offset_bytes % BLOCK_BYTES == 0 && length % BLOCK_BYTES == 0;
    let blocks = length / BLOCK_BYTES;
    let (shape_is_right, payload_bytes) = match header.kind {
        kind::FLUSH | kind::COMPLETED | kind::LEASE => {
            return if payload.is_empty() { status::OK } else { status::BAD_REQUEST };
        }
        kind::WRITE => (aligned && length <= FRAME_DATA_BYTES_MAX, blocks * 8 + length),
        kind::REPAIR => (aligned && length == BLOCK_BYTES, 8 + length),
        kind::WRITE_PARTIAL => (header.offset_bytes % BLOCK_BYTES + length <= BLOCK_BYTES, 8 + length),
        kind::READ => (aligned && length <= FRAME_DATA_BYTES_MAX, 0),
        kind::WRITE_ZEROES | kind::TRIM | kind::BLOCK_STATUS => (aligned && length <= ZERO_BYTES_MAX, 0),
        kind::CACHE => (true, 0),
        kind::REGION_SUMMARY => {
            let whole = REGION_BYTES.min(size_bytes.saturating_sub(header.offset_bytes));
            (header.offset_bytes % REGION_BYTES == 0 && length == whole, 0)
        }
        _ => (false, 0),
    };
    if !shape_is_right || length == 0 || payload.len() as u64 != payload_bytes {
        return status::BAD_REQUEST;
    }
    match header.offset_bytes.checked_add(length) {
        Some(end) if end <= size_bytes => check_sums(header, payload),
        _ => status::OUT_OF_RANGE,
    }
}

fn check_sums(header: &Header, payload: &[u8]) -> u32 {
    let good = match header.kind {
        kind::WRITE | kind::REPAIR => {
            let (first, count) = blocks_of(header);
            let (checksums, data) = payload.split_at(count as usize * 8);
            let blocks = checksums.chunks_exact(8).zip(data.chunks_exact(BLOCK)).zip(first..);
            blocks
                .into_iter()
                .all(|((checksum, data), block)| le_u64(checksum, 0) == block_checksum(block, data))
        }
        kind::WRITE_PARTIAL => le_u64(payload, 0) == fragment_checksum(header.offset_bytes, &payload[8..]),
        _ => true,
    };
    if good {
        status::OK
    } else {
        status::BAD_CHECKSUM
    }
}
