//! Whether the lab still lives.
//!
//! ```text
//!   lab-init.sh ── every 5 s ──▶ `pulse`, in the directory of the run ── its time ──▶ here
//!   a kernel that has gone quiet ◀── a key ──────────┐
//!   one that stands still ◀── `info registers`, `nmi` ┴ qemu's monitor ◀─────────── here
//! ```
//!
//! QEMU forgets an interrupt now and then (seen with 7.2; we think that its emulation of SVM changes the set of pending ones
//! without the lock that devices take). If that was the timer's, the processor sleeps for ever, with the interrupt pending
//! in its APIC: seen as `HLT=1` and `IRR 236`. Any other interrupt makes it look again, so a quiet lab gets a key.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// qemu's monitor; it is started in the directory of the run.
pub(super) const MONITOR: &str = "unix:monitor,server=on,wait=off";
/// Its socket there.
const SOCKET: &str = "monitor";
/// When it has missed two signs or more.
const QUIET: Duration = Duration::from_secs(12);
/// A key that types nothing.
const KEY: &str = "sendkey shift\n";
/// Much longer than the lab takes for a turn of each process, on the busiest machine.
const STILL: Duration = Duration::from_secs(180);
/// How long the monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(1);

/// When the lab last gave a sign of life.
pub(super) struct Pulse {
    run: PathBuf,
    seen: Option<SystemTime>,
    since: Instant,
}

impl Pulse {
    /// The lab's that was just started with this directory for its run.
    pub(super) fn of(run: &Path) -> Pulse {
        Pulse {
            run: run.to_owned(),
            seen: None,
            since: Instant::now(),
        }
    }

    /// Whether it has given no sign for so long that none will come. Wakes it up when it has been quiet for a while.
    pub(super) fn stands_still(&mut self) -> bool {
        let now = fs::metadata(self.run.join("pulse")).and_then(|m| m.modified());
        if now.as_ref().ok() != self.seen.as_ref() {
            self.seen = now.ok();
            self.since = Instant::now();
        }
        let silence = self.since.elapsed();
        if silence > QUIET {
            // If it cannot be woken up so, it is found out later.
            let _ = ask(&self.run.join(SOCKET), KEY);
        }
        silence > STILL
    }

    /// What its CPU was doing, for an error; its kernel is told to end with a trace of its own.
    pub(super) fn ask_why(&self) -> String {
        let said = ask(&self.run.join(SOCKET), "info registers\ninfo lapic\nnmi\n");
        let said = said.unwrap_or_else(|e| format!("qemu's monitor does not answer: {e}"));
        // Without its echo, and without registers that no kernel's own code uses.
        let is_noise = |line: &&str| {
            ["(qemu)", "FPR", "YMM", "XMM"]
                .iter()
                .any(|n| line.starts_with(n))
        };
        let lines: Vec<&str> = said.lines().filter(|line| !is_noise(line)).collect();
        format!(
            "\nit gave no sign of life for {STILL:?}\n{}",
            lines.join("\n")
        )
    }
}

/// What qemu's monitor answers to some lines. It forgets what it has not read when the connection ends.
fn ask(socket: &Path, lines: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(lines.as_bytes())?;
    let mut said = Vec::new();
    // It does not close the connection; the time ends it.
    match stream.read_to_end(&mut said) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(String::from_utf8_lossy(&said).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_stands_still_when_its_pulse_has_not_changed_for_long() {
        let run = tempfile::tempdir().unwrap();
        let mut pulse = Pulse::of(run.path());
        assert!(!pulse.stands_still());
        pulse.since = Instant::now() - STILL * 2;
        assert!(pulse.stands_still(), "it never had one");
        fs::write(run.path().join("pulse"), "").unwrap();
        assert!(!pulse.stands_still(), "it has one now");
        pulse.since = Instant::now() - STILL * 2;
        assert!(pulse.stands_still(), "the same as before");
    }
}
