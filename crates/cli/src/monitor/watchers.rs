//! The keeper and the monitor of a VM as processes, found by their arguments: also before they wrote anything down.

use std::path::Path;

use anyhow::{Context, Result};
use rekindle_engine::store::{Root, VmName};
use rekindle_firecracker::{ProcessId, arguments_of};
use rustix::event::{PollFd, PollFlags, Timespec};

/// How long a process that got SIGKILL may take to be gone.
const PATIENCE: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// A new one can appear while the others are ended, started by one of them; not often.
const ROUNDS: usize = 8;

/// The keepers of a VM, then its monitors.
pub(crate) fn watchers(root: &Root, name: &VmName) -> Result<Vec<ProcessId>> {
    let mut keepers = Vec::new();
    let mut monitors = Vec::new();
    for entry in std::fs::read_dir("/proc").context("cannot list the processes")? {
        let entry = entry.context("cannot list the processes")?;
        let name_of_entry = entry.file_name();
        let Some(pid) = name_of_entry.to_str().and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        // One that ended meanwhile is none.
        let Ok(line) = arguments_of(pid) else {
            continue;
        };
        let Some(role) = role(&line, root.path(), name) else {
            continue;
        };
        let Ok(process) = ProcessId::of(pid) else {
            continue;
        };
        match role {
            Role::Keeper => keepers.push(process),
            Role::Monitor => monitors.push(process),
        }
    }
    keepers.append(&mut monitors);
    Ok(keepers)
}

/// What a keeper and a monitor may still do before they are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// Nothing.
    None,
    /// Answer whoever asked last, now that the VM has ended, and end by themselves.
    Answers,
}

/// Ends the keeper of a VM and its monitor, the keeper first, so that it starts no other.
pub(crate) fn end_watchers(root: &Root, name: &VmName, farewell: Farewell) -> Result<()> {
    for _ in 0..ROUNDS {
        let found = watchers(root, name)?;
        if found.is_empty() {
            return Ok(());
        }
        for process in found {
            let Ok(pidfd) = process.open_pidfd() else {
                continue;
            };
            if farewell == Farewell::Answers {
                let mut gone = [PollFd::new(&pidfd, PollFlags::IN)];
                let _ = rustix::event::poll(&mut gone, Some(&PATIENCE));
            }
            pidfd.kill().context("cannot end the monitor")?;
            let mut gone = [PollFd::new(&pidfd, PollFlags::IN)];
            let _ = rustix::event::poll(&mut gone, Some(&PATIENCE));
        }
    }
    anyhow::bail!("the monitor of {name} is started again and again")
}

#[derive(Debug, PartialEq, Eq)]
enum Role {
    Keeper,
    Monitor,
}

fn role(line: &[u8], root: &Path, name: &VmName) -> Option<Role> {
    use std::os::unix::ffi::OsStrExt;
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    if words.get(1) != Some(&&b"monitor"[..]) || words.get(2) != Some(&name.as_str().as_bytes()) {
        return None;
    }
    let root = root.as_os_str().as_bytes();
    if !words.windows(2).any(|pair| pair == [&b"--root"[..], root]) {
        return None;
    }
    Some(if words.contains(&&b"--kept"[..]) {
        Role::Monitor
    } else {
        Role::Keeper
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_watchers_of_this_vm_and_root_are_found() {
        let role = |line: &str| role(line.as_bytes(), Path::new("/r"), &"web".parse().unwrap());
        assert_eq!(
            role("/bin/rekindle\0monitor\0web\0--root\0/r\0"),
            Some(Role::Keeper)
        );
        let kept = "rekindle\0monitor\0web\0--kept\0--root\0/r\0";
        assert_eq!(role(kept), Some(Role::Monitor));
        assert_eq!(role("rekindle\0monitor\0web2\0--root\0/r\0"), None);
        assert_eq!(role("rekindle\0monitor\0web\0--root\0/r2\0"), None);
        assert_eq!(role("rekindle\0logs\0web\0--root\0/r\0"), None);
        assert_eq!(role(""), None);
    }
}
