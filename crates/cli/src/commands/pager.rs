//! `rekindle pager`.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rekindle_pager::{Ended, Options, Ready, Socket, Source, serve};
use std::os::fd::{AsFd, OwnedFd};

use super::parse_duration;

/// Serves one restored VM's page faults; a drop-in for Firecracker's example handlers
///
/// Prints one line of JSON when it listens. Give Firecracker the socket as the mem_backend of
/// PUT /snapshot/load. Ends when the VM has ended, and leaves its counts in the stats file. Killing it
/// leaves the guest waiting for ever: kill the VM instead.
#[derive(Debug, clap::Args)]
pub(crate) struct Pager {
    /// The socket to listen on
    #[arg(long, value_name = "P")]
    socket: PathBuf,
    /// The memory file of a Full snapshot
    #[arg(
        long,
        value_name = "F",
        required_unless_present = "snapshot",
        conflicts_with = "snapshot"
    )]
    memory: Option<PathBuf>,
    /// A snapshot's directory, with those it builds on beside it
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    /// Leave the counts in this file when the VM has ended
    #[arg(long, value_name = "F")]
    stats: Option<PathBuf>,
    /// Give up if Firecracker has not connected after this long (30s, 5m)
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// The socket is bound already and comes as standard input
    #[arg(long, hide = true)]
    inherited: bool,
    /// The VM's id, so that this process is found by it
    #[arg(long, hide = true)]
    id: Option<String>,
}

impl Pager {
    pub(crate) fn run(self) -> Result<()> {
        let source = match (self.memory, self.snapshot) {
            (Some(memory), _) => Source::Memory(memory),
            (None, Some(snapshot)) => Source::Snapshot(snapshot),
            (None, None) => unreachable!("clap wants one of the two"),
        };
        let socket = if self.inherited {
            let listener = take_stdin().context("no socket to inherit")?;
            Socket::Listener {
                listener,
                path: self.socket,
            }
        } else {
            Socket::Path(self.socket)
        };
        let mut options = Options::new(socket, source);
        options.stats = self.stats;
        options.timeout = self.timeout;
        let stats = serve(options, announce)?;
        match stats.ended {
            Ended::VmKilled { reason } => bail!("the VM was killed: {reason}"),
            _ => Ok(()),
        }
    }
}

/// Takes standard input away from its place, where it would stay open after the handshake and let others connect
/// to a page server that never answers them.
fn take_stdin() -> io::Result<OwnedFd> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(stdin)
}

/// Whoever waits for the line may be gone; that is no reason not to serve.
fn announce(ready: &Ready) {
    if let Ok(line) = serde_json::to_string(ready) {
        let mut out = io::stdout();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
