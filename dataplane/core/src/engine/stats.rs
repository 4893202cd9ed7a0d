//! Counters of one engine. Written by the loop thread only; a report is a copy.

pub const LATENCY_BUCKETS: usize = 24;

/// How many took up to 2^i microseconds, and their sum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    pub buckets: [u64; LATENCY_BUCKETS],
    pub sum_us: u64,
}

impl Histogram {
    pub fn record(&mut self, us: u64) {
        let bucket = us.max(1).next_power_of_two().trailing_zeros() as usize;
        self.buckets[bucket.min(LATENCY_BUCKETS - 1)] += 1;
        self.sum_us += us;
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub trims: u64,
    pub zeroes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub errors: u64,
    pub repairs: u64,
    /// Answers held back until the read lease held again.
    pub lease_waits: u64,
    /// LEASE frames sent.
    pub lease_frames: u64,
    /// Answers held back until a write that they may show was done everywhere.
    pub order_waits: u64,
    /// Reads asked of a second replica because the first was late, and those that the second answered first.
    pub hedged_reads: u64,
    pub hedge_wins: u64,
    pub latency_read: Histogram,
    pub latency_write: Histogram,
    pub latency_flush: Histogram,
}

/// One replica's slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotStats {
    pub connected: bool,
    /// "sync", "resync" or "none".
    pub mode: &'static str,
    /// Reads go elsewhere: another replica answers clearly faster.
    pub slow: bool,
    pub in_flight: u64,
    pub requests: u64,
    pub bytes: u64,
    pub latency_us_sum: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StatsReport {
    pub counters: Counters,
    pub clients: u64,
    pub in_flight: u64,
    pub in_flight_bytes: u64,
    /// Requests or parts of them that wait: for a region, for a reader, or because of a pause.
    pub waiting: u64,
    pub slots: Vec<SlotStats>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_lands_in_the_bucket_whose_bound_it_does_not_exceed() {
        let mut histogram = Histogram::default();
        for us in [0, 1, 2, 3, 4, 5, 1024, 1025, u64::MAX / 4] {
            histogram.record(us);
        }
        assert_eq!(histogram.buckets[0], 2);
        assert_eq!(histogram.buckets[1], 1);
        assert_eq!(histogram.buckets[2], 2);
        assert_eq!(histogram.buckets[3], 1);
        assert_eq!(histogram.buckets[10], 1);
        assert_eq!(histogram.buckets[11], 1);
        assert_eq!(histogram.buckets[23], 1);
    }
}
