//! Limits on what a device moves.

body! {
    /// A bucket of tokens: what is moved takes tokens out, time puts them back.
    #[derive(Copy, Eq)]
    pub struct TokenBucket {
        /// What it holds when full: bytes, or operations. 0 for no limit.
        size: u64,
        /// Milliseconds from empty to full. 0 for no limit.
        refill_time: u64,
    }
    optional {
        /// Tokens that are spent before the bucket's own, and never put back.
        one_time_burst: u64,
    }
}

impl TokenBucket {
    /// `size` tokens, back within `refill_time` milliseconds.
    pub fn new(size: u64, refill_time: u64) -> TokenBucket {
        TokenBucket {
            size,
            refill_time,
            one_time_burst: None,
        }
    }
}

body! {
    /// Limits on bytes and on operations, each on its own.
    #[derive(Copy, Default, Eq)]
    pub struct RateLimiter {}
    optional {
        /// Limits bytes.
        bandwidth: TokenBucket,
        /// Limits operations.
        ops: TokenBucket,
    }
}
