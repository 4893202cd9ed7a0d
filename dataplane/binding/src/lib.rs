//! The PyO3 module `_dataplane`. Doors: engine/io_path.py and replica/io_path.py.

use pyo3::prelude::*;

mod engine;
mod errors;
mod replica;
#[cfg(feature = "sim")]
mod sim;

#[pymodule]
fn _dataplane(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::register(module)?;
    engine::register(module)?;
    replica::register(module)?;
    #[cfg(feature = "sim")]
    sim::register(module)?;
    Ok(())
}
