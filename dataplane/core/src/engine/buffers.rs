//! Buffers of the loop thread: a pool by size class, and the queue of bytes that go to one peer.
//!
//! Owns the memory of frames, reads and replies. Knows nothing of what is in it.
//! Promises: `Pool::live_bytes` is what is in use; a dropped buffer is reused or freed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendFlags};

use super::limits::{GATHER_PIECES, POOL_FREE_BYTES_MAX, SEND_TURN_BYTES};
use crate::frame::HEADER_BYTES;
use crate::limits::FRAME_PAYLOAD_BYTES_MAX;

/// Sizes of buffers: a bare frame, one block with its frame, and steps up to the largest frame.
const CLASS_BYTES: [usize; 6] =
    [256, 4096 + 256, 20 * 1024, 72 * 1024, 264 * 1024, FRAME_PAYLOAD_BYTES_MAX as usize + HEADER_BYTES];
/// Replies gather in pieces of this class while there are many, of the small one while few.
const REPLIES_CLASS_BYTES: usize = CLASS_BYTES[3];
/// Shorter pieces are copied behind one another: a slot in the gather list costs as much.
const SHARE_BYTES_MIN: usize = 8 * 1024;

#[derive(Default)]
struct PoolInner {
    free: [Vec<Vec<u8>>; CLASS_BYTES.len()],
    /// The fewest free buffers of each class since the last trim: nobody needed these.
    unused: [usize; CLASS_BYTES.len()],
    free_bytes: usize,
    live_bytes: u64,
}

/// Reuses buffers, so that a large one is not mapped and faulted in again for each request.
#[derive(Clone, Default)]
pub struct Pool {
    inner: Rc<RefCell<PoolInner>>,
}

impl Pool {
    /// A buffer of `length` bytes. Its content is left over from whoever had it before.
    ///
    /// # Panics
    /// If `length` is more than the largest frame: the caller did not check it.
    pub fn take(&self, length: usize) -> Buf {
        let class = CLASS_BYTES.iter().position(|bytes| *bytes >= length).expect("no longer than a frame");
        let mut inner = self.inner.borrow_mut();
        inner.live_bytes += CLASS_BYTES[class] as u64;
        let bytes = match inner.free[class].pop() {
            Some(bytes) => {
                inner.free_bytes -= CLASS_BYTES[class];
                inner.unused[class] = inner.unused[class].min(inner.free[class].len());
                bytes
            }
            None => vec![0; CLASS_BYTES[class]],
        };
        Buf { bytes, length, class, pool: self.clone() }
    }

    /// Bytes in use, counted by size class.
    pub fn live_bytes(&self) -> u64 {
        self.inner.borrow().live_bytes
    }

    pub fn free_bytes(&self) -> usize {
        self.inner.borrow().free_bytes
    }

    /// Give back to the system what nobody needed since the last call.
    pub fn trim(&self) {
        let inner = &mut *self.inner.borrow_mut();
        for (class, bytes) in CLASS_BYTES.iter().enumerate() {
            let keep = inner.free[class].len() - inner.unused[class];
            inner.free_bytes -= inner.unused[class] * bytes;
            inner.free[class].truncate(keep);
            if keep == 0 {
                inner.free[class] = Vec::new();
            }
            inner.unused[class] = keep;
        }
    }
}

/// A buffer that returns to its pool.
pub struct Buf {
    bytes: Vec<u8>,
    length: usize,
    class: usize,
    pool: Pool,
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let mut inner = self.pool.inner.borrow_mut();
        inner.live_bytes -= CLASS_BYTES[self.class] as u64;
        if inner.free_bytes + CLASS_BYTES[self.class] <= POOL_FREE_BYTES_MAX {
            inner.free_bytes += CLASS_BYTES[self.class];
            inner.free[self.class].push(std::mem::take(&mut self.bytes));
        }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({})", self.length)
    }
}

enum Piece {
    /// Small things one behind the other; `filled` bytes of the buffer count.
    Gathered {
        buf: Buf,
        filled: usize,
    },
    Shared {
        buf: Rc<Buf>,
        start: usize,
        end: usize,
    },
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Gathered { buf, filled } => &buf[..*filled],
            Piece::Shared { buf, start, end } => &buf[*start..*end],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The queue is empty.
    All,
    /// The socket takes no more now: wait until it is writable.
    Blocked,
    /// There is more, and the socket may take it: but the others have a turn first.
    More,
}

/// Bytes on their way to one peer.
pub struct SendQueue {
    pieces: VecDeque<Piece>,
    /// How much of the first piece is gone.
    head_sent: usize,
    bytes: usize,
}

impl SendQueue {
    pub fn new() -> Self {
        SendQueue { pieces: VecDeque::new(), head_sent: 0, bytes: 0 }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn push_copy(&mut self, pool: &Pool, mut bytes: &[u8]) {
        self.bytes += bytes.len();
        while !bytes.is_empty() {
            if let Some(Piece::Gathered { buf, filled }) = self.pieces.back_mut() {
                let count = bytes.len().min(buf.len() - *filled);
                buf[*filled..*filled + count].copy_from_slice(&bytes[..count]);
                *filled += count;
                bytes = &bytes[count..];
                if bytes.is_empty() {
                    return;
                }
            }
            let few = self.pieces.is_empty() && bytes.len() <= 1024;
            let class = if few { CLASS_BYTES[1] } else { REPLIES_CLASS_BYTES };
            self.pieces.push_back(Piece::Gathered { buf: pool.take(class), filled: 0 });
        }
    }

    /// Queue part of a shared buffer, without copying it unless it is small.
    pub fn push_shared(&mut self, pool: &Pool, buf: &Rc<Buf>, start: usize, end: usize) {
        if end - start < SHARE_BYTES_MIN {
            self.push_copy(pool, &buf[start..end]);
        } else {
            self.push_whole(buf.clone(), start, end);
        }
    }

    /// Queue a frame that other links send too.
    pub fn push_whole(&mut self, buf: Rc<Buf>, start: usize, end: usize) {
        self.bytes += end - start;
        self.pieces.push_back(Piece::Shared { buf, start, end });
    }

    fn consume(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(piece) = self.pieces.front() {
            let left = piece.bytes().len() - self.head_sent;
            if count < left {
                self.head_sent += count;
                return;
            }
            count -= left;
            self.head_sent = 0;
            self.pieces.pop_front();
        }
    }

    /// Write what the socket takes, gathered. Returns how many bytes went, and what is left to do.
    pub fn send(&mut self, fd: BorrowedFd<'_>) -> Result<(usize, Sent), Errno> {
        let mut total = 0;
        while self.bytes > 0 {
            if total >= SEND_TURN_BYTES {
                return Ok((total, Sent::More));
            }
            let mut slices = [IoSlice::new(&[]); GATHER_PIECES];
            let mut count = 0;
            let mut wanted = 0;
            for piece in self.pieces.iter().take(GATHER_PIECES) {
                let bytes = if count == 0 { &piece.bytes()[self.head_sent..] } else { piece.bytes() };
                slices[count] = IoSlice::new(bytes);
                wanted += bytes.len();
                count += 1;
            }
            let mut control = SendAncillaryBuffer::default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(fd, &slices[..count], &mut control, flags) {
                Ok(sent) => {
                    self.consume(sent);
                    total += sent;
                    if sent < wanted {
                        return Ok((total, Sent::Blocked));
                    }
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok((total, Sent::Blocked)),
                Err(error) => return Err(error),
            }
        }
        Ok((total, Sent::All))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn buffers_are_reused_and_those_that_nobody_needs_are_given_back() {
        let pool = Pool::default();
        drop((0..5).map(|_| pool.take(4096)).collect::<Vec<_>>());
        let all = pool.free_bytes();
        pool.trim();
        assert_eq!(pool.free_bytes(), all, "all five were in use lately");
        drop((pool.take(4096), pool.take(4096)));
        pool.trim();
        assert_eq!(pool.free_bytes(), all / 5 * 2);
        pool.trim();
        assert_eq!((pool.free_bytes(), pool.live_bytes()), (0, 0));
    }

    #[test]
    fn bytes_arrive_in_order_however_they_were_queued() {
        let pool = Pool::default();
        let (left, mut right) = UnixStream::pair().expect("a pair");
        left.set_nonblocking(true).expect("nonblocking");
        let mut queue = SendQueue::new();
        let mut expected = Vec::new();
        let mut shared = pool.take(20_000);
        for (index, byte) in shared.iter_mut().enumerate() {
            *byte = index as u8;
        }
        let shared = Rc::new(shared);
        for round in 0..300usize {
            let small = vec![round as u8; round * 7 % 5000];
            queue.push_copy(&pool, &small);
            expected.extend_from_slice(&small);
            queue.push_shared(&pool, &shared, round, round + 9000 * (round % 3));
            expected.extend_from_slice(&shared[round..round + 9000 * (round % 3)]);
        }
        let mut found = Vec::new();
        let mut chunk = vec![0; 65536];
        while !queue.is_empty() {
            queue.send(left.as_fd()).expect("sent");
            let count = right.read(&mut chunk).expect("read");
            found.extend_from_slice(&chunk[..count]);
        }
        drop(left);
        right.read_to_end(&mut found).expect("the rest");
        assert!(found == expected);
        drop(shared);
        assert_eq!(pool.live_bytes(), 0);
    }
}
