//! The engine's own limits, each with its reason. What two processes share is in crate::limits.

use crate::limits::{FRAME_PAYLOAD_BYTES_MAX, NBD_REQUEST_BYTES_MAX};

/// One read from a socket. Thirty-two requests of 4 KiB fit: a client at queue depth 32 costs one call.
pub const SCRATCH_BYTES: usize = 256 * 1024;

/// Requests of one client that are not answered yet. More than any client we know keeps in flight.
pub const CLIENT_REQUESTS_MAX: u32 = 1024;

/// Bytes of one client: payloads and reads under way, and replies it has not taken. Two requests of
/// the largest size fit, so that a streaming client never waits for its own limit.
pub const CLIENT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Buffers of the whole engine. Past it no client is read: backpressure begins here.
pub const ENGINE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Requests of the whole engine, for the same reason: a request costs about 200 bytes beside its data.
pub const ENGINE_REQUESTS_MAX: usize = 65_536;

/// A client that takes no byte of its replies for this long is closed, but only while its memory is
/// missed by others: a paused guest may stay paused as long as it likes.
pub const CLIENT_OUTPUT_STALL_US: u64 = 5_000_000;

/// Free buffers kept for reuse: a queue of 32 requests of 1 MiB. What nobody needs for a while is
/// given back before that.
pub const POOL_FREE_BYTES_MAX: usize = 34 * 1024 * 1024;

/// How often unused buffers are given back. Idle, this happens twice and then never.
pub const POOL_TRIM_US: u64 = 1_000_000;

/// Twin of protocol/limits.py LINK_STALL_TIMEOUT_S.
pub const LINK_STALL_TIMEOUT_US: u64 = 1_000_000;

/// FLUSH and FUA wait for a disk's cache, which may take seconds on a busy disk and says nothing
/// about the link: a replica answers writes while a sync runs. Also the limit for a read, and for a
/// link that has no better one beside it.
pub const LINK_SYNC_TIMEOUT_US: u64 = 10_000_000;

/// How often stalls are looked for, while something is outstanding: late by an eighth at most.
pub const STALL_CHECK_US: u64 = 125_000;

/// A turn that comes this late means that we were not running, and links can't be blamed for it.
pub const SELF_PAUSE_US: u64 = 400_000;

/// Twin of protocol/limits.py READ_LEASE_S.
pub const READ_LEASE_US: u64 = 1_000_000;

/// A lease that has less than this left is renewed when a read comes: half of it, so that the answers are
/// here long before it ends.
pub const READ_LEASE_RENEW_US: u64 = READ_LEASE_US / 2;

/// A read unanswered for this long is taken from its reader and asked of another, whatever the budget says.
pub const READ_REISSUE_US: u64 = 1_000_000;

/// A read is asked of a second reader after this at the earliest: a disk that has to move its head, or a
/// machine that had another process to run, takes as long.
pub const HEDGE_DELAY_MIN_US: u64 = 8_000;

/// And after this at the latest, as long as the budget lasts: the stall that a client may see (0.25 s).
pub const HEDGE_DELAY_MAX_US: u64 = 250_000;

/// One read in so many may be asked twice (5 %): when all readers are slow, hedging must not double their load.
pub const HEDGE_EVERY_READS: u32 = 20;

/// So many may be asked twice at once: a whole queue, when a reader stops.
pub const HEDGES_AT_ONCE_MAX: u32 = 32;

/// How much slower than thrice the fastest a reader must be to be avoided: differences below this are not
/// worth leaving a disk idle.
pub const SLOW_MARGIN_US: u64 = 2_000;

/// How often a reader that is avoided is tried.
pub const SLOW_TRY_US: u64 = 500_000;

/// At most one COMPLETED frame a second per link: replicas clean regions after three idle seconds.
pub const COMPLETED_INTERVAL_US: u64 = 1_000_000;

/// Busy polling before sleep: about one answer of a replica on the same machine (measured: halves
/// latency at queue depth 1).
pub const SPIN_US: u64 = 50;

/// WRITE_ZEROES and TRIM frames of one request under way at once: bounds how long one request
/// holds a replica's loop.
pub const ZERO_PARTS_IN_FLIGHT_MAX: u32 = 4;

/// CACHE is a hint: at most this much of one request is asked for.
pub const CACHE_BYTES_MAX: u64 = NBD_REQUEST_BYTES_MAX;

/// Repairs by order under way: each is a read and a write of a block, between those of the clients.
pub const REPAIRS_AT_ONCE_MAX: usize = 8;

/// Repairs by order that wait or are under way. A scrub tells at most 1000 blocks at once.
pub const REPAIRS_QUEUED_MAX: usize = 1024;

/// How often a block is read for one repair while clients go on writing it: what they write heals it as well.
pub const REPAIR_READS_MAX: u32 = 8;

/// Events about single blocks that wait for Python. More are counted, not kept.
pub const BLOCK_EVENTS_MAX: usize = 4096;

/// Pieces in one gathered write: at 4 KiB a piece half a megabyte, well below the system's 1024.
pub const GATHER_PIECES: usize = 128;

/// Bytes written to one peer per turn before the others get theirs.
pub const SEND_TURN_BYTES: usize = 4 * 1024 * 1024;

const _: () = assert!(HEDGE_DELAY_MIN_US < HEDGE_DELAY_MAX_US && HEDGE_DELAY_MAX_US < READ_REISSUE_US);
const _: () = assert!(CLIENT_BYTES_MAX >= 2 * NBD_REQUEST_BYTES_MAX);
const _: () = assert!(ENGINE_BYTES_MAX >= 4 * CLIENT_BYTES_MAX);
const _: () = assert!(POOL_FREE_BYTES_MAX as u64 >= 32 * FRAME_PAYLOAD_BYTES_MAX);
