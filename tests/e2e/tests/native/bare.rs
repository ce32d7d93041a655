//! The guests of these stories.

use rekindle_kit::guest::{Counter, Guest, Mib, Pattern, Scatter};

/// Counts aloud, some hundred numbers a second.
pub(crate) fn counter() -> Guest {
    Counter {
        memory: Mib(32),
        ..Counter::default()
    }
    .guest()
}

/// Fills the memory from 32 MiB on and checks it for ever; every eighth page stays zero.
pub(crate) fn pattern() -> Guest {
    fills(PATTERN)
}

/// The same, with much more to fill.
pub(crate) fn large_pattern() -> Guest {
    fills(Mib(32))
}

fn fills(size: Mib) -> Guest {
    let range = Mib(32)..Mib(32 + size.0);
    Pattern {
        memory: range.end,
        range,
        ..Pattern::default()
    }
    .guest()
}

/// Changes a byte in [`SCATTERED`] pages that are nobody's neighbours, pass after pass.
pub(crate) fn scatter() -> Guest {
    Scatter {
        memory: Mib(160),
        from: Mib(64),
        range_bits: 14,
        pages: SCATTERED,
    }
    .guest()
}

/// How many pages the scatter guest touches in each pass.
pub(crate) const SCATTERED: u32 = 2048;

const PATTERN: Mib = Mib(8);

/// How many pages the pattern guest fills, those that stay zero not counted.
pub(crate) const PATTERN_PAGES: u64 = (PATTERN.0 << 20) / 4096 / 8 * 7;
/// How many pages it reads that stay zero.
pub(crate) const ZERO_PAGES: u64 = (PATTERN.0 << 20) / 4096 / 8;
