//! What engine tests share: a replica in memory that speaks frames (correct, slow, failing,
//! corrupting), an NBD client, and a rig that holds them together.
#![allow(dead_code)] // each test file uses its part

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dolmen_core::checksum::{block_checksum, fragment_checksum};
use dolmen_core::engine::{ClientTerms, Clock, EngineHandle, Event, Options};
use dolmen_core::frame::{kind, le_u64, status, Header, HEADER_BYTES};

pub const BLOCK: usize = 4096;
/// Longer than anything a test waits for: past it the test fails instead of hanging.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
pub struct Store {
    blocks: HashMap<u64, (u64, Vec<u8>)>,
    /// (request id, kind) of every frame applied, in order.
    pub log: Vec<(u64, u8)>,
    /// Answers by kind that are not OK.
    pub statuses: HashMap<u8, u32>,
    /// Blocks whose data is handed out with a flipped bit until repaired.
    pub flipped: HashSet<u64>,
    /// Blocks handed out as damaged until repaired.
    pub damaged: HashSet<u64>,
    /// Blocks that make every read of them fail as a whole.
    pub unreadable: HashSet<u64>,
    /// Kinds whose answers are kept back until `release`.
    pub held_kinds: HashSet<u8>,
    held: Vec<Vec<u8>>,
    /// Close the connection when this many more frames have arrived.
    pub close_after: Option<u64>,
    pub frames_seen: u64,
    pub completed: u64,
    pub repairs: u64,
    stream: Option<UnixStream>,
}

impl Store {
    pub fn put(&mut self, block: u64, data: &[u8]) {
        self.blocks.insert(block, (block_checksum(block, data), data.to_vec()));
        self.flipped.remove(&block);
        self.damaged.remove(&block);
    }

    pub fn block(&self, block: u64) -> Vec<u8> {
        self.blocks.get(&block).map_or_else(|| vec![0; BLOCK], |(_, data)| data.clone())
    }

    /// Apply one frame; the status and the payload of the answer.
    fn apply(&mut self, header: &Header, payload: &[u8]) -> (u32, Vec<u8>) {
        if let Some(status) = self.statuses.get(&header.kind) {
            return (*status, Vec::new());
        }
        self.log.push((header.request_id, header.kind));
        let first = header.offset_bytes / BLOCK as u64;
        let count = u64::from(header.length_bytes) / BLOCK as u64;
        match header.kind {
            kind::WRITE => {
                let (sums, data) = payload.split_at(count as usize * 8);
                assert_eq!(data.len() as u64, count * BLOCK as u64);
                for (index, block) in data.chunks(BLOCK).enumerate() {
                    if block_checksum(first + index as u64, block) != le_u64(sums, index * 8) {
                        return (status::BAD_CHECKSUM, Vec::new());
                    }
                }
                for (index, block) in data.chunks(BLOCK).enumerate() {
                    self.put(first + index as u64, block);
                }
            }
            kind::WRITE_PARTIAL => {
                let data = &payload[8..];
                assert_eq!(data.len(), header.length_bytes as usize);
                assert_eq!(le_u64(payload, 0), fragment_checksum(header.offset_bytes, data));
                let within = (header.offset_bytes % BLOCK as u64) as usize;
                assert!(within + data.len() <= BLOCK);
                let mut whole = self.block(first);
                whole[within..within + data.len()].copy_from_slice(data);
                self.put(first, &whole);
            }
            kind::READ if (first..first + count).any(|block| self.unreadable.contains(&block)) => {
                return (status::IO_ERROR, Vec::new());
            }
            kind::READ => return (status::OK, self.read(first, count)),
            kind::WRITE_ZEROES | kind::TRIM => {
                for block in first..first + count {
                    self.blocks.remove(&block);
                }
            }
            kind::BLOCK_STATUS => {
                let mut runs = Vec::new();
                for block in first..first + count {
                    let state: u32 = if self.blocks.contains_key(&block) { 0 } else { 3 };
                    runs.extend_from_slice(&1u32.to_le_bytes());
                    runs.extend_from_slice(&state.to_le_bytes());
                }
                return (status::OK, runs);
            }
            kind::REPAIR => {
                let bad = self.flipped.contains(&first) || self.damaged.contains(&first);
                if bad {
                    assert_eq!(le_u64(payload, 0), block_checksum(first, &payload[8..]));
                    self.put(first, &payload[8..]);
                    self.repairs += 1;
                }
            }
            _ => {}
        }
        (status::OK, Vec::new())
    }

    fn read(&self, first: u64, count: u64) -> Vec<u8> {
        let (mut entries, mut data) = (Vec::new(), Vec::new());
        for block in first..first + count {
            if self.damaged.contains(&block) {
                entries.extend_from_slice(&2u64.to_le_bytes());
            } else if let Some((sum, bytes)) = self.blocks.get(&block) {
                entries.extend_from_slice(&sum.to_le_bytes());
                data.extend_from_slice(bytes);
                if self.flipped.contains(&block) {
                    let at = data.len() - 1;
                    data[at] ^= 1;
                }
            } else {
                entries.extend_from_slice(&1u64.to_le_bytes());
            }
        }
        entries.extend_from_slice(&data);
        entries
    }
}

/// A replica that keeps what it holds when its links die, as a page cache does.
#[derive(Clone, Default)]
pub struct Replica {
    shared: Arc<(Mutex<Store>, Condvar)>,
}

impl Replica {
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.shared.0.lock().expect("not poisoned")
    }

    /// A new link: the engine's end of it.
    pub fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        self.store().stream = Some(ours.try_clone().expect("a clone"));
        let replica = self.clone();
        std::thread::spawn(move || replica.serve(ours));
        theirs
    }

    fn serve(&self, mut stream: UnixStream) {
        let mut head = [0; HEADER_BYTES];
        while stream.read_exact(&mut head).is_ok() {
            let header = Header::decode(&head).expect("the engine sends frames");
            let mut payload = vec![0; header.payload_bytes as usize];
            if stream.read_exact(&mut payload).is_err() {
                break;
            }
            let mut store = self.store();
            store.frames_seen += 1;
            if header.kind == kind::COMPLETED {
                store.completed = header.request_id;
                self.shared.1.notify_all();
                continue;
            }
            let (status, body) = store.apply(&header, &payload);
            let mut reply = header.reply(status);
            reply.payload_bytes = body.len() as u32;
            let mut bytes = reply.encode().to_vec();
            bytes.extend_from_slice(&body);
            let mut closing = false;
            if let Some(left) = &mut store.close_after {
                *left = left.saturating_sub(1);
                closing = *left == 0;
            }
            if store.held_kinds.contains(&header.kind) {
                store.held.push(bytes);
            } else if !closing {
                // Under the lock, so that `release` cannot write into the middle.
                let _ = stream.write_all(&bytes);
            }
            if closing {
                store.close_after = None;
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            self.shared.1.notify_all();
        }
        self.shared.1.notify_all();
    }

    /// Answer what was kept back, and keep nothing back from now on.
    pub fn release(&self) {
        let mut store = self.store();
        store.held_kinds.clear();
        let held = std::mem::take(&mut store.held);
        let mut stream = store.stream.as_ref().expect("a link").try_clone().expect("a clone");
        for bytes in held {
            let _ = stream.write_all(&bytes);
        }
    }

    /// The process dies: its connection breaks, what it held back is gone, what it applied stays.
    pub fn die(&self) {
        let mut store = self.store();
        store.held.clear();
        if let Some(stream) = store.stream.take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub fn wait_until(&self, what: &str, mut done: impl FnMut(&Store) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut store = self.store();
        while !done(&store) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain: {what}");
            store = self
                .shared
                .1
                .wait_timeout(store, left.min(Duration::from_millis(50)))
                .expect("not poisoned")
                .0;
        }
    }
}

/// Time as a test wants it.
#[derive(Clone, Default)]
pub struct Time {
    us: Arc<AtomicU64>,
}

impl Time {
    fn clock(&self) -> Clock {
        let us = self.us.clone();
        Arc::new(move || us.load(Ordering::SeqCst))
    }

    /// The engine's next turn is this much later; `Rig::settle` makes it have one.
    pub fn pass(&self, time: Duration) {
        self.us.fetch_add(time.as_micros() as u64, Ordering::SeqCst);
    }
}

/// An engine with replicas in memory.
pub struct Rig {
    pub engine: EngineHandle,
    pub replicas: Vec<Replica>,
    pub generations: Vec<u64>,
    seen: Vec<Event>,
}

impl Rig {
    pub fn new(size_bytes: u64, replica_count: usize) -> Self {
        Self::with_options(Options::new(size_bytes, 3, replica_count))
    }

    /// With a clock that only `Time::pass` moves.
    pub fn with_time(size_bytes: u64, replica_count: usize) -> (Self, Time) {
        let time = Time::default();
        // A spin would not end.
        let options =
            Options { clock: time.clock(), spin: false, ..Options::new(size_bytes, 3, replica_count) };
        (Self::with_options(options), time)
    }

    fn with_options(options: Options) -> Self {
        let replica_count = options.slot_count;
        let engine = EngineHandle::start(options).expect("a loop");
        let replicas: Vec<Replica> = (0..replica_count).map(|_| Replica::default()).collect();
        let mut rig = Rig { engine, replicas, generations: vec![0; replica_count], seen: Vec::new() };
        for slot in 0..replica_count {
            rig.attach(slot, true);
        }
        let all: Vec<usize> = (0..replica_count).collect();
        rig.engine.set_members(&all).expect("open");
        rig.engine.set_readers(&all).expect("open");
        rig
    }

    pub fn attach(&mut self, slot: usize, sync: bool) {
        let stream = self.replicas[slot].connect();
        self.generations[slot] = self.engine.attach_link(slot, OwnedFd::from(stream), sync).expect("open");
    }

    pub fn client(&self) -> NbdClient {
        self.client_with(true, 1, false)
    }

    pub fn client_with(&self, structured: bool, meta_context: u32, read_only: bool) -> NbdClient {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let terms = ClientTerms { structured, meta_context, read_only };
        self.engine.add_client(OwnedFd::from(theirs), terms).expect("open");
        NbdClient { stream: ours, next_cookie: 1 }
    }

    /// The next event that `wanted` accepts; others are passed over (and can be asked for later).
    pub fn event(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.seen.iter().position(&wanted) {
                return self.seen.remove(index);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no event: {what}; seen {:?}", self.seen);
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                self.engine.event_fd(),
                rustix::event::PollFlags::IN,
            )];
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
            self.seen.extend(self.engine.poll_events());
        }
    }

    /// True if such an event has come until now.
    pub fn has_event(&mut self, wanted: impl Fn(&Event) -> bool) -> bool {
        self.seen.extend(self.engine.poll_events());
        self.seen.iter().any(wanted)
    }

    /// Every command given so far has been carried out when this returns.
    pub fn settle(&self) {
        self.engine.stats().expect("open");
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub body: Vec<u8>,
}

pub struct NbdClient {
    pub stream: UnixStream,
    next_cookie: u64,
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const FUA: u16 = 1;
pub const DF: u16 = 4;

pub fn request_bytes(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    bytes.extend_from_slice(&0x2560_9513u32.to_be_bytes());
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

impl NbdClient {
    /// Send a request and its payload; returns the cookie.
    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = request_bytes(command, flags, cookie, offset, length);
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).expect("sent");
        cookie
    }

    /// A simple reply: (cookie, error).
    pub fn simple(&mut self) -> (u64, u32) {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes).expect("a reply");
        assert_eq!(bytes[0..4], 0x6744_6698u32.to_be_bytes(), "a simple reply");
        (be_u64(&bytes[8..16]), be_u32(&bytes[4..8]))
    }

    pub fn chunk(&mut self) -> Chunk {
        let mut head = [0; 20];
        self.stream.read_exact(&mut head).expect("a chunk");
        assert_eq!(head[0..4], 0x668e_33efu32.to_be_bytes(), "a structured reply");
        let mut body = vec![0; be_u32(&head[16..20]) as usize];
        self.stream.read_exact(&mut body).expect("its body");
        Chunk {
            flags: u16::from_be_bytes([head[4], head[5]]),
            kind: u16::from_be_bytes([head[6], head[7]]),
            cookie: be_u64(&head[8..16]),
            body,
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let cookie = self.send(WRITE, 0, offset, data.len() as u32, data);
        let (found, error) = self.simple();
        assert_eq!(found, cookie);
        error
    }

    /// A command that is answered by a simple reply; returns its error.
    pub fn command(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u32 {
        let cookie = self.send(command, flags, offset, length, &[]);
        let (found, error) = self.simple();
        assert_eq!(found, cookie);
        error
    }

    /// Structured read.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.send(READ, 0, offset, length, &[]);
        self.read_reply(cookie, offset, length)
    }

    pub fn read_reply(&mut self, cookie: u64, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let mut data = vec![0xEE; length as usize];
        let mut covered = vec![false; length as usize];
        let mut error = None;
        loop {
            let chunk = self.chunk();
            assert_eq!(chunk.cookie, cookie);
            match chunk.kind {
                0 => {}
                1 | 2 => {
                    let start = (be_u64(&chunk.body[0..8]) - offset) as usize;
                    let hole = chunk.kind == 2;
                    let count = if hole { be_u32(&chunk.body[8..12]) as usize } else { chunk.body.len() - 8 };
                    assert!(count > 0);
                    for index in 0..count {
                        assert!(!std::mem::replace(&mut covered[start + index], true), "told twice");
                        data[start + index] = if hole { 0 } else { chunk.body[8 + index] };
                    }
                }
                0x8001 => error = Some(be_u32(&chunk.body[0..4])),
                other => panic!("chunk of kind {other}"),
            }
            if chunk.flags & 1 != 0 {
                break;
            }
        }
        match error {
            Some(error) => Err(error),
            None => {
                assert!(covered.iter().all(|byte| *byte), "not all was told");
                Ok(data)
            }
        }
    }

    /// Read with simple replies.
    pub fn read_simple(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.send(READ, 0, offset, length, &[]);
        let (found, error) = self.simple();
        assert_eq!(found, cookie);
        if error != 0 {
            return Err(error);
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).expect("data");
        Ok(data)
    }

    /// Look at the next bytes without taking them.
    pub fn peek(&self, bytes: &mut [u8]) {
        let (_, count) = rustix::net::recv(
            &self.stream,
            &mut *bytes,
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::WAITALL,
        )
        .expect("received");
        assert_eq!(count, bytes.len());
    }

    /// Replies of one structured read and of `others` (simple ones), in whatever order they come.
    pub fn read_among(&mut self, read: u64, offset: u64, length: u32, others: &[u64]) -> Vec<u8> {
        let (mut data, mut replies) = (None, 0);
        while data.is_none() || replies < others.len() {
            let mut magic = [0; 4];
            self.peek(&mut magic);
            if magic == 0x6744_6698u32.to_be_bytes() {
                let (cookie, error) = self.simple();
                assert!(others.contains(&cookie) && error == 0);
                replies += 1;
            } else {
                data = Some(self.read_reply(read, offset, length).expect("readable"));
            }
        }
        data.expect("set")
    }

    /// Nothing more comes, and the connection is closed.
    pub fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{} bytes before the end", rest.len()),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    /// True if a byte of a reply is there within this time.
    pub fn has_reply_within(&self, time: Duration) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: time.as_nanos() as i64 };
        rustix::event::poll(&mut fds, Some(&timeout)).expect("polled") > 0
    }
}

pub fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("4 bytes"))
}

pub fn be_u64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("8 bytes"))
}

/// Bytes that differ from place to place.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
