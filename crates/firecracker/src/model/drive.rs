//! Block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// When what the guest writes reaches the host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CacheType {
    /// When the host likes: the guest's flushes do nothing.
    Unsafe,
    /// When the guest flushes.
    Writeback,
}

/// How Firecracker reads and writes the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum IoEngine {
    /// With blocking system calls.
    Sync,
    /// With io_uring (developer preview; host ≥ 5.10.51).
    Async,
}

body! {
    /// A block device: a file on the host, or the socket of a vhost-user back end.
    pub struct Drive {
        /// Its name in the API, `[A-Za-z0-9_]+`.
        drive_id: String,
        /// The file on the host; none for a vhost-user back end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path_on_host: Option<PathBuf>,
        /// Whether the guest's root file system is on it.
        is_root_device: bool,
    }
    optional {
        /// Whether the guest may only read it.
        is_read_only: bool,
        /// The partition with the root file system, by UUID.
        partuuid: String [into],
        /// When what the guest writes reaches the host's disk; [`CacheType::Unsafe`] unless set.
        cache_type: CacheType,
        /// Limits on bytes and operations.
        rate_limiter: RateLimiter,
        /// How Firecracker reads and writes the file; [`IoEngine::Sync`] unless set.
        io_engine: IoEngine,
        /// The socket of a vhost-user back end.
        socket: PathBuf [into],
    }
}

impl Drive {
    /// A further drive on this file, writable unless set otherwise.
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Drive {
        Drive {
            drive_id: drive_id.into(),
            path_on_host: Some(path_on_host.into()),
            is_root_device: false,
            is_read_only: Some(false),
            partuuid: None,
            cache_type: None,
            rate_limiter: None,
            io_engine: None,
            socket: None,
        }
    }

    /// The drive with the guest's root file system, writable unless set otherwise.
    pub fn root(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Drive {
        Drive::new(drive_id, path_on_host).is_root_device(true)
    }

    /// A drive served by a vhost-user back end on this socket (developer preview; such a VM cannot be
    /// snapshotted).
    pub fn vhost_user(drive_id: impl Into<String>, socket: impl Into<PathBuf>) -> Drive {
        Drive {
            path_on_host: None,
            is_read_only: None,
            socket: Some(socket.into()),
            ..Drive::new(drive_id, "")
        }
    }

    /// Whether the guest's root file system is on it.
    #[must_use]
    pub fn is_root_device(mut self, value: bool) -> Drive {
        self.is_root_device = value;
        self
    }
}

body! {
    /// A change to the drive of a running guest. With the id alone, a vhost-user back end is asked for its
    /// configuration anew.
    pub struct PartialDrive {
        /// The drive's name in the API.
        drive_id: String,
    }
    optional {
        /// Another file on the host.
        path_on_host: PathBuf [into],
        /// Other limits; a bucket that is not given stays as it is.
        rate_limiter: RateLimiter,
    }
}

impl PartialDrive {
    /// Changes the drive of this name.
    pub fn new(drive_id: impl Into<String>) -> PartialDrive {
        PartialDrive {
            drive_id: drive_id.into(),
            path_on_host: None,
            rate_limiter: None,
        }
    }
}
