//! The engine side: one attached volume. NBD clients on one side, links to replicas on the other.
//! Called from engine/io_path.py through binding/src/engine.rs.
//!
//! ```text
//!   NBD client ──► intake ──► plan (cut) ──► regions (may it go?) ──► requests (table) ──► link ──► replica
//!              ◄── output ◄── readout      ◄── reading (verify)   ◄── answers        ◄──
//! ```
//!
//! Pure, driven by events in tests: `nbd`, `plan`, `regions`, `requests`, `readout`, `lease`, `pace`,
//! `spin`.
//! Bytes and sockets: `buffers`, `client`, `link`. The shell that turns: `shell`, with `intake`,
//! `answers`, `holding`, `hedging`, `reading`, `repairing` and `upkeep` as its chapters. The door: `commands`.

mod answers;
mod buffers;
mod client;
mod commands;
mod hedging;
mod holding;
mod intake;
mod lease;
mod limits;
mod link;
mod nbd;
mod pace;
mod plan;
mod reading;
mod readout;
mod regions;
mod repairing;
mod requests;
mod shell;
mod slab;
mod spin;
mod stats;
mod upkeep;

pub use commands::{boot_clock, ClientTerms, Clock, Closed, EngineHandle, Event, Options};
pub use stats::{SlotStats, StatsReport, LATENCY_BUCKETS};
