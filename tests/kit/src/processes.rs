//! Processes of the host that belong to a test, found by the directory that they name.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often a process is looked at, a millisecond apart, until it has a command line.
const LOOKS: u32 = 1000;

/// A process, as it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    pid: i32,
    command: String,
}

impl Process {
    /// Its id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its command line, with spaces between the arguments.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// Sends it SIGKILL and waits until it has ended.
    ///
    /// # Errors
    /// When it is not there any more, or does not end in time.
    pub fn kill(&self, within: Duration) -> anyhow::Result<()> {
        let pidfd = self.open()?;
        pidfd_send_signal(&pidfd, Signal::KILL).with_context(|| format!("kill {self}"))?;
        let ended = ends(&pidfd, within)?;
        ensure!(ended, "{self} has not ended within {within:?}");
        Ok(())
    }

    /// Waits until it has ended; says whether it has.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn ends(&self, within: Duration) -> anyhow::Result<bool> {
        match self.open() {
            Ok(pidfd) => Ok(ends(&pidfd, within)?),
            Err(_) => Ok(true),
        }
    }

    /// Fails when it is gone, also when another has its id now.
    fn open(&self) -> anyhow::Result<OwnedFd> {
        let pid = Pid::from_raw(self.pid).context("0 is no process")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        let pidfd = pidfd.with_context(|| format!("find {self}"))?;
        ensure!(
            command(&proc(self.pid))? == self.command,
            "{self} is gone, another has its id"
        );
        Ok(pidfd)
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

/// The processes, except this one, that name `directory` or a path in it by a command line argument,
/// in the environment, or as their working or root directory; also a jailed Firecracker, of which only the root directory
/// tells whose it is.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn naming(directory: &Path) -> io::Result<Vec<Process>> {
    let own = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let jails = jails_in(directory);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that ends while it is looked at is not there.
        if pid != own
            && (names(&proc(pid), directory) || is_in(&proc(pid), &jails))
            && let Some(command) = settled_command(&proc(pid))?
        {
            found.push(Process { pid, command });
        }
    }
    found.sort();
    Ok(found)
}

fn names(proc: &Path, directory: &Path) -> bool {
    let text = |file| fs::read(proc.join(file)).unwrap_or_default();
    let place = |link| fs::read_link(proc.join(link)).unwrap_or_default();
    contains(&text("cmdline"), directory)
        || contains(&text("environ"), directory)
        || place("cwd").starts_with(directory)
        || place("root").starts_with(directory)
}

/// The root directories of the jails of a VM, or of all in a state directory. Their paths are not what the kernel tells of a
/// process in them, since that one has mounts of its own.
fn jails_in(directory: &Path) -> Vec<(u64, u64)> {
    let vms = fs::read_dir(directory.join("vms")).into_iter().flatten();
    let vms = vms.flatten().map(|entry| entry.path());
    let places = vms.chain([directory.to_owned()]);
    places.filter_map(|vm| identity(&vm.join("jail"))).collect()
}

fn is_in(proc: &Path, jails: &[(u64, u64)]) -> bool {
    !jails.is_empty() && identity(&proc.join("root")).is_some_and(|root| jails.contains(&root))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let meta = path.metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Whether `text` has `directory` in it, and not just another that begins with the same letters.
fn contains(text: &[u8], directory: &Path) -> bool {
    let wanted = directory.as_os_str().as_bytes();
    text.windows(wanted.len()).enumerate().any(|(at, window)| {
        let next = text.get(at + wanted.len());
        window == wanted && next.is_none_or(|next| !next.is_ascii_alphanumeric())
    })
}

fn proc(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn command(proc: &Path) -> io::Result<String> {
    let line = fs::read(proc.join("cmdline"))?;
    let words = line.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    Ok(words.join(" ").trim_end().to_owned())
}

/// The command line of a process that has not ended. While it becomes another program, and once it has ended, there is none to read:
/// the one passes, the other is told.
fn settled_command(proc: &Path) -> io::Result<Option<String>> {
    for _ in 0..LOOKS {
        match command(proc) {
            Ok(command) if command.is_empty() => {}
            Ok(command) => return Ok(Some(command)),
            Err(_) => return Ok(None),
        }
        if has_ended(proc) {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::other(format!(
        "{} has no command line and does not end",
        proc.display()
    )))
}

/// Whether it is gone, or only waits for its parent to ask for it.
fn has_ended(proc: &Path) -> bool {
    let Ok(stat) = fs::read_to_string(proc.join("stat")) else {
        return true;
    };
    // The name before it may have anything in it, also parentheses.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_none_or(|state| state.starts_with(['Z', 'X']))
}

fn ends(pidfd: &OwnedFd, within: Duration) -> io::Result<bool> {
    let within = Timespec::try_from(within).map_err(io::Error::other)?;
    let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
    let ended = rustix::io::retry_on_intr(|| poll(&mut ready, Some(&within)))?;
    Ok(ended == 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::Duration;

    use super::{contains, naming, settled_command};
    use crate::fixture::TempRoot;

    #[test]
    fn a_directory_is_not_mistaken_for_one_with_a_longer_name() {
        let root = Path::new("/tmp/rk-1");
        assert!(contains(b"--root\0/tmp/rk-1\0ps", root));
        assert!(contains(b"A=/tmp/rk-1/vms", root));
        assert!(!contains(b"/tmp/rk-12/vms", root));
        assert!(!contains(b"/tmp/rk-", root));
    }

    #[test]
    fn a_process_is_found_by_its_working_directory_and_killed() {
        let root = TempRoot::new().unwrap();
        let mut child = Command::new("sleep")
            .arg("100")
            .current_dir(root.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let found = naming(root.path()).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].command(), "sleep 100");
        found[0].kill(Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        assert!(found[0].ends(Duration::ZERO).unwrap());
        assert_eq!(naming(root.path()).unwrap(), []);
    }

    #[test]
    fn a_process_that_ends_or_becomes_another_program_is_never_found_without_its_command_line() {
        let root = TempRoot::new().unwrap();
        let script = "exec sh -c 'exec sh -c \"exec sleep 0.01\"'";
        for _ in 0..20 {
            let mut child = Command::new("sh")
                .args(["-c", script])
                .current_dir(root.path())
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            while child.try_wait().unwrap().is_none() {
                for found in naming(root.path()).unwrap() {
                    assert_ne!(found.command(), "");
                }
            }
        }
    }

    #[test]
    fn one_that_has_ended_and_was_not_asked_for_is_not_there() {
        let mut child = Command::new("true").spawn().unwrap();
        let process = super::proc(child.id().try_into().unwrap());
        while !super::has_ended(&process) {
            thread::yield_now();
        }
        assert_eq!(settled_command(&process).unwrap(), None);
        child.wait().unwrap();
        assert_eq!(settled_command(&process).unwrap(), None);
        let own = super::proc(std::process::id().try_into().unwrap());
        assert!(settled_command(&own).unwrap().is_some());
    }
}
