//! The one exception of this module; the kinds are listed in _dataplane.pyi.

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(_dataplane, NativeError, PyException);

pub fn native_error(kind: &str, message: &str) -> PyErr {
    NativeError::new_err((kind.to_owned(), message.to_owned()))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("NativeError", module.py().get_type::<NativeError>())
}
