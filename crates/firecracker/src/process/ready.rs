//! Knowing that Firecracker's API answers, without asking over and over.
//!
//! ```text
//!   watch the directory ── connect ──▶ yes: ready
//!            ▲                │
//!            │                ├─ nothing there yet: wait for the directory to change
//!            └────────────────┴─ there, but nobody listens yet: nothing tells, so again in a moment
//! ```
//!
//! The watch is set before the first look, so that no change falls between the two.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::readable::Readable;
use super::{Exit, Process};
use crate::client::{Client, connect};

/// Between `bind` and `listen` lie microseconds, which Firecracker needs a processor for: it is left alone
/// for so long at first, twice as long each time after, …
const SHORTEST_PAUSE: Duration = Duration::from_micros(20);

/// … and never longer than this.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

pub(super) async fn ready(process: &Process, deadline: Duration) -> Result<Client, ReadyError> {
    let until = Instant::now() + deadline;
    let socket = process.socket.as_path();
    tokio::select! {
        stream = timeout_at(until, listening(socket)) => match stream {
            Ok(Ok(stream)) => Ok(Client::connected(socket.to_owned(), stream)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ReadyError::Deadline { socket: socket.to_owned(), deadline }),
        },
        exit = process.wait() => Err(match exit {
            Ok(exit) => ReadyError::Died { exit },
            Err(source) => ReadyError::Watch { path: socket.to_owned(), source },
        }),
    }
}

/// A connection to `socket`, as soon as there can be one.
async fn listening(socket: &Path) -> Result<UnixStream, ReadyError> {
    let cannot_watch = |source| ReadyError::Watch {
        path: socket.to_owned(),
        source,
    };
    let watch = Watch::on(socket).map_err(cannot_watch)?;
    let mut length = SHORTEST_PAUSE;
    loop {
        match connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                watch.changed().await.map_err(cannot_watch)?;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                pause(length).await.map_err(cannot_watch)?;
                length = LONGEST_PAUSE.min(length * 2);
            }
            Err(source) => {
                return Err(ReadyError::Connect {
                    socket: socket.to_owned(),
                    source,
                });
            }
        }
    }
}

/// Sleeps. The runtime's own timer knows nothing shorter than a millisecond, a tenth of a whole start.
async fn pause(length: Duration) -> io::Result<()> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let zero = Timespec::default();
    let once = Itimerspec {
        it_interval: zero,
        it_value: Timespec::try_from(length).unwrap_or(zero),
    };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
    Readable::new(timer)?.wait(|_| {}).await
}

/// Tells that something appeared in a directory.
struct Watch(Option<Readable>);

impl Watch {
    /// Watches the directory that `socket` is, or will be, in.
    fn on(socket: &Path) -> io::Result<Watch> {
        let directory = match socket.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let events = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, directory, events)?;
        Ok(Watch(Some(Readable::new(inotify)?)))
    }

    /// Waits for the next change, and takes in all there are.
    async fn changed(&self) -> io::Result<()> {
        let take = |inotify: BorrowedFd<'_>| {
            let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
            let mut events = inotify::Reader::new(inotify, &mut buffer);
            while events.next().is_ok() {}
        };
        match &self.0 {
            Some(inotify) => inotify.wait(take).await,
            None => Ok(()),
        }
    }
}

impl Drop for Watch {
    /// Closing the last watch of an inotify instance takes the kernel 10 to 15 ms, as long as everything
    /// else of a start, so a thread of its own does it.
    fn drop(&mut self) {
        if let Some(inotify) = self.0.take().map(Readable::into_fd) {
            // If there can be no thread, it is closed here.
            let _ = std::thread::Builder::new().spawn(move || drop(inotify));
        }
    }
}

/// Firecracker's API does not answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadyError {
    /// Firecracker died first.
    #[error("firecracker died before its API answered: {exit}")]
    Died {
        /// How.
        exit: Exit,
    },
    /// It took too long. Firecracker runs on.
    #[error("nothing listens on {socket:?} after {deadline:?}")]
    Deadline {
        /// The API socket.
        socket: PathBuf,
        /// The time it had.
        deadline: Duration,
    },
    /// The socket is there and cannot be used.
    #[error("cannot connect to {socket:?}")]
    Connect {
        /// The API socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory or the process cannot be watched.
    #[error("cannot watch for {path:?}")]
    Watch {
        /// The API socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
