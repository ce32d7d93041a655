//! The agent as a guest's first program: whoever has no parent any more is its child, and the guest goes down by it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

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

/// Ends all programs, brings the disks into order and restarts the machine, which ends Firecracker.
pub(crate) fn shut_down(sessions: &Sessions) {
    tell_all(rustix::process::Signal::TERM);
    sessions.wait_for_none(GRACE);
    tell_all(rustix::process::Signal::KILL);
    rustix::fs::sync();
    // With nothing open for writing, a file system that is written no more is whole.
    let _ = rustix::mount::mount_remount("/", MountFlags::RDONLY, "");
    if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
        eprintln!("rekindle-agent: cannot restart the machine: {error}");
    }
}

/// All but the first program, which is us.
fn tell_all(signal: rustix::process::Signal) {
    if rustix::process::getpid().is_init() {
        let everybody = nix::unistd::Pid::from_raw(-1);
        let signal = Signal::try_from(signal.as_raw()).ok();
        let _ = nix::sys::signal::kill(everybody, signal);
    }
}
