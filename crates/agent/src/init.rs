//! The agent as a guest's first program: whoever has no parent any more is its child, and the guest goes down by it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::log::say;
use crate::sessions::Sessions;

/// How long programs may take to end once they got SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// From now on Ctrl-Alt-Del, which the host sends to have the guest shut down, comes here as SIGINT.
///
/// Before any other thread is started: they all are to leave the signals to the one that waits for them.
pub(crate) fn begin(sessions: &Arc<Sessions>) -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    // In no guest, or without the right to, Ctrl-Alt-Del stays what it was.
    let _ = rustix::system::reboot(RebootCommand::CadOff);
    let sessions = sessions.clone();
    thread::Builder::new().name("init".into()).spawn(move || {
        if signals.wait().is_ok() {
            shut_down(&sessions);
        }
    })?;
    Ok(())
}

/// Ends all programs, brings the disks into order and restarts the machine, which ends Firecracker. Beside another first
/// program, that one is asked to, as by Ctrl-Alt-Del.
pub(crate) fn shut_down(sessions: &Sessions) {
    if !rustix::process::getpid().is_init() {
        let _ = kill(Pid::from_raw(1), Signal::SIGINT);
        return;
    }
    let everybody = Pid::from_raw(-1);
    let _ = kill(everybody, Signal::SIGTERM);
    sessions.wait_for_none(GRACE);
    let _ = kill(everybody, Signal::SIGKILL);
    rustix::fs::sync();
    // With nothing open for writing, a file system that is written no more is whole. The layer is below the root.
    for mounted in ["/", "/run/rekindle/layer"] {
        let _ = rustix::mount::mount_remount(mounted, MountFlags::RDONLY, "");
    }
    if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
        say(format_args!(
            "rekindle-agent: cannot restart the machine: {error}"
        ));
    }
}
