//! A userfaultfd page server for Firecracker snapshots.
//!
//! ```text
//!             PUT /snapshot/load {"mem_backend": {"backend_type": "Uffd", "backend_path": socket}}
//!                                        │
//!   Firecracker ──regions, userfaultfd──► socket ──► handshake ──► server ──pread──► memory file
//!     vCPU ──touches a missing page──► userfaultfd ──────────────────▲  │
//!          ◄─────────────── UFFDIO_COPY, UFFDIO_ZEROPAGE ───────────────┘
//! ```
//!
//! [`serve`] serves one VM, on demand, until it has ended. It needs nothing of the VM's manager but the
//! socket's path, so it works under any. What it promises: no page is ever wrong. Where one cannot be
//! right, the VM is killed before it sees it, and [`Stats::ended`] says why. `docs/pager.md` tells how.
//!
//! ```no_run
//! use rekindle_pager::{Options, Socket, Source, serve};
//!
//! let options = Options::new(Socket::Path("pager.sock".into()), Source::Memory("memory".into()));
//! let stats = serve(options, |ready| println!("{}", ready.listening.display()))?;
//! println!("{} pages came in", stats.copied + stats.zeroed);
//! # Ok::<(), rekindle_pager::PagerError>(())
//! ```

// Unsafe code is in `sys.rs` alone; `forbid` would not let it.
#![deny(unsafe_code)]

mod handshake;
mod page_set;
mod region;
mod server;
mod socket;
mod source;
mod stats;
#[expect(
    unsafe_code,
    reason = "the ioctls of a userfaultfd; the file opens with its safety model"
)]
mod sys;
mod unit;
mod vm;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use handshake::{HandshakeError, parse as parse_handshake};
pub use region::{Region, RegionError, RegionMap};
pub use socket::{ListenError, Socket};
pub use source::{Source, SourceError};
pub use stats::{BadPage, Ended, KillReason, Latency, Operation, Ready, Stats};
pub use unit::{HostAddr, MemoryOffset, PageIndex, PageRun, PageSize};

use server::Server;
use socket::Listening;
use source::Backing;

/// What to serve, and where.
#[derive(Debug)]
pub struct Options {
    /// Where Firecracker connects.
    pub socket: Socket,
    /// What the guest's memory is filled from.
    pub source: Source,
    /// Where to leave the counts when the VM has ended; replaced as a whole.
    pub stats: Option<PathBuf>,
    /// How long to wait for Firecracker to connect and speak; for ever unless set.
    pub timeout: Option<Duration>,
}

impl Options {
    /// Serves `source` at `socket`, leaves no stats file, and waits without a limit.
    pub fn new(socket: Socket, source: Source) -> Options {
        Options {
            socket,
            source,
            stats: None,
            timeout: None,
        }
    }
}

/// Why a VM was not served to its end.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The guest's memory cannot be opened. Nothing was made.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// There is no socket to listen on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No VM was taken on.
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    /// The VM has to die, and cannot be killed. Its faults are not answered any more.
    #[error("cannot kill the VM")]
    Kill {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM has ended, but what was done for it could not be written down.
    #[error("cannot write the stats file {path}")]
    WriteStats {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Serves one VM from its handshake to its end, and blocks that long.
///
/// `on_ready` is called once Firecracker may connect. That the page server had to kill the VM is no error of
/// this function but a fact in [`Stats::ended`]. When this returns or panics, the VM that connected is
/// dead; only if the calling process is killed does it live on, waiting, and somebody else must see to it.
pub fn serve(options: Options, on_ready: impl FnOnce(&Ready)) -> Result<Stats, PagerError> {
    let Options {
        socket,
        source,
        stats: stats_file,
        timeout,
    } = options;
    let backing = Backing::open(&source)?;
    let listening = Listening::open(socket)?;
    on_ready(&Ready {
        listening: listening.path().into(),
        pid: std::process::id(),
    });
    let guest = handshake::receive(&listening, backing.bytes(), timeout)?;
    drop(listening);
    let stats = Server::new(guest, backing)
        .run()
        .map_err(|source| PagerError::Kill { source })?;
    if let Some(path) = stats_file {
        stats
            .write(&path)
            .map_err(|source| PagerError::WriteStats { path, source })?;
    }
    Ok(stats)
}
