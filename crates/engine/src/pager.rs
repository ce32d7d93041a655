//! The page server's process, as a VM's owner sees it.
//!
//! The owner binds the socket and hands it over as standard input, so Firecracker can connect before the page
//! server has started: the two start side by side. Whoever waits for Firecracker meanwhile also watches
//! this process, since a page server that dies unseen leaves the guest waiting for ever.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rekindle_firecracker::{IdentifyError, Pidfd, ProcessId};
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use crate::vm::dir::{PAGER_LOG, PAGER_SOCKET, PAGER_STATE, PAGER_STATS, VmDir};

/// How many lines of the page server's errors are told when it dies.
const LAST_WORDS: usize = 4;

/// Why the page server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Its socket could not be made.
    #[error("cannot make the page server's socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no room for what it keeps.
    #[error("no room for the page server's state in {path}")]
    Room {
        /// The VM's directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not be started.
    #[error("cannot start the page server {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It was gone before it could be watched.
    #[error("the page server ended at once")]
    Gone {
        /// Why it cannot be watched.
        #[source]
        source: IdentifyError,
    },
}

/// What a page server uses beside the memory to be faster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hints<'a> {
    /// The working set to bring before the guest asks; there may be no such file.
    pub(crate) replay: Option<&'a Path>,
    /// The working set to add to.
    pub(crate) record: Option<&'a Path>,
}

impl Hints<'_> {
    fn args(self) -> impl Iterator<Item = OsString> {
        let options = [("--replay", self.replay), ("--record", self.record)];
        let given = options.map(|(option, path)| Some([option.into(), path?.into()]));
        given.into_iter().flatten().flatten()
    }
}

/// A running page server.
#[derive(Debug)]
pub(crate) struct PagerProcess {
    id: ProcessId,
    pidfd: Pidfd,
    child: Option<Child>,
}

impl PagerProcess {
    /// Starts one in the VM's directory, for the memory of the snapshot in `snapshot`.
    pub(crate) fn start(
        program: &Path,
        dir: &VmDir,
        vm_id: &str,
        snapshot: &Path,
        hints: Hints<'_>,
    ) -> Result<PagerProcess, PagerError> {
        check_room(dir)?;
        let listener = bind(dir)?;
        let spawn = |source| PagerError::Spawn {
            program: program.into(),
            source,
        };
        let log = log_file(dir).map_err(spawn)?;
        let mut child = Command::new(program)
            .arg("pager")
            .args(["--socket", PAGER_SOCKET, "--inherited"])
            .arg("--snapshot")
            .arg(snapshot)
            .args(["--stats", PAGER_STATS, "--state", PAGER_STATE])
            .args(["--id", vm_id])
            .args(hints.args())
            .current_dir(dir.path())
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .spawn()
            .map_err(spawn)?;
        let held = ProcessId::of(child.id()).and_then(|id| Ok((id.open_pidfd()?, id)));
        match held {
            Ok((pidfd, id)) => Ok(PagerProcess {
                id,
                pidfd,
                child: Some(child),
            }),
            Err(source) => {
                // It would wait for a Firecracker that never comes.
                let _ = child.kill();
                let _ = child.wait();
                Err(PagerError::Gone { source })
            }
        }
    }

    /// Watches one that another process started.
    pub(crate) fn adopt(id: ProcessId) -> Result<PagerProcess, IdentifyError> {
        let pidfd = id.open_pidfd()?;
        Ok(PagerProcess {
            id,
            pidfd,
            child: None,
        })
    }

    pub(crate) fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Waits until it has ended. May be dropped and called again.
    pub(crate) async fn exited(&self) {
        // A pidfd that cannot be watched is taken for a death: the guest must not wait for it.
        let _ = self.pidfd.exited().await;
    }

    /// Ends it. Only after Firecracker has ended.
    pub(crate) fn kill(&self) {
        let _ = self.pidfd.kill();
    }

    /// Whether it has ended with a failure, as far as this process can know: it is its parent.
    pub(crate) fn has_failed(&mut self) -> bool {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        status.is_some_and(|status| status.code().is_some_and(|code| code != 0))
    }

    /// How it ended, once it has: its exit status where this process is its parent, and its last words.
    pub(crate) fn epitaph(&mut self, dir: &VmDir) -> String {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        let status = status.map_or_else(|| "exit status unknown".to_owned(), |s| s.to_string());
        let log = std::fs::read_to_string(dir.file(PAGER_LOG)).unwrap_or_default();
        let words: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = &words[words.len().saturating_sub(LAST_WORDS)..];
        if last.is_empty() {
            status
        } else {
            format!("{status}; {}", last.join("; "))
        }
    }

    /// Why it killed the VM, from its stats file, if it did.
    pub(crate) fn kill_reason(&self, dir: &VmDir) -> Option<String> {
        let text = std::fs::read(dir.file(PAGER_STATS)).ok()?;
        let stats: Left = serde_json::from_slice(&text).ok()?;
        (stats.ended.how == "vm_killed").then(|| stats.ended.reason.to_string())
    }

    /// Collects its exit status if it has ended, so that no zombie stays.
    pub(crate) fn reap(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

/// The part of the page server's stats that tells why it ended.
#[derive(Deserialize)]
struct Left {
    ended: Ended,
}

#[derive(Deserialize)]
struct Ended {
    how: String,
    #[serde(default)]
    reason: serde_json::Value,
}

/// Whether its state and its log have room. On a full disk it could not even say why it fails.
fn check_room(dir: &VmDir) -> Result<(), PagerError> {
    /// State and log of a VM of 8 GiB.
    const ROOM: u64 = 2 << 20;
    let path = dir.file("room");
    let try_it = || -> io::Result<()> {
        let file = File::create(&path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, ROOM)?;
        Ok(())
    };
    let room = try_it();
    let _ = std::fs::remove_file(&path);
    room.map_err(|source| PagerError::Room {
        path: dir.path().into(),
        source,
    })
}

fn bind(dir: &VmDir) -> Result<UnixListener, PagerError> {
    let path = dir.file(PAGER_SOCKET);
    let socket = |source| PagerError::Socket {
        path: path.clone(),
        source,
    };
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(socket(e)),
        _ => {}
    }
    let folder = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| socket(e.into()))?;
    // A socket path holds 107 bytes; the way through the descriptor is always short.
    UnixListener::bind(through(&folder, PAGER_SOCKET)).map_err(socket)
}

/// A path to `name` in an open directory that is short whatever the directory's own path is.
pub(crate) fn through(folder: impl AsFd, name: &str) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!(
        "/proc/self/fd/{}/{name}",
        folder.as_fd().as_raw_fd()
    ))
}

fn log_file(dir: &VmDir) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(dir.file(PAGER_LOG))
}
