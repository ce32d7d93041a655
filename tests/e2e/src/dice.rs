//! Chance, that can be had again.

use std::env;

/// Numbers that look random, from a seed that is told when a story fails.
#[derive(Debug)]
pub struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    /// With the seed `REKINDLE_SEED`, or another one each time.
    #[expect(clippy::new_without_default, reason = "no two are alike")]
    pub fn new() -> Dice {
        let given = env::var("REKINDLE_SEED").ok();
        let now = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(1, |time| u64::from(time.subsec_nanos()));
        let seed = given.and_then(|text| text.parse().ok()).unwrap_or(now);
        Dice {
            seed,
            state: seed | 1,
        }
    }

    /// What repeats this run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// One of `0..end`.
    pub fn up_to(&mut self, end: usize) -> usize {
        // Xorshift: the high bits are good enough to choose a victim.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state >> 33).unwrap_or(0) % end
    }
}
