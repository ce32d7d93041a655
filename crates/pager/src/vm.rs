//! The process whose memory is served, and the promise that it does not outlive its page server's attention.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a killed process may take to be gone before we stop watching; it cannot run on either way.
const GRACE: Duration = Duration::from_secs(10);

/// A VM that waits for its pages.
///
/// Dropping it kills the VM. Every way out of the page server, error and panic included, leads through
/// here, so no guest is left waiting for a page that nobody will bring. (For one that is dead already
/// that does nothing.) Only SIGKILL of the page server itself does not; whoever started it watches for that.
#[derive(Debug)]
pub(crate) struct Vm {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Vm {
    pub(crate) fn open(pid: Pid) -> Result<Vm, Errno> {
        Ok(Vm {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether all of its threads have ended.
    pub(crate) fn has_exited(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Kills it and waits until no thread of it can run any more. One that is dead already counts.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.wait(GRACE);
        Ok(())
    }

    fn wait(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Err(Errno::INTR) => {}
                polled => return polled.is_ok_and(|n| n > 0),
            }
        }
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // An error has nowhere to go from here; `serve` asks for one before it returns.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};

    fn a_process() -> (Child, Vm) {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let vm = Vm::open(Pid::from_child(&child)).unwrap();
        (child, vm)
    }

    #[test]
    fn a_panic_in_the_page_server_kills_the_vm() {
        let (mut child, vm) = a_process();
        assert!(!vm.has_exited());
        let server = std::thread::spawn(move || {
            let _vm = vm;
            panic!("on purpose");
        });
        assert!(server.join().is_err());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn killing_waits_until_the_vm_is_gone_and_may_be_repeated() {
        let (mut child, vm) = a_process();
        vm.kill().unwrap();
        assert!(vm.has_exited());
        child.wait().unwrap();
        vm.kill().unwrap();
    }
}
