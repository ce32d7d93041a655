//! A network namespace that nobody names and nobody holds but the processes in it.
//!
//! ```text
//!   a thread ── unshare ─▶ new namespace ── makes its TAPs ── starts the process ── ends
//!                               ▲                                   │
//!                               └── lives as long as this ──────────┘
//! ```
//!
//! So it is gone when its last process is, however that comes about, and with it all that is in it: TAPs, addresses, rules,
//! and a pair of links of which one end is in it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::thread::{CapabilitySet, LinkNameSpaceType, capabilities, move_into_link_name_space};

use super::{NetError, sys};

const TUN: &str = "/dev/net/tun";

/// The namespace, held.
pub(super) struct Namespace {
    itself: File,
}

/// Refuses when this process has not the rights for it.
pub(super) fn check() -> Result<(), NetError> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    match capabilities(None) {
        Ok(sets) if sets.effective.contains(needed) => Ok(()),
        _ => Err(NetError::Rights),
    }
}

/// Runs `start` in a new namespace. The processes that it starts stay there.
pub(super) fn enter<T: Send>(
    start: impl FnOnce(Namespace) -> Result<T, NetError> + Send,
) -> Result<T, NetError> {
    check()?;
    in_a_thread(|| {
        sys::leave_network().map_err(|e| NetError::Namespace(e.into()))?;
        let itself = File::open("/proc/thread-self/ns/net").map_err(NetError::Namespace)?;
        start(Namespace { itself })
    })
}

/// A namespace is a thread's own affair, and this one's ends with it.
fn in_a_thread<T: Send>(what: impl FnOnce() -> Result<T, NetError> + Send) -> Result<T, NetError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, what)
            .map_err(NetError::Thread)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Namespace {
    /// Does something in it.
    pub(super) fn within<T: Send>(
        &self,
        what: impl FnOnce() -> Result<T, NetError> + Send,
    ) -> Result<T, NetError> {
        in_a_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|e| NetError::Namespace(e.into()))?;
            what()
        })
    }

    /// Makes a TAP device in it.
    pub(super) fn make_tap(&self, name: &str) -> Result<(), NetError> {
        // Opened for each, and in the new namespace, to which it belongs.
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .open(TUN)
            .map_err(NetError::Tun)?;
        sys::make_tap(&tun, name).map_err(|e| NetError::Tap {
            name: name.to_owned(),
            source: e.into(),
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.itself.as_fd()
    }
}
