#![forbid(unsafe_code)]
//! Dolmen's data plane: where bytes move. No Python here, no policy: Python decides and calls in
//! through dataplane/binding. `engine` serves NBD and fans out; `replica` keeps the store.

pub mod canary;
pub mod checksum;
pub mod engine;
pub mod frame;
pub mod limits;
pub mod region_map;
pub mod replica;
#[cfg(feature = "sim")]
pub mod simdisk;
#[cfg(feature = "sim")]
pub mod simstore;
