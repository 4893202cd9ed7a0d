//! What the threads of one replica server share: an open store behind its lock, the queues between the
//! threads, and the events for Python.
//!
//! Locks: a store's lock is held for one batch of requests, never while a file is synced. The inbox and
//! the queues have locks of their own, taken last and held for a push or a pop.

use std::collections::{HashSet, VecDeque};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{eventfd, EventfdFlags};
use rustix::fd::OwnedFd;

use crate::frame::Header;

use super::error::Result;
use super::files::{Disk, RealDisk};
use super::flush::Clean;
use super::read::Plan;
use super::store::{Store, StoreEvent};

pub type RealFile = <RealDisk as Disk>::File;

/// Damaged blocks that wait to be told to Python; more are only counted. Other events are never dropped:
/// sessions and stores, which Python makes, bound them.
const DAMAGE_EVENTS_MAX: usize = 4096;

/// Who waits for a flush.
pub enum Waiter {
    Frame { session: u64, header: Header },
    Call(mpsc::Sender<Result<()>>),
}

pub struct Guarded {
    pub store: Store<RealFile>,
    pub waiters: Vec<Waiter>,
    pub flush_queued: bool,
    pub mark_queued: bool,
    pub closed: bool,
    pub sessions: u64,
    /// The store failed, and that was noted (or could not be). Before it nobody is told.
    pub failure_told: bool,
}

/// One open store.
pub struct StoreHandle {
    /// Tells stores apart that were opened one after the other under one volume id.
    pub key: u64,
    pub volume_id: String,
    pub path: PathBuf,
    pub data_files: Vec<Arc<RealFile>>,
    pub map_file: Arc<RealFile>,
    pub regions_file: Arc<RealFile>,
    guarded: Mutex<Guarded>,
    /// Marks became durable, or the store failed.
    changed: Condvar,
    /// Held by whoever grows the files, syncs included. Taken before the store's lock.
    pub growing: Mutex<()>,
}

impl StoreHandle {
    pub fn new(key: u64, volume_id: &str, path: PathBuf, store: Store<RealFile>) -> Self {
        Self {
            key,
            volume_id: volume_id.to_owned(),
            path,
            data_files: store.data_files(),
            map_file: store.map_file(),
            regions_file: store.regions_file(),
            guarded: Mutex::new(Guarded {
                store,
                waiters: Vec::new(),
                flush_queued: false,
                mark_queued: false,
                closed: false,
                sessions: 0,
                failure_told: false,
            }),
            changed: Condvar::new(),
            growing: Mutex::new(()),
        }
    }

    /// # Panics
    /// If a thread died with the store in an unknown state: a bug of ours, not to be served on.
    pub fn lock(&self, shared: &Shared) -> MutexGuard<'_, Guarded> {
        let mut guarded = self.guarded.lock().expect("a thread died while it held a store");
        guarded.store.set_now_ms(shared.now_ms());
        guarded
    }

    pub fn notify_changed(&self) {
        self.changed.notify_all();
    }

    /// Waits until these regions are marked, durably. The lock is free meanwhile.
    pub fn ensure_marked(
        self: &Arc<Self>,
        shared: &Shared,
        regions: RangeInclusive<u32>,
        held: bool,
    ) -> Result<MutexGuard<'_, Guarded>> {
        let mut guarded = self.lock(shared);
        loop {
            guarded.store.check_alive()?;
            let begun = guarded.store.begin_marks(regions.clone(), held);
            shared.settle(self, &mut guarded);
            if begun? {
                return Ok(guarded);
            }
            guarded = self.wait_changed(guarded);
        }
    }

    /// Passes a call's error on, but that of a failed store not before the failure was noted: what is known
    /// outside must not be forgotten here by a kill (C15).
    pub fn told<T>(self: &Arc<Self>, shared: &Shared, result: Result<T>) -> Result<T> {
        if result.is_err() {
            let mut guarded = self.lock(shared);
            shared.settle(self, &mut guarded);
            while guarded.store.check_alive().is_err() && !guarded.failure_told && !guarded.closed {
                guarded = self.wait_changed(guarded);
            }
        }
        result
    }

    fn wait_changed<'a>(&self, guarded: MutexGuard<'a, Guarded>) -> MutexGuard<'a, Guarded> {
        self.changed.wait(guarded).expect("a thread died while it held a store")
    }
}

/// For Python; the names are in _dataplane.pyi.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    SessionClosed { volume_id: String, session_id: u64, reason: String },
    StoreFailed { volume_id: String, reason: String },
    BlockDamaged { volume_id: String, block_index: u64 },
}

/// A connected socket to serve.
pub struct NewSession {
    pub id: u64,
    pub fd: OwnedFd,
    pub epoch: u64,
    pub peer: bool,
    pub handle: Arc<StoreHandle>,
}

/// A session and a request of it.
pub type FrameId = (u64, u64);

/// To the loop.
pub enum Message {
    Attach(NewSession),
    /// Close sessions of this store whose epoch is older, and data sessions of this very epoch.
    Fence {
        key: u64,
        epoch: u64,
        reason: &'static str,
        done: mpsc::Sender<()>,
    },
    Marked(Arc<StoreHandle>),
    Flushed(Vec<(u64, Header, u32)>),
    /// The store failed: its sessions end, unanswered.
    Failed {
        key: u64,
    },
    ReadDone(ReadDone),
    /// A block that a partial write needs is in the page cache.
    Warmed {
        handle: Arc<StoreHandle>,
        frame: FrameId,
    },
    Stop,
}

pub struct ReadJob {
    pub handle: Arc<StoreHandle>,
    pub session: u64,
    pub header: Header,
    pub plan: Plan,
    /// Only bring the blocks into the page cache, for a partial write that is held.
    pub warm: bool,
}

pub struct ReadDone {
    pub job: ReadJob,
    pub data: Vec<u8>,
    pub verified: bool,
}

/// For the thread that syncs `regions`.
pub enum MarkJob {
    Sync(Arc<StoreHandle>),
    /// Note that the store failed, then tell.
    Failed(Arc<StoreHandle>, String),
}

pub struct FlushJob {
    pub handle: Arc<StoreHandle>,
    pub clean: Clean,
    pub done: Option<mpsc::Sender<Result<()>>>,
}

/// A queue that threads wait at.
pub struct Queue<T> {
    state: Mutex<QueueState<T>>,
    ready: Condvar,
}

struct QueueState<T> {
    items: VecDeque<T>,
    poked: bool,
    closed: bool,
}

pub enum Popped<T> {
    Item(T),
    /// Nothing came; or somebody poked.
    Idle,
    Closed,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let state = QueueState { items: VecDeque::new(), poked: false, closed: false };
        Self { state: Mutex::new(state), ready: Condvar::new() }
    }
}

impl<T> Queue<T> {
    fn change(&self, change: impl FnOnce(&mut QueueState<T>)) {
        change(&mut self.state.lock().expect("queue"));
        self.ready.notify_one();
    }

    pub fn push(&self, item: T) {
        self.change(|state| state.items.push_back(item));
    }

    /// Makes one waiter look around.
    pub fn poke(&self) {
        self.change(|state| state.poked = true);
    }

    pub fn close(&self) {
        self.change(|state| state.closed = true);
        self.ready.notify_all();
    }

    /// Waits once, for at most `timeout` (`None`: for ever), unless something is there.
    pub fn pop(&self, timeout: Option<Duration>) -> Popped<T> {
        let mut state = self.state.lock().expect("queue");
        if state.items.is_empty() && !state.closed && !state.poked {
            state = match timeout {
                None => self.ready.wait(state).expect("queue"),
                Some(timeout) => self.ready.wait_timeout(state, timeout).expect("queue").0,
            };
        }
        match state.items.pop_front() {
            Some(item) => Popped::Item(item),
            None if state.closed => Popped::Closed,
            None => {
                state.poked = false;
                Popped::Idle
            }
        }
    }
}

#[derive(Default)]
struct Events {
    waiting: VecDeque<Event>,
    /// Of those, the damaged blocks, by store key.
    damaged: HashSet<(u64, u64)>,
}

pub struct Shared {
    started: Instant,
    inbox: Mutex<Vec<Message>>,
    wake: OwnedFd,
    events: Mutex<Events>,
    event_fd: OwnedFd,
    pub marks: Queue<MarkJob>,
    pub flushes: Queue<FlushJob>,
    pub reads: Queue<ReadJob>,
    pub stores: Mutex<Vec<Arc<StoreHandle>>>,
    next_id: AtomicU64,
}

impl Shared {
    pub fn new() -> rustix::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            started: Instant::now(),
            inbox: Mutex::new(Vec::new()),
            wake: eventfd(0, flags)?,
            events: Mutex::new(Events::default()),
            event_fd: eventfd(0, flags)?,
            marks: Queue::default(),
            flushes: Queue::default(),
            reads: Queue::default(),
            stores: Mutex::new(Vec::new()),
            next_id: AtomicU64::new(1),
        })
    }

    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    pub fn event_fd(&self) -> &OwnedFd {
        &self.event_fd
    }

    pub fn send(&self, message: Message) {
        let mut inbox = self.inbox.lock().expect("inbox");
        inbox.push(message);
        if inbox.len() == 1 {
            // The counter cannot overflow: the loop reads it before it empties the inbox.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    pub fn take_inbox(&self) -> Vec<Message> {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        std::mem::take(&mut *self.inbox.lock().expect("inbox"))
    }

    pub fn push_event(&self, event: Event) {
        self.events.lock().expect("events").waiting.push_back(event);
        let _ = rustix::io::write(&self.event_fd, &1u64.to_ne_bytes());
    }

    /// A block that Python is yet to hear of is told once. Returns false when there are too many already.
    fn push_damaged(&self, handle: &StoreHandle, block_index: u64) -> bool {
        {
            let mut events = self.events.lock().expect("events");
            let block = (handle.key, block_index);
            if events.damaged.contains(&block) {
                return true;
            }
            if events.damaged.len() >= DAMAGE_EVENTS_MAX {
                return false;
            }
            events.damaged.insert(block);
        }
        self.push_event(Event::BlockDamaged { volume_id: handle.volume_id.clone(), block_index });
        true
    }

    pub fn poll_events(&self) -> Vec<Event> {
        let mut events = self.events.lock().expect("events");
        let _ = rustix::io::read(&self.event_fd, &mut [0u8; 8]);
        events.damaged.clear();
        events.waiting.drain(..).collect()
    }

    /// Hands a store's news on: events to Python, marks and flushes to their threads.
    pub fn settle(&self, handle: &Arc<StoreHandle>, guarded: &mut Guarded) {
        if guarded.store.log().has_unsynced() && !guarded.mark_queued {
            guarded.mark_queued = true;
            self.marks.push(MarkJob::Sync(Arc::clone(handle)));
        }
        if !guarded.waiters.is_empty() && !guarded.flush_queued {
            guarded.flush_queued = true;
            self.flushes.push(FlushJob { handle: Arc::clone(handle), clean: Clean::Nothing, done: None });
        }
        if guarded.store.has_events() {
            for event in guarded.store.take_events() {
                match event {
                    StoreEvent::Failed(reason) => {
                        self.marks.push(MarkJob::Failed(Arc::clone(handle), reason));
                    }
                    StoreEvent::BlockDamaged(block) => {
                        if !self.push_damaged(handle, block) {
                            guarded.store.counters.damage_events_dropped += 1;
                        }
                    }
                }
            }
        }
    }
}
