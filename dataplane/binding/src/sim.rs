//! Door for the simulator, tests/sim/: one store on a disk in memory. Only with the cargo feature `sim`,
//! which no release has. The work is in dataplane/core/src/simstore.rs.

use std::collections::HashMap;

use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::resync::{Pass, Tally};
use dolmen_core::replica::store::StoreEvent;
use dolmen_core::simdisk::{Fault, Loss, Operation};
use dolmen_core::simstore::{self, Pull, SimStore as Core};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::errors::native_error;
use crate::replica::to_python;

type Counts = HashMap<&'static str, u64>;

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> PyResult<T> {
    let found = names.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, value)| *value)
        .ok_or_else(|| native_error("bad_request", &format!("{name:?} is no such name")))
}

fn clean_named(name: &str) -> PyResult<Clean> {
    named(&[("nothing", Clean::Nothing), ("idle", Clean::Idle), ("all", Clean::All)], name)
}

fn stamp_of((epoch, version): (u64, u32)) -> Stamp {
    Stamp { epoch, version }
}

fn counts(tally: Tally) -> Counts {
    HashMap::from([
        ("blocks_compared", tally.blocks_compared),
        ("blocks_copied", tally.blocks_copied),
        ("bytes_copied", tally.bytes_copied),
        ("blocks_unreadable", tally.blocks_unreadable),
        ("blocks_damaged", tally.blocks_damaged),
    ])
}

/// What a pull may be given to: the resync that was under way when it was made.
#[pyclass(module = "_dataplane", frozen)]
#[derive(Clone, Copy)]
pub struct SimPass(Pass);

/// A region that is being pulled.
#[pyclass(module = "_dataplane")]
pub struct SimPull(Pull);

#[pymethods]
impl SimPull {
    #[getter]
    fn reads(&self) -> Vec<(u64, u64)> {
        self.0.reads.clone()
    }

    fn counts(&self) -> Counts {
        counts(self.0.tally)
    }
}

#[pyclass(module = "_dataplane")]
pub struct SimStore {
    core: Core,
}

#[pymethods]
impl SimStore {
    #[new]
    fn new() -> Self {
        Self { core: Core::new() }
    }

    #[staticmethod]
    #[pyo3(signature = (name, on=true))]
    fn canary(name: &str, on: bool) -> PyResult<()> {
        if simstore::set_canary(name, on) {
            return Ok(());
        }
        Err(native_error("bad_request", &format!("{name:?} is no canary")))
    }

    #[staticmethod]
    fn canaries() -> Vec<&'static str> {
        dolmen_core::canary::Canary::ALL.iter().map(|(name, _)| *name).collect()
    }

    #[staticmethod]
    fn checksums<'py>(py: Python<'py>, first_block: u64, data: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &simstore::checksums_of(first_block, data))
    }

    fn copy(&self) -> Self {
        Self { core: self.core.copy() }
    }

    fn create(&mut self, size_bytes: u64) -> PyResult<()> {
        self.core.create(size_bytes).map_err(to_python)
    }

    fn open(&mut self, size_bytes: u64, epoch: u64, stamp: (u64, u32)) -> PyResult<Counts> {
        let opened = self.core.open(size_bytes, epoch, stamp_of(stamp)).map_err(to_python)?;
        Ok(crate::replica::opened_counts(&opened))
    }

    #[getter]
    fn is_open(&self) -> bool {
        self.core.is_open()
    }

    fn close(&mut self) -> PyResult<()> {
        self.core.close().map_err(to_python)
    }

    fn crash(&mut self) {
        self.core.crash();
    }

    #[pyo3(signature = (seed, loss="torn"))]
    fn power_loss(&mut self, seed: u64, loss: &str) -> PyResult<()> {
        self.core.power_loss(named(&Loss::ALL, loss)?, seed);
        Ok(())
    }

    fn kill_after(&self, operations: u32) {
        self.core.disk().kill_after(operations);
    }

    fn drop_cache(&self) {
        self.core.disk().drop_cache();
    }

    fn set_now_ms(&mut self, now_ms: u64) {
        self.core.set_now_ms(now_ms);
    }

    fn take_events<'py>(&mut self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let translate = |event: StoreEvent| match event {
            StoreEvent::Failed(reason) => ("store_failed", reason).into_pyobject(py),
            StoreEvent::BlockDamaged(block) => ("block_damaged", block).into_pyobject(py),
        };
        self.core.take_events().into_iter().map(translate).collect()
    }

    #[pyo3(signature = (offset_bytes, data, request_id=0, epoch=None, checksums=None))]
    fn write(
        &mut self,
        offset_bytes: u64,
        data: &[u8],
        request_id: u64,
        epoch: Option<u64>,
        checksums: Option<&[u8]>,
    ) -> PyResult<()> {
        self.core.write(offset_bytes, data, request_id, epoch, checksums).map_err(to_python)
    }

    #[pyo3(signature = (offset_bytes, length_bytes, request_id=0, epoch=None, keep_space=false))]
    fn zero(
        &mut self,
        offset_bytes: u64,
        length_bytes: u64,
        request_id: u64,
        epoch: Option<u64>,
        keep_space: bool,
    ) -> PyResult<()> {
        self.core.zero(offset_bytes, length_bytes, keep_space, request_id, epoch).map_err(to_python)
    }

    #[pyo3(signature = (offset_bytes, length_bytes, request_id=0, epoch=None))]
    fn trim(
        &mut self,
        offset_bytes: u64,
        length_bytes: u64,
        request_id: u64,
        epoch: Option<u64>,
    ) -> PyResult<()> {
        self.core.zero(offset_bytes, length_bytes, false, request_id, epoch).map_err(to_python)
    }

    #[pyo3(signature = (block_index, data, epoch=None))]
    fn repair(&mut self, block_index: u64, data: &[u8], epoch: Option<u64>) -> PyResult<bool> {
        self.core.repair(block_index, data, epoch).map_err(to_python)
    }

    #[pyo3(signature = (offset_bytes, length_bytes, epoch=None))]
    fn read<'py>(
        &mut self,
        py: Python<'py>,
        offset_bytes: u64,
        length_bytes: u64,
        epoch: Option<u64>,
    ) -> PyResult<(Vec<u64>, Bound<'py, PyBytes>)> {
        let found = self.core.read(offset_bytes, length_bytes, epoch).map_err(to_python)?;
        Ok((found.entries, PyBytes::new(py, &found.data)))
    }

    #[pyo3(signature = (offset_bytes, length_bytes, epoch=None))]
    fn read_reply<'py>(
        &mut self,
        py: Python<'py>,
        offset_bytes: u64,
        length_bytes: u64,
        epoch: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (_, reply) = self.core.read_reply(offset_bytes, length_bytes, epoch).map_err(to_python)?;
        Ok(PyBytes::new(py, &reply))
    }

    #[pyo3(signature = (clean="nothing"))]
    fn flush(&mut self, clean: &str) -> PyResult<()> {
        self.core.flush(clean_named(clean)?).map_err(to_python)
    }

    #[pyo3(signature = (clean="nothing"))]
    fn flush_step(&mut self, clean: &str) -> PyResult<bool> {
        self.core.flush_step(clean_named(clean)?).map_err(to_python)
    }

    fn dirty_regions(&mut self) -> PyResult<Vec<u32>> {
        self.core.dirty_regions().map_err(to_python)
    }

    fn changed_since(&mut self, epoch: u64, version: u32) -> PyResult<Vec<u32>> {
        self.core.changed_since(Stamp { epoch, version }).map_err(to_python)
    }

    fn set_epoch(&mut self, epoch: u64) -> PyResult<()> {
        self.core.set_epoch(epoch).map_err(to_python)
    }

    fn set_stamp(&mut self, epoch: u64, version: u32) -> PyResult<()> {
        self.core.set_stamp(Stamp { epoch, version }).map_err(to_python)
    }

    fn completed(&mut self, request_id: u64) -> PyResult<()> {
        self.core.completed(request_id).map_err(to_python)
    }

    fn complete_regions(&mut self, regions: Vec<u32>) -> PyResult<()> {
        self.core.complete_regions(&regions).map_err(to_python)
    }

    fn resize(&mut self, size_bytes: u64) -> PyResult<()> {
        self.core.resize(size_bytes).map_err(to_python)
    }

    fn begin_resync(&mut self, regions: Vec<u32>) -> PyResult<()> {
        self.core.begin_resync(&regions).map_err(to_python)
    }

    fn end_resync(&mut self) -> PyResult<()> {
        self.core.end_resync().map_err(to_python)
    }

    fn summary<'py>(&mut self, py: Python<'py>, region: u32) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.core.summary(region).map_err(to_python)?))
    }

    fn entries(&mut self, region: u32) -> PyResult<Vec<u64>> {
        Ok(simstore::entries_of(&self.core.summary(region).map_err(to_python)?))
    }

    #[pyo3(signature = (take_damaged=false))]
    fn pull_pass(&mut self, take_damaged: bool) -> PyResult<SimPass> {
        Ok(SimPass(self.core.pull_pass(take_damaged).map_err(to_python)?))
    }

    fn pull_compare(&mut self, pull_pass: &SimPass, region: u32, summary: &[u8]) -> PyResult<SimPull> {
        Ok(SimPull(self.core.pull_compare(pull_pass.0, region, summary).map_err(to_python)?))
    }

    fn pull_copy(&mut self, pull: &mut SimPull, first_block: u64, count: u64, reply: &[u8]) -> PyResult<()> {
        self.core.pull_copy(&mut pull.0, first_block, count, reply).map_err(to_python)
    }

    fn pull_finish(&mut self, pull: &SimPull) -> PyResult<bool> {
        self.core.pull_finish(&pull.0).map_err(to_python)
    }

    #[pyo3(signature = (source, region, take_damaged=false))]
    fn pull_region(
        &mut self,
        source: &mut SimStore,
        region: u32,
        take_damaged: bool,
    ) -> PyResult<(bool, Counts)> {
        let (equal, tally) =
            self.core.pull_region(&mut source.core, region, take_damaged).map_err(to_python)?;
        Ok((equal, counts(tally)))
    }

    #[pyo3(signature = (operation, errno, file="", after=0, count=1, written_bytes=0))]
    fn fail_next(
        &self,
        operation: &str,
        errno: i32,
        file: &str,
        after: u32,
        count: u32,
        written_bytes: usize,
    ) -> PyResult<()> {
        let operation = named(&Operation::ALL, operation)?;
        if count == 0 {
            return Err(native_error("bad_request", "a fault that never happens"));
        }
        let file = file.to_owned();
        self.core.disk().add_fault(Fault { file, operation, errno, after, count, written_bytes });
        Ok(())
    }

    #[pyo3(signature = (file="data", left_bytes=0))]
    fn fill_up(&self, file: &str, left_bytes: usize) {
        self.core.disk().fill_up(file, left_bytes);
    }

    fn clear_faults(&self) {
        self.core.disk().clear_faults();
    }

    #[pyo3(signature = (block_index, bit=0))]
    fn rot(&self, block_index: u64, bit: u64) {
        self.core.rot_block(block_index, bit);
    }

    fn swap(&self, block_index: u64, other_index: u64) {
        self.core.swap_blocks(block_index, other_index);
    }

    fn flip(&self, file: &str, offset_bytes: usize) {
        self.core.disk().flip(&self.core.path_of(file), offset_bytes);
    }

    fn truncate(&self, file: &str, length_bytes: u64) {
        self.core.disk().truncate(&self.core.path_of(file), length_bytes);
    }

    #[getter]
    fn allocated_blocks(&self) -> u64 {
        self.core.allocated_blocks()
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<SimPass>()?;
    module.add_class::<SimPull>()?;
    module.add_class::<SimStore>()
}
