//! One connected peer of a replica: an engine's data session or another replica's peer session.
//!
//! Owns the socket and its two buffers, and decides when to stop reading from it. Does not know what
//! frames do.

use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{recv, send, RecvFlags, SendFlags};

use crate::frame::{kind, Header, HEADER_BYTES};

use super::buffers::{InBuffer, OutBuffer};
use super::handle::{NewSession, StoreHandle};

/// Unsent replies at which a session is no longer read from: one large reply under way, one in work.
const OUT_BYTES_PAUSE: usize = 1024 * 1024;
/// Frames that wait for a mark, a flush or the disk; an engine keeps fewer in flight.
const DEFERRED_MAX: usize = 1024;
/// Bytes that such frames hold in memory.
const DEFERRED_BYTES_MAX: usize = 16 * 1024 * 1024;

pub struct Session {
    pub id: u64,
    pub epoch: u64,
    /// May READ and ask for REGION_SUMMARY, nothing else.
    pub peer: bool,
    pub handle: Arc<StoreHandle>,
    pub fd: rustix::fd::OwnedFd,
    pub input: InBuffer,
    pub out: OutBuffer,
    pub deferred: usize,
    pub deferred_bytes: usize,
    pub interest: EventFlags,
    /// Of the newest frame that changes something.
    last_change_id: u64,
}

/// Frames whose ids grow within a data session. A read that is asked again of another replica keeps its id,
/// and a repair changes nothing that is good.
fn ordered(kind: u8) -> bool {
    matches!(kind, kind::WRITE | kind::WRITE_PARTIAL | kind::WRITE_ZEROES | kind::TRIM)
}

impl Session {
    pub fn new(new: NewSession) -> Self {
        let NewSession { id, fd, epoch, peer, handle } = new;
        Self {
            id,
            epoch,
            peer,
            handle,
            fd,
            input: InBuffer::default(),
            out: OutBuffer::default(),
            deferred: 0,
            deferred_bytes: 0,
            interest: EventFlags::IN,
            last_change_id: 0,
        }
    }

    /// A frame has arrived whole. One that was sent twice, or overtaken, must not be applied over what is
    /// newer (C12): the error says why the session ends.
    pub fn admit(&mut self, header: &Header) -> Result<(), String> {
        if !ordered(header.kind) {
            return Ok(());
        }
        if header.request_id <= self.last_change_id {
            return Err(format!("frame {} came after {}", header.request_id, self.last_change_id));
        }
        self.last_change_id = header.request_id;
        Ok(())
    }

    pub fn paused(&self) -> bool {
        self.out.unsent().len() > OUT_BYTES_PAUSE
            || self.deferred > DEFERRED_MAX
            || self.deferred_bytes > DEFERRED_BYTES_MAX
    }

    pub fn defer(&mut self, bytes: usize) {
        self.deferred += 1;
        self.deferred_bytes += bytes;
    }

    pub fn undefer(&mut self, bytes: usize) {
        self.deferred -= 1;
        self.deferred_bytes -= bytes;
    }

    pub fn wanted_interest(&self) -> EventFlags {
        let mut flags = EventFlags::empty();
        if !self.paused() {
            flags |= EventFlags::IN;
        }
        if !self.out.unsent().is_empty() {
            flags |= EventFlags::OUT;
        }
        flags
    }

    /// One read. The error says why the session ends.
    pub fn receive(&mut self) -> Result<(), String> {
        let frame_bytes = match self.front() {
            Ok(front) => front.map(|header| HEADER_BYTES + header.payload_bytes as usize),
            Err(reason) => return Err(reason),
        };
        let space = self.input.space(frame_bytes);
        if space.is_empty() {
            return Ok(());
        }
        match recv(&self.fd, space, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err("closed by the peer".to_owned()),
            Ok((count, _)) => {
                self.input.received(count);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(format!("receiving: {error}")),
        }
    }

    /// The header at the front of the input, if it is all here.
    pub fn front(&self) -> Result<Option<Header>, String> {
        let bytes = self.input.unparsed();
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        Header::decode(header).map(Some).map_err(|why| format!("a bad frame header: {why:?}"))
    }

    /// Sends what the socket takes now.
    pub fn send(&mut self) -> Result<(), String> {
        while !self.out.unsent().is_empty() {
            match send(&self.fd, self.out.unsent(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.out.sent(count),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(format!("sending: {error}")),
            }
        }
        Ok(())
    }

    pub fn reply(&mut self, header: &Header, status: u32) {
        self.out.append(&header.reply(status).encode());
    }

    pub fn reply_with(&mut self, header: &Header, payload: &[u8]) {
        let mut reply = header.reply(crate::frame::status::OK);
        reply.payload_bytes = payload.len() as u32;
        self.out.append(&reply.encode());
        self.out.append(payload);
    }
}
