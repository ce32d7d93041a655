//! Firecracker as a process: started, found, watched, ended.
//!
//! ```text
//!   Launch ─ spawn ─▶ Process ─ ready ─▶ Client          ProcessId: which process, also tomorrow
//!                        │  ▲                            Pidfd:     a hold on it that cannot slip
//!                        │  └ adopt ─ ProcessId ◀─ a record, or find_by_id
//!                        └ wait ─▶ Exit
//! ```
//!
//! A process is known by its pid, when it started, and in which boot of the host. All that is done to it
//! goes through a pidfd, so that a pid that came into other hands is never hit.

mod arguments;
mod exit;
mod identity;
mod jailer;
mod launch;
mod pidfd;
mod readable;
mod ready;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use thiserror::Error;

pub use arguments::arguments_of;
pub use exit::Exit;
pub use identity::{IdentifyError, ProcessId, find_by_id};
pub use jailer::Jailer;
pub use launch::{Launch, SpawnError};
pub use pidfd::Pidfd;
pub use ready::ReadyError;

use crate::client::Client;

/// A running Firecracker, started by this process or adopted.
///
/// Dropping it ends nothing: whether the VM dies with its owner is the owner's decision. But a child that
/// nobody waits for stays in the process table when it dies, until this process ends; so wait for it, after
/// [`Process::kill`] too. A drop reaps a child that is dead already, and no other.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: Pidfd,
    socket: PathBuf,
    exit: OnceLock<Exit>,
}

impl Process {
    /// Takes on a process that somebody else started, such as one found in a record.
    ///
    /// `socket` is its API socket as this process sees it. How it exits is known only if it is, or has
    /// become, a child of this process.
    pub fn adopt(id: ProcessId, socket: impl Into<PathBuf>) -> Result<Process, AdoptError> {
        let pidfd = id.open_pidfd().map_err(|source| AdoptError {
            pid: id.pid,
            source,
        })?;
        Ok(Process::held(id, pidfd, socket.into()))
    }

    fn held(id: ProcessId, pidfd: Pidfd, socket: PathBuf) -> Process {
        Process {
            id,
            pidfd,
            socket,
            exit: OnceLock::new(),
        }
    }

    /// Which process it is: what to write down in order to find it again.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// The hold on it, to watch it elsewhere.
    pub fn pidfd(&self) -> &Pidfd {
        &self.pidfd
    }

    /// Its API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until its API answers, and connects.
    ///
    /// Ends early when the process dies. `deadline` counts from now.
    pub async fn ready(&self, deadline: Duration) -> Result<Client, ReadyError> {
        ready::ready(self, deadline).await
    }

    /// Waits until it is dead, and reaps it if it is a child. May be called again, and cancelled.
    pub async fn wait(&self) -> std::io::Result<Exit> {
        if let Some(exit) = self.exit.get() {
            return Ok(*exit);
        }
        self.pidfd.exited().await?;
        Ok(self.reap())
    }

    /// How it exited, if it is dead: [`Process::wait`] without waiting.
    pub fn try_wait(&self) -> std::io::Result<Option<Exit>> {
        if self.exit.get().is_none() && !self.pidfd.has_exited()? {
            return Ok(None);
        }
        Ok(Some(self.reap()))
    }

    /// Kills it, at once and ungracefully (SIGKILL). A process that is dead already is no error. It is not
    /// waited for.
    pub fn kill(&self) -> std::io::Result<()> {
        self.pidfd.kill()
    }

    /// The exit of a process that is dead.
    fn reap(&self) -> Exit {
        *self.exit.get_or_init(|| self.pidfd.reap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is left to be told of a failure, and a child that lives on is left alone by intent.
        let _ = self.try_wait();
    }
}

/// A process cannot be taken on.
#[derive(Debug, Error)]
#[error("cannot take on process {pid}")]
pub struct AdoptError {
    /// Its pid.
    pub pid: u32,
    /// Why.
    pub source: IdentifyError,
}
