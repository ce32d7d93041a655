//! Firecracker started in a VM's directory: serial port, log and metrics go through FIFOs that always have a
//! reader, all paths are relative.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_firecracker::model::Level;
use rekindle_firecracker::{Launch, Process, ReadyError, SpawnError};

use tokio::runtime::Handle;

use super::console::{Console, ConsoleError};
use super::dir::{API_SOCKET, LOG_FIFO, METRICS_FIFO, PAGER_SOCKET, VSOCK_SOCKET, VmDir};
use crate::agent::hello;
use crate::net::{NetError, Place};

/// How long Firecracker may take until its API answers.
pub(crate) const API_PATIENCE: Duration = Duration::from_secs(10);

/// Why Firecracker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its FIFOs could not be made.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its network could not be made.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Its API never answered.
    #[error("firecracker did not get ready")]
    Ready(#[from] ReadyError),
    /// There is no descriptor left to watch it with.
    #[error("cannot watch firecracker")]
    Watch(#[source] io::Error),
    /// The guest's agent could not be listened to.
    #[error("cannot listen to the guest's agent")]
    Hello(#[source] io::Error),
    /// Something stands where one of its sockets has to be.
    #[error("cannot clear the way for {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Starts it in its place, and puts it into `started`, also if something fails after that. It carries `id` as its
/// `--id`, so that it can be found even if nobody wrote its pid down.
pub(crate) fn start(
    program: &Path,
    dir: &VmDir,
    id: &str,
    place: &Place<'_>,
    started: &mut Option<Process>,
) -> Result<(), StartError> {
    for name in [API_SOCKET, VSOCK_SOCKET] {
        let path = dir.file(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StartError::Socket { path, source });
            }
            _ => {}
        }
    }
    let firecracker = Launch::new(program, id, dir.path())
        .api_sock(API_SOCKET)
        // At its own default level each call is two lines, which wake us while the guest wants the processor.
        .log(LOG_FIFO, Level::Warning)
        .metrics(METRICS_FIFO)
        .stdin(Console::guest_input(dir)?)
        .stdout(Console::guest_output(dir)?)
        .stderr(Console::guest_output(dir)?);
    // Another thread may start it, which knows of no runtime.
    let runtime = Handle::current();
    place.run(|| {
        let _on = runtime.enter();
        *started = Some(firecracker.spawn()?);
        Ok::<(), SpawnError>(())
    })??;
    Ok(())
}

/// Firecracker removes none of its sockets.
pub(crate) fn remove_sockets(dir: &VmDir) {
    for name in [API_SOCKET, PAGER_SOCKET, VSOCK_SOCKET, &hello::socket()] {
        let _ = std::fs::remove_file(dir.file(name));
    }
}
