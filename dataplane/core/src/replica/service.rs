//! All replicas of one disk: what the binding calls (dataplane/binding/src/replica.rs, and through it
//! replica/io_path.py).
//!
//! Owns the threads and the table of open stores. Calls may block; any thread may make them. What they
//! promise is written in dataplane/binding/_dataplane.pyi.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

use super::error::{ErrorKind, Result, StoreError};
use super::files::{sync, BlockFile, Disk, RealDisk};
use super::flush::Clean;
use super::format::Stamp;
use super::handle::{Event, Message, NewSession, Shared, StoreHandle};
use super::pull::{self, PullOptions, Pulled};
use super::recovery::{self, OpenOptions, Opened};
use super::server_loop::ServerLoop;
use super::syncer::{self, flush_blocking, READ_THREADS};
use super::verify::{self, Verified};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Data,
    Peer,
}

pub struct ReplicaService {
    shared: Arc<Shared>,
    stores: Mutex<HashMap<String, Arc<StoreHandle>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

fn closed() -> StoreError {
    StoreError::new(ErrorKind::Closed, "the data plane is shut down")
}

impl ReplicaService {
    pub fn new() -> Result<Self> {
        let wrap = |error: std::io::Error| StoreError::from_io("starting the data plane", &error);
        let shared = Arc::new(Shared::new().map_err(|error| wrap(error.into()))?);
        let server = ServerLoop::new(Arc::clone(&shared)).map_err(|error| wrap(error.into()))?;
        let mut threads = Vec::new();
        threads.push(Builder::new().name("replica-loop".into()).spawn(move || server.run()).map_err(wrap)?);
        let mut start = |name: &str, run: fn(&Shared)| {
            let shared = Arc::clone(&shared);
            let thread = Builder::new().name(name.to_owned()).spawn(move || run(&shared)).map_err(wrap)?;
            threads.push(thread);
            Ok::<(), StoreError>(())
        };
        start("replica-marks", syncer::run_marks)?;
        start("replica-flush", syncer::run_flushes)?;
        for _ in 0..READ_THREADS {
            start("replica-read", syncer::run_reads)?;
        }
        Ok(Self { shared, stores: Mutex::new(HashMap::new()), threads: Mutex::new(threads) })
    }

    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.event_fd().as_fd()
    }

    pub fn poll_events(&self) -> Vec<Event> {
        self.shared.poll_events()
    }

    fn store(&self, volume_id: &str) -> Result<Arc<StoreHandle>> {
        let stores = self.stores.lock().expect("stores");
        let missing = || StoreError::new(ErrorKind::NotFound, format!("volume {volume_id} is not open here"));
        stores.get(volume_id).cloned().ok_or_else(missing)
    }

    pub fn create_store(&self, path: &Path, layer: &str, size_bytes: u64) -> Result<()> {
        recovery::create_store(&RealDisk, path, layer, size_bytes)
    }

    pub fn open_store(
        &self,
        volume_id: &str,
        path: PathBuf,
        chain: &[String],
        options: OpenOptions,
    ) -> Result<Opened> {
        let is_open =
            || StoreError::new(ErrorKind::BadRequest, format!("volume {volume_id} is open already"));
        if self.threads.lock().expect("threads").is_empty() {
            return Err(closed());
        }
        if self.store(volume_id).is_ok() {
            return Err(is_open());
        }
        let (store, opened) = recovery::open_store(&RealDisk, &path, chain, options)?;
        let handle = Arc::new(StoreHandle::new(self.shared.next_id(), volume_id, path, store));
        {
            let mut stores = self.stores.lock().expect("stores");
            if stores.contains_key(volume_id) {
                return Err(is_open());
            }
            stores.insert(volume_id.to_owned(), Arc::clone(&handle));
        }
        self.shared.stores.lock().expect("stores").push(Arc::clone(&handle));
        self.shared.settle(&handle, &mut handle.lock(&self.shared));
        self.shared.flushes.poke();
        Ok(opened)
    }

    /// Closes sessions of the store that are older than `epoch`, and data sessions of `epoch` itself.
    /// Returns when none of their frames can be applied or answered any more, held ones included.
    fn fence(&self, handle: &StoreHandle, epoch: u64, reason: &'static str) -> Result<()> {
        let (done, wait) = mpsc::channel();
        self.shared.send(Message::Fence { key: handle.key, epoch, reason, done });
        wait.recv().map_err(|_| closed())
    }

    pub fn close_store(&self, volume_id: &str) -> Result<()> {
        let handle = self.store(volume_id)?;
        let failed = {
            let mut guarded = handle.lock(&self.shared);
            guarded.closed = true;
            guarded.store.check_alive().is_err()
        };
        self.fence(&handle, u64::MAX, "the replica was closed")?;
        let flushed = if failed { Ok(()) } else { flush_blocking(&self.shared, &handle, Clean::Nothing) };
        self.stores.lock().expect("stores").remove(volume_id);
        self.shared.stores.lock().expect("stores").retain(|open| open.key != handle.key);
        handle.lock(&self.shared).store.release_lock();
        handle.notify_changed();
        flushed
    }

    pub fn set_epoch(&self, volume_id: &str, epoch: u64) -> Result<()> {
        let handle = self.store(volume_id)?;
        let (accepted, current) = {
            let mut guarded = handle.lock(&self.shared);
            (guarded.store.set_epoch(epoch), guarded.store.epoch())
        };
        if !accepted {
            let why = format!("epoch {epoch} is older than {current}");
            return Err(StoreError::new(ErrorKind::StaleEpoch, why));
        }
        self.fence(&handle, epoch, "the epoch was claimed")?;
        // A claim's answer says what the replica is worth: not that of a store that is about to be reported.
        let alive = handle.lock(&self.shared).store.check_alive();
        handle.told(&self.shared, alive)
    }

    pub fn set_stamp(&self, volume_id: &str, stamp: Stamp) -> Result<()> {
        let handle = self.store(volume_id)?;
        let begun = handle.lock(&self.shared).store.begin_set_stamp(stamp);
        handle.told(&self.shared, begun.and_then(|()| self.sync_regions(&handle)))
    }

    fn sync_regions(&self, handle: &Arc<StoreHandle>) -> Result<()> {
        let result = sync(&*handle.regions_file);
        let mut guarded = handle.lock(&self.shared);
        let result = guarded.store.synced("regions", result);
        self.shared.settle(handle, &mut guarded);
        result
    }

    pub fn attach_session(&self, volume_id: &str, fd: OwnedFd, epoch: u64, role: Role) -> Result<u64> {
        let handle = self.store(volume_id)?;
        let (current, alive) = {
            let guarded = handle.lock(&self.shared);
            (guarded.store.epoch(), guarded.store.check_alive())
        };
        handle.told(&self.shared, alive)?;
        if epoch != current {
            let why = format!("the session is of epoch {epoch}, the replica of {current}");
            return Err(StoreError::new(ErrorKind::StaleEpoch, why));
        }
        // A unix socket has no such option.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&fd, true);
        let id = self.shared.next_id();
        self.shared.send(Message::Attach(NewSession { id, fd, epoch, peer: role == Role::Peer, handle }));
        Ok(id)
    }

    pub fn dirty_regions(&self, volume_id: &str) -> Result<Vec<u32>> {
        let handle = self.store(volume_id)?;
        let regions = handle.lock(&self.shared).store.log().dirty_sorted();
        Ok(regions)
    }

    pub fn changed_since(&self, volume_id: &str, stamp: Stamp) -> Result<Vec<u32>> {
        let handle = self.store(volume_id)?;
        let guarded = handle.lock(&self.shared);
        guarded
            .store
            .log()
            .changed_since(stamp)
            .map_err(|error| StoreError::from_io("reading regions", &error))
    }

    pub fn begin_resync(&self, volume_id: &str, regions: &[u32]) -> Result<()> {
        let handle = self.store(volume_id)?;
        let begun = self.begin_resync_of(&handle, regions);
        handle.told(&self.shared, begun)
    }

    fn begin_resync_of(&self, handle: &Arc<StoreHandle>, regions: &[u32]) -> Result<()> {
        {
            let mut guarded = handle.lock(&self.shared);
            let count = guarded.store.log().count();
            if let Some(region) = regions.iter().find(|region| **region >= count) {
                return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {region}")));
            }
            guarded.store.check_alive()?;
            for region in regions {
                let begun = guarded.store.begin_marks(*region..=*region, true);
                self.shared.settle(handle, &mut guarded);
                begun?;
            }
            // From here on: a write that comes while the marks are synced is a live write.
            guarded.store.track_fresh(regions);
        }
        for region in regions {
            handle.ensure_marked(&self.shared, *region..=*region, true)?.store.hold_region(*region);
        }
        Ok(())
    }

    pub fn pull_regions(
        &self,
        volume_id: &str,
        fd: OwnedFd,
        epoch: u64,
        regions: &[u32],
        options: PullOptions,
    ) -> Result<Pulled> {
        let handle = self.store(volume_id)?;
        handle.told(&self.shared, pull::pull_regions(&self.shared, &handle, fd, epoch, regions, options))
    }

    pub fn end_resync(&self, volume_id: &str) -> Result<()> {
        let handle = self.store(volume_id)?;
        flush_blocking(&self.shared, &handle, Clean::Nothing)?;
        handle.lock(&self.shared).store.end_resync();
        Ok(())
    }

    pub fn complete_regions(&self, volume_id: &str, regions: &[u32]) -> Result<()> {
        let handle = self.store(volume_id)?;
        handle.lock(&self.shared).store.complete_regions(regions);
        self.shared.flushes.poke();
        Ok(())
    }

    pub fn flush(&self, volume_id: &str) -> Result<()> {
        flush_blocking(&self.shared, &self.store(volume_id)?, Clean::Nothing)
    }

    pub fn clean_all(&self, volume_id: &str) -> Result<()> {
        flush_blocking(&self.shared, &self.store(volume_id)?, Clean::All)
    }

    pub fn resize(&self, volume_id: &str, size_bytes: u64) -> Result<()> {
        let handle = self.store(volume_id)?;
        recovery::check_size(size_bytes)?;
        let grown = self.grow(&handle, size_bytes);
        handle.told(&self.shared, grown)
    }

    fn grow(&self, handle: &Arc<StoreHandle>, size_bytes: u64) -> Result<()> {
        // Keeps two resizes apart; other stores, and this one's lock, are free while files are synced.
        let _growing = handle.growing.lock().expect("a thread died while it grew a store");
        let current = {
            let guarded = handle.lock(&self.shared);
            guarded.store.check_alive()?;
            guarded.store.size_bytes()
        };
        if size_bytes < current {
            let why = format!("{size_bytes} bytes are fewer than {current}; a volume only grows");
            return Err(StoreError::new(ErrorKind::BadRequest, why));
        }
        if size_bytes > current {
            let files = (&*handle.data_files[0], &*handle.map_file, &*handle.regions_file);
            let grown = recovery::grow_files(files, &handle.path, size_bytes, RealDisk.boot_id());
            let mut guarded = handle.lock(&self.shared);
            if let Err(error) = grown {
                if error.kind == ErrorKind::IoError {
                    // Its syncs were of the blocks too.
                    guarded.store.fail(&error.message);
                }
                self.shared.settle(handle, &mut guarded);
                return Err(error);
            }
            guarded.store.set_size(size_bytes);
        }
        Ok(())
    }

    pub fn verify(&self, volume_id: &str, first_region: u32, region_count: u32) -> Result<Verified> {
        let handle = self.store(volume_id)?;
        handle.told(&self.shared, verify::verify(&self.shared, &handle, first_region, region_count))
    }

    pub fn stats(&self, volume_id: &str) -> Result<Vec<(&'static str, u64)>> {
        let handle = self.store(volume_id)?;
        let allocated = handle.data_files[0].allocated_bytes().unwrap_or(0);
        let guarded = handle.lock(&self.shared);
        let counters = guarded.store.counters;
        Ok(vec![
            ("reads", counters.reads),
            ("writes", counters.writes),
            ("flushes", counters.flushes),
            ("read_bytes", counters.read_bytes),
            ("write_bytes", counters.write_bytes),
            ("checksum_errors", counters.checksum_errors),
            ("repairs", counters.repairs),
            ("regions_damaged", counters.regions_damaged),
            ("damage_events_dropped", counters.damage_events_dropped),
            ("dirty_regions", guarded.store.log().dirty().len() as u64),
            ("blocks_present", allocated / crate::limits::BLOCK_BYTES),
            ("allocated_bytes", allocated),
            ("sessions", guarded.sessions),
        ])
    }

    /// Idempotent.
    pub fn shutdown(&self) {
        let open: Vec<String> = self.stores.lock().expect("stores").keys().cloned().collect();
        for volume_id in open {
            // What could not be flushed is recovered at the next open.
            let _ = self.close_store(&volume_id);
        }
        let threads = std::mem::take(&mut *self.threads.lock().expect("threads"));
        self.shared.send(Message::Stop);
        self.shared.marks.close();
        self.shared.flushes.close();
        self.shared.reads.close();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for ReplicaService {
    fn drop(&mut self) {
        self.shutdown();
    }
}
