//! Persistent memory devices: files mapped into the guest.

use std::path::PathBuf;

use super::RateLimiter;

body! {
    /// A file that the guest sees as memory, shared with the host. Firecracker ≥ 1.14.
    pub struct Pmem {
        /// Its name in the API, `[A-Za-z0-9_]+`.
        id: String,
        /// The file on the host.
        path_on_host: PathBuf,
    }
    optional {
        /// Whether the guest's root file system is on it.
        root_device: bool,
        /// Whether the guest may only read it.
        read_only: bool,
        /// Limits on its flushes; each counts as the whole file. Firecracker ≥ 1.16.
        rate_limiter: RateLimiter [since PmemRateLimiter],
    }
}

impl Pmem {
    /// The device `id` on this file.
    pub fn new(id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Pmem {
        Pmem {
            id: id.into(),
            path_on_host: path_on_host.into(),
            root_device: None,
            read_only: None,
            rate_limiter: None,
        }
    }
}

body! {
    /// Other limits for a persistent memory device of a running guest. Firecracker ≥ 1.16.
    pub struct PartialPmem {
        /// The device's name in the API.
        id: String,
    }
    optional {
        /// Limits on its flushes.
        rate_limiter: RateLimiter,
    }
}

impl PartialPmem {
    /// Changes the device of this name.
    pub fn new(id: impl Into<String>) -> PartialPmem {
        PartialPmem {
            id: id.into(),
            rate_limiter: None,
        }
    }
}
