//! Waiting for a removal that is under way.

use std::time::Duration;

/// How long to wait for a removal to be over, which nothing announces. It mostly takes microseconds.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    const SPINS: u32 = 20;
    const FIRST: Duration = Duration::from_micros(50);
    const LAST: Duration = Duration::from_millis(2);

    pub(crate) fn again(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
    }

    pub(crate) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// `None` when nothing waits for us.
    pub(crate) fn pause(&self) -> Option<Duration> {
        match self.attempts {
            0 => None,
            1..=Self::SPINS => Some(Duration::ZERO),
            n => {
                Some(Self::LAST.min(Self::FIRST.saturating_mul(1 << (n - Self::SPINS - 1).min(16))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_under_way_is_first_spun_for_then_slept_for() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.pause(), None);
        let pauses: Vec<_> = (0..1000)
            .map(|_| {
                backoff.again();
                backoff.pause().unwrap()
            })
            .collect();
        assert!(pauses[..20].iter().all(Duration::is_zero));
        assert_eq!(pauses[20], Duration::from_micros(50));
        assert!(pauses.is_sorted());
        assert_eq!(pauses[999], Duration::from_millis(2));
        backoff.reset();
        assert_eq!(backoff.pause(), None);
    }
}
