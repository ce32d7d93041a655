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
// It panics where the log takes nothing; `log.rs` has what does not.
#![deny(clippy::print_stderr)]

mod adopt;
mod around;
mod backoff;
pub mod baseline;
mod bits;
mod cold;
mod far;
mod handshake;
mod hints;
mod histogram;
mod layer;
mod live;
mod log;
mod packed;
mod plan;
mod prefetch;
mod recent;
mod record;
mod region;
mod sandbox;
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
mod touched;
mod trace;
mod unit;
mod vm;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use adopt::{AdoptError, Adoption, Living, living_server_of, server_of, take_descriptor};
pub use handshake::{HandshakeError, parse as parse_handshake};
pub use live::Live;
pub use packed::{OpenPlace, Opened, PackedError, PackedSource, Prefetch};
pub use region::{Region, RegionError, RegionMap};
pub use sandbox::{Confinement, FilterError, Rights, SandboxError, landlock_works};
pub use socket::{ListenError, Socket};
pub use source::{Source, SourceError};
pub use state::StateError;
pub use stats::{BadPage, Ended, KillReason, Latency, Operation, Ready, Stats};
pub use trace::{Kind, Piece};
pub use unit::{HostAddr, MemoryOffset, PageIndex, PageRun, PageSize};

use handshake::{Caller, Guest};
use hints::Hints;
use plan::Plan;
use prefetch::Replay;
use rekindle_store::working_set::WorkingSetError;
use sandbox::Sandbox;
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
    /// The rights that are left when a stranger is listened to.
    pub rights: Rights,
    /// Closed once [`collect`] finds what was touched, if it is left for the owner.
    pub sign: Option<OwnedFd>,
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
            rights: Rights::default(),
            sign: None,
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
    /// The page server keeps more rights than it was to. The VM has been killed.
    #[error("cannot confine the page server")]
    Sandbox(#[from] SandboxError),
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

/// Why what a page server left could not be collected. What could be was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectError {
    /// What it was told cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was touched cannot be merged.
    #[error("cannot record the working set {path}")]
    Record {
        /// The working set.
        path: PathBuf,
        /// Why not.
        #[source]
        source: WorkingSetError,
    },
    /// The counts cannot be written.
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
    let plan = Plan {
        source: full_source(options.source),
        stats: full(options.stats),
        record: full(options.record),
        replay: full(options.replay),
    };
    let (state_file, rights) = (full(options.state), options.rights);
    let mut desk = Desk {
        hints: Hints::open(&plan, state_file.as_deref(), rights, options.sign),
        sandbox: Sandbox::new(rights, &plan),
        room: Room::make(state_file.as_deref())?,
        plan,
        state_file,
    };
    let open = |plan: &Plan| Backing::open(&plan.source, options.open_place);
    let opened = match desk.sandbox.is_far() {
        true => None,
        false => Some(open(&desk.plan)?),
    };
    let listening = Listening::open(options.socket)?;
    if desk.sandbox.is_early() {
        desk.settle()?;
        let state_bytes = opened.as_ref().map_or(0, |memory| Room::of(memory.bytes()));
        desk.sandbox.confine(state_bytes)?;
    }
    let backing = match opened {
        Some(backing) => backing,
        None => open(&desk.plan)?,
    };
    desk.room.reserve(backing.bytes())?;
    on_ready(&Ready {
        listening: listening.path().into(),
        pid: std::process::id(),
    });
    let caller = handshake::wait_for(&listening, options.timeout)?;
    drop(listening);
    let ready = desk.be_ready_for(&caller);
    // Heard in any case: who waits for pages that nobody brings is killed for it.
    let guest = caller.hear(backing.bytes());
    let (identity, confinement) = ready?;
    let guest = guest?;
    desk.serve(guest, identity, confinement, backing, options.failing)
}

/// What a page server has before it has a VM.
struct Desk {
    plan: Plan,
    state_file: Option<PathBuf>,
    hints: Hints,
    room: Room,
    sandbox: Sandbox,
}

impl Desk {
    /// Makes all that is ever made beside the state.
    fn settle(&mut self) -> Result<(), StateError> {
        if let Some(state) = &self.state_file {
            self.plan.write(state)?;
        }
        self.room.name()
    }

    /// Does what takes a right, and gives up the rights.
    fn be_ready_for(
        &mut self,
        caller: &Caller,
    ) -> Result<(VmIdentity, Option<Confinement>), PagerError> {
        let identity = VmIdentity::of(caller.vm().pid());
        let identity = identity.map_err(|source| PagerError::Identify { source })?;
        if !self.sandbox.is_early() {
            self.settle()?;
            self.sandbox.confine(0)?;
        }
        let confinement = self.sandbox.hold_only(caller.vm())?;
        Ok((identity, confinement))
    }

    fn serve(
        self,
        guest: Guest,
        identity: VmIdentity,
        confinement: Option<Confinement>,
        mut backing: Backing,
        failing: Failing,
    ) -> Result<Stats, PagerError> {
        let Guest {
            mut vm,
            uffd,
            regions,
            connection,
        } = guest;
        let saved = Saved {
            vm: identity,
            regions: regions.regions().to_vec(),
            memory_bytes: backing.bytes(),
            plan: self.plan,
        };
        let state = State::create(self.room, saved, regions)?;
        state.set_confinement(confinement);
        if self.state_file.is_some() {
            vm.on_drop(on_drop(failing));
        }
        let (replay, recorder) = self.hints.of(&state);
        bring(&mut backing, &state, replay.as_ref());
        let server = Server::new(Parts {
            vm,
            uffd,
            connection: Some(connection),
            state,
            backing: Arc::new(backing),
            replay,
            recorder,
        });
        finish(server, self.sandbox.rights())
    }
}

/// Goes on serving a VM whose page server has died, or is to be replaced, to the VM's end.
///
/// What it serves and where it leaves its counts is what the page server before it was told.
pub fn adopt(adoption: Adoption, failing: Failing) -> Result<Stats, PagerError> {
    let rights = adoption.rights;
    let adopt::Taken {
        mut vm,
        uffd,
        state,
        mut backing,
        hints,
    } = adopt::take(adoption)?;
    vm.on_drop(on_drop(failing));
    let (replay, recorder) = hints.of(&state);
    bring(&mut backing, &state, replay.as_ref());
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
    finish(server, rights)
}

fn finish(server: Server, rights: Rights) -> Result<Stats, PagerError> {
    let path = server.stats_file();
    let stats = server.run().map_err(|source| PagerError::Kill { source })?;
    if let (Some(path), true) = (path, rights != Rights::None) {
        stats
            .write(&path)
            .map_err(|source| PagerError::WriteStats { path, source })?;
    }
    Ok(stats)
}

/// Does for a page server without rights what it left to its owner: merges what was touched into the working set that it
/// was told, and writes its stats file, if it has ended. `state` is its state file. May be repeated.
///
/// Where things go stands in a file that such a page server cannot write; what it says of the guest is checked. To have a
/// snapshot's working set written, hold a lease on it.
///
/// # Errors
/// A [`CollectError`]; what could be collected was.
pub fn collect(state: &Path) -> Result<(), CollectError> {
    let Some(plan) = Plan::read(state)? else {
        return Ok(());
    };
    let recorded = match &plan.record {
        None => Ok(false),
        Some(path) => {
            touched::merge(&touched::path(state), path).map_err(|source| CollectError::Record {
                path: path.clone(),
                source,
            })
        }
    };
    if let (Some(path), Ok(state)) = (plan.stats, State::open(state))
        && let Some(ended) = state.ended()
    {
        Stats::of(&state, Some(ended))
            .write(&path)
            .map_err(|source| CollectError::WriteStats { path, source })?;
    }
    recorded.map(drop)
}

fn on_drop(failing: Failing) -> OnDrop {
    match failing {
        Failing::KillsTheVm => OnDrop::Kill,
        Failing::LeavesItToASuccessor => OnDrop::Wait,
    }
}

/// Has fetched what stands in the working set, in its order, before the server asks for the pieces of it.
fn bring(backing: &mut Backing, state: &State, replay: Option<&Replay>) {
    let pages = replay.into_iter().flat_map(Replay::pages);
    backing.bring(pages.map(|page| state.regions().offset(page)));
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
