//! Random numbers from the host.

use super::RateLimiter;

body! {
    /// A virtio-rng device. Firecracker ≥ 1.4.
    #[derive(Default)]
    pub struct EntropyDevice {}
    optional {
        /// Limits on bytes and operations.
        rate_limiter: RateLimiter,
    }
}
