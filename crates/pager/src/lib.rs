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

mod adopt;
mod around;
mod backoff;
pub mod baseline;
mod bits;
mod cold;
mod far;
mod handshake;
mod histogram;
mod layer;
mod live;
mod packed;
mod prefetch;
mod recent;
mod record;
mod region;
mod server;
mod socket;
mod source;
mod spin;
mod state;
mod stats;
#[expect(
    unsafe_code,
    reason = "the ioctls of a userfaultfd; the file opens with its safety model"
)]
mod sys;
mod trace;
mod unit;
mod vm;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use adopt::{AdoptError, Adoption, Living, living_server_of, server_of, take_descriptor};
pub use handshake::{HandshakeError, parse as parse_handshake};
pub use live::Live;
pub use packed::{OpenPlace, Opened, PackedError, PackedSource, Prefetch};
pub use region::{Region, RegionError, RegionMap};
pub use socket::{ListenError, Socket};
pub use source::{Source, SourceError};
pub use state::StateError;
pub use stats::{BadPage, Ended, KillReason, Latency, Operation, Ready, Stats};
pub use trace::{Kind, Piece};
pub use unit::{HostAddr, MemoryOffset, PageIndex, PageRun, PageSize};

use handshake::Guest;
use prefetch::Replay;
use record::Recorder;
use rekindle_store::working_set;
use server::{Parts, Server};
use socket::Listening;
use source::Backing;
use state::{Room, Saved, State};
use vm::{OnDrop, VmIdentity};

/// What to serve, and where.
#[derive(Debug)]
#[non_exhaustive]
pub struct Options {
    /// Where Firecracker connects.
    pub socket: Socket,
    /// What the guest's memory is filled from.
    pub source: Source,
    /// Where to leave the counts when the VM has ended; replaced as a whole.
    pub stats: Option<PathBuf>,
    /// The working set to bring before the guest asks. One that is absent or damaged costs speed only.
    pub replay: Option<PathBuf>,
    /// The working set to add to: what the guest touches in the first ten seconds after its first fault.
    pub record: Option<PathBuf>,
    /// Where to keep what a successor needs, from the handshake on.
    pub state: Option<PathBuf>,
    /// The way to the repository of a [`Source::Packed`].
    pub open_place: Option<OpenPlace>,
    /// Who looks after the VM if this page server fails.
    pub failing: Failing,
    /// How long to wait for Firecracker to connect and speak; for ever unless set.
    pub timeout: Option<Duration>,
}

/// What a panic of the page server means for the VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Failing {
    /// It is killed: nobody else would serve it.
    #[default]
    KillsTheVm,
    /// It waits: whoever started the page server watches it, and starts another one from the state.
    LeavesItToASuccessor,
}

impl Options {
    /// Serves `source` at `socket`, neither replays nor records, leaves no file, and waits without a limit.
    pub fn new(socket: Socket, source: Source) -> Options {
        Options {
            socket,
            source,
            stats: None,
            replay: None,
            record: None,
            state: None,
            open_place: None,
            failing: Failing::default(),
            timeout: None,
        }
    }
}

/// Why a VM was not served to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    /// What a successor needs cannot be kept. If a VM had been taken on, it has been killed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VM's process cannot be identified. It has been killed.
    #[error("cannot identify the VM")]
    Identify {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM cannot be taken over.
    #[error("cannot take the VM over")]
    Adopt(#[from] AdoptError),
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
/// this function but a fact in [`Stats::ended`]. When this returns or panics, the VM that connected is dead,
/// unless it was to be left to a successor; if the calling process is killed the VM lives on, waiting, and
/// somebody else must [take it over](adopt()) or end it.
pub fn serve(options: Options, on_ready: impl FnOnce(&Ready)) -> Result<Stats, PagerError> {
    let Options {
        socket,
        source,
        stats,
        replay,
        record,
        state: state_file,
        open_place,
        failing,
        timeout,
    } = options;
    let backing = Backing::open(&source, open_place)?;
    let room = Room::take(state_file.as_deref(), backing.bytes())?;
    let listening = Listening::open(socket)?;
    on_ready(&Ready {
        listening: listening.path().into(),
        pid: std::process::id(),
    });
    let guest = handshake::receive(&listening, backing.bytes(), timeout)?;
    drop(listening);
    let Guest {
        mut vm,
        uffd,
        regions,
        connection,
    } = guest;
    let identity = VmIdentity::of(vm.pid()).map_err(|source| PagerError::Identify { source })?;
    let saved = Saved {
        vm: identity,
        regions: regions.regions().to_vec(),
        memory_bytes: backing.bytes(),
        source: full_source(source),
        stats: full(stats),
        record: full(record),
        replay: full(replay),
    };
    let state = State::create(room, saved, regions)?;
    if state_file.is_some() {
        vm.on_drop(on_drop(failing));
    }
    let (replay, recorder) = working_set_of(&state);
    bring(&backing, &state, replay.as_ref());
    let server = Server::new(Parts {
        vm,
        uffd,
        connection: Some(connection),
        state,
        backing: Arc::new(backing),
        replay,
        recorder,
    });
    finish(server)
}

/// Goes on serving a VM whose page server has died, or is to be replaced, to the VM's end.
///
/// What it serves and where it leaves its counts is what the page server before it was told.
pub fn adopt(adoption: Adoption, failing: Failing) -> Result<Stats, PagerError> {
    let adopt::Taken {
        mut vm,
        uffd,
        state,
        backing,
    } = adopt::take(adoption)?;
    vm.on_drop(on_drop(failing));
    let (replay, recorder) = working_set_of(&state);
    bring(&backing, &state, replay.as_ref());
    let mut server = Server::new(Parts {
        vm,
        uffd,
        connection: None,
        state,
        backing: Arc::new(backing),
        replay,
        recorder,
    });
    server.succeed();
    finish(server)
}

fn finish(server: Server) -> Result<Stats, PagerError> {
    let path = server.stats_file();
    let stats = server.run().map_err(|source| PagerError::Kill { source })?;
    if let Some(path) = path {
        stats
            .write(&path)
            .map_err(|source| PagerError::WriteStats { path, source })?;
    }
    Ok(stats)
}

fn on_drop(failing: Failing) -> OnDrop {
    match failing {
        Failing::KillsTheVm => OnDrop::Kill,
        Failing::LeavesItToASuccessor => OnDrop::Wait,
    }
}

/// Has fetched what stands in the working set, in its order, before the server asks for the pieces of it.
fn bring(backing: &Backing, state: &State, replay: Option<&Replay>) {
    let pages = replay.into_iter().flat_map(Replay::pages);
    backing.bring(pages.map(|page| state.regions().offset(page)));
}

/// The working set to replay and the one to record. Neither is worth a VM: what cannot be read is told, and left.
fn working_set_of(state: &State) -> (Option<Replay>, Option<Recorder>) {
    let (saved, regions) = (state.saved(), state.regions());
    let page_size = regions.page_size();
    let set = saved.replay.as_deref().and_then(|path| {
        let read = working_set::read_for(path, page_size.bytes(), regions.pages());
        read.unwrap_or_else(|error| {
            eprintln!("cannot replay {}: {error}", path.display());
            None
        })
    });
    let replay = set.map(|set| Replay::of(&set, page_size));
    let held_back = replay.as_ref().map_or(&[][..], Replay::held_back);
    let recorder = saved
        .record
        .clone()
        .map(|path| Recorder::new(path, regions, held_back));
    (replay, recorder)
}

/// A successor may work in another directory.
fn full(path: Option<PathBuf>) -> Option<PathBuf> {
    path.map(|path| std::path::absolute(&path).unwrap_or(path))
}

fn full_source(source: Source) -> Source {
    let full = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    match source {
        Source::Memory(path) => Source::Memory(full(path)),
        Source::Snapshot(path) => Source::Snapshot(full(path)),
        Source::Packed(source) => Source::Packed(PackedSource {
            outline: full(source.outline),
            root: source.root.map(full),
            ..source
        }),
    }
}
