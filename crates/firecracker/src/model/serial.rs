//! The guest's serial console.

use std::path::PathBuf;

use super::TokenBucket;

body! {
    /// Where the serial console's output goes, if not to Firecracker's standard output.
    /// Firecracker ≥ 1.14.
    #[derive(Default, Eq)]
    pub struct SerialDevice {}
    optional {
        /// A file or FIFO; created when absent.
        serial_out_path: PathBuf [into],
        /// A limit on bytes; what exceeds it is dropped. Firecracker ≥ 1.16.
        rate_limiter: TokenBucket [since SerialRateLimiter],
    }
}
