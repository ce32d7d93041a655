//! Starting Firecracker.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Pid;
use thiserror::Error;

use super::{IdentifyError, Jailer, Pidfd, Process, ProcessId};
use crate::model::Level;
use crate::sys::{block_sigpipe, leave_pid_namespace};

/// A Firecracker about to be started.
///
/// It runs in a process group of its own, so that a terminal's interrupt does not reach it, and with none
/// of this process's descriptors but those given here. Its environment is empty: what is in ours, such as credentials, is
/// nothing that a guest may get at.
#[derive(Debug)]
pub struct Launch {
    program: PathBuf,
    id: String,
    directory: PathBuf,
    socket: PathBuf,
    arguments: Vec<OsString>,
    jail: Option<Jail>,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
}

#[derive(Debug)]
struct Jail {
    jailer: Jailer,
    enter: Enter,
}

struct Enter(Box<dyn FnOnce() -> io::Result<()> + Send>);

impl fmt::Debug for Enter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Enter")
    }
}

impl Launch {
    /// The Firecracker `program`, with the id `id` (`[A-Za-z0-9-]{1,64}`), in the working directory
    /// `directory`.
    ///
    /// Unless told otherwise it listens on `api.sock` in that directory, and its standard streams are
    /// `/dev/null`.
    pub fn new(
        program: impl Into<PathBuf>,
        id: impl Into<String>,
        directory: impl Into<PathBuf>,
    ) -> Launch {
        Launch {
            program: program.into(),
            id: id.into(),
            directory: directory.into(),
            socket: PathBuf::from("api.sock"),
            arguments: Vec::new(),
            jail: None,
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            stderr: Stdio::null(),
        }
    }

    /// The API socket, relative to the working directory.
    #[must_use]
    pub fn api_sock(mut self, socket: impl Into<PathBuf>) -> Launch {
        self.socket = socket.into();
        self
    }

    /// The log's file or FIFO, relative to the working directory, and how much is logged.
    #[must_use]
    pub fn log(self, path: impl AsRef<Path>, level: Level) -> Launch {
        self.arg("--log-path")
            .arg(path.as_ref())
            .arg("--level")
            .arg(level.name())
    }

    /// The metrics' file or FIFO, relative to the working directory.
    #[must_use]
    pub fn metrics(self, path: impl AsRef<Path>) -> Launch {
        self.arg("--metrics-path").arg(path.as_ref())
    }

    /// A further argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Launch {
        self.arguments.push(argument.into());
        self
    }

    /// Locked in: all its paths are relative to the jail's root then, and it is the first process of a new pid
    /// namespace, where SIGTERM does not end it. That takes root.
    ///
    /// `enter` runs first, on the thread that starts it and then ends: whatever that thread joins, such as a control
    /// group, the new process is in from its beginning.
    #[must_use]
    pub fn jailed(
        mut self,
        jailer: Jailer,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Launch {
        self.jail = Some(Jail {
            jailer,
            enter: Enter(Box::new(enter)),
        });
        self
    }

    /// Its standard input.
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Launch {
        self.stdin = stdin.into();
        self
    }

    /// Its standard output: the guest's serial console, and what Firecracker says before it has a log.
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Launch {
        self.stdout = stdout.into();
        self
    }

    /// Its standard error.
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Launch {
        self.stderr = stderr.into();
        self
    }

    /// Starts it. It is not ready yet: see [`Process::ready`].
    pub fn spawn(self) -> Result<Process, SpawnError> {
        // A relative path would be looked for in the directory that Firecracker is about to work in.
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|source| SpawnError::Start {
                program: path.to_owned(),
                source,
            })
        };
        let firecracker = absolute(&self.program)?;
        let (program, root, mut command) = match &self.jail {
            None => {
                let mut command = Command::new(&firecracker);
                command.arg("--id").arg(&self.id);
                (firecracker, self.directory.clone(), command)
            }
            Some(Jail { jailer, .. }) => {
                let program = absolute(jailer.program())?;
                let mut command = Command::new(&program);
                command.args(jailer.arguments(&firecracker, &self.id));
                (program, jailer.root(&firecracker, &self.id), command)
            }
        };
        let socket = root.join(&self.socket);
        // Firecracker removes its socket neither when it ends nor when it begins.
        if socket.symlink_metadata().is_ok() {
            return Err(SpawnError::SocketTaken { socket });
        }
        command
            .arg("--api-sock")
            .arg(&self.socket)
            .args(&self.arguments)
            .env_clear()
            .current_dir(&self.directory)
            .process_group(0)
            .stdin(self.stdin)
            .stdout(self.stdout)
            .stderr(self.stderr);
        block_sigpipe(&mut command);
        let child = match self.jail {
            Some(jail) => spawn_apart(&mut command, jail.enter),
            None => command.spawn(),
        };
        let child = child.map_err(|source| SpawnError::Start { program, source })?;
        // From here on it is a child that only this function can lose, and its pid is its own until it is
        // waited for: no check of who has the pid is needed.
        let pid = child.id();
        hold(pid, socket).inspect_err(|_| abandon(child))
    }
}

/// Starts it as the first process of a new pid namespace. A thread that has left its own cannot come back: this takes one
/// that ends.
fn spawn_apart(command: &mut Command, enter: Enter) -> io::Result<std::process::Child> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("jail".to_owned())
            .spawn_scoped(scope, || {
                (enter.0)()?;
                leave_pid_namespace()?;
                command.spawn()
            })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn hold(pid: u32, socket: PathBuf) -> Result<Process, SpawnError> {
    let id = ProcessId::of(pid).map_err(|source| SpawnError::Identify { pid, source })?;
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pidfd = raw
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
        .and_then(Pidfd::open)
        .map_err(|source| SpawnError::Hold { pid, source })?;
    Ok(Process::held(id, pidfd, socket))
}

/// Ends a child that could not be taken hold of. That may fail only if it is dead.
fn abandon(mut child: std::process::Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Firecracker could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// Something is where its API socket would be, perhaps a Firecracker's that runs or ran.
    #[error("something is at {socket:?} already")]
    SocketTaken {
        /// The path.
        socket: PathBuf,
    },
    /// The program does not start.
    #[error("cannot start {program:?}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was started, but cannot be told from other processes; it was killed.
    #[error("cannot identify the new process {pid}")]
    Identify {
        /// Its pid.
        pid: u32,
        /// Why.
        source: IdentifyError,
    },
    /// It was started, but no hold on it can be had; it was killed.
    #[error("cannot open a pidfd of the new process {pid}")]
    Hold {
        /// Its pid.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}
