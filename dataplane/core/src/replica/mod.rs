//! The replica side: the store, its sessions, the resync puller.
//!
//! From the outside in: `service` is what the binding calls; `server_loop` serves sessions by `apply`;
//! `syncer` holds the threads that may wait for the disk; `store` (with `read`, `write`,
//! `flush`, `recovery`) is one replica; `map` and `regions` are its two kinds of metadata; `format` says
//! where they stand; `files` touches the disk.

pub mod apply;
pub mod buffers;
pub mod error;
pub mod failure;
pub mod files;
pub mod flush;
pub mod format;
pub mod handle;
pub mod map;
pub mod pull;
pub mod read;
pub mod recovery;
pub mod regions;
pub mod resync;
pub mod server_loop;
pub mod service;
pub mod session;
pub mod store;
pub mod syncer;
pub mod verify;
pub mod write;
