//! Door for replica/io_path.py: translates, decides nothing. The work is in
//! dataplane/core/src/replica/service.rs. Every call gives the interpreter lock back first.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use dolmen_core::replica::error::StoreError;
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::handle::Event;
use dolmen_core::replica::pull::PullOptions;
use dolmen_core::replica::recovery::{OpenOptions, Opened};
use dolmen_core::replica::service::{ReplicaService, Role};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::errors::native_error;

pub fn to_python(error: StoreError) -> PyErr {
    native_error(error.kind.word(), &error.message)
}

pub fn opened_counts(opened: &Opened) -> HashMap<&'static str, u64> {
    HashMap::from([
        ("dirty_regions", opened.dirty_regions),
        ("blocks_verified", opened.blocks_verified),
        ("blocks_recomputed", opened.blocks_recomputed),
        ("blocks_dropped", opened.blocks_dropped),
        ("regions_damaged", opened.regions_damaged),
        ("sync_failed", opened.sync_failed),
    ])
}

/// A descriptor of our own for a socket that stays Python's.
fn duplicate(fd: i32) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(native_error("bad_request", "not a file descriptor"));
    }
    // SAFETY: the number is only borrowed for the call below, while the caller holds its socket open; a
    // number that names nothing makes the call fail, not misbehave.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 3)
        .map_err(|error| native_error("bad_request", &format!("duplicating descriptor {fd}: {error}")))
}

#[pyclass(module = "_dataplane", frozen)]
pub struct ReplicaLoop {
    service: ReplicaService,
}

#[pymethods]
impl ReplicaLoop {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self { service: ReplicaService::new().map_err(to_python)? })
    }

    fn event_fd(&self) -> i32 {
        self.service.event_fd().as_raw_fd()
    }

    fn poll_events<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let translate = |event: Event| match event {
            Event::SessionClosed { volume_id, session_id, reason } => {
                ("session_closed", volume_id, session_id, reason).into_pyobject(py)
            }
            Event::StoreFailed { volume_id, reason } => ("store_failed", volume_id, reason).into_pyobject(py),
            Event::BlockDamaged { volume_id, block_index } => {
                ("block_damaged", volume_id, block_index).into_pyobject(py)
            }
        };
        self.service.poll_events().into_iter().map(translate).collect()
    }

    fn shutdown(&self, py: Python<'_>) {
        py.detach(|| self.service.shutdown());
    }

    fn create_store(&self, py: Python<'_>, path: PathBuf, layer: String, size_bytes: u64) -> PyResult<()> {
        py.detach(|| self.service.create_store(&path, &layer, size_bytes)).map_err(to_python)
    }

    #[allow(clippy::too_many_arguments)] // the signature is the contract with Python
    fn open_store(
        &self,
        py: Python<'_>,
        volume_id: String,
        path: PathBuf,
        chain: Vec<String>,
        size_bytes: u64,
        epoch: u64,
        stamp: (u64, u32),
    ) -> PyResult<HashMap<&'static str, u64>> {
        let options = OpenOptions::new(size_bytes, epoch, Stamp { epoch: stamp.0, version: stamp.1 });
        let opened =
            py.detach(|| self.service.open_store(&volume_id, path, &chain, options)).map_err(to_python)?;
        Ok(opened_counts(&opened))
    }

    fn close_store(&self, py: Python<'_>, volume_id: String) -> PyResult<()> {
        py.detach(|| self.service.close_store(&volume_id)).map_err(to_python)
    }

    fn set_epoch(&self, py: Python<'_>, volume_id: String, epoch: u64) -> PyResult<()> {
        py.detach(|| self.service.set_epoch(&volume_id, epoch)).map_err(to_python)
    }

    fn set_stamp(&self, py: Python<'_>, volume_id: String, epoch: u64, version: u32) -> PyResult<()> {
        py.detach(|| self.service.set_stamp(&volume_id, Stamp { epoch, version })).map_err(to_python)
    }

    fn attach_session(
        &self,
        py: Python<'_>,
        volume_id: String,
        fd: i32,
        epoch: u64,
        role: &str,
    ) -> PyResult<u64> {
        let role = match role {
            "data" => Role::Data,
            "peer" => Role::Peer,
            other => return Err(native_error("bad_request", &format!("{other:?} is no role"))),
        };
        let fd = duplicate(fd)?;
        py.detach(|| self.service.attach_session(&volume_id, fd, epoch, role)).map_err(to_python)
    }

    fn dirty_regions(&self, py: Python<'_>, volume_id: String) -> PyResult<Vec<u32>> {
        py.detach(|| self.service.dirty_regions(&volume_id)).map_err(to_python)
    }

    fn changed_since(
        &self,
        py: Python<'_>,
        volume_id: String,
        epoch: u64,
        version: u32,
    ) -> PyResult<Vec<u32>> {
        py.detach(|| self.service.changed_since(&volume_id, Stamp { epoch, version })).map_err(to_python)
    }

    fn begin_resync(&self, py: Python<'_>, volume_id: String, regions: Vec<u32>) -> PyResult<()> {
        py.detach(|| self.service.begin_resync(&volume_id, &regions)).map_err(to_python)
    }

    #[pyo3(signature = (volume_id, fd, epoch, regions, rate_bytes_s=0, take_damaged=false))]
    #[allow(clippy::too_many_arguments)] // the signature is the contract with Python
    fn pull_regions(
        &self,
        py: Python<'_>,
        volume_id: String,
        fd: i32,
        epoch: u64,
        regions: Vec<u32>,
        rate_bytes_s: u64,
        take_damaged: bool,
    ) -> PyResult<HashMap<&'static str, u64>> {
        let fd = duplicate(fd)?;
        let options = PullOptions { rate_bytes_s, take_damaged };
        let pulled = py
            .detach(|| self.service.pull_regions(&volume_id, fd, epoch, &regions, options))
            .map_err(to_python)?;
        Ok(HashMap::from([
            ("regions", pulled.regions),
            ("blocks_compared", pulled.tally.blocks_compared),
            ("blocks_copied", pulled.tally.blocks_copied),
            ("bytes_copied", pulled.tally.bytes_copied),
            ("blocks_unreadable", pulled.tally.blocks_unreadable),
            ("blocks_damaged", pulled.tally.blocks_damaged),
        ]))
    }

    fn end_resync(&self, py: Python<'_>, volume_id: String) -> PyResult<()> {
        py.detach(|| self.service.end_resync(&volume_id)).map_err(to_python)
    }

    fn complete_regions(&self, py: Python<'_>, volume_id: String, regions: Vec<u32>) -> PyResult<()> {
        py.detach(|| self.service.complete_regions(&volume_id, &regions)).map_err(to_python)
    }

    fn flush(&self, py: Python<'_>, volume_id: String) -> PyResult<()> {
        py.detach(|| self.service.flush(&volume_id)).map_err(to_python)
    }

    fn clean_all(&self, py: Python<'_>, volume_id: String) -> PyResult<()> {
        py.detach(|| self.service.clean_all(&volume_id)).map_err(to_python)
    }

    fn resize(&self, py: Python<'_>, volume_id: String, size_bytes: u64) -> PyResult<()> {
        py.detach(|| self.service.resize(&volume_id, size_bytes)).map_err(to_python)
    }

    fn verify<'py>(
        &self,
        py: Python<'py>,
        volume_id: String,
        first_region: u32,
        region_count: u32,
    ) -> PyResult<Bound<'py, PyDict>> {
        let found =
            py.detach(|| self.service.verify(&volume_id, first_region, region_count)).map_err(to_python)?;
        let answer = PyDict::new(py);
        answer.set_item("blocks_verified", found.blocks_verified)?;
        answer.set_item("blocks_zero", found.blocks_zero)?;
        answer.set_item("damaged", found.damaged)?;
        answer.set_item("damaged_count", found.damaged_count)?;
        answer.set_item("digest", found.digest)?;
        Ok(answer)
    }

    fn stats(&self, py: Python<'_>, volume_id: String) -> PyResult<HashMap<&'static str, u64>> {
        let stats = py.detach(|| self.service.stats(&volume_id)).map_err(to_python)?;
        Ok(stats.into_iter().collect())
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<ReplicaLoop>()
}
