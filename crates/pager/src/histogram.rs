//! How long faults took, in a bounded space that may be shared with a file.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::Latency;
use crate::unit::index;

/// The words of a histogram.
pub(crate) const HISTOGRAM_WORDS: usize = 512;
/// The largest value, in the last word: the largest bucket is number 495.
const MAX: usize = HISTOGRAM_WORDS - 1;

/// Counts of durations, in eight buckets per power of two. One thread counts, others may look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Histogram<'a> {
    words: &'a [AtomicU64; HISTOGRAM_WORDS],
}

impl<'a> Histogram<'a> {
    pub(crate) fn new(words: &'a [AtomicU64; HISTOGRAM_WORDS]) -> Self {
        Self { words }
    }

    pub(crate) fn record(self, ns: u64) {
        let bucket = &self.words[index(bucket_of(ns))];
        bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if ns > self.words[MAX].load(Ordering::Relaxed) {
            self.words[MAX].store(ns, Ordering::Relaxed);
        }
    }

    pub(crate) fn latency(self) -> Latency {
        let buckets: Vec<u64> = self.words[..MAX]
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        let max = self.words[MAX].load(Ordering::Relaxed);
        let count = buckets.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n));
        // The upper end of the bucket in which the given percentage of all values is reached.
        let quantile = |percent: u64| {
            let wanted = u128::from(count) * u128::from(percent);
            let mut seen = 0;
            for (bucket, n) in (0u64..).zip(&buckets) {
                seen += u128::from(*n);
                if *n > 0 && seen * 100 >= wanted {
                    return end_of(bucket).min(max);
                }
            }
            0
        };
        Latency {
            p50_ns: quantile(50),
            p99_ns: quantile(99),
            max_ns: max,
        }
    }
}

/// Values below 8 have a bucket each; above, the bucket is the exponent and the three bits below the top one.
fn bucket_of(n: u64) -> u64 {
    match n.checked_ilog2() {
        None | Some(0..3) => n,
        Some(log) => u64::from(log - 2) * 8 + (n >> (log - 3)) % 8,
    }
}

/// The largest value in a bucket.
fn end_of(bucket: u64) -> u64 {
    match bucket / 8 {
        0 => bucket,
        block => {
            let unit = 1 << (block - 1);
            (8 + bucket % 8) * unit + (unit - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words() -> [AtomicU64; HISTOGRAM_WORDS] {
        [const { AtomicU64::new(0) }; HISTOGRAM_WORDS]
    }

    proptest! {
        #[test]
        fn a_bucket_ends_at_most_an_eighth_above_what_is_in_it(n in any::<u64>(), shift in 0u32..64) {
            let n = n >> shift;
            let end = end_of(bucket_of(n));
            prop_assert!(end >= n);
            prop_assert!(end - n <= n / 8);
            prop_assert!(bucket_of(n) < 8 * 64);
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let words = words();
        let histogram = Histogram::new(&words);
        assert_eq!(histogram.latency(), Latency::default());
        for ns in 1..=1000 {
            histogram.record(ns * 1000);
        }
        let Latency {
            p50_ns,
            p99_ns,
            max_ns,
        } = histogram.latency();
        assert!((500_000..=562_500).contains(&p50_ns), "{p50_ns}");
        assert!((990_000..=1_000_000).contains(&p99_ns), "{p99_ns}");
        assert_eq!(max_ns, 1_000_000);
    }

    #[test]
    fn the_largest_value_has_a_bucket() {
        let words = words();
        let histogram = Histogram::new(&words);
        histogram.record(u64::MAX);
        assert_eq!(histogram.latency().p50_ns, u64::MAX);
    }
}
