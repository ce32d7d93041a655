//! What a process was started with.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a program may take to be loaded. It takes a millisecond, unless its file is on a network.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often a program that is being loaded is looked at; nothing announces it.
const LOOK: Duration = Duration::from_millis(1);

// Places in `/proc/<pid>/stat`, counted behind the name: fields 3, 9 and 49.
const STATE: usize = 0;
const FLAGS: usize = 9 - 3;
const END_OF_ARGUMENTS: usize = 49 - 3;

/// The flag of a thread of the kernel, `PF_KTHREAD`.
const KERNELS: u64 = 0x0020_0000;

/// The arguments of a process, each ended by a zero byte. Empty for one that is dead, has none, or is the kernel's.
///
/// Whoever starts a process goes on as soon as it has left the old program; it has no arguments then until the new one
/// is loaded. This waits for that, a second at the most.
pub fn arguments_of(pid: u32) -> io::Result<Vec<u8>> {
    let process = Path::new("/proc").join(pid.to_string());
    let begun = Instant::now();
    loop {
        // Asked first: what is read of a program that is loaded is true.
        let loading = is_loading(&std::fs::read(process.join("stat"))?);
        let arguments = std::fs::read(process.join("cmdline"))?;
        if !arguments.is_empty() || !loading || begun.elapsed() > PATIENCE {
            return Ok(arguments);
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a living process has not been given its arguments yet.
fn is_loading(stat: &[u8]) -> bool {
    let name_end = stat.iter().rposition(|byte| *byte == b')');
    let fields = name_end.map(|end| String::from_utf8_lossy(&stat[end + 1..]));
    let fields = fields.as_deref().unwrap_or_default();
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |place: usize| fields.get(place)?.parse::<u64>().ok();
    fields
        .get(STATE)
        .is_some_and(|state| !matches!(*state, "Z" | "X" | "x"))
        && number(FLAGS).is_some_and(|flags| flags & KERNELS == 0)
        && number(END_OF_ARGUMENTS) == Some(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_program_is_known_by_its_arguments_from_its_first_moment_on() {
        for _ in 0..50 {
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
        let id = super::super::ProcessId::of(child.id()).expect("it is there");
        while id.is_alive() {
            std::thread::yield_now();
        }
        let stat = |pid: u32| std::fs::read(format!("/proc/{pid}/stat")).expect("read");
        assert!(!is_loading(&stat(child.id())));
        assert_eq!(arguments_of(child.id()).expect("a zombie is there"), b"");
        child.wait().expect("ended");
        assert!(arguments_of(id.pid).is_err());
        // The kernel's own, where they can be seen.
        if std::fs::read("/proc/2/comm").is_ok_and(|name| name == b"kthreadd\n") {
            assert!(!is_loading(&stat(2)));
        }
        assert!(!is_loading(&stat(std::process::id())));
    }

    #[test]
    fn a_process_whose_arguments_end_nowhere_is_being_loaded() {
        let stat = |state: &str, flags: u64, end: u64| {
            let zeros = |count: usize| "0 ".repeat(count);
            let text = format!("7 (a) b) {state} {}{flags} {}{end} 0", zeros(5), zeros(39));
            is_loading(text.as_bytes())
        };
        assert!(stat("R", 0, 0));
        assert!(!stat("R", 0, 4096));
        assert!(!stat("R", KERNELS, 0));
        assert!(!stat("Z", 0, 0));
        assert!(!is_loading(b"7 (a) b) R 1"));
        assert!(!is_loading(b""));
    }
}
