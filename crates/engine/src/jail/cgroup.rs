//! What a jailed VM may use of the host's memory, processors and process numbers: a control group for each.
//!
//! ```text
//!   v2   /sys/fs/cgroup/rekindle-INSTALLATION/VM            one for all controllers
//!   v1   /sys/fs/cgroup/memory/rekindle-INSTALLATION/VM     one in each controller's hierarchy
//! ```
//!
//! A host may have both; a controller is taken from where it is. The jailer could make them too, but it cannot be told all
//! limits, and leaves them behind.

use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rekindle_store::{InstallationId, Root};

use super::{JailError, at, own_drive_sizes};
use crate::vm::config::Machine;
use crate::vm::dir::{Hold, VmDir};

/// What Firecracker itself needs beside its guest's memory, and what the kernel keeps of its drives meanwhile.
const MEMORY_SLACK_MIB: u64 = 128;
/// Firecracker's threads beside one for each virtual CPU, with room for helpers of the kernel's.
const THREADS: u64 = 16;
/// A processor's time is given out in periods of so many microseconds.
const PERIOD_US: u64 = 100_000;

/// Which of this VM's groups there may be, relative to its directory: a path a line.
const CGROUPS: &str = "cgroups";
const MOUNTS: &str = "/proc/self/mounts";
/// How long the kernel may take to let go of a group whose last process is dead, …
const PATIENCE: Duration = Duration::from_secs(2);
/// … and how often it is asked.
const LOOK: Duration = Duration::from_millis(2);
/// The limit of memory, in either version.
const MEMORY_V1: &str = "memory.limit_in_bytes";
const MEMORY_V2: &str = "memory.max";
/// File systems whose files are memory: tmpfs and ramfs, by the numbers of `linux/magic.h`.
const FILES_IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];
/// More than any file system of those has.
const UNKNOWN_SIZE: u64 = 1 << 50;

/// A limit: the controller, its file in either version, and what is written.
pub(super) struct Limit {
    pub(super) controller: &'static str,
    pub(super) v1: Vec<(&'static str, String)>,
    pub(super) v2: (&'static str, String),
}

/// So much that no honest guest is held up: its memory, and `files` bytes that it may write where files are memory, too; its
/// virtual CPUs and one processor for Firecracker, its threads.
fn limits(machine: &Machine, files: u64) -> Vec<Limit> {
    let vcpus = u64::from(machine.vcpus);
    let memory = (u64::from(machine.memory_mib) + MEMORY_SLACK_MIB) << 20;
    let memory = memory.saturating_add(files);
    let quota = (vcpus + 1) * PERIOD_US;
    let threads = (vcpus + THREADS).to_string();
    vec![
        Limit {
            controller: "memory",
            v1: vec![(MEMORY_V1, memory.to_string())],
            v2: (MEMORY_V2, memory.to_string()),
        },
        Limit {
            controller: "cpu",
            v1: vec![
                ("cpu.cfs_period_us", PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ],
            v2: ("cpu.max", format!("{quota} {PERIOD_US}")),
        },
        Limit {
            controller: "pids",
            v1: vec![("pids.max", threads.clone())],
            v2: ("pids.max", threads),
        },
    ]
}

/// Where this host's controllers are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Hierarchies {
    /// The unified hierarchy.
    v2: Option<PathBuf>,
    /// What it mounts, and which controllers that has.
    v1: Vec<(PathBuf, Vec<String>)>,
}

impl Hierarchies {
    fn of_this_host() -> io::Result<Hierarchies> {
        Ok(Hierarchies::parse(&fs::read_to_string(MOUNTS)?))
    }

    fn parse(mounts: &str) -> Hierarchies {
        let mut found = Hierarchies::default();
        for line in mounts.lines() {
            let mut words = line.split(' ').skip(1);
            let (Some(path), Some(kind), Some(options)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            match kind {
                "cgroup2" => found.v2 = Some(path.into()),
                "cgroup" => {
                    let options = options.split(',').map(str::to_owned).collect();
                    found.v1.push((path.into(), options));
                }
                _ => {}
            }
        }
        found
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        // The one that changed its name.
        let controller = if controller == "io" {
            "blkio"
        } else {
            controller
        };
        let has = |options: &Vec<String>| options.iter().any(|option| option == controller);
        let found = self.v1.iter().find(|(_, options)| has(options));
        found.map(|(path, _)| path.as_path())
    }
}

/// The directory of an installation's groups.
fn ours(installation: &InstallationId) -> String {
    format!("rekindle-{installation}")
}

/// A VM's groups, made and limited, with nobody in them.
#[derive(Debug)]
pub(crate) struct Groups {
    v1: Vec<PathBuf>,
    v2: Option<PathBuf>,
}

/// How many bytes of a VM's drives are memory once they are written: none, unless its directory is on such a file system.
fn files_in_memory(dir: &VmDir, machine: &Machine) -> Result<u64, JailError> {
    let kind = rustix::fs::statfs(dir.path()).map_err(|e| at(dir.path())(e.into()))?;
    if !FILES_IN_MEMORY.contains(&kind.f_type) {
        return Ok(0);
    }
    // One whose size is not known is limited by the file system alone.
    let sizes = own_drive_sizes(machine).map(|size| size.unwrap_or(UNKNOWN_SIZE));
    Ok(sizes.fold(0, u64::saturating_add))
}

/// Whether this host has the controller `io`.
pub(super) fn limits_io() -> Result<bool, JailError> {
    let hierarchies = Hierarchies::of_this_host().map_err(at(MOUNTS))?;
    let v2 = hierarchies.v2.as_deref();
    Ok(hierarchies.v1("io").is_some() || v2.is_some_and(|v2| has(v2, "io")))
}

/// Makes a VM's groups. Where the host has a controller nowhere, there is no such limit.
pub(super) fn prepare(
    root: &Root,
    dir: &VmDir,
    machine: &Machine,
    io: Option<Limit>,
) -> Result<Groups, JailError> {
    let hierarchies = Hierarchies::of_this_host().map_err(at(MOUNTS))?;
    let ours = ours(root.installation());
    let place = |hierarchy: &Path| hierarchy.join(&ours).join(dir.name());
    let mut groups = Groups {
        v1: Vec::new(),
        v2: None,
    };
    let mut settings = Vec::new();
    let mut controllers = Vec::new();
    for limit in limits(machine, files_in_memory(dir, machine)?)
        .into_iter()
        .chain(io)
    {
        match (hierarchies.v1(limit.controller), &hierarchies.v2) {
            (Some(v1), _) => {
                groups.v1.push(place(v1));
                let files = limit.v1.into_iter();
                settings.extend(files.map(|(file, value)| (place(v1).join(file), value)));
            }
            (None, Some(v2)) if has(v2, limit.controller) => {
                groups.v2 = Some(place(v2));
                controllers.push(limit.controller);
                settings.push((place(v2).join(limit.v2.0), limit.v2.1));
            }
            _ => {}
        }
    }
    let all: Vec<&PathBuf> = groups.v1.iter().chain(&groups.v2).collect();
    note(dir, &all)?;
    {
        // Whoever removes the last VM's removes the directory that they are all in.
        let _hold = Hold::wait(root).map_err(|e| at(root.vms())(io::Error::other(e)))?;
        for group in all {
            make(group, hierarchies.v2.as_deref(), &controllers)?;
        }
    }
    for (file, value) in settings {
        write(file, &value)?;
    }
    Ok(groups)
}

impl Groups {
    /// Takes the calling thread into those of version 1, and with it the processes that it starts from then on. A process
    /// that runs already would have to wait for the whole host's to stand still, some 10 ms each time.
    pub(crate) fn enter(&self) -> io::Result<()> {
        let mut tasks = self.v1.iter().map(|group| group.join("tasks"));
        tasks.try_for_each(|tasks| fs::write(tasks, "0"))
    }

    /// Takes a process into that of version 2, where a thread cannot go alone.
    pub(crate) fn take(&self, pid: u32) -> Result<(), JailError> {
        match &self.v2 {
            Some(group) => write(group.join("cgroup.procs"), &pid.to_string()),
            None => Ok(()),
        }
    }
}

/// Makes a group. In the unified hierarchy those above it have to pass the controllers on.
fn make(group: &Path, v2: Option<&Path>, controllers: &[&str]) -> Result<(), JailError> {
    fs::create_dir_all(group).map_err(at(group))?;
    let Some(v2) = v2.filter(|v2| group.starts_with(v2)) else {
        return Ok(());
    };
    let above = group.parent().unwrap_or(v2);
    for controller in controllers {
        for place in [v2, above] {
            write(
                place.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}

fn write(file: PathBuf, value: &str) -> Result<(), JailError> {
    fs::write(&file, value).map_err(at(file))
}

/// Writes down, before they are made, which groups are the VM's.
fn note(dir: &VmDir, groups: &[&PathBuf]) -> Result<(), JailError> {
    let lines: String = groups
        .iter()
        .map(|group| format!("{}\n", group.display()))
        .collect();
    dir.replace(CGROUPS, lines.as_bytes())
        .map_err(at(dir.file(CGROUPS)))
}

/// Lets a VM use so much more memory. What its Firecracker writes into files counts as its own: the kernel gives that back
/// when the file is on a disk, and cannot when the file system is in memory.
pub(super) fn allow_more(dir: &VmDir, bytes: u64) -> Result<(), JailError> {
    for group in noted(dir)? {
        for file in [MEMORY_V1, MEMORY_V2].map(|file| group.join(file)) {
            let Ok(limit) = fs::read_to_string(&file) else {
                continue;
            };
            // One that somebody has lifted says `max`.
            if let Ok(limit) = limit.trim().parse::<u64>() {
                write(file, &limit.saturating_add(bytes).to_string())?;
            }
        }
    }
    Ok(())
}

/// The groups that were written down for a VM.
fn noted(dir: &VmDir) -> Result<Vec<PathBuf>, JailError> {
    let path = dir.file(CGROUPS);
    match fs::read_to_string(&path) {
        Ok(lines) => Ok(lines.lines().map(PathBuf::from).collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(at(path)(e)),
    }
}

/// Removes the groups of a VM whose processes are dead.
pub(super) fn release(dir: &VmDir, _hold: &Hold) -> Result<(), JailError> {
    noted(dir)?.iter().try_for_each(|group| remove(group))?;
    let path = dir.file(CGROUPS);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(path)(e)),
        _ => Ok(()),
    }
}

/// Removes a group, and the one that all are in if it was the last.
pub(super) fn remove(group: &Path) -> Result<(), JailError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(group) {
            // The kernel may not have let go of the last process yet, and tells nobody when it does.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                sleep(LOOK);
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(group)(e)),
            _ => break,
        }
    }
    if let Some(all) = group.parent() {
        // It stays while there are others in it.
        let _ = fs::remove_dir(all);
    }
    Ok(())
}

/// The groups of VMs that are not there any more.
pub(super) fn unused(root: &Root) -> Result<Vec<PathBuf>, JailError> {
    let hierarchies = Hierarchies::of_this_host().map_err(at(MOUNTS))?;
    let all = hierarchies
        .v1
        .iter()
        .map(|(path, _)| path)
        .chain(&hierarchies.v2);
    let all = all.map(|path| path.join(ours(root.installation())));
    let groups = all.flat_map(|all| fs::read_dir(all).into_iter().flatten().flatten());
    let is_unused = |group: &DirEntry| {
        let is_group = group.file_type().is_ok_and(|kind| kind.is_dir());
        is_group && !root.vms().join(group.file_name()).is_dir()
    };
    Ok(groups.filter(is_unused).map(|group| group.path()).collect())
}

fn has(v2: &Path, controller: &str) -> bool {
    let all = fs::read_to_string(v2.join("cgroup.controllers")).unwrap_or_default();
    all.split_whitespace().any(|word| word == controller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_wherever_the_host_has_them() {
        let mixed = Hierarchies::parse(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
             cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n",
        );
        let place = Path::new("/sys/fs/cgroup");
        assert_eq!(mixed.v1("cpu"), Some(&*place.join("cpu,cpuacct")));
        assert_eq!(mixed.v1("memory"), Some(&*place.join("memory")));
        assert_eq!(mixed.v1("pids"), None);
        assert_eq!(mixed.v2, Some(place.join("unified")));
        let unified = Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        assert_eq!(unified.v1("cpu"), None);
        assert_eq!(unified.v2, Some(place.into()));
        assert_eq!(Hierarchies::parse("nonsense\n\n"), Hierarchies::default());
    }
}
