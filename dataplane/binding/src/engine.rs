//! Door for engine/io_path.py: the class EngineLoop of _dataplane.pyi over dolmen_core::engine.
//! Translates arguments, events and errors; decides nothing.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use dolmen_core::engine::{ClientTerms, Closed, EngineHandle, Event, Options, StatsReport};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::errors::native_error;

fn to_python(error: Closed) -> PyErr {
    match error {
        Closed::Stopped => native_error("closed", "the engine loop is stopped"),
        Closed::BadRequest(message) => native_error("bad_request", message),
        Closed::Io(errno) => native_error("io_error", &errno.to_string()),
    }
}

/// A descriptor of our own for the caller's: theirs stays theirs to close.
fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(native_error("bad_request", "not a file descriptor"));
    }
    // SAFETY: borrowed for this one call; a number that is not open makes fcntl say EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 0).map_err(|errno| to_python(Closed::Io(errno)))
}

fn event_tuple<'py>(py: Python<'py>, event: Event) -> PyResult<Bound<'py, PyTuple>> {
    match event {
        Event::LinkLost { slot, generation, reason } => {
            ("link_lost", slot, generation, reason).into_pyobject(py)
        }
        Event::LinkFailed { slot, generation, status } => {
            ("link_failed", slot, generation, status).into_pyobject(py)
        }
        Event::LinkStalled { slot, generation } => ("link_stalled", slot, generation).into_pyobject(py),
        Event::BlockRepaired { slot, block_index } => ("block_repaired", slot, block_index).into_pyobject(py),
        Event::BlockUnreadable { block_index } => ("block_unreadable", block_index).into_pyobject(py),
        Event::RegionWanted { region_index } => ("region_wanted", region_index).into_pyobject(py),
        Event::RegionDiverged { region_index } => ("region_diverged", region_index).into_pyobject(py),
        Event::Drained { token } => ("drained", token).into_pyobject(py),
        Event::ClientClosed { client_id, reason } => ("client_closed", client_id, reason).into_pyobject(py),
    }
}

/// Let large buffers come from the system and return to it: otherwise glibc raises its threshold
/// after the first one, takes the rest from its heap, and memory that a burst used stays ours.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory_flat() {
    extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
    }
    const M_MMAP_THRESHOLD: i32 = -3;
    // SAFETY: glibc's own setting, callable at any time; a refusal changes nothing.
    unsafe { mallopt(M_MMAP_THRESHOLD, 256 * 1024) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory_flat() {}

#[pyclass(frozen, module = "_dataplane")]
struct EngineLoop {
    handle: EngineHandle,
}

#[pymethods]
impl EngineLoop {
    #[new]
    fn new(size_bytes: u64, epoch: u64, slot_count: usize) -> PyResult<Self> {
        keep_memory_flat();
        // Only a measurement of what spinning brings turns it off.
        let spin = std::env::var_os("DOLMEN_ENGINE_SPIN").is_none_or(|value| value != "0");
        let options = Options { spin, ..Options::new(size_bytes, epoch, slot_count) };
        Ok(EngineLoop { handle: EngineHandle::start(options).map_err(to_python)? })
    }

    fn event_fd(&self) -> RawFd {
        self.handle.event_fd().as_raw_fd()
    }

    fn poll_events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for event in self.handle.poll_events() {
            list.append(event_tuple(py, event)?)?;
        }
        Ok(list)
    }

    fn add_client(&self, fd: RawFd, structured: bool, meta_context: u32, read_only: bool) -> PyResult<u64> {
        let terms = ClientTerms { structured, meta_context, read_only };
        self.handle.add_client(duplicate(fd)?, terms).map_err(to_python)
    }

    fn attach_link(&self, slot: usize, fd: RawFd, mode: &str) -> PyResult<u64> {
        let sync = match mode {
            "sync" => true,
            "resync" => false,
            _ => return Err(native_error("bad_request", "mode is neither sync nor resync")),
        };
        self.handle.attach_link(slot, duplicate(fd)?, sync).map_err(to_python)
    }

    fn detach_link(&self, slot: usize, generation: u64) -> PyResult<()> {
        self.handle.detach_link(slot, generation).map_err(to_python)
    }

    fn set_members(&self, slots: Vec<usize>) -> PyResult<()> {
        self.handle.set_members(&slots).map_err(to_python)
    }

    fn set_readers(&self, slots: Vec<usize>) -> PyResult<()> {
        self.handle.set_readers(&slots).map_err(to_python)
    }

    fn set_lease(&self, quorums: Vec<(Vec<usize>, usize)>) -> PyResult<()> {
        self.handle.set_lease(&quorums).map_err(to_python)
    }

    fn barrier(&self, token: u64) -> PyResult<()> {
        self.handle.barrier(token).map_err(to_python)
    }

    fn set_unequal(&self, regions: Vec<u32>) -> PyResult<()> {
        self.handle.set_unequal(regions).map_err(to_python)
    }

    fn set_partial_wait(&self, regions: Vec<u32>) -> PyResult<()> {
        self.handle.set_partial_wait(regions).map_err(to_python)
    }

    fn regions_equal(&self, regions: Vec<u32>, diverged_seen: u64) -> PyResult<()> {
        self.handle.regions_equal(regions, diverged_seen).map_err(to_python)
    }

    fn partial_done(&self, regions: Vec<u32>) -> PyResult<()> {
        self.handle.partial_done(regions).map_err(to_python)
    }

    fn repair_block(&self, slot: usize, block_index: u64) -> PyResult<()> {
        self.handle.repair_block(slot, block_index).map_err(to_python)
    }

    fn pause(&self, paused: bool) -> PyResult<()> {
        self.handle.pause(paused).map_err(to_python)
    }

    fn set_size(&self, size_bytes: u64) -> PyResult<()> {
        self.handle.set_size(size_bytes).map_err(to_python)
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.handle.stop());
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = py.detach(|| self.handle.stats()).map_err(to_python)?;
        stats_dict(py, &report)
    }
}

fn stats_dict<'py>(py: Python<'py>, report: &StatsReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let counters = &report.counters;
    for (name, value) in [
        ("reads", counters.reads),
        ("writes", counters.writes),
        ("flushes", counters.flushes),
        ("trims", counters.trims),
        ("zeroes", counters.zeroes),
        ("read_bytes", counters.read_bytes),
        ("write_bytes", counters.write_bytes),
        ("errors", counters.errors),
        ("repairs", counters.repairs),
        ("lease_waits", counters.lease_waits),
        ("lease_frames", counters.lease_frames),
        ("order_waits", counters.order_waits),
        ("hedged_reads", counters.hedged_reads),
        ("hedge_wins", counters.hedge_wins),
        ("clients", report.clients),
        ("in_flight", report.in_flight),
        ("in_flight_bytes", report.in_flight_bytes),
        ("waiting", report.waiting),
        ("latency_us_read_sum", counters.latency_read.sum_us),
        ("latency_us_write_sum", counters.latency_write.sum_us),
        ("latency_us_flush_sum", counters.latency_flush.sum_us),
    ] {
        dict.set_item(name, value)?;
    }
    dict.set_item("latency_us_read", counters.latency_read.buckets.to_vec())?;
    dict.set_item("latency_us_write", counters.latency_write.buckets.to_vec())?;
    dict.set_item("latency_us_flush", counters.latency_flush.buckets.to_vec())?;
    let slots = PyList::empty(py);
    for slot in &report.slots {
        let entry = PyDict::new(py);
        entry.set_item("connected", slot.connected)?;
        entry.set_item("mode", slot.mode)?;
        entry.set_item("slow", slot.slow)?;
        entry.set_item("in_flight", slot.in_flight)?;
        entry.set_item("requests", slot.requests)?;
        entry.set_item("bytes", slot.bytes)?;
        entry.set_item("latency_us_sum", slot.latency_us_sum)?;
        slots.append(entry)?;
    }
    dict.set_item("slots", slots)?;
    Ok(dict)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<EngineLoop>()
}
