//! A hold on a process that cannot slip to another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::Exit;
use super::readable::Readable;

/// How often a process is looked at that cannot be watched.
const LOOK: std::time::Duration = std::time::Duration::from_millis(10);

/// A descriptor of a process, a child or not.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Of whoever has this pid now; the caller knows, or finds out, who that is.
    pub(super) fn open(pid: Pid) -> io::Result<Pidfd> {
        Ok(Pidfd(rustix::process::pidfd_open(
            pid,
            PidfdFlags::empty(),
        )?))
    }

    /// Another descriptor of the same process.
    pub fn try_clone(&self) -> io::Result<Pidfd> {
        Ok(Pidfd(self.0.try_clone()?))
    }

    /// Sends SIGKILL. A process that is dead already is no error.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends SIGTERM, on which Firecracker ends at once unless it is pid 1 of its own namespace. A process
    /// that is dead already is no error.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.0, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process is dead; it is not reaped. Any number may wait at once, and each may be
    /// cancelled.
    ///
    /// A caller without a descriptor to spare is not told of a death that did not happen: the process is looked at
    /// every so often until it can be watched.
    pub async fn exited(&self) -> io::Result<()> {
        loop {
            match self.watched() {
                Ok(readable) => return readable.wait(|_| {}).await,
                Err(error) if is_shortage(&error) => {}
                Err(error) => return Err(error),
            }
            // With no descriptor allowed at all, `poll` fails too, and nothing is known.
            if self.has_exited().unwrap_or(false) {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn watched(&self) -> io::Result<Readable> {
        Readable::new(self.0.try_clone()?)
    }

    /// Whether the process is dead.
    pub fn has_exited(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        Ok(rustix::event::poll(&mut fds, Some(&now))? > 0)
    }

    /// Reaps a dead child and says how it exited. Of a process that is not a child, or that was reaped
    /// already, nothing is known.
    pub(super) fn reap(&self) -> Exit {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        loop {
            match rustix::process::waitid(WaitId::PidFd(self.0.as_fd()), options) {
                Err(Errno::INTR) => {}
                Ok(Some(status)) => return Exit::of(&status),
                Ok(None) | Err(_) => return Exit::Unknown,
            }
        }
    }
}

/// Whether there may be enough of what is missing a little later.
fn is_shortage(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    // A limit below the lowest number that may be given out makes a duplicate an invalid argument.
    matches!(
        errno,
        Some(
            Errno::MFILE
                | Errno::NFILE
                | Errno::NOMEM
                | Errno::NOBUFS
                | Errno::NOSPC
                | Errno::INVAL
        )
    )
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Pidfd> for OwnedFd {
    fn from(pidfd: Pidfd) -> OwnedFd {
        pidfd.0
    }
}
