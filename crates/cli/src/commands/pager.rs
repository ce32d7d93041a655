//! `rekindle pager`.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rekindle_engine::bucket;
use rekindle_engine::jail;
use rekindle_engine::vm::dir::PAGER_STATE;
use rekindle_pager::{
    Adoption, Ended, Failing, Living, OpenPlace, Options, PackedSource, Ready, Rights, Socket,
    Source, adopt, serve,
};
use std::os::fd::{AsFd, OwnedFd};

use super::restore::Ahead;
use super::{Context, parse_duration};

/// Serves one restored VM's page faults; a drop-in for Firecracker's example handlers
///
/// Prints one line of JSON when it listens. Give Firecracker the socket as the mem_backend of
/// PUT /snapshot/load. Ends when the VM has ended, and leaves its counts in the stats file.
///
/// Before it reads what Firecracker says it gives up its rights, but for those to kill the VM and to
/// write the stats and the working set.
///
/// Killing it leaves the guest waiting, until --adopt takes it over: that needs the --state file.
/// With --adopt it takes the place of a page server that died, or of one that lives, without a lost
/// page fault; everything else it needs to know is in the state file.
#[derive(Debug, clap::Args)]
pub(crate) struct Pager {
    /// The socket to listen on
    #[arg(long, value_name = "P", required_unless_present = "adopt")]
    socket: Option<PathBuf>,
    /// The memory file of a Full snapshot
    #[arg(
        long,
        value_name = "F",
        required_unless_present_any = ["snapshot", "packed", "adopt"],
        conflicts_with_all = ["snapshot", "packed"]
    )]
    memory: Option<PathBuf>,
    /// A snapshot's directory, with those it builds on beside it
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    #[command(flatten)]
    packed: Packed,
    /// Take over the VM that this Firecracker process runs
    #[arg(long, value_name = "PID", conflicts_with_all = ["socket", "memory", "snapshot", "packed", "replay", "record", "stats", "timeout"])]
    adopt: Option<i32>,
    /// Bring the pages of this working set before the guest asks for them
    #[arg(long, value_name = "F")]
    replay: Option<PathBuf>,
    /// Add what the guest touches in its first ten seconds to this working set
    #[arg(long, value_name = "F")]
    record: Option<PathBuf>,
    /// Leave the counts in this file when the VM has ended
    #[arg(long, value_name = "F")]
    stats: Option<PathBuf>,
    /// Keep what a successor needs in this file [default with --adopt: pager.state where Firecracker works, or in the directory of the VM in whose jail it is]
    #[arg(long, value_name = "F")]
    state: Option<PathBuf>,
    /// Give up if Firecracker has not connected after this long (30s, 5m)
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// The socket is bound already and comes as standard input; with --adopt the userfaultfd does
    #[arg(long, hide = true)]
    inherited: bool,
    /// Somebody watches this process, starts a successor if it fails, and collects what it leaves
    #[arg(long, hide = true)]
    supervised: bool,
    /// The VM's id, so that this process is found by it
    #[arg(long, hide = true)]
    id: Option<String>,
}

/// A memory that is fetched from a repository, for a VM of Rekindle's own.
#[derive(Debug, clap::Args)]
struct Packed {
    /// Where the snapshot's indexes are
    #[arg(
        long,
        hide = true,
        value_name = "DIR",
        requires = "from",
        conflicts_with = "snapshot"
    )]
    packed: Option<PathBuf>,
    /// The repository's URL
    #[arg(long, hide = true, value_name = "URL", requires = "packed")]
    from: Option<String>,
    /// How long it may take to answer one request
    #[arg(long, hide = true, value_name = "T", default_value = "2m", value_parser = parse_duration)]
    patience: Duration,
    /// The state directory that has the cache of chunks
    #[arg(long, hide = true, value_name = "DIR")]
    cache_of: Option<PathBuf>,
    /// How much of the disk that cache may take, in MiB
    #[arg(long, hide = true, value_name = "MIB", default_value_t = 4096)]
    cache: u64,
    /// What is fetched before the guest asks
    #[arg(long, hide = true, value_enum, default_value_t = Ahead::WorkingSet)]
    prefetch: Ahead,
}

impl Packed {
    fn source(self) -> Option<PackedSource> {
        Some(PackedSource {
            outline: self.packed?,
            place: self.from?,
            root: self.cache_of,
            cache_bytes: self.cache.saturating_mul(1 << 20),
            patience: self.patience,
            prefetch: self.prefetch.into(),
        })
    }
}

/// How a page server gets to a repository.
const OPEN_PLACE: OpenPlace = OpenPlace(bucket::open);

impl Pager {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let failing = if self.supervised {
            Failing::LeavesItToASuccessor
        } else {
            Failing::KillsTheVm
        };
        let stats = match self.adopt {
            Some(vm) => adopt(self.adoption(context, vm)?, failing)?,
            None => serve(self.options(failing)?, announce)?,
        };
        match stats.ended {
            Some(Ended::VmKilled { reason }) => bail!("the VM was killed: {reason}"),
            _ => Ok(()),
        }
    }

    fn options(self, failing: Failing) -> Result<Options> {
        let (rights, sign) = self.standing()?;
        let source = match (self.memory, self.snapshot, self.packed.source()) {
            (Some(memory), ..) => Source::Memory(memory),
            (None, Some(snapshot), _) => Source::Snapshot(snapshot),
            (None, None, Some(packed)) => Source::Packed(packed),
            (None, None, None) => unreachable!("clap wants one of the three"),
        };
        let path = self.socket.expect("clap wants one without --adopt");
        let socket = if self.inherited {
            let listener = take_stdin().context("no socket to inherit")?;
            Socket::Listener { listener, path }
        } else {
            Socket::Path(path)
        };
        let mut options = Options::new(socket, source);
        options.stats = self.stats;
        options.replay = self.replay;
        options.record = self.record;
        options.state = self.state;
        options.open_place = Some(OPEN_PLACE);
        options.failing = failing;
        options.rights = rights;
        options.sign = sign;
        options.timeout = self.timeout;
        Ok(options)
    }

    /// The rights that it keeps, and how it tells whoever does for it what it has no right to.
    fn standing(&self) -> Result<(Rights, Option<OwnedFd>)> {
        if !self.supervised {
            return Ok((Rights::ItsFiles, None));
        }
        let sign = take_stdout().context("no output to inherit")?;
        Ok((Rights::None, Some(sign)))
    }

    fn adoption(self, context: &Context, vm: i32) -> Result<Adoption> {
        let (rights, sign) = self.standing()?;
        let state = match self.state {
            Some(state) => state,
            None => state_of(context, vm),
        };
        let mut adoption = Adoption::new(vm, state);
        adoption.open_place = Some(OPEN_PLACE);
        adoption.rights = rights;
        adoption.sign = sign;
        if self.inherited {
            adoption.descriptor = Some(take_stdin().context("no descriptor to inherit")?);
        } else {
            adoption.living = Living::Replace;
        }
        Ok(adoption)
    }
}

/// What the page server of this Firecracker keeps: where it works, or in the directory of the VM whose jail it is in.
fn state_of(context: &Context, vm: i32) -> PathBuf {
    let state = PathBuf::from(format!("/proc/{vm}/cwd/{PAGER_STATE}"));
    let (false, Ok(root)) = (state.exists(), context.root()) else {
        return state;
    };
    let jailed = u32::try_from(vm).ok().and_then(|vm| jail::vm_of(&root, vm));
    jailed.map_or(state, |dir| dir.file(PAGER_STATE))
}

/// Takes standard input away from its place, where it would stay open after the handshake and let others connect
/// to a page server that never answers them.
fn take_stdin() -> io::Result<OwnedFd> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(stdin)
}

/// Takes standard output away from its place. Closed, it is a sign to whoever has the other end.
fn take_stdout() -> io::Result<OwnedFd> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(null)?;
    Ok(stdout)
}

/// Whoever waits for the line may be gone; that is no reason not to serve.
fn announce(ready: &Ready) {
    if let Ok(line) = serde_json::to_string(ready) {
        let mut out = io::stdout();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
