//! The only unsafe code of the agent: what a child does between its fork and its exec.
//!
//! Safety model:
//! 1. Between fork and exec only the forking thread exists, and locks that others held stay held for ever. So the
//!    closure makes system calls and nothing else: it takes no lock and allocates nothing; what it needs was made before.
//! 2. A signal is given its default disposition, which refers to no memory, and nobody's handler is lost: the agent has
//!    none.
//! 3. The descriptor that it uses is one of the child's own, put there by the standard library before the closure runs.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use rustix::process::{Gid, Uid};

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// Makes a program the leader of a session of its own, on the terminal that is its standard input if there is one, and
/// gives it its identity.
pub(crate) fn lead(command: &mut Command, on_terminal: bool, identity: Option<Identity>) {
    let before_exec = move || -> io::Result<()> {
        // What the agent keeps for itself where it is the guest's first program.
        SigSet::empty().thread_set_mask()?;
        // A shell that starts the agent in the background has it ignore some of them, and Ctrl-C with them.
        for kind in Signal::iterator() {
            // SAFETY: 2.
            let _ = unsafe { signal(kind, SigHandler::SigDfl) };
        }
        rustix::process::setsid()?;
        if on_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if let Some(Identity { uid, gid, groups }) = &identity {
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        Ok(())
    };
    // SAFETY: 1, 3: it makes system calls with what is on its stack and in `identity`; an error is a number.
    unsafe { command.pre_exec(before_exec) };
}
