//! Firecracker started in a VM's directory: serial port, log and metrics go through FIFOs that always have a
//! reader, all paths are relative.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rekindle_firecracker::model::Level;
use rekindle_firecracker::{Launch, Process, ReadyError, SpawnError};

use tokio::runtime::Handle;

use super::console::{Console, ConsoleError};
use super::dir::{API_SOCKET, LOG_FIFO, METRICS_FIFO, PAGER_SOCKET, VSOCK_SOCKET, VmDir};
use super::record::Record;
use crate::Engine;
use crate::agent::hello;
use crate::jail::{Jail, JailError};
use crate::net::{NetError, Place};

/// How the jailer begins when it gives up.
const JAILER_SAYS: &str = "Jailer error: ";

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
    /// Its jail could not be made.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Its jailer did not start it.
    #[error("the jailer cannot start firecracker (--no-jail does without it): {said}")]
    Jailer {
        /// What it said.
        said: String,
    },
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

/// Starts it in its place, in its jail if it has one, and puts it into `started`, also if something fails after that. It
/// carries the VM's id as its `--id`, so that it can be found even if nobody wrote its pid down.
pub(crate) fn start(
    engine: &Engine,
    dir: &VmDir,
    record: &Record,
    place: &Place<'_>,
    started: &mut Option<Process>,
) -> Result<(), StartError> {
    let jail = Jail::of(dir)?;
    let programs = engine.programs();
    let firecracker = Launch::new(&programs.firecracker, &record.id, dir.path());
    let mut limited = None;
    let firecracker = match &jail {
        Some(jail) => {
            let jailer = jail.jailer(dir, programs, &record.machine)?;
            let groups = jail.groups(engine.root(), dir, record)?;
            limited = Some(Arc::clone(&groups));
            firecracker.jailed(jailer, move || groups.enter())
        }
        None => {
            clear_sockets(dir)?;
            firecracker
        }
    };
    let firecracker = firecracker
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
    if let (Some(groups), Some(process)) = (limited, started) {
        groups.take(process.id().pid)?;
    }
    Ok(())
}

/// Removes what an earlier Firecracker left.
fn clear_sockets(dir: &VmDir) -> Result<(), StartError> {
    for name in [API_SOCKET, VSOCK_SOCKET] {
        let path = dir.file(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StartError::Socket { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The same failure, in the jailer's words if it was its.
pub(crate) async fn with_last_words(failure: StartError, console: &mut Console) -> StartError {
    if !matches!(failure, StartError::Ready(ReadyError::Died { .. })) {
        return failure;
    }
    // It says so where its guest's output would go.
    console.finish().await;
    let lines = console.last_output_lines(super::LOG_LINES);
    let said = lines.iter().find_map(|line| line.strip_prefix(JAILER_SAYS));
    said.map_or(failure, |said| StartError::Jailer { said: said.into() })
}

/// Firecracker removes none of its sockets.
pub(crate) fn remove_sockets(dir: &VmDir) {
    for name in [API_SOCKET, PAGER_SOCKET, VSOCK_SOCKET, &hello::socket()] {
        let _ = std::fs::remove_file(dir.file(name));
    }
}
