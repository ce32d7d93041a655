//! What the caller is told while assets are prepared.
//!
//! ```text
//! Assets ── Event ──> report(&event) ── println!("{event}") ──> a person
//! ```
//!
//! Events are facts, in the order in which they happen; their `Display` is a line for a terminal.

use std::fmt;
use std::path::Path;

use crate::hash::Sha256;

/// Receives every [`Event`]; called on the thread that prepares the asset.
pub type Report = Box<dyn Fn(&Event<'_>) + Send + Sync>;

/// Something that a person who waits wants to know.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// System packages are about to be installed.
    Installing {
        /// Debian package names.
        packages: &'a [&'a str],
        /// What they are needed for.
        why: &'a str,
    },
    /// apt's package lists are about to be refreshed, because the old ones did not serve.
    RefreshingLists,
    /// A download is about to start.
    Fetching {
        /// The asset.
        what: &'a str,
        /// Where from.
        source: &'a str,
    },
    /// A download goes on.
    Progress {
        /// The asset.
        what: &'a str,
        /// Bytes on disk so far.
        done: u64,
        /// Bytes in all, where the other side said so.
        total: Option<u64>,
    },
    /// A source did not serve; the next one is tried.
    SourceFailed {
        /// The asset.
        what: &'a str,
        /// The source that was given up.
        source: &'a str,
        /// Why.
        why: &'a anyhow::Error,
    },
    /// Something is about to be made out of verified parts.
    Building {
        /// The asset.
        what: &'a str,
        /// The parts.
        from: &'a str,
    },
    /// An asset that was there before turned out damaged; it is made again.
    Damaged {
        /// The asset.
        what: &'a str,
        /// How it shows.
        why: &'a anyhow::Error,
    },
    /// An asset is in place, and its contents are the expected ones.
    Ready {
        /// The asset.
        what: &'a str,
        /// Where it is.
        path: &'a Path,
        /// Its hash.
        sha256: Sha256,
        /// Where it came from.
        source: &'a str,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Installing { packages, why } => {
                write!(f, "installing {}: {why}", packages.join(" "))
            }
            Self::RefreshingLists => f.write_str("refreshing apt's package lists"),
            Self::Fetching { what, source } => write!(f, "fetching {what} from {source}"),
            Self::Progress { what, done, total } => match total {
                Some(total) => write!(f, "fetching {what}: {done} of {total} bytes"),
                None => write!(f, "fetching {what}: {done} bytes"),
            },
            Self::SourceFailed { what, source, why } => {
                write!(f, "no {what} from {source}: {why:#}")
            }
            Self::Building { what, from } => write!(f, "building {what} from {from}"),
            Self::Damaged { what, why } => write!(f, "making {what} again: {why:#}"),
            Self::Ready {
                what,
                path,
                sha256,
                source,
            } => {
                write!(f, "{what}: {} (sha256 {sha256}, {source})", path.display())
            }
        }
    }
}
