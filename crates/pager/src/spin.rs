//! Whether to wait for the next fault awake.
//!
//! Where a processor is idle, to wake a blocked page server costs more than to serve a fault, on virtual hosts ten times
//! more (see `docs/pager.md`). So after a fault it stays awake for a moment, as long as that pays: faults come in bursts,
//! after a load above all. A few moments in vain, and it blocks until faults follow closely again.
//!
//! Where all processors are busy it is the other way round: a wake-up is cheap, and whoever stays awake takes a processor
//! from the guest. So both are tried now and then, for a stretch of answers each, and the quicker one is kept:
//!
//! ```text
//!   kept ──▶ tried again ──▶ the other one ─┬─ quicker: kept from now on, for a short time at first
//!     ▲                                     └─ slower: back, for four times as long as before
//!     └───────────────────────────────────────┘
//! ```

use std::time::Duration;

/// How long to stay awake: about what a wake-up costs here.
const MOMENT: Duration = Duration::from_micros(100);
/// So many moments in vain end it.
const PATIENCE: u32 = 3;

/// How many answers each way is tried for.
const STRETCH: u32 = 32;
/// For how many answers a way is kept that has just proved the quicker one, …
const KEPT: u32 = 256;
/// … and at the most.
const KEPT_LONGEST: u32 = 16_384;
/// What is longer from one answer to the next is the guest's own pause, and counts as this.
const LONG: Duration = Duration::from_millis(4);

/// When to stay awake.
#[derive(Debug)]
pub(crate) struct Spin {
    in_vain: u32,
    armed: bool,
    way: Way,
    stage: Stage,
    /// Answers until this stage ends.
    left: u32,
    /// What the answers of this stage took.
    took: Duration,
    /// For how many answers a way is kept next that proves the quicker one again.
    kept: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Awake,
    Blocked,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Kept,
    TriedAgain,
    /// The other one is tried; the one that was kept took so long.
    Other(Duration),
}

impl Default for Spin {
    fn default() -> Self {
        Spin {
            in_vain: 0,
            armed: false,
            way: Way::Awake,
            stage: Stage::Kept,
            left: KEPT,
            took: Duration::ZERO,
            kept: KEPT,
        }
    }
}

impl Spin {
    /// A fault was answered, so long after the answer before.
    pub(crate) fn answered(&mut self, since_last: Duration) {
        self.armed = true;
        self.took += since_last.min(LONG);
        self.left -= 1;
        if self.left == 0 {
            self.next_stage();
        }
    }

    fn next_stage(&mut self) {
        let took = std::mem::take(&mut self.took);
        (self.stage, self.left) = match self.stage {
            Stage::Kept => (Stage::TriedAgain, STRETCH),
            Stage::TriedAgain => {
                self.way = self.way.other();
                (Stage::Other(took), STRETCH)
            }
            Stage::Other(before) if took < before => {
                self.kept = KEPT;
                (Stage::Kept, self.kept)
            }
            Stage::Other(_) => {
                self.way = self.way.other();
                self.kept = (4 * self.kept).min(KEPT_LONGEST);
                (Stage::Kept, self.kept)
            }
        };
    }

    /// How long to stay awake now, if at all.
    pub(crate) fn moment(&self) -> Option<Duration> {
        let pays = self.way == Way::Awake && self.in_vain < PATIENCE;
        (self.armed && pays).then_some(MOMENT)
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

impl Way {
    fn other(self) -> Way {
        match self {
            Way::Awake => Way::Blocked,
            Way::Blocked => Way::Awake,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(30);

    #[test]
    fn it_stays_awake_after_a_fault_until_that_was_in_vain_a_few_times() {
        let mut spin = Spin::default();
        assert_eq!(spin.moment(), None);
        for _ in 0..PATIENCE {
            spin.answered(SHORT);
            assert_eq!(spin.moment(), Some(MOMENT));
            spin.was_in_vain();
            assert_eq!(spin.moment(), None);
        }
        spin.answered(SHORT);
        assert_eq!(spin.moment(), None);
    }

    #[test]
    fn faults_that_follow_closely_make_it_worth_while_again() {
        let mut spin = Spin::default();
        for _ in 0..PATIENCE {
            spin.answered(SHORT);
            spin.was_in_vain();
        }
        spin.came_after(Duration::from_millis(5));
        spin.answered(SHORT);
        assert_eq!(spin.moment(), None);
        spin.came_after(Duration::from_micros(80));
        spin.answered(SHORT);
        assert_eq!(spin.moment(), Some(MOMENT));
    }

    /// Of so many faults, how many it waits for awake where these are the times from answer to answer.
    fn awake_of(faults: u32, spin: &mut Spin, awake: u64, blocked: u64) -> u32 {
        let mut stayed = 0;
        for _ in 0..faults {
            let micros = match spin.way {
                Way::Awake => awake,
                Way::Blocked => blocked,
            };
            stayed += u32::from(spin.way == Way::Awake);
            spin.answered(Duration::from_micros(micros));
        }
        stayed
    }

    #[test]
    fn where_staying_awake_is_quicker_it_hardly_ever_blocks() {
        let faults = 16_384;
        let awake = awake_of(faults, &mut Spin::default(), 28, 106);
        assert!(awake >= faults - 4 * STRETCH, "{awake}");
    }

    #[test]
    fn where_blocking_is_quicker_it_is_hardly_ever_awake() {
        let awake = awake_of(16_384, &mut Spin::default(), 60, 20);
        assert!(awake <= KEPT + 8 * STRETCH, "{awake}");
    }

    #[test]
    fn a_host_that_changes_is_followed() {
        let mut spin = Spin::default();
        awake_of(100_000, &mut spin, 28, 106);
        awake_of(2 * KEPT_LONGEST, &mut spin, 60, 20);
        assert!(awake_of(4000, &mut spin, 60, 20) <= 2 * STRETCH);
        awake_of(2 * KEPT_LONGEST, &mut spin, 28, 106);
        assert!(awake_of(4000, &mut spin, 28, 106) >= 4000 - 2 * STRETCH);
    }

    #[test]
    fn the_pauses_of_a_guest_decide_nothing() {
        let mut spin = Spin::default();
        awake_of(4096, &mut spin, 50_000, 5_000);
        assert_eq!(spin.way, Way::Awake);
    }
}
