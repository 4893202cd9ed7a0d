//! One NBD client's connection: what it has sent half of, what it has not taken yet.
//!
//! Owns the socket and its buffers. A connection that is idle holds no buffer at all: reading goes
//! through the loop's scratch, and only what is incomplete stays here.

use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::buffers::{Buf, SendQueue};
use super::commands::ClientTerms;
use super::limits::{CLIENT_BYTES_MAX, CLIENT_REQUESTS_MAX};
use super::plan::Piece;

/// One frame's data on its way in.
pub struct Filling {
    pub piece: Piece,
    pub buf: Buf,
    /// Where in `buf` the next byte goes.
    pub next: usize,
}

impl Filling {
    pub fn is_full(&self) -> bool {
        self.next == self.buf.len()
    }
}

/// Where in the stream of requests the connection stands.
///
/// ```text
///   Header ──WRITE──► Payload ──last byte──► Header
///          ──refused WRITE──► Drain ──last byte, error reply──► Header
/// ```
pub enum Intake {
    Header,
    Payload { request: u32, offset: u64, end: u64, filling: Option<Filling> },
    Drain { remaining: u64, cookie: u64, error: u32 },
}

pub struct Client {
    pub client_id: u64,
    pub fd: OwnedFd,
    pub terms: ClientTerms,
    /// Read and not understood yet: part of a header, or whole requests while a limit holds them back.
    pub stash: Vec<u8>,
    pub intake: Intake,
    pub out: SendQueue,
    /// Requests without a reply.
    pub requests: u32,
    /// Data of those requests.
    pub bytes: u64,
    /// A limit or a pause holds it back: it is not read.
    pub blocked: bool,
    /// What it needs room for while it is held back.
    pub blocked_need: u64,
    /// It sends no more (DISC or end of stream): close when everything is answered.
    pub closing: Option<&'static str>,
    pub out_blocked: bool,
    pub dirty: bool,
    pub interest: EventFlags,
    /// When a byte last moved in or out.
    pub progress_us: u64,
}

impl Client {
    pub fn new(client_id: u64, fd: OwnedFd, terms: ClientTerms, now_us: u64) -> Self {
        Client {
            client_id,
            fd,
            terms,
            stash: Vec::new(),
            intake: Intake::Header,
            out: SendQueue::new(),
            requests: 0,
            bytes: 0,
            blocked: false,
            blocked_need: 0,
            closing: None,
            out_blocked: false,
            dirty: false,
            interest: EventFlags::IN,
            progress_us: now_us,
        }
    }

    /// May it start something that takes `need` bytes? One thing always may, however large.
    pub fn has_room(&self, need: u64) -> bool {
        let used = self.bytes + self.out.bytes() as u64;
        self.requests < CLIENT_REQUESTS_MAX && (used == 0 || used + need <= CLIENT_BYTES_MAX)
    }

    /// What epoll should watch. Errors and hang-ups are reported in any case.
    pub fn interest_wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        if !self.blocked && self.closing.is_none() {
            wanted |= EventFlags::IN;
        }
        if self.out_blocked {
            wanted |= EventFlags::OUT;
        }
        wanted
    }

    /// It holds memory and does not move: output it does not take, or a payload it does not finish.
    pub fn is_stuck_since(&self) -> Option<u64> {
        let half_sent = matches!(self.intake, Intake::Payload { filling: Some(_), .. }) && !self.blocked;
        (half_sent || !self.out.is_empty()).then_some(self.progress_us)
    }

    pub fn is_done(&self) -> bool {
        self.closing.is_some() && self.requests == 0 && self.out.is_empty()
    }
}
