//! Medians, tails and ratios of paired samples.

use serde::Serialize;

/// One thing, measured many times: microseconds, or KiB.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<f64>);

/// What is told of them.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Summary {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

/// The middle of many, and how far the others are from it; in the unit of the samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) p10: f64,
    pub(super) p90: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Samples {
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(super) fn summary(&self) -> Summary {
        Summary {
            p50_us: quantile(&self.0, 0.50),
            p99_us: quantile(&self.0, 0.99),
        }
    }

    pub(super) fn median(&self) -> f64 {
        quantile(&self.0, 0.50)
    }

    pub(super) fn spread(&self) -> Spread {
        Spread {
            median: self.median(),
            p10: quantile(&self.0, 0.10),
            p90: quantile(&self.0, 0.90),
            min: quantile(&self.0, 0.0),
            max: quantile(&self.0, 1.0),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The median of this divided by that, pair by pair: what drifts in the machine hits both of a pair.
    pub(super) fn ratio(&self, other: &Samples) -> f64 {
        self.divided_by(other).median()
    }

    /// The median of this less that, pair by pair.
    pub(super) fn difference(&self, other: &Samples) -> f64 {
        self.less(other).median()
    }

    pub(super) fn divided_by(&self, other: &Samples) -> Samples {
        self.pairwise(other, |a, b| a / b)
    }

    pub(super) fn less(&self, other: &Samples) -> Samples {
        self.pairwise(other, |a, b| a - b)
    }

    pub(super) fn plus(&self, other: &Samples) -> Samples {
        self.pairwise(other, |a, b| a + b)
    }

    /// How often this was smaller than that, pair by pair.
    pub(super) fn wins(&self, other: &Samples) -> usize {
        let pairs = self.0.iter().zip(&other.0);
        pairs.filter(|(a, b)| a < b).count()
    }

    fn pairwise(&self, other: &Samples, combine: fn(f64, f64) -> f64) -> Samples {
        let pairs = self.0.iter().zip(&other.0);
        Samples(pairs.map(|(a, b)| combine(*a, *b)).collect())
    }
}

/// The nearest-rank quantile; NaN of nothing.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank among a few thousand samples"
    )]
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn quantiles_are_samples() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let summary = samples(&hundred).summary();
        assert_eq!((summary.p50_us, summary.p99_us), (50.0, 99.0));
        assert_eq!(samples(&[7.0]).summary().p99_us, 7.0);
        assert!(samples(&[]).summary().p50_us.is_nan());
    }

    #[test]
    fn a_spread_is_of_samples_and_survives_a_single_one() {
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        let spread = samples(&ten).spread();
        assert_eq!((spread.p10, spread.median, spread.p90), (1.0, 5.0, 9.0));
        assert_eq!((spread.min, spread.max), (1.0, 10.0));
        let spread = samples(&[3.0]).spread();
        assert_eq!((spread.p10, spread.median, spread.p90), (3.0, 3.0, 3.0));
    }

    #[test]
    fn a_tie_is_won_by_nobody() {
        let (a, b) = (samples(&[1.0, 2.0, 3.0]), samples(&[2.0, 2.0, 2.0]));
        assert_eq!((a.wins(&b), b.wins(&a)), (1, 1));
    }

    #[test]
    fn ratios_go_pair_by_pair() {
        let (a, b) = (samples(&[2.0, 20.0, 200.0]), samples(&[1.0, 10.0, 100.0]));
        assert_eq!(a.ratio(&b), 2.0);
        assert_eq!(a.difference(&b), 10.0);
        assert_eq!(a.plus(&b).median(), 30.0);
    }
}
