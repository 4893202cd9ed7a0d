//! How fast each reader answers, when a read is late, how many may be asked twice. Pure.
//!
//! A reader's pace is a running mean and a mean deviation of its answer times, as TCP keeps them. A read is
//! late when the fastest reader would long have answered: asking by the slow one's own pace would wait for
//! what is to be avoided.

use super::limits::{
    HEDGES_AT_ONCE_MAX, HEDGE_DELAY_MAX_US, HEDGE_DELAY_MIN_US, HEDGE_EVERY_READS, SLOW_MARGIN_US,
};

/// Parts of a microsecond that a running mean keeps: it would stand still below its weight otherwise.
const FINE: u64 = 16;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// 0: nothing was measured.
    mean_fine: u64,
    deviation_fine: u64,
}

impl Pace {
    pub fn is_known(&self) -> bool {
        self.mean_fine != 0
    }

    pub fn mean_us(&self) -> u64 {
        self.mean_fine / FINE
    }

    /// An answer took this long. `now_slow`: the reader is avoided and is measured now and then only, so that
    /// each answer must count for more.
    pub fn took(&mut self, us: u64, now_slow: bool) {
        let fine = (us * FINE).max(1);
        if !self.is_known() {
            (self.mean_fine, self.deviation_fine) = (fine, fine / 2);
            return;
        }
        let apart = fine.abs_diff(self.mean_fine);
        let weight = if now_slow { 2 } else { 8 };
        self.mean_fine = (self.mean_fine * (weight - 1) + fine) / weight;
        self.deviation_fine = (self.deviation_fine * 3 + apart) / 4;
    }

    /// No answer for this long, while another reader has answered.
    pub fn at_least(&mut self, us: u64) {
        self.mean_fine = self.mean_fine.max((us * FINE).max(1));
    }

    /// After this long an answer of this reader is late.
    pub fn late_after_us(&self) -> u64 {
        (self.mean_fine + 4 * self.deviation_fine) / FINE
    }

    /// Is it clearly slower than the fastest one? Harder to become than to remain.
    pub fn is_slow(&self, fastest_us: u64, was_slow: bool) -> bool {
        let bound_us =
            if was_slow { 2 * fastest_us + SLOW_MARGIN_US / 2 } else { 3 * fastest_us + SLOW_MARGIN_US };
        self.mean_us() > bound_us
    }
}

/// When a read is asked of a second reader, given the paces of all of them.
pub fn hedge_delay_us(paces: impl Iterator<Item = Pace>) -> u64 {
    paces
        .filter(Pace::is_known)
        .map(|pace| pace.late_after_us())
        .min()
        .unwrap_or(HEDGE_DELAY_MAX_US)
        .clamp(HEDGE_DELAY_MIN_US, HEDGE_DELAY_MAX_US)
}

/// How many reads may still be asked twice: filled by reads, emptied by hedges.
#[derive(Debug)]
pub struct Budget {
    reads: u32,
}

impl Budget {
    pub fn new() -> Self {
        Budget { reads: HEDGES_AT_ONCE_MAX * HEDGE_EVERY_READS }
    }

    #[inline]
    pub fn earn(&mut self) {
        self.reads = (self.reads + 1).min(HEDGES_AT_ONCE_MAX * HEDGE_EVERY_READS);
    }

    /// True if one more is allowed; it is spent then.
    pub fn spend(&mut self) -> bool {
        let allowed = self.reads >= HEDGE_EVERY_READS;
        if allowed {
            self.reads -= HEDGE_EVERY_READS;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(us: u64) -> Pace {
        let mut pace = Pace::default();
        for _ in 0..50 {
            pace.took(us, false);
        }
        pace
    }

    #[test]
    fn a_mean_settles_and_its_lateness_with_it() {
        let pace = steady(100);
        assert_eq!(pace.mean_us(), 100);
        assert!((100..110).contains(&pace.late_after_us()));
        let mut uneven = Pace::default();
        for round in 0..200 {
            uneven.took(if round % 2 == 0 { 100 } else { 300 }, false);
        }
        assert!((150..250).contains(&uneven.mean_us()));
        assert!(uneven.late_after_us() > 500, "{}", uneven.late_after_us());
    }

    #[test]
    fn the_delay_follows_the_fastest_within_its_limits() {
        let delay = |us: &[u64]| hedge_delay_us(us.iter().map(|us| steady(*us)));
        assert_eq!(delay(&[]), HEDGE_DELAY_MAX_US);
        assert_eq!(delay(&[60, 100_000]), HEDGE_DELAY_MIN_US);
        assert!((100_000..150_000).contains(&delay(&[100_000, 120_000])));
        assert_eq!(delay(&[2_000_000]), HEDGE_DELAY_MAX_US);
        assert_eq!(hedge_delay_us([Pace::default(), steady(50)].into_iter()), HEDGE_DELAY_MIN_US);
    }

    #[test]
    fn a_reader_becomes_slow_at_once_and_recovers_within_a_few_answers() {
        let fastest_us = 100;
        let mut pace = steady(120);
        assert!(!pace.is_slow(fastest_us, false));
        pace.at_least(100_000);
        assert!(pace.is_slow(fastest_us, false));
        let mut answers = 0;
        while pace.is_slow(fastest_us, true) {
            pace.took(120, true);
            answers += 1;
        }
        assert!((3..12).contains(&answers), "{answers}");
        let mut both = steady(100_000);
        both.at_least(110_000);
        assert!(!both.is_slow(100_000, false), "no faster one is there");
    }

    #[test]
    fn the_budget_lets_a_burst_through_and_then_one_in_so_many() {
        let mut budget = Budget::new();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), HEDGES_AT_ONCE_MAX as usize);
        let hedged = (0..1000)
            .filter(|_| {
                budget.earn();
                budget.spend()
            })
            .count();
        assert_eq!(hedged, 1000 / HEDGE_EVERY_READS as usize);
    }
}
