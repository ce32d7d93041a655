//! Whether to wait for the next fault awake.
//!
//! To wake a blocked page server costs more than to serve it, on virtual hosts ten times more (see
//! `docs/pager.md`). So after a fault it stays awake for a moment, as long as that pays: faults come in
//! bursts, after a load above all. A few moments in vain, and it blocks until faults follow closely again.

use std::time::Duration;

/// How long to stay awake: about what a wake-up costs here.
const MOMENT: Duration = Duration::from_micros(100);
/// So many moments in vain end it.
const PATIENCE: u32 = 3;

/// When to stay awake.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    in_vain: u32,
    armed: bool,
}

impl Spin {
    /// Faults were answered.
    pub(crate) fn answered(&mut self) {
        self.armed = true;
    }

    /// How long to stay awake now, if at all.
    pub(crate) fn moment(&self) -> Option<Duration> {
        (self.armed && self.in_vain < PATIENCE).then_some(MOMENT)
    }

    /// Staying awake brought nothing.
    pub(crate) fn was_in_vain(&mut self) {
        self.armed = false;
        self.in_vain += 1;
    }

    /// A fault came this long after the last answer, awake or not.
    pub(crate) fn came_after(&mut self, pause: Duration) {
        // Blocked, it took a wake-up to notice: twice the moment is as good as within it.
        if pause < 2 * MOMENT {
            self.in_vain = self.in_vain.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_awake_after_a_fault_until_that_was_in_vain_a_few_times() {
        let mut spin = Spin::default();
        assert_eq!(spin.moment(), None);
        for _ in 0..PATIENCE {
            spin.answered();
            assert_eq!(spin.moment(), Some(MOMENT));
            spin.was_in_vain();
            assert_eq!(spin.moment(), None);
        }
        spin.answered();
        assert_eq!(spin.moment(), None);
    }

    #[test]
    fn faults_that_follow_closely_make_it_worth_while_again() {
        let mut spin = Spin::default();
        for _ in 0..PATIENCE {
            spin.answered();
            spin.was_in_vain();
        }
        spin.came_after(Duration::from_millis(5));
        spin.answered();
        assert_eq!(spin.moment(), None);
        spin.came_after(Duration::from_micros(80));
        spin.answered();
        assert_eq!(spin.moment(), Some(MOMENT));
    }
}
