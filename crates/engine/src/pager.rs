//! The page server's process, as a VM's owner sees it.
//!
//! The owner binds the socket and hands it over as standard input, so Firecracker can connect before the page
//! server has started: the two start side by side. A successor gets the userfaultfd itself that way, which its
//! owner took from Firecracker, and so needs no right of its own. That somebody watches this process, since one that dies
//! unseen leaves the guest waiting for ever, is the matter of `vm::relay`.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use rekindle_firecracker::{IdentifyError, Pidfd, ProcessId};
use rekindle_pager::{Ended, Live, PackedSource, Prefetch, StateError};
use rekindle_store::causes::with_causes;
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;

use crate::jail::{self, JailError};
use crate::vm::dir::{
    OUTLINE, PAGER_LOG, PAGER_PLAN, PAGER_SOCKET, PAGER_STATE, PAGER_STATS, PAGER_TOUCHED, VmDir,
};

/// How many lines of the page server's errors are told when it dies.
const LAST_WORDS: usize = 4;
/// How much of them is looked at, in bytes.
const LONGEST_WORDS: u64 = 64 << 10;
/// The exit status of a program of ours that has said why it cannot go on. A panic has another.
const FAILED: i32 = 1;

/// Why the page server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Its socket cannot be put into the VM's jail.
    #[error(transparent)]
    Jail(#[from] JailError),
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
    /// What an earlier one left cannot be removed.
    #[error("cannot remove {path}, which an earlier page server left")]
    Leftover {
        /// The file.
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

/// What a page server fills a guest's memory from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Memory<'a> {
    /// The snapshot in this directory of the store.
    Snapshot(&'a Path),
    /// Chunks of a repository.
    Packed(&'a PackedSource),
}

impl Memory<'_> {
    fn args(self) -> Vec<OsString> {
        match self {
            Memory::Snapshot(dir) => vec!["--snapshot".into(), dir.into()],
            Memory::Packed(source) => {
                let mut args: Vec<OsString> = vec![
                    "--packed".into(),
                    (&source.outline).into(),
                    "--from".into(),
                    (&source.place).into(),
                    "--patience".into(),
                    format!("{}s", source.patience.as_secs().max(1)).into(),
                    "--cache".into(),
                    (source.cache_bytes >> 20).to_string().into(),
                ];
                if let Some(root) = &source.root {
                    args.extend(["--cache-of".into(), root.into()]);
                }
                if source.prefetch == Prefetch::All {
                    args.extend(["--prefetch".into(), "all".into()]);
                }
                args
            }
        }
    }
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

/// A page server.
#[derive(Debug)]
pub(crate) struct PagerProcess {
    id: ProcessId,
    pidfd: Arc<Pidfd>,
    child: Option<Child>,
    /// Closed at its other end when what was touched is there to be collected, at the latest when it has ended.
    sign: Option<OwnedFd>,
    /// How much others had said in the log before.
    log_from: u64,
}

/// How a page server ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Epitaph {
    /// In words: its exit status, and what it said last.
    pub(crate) words: String,
    /// Whether it ended on its own account, with a reason, and so would again.
    pub(crate) gave_up: bool,
}

impl PagerProcess {
    /// Starts one in the VM's directory.
    pub(crate) fn start(
        program: &Path,
        dir: &VmDir,
        vm_id: &str,
        memory: Memory<'_>,
        hints: Hints<'_>,
    ) -> Result<PagerProcess, PagerError> {
        check_room(dir)?;
        clear(dir)?;
        let listener = bind(dir)?;
        let mut command = Command::new(program);
        command
            .arg("pager")
            .args(["--socket", PAGER_SOCKET, "--inherited"])
            .args(memory.args())
            .args(["--stats", PAGER_STATS])
            .args(hints.args());
        spawn(command, dir, vm_id, listener.into())
    }

    /// Starts one that goes on where another one died, with the userfaultfd of the VM's process.
    pub(crate) fn succeed(
        program: &Path,
        dir: &VmDir,
        vm_id: &str,
        vm: &ProcessId,
        userfaultfd: OwnedFd,
    ) -> Result<PagerProcess, PagerError> {
        let mut command = Command::new(program);
        command
            .arg("pager")
            .args(["--adopt", &vm.pid.to_string(), "--inherited"]);
        spawn(command, dir, vm_id, userfaultfd)
    }

    /// Watches one that another process started.
    pub(crate) fn adopt(dir: &VmDir, id: ProcessId) -> Result<PagerProcess, IdentifyError> {
        let pidfd = Arc::new(id.open_pidfd()?);
        let log = std::fs::metadata(dir.file(PAGER_LOG));
        Ok(PagerProcess {
            id,
            pidfd,
            child: None,
            sign: None,
            log_from: log.map_or(0, |log| log.len()),
        })
    }

    pub(crate) fn id(&self) -> &ProcessId {
        &self.id
    }

    /// The hold on it.
    pub(crate) fn pidfd(&self) -> Arc<Pidfd> {
        self.pidfd.clone()
    }

    /// What tells when there is something to be collected, the first time that it is asked for, from one that was started
    /// here.
    pub(crate) fn take_sign(&mut self) -> Option<OwnedFd> {
        self.sign.take()
    }

    /// Ends it.
    pub(crate) fn kill(&self) {
        let _ = self.pidfd.kill();
    }

    /// How it ended, once it has: its exit status where this process is its parent, and its last words.
    pub(crate) fn epitaph(&mut self, dir: &VmDir) -> Epitaph {
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        let log = said_since(dir, self.log_from);
        let words: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = &words[words.len().saturating_sub(LAST_WORDS)..];
        let mut words = status.map_or_else(|| "exit status unknown".to_owned(), |s| s.to_string());
        if !last.is_empty() {
            words = format!("{words}; {}", last.join("; "));
        }
        Epitaph {
            words,
            gave_up: status.and_then(|status: ExitStatus| status.code()) == Some(FAILED),
        }
    }

    /// Collects its exit status once it has ended, so that no zombie stays.
    pub(crate) fn reap(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }
}

/// Why the page server of a VM killed it, from its stats file, if it did.
pub(crate) fn kill_reason(dir: &VmDir) -> Option<String> {
    let text = std::fs::read(dir.file(PAGER_STATS)).ok()?;
    let left: Left = serde_json::from_slice(&text).ok()?;
    let ended = left.ended?;
    match serde_json::from_value(ended.clone()) {
        Ok(Ended::VmExited) => None,
        Ok(Ended::VmKilled { reason }) => Some(reason.to_string()),
        // Another version's, in its own words.
        Err(_) => Some(ended.to_string()),
    }
}

/// Whether a page server of this VM has had its handshake: from then on another one can take its place.
pub(crate) fn has_state(dir: &VmDir) -> bool {
    match Live::open(&dir.file(PAGER_STATE)) {
        Err(StateError::Io { source, .. }) => source.kind() != io::ErrorKind::NotFound,
        _ => true,
    }
}

/// Does what a page server has no right to: records what was touched, and writes down what it did. Waits for files. What
/// cannot be done is noted, and stops nothing.
pub(crate) fn collect(dir: &VmDir) {
    if let Err(error) = rekindle_pager::collect(&dir.file(PAGER_STATE)) {
        note(dir, &with_causes(&error));
    }
}

/// Writes a line into the page servers' log. A log that cannot be written stops nothing.
pub(crate) fn note(dir: &VmDir, line: &str) {
    let _ = log_file(dir).and_then(|mut log| log.write_all(format!("{line}\n").as_bytes()));
}

/// Removes what page servers of an earlier start left: a state that is there is a handshake that was had.
fn clear(dir: &VmDir) -> Result<(), PagerError> {
    for name in [PAGER_STATE, PAGER_PLAN, PAGER_TOUCHED, PAGER_STATS] {
        let path = dir.file(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(PagerError::Leftover { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn spawn(
    mut command: Command,
    dir: &VmDir,
    vm_id: &str,
    stdin: OwnedFd,
) -> Result<PagerProcess, PagerError> {
    let program = PathBuf::from(command.get_program());
    let spawn = |source| PagerError::Spawn {
        program: program.clone(),
        source,
    };
    let log = log_file(dir).map_err(spawn)?;
    let log_from = log.metadata().map_err(spawn)?.len();
    // Who fetches needs to know where, and credentials; who does not has nothing of ours.
    if !dir.file(OUTLINE).exists() {
        command.env_clear();
    }
    let mut child = command
        .args(["--state", PAGER_STATE, "--supervised", "--id", vm_id])
        .current_dir(dir.path())
        .process_group(0)
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(spawn)?;
    let held = ProcessId::of(child.id()).and_then(|id| Ok((id.open_pidfd()?, id)));
    match held {
        Ok((pidfd, id)) => Ok(PagerProcess {
            id,
            pidfd: Arc::new(pidfd),
            sign: child.stdout.take().map(OwnedFd::from),
            child: Some(child),
            log_from,
        }),
        Err(source) => {
            // It would wait for a Firecracker that never comes.
            let _ = child.kill();
            let _ = child.wait();
            Err(PagerError::Gone { source })
        }
    }
}

fn said_since(dir: &VmDir, from: u64) -> String {
    let mut said = Vec::new();
    let read = File::open(dir.file(PAGER_LOG)).and_then(|mut log| {
        let end = log.metadata()?.len();
        log.seek(SeekFrom::Start(from.max(end.saturating_sub(LONGEST_WORDS))))?;
        log.take(LONGEST_WORDS).read_to_end(&mut said)
    });
    read.map_or_else(
        |_| String::new(),
        |_| String::from_utf8_lossy(&said).into_owned(),
    )
}

/// The part of the page server's stats that tells why it ended.
#[derive(Deserialize)]
struct Left {
    ended: Option<serde_json::Value>,
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
    let listener = UnixListener::bind(through(&folder, PAGER_SOCKET)).map_err(socket)?;
    jail::give(dir, PAGER_SOCKET)?;
    Ok(listener)
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
