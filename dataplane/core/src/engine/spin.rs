//! Whether to poll busily before sleeping. Pure: told how each wait went, answers whether to spin.
//!
//! A replica on the same machine answers within tens of microseconds; going to sleep and waking up
//! costs about as much again. Spinning pays when the next event comes soon, which is learned from how
//! often it did. When nothing comes, the share of hits falls and spinning stops but for a rare try
//! after a short sleep; while idle nothing wakes us, and so nothing spins.

use super::limits::SPIN_US;

/// Hits are averaged over about this many waits.
const MEMORY: u32 = 16;
/// Spin while at least this share of waits would be hit (of 1024).
const SHARE_MIN: u32 = 400;
/// Not spinning, every so many short sleeps one spin is tried.
const TRY_EVERY: u32 = 32;
/// A sleep this short may be one that a spin would have caught: a wake-up costs the rest.
const SHORT_SLEEP_US: u64 = 4 * SPIN_US;

pub struct Spin {
    enabled: bool,
    share: u32,
    short_sleeps: u32,
}

impl Spin {
    pub fn new(enabled: bool) -> Self {
        Spin { enabled, share: 0, short_sleeps: TRY_EVERY - 1 }
    }

    /// About to wait with nothing to do.
    pub fn wanted(&mut self) -> bool {
        if !self.enabled {
            return false;
        }
        if self.share >= SHARE_MIN {
            return true;
        }
        if self.short_sleeps >= TRY_EVERY {
            self.short_sleeps = 0;
            return true;
        }
        false
    }

    /// A spin ended: did something come?
    pub fn spun(&mut self, hit: bool) {
        self.share = (self.share * (MEMORY - 1) + if hit { 1024 } else { 0 }) / MEMORY;
        if hit && self.share < SHARE_MIN {
            // A try that hit is worth a few more at once.
            self.short_sleeps = TRY_EVERY;
        }
    }

    /// A sleep ended after this long.
    pub fn slept(&mut self, us: u64) {
        if us <= SHORT_SLEEP_US {
            self.short_sleeps += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_spins_while_answers_come_soon_and_stops_when_they_do_not() {
        let mut spin = Spin::new(true);
        let mut spins = 0;
        for _ in 0..200 {
            if spin.wanted() {
                spins += 1;
                spin.spun(true);
            } else {
                spin.slept(60);
            }
        }
        assert!(spins > 150, "{spins}");
        let mut wasted = 0;
        for _ in 0..1000 {
            if spin.wanted() {
                wasted += 1;
                spin.spun(false);
            }
            spin.slept(5_000);
        }
        assert!(wasted < 40, "{wasted}");
    }
}
