//! The one exception of `_dataplane`: NativeError(kind, message). The doors translate it.

use pyo3::prelude::*;

pyo3::create_exception!(_dataplane, NativeError, pyo3::exceptions::PyException);

/// `kind` is one of the words that _dataplane.pyi lists.
pub fn native_error(kind: &str, message: &str) -> PyErr {
    NativeError::new_err((kind.to_string(), message.to_string()))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("NativeError", module.py().get_type::<NativeError>())
}
