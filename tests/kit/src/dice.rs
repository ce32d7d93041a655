//! Chance, that can be had again.

use std::env;

/// What repeats a run that failed.
pub const SEED: &str = "REKINDLE_SEED";

/// The number that an environment variable has, or another one.
pub fn setting(variable: &str, otherwise: u64) -> u64 {
    let given = env::var(variable).ok();
    given
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}

/// Numbers that look random, from a seed that is told when a story fails.
#[derive(Debug)]
pub struct Dice {
    seed: u64,
    state: u64,
}

impl Dice {
    /// With the seed that [`SEED`] names, or another one each time.
    #[expect(clippy::new_without_default, reason = "no two are alike")]
    pub fn new() -> Dice {
        let now = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(1, |time| u64::from(time.subsec_nanos()));
        Dice::of(setting(SEED, now))
    }

    /// With this seed.
    pub fn of(seed: u64) -> Dice {
        Dice { seed, state: seed }
    }

    /// What repeats this run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        // SplitMix64: seeds that follow each other lead to runs that have nothing in common.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..end`.
    pub fn up_to(&mut self, end: usize) -> usize {
        usize::try_from(self.number() >> 33).unwrap_or(0) % end
    }
}

#[cfg(test)]
mod tests {
    use super::Dice;

    #[test]
    fn a_seed_repeats_a_run_and_the_next_seed_does_not() {
        let run = |seed| {
            let mut dice = Dice::of(seed);
            std::iter::repeat_with(|| dice.up_to(1000))
                .take(20)
                .collect::<Vec<_>>()
        };
        assert_eq!(run(6), run(6));
        assert_ne!(run(6), run(7));
        assert!(run(7).iter().all(|n| *n < 1000));
    }
}
