//! What a process was started with.

use std::io;
use std::time::{Duration, Instant};

use super::identity::{Stat, Uptime};

/// How long a program may take to be loaded. It takes a millisecond, unless its file is on a network.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a program that is being loaded is looked at; nothing announces it.
const LOOK: Duration = Duration::from_millis(1);

/// The arguments of a process, each ended by a zero byte. Empty for one that is dead, has none, or is the kernel's.
///
/// Whoever starts a process goes on as soon as it leaves the old program: for a moment it still shows that one's
/// arguments, and then none until the new program is loaded. This waits for both, a second at the most.
pub fn arguments_of(pid: u32) -> io::Result<Vec<u8>> {
    let line = format!("/proc/{pid}/cmdline");
    let begun = Instant::now();
    loop {
        // Before its arguments, which are then no older.
        let stat = Stat::of(pid);
        let arguments = std::fs::read(&line)?;
        let waits = stat.is_ok_and(|stat| {
            arguments.is_empty() && stat.is_loading()
                || stat.was_forked_since(Uptime::before_now(PATIENCE))
        });
        if !waits || begun.elapsed() > PATIENCE {
            return Ok(arguments);
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ProcessId;
    use std::process::Command;

    #[test]
    fn a_program_is_known_by_its_arguments_from_its_first_moment_on() {
        for _ in 0..500 {
            let mut child = Command::new("/bin/sleep")
                .arg("60")
                .spawn()
                .expect("started");
            let arguments = arguments_of(child.id());
            child.kill().expect("killed");
            child.wait().expect("ended");
            assert_eq!(arguments.expect("read"), b"/bin/sleep\x0060\x00");
        }
    }

    #[test]
    fn who_is_dead_or_the_kernels_is_not_waited_for() {
        let mut child = Command::new("/bin/true").spawn().expect("started");
        let id = ProcessId::of(child.id()).expect("it is there");
        while id.is_alive() {
            std::thread::yield_now();
        }
        let is_loading = |pid| Stat::of(pid).expect("read").is_loading();
        assert!(!is_loading(child.id()));
        assert_eq!(arguments_of(child.id()).expect("a zombie is there"), b"");
        child.wait().expect("ended");
        assert!(arguments_of(id.pid).is_err());
        // The kernel's own, where they can be seen.
        if std::fs::read("/proc/2/comm").is_ok_and(|name| name == b"kthreadd\n") {
            assert!(!is_loading(2));
        }
        assert!(!is_loading(std::process::id()));
    }
}
