//! The threads that may wait for the disk: one syncs marks, one flushes and cleans, a few read what the
//! page cache does not hold.
//!
//! Marks have a thread of their own because a write waits for its mark, and a flush can take seconds.

use std::sync::Arc;
use std::time::Duration;

use crate::frame::status;
use crate::limits::BLOCK_BYTES;

use super::error::{ErrorKind, Result, StoreError};
use super::failure::note_failure;
use super::files::sync;
use super::flush::Clean;
use super::handle::{
    Event, FlushJob, MarkJob, Message, Popped, ReadDone, ReadJob, Shared, StoreHandle, Waiter,
};
use super::read::read_present;
use super::store::sync_marks as sync_marks_file;

/// How often a cleaner looks for idle regions, while any is dirty.
const CLEAN_TICK: Duration = Duration::from_secs(1);
/// Threads for reads that miss the page cache: enough to keep a disk's queue busy beside a rebuild.
pub const READ_THREADS: usize = 3;

pub fn run_marks(shared: &Shared) {
    loop {
        match shared.marks.pop(None) {
            Popped::Item(MarkJob::Sync(handle)) => sync_marks(shared, &handle),
            Popped::Item(MarkJob::Failed(handle, reason)) => tell_failure(shared, &handle, reason),
            Popped::Idle => {}
            Popped::Closed => return,
        }
    }
}

/// Every mark written so far becomes durable by one sync.
fn sync_marks(shared: &Shared, handle: &Arc<StoreHandle>) {
    let marks = {
        let mut guarded = handle.lock(shared);
        guarded.mark_queued = false;
        guarded.store.take_unsynced_marks()
    };
    let result = sync_marks_file(&*handle.regions_file);
    let mut guarded = handle.lock(shared);
    if guarded.store.synced("regions", result).is_ok() {
        guarded.store.finish_marks(&marks);
    }
    shared.settle(handle, &mut guarded);
    drop(guarded);
    handle.notify_changed();
    shared.send(Message::Marked(Arc::clone(handle)));
    shared.flushes.poke(); // there is something to clean one day
}

/// The order of FORMAT.md, "Failed sync": noted, then told. Since the failure every frame has ended its
/// session without an answer.
fn tell_failure(shared: &Shared, handle: &Arc<StoreHandle>, mut reason: String) {
    {
        let _growing = handle.growing.lock().expect("a thread died while it grew a store");
        if let Err(error) = note_failure(&*handle.regions_file) {
            reason.push_str(&format!("; and that could not be noted: {error}"));
        }
    }
    handle.lock(shared).failure_told = true;
    handle.notify_changed();
    shared.send(Message::Failed { key: handle.key });
    shared.push_event(Event::StoreFailed { volume_id: handle.volume_id.clone(), reason });
}

pub fn run_flushes(shared: &Shared) {
    let mut next_tick_ms = None;
    loop {
        let timeout =
            next_tick_ms.map(|tick: u64| Duration::from_millis(tick.saturating_sub(shared.now_ms())));
        match shared.flushes.pop(timeout) {
            Popped::Item(job) => run_flush(shared, job),
            Popped::Idle => {}
            Popped::Closed => return,
        }
        let now_ms = shared.now_ms();
        if next_tick_ms.is_some_and(|tick| tick <= now_ms) {
            clean_idle(shared);
            next_tick_ms = None;
        }
        if next_tick_ms.is_none() && any_dirty(shared) {
            next_tick_ms = Some(now_ms + CLEAN_TICK.as_millis() as u64);
        }
    }
}

fn open_stores(shared: &Shared) -> Vec<Arc<StoreHandle>> {
    shared.stores.lock().expect("stores").clone()
}

fn any_dirty(shared: &Shared) -> bool {
    open_stores(shared).iter().any(|handle| !handle.lock(shared).store.log().dirty().is_empty())
}

fn clean_idle(shared: &Shared) {
    for handle in open_stores(shared) {
        let cleanable = {
            let guarded = handle.lock(shared);
            guarded.store.check_alive().is_ok() && guarded.store.has_cleanable()
        };
        if cleanable {
            run_flush(shared, FlushJob { handle, clean: Clean::Idle, done: None });
        }
    }
}

/// One flush for everybody who waits. Order: FORMAT.md, "Flush" and "Clean".
fn run_flush(shared: &Shared, job: FlushJob) {
    let FlushJob { handle, clean, done } = job;
    let (waiters, plan) = {
        let mut guarded = handle.lock(shared);
        guarded.flush_queued = false;
        (std::mem::take(&mut guarded.waiters), guarded.store.begin_flush(clean))
    };
    let result = flush_steps(shared, &handle, plan, clean);
    shared.settle(&handle, &mut handle.lock(shared));
    let result = handle.told(shared, result);
    let code = if result.is_ok() { status::OK } else { status::IO_ERROR };
    let mut frames = Vec::new();
    for waiter in waiters {
        match waiter {
            Waiter::Frame { session, header } => frames.push((session, header, code)),
            // A caller that has gone needs no answer.
            Waiter::Call(call) => drop(call.send(result.clone())),
        }
    }
    if !frames.is_empty() {
        shared.send(Message::Flushed(frames));
    }
    if let Some(done) = done {
        let _ = done.send(result);
    }
}

fn flush_steps(
    shared: &Shared,
    handle: &StoreHandle,
    mut plan: super::flush::FlushPlan,
    clean: Clean,
) -> Result<()> {
    handle.lock(shared).store.check_alive()?;
    if plan.sync_data {
        let result = sync(&*handle.data_files[0]);
        handle.lock(shared).store.synced("data", result)?;
    }
    handle.lock(shared).store.after_data_sync(&mut plan)?;
    if plan.sync_map {
        let result = sync(&*handle.map_file);
        handle.lock(shared).store.synced("map", result)?;
    }
    let cleaned = handle.lock(shared).store.finish_flush(plan)?;
    if cleaned > 0 && clean == Clean::All {
        // Nobody will write here for long: let the next open find nothing to do.
        let result = sync(&*handle.regions_file);
        handle.lock(shared).store.synced("regions", result)?;
    }
    Ok(())
}

pub fn run_reads(shared: &Shared) {
    loop {
        match shared.reads.pop(None) {
            Popped::Item(job) => {
                let done = read(job);
                shared.send(if done.job.warm {
                    let frame = (done.job.session, done.job.header.request_id);
                    Message::Warmed { handle: done.job.handle, frame }
                } else {
                    Message::ReadDone(done)
                });
            }
            Popped::Idle => {}
            Popped::Closed => return,
        }
    }
}

/// Without the store's lock: a write may change a block meanwhile. Then it does not verify here, and the
/// loop reads it again.
fn read(job: ReadJob) -> ReadDone {
    let mut data = vec![0; job.plan.present_count() * BLOCK_BYTES as usize];
    let bad = read_present(&job.handle.data_files, &job.plan, &mut data, true).expect("it may wait");
    ReadDone { verified: bad.is_empty(), data, job }
}

/// The flush that a caller of the service waits for.
pub fn flush_blocking(shared: &Shared, handle: &Arc<StoreHandle>, clean: Clean) -> Result<()> {
    let (done, wait) = std::sync::mpsc::channel();
    if clean == Clean::Nothing {
        let mut guarded = handle.lock(shared);
        guarded.waiters.push(Waiter::Call(done));
        shared.settle(handle, &mut guarded);
    } else {
        shared.flushes.push(FlushJob { handle: Arc::clone(handle), clean, done: Some(done) });
    }
    wait.recv().unwrap_or_else(|_| Err(StoreError::new(ErrorKind::Closed, "the data plane is shut down")))
}
