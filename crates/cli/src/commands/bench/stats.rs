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

impl Samples {
    pub(super) fn push(&mut self, micros: f64) {
        self.0.push(micros);
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

    /// The median of this divided by that, pair by pair: what drifts in the machine hits both of a pair.
    pub(super) fn ratio(&self, other: &Samples) -> f64 {
        let ratios: Vec<f64> = self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect();
        quantile(&ratios, 0.50)
    }

    /// The median of this less that, pair by pair.
    pub(super) fn difference(&self, other: &Samples) -> f64 {
        let differences: Vec<f64> = self.0.iter().zip(&other.0).map(|(a, b)| a - b).collect();
        quantile(&differences, 0.50)
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
    fn ratios_go_pair_by_pair() {
        let (a, b) = (samples(&[2.0, 20.0, 200.0]), samples(&[1.0, 10.0, 100.0]));
        assert_eq!(a.ratio(&b), 2.0);
        assert_eq!(a.difference(&b), 10.0);
    }
}
