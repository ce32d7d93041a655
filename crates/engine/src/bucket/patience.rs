//! How long an object store may take, and when it is asked again. Pure, but for the clock and the dice.

use std::time::{Duration, Instant};

use super::Refusal;

/// What an object store is granted to answer one request in, with all that is tried again.
///
/// An eighth of it is granted to one try. Both grow with what is to travel: for each MiB as much again. So whoever sends
/// or takes a MiB in an eighth of it is not given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(Duration);

/// How often something is tried that the store says is wrong with the request: it may have been damaged on the way.
const WRONG: u32 = 3;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl Patience {
    /// So much.
    pub const fn of(time: Duration) -> Self {
        Self(time)
    }

    /// A request of about so many bytes begins.
    pub(super) fn begin(self, size: u64) -> Trying {
        Trying {
            begun: Instant::now(),
            all: self.all(size),
            times: 0,
        }
    }

    /// How long one try may take, with about so many bytes.
    pub(super) fn one(self, size: u64) -> Duration {
        self.all(size) / 8
    }

    fn all(self, size: u64) -> Duration {
        let parts = u32::try_from(size.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        self.0.saturating_mul(parts.saturating_add(1))
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::of(Duration::from_secs(120))
    }
}

/// A request that is tried until it succeeds, or the patience is at its end.
#[derive(Debug)]
pub(super) struct Trying {
    begun: Instant,
    all: Duration,
    times: u32,
}

impl Trying {
    /// How long to wait before it is tried again; `None`: it is not.
    pub(super) fn pause_after(&mut self, refusal: &Refusal) -> Option<Duration> {
        self.times += 1;
        let more = match refusal {
            Refusal::Unwell { .. } => true,
            Refusal::Wrong { .. } => self.times < WRONG,
            _ => false,
        };
        let longest = FIRST_PAUSE
            .saturating_mul(1 << (self.times - 1).min(10))
            .min(LONGEST_PAUSE);
        // Between half and all of it, so that many that failed together do not come back together.
        let dice = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |since| since.subsec_micros() % 1000);
        let pause = longest / 2 + longest / 2 * dice / 1000;
        (more && self.begun.elapsed() + pause < self.all).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwell() -> Refusal {
        Refusal::Unwell {
            said: String::new(),
        }
    }

    #[test]
    fn pauses_grow_and_end_with_the_patience() {
        let mut trying = Patience::of(Duration::from_secs(60)).begin(0);
        let pauses: Vec<_> = (0..8)
            .map(|_| trying.pause_after(&unwell()).unwrap())
            .collect();
        assert!(pauses[0] >= FIRST_PAUSE / 2 && pauses[0] <= FIRST_PAUSE);
        assert!(pauses[2] > pauses[0] && pauses[7] <= LONGEST_PAUSE);
        let mut none = Patience::of(Duration::ZERO).begin(0);
        assert_eq!(none.pause_after(&unwell()), None);
    }

    #[test]
    fn what_is_refused_is_not_tried_again_and_what_is_wrong_seldom() {
        let mut trying = Patience::default().begin(0);
        assert_eq!(trying.pause_after(&Refusal::NotThere), None);
        let wrong = Refusal::Wrong {
            said: String::new(),
        };
        let mut trying = Patience::default().begin(0);
        let tries = std::iter::from_fn(|| trying.pause_after(&wrong)).count();
        assert_eq!(tries, 2);
    }

    #[test]
    fn what_is_large_may_take_longer() {
        let patience = Patience::of(Duration::from_secs(8));
        assert_eq!(patience.one(0), Duration::from_secs(1));
        assert_eq!(patience.one(8 << 20), Duration::from_secs(9));
        assert!(patience.one(u64::MAX) > Duration::from_secs(9));
    }
}
