//! The thread that serves all sessions of all stores of one replica server: one epoll loop.
//!
//! Per turn and session: one read, all complete frames applied under the store's lock, entries
//! committed, then the replies in one send. It never waits for the disk, but for a map chunk that is not
//! cached and for a write that the kernel throttles. Started by service.rs.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::frame::{Header, HEADER_BYTES, REPLY};

use super::apply::{Held, Turn};
use super::buffers::InBuffer;
use super::handle::{Event, Message, NewSession, ReadDone, Shared, StoreHandle};
use super::read::Plan;
use super::session::Session;

/// epoll's name for the inbox; sessions count from 1.
const INBOX: u64 = 0;
const EVENTS_PER_WAIT: usize = 64;

pub struct ServerLoop {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    sessions: HashMap<u64, Box<Session>>,
    /// By store key. Only stores that ever held a frame.
    held: HashMap<u64, Held>,
    plan: Plan,
    stopping: bool,
}

impl ServerLoop {
    pub fn new(shared: Arc<Shared>) -> rustix::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, shared.wake_fd(), EventData::new_u64(INBOX), EventFlags::IN)?;
        Ok(Self {
            shared,
            epoll,
            sessions: HashMap::new(),
            held: HashMap::new(),
            plan: Plan::default(),
            stopping: false,
        })
    }

    pub fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS_PER_WAIT);
        while !self.stopping {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => panic!("epoll_wait on descriptors of our own: {error}"),
            }
            for event in &events {
                let (flags, data) = (event.flags, event.data);
                match data.u64() {
                    INBOX => self.read_inbox(),
                    id => self.serve(id, flags.intersects(!EventFlags::OUT)),
                }
            }
        }
        for id in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.close(id, "the data plane is shut down");
        }
    }

    fn read_inbox(&mut self) {
        let mut touched = BTreeSet::new();
        for message in self.shared.take_inbox() {
            match message {
                Message::Attach(new) => self.attach(new),
                Message::Fence { key, epoch, reason, done } => {
                    self.fence(key, epoch, reason);
                    let _ = done.send(());
                }
                Message::Marked(handle) => self.resume_held(&handle, &mut touched),
                Message::Flushed(frames) => self.answer_flushed(frames, &mut touched),
                Message::Failed { key } => self.end_failed(key),
                Message::ReadDone(done) => self.finish_read(done, &mut touched),
                Message::Warmed { handle, frame } => {
                    if let Some(held) = self.held.get_mut(&handle.key) {
                        held.note_warmed(frame);
                    }
                    self.resume_held(&handle, &mut touched);
                }
                Message::Stop => self.stopping = true,
            }
        }
        for id in touched {
            self.serve(id, false);
        }
    }

    fn attach(&mut self, new: NewSession) {
        if !new.peer {
            self.end_data_sessions(new.handle.key, new.epoch);
        }
        let session = Box::new(Session::new(new));
        let id = session.id;
        // It may have been fenced between the hello and here.
        let refused = {
            let mut guarded = session.handle.lock(&self.shared);
            guarded.sessions += 1;
            let fenced = guarded.closed || guarded.store.epoch() != session.epoch;
            let failed = guarded.store.check_alive().is_err().then_some("the store failed");
            fenced.then_some("a newer epoch was claimed").or(failed)
        };
        let added = epoll::add(&self.epoll, &session.fd, EventData::new_u64(id), EventFlags::IN);
        self.sessions.insert(id, session);
        match (added, refused) {
            (Ok(()), Some(why)) => self.close(id, why),
            (Ok(()), None) => {}
            (Err(error), _) => self.close(id, &format!("watching the socket: {error}")),
        }
    }

    /// An engine has one link to a replica. What waits unread or held on an earlier one is dropped: the
    /// engine sends it again on the new link, and applied late it would overwrite newer writes (C12).
    fn end_data_sessions(&mut self, key: u64, epoch: u64) {
        let data = |session: &Session| session.handle.key == key && !session.peer && session.epoch <= epoch;
        let ids: Vec<u64> =
            self.sessions.values().filter(|session| data(session)).map(|session| session.id).collect();
        for id in ids {
            self.close(id, "the engine connected again");
        }
    }

    /// Data sessions of `epoch` itself end too: the engine claims before it connects, so they are left over
    /// from before the claim, and a late frame of one would count as a live write in the resync that follows.
    fn fence(&mut self, key: u64, epoch: u64, reason: &str) {
        let ends = |session: &Session| {
            session.handle.key == key && (session.epoch < epoch || (session.epoch == epoch && !session.peer))
        };
        let ids: Vec<u64> =
            self.sessions.values().filter(|session| ends(session)).map(|session| session.id).collect();
        for id in ids {
            self.close(id, reason);
        }
        if epoch == u64::MAX {
            self.held.remove(&key);
        }
    }

    /// A store that failed answers nothing more, to nobody: readers go elsewhere at once.
    fn end_failed(&mut self, key: u64) {
        let ids: Vec<u64> = self
            .sessions
            .values()
            .filter(|session| session.handle.key == key)
            .map(|session| session.id)
            .collect();
        for id in ids {
            self.close(id, "the store failed");
        }
        self.held.remove(&key);
    }

    fn close(&mut self, id: u64, reason: &str) {
        if let Some(session) = self.sessions.remove(&id) {
            self.end(&session, reason);
        }
    }

    /// The socket closes with the session; frames it left in `held` are dropped when their turn comes.
    fn end(&self, session: &Session, reason: &str) {
        session.handle.lock(&self.shared).sessions -= 1;
        let _ = epoll::delete(&self.epoll, &session.fd);
        // Before the peer can know: whoever saw the end finds the event.
        self.shared.push_event(Event::SessionClosed {
            volume_id: session.handle.volume_id.clone(),
            session_id: session.id,
            reason: reason.to_owned(),
        });
        let _ = rustix::net::shutdown(&session.fd, rustix::net::Shutdown::Both);
    }

    /// One turn of one session.
    fn serve(&mut self, id: u64, readable: bool) {
        let Some(mut session) = self.sessions.remove(&id) else { return };
        match self.turn(&mut session, readable) {
            Ok(()) => {
                self.sessions.insert(id, session);
            }
            Err(reason) => self.end(&session, &reason),
        }
    }

    fn turn(&mut self, session: &mut Session, readable: bool) -> Result<(), String> {
        if readable && !session.paused() {
            session.receive()?;
        }
        loop {
            let applied = self.apply_frames(session)?;
            let was_paused = session.paused();
            session.send()?;
            // Frames that are here already are applied as soon as the replies before them have left: no
            // event of the socket would tell us to.
            if session.paused() || (applied == 0 && !was_paused) {
                break;
            }
        }
        let wanted = session.wanted_interest();
        if wanted != session.interest {
            epoll::modify(&self.epoll, &session.fd, EventData::new_u64(session.id), wanted)
                .map_err(|error| format!("watching the socket: {error}"))?;
            session.interest = wanted;
        }
        Ok(())
    }

    /// Applies the complete frames in the session's buffer. Returns how many.
    fn apply_frames(&mut self, session: &mut Session) -> Result<usize, String> {
        let mut applied = 0;
        if session.front()?.is_none() || session.paused() {
            return Ok(0);
        }
        let handle = Arc::clone(&session.handle);
        let mut guarded = handle.lock(&self.shared);
        let held = self.held.entry(handle.key).or_default();
        let mut input = std::mem::replace(&mut session.input, InBuffer::hollow());
        let result = loop {
            if session.paused() {
                break Ok(());
            }
            let bytes = input.unparsed();
            let Some(first) = bytes.first_chunk::<HEADER_BYTES>() else { break Ok(()) };
            let header = match Header::decode(first) {
                Ok(header) if header.kind & REPLY == 0 => header,
                Ok(_) => break Err("a reply where requests belong".to_owned()),
                Err(why) => break Err(format!("a bad frame header: {why:?}")),
            };
            let frame_bytes = HEADER_BYTES + header.payload_bytes as usize;
            let Some(payload) = bytes.get(HEADER_BYTES..frame_bytes) else { break Ok(()) };
            if let Err(reason) = session.admit(&header) {
                break Err(reason);
            }
            let mut turn = Turn { shared: &self.shared, guarded: &mut guarded, held, plan: &mut self.plan };
            turn.apply(session, &header, payload);
            input.consume(frame_bytes);
            applied += 1;
        };
        session.input = input;
        // Before any reply leaves: a killed process must not have lost what it answered (C7).
        let committed = guarded.store.commit().and_then(|()| guarded.store.check_alive());
        self.shared.settle(&handle, &mut guarded);
        // A store that failed answers nothing, not even with an error: the failure is yet to be noted (C15).
        result.and(committed.map_err(|error| error.message)).map(|()| applied)
    }

    /// Marks became durable: frames that waited for them go, in their order.
    fn resume_held(&mut self, handle: &Arc<StoreHandle>, touched: &mut BTreeSet<u64>) {
        let Some(held) = self.held.get_mut(&handle.key) else { return };
        if held.is_empty() {
            return;
        }
        let mut resumed = BTreeSet::new();
        let mut guarded = handle.lock(&self.shared);
        for frame in held.take() {
            let Some(session) = self.sessions.get_mut(&frame.session) else { continue };
            session.undefer(frame.payload.len());
            let mut turn = Turn { shared: &self.shared, guarded: &mut guarded, held, plan: &mut self.plan };
            turn.apply(session, &frame.header, &frame.payload);
            resumed.insert(frame.session);
        }
        let committed = guarded.store.commit().and_then(|()| guarded.store.check_alive());
        self.shared.settle(handle, &mut guarded);
        drop(guarded);
        if let Err(error) = committed {
            for id in resumed {
                self.close(id, &error.message);
            }
        } else {
            touched.append(&mut resumed);
        }
    }

    fn answer_flushed(&mut self, frames: Vec<(u64, Header, u32)>, touched: &mut BTreeSet<u64>) {
        for (id, header, status) in frames {
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            session.undefer(0);
            session.reply(&header, status);
            touched.insert(id);
        }
    }

    fn finish_read(&mut self, done: ReadDone, touched: &mut BTreeSet<u64>) {
        let id = done.job.session;
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let handle = Arc::clone(&session.handle);
        let mut guarded = handle.lock(&self.shared);
        let held = self.held.entry(handle.key).or_default();
        let mut turn = Turn { shared: &self.shared, guarded: &mut guarded, held, plan: &mut self.plan };
        turn.finish_read(session, done);
        let committed = guarded.store.commit().and_then(|()| guarded.store.check_alive());
        self.shared.settle(&handle, &mut guarded);
        drop(guarded);
        match committed {
            Ok(()) => drop(touched.insert(id)),
            Err(error) => self.close(id, &error.message),
        }
    }
}
