//! The process whose memory is served, and the promise that it does not outlive its page server's attention.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// How long a killed process may take to be gone before we stop watching; it cannot run on either way.
const GRACE: Duration = Duration::from_secs(10);

/// The VM's process, told from every other that had or will have its pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmIdentity {
    pub(crate) pid: i32,
    /// In clock ticks since the host booted.
    pub(crate) start_time: u64,
    pub(crate) boot_id: String,
}

impl VmIdentity {
    /// Of the process that has this pid now.
    pub(crate) fn of(pid: Pid) -> io::Result<VmIdentity> {
        let pid = pid.as_raw_pid();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, second and in brackets, may hold anything; the start time is the 22nd field.
        let start_time = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok());
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(VmIdentity {
            pid,
            start_time: start_time.ok_or(io::ErrorKind::InvalidData)?,
            boot_id: boot_id.trim().to_owned(),
        })
    }
}

/// What happens to a VM whose page server lets go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnDrop {
    /// It is killed.
    Kill,
    /// It waits: somebody watches, and starts another page server.
    Wait,
}

/// A VM that waits for its pages.
///
/// Dropping it kills the VM. Every way out of the page server, error and panic included, leads through
/// here, so no guest is left waiting for a page that nobody will bring. (For one that is dead already
/// that does nothing.) Only SIGKILL of the page server itself does not; whoever started it watches for that.
/// Where somebody does, a panic may leave the VM to the next page server as well: [`OnDrop::Wait`].
#[derive(Debug)]
pub(crate) struct Vm {
    pid: Pid,
    pidfd: OwnedFd,
    on_drop: OnDrop,
}

impl Vm {
    pub(crate) fn open(pid: Pid) -> Result<Vm, Errno> {
        Ok(Vm {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
            on_drop: OnDrop::Kill,
        })
    }

    pub(crate) fn on_drop(&mut self, on_drop: OnDrop) {
        self.on_drop = on_drop;
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
        if self.on_drop == OnDrop::Kill {
            // An error has nowhere to go from here; `serve` asks for one before it returns.
            let _ = self.kill();
        }
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
    fn a_process_is_known_by_more_than_its_pid() {
        let (child, _vm) = a_process();
        let identity = VmIdentity::of(Pid::from_child(&child)).unwrap();
        let me = VmIdentity::of(rustix::process::getpid()).unwrap();
        assert!(me.start_time <= identity.start_time, "{me:?} {identity:?}");
        assert_eq!(me.boot_id.len(), 36);
    }

    #[test]
    fn a_vm_that_is_left_to_the_next_page_server_lives() {
        let (mut child, mut vm) = a_process();
        vm.on_drop(OnDrop::Wait);
        drop(vm);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
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
