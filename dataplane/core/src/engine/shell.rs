//! The loop thread: waits, hands each event to its chapter, writes what has gathered.
//!
//! Owns every socket and all state of one attached volume; nothing else touches them. One turn:
//! wait; links and clients that are readable (one read each); outcomes of the table; clients that
//! a limit held back; timers; then one gathered write per link and per client.
//!
//! Chapters: `intake` (bytes of clients become frames), `answers` (frames of links become
//! outcomes), `holding` (who may see them yet), `hedging` (reads that are late), `reading` (reads,
//! verification, repair), `repairing` (by order), `upkeep` (timers, limits, stats).

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::Timespec;
use rustix::io::Errno;

use super::answers::ReadOp;
use super::buffers::{Buf, Pool, Sent};
use super::client::Client;
use super::commands::{ClientTerms, Clock, Command, Event, Options, Shared};
use super::hedging::Hedging;
use super::holding::HeldAnswer;
use super::intake::{Mutation, Request};
use super::lease::Lease;
use super::limits::{SCRATCH_BYTES, SPIN_US};
use super::link::{Link, LinkEnd};
use super::reading::Fix;
use super::readout::Segment;
use super::regions::{Regions, Released};
use super::repairing::Repairing;
use super::requests::{bit, Outcome, Slots, Table};
use super::slab::Slab;
use super::spin::Spin;
use super::stats::{Counters, SlotStats};
use super::upkeep::Timers;

const TOKEN_COMMANDS: u64 = 0;
const TOKEN_LINK: u64 = 1 << 40;
const TOKEN_CLIENT: u64 = 2 << 40;
const TOKEN_INDEX: u64 = (1 << 40) - 1;

/// Events taken from epoll at once.
const READY_MAX: usize = 256;

/// Zeroes to send from: as long as a run of them is worth one piece of a gathered write.
const ZERO_RUN_BYTES: usize = 64 * 1024;

/// What waits for a region.
pub(super) enum Parked {
    Mutation(Mutation),
    Read(ReadOp),
}

pub(super) struct Shell {
    pub shared: Arc<Shared>,
    epoll: OwnedFd,
    ready: Vec<epoll::Event>,
    clock: Clock,
    started_us: u64,
    /// When this turn began: not after anything it sends.
    pub now_us: u64,
    /// When bytes of a link were last received: not before them.
    pub received_us: u64,
    pub stopped: bool,
    /// Something is left to do: do not sleep.
    pub again: bool,
    spin: Spin,

    pub pool: Pool,
    pub scratch: Vec<u8>,
    pub zeroes: Rc<Buf>,

    pub size_bytes: u64,
    pub epoch: u64,
    pub clients: Slab<Client>,
    pub dirty_clients: Vec<u32>,
    /// Clients held back by a limit or a pause, oldest first.
    pub blocked: VecDeque<u32>,
    pub links: Vec<Option<Link>>,
    pub attached: Slots,
    pub readers: Slots,
    /// Where the search for a reader begins: it turns, so that equals share the load.
    pub reader_turn: usize,
    pub slot_stats: Vec<SlotStats>,

    pub requests: Slab<Request>,
    pub table: Table,
    pub outcomes: Vec<Outcome>,
    pub reads: Slab<ReadOp>,
    pub waiting_reads: Vec<u32>,
    pub lease: Lease,
    /// The number of the last LEASE frame.
    pub lease_number: u64,
    pub held_answers: Vec<HeldAnswer>,
    pub hedging: Hedging,
    pub fixes: Slab<Fix>,
    pub repairing: Repairing,
    pub regions: Regions<Parked>,
    pub paused: bool,
    /// Writes that a region let go during a pause.
    pub held: VecDeque<Mutation>,
    /// Data of reads whose reply has not been queued.
    pub reads_reserved: u64,

    pub events: Vec<Event>,
    pub counters: Counters,
    pub timers: Timers,
    pub segments: Vec<Segment>,
    pub bad_blocks: Vec<u64>,
}

impl Shell {
    pub fn new(options: Options, shared: Arc<Shared>, epoll: OwnedFd) -> Self {
        let pool = Pool::default();
        // From a pool of its own: it is not counted as in flight.
        let mut zeroes = Pool::default().take(ZERO_RUN_BYTES);
        zeroes.fill(0);
        Shell {
            shared,
            epoll,
            ready: Vec::with_capacity(READY_MAX),
            started_us: (options.clock)(),
            clock: options.clock,
            now_us: 0,
            received_us: 0,
            stopped: false,
            again: false,
            spin: Spin::new(options.spin),
            zeroes: Rc::new(zeroes),
            pool,
            scratch: vec![0; SCRATCH_BYTES],
            size_bytes: options.size_bytes,
            epoch: options.epoch,
            clients: Slab::new(),
            dirty_clients: Vec::new(),
            blocked: VecDeque::new(),
            links: (0..options.slot_count).map(|_| None).collect(),
            attached: 0,
            readers: 0,
            reader_turn: 0,
            slot_stats: vec![SlotStats { mode: "none", ..Default::default() }; options.slot_count],
            requests: Slab::new(),
            table: Table::new(),
            outcomes: Vec::new(),
            reads: Slab::new(),
            waiting_reads: Vec::new(),
            lease: Lease::new(),
            lease_number: 0,
            held_answers: Vec::new(),
            hedging: Hedging::new(),
            fixes: Slab::new(),
            repairing: Repairing::new(),
            regions: Regions::new(),
            paused: false,
            held: VecDeque::new(),
            reads_reserved: 0,
            events: Vec::new(),
            counters: Counters::default(),
            timers: Timers::default(),
            segments: Vec::new(),
            bad_blocks: Vec::new(),
        }
    }

    pub fn run(mut self) {
        let token = EventData::new_u64(TOKEN_COMMANDS);
        epoll::add(&self.epoll, self.shared.command_fd(), token, EventFlags::IN)
            .expect("an eventfd can be watched");
        while !self.stopped {
            self.wait();
            self.turn();
        }
        self.finish();
    }

    pub fn clock_us(&self) -> u64 {
        (self.clock)().saturating_sub(self.started_us)
    }

    fn poll(&mut self, timeout_us: Option<u64>) -> bool {
        self.ready.clear();
        let timeout = timeout_us
            .map(|us| Timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000 * 1000) as i64 });
        let room = rustix::buffer::spare_capacity(&mut self.ready);
        match epoll::wait(&self.epoll, room, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => !self.ready.is_empty(),
            Err(error) => panic!("epoll_wait: {error}"), // our descriptor, our arguments: a bug of ours
        }
    }

    /// Fill `ready`: what comes during a short spin, if that is worth while, else sleep.
    fn wait(&mut self) {
        if std::mem::take(&mut self.again) {
            self.poll(Some(0));
            self.now_us = self.clock_us();
            return;
        }
        let began = self.clock_us();
        if self.spin.wanted() {
            loop {
                let hit = self.poll(Some(0));
                self.now_us = self.clock_us();
                if hit || self.now_us >= began + SPIN_US {
                    self.spin.spun(hit);
                    if hit {
                        return;
                    }
                    break;
                }
                // Replicas and clients may share this core: what they do is what we wait for
                // (measured on two cores: spinning without this is slower than sleeping).
                std::thread::yield_now();
            }
        }
        self.now_us = self.clock_us();
        let timeout = self.next_deadline_us().map(|deadline| deadline.saturating_sub(self.now_us));
        self.poll(timeout);
        self.now_us = self.clock_us();
        self.spin.slept(self.now_us - began);
    }

    fn turn(&mut self) {
        self.notice_own_pause();
        for index in 0..self.ready.len() {
            let event = self.ready[index];
            let (flags, token) = (event.flags, event.data.u64());
            let key = (token & TOKEN_INDEX) as u32;
            match token & !TOKEN_INDEX {
                TOKEN_LINK => self.on_link_ready(key as usize, flags),
                TOKEN_CLIENT => self.on_client_ready(key, flags),
                _ => self.on_commands(),
            }
            self.run_outcomes();
        }
        self.resume_blocked();
        self.release_held();
        self.start_orders();
        self.upkeep();
        self.run_outcomes();
        self.flush_links();
        self.flush_clients();
        self.run_outcomes();
        self.again |= self.release_is_due();
        for token in self.table.take_drained() {
            self.events.push(Event::Drained { token });
        }
        let shared = self.shared.clone();
        shared.push_events(&mut self.events);
    }

    fn on_commands(&mut self) {
        for command in self.shared.take_commands() {
            match command {
                Command::AddClient { client_id, fd, terms } => self.add_client(client_id, fd, terms),
                Command::AttachLink { slot, generation, fd, sync } => {
                    self.attach_link(slot, generation, fd, sync);
                }
                Command::DetachLink { slot, generation } => {
                    self.close_link(slot, generation, LinkEnd::Detached);
                }
                Command::SetMembers(members) => self.set_members(members),
                Command::SetReaders(readers) => {
                    self.readers = readers;
                    self.retry_waiting_reads();
                }
                Command::SetLease(quorums) => self.lease.set(quorums),
                Command::Barrier(token) => self.table.barrier(token),
                Command::SetUnequal(regions) => self.regions.set_unequal(&regions),
                Command::SetPartialWait(regions) => {
                    let released = self.regions.set_partial_wait(&regions);
                    self.release(released);
                }
                Command::RegionsEqual { regions, diverged_seen } => {
                    self.drop_undecided();
                    let regions = self.regions.settled(&regions, diverged_seen);
                    self.table.regions_equal(&regions);
                    let released = self.regions.equal(&regions);
                    self.release(released);
                }
                Command::PartialDone(regions) => {
                    let released = self.regions.partial_done(&regions);
                    self.release(released);
                }
                Command::RepairBlock { slot, block_index } => self.order_repair(slot, block_index),
                Command::Pause(paused) => self.pause(paused),
                Command::SetSize(size_bytes) => self.size_bytes = self.size_bytes.max(size_bytes),
                // The asker may have gone: then nobody misses the answer.
                Command::Stats(sender) => drop(sender.try_send(self.report())),
                Command::Stop => self.stopped = true,
            }
            self.run_outcomes();
        }
    }

    fn add_client(&mut self, client_id: u64, fd: OwnedFd, terms: ClientTerms) {
        prepare_socket(&fd);
        let key = self.clients.insert(Client::new(client_id, fd, terms, self.now_us));
        let token = EventData::new_u64(TOKEN_CLIENT | u64::from(key));
        if let Err(error) = epoll::add(&self.epoll, &self.clients[key].fd, token, EventFlags::IN) {
            self.clients.remove(key);
            let reason = format!("cannot watch the socket: {error}");
            self.events.push(Event::ClientClosed { client_id, reason });
        }
    }

    pub fn close_client(&mut self, key: u32, reason: &str) {
        let Some(client) = self.clients.remove(key) else { return };
        // The caller may still hold a duplicate: say good-bye on the connection itself.
        let _ = epoll::delete(&self.epoll, &client.fd);
        let _ = rustix::net::shutdown(&client.fd, rustix::net::Shutdown::Both);
        if client.blocked {
            self.blocked.retain(|blocked| *blocked != key);
        }
        self.drop_intake(client.intake);
        self.events.push(Event::ClientClosed { client_id: client.client_id, reason: reason.into() });
    }

    /// Watch a new link's socket. False if that is impossible.
    pub fn watch_link(&mut self, slot: usize, fd: &OwnedFd) -> bool {
        prepare_socket(fd);
        let token = EventData::new_u64(TOKEN_LINK | slot as u64);
        epoll::add(&self.epoll, fd, token, EventFlags::IN).is_ok()
    }

    pub fn unwatch(&self, fd: &OwnedFd) {
        let _ = epoll::delete(&self.epoll, fd);
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }

    pub fn mark_client_dirty(&mut self, key: u32) {
        let client = &mut self.clients[key];
        if !client.dirty {
            client.dirty = true;
            self.dirty_clients.push(key);
        }
    }

    pub fn update_client_interest(&mut self, key: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let wanted = client.interest_wanted();
        if wanted != client.interest {
            client.interest = wanted;
            let token = EventData::new_u64(TOKEN_CLIENT | u64::from(key));
            let _ = epoll::modify(&self.epoll, &client.fd, token, wanted);
        }
    }

    fn flush_links(&mut self) {
        for slot in 0..self.links.len() {
            let Some(link) = &mut self.links[slot] else { continue };
            if !std::mem::take(&mut link.dirty) || link.out_blocked {
                continue;
            }
            self.send_link(slot);
        }
    }

    pub fn send_link(&mut self, slot: usize) {
        let Some(link) = &mut self.links[slot] else { return };
        match link.out.send(link.fd.as_fd()) {
            Ok((sent, left)) => {
                self.slot_stats[slot].bytes += sent as u64;
                link.out_blocked = left == Sent::Blocked;
                if left == Sent::More {
                    link.dirty = true;
                    self.again = true;
                }
                let wanted = link.interest_wanted();
                if wanted != link.interest {
                    link.interest = wanted;
                    let token = EventData::new_u64(TOKEN_LINK | slot as u64);
                    let _ = epoll::modify(&self.epoll, &link.fd, token, wanted);
                }
            }
            Err(error) => {
                let generation = link.generation;
                self.close_link(slot, generation, LinkEnd::Lost(format!("send: {error}")));
            }
        }
    }

    fn flush_clients(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty_clients);
        for key in dirty.drain(..) {
            if let Some(client) = self.clients.get_mut(key) {
                client.dirty = false;
                if !client.out_blocked {
                    self.send_client(key);
                }
            }
        }
        if self.dirty_clients.is_empty() {
            self.dirty_clients = dirty; // keeps its memory
        }
    }

    pub fn send_client(&mut self, key: u32) {
        let Some(client) = self.clients.get_mut(key) else { return };
        match client.out.send(client.fd.as_fd()) {
            Ok((sent, left)) => {
                client.out_blocked = left == Sent::Blocked;
                if sent > 0 {
                    client.progress_us = self.now_us;
                    // What went out made room, for this one or for another.
                    self.again |= !self.blocked.is_empty();
                }
                if left == Sent::More {
                    self.again = true;
                    self.mark_client_dirty(key);
                }
                if let (true, Some(reason)) = (self.clients[key].is_done(), self.clients[key].closing) {
                    self.close_client(key, reason);
                } else {
                    self.update_client_interest(key);
                }
            }
            Err(error) => self.close_client(key, &format!("send: {error}")),
        }
    }

    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        if !paused {
            for mutation in std::mem::take(&mut self.held) {
                self.submit(mutation);
            }
            self.again = true; // clients held back are read again
        }
    }

    fn release(&mut self, released: Released<Parked>) {
        for queue in released {
            for parked in queue {
                match parked {
                    Parked::Mutation(mutation) => self.submit(mutation),
                    Parked::Read(op) => self.start_read(op),
                }
            }
        }
    }

    fn set_members(&mut self, members: Slots) {
        self.table.set_members(members, &mut self.outcomes);
        for (slot, link) in self.links.iter_mut().enumerate() {
            if let Some(link) = link {
                link.sync |= members & bit(slot) != 0;
            }
        }
        self.retry_waiting_reads();
    }

    /// Stopping: replies that are ready go out if the socket takes them, then everything closes.
    fn finish(&mut self) {
        self.flush_clients();
        for key in self.clients.keys() {
            self.close_client(key, "stopped");
        }
        for slot in 0..self.links.len() {
            if let Some(link) = self.links[slot].take() {
                self.unwatch(&link.fd);
            }
        }
        let shared = self.shared.clone();
        shared.push_events(&mut self.events);
    }
}

fn prepare_socket(fd: &OwnedFd) {
    // Best effort: a unix socket has no Nagle, and reading copes with what cannot be set.
    let _ = rustix::io::ioctl_fionbio(fd, true);
    let _ = rustix::net::sockopt::set_tcp_nodelay(fd, true);
}
