//! Bugs that can be switched on, one by one, to see whether the tests notice: the tests are tested.
//!
//! Each is the real bug in the real code path, behind `is_set`. Without the cargo feature `sim` that is the
//! constant `false`, and nothing of a bug is in the program. With it a canary is one for the whole
//! process: set it from one thread only, and clear it.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Canary {
    /// A failed fsync is tried again, and the second answer is believed.
    FsyncRetried,
    /// Stable bits and clean headers are written before the data they speak of is synced.
    StableBeforeData,
    /// A region counts as marked before its record is durable.
    MarkNotSynced,
    /// Entries reach the map after the answer, with the next flush.
    EntryAfterAnswer,
    /// Opening does not compare the blocks of dirty regions with their checksums.
    RecoverTrustsMap,
    /// A mismatch of a block that was never stable is taken for an overwrite after a power loss.
    RecomputeNeverStable,
    /// A hole is punched after the entries say so.
    PunchAfterEntry,
    /// A resync writes its copy over newer live writes.
    PullOverFresh,
    /// A repair replaces a good block as well.
    RepairUnconditional,
    /// Dirty marks are cleared before data and map are synced.
    DirtyClearedEarly,
    /// Regions are cleaned that may differ between replicas.
    CleanedUncompleted,
    /// A checksum does not say where its block belongs.
    ChecksumWithoutPlace,
    /// A new stamp is not written for regions that are dirty already.
    StampNotRenewed,
    /// A failed sync ends the service, but the next open knows nothing of it.
    FailureForgotten,
}

impl Canary {
    pub const ALL: [(&'static str, Canary); 14] = [
        ("fsync_retried", Canary::FsyncRetried),
        ("stable_before_data", Canary::StableBeforeData),
        ("mark_not_synced", Canary::MarkNotSynced),
        ("entry_after_answer", Canary::EntryAfterAnswer),
        ("recover_trusts_map", Canary::RecoverTrustsMap),
        ("recompute_never_stable", Canary::RecomputeNeverStable),
        ("punch_after_entry", Canary::PunchAfterEntry),
        ("pull_over_fresh", Canary::PullOverFresh),
        ("repair_unconditional", Canary::RepairUnconditional),
        ("dirty_cleared_early", Canary::DirtyClearedEarly),
        ("cleaned_uncompleted", Canary::CleanedUncompleted),
        ("checksum_without_place", Canary::ChecksumWithoutPlace),
        ("stamp_not_renewed", Canary::StampNotRenewed),
        ("failure_forgotten", Canary::FailureForgotten),
    ];

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, canary)| *canary)
    }
}

#[cfg(not(feature = "sim"))]
#[inline(always)]
pub const fn is_set(_: Canary) -> bool {
    false
}

#[cfg(feature = "sim")]
mod switches {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::Canary;

    static SET: AtomicU32 = AtomicU32::new(0);

    #[inline]
    pub fn is_set(canary: Canary) -> bool {
        SET.load(Ordering::Relaxed) & (1 << canary as u32) != 0
    }

    pub fn set(canary: Canary, on: bool) {
        let bit = 1 << canary as u32;
        if on {
            SET.fetch_or(bit, Ordering::Relaxed);
        } else {
            SET.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

#[cfg(feature = "sim")]
pub use switches::{is_set, set};
