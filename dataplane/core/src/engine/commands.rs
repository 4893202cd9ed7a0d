//! The door of the loop: commands in, events out, each a queue and an eventfd. `EngineHandle` is
//! what binding/src/engine.rs holds; any thread may use it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{eventfd, EventfdFlags};
use rustix::io::Errno;

use super::lease::Quorum;
use super::limits::{BLOCK_EVENTS_MAX, REPAIRS_QUEUED_MAX};
use super::requests::{bit, Slots, SLOTS_MAX};
use super::shell::Shell;
use super::stats::StatsReport;
use crate::limits::{BLOCK_BYTES, REGION_BYTES, VOLUME_BYTES_MAX};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    LinkLost { slot: usize, generation: u64, reason: String },
    LinkFailed { slot: usize, generation: u64, status: u32 },
    LinkStalled { slot: usize, generation: u64 },
    BlockRepaired { slot: usize, block_index: u64 },
    BlockUnreadable { block_index: u64 },
    RegionWanted { region_index: u32 },
    RegionDiverged { region_index: u32 },
    Drained { token: u64 },
    ClientClosed { client_id: u64, reason: String },
}

/// What a client negotiated.
#[derive(Debug, Clone, Copy)]
pub struct ClientTerms {
    pub structured: bool,
    /// Id of base:allocation, 0 when not negotiated.
    pub meta_context: u32,
    pub read_only: bool,
}

pub(super) enum Command {
    AddClient { client_id: u64, fd: OwnedFd, terms: ClientTerms },
    AttachLink { slot: usize, generation: u64, fd: OwnedFd, sync: bool },
    DetachLink { slot: usize, generation: u64 },
    SetMembers(Slots),
    SetReaders(Slots),
    SetLease(Vec<Quorum>),
    Barrier(u64),
    SetUnequal(Vec<u32>),
    SetPartialWait(Vec<u32>),
    RegionsEqual { regions: Vec<u32>, diverged_seen: u64 },
    PartialDone(Vec<u32>),
    RepairBlock { slot: usize, block_index: u64 },
    Pause(bool),
    SetSize(u64),
    Stats(SyncSender<StatsReport>),
    Stop,
}

/// Tells microseconds that never go back. Tests hand in their own.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The clock that counts while the machine sleeps as well: what was agreed before must have run out after.
pub fn boot_clock() -> Clock {
    Arc::new(|| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
    })
}

/// How a loop is made. `spin` is off only to measure what it brings.
#[derive(Clone)]
pub struct Options {
    pub size_bytes: u64,
    pub epoch: u64,
    pub slot_count: usize,
    pub spin: bool,
    pub clock: Clock,
}

impl Options {
    pub fn new(size_bytes: u64, epoch: u64, slot_count: usize) -> Self {
        Options { size_bytes, epoch, slot_count, spin: true, clock: boot_clock() }
    }
}

/// The loop has been stopped, or an argument is not one of this volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    Stopped,
    BadRequest(&'static str),
    Io(Errno),
}

impl From<Errno> for Closed {
    fn from(error: Errno) -> Self {
        Closed::Io(error)
    }
}

/// Queues shared by the loop thread and its callers.
pub(super) struct Shared {
    commands: Mutex<VecDeque<Command>>,
    command_fd: OwnedFd,
    events: Mutex<VecDeque<Event>>,
    event_fd: OwnedFd,
    /// Repairs ordered and not ended.
    repairs: AtomicUsize,
}

/// A poisoned lock is a panic elsewhere, which ends the process (panic = abort): go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(fd: &OwnedFd) {
    // Fails only when the counter is full, and then it is readable already.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

fn clear(fd: &OwnedFd) {
    let mut count = [0u8; 8];
    let _ = rustix::io::read(fd, &mut count);
}

impl Shared {
    fn new() -> Result<Self, Errno> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Shared {
            commands: Mutex::new(VecDeque::new()),
            command_fd: eventfd(0, flags)?,
            events: Mutex::new(VecDeque::new()),
            event_fd: eventfd(0, flags)?,
            repairs: AtomicUsize::new(0),
        })
    }

    pub fn command_fd(&self) -> &OwnedFd {
        &self.command_fd
    }

    pub fn take_commands(&self) -> VecDeque<Command> {
        clear(&self.command_fd);
        std::mem::take(&mut *lock(&self.commands))
    }

    pub fn repair_ended(&self) {
        self.repairs.fetch_sub(1, Ordering::Relaxed);
    }

    /// Hand events to Python; one wake-up for all of them.
    pub fn push_events(&self, new: &mut Vec<Event>) {
        if new.is_empty() {
            return;
        }
        let mut events = lock(&self.events);
        for event in new.drain(..) {
            let about_block = matches!(event, Event::BlockRepaired { .. } | Event::BlockUnreadable { .. });
            if !about_block || events.len() < BLOCK_EVENTS_MAX {
                events.push_back(event);
            }
        }
        drop(events);
        signal(&self.event_fd);
    }
}

/// One attached volume's loop thread, seen from outside.
pub struct EngineHandle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    size_bytes: AtomicU64,
    slot_count: usize,
    next_client_id: AtomicU64,
    next_generation: AtomicU64,
}

impl EngineHandle {
    pub fn start(options: Options) -> Result<Self, Closed> {
        if options.slot_count == 0 || options.slot_count > SLOTS_MAX {
            return Err(Closed::BadRequest("slot_count is out of range"));
        }
        check_size(options.size_bytes)?;
        let shared = Arc::new(Shared::new()?);
        let for_thread = shared.clone();
        let (size_bytes, slot_count) = (options.size_bytes, options.slot_count);
        // The epoll descriptor is made here so that a failure is the caller's to hear.
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)?;
        let thread = std::thread::Builder::new()
            .name("engine-loop".into())
            .spawn(move || Shell::new(options, for_thread, epoll).run())
            .map_err(|_| Closed::Io(Errno::AGAIN))?;
        Ok(EngineHandle {
            shared,
            thread: Mutex::new(Some(thread)),
            size_bytes: AtomicU64::new(size_bytes),
            slot_count,
            next_client_id: AtomicU64::new(1),
            next_generation: AtomicU64::new(1),
        })
    }

    fn send(&self, command: Command) -> Result<(), Closed> {
        let thread = lock(&self.thread);
        if thread.is_none() {
            return Err(Closed::Stopped);
        }
        lock(&self.shared.commands).push_back(command);
        signal(&self.shared.command_fd);
        Ok(())
    }

    /// Readable when `poll_events` has something.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.event_fd.as_fd()
    }

    pub fn poll_events(&self) -> Vec<Event> {
        clear(&self.shared.event_fd);
        lock(&self.shared.events).drain(..).collect()
    }

    pub fn add_client(&self, fd: OwnedFd, terms: ClientTerms) -> Result<u64, Closed> {
        let client_id = self.next_client_id.fetch_add(1, Ordering::Relaxed);
        self.send(Command::AddClient { client_id, fd, terms })?;
        Ok(client_id)
    }

    pub fn attach_link(&self, slot: usize, fd: OwnedFd, sync: bool) -> Result<u64, Closed> {
        self.check_slot(slot)?;
        let generation = self.next_generation.fetch_add(1, Ordering::Relaxed);
        self.send(Command::AttachLink { slot, generation, fd, sync })?;
        Ok(generation)
    }

    pub fn detach_link(&self, slot: usize, generation: u64) -> Result<(), Closed> {
        self.check_slot(slot)?;
        self.send(Command::DetachLink { slot, generation })
    }

    pub fn set_members(&self, slots: &[usize]) -> Result<(), Closed> {
        self.send(Command::SetMembers(self.slots(slots)?))
    }

    pub fn set_readers(&self, slots: &[usize]) -> Result<(), Closed> {
        self.send(Command::SetReaders(self.slots(slots)?))
    }

    /// Quorums (slots, how many of them) whose recent answers reads need; replaces the earlier ones.
    pub fn set_lease(&self, quorums: &[(Vec<usize>, usize)]) -> Result<(), Closed> {
        let quorum = |(slots, need): &(Vec<usize>, usize)| {
            let slots = self.slots(slots)?;
            if !(1..=slots.count_ones() as usize).contains(need) {
                return Err(Closed::BadRequest("a quorum needs some of its slots"));
            }
            Ok(Quorum { slots, need: *need })
        };
        self.send(Command::SetLease(quorums.iter().map(quorum).collect::<Result<_, _>>()?))
    }

    pub fn barrier(&self, token: u64) -> Result<(), Closed> {
        self.send(Command::Barrier(token))
    }

    pub fn set_unequal(&self, regions: Vec<u32>) -> Result<(), Closed> {
        self.check_regions(&regions)?;
        self.send(Command::SetUnequal(regions))
    }

    pub fn set_partial_wait(&self, regions: Vec<u32>) -> Result<(), Closed> {
        self.check_regions(&regions)?;
        self.send(Command::SetPartialWait(regions))
    }

    /// `diverged_seen`: how many `RegionDiverged` events the caller has taken.
    pub fn regions_equal(&self, regions: Vec<u32>, diverged_seen: u64) -> Result<(), Closed> {
        self.send(Command::RegionsEqual { regions, diverged_seen })
    }

    pub fn partial_done(&self, regions: Vec<u32>) -> Result<(), Closed> {
        self.send(Command::PartialDone(regions))
    }

    /// Give a block of this slot the good copy of another.
    pub fn repair_block(&self, slot: usize, block_index: u64) -> Result<(), Closed> {
        self.check_slot(slot)?;
        if block_index >= self.size_bytes.load(Ordering::Relaxed) / BLOCK_BYTES {
            return Err(Closed::BadRequest("no such block"));
        }
        let more = |count: usize| (count < REPAIRS_QUEUED_MAX).then_some(count + 1);
        if self.shared.repairs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            return Err(Closed::BadRequest("too many repairs wait"));
        }
        self.send(Command::RepairBlock { slot, block_index })
    }

    pub fn pause(&self, paused: bool) -> Result<(), Closed> {
        self.send(Command::Pause(paused))
    }

    /// Grow the volume. Requests past the old end are accepted from now on.
    pub fn set_size(&self, size_bytes: u64) -> Result<(), Closed> {
        check_size(size_bytes)?;
        if size_bytes < self.size_bytes.load(Ordering::Relaxed) {
            return Err(Closed::BadRequest("a volume cannot shrink"));
        }
        self.size_bytes.store(size_bytes, Ordering::Relaxed);
        self.send(Command::SetSize(size_bytes))
    }

    pub fn stats(&self) -> Result<StatsReport, Closed> {
        let (sender, receiver) = sync_channel(1);
        self.send(Command::Stats(sender))?;
        receiver.recv().map_err(|_| Closed::Stopped)
    }

    /// Answer what is done, close clients and links, join the thread. Repeatable.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        // Whoever asked for stats at the last moment hears that nobody answers.
        lock(&self.shared.commands).clear();
    }

    fn check_slot(&self, slot: usize) -> Result<(), Closed> {
        if slot < self.slot_count {
            Ok(())
        } else {
            Err(Closed::BadRequest("no such slot"))
        }
    }

    fn slots(&self, slots: &[usize]) -> Result<Slots, Closed> {
        slots.iter().try_fold(0, |set, slot| self.check_slot(*slot).map(|()| set | bit(*slot)))
    }

    fn check_regions(&self, regions: &[u32]) -> Result<(), Closed> {
        let count = self.size_bytes.load(Ordering::Relaxed).div_ceil(REGION_BYTES);
        if regions.iter().all(|region| u64::from(*region) < count) {
            Ok(())
        } else {
            Err(Closed::BadRequest("no such region"))
        }
    }
}

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check_size(size_bytes: u64) -> Result<(), Closed> {
    if size_bytes == 0 || size_bytes > VOLUME_BYTES_MAX || size_bytes % BLOCK_BYTES != 0 {
        return Err(Closed::BadRequest("size_bytes must be a multiple of 4096, at most 64 TiB"));
    }
    Ok(())
}
