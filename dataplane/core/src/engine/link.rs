//! One data link to a replica: the queue of frames that go out, the frame that comes in.
//!
//! Owns the socket. Which frames are under way is in `requests`; here are only their counts.

use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;

use super::buffers::{Buf, SendQueue};
use super::hedging::Late;
use super::pace::Pace;
use crate::frame::{Header, HEADER_BYTES};

/// A reply whose payload has not arrived whole.
pub struct Arriving {
    pub header: Header,
    pub buf: Buf,
    pub filled: usize,
}

/// A LEASE frame under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseAsked {
    pub number: u64,
    pub sent_at_us: u64,
}

pub struct Link {
    pub generation: u64,
    pub fd: OwnedFd,
    /// "sync": holds or gets everything, serves reads. Otherwise "resync": gets new writes only.
    pub sync: bool,
    pub out: SendQueue,
    /// Part of a header.
    pub head: [u8; HEADER_BYTES],
    pub head_bytes: usize,
    pub arriving: Option<Arriving>,
    pub attached_us: u64,
    pub reads_in_flight: u32,
    pub writes_in_flight: u32,
    pub lease_asked: Option<LeaseAsked>,
    pub pace: Pace,
    /// Clearly slower than another reader: others are asked first.
    pub slow: bool,
    /// When it was last sent a read that another slot was asked as well.
    pub tried_us: u64,
    /// The oldest read that was taken from it.
    pub late: Option<Late>,
    pub out_blocked: bool,
    pub dirty: bool,
    pub interest: EventFlags,
}

impl Link {
    pub fn new(generation: u64, fd: OwnedFd, sync: bool, now_us: u64) -> Self {
        Link {
            generation,
            fd,
            sync,
            out: SendQueue::new(),
            head: [0; HEADER_BYTES],
            head_bytes: 0,
            arriving: None,
            attached_us: now_us,
            reads_in_flight: 0,
            writes_in_flight: 0,
            lease_asked: None,
            pace: Pace::default(),
            slow: false,
            tried_us: now_us,
            late: None,
            out_blocked: false,
            dirty: false,
            interest: EventFlags::IN,
        }
    }

    pub fn interest_wanted(&self) -> EventFlags {
        if self.out_blocked {
            EventFlags::IN | EventFlags::OUT
        } else {
            EventFlags::IN
        }
    }

    pub fn is_busy(&self) -> bool {
        self.reads_in_flight + self.writes_in_flight > 0 || self.lease_asked.is_some()
    }

    pub fn mode(&self) -> &'static str {
        if self.sync {
            "sync"
        } else {
            "resync"
        }
    }
}

/// Why a link ends; which event Python gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEnd {
    /// Closed, reset, or what it sent is not a frame.
    Lost(String),
    /// It answered a request with this status.
    Failed(u32),
    Stalled,
    /// Python asked for it: no event.
    Detached,
}
