//! What about a new process the standard library does not do: its signal mask, and its pid namespace.
//!
//! # Safety model
//!
//! 1. What runs between `fork` and `exec` calls only async-signal-safe functions (POSIX: `sigemptyset`, `sigaddset`,
//!    `pthread_sigmask`), allocates nothing and touches no lock, so that it may run in the child of a process with
//!    many threads.
//! 2. A `sigset_t` is read only after `sigemptyset` has initialised it.
//! 3. `unshare` is given `CLONE_NEWPID` and nothing else. It changes to which namespace the calling thread's later
//!    children belong; no memory and no descriptor of any thread depends on that.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the child begin with SIGPIPE blocked.
///
/// Firecracker (seen: 1.12.1) dies of SIGPIPE when a client hangs up before it is answered: the signal's handler
/// needs a system call that its own filter forbids. With the signal blocked, the write fails with EPIPE, which it
/// handles. A killed manager then costs no guest.
pub(crate) fn block_sigpipe(command: &mut Command) {
    // SAFETY: rule 1, see `block`.
    unsafe {
        command.pre_exec(block);
    }
}

/// Lets the processes that the calling thread starts from now on be in a pid namespace of their own, of which the first
/// is process 1.
pub(crate) fn leave_pid_namespace() -> io::Result<()> {
    // SAFETY: rule 3.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }?;
    Ok(())
}

fn block() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: rule 2: the pointer is valid for writing a set.
    if unsafe { libc::sigemptyset(set.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: rule 2: the set is initialised by now.
    if unsafe { libc::sigaddset(set.as_mut_ptr(), libc::SIGPIPE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: rule 2: the set is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_begins_with_sigpipe_blocked() {
        let mut command = Command::new("grep");
        command.args(["SigBlk", "/proc/self/status"]);
        block_sigpipe(&mut command);
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let mask = said.split_whitespace().last().unwrap();
        let mask = u64::from_str_radix(mask, 16).unwrap();
        assert_eq!(mask >> (libc::SIGPIPE - 1) & 1, 1, "{said}");
    }
}
