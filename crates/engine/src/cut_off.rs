//! A process that is cut off from every network: it starts in a network namespace of its own, where there are TAP
//! devices of the names that it wants, and nothing else.
//!
//! ```text
//!   a thread ── unshare ─▶ new namespace ── makes its TAPs ── starts the process ── ends
//!                               ▲                                   │
//!                               └── lives as long as this ──────────┘
//! ```
//!
//! The namespace has no name and nobody else holds it. So it is gone, TAPs and all, when the process is, however that
//! comes about. The host's network is neither looked at nor touched.

use std::fs::OpenOptions;
use std::io;

use rustix::thread::{CapabilitySet, capabilities};

use crate::sys;

const TUN: &str = "/dev/net/tun";

/// Why a process cannot be cut off from the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CutOffError {
    /// This process may not make networks.
    #[error(
        "a copy with network interfaces is cut off from the network in a namespace of its own, which takes \
         CAP_SYS_ADMIN and CAP_NET_ADMIN: run as root"
    )]
    Rights,
    /// There is no thread for it.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The kernel refused a namespace.
    #[error("cannot make a network namespace")]
    Namespace(#[source] io::Error),
    /// TAP devices are not to be had.
    #[error("cannot open {TUN}")]
    Tun(#[source] io::Error),
    /// A TAP device was refused.
    #[error("cannot make a TAP device {name} in a new network namespace")]
    Tap {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Refuses when this process has not the rights for it.
pub(crate) fn check() -> Result<(), CutOffError> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::NET_ADMIN;
    match capabilities(None) {
        Ok(sets) if sets.effective.contains(needed) => Ok(()),
        _ => Err(CutOffError::Rights),
    }
}

/// Runs `start` where only these TAP devices are. The processes that it starts stay there.
pub(crate) fn cut_off<T: Send>(
    taps: &[&str],
    start: impl FnOnce() -> T + Send,
) -> Result<T, CutOffError> {
    check()?;
    // A namespace is a thread's own affair, and this one's ends with it.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("cut-off".to_owned())
            .spawn_scoped(scope, || {
                sys::leave_network().map_err(|e| CutOffError::Namespace(e.into()))?;
                taps.iter().try_for_each(|name| make_tap(name))?;
                Ok(start())
            })
            .map_err(CutOffError::Thread)?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn make_tap(name: &str) -> Result<(), CutOffError> {
    // Opened for each, and in the new namespace, to which it belongs.
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(CutOffError::Tun)?;
    sys::make_tap(&tun, name).map_err(|e| CutOffError::Tap {
        name: name.to_owned(),
        source: e.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Vec<String> {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let mut links: Vec<String> = text
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect();
        links.sort();
        links
    }

    #[test]
    fn what_is_cut_off_sees_its_own_taps_alone_and_the_host_keeps_its_links() {
        if check().is_err() {
            // Refused in words, which is all that can be seen without the rights.
            assert!(CutOffError::Rights.to_string().contains("run as root"));
            return;
        }
        let before = links();
        let seen = cut_off(&["tap0", "a-very-long-one"], links).unwrap();
        // Where the modules are loaded, a new network has tunnel devices that lead nowhere.
        assert!(seen.contains(&"tap0".to_owned()), "{seen:?}");
        assert!(seen.contains(&"a-very-long-one".to_owned()), "{seen:?}");
        assert!(!seen.contains(&"eth0".to_owned()), "{seen:?}");
        assert_eq!(links(), before);
        let long = cut_off(&["sixteen-bytes-xx"], || ());
        assert!(
            matches!(&long, Err(CutOffError::Tap { name, .. }) if name.len() == 16),
            "{long:?}"
        );
    }
}
