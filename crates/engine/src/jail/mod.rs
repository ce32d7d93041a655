//! The room that a jailed Firecracker is locked in, with a user of its own.
//!
//! ```text
//! vms/web1/
//!   disks/rootfs, uffd.sock, log.fifo, …     as for any VM: root's directory, where we work
//!   jail, api.sock, v.sock                   links into it
//!   firecracker/ID/root/                     what Firecracker takes for `/`
//!     disks/rootfs, uffd.sock, log.fifo, …   the same files by hard links, so the same relative paths hold
//!     kernel, initrd, vmstate                links where others may read them, else copies
//!     api.sock, v.sock                       Firecracker's own
//! uids/N ─▶ web1                             which user is whose
//! ```
//!
//! There is no mount to be left behind: what is in the jail goes with the VM's directory. And no name in it is trusted:
//! Firecracker may have made it what it likes. Our files are reached by their names outside, its sockets without following
//! a link.

mod cgroup;
mod host_io;
mod uids;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rekindle_firecracker::Jailer;
use rekindle_store::Root;
use rekindle_store::collect;
use rekindle_store::disk::copy_disk;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, StatVfsMountFlags};

use self::cgroup::Groups;
pub use self::uids::{UIDS_VARIABLE, UidError};
use crate::engine::Engine;
use crate::programs::{ProgramError, Programs};
use crate::vm::config::{Access, Limits, Machine};
use crate::vm::dir::{API_SOCKET, DISKS, Hold, VSOCK_SOCKET, VmDir};
use crate::vm::record::Record;

/// The link to the jail's root, relative to the VM's directory.
pub(crate) const JAIL: &str = "jail";
/// What a hard link is called before it takes the place of an older one.
const NEXT: &str = ".next";
/// How much larger than what Firecracker has to write a file of its may become.
const SLACK: u64 = 64 << 20;
/// What the jailer makes beside its copy of Firecracker, generously.
const ROOM: u64 = 128 << 10;
/// What the jailer wants a program's name to have in it.
const JAILABLE: &str = "firecracker";
/// How many files it may have open.
const OPEN_FILES: u64 = 2048;

/// Why a VM cannot be jailed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JailError {
    /// Users and roots are changed by root alone.
    #[error("only root can lock a VM in a jail")]
    NotRoot,
    /// The file system of the state directory lets no jail work.
    #[error(
        "{path} is mounted {option}, so no jail works there: choose another directory (--root), mount it otherwise, or \
         do without jails (--no-jail)"
    )]
    Mount {
        /// Where the jails would be.
        path: PathBuf,
        /// The mount option that forbids it.
        option: &'static str,
    },
    /// The control group that would limit it is the jail's.
    #[error("--host-io takes a jail, which only root's VMs have, and not with --no-jail")]
    IoWithoutJail,
    /// It would stand still.
    #[error("--host-io: 0 would let nothing through")]
    NoIo,
    /// This host has no controller for it.
    #[error(
        "--host-io: this host has no control groups for io (cgroup.controllers, or blkio of version 1)"
    )]
    NoIoController,
    /// The directory is on no disk of its own.
    #[error(
        "--host-io: {0} is on no single disk that could be limited, such as one in memory, btrfs or overlayfs"
    )]
    NoDisk(PathBuf),
    /// The jailer would not start it.
    #[error(
        "the jailer starts no program without {JAILABLE:?} in its name: rename {0}, or do without a jail (--no-jail)"
    )]
    Name(PathBuf),
    /// There is nothing to do it with.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// There is no user for it.
    #[error(transparent)]
    Uid(#[from] UidError),
    /// The file system refused.
    #[error("cannot use {path} for the jail")]
    Io {
        /// What was to be used.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn at(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> JailError {
    let path = path.as_ref().to_owned();
    |source| JailError::Io { path, source }
}

/// Whether Firecracker runs as a user of its own in a root of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// It has the rights of whoever starts it.
    #[default]
    None,
    /// It is jailed.
    Jailed,
}

impl Isolation {
    /// What a VM gets unless something else is said: root's are jailed, others' cannot be.
    pub fn of_this_user() -> Isolation {
        match rustix::process::geteuid().is_root() {
            true => Isolation::Jailed,
            false => Isolation::None,
        }
    }
}

/// Refuses what cannot be jailed here, before anything is made.
pub(crate) fn check(
    engine: &Engine,
    isolation: Isolation,
    limits: &Limits,
) -> Result<(), JailError> {
    let (programs, root) = (engine.programs(), engine.root());
    if isolation == Isolation::None {
        return match limits.are_none() {
            true => Ok(()),
            false => Err(JailError::IoWithoutJail),
        };
    }
    if !rustix::process::geteuid().is_root() {
        return Err(JailError::NotRoot);
    }
    programs.jailer()?;
    let name = programs.firecracker.file_name().unwrap_or_default();
    if !name.to_string_lossy().contains(JAILABLE) {
        return Err(JailError::Name(programs.firecracker.clone()));
    }
    check_mount(&root.vms())?;
    host_io::check(&root.vms(), limits)
}

/// Refuses a directory in which the jailer's copy of Firecracker could not be run, or could not open its devices.
fn check_mount(vms: &Path) -> Result<(), JailError> {
    let flags = rustix::fs::statvfs(vms).map_err(|e| at(vms)(e.into()))?;
    let forbids = [
        (StatVfsMountFlags::NODEV, "nodev"),
        (StatVfsMountFlags::NOEXEC, "noexec"),
    ];
    match forbids
        .iter()
        .find(|(flag, _)| flags.f_flag.contains(*flag))
    {
        Some((_, option)) => Err(JailError::Mount {
            path: vms.to_owned(),
            option,
        }),
        None => Ok(()),
    }
}

/// A VM's jail.
#[derive(Debug)]
pub(crate) struct Jail {
    root: OwnedFd,
    path: PathBuf,
    uid: u32,
}

impl Jail {
    /// Makes it, with a user that nobody else has.
    pub(crate) fn make(dir: &VmDir, firecracker: &Path, id: &str) -> Result<Jail, JailError> {
        let inside = Jailer::new("", "", 0, 0).root(firecracker, id);
        let path = dir.file(&inside);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path.join(DISKS))
            .map_err(at(&path))?;
        // Its user goes through, whatever our own umask is.
        let disks = path.join(DISKS);
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&disks, open).map_err(at(disks))?;
        let uid = uids::take(dir)?;
        std::os::unix::fs::lchown(&path, Some(uid), Some(uid)).map_err(at(&path))?;
        symlink(&inside, dir.file(JAIL)).map_err(at(dir.file(JAIL)))?;
        for socket in [API_SOCKET, VSOCK_SOCKET] {
            let link = dir.file(socket);
            symlink(inside.join(socket), &link).map_err(at(link))?;
        }
        Jail::open(path, uid)
    }

    /// The VM's, if it has one.
    pub(crate) fn of(dir: &VmDir) -> Result<Option<Jail>, JailError> {
        let link = dir.file(JAIL);
        let path = match fs::read_link(&link) {
            Ok(inside) => dir.file(inside),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(at(link)(e)),
        };
        let uid = path.symlink_metadata().map_err(at(&path))?.uid();
        Jail::open(path, uid).map(Some)
    }

    fn open(path: PathBuf, uid: u32) -> Result<Jail, JailError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(&path, flags, Mode::empty());
        let root = root.map_err(|e| at(&path)(e.into()))?;
        Ok(Jail { root, path, uid })
    }

    /// Whose it is.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether a process is locked in it. What the kernel tells as its root directory is no path out here.
    pub(crate) fn holds(&self, pid: u32) -> bool {
        let inside = fs::metadata(format!("/proc/{pid}/root"));
        let root = self.path.symlink_metadata();
        matches!((inside, root), (Ok(inside), Ok(root))
            if inside.dev() == root.dev() && inside.ino() == root.ino())
    }

    /// What the jailer is told. What it made for a Firecracker before this one is removed.
    pub(crate) fn jailer(
        &self,
        dir: &VmDir,
        programs: &Programs,
        machine: &Machine,
    ) -> Result<Jailer, JailError> {
        let leaves = Jailer::leaves(&programs.firecracker);
        let sockets = [API_SOCKET, VSOCK_SOCKET].map(PathBuf::from);
        for name in leaves.iter().chain(&sockets) {
            remove_all(&self.path.join(name)).map_err(at(self.path.join(name)))?;
        }
        self.check_room(&programs.firecracker)?;
        let jailer =
            Jailer::new(programs.jailer()?, dir.path(), self.uid, self.uid).open_files(OPEN_FILES);
        Ok(match largest_file(machine) {
            Some(bytes) => jailer.file_size(bytes + SLACK),
            None => jailer,
        })
    }

    /// Whether there is room for the jailer's copy of Firecracker: it dies without a word that could be written down.
    fn check_room(&self, firecracker: &Path) -> Result<(), JailError> {
        let path = self.path.join("room");
        let room = firecracker.metadata().map_err(at(firecracker))?.len();
        let reserve = || -> io::Result<()> {
            let file = File::create_new(&path)?;
            let all = FallocateFlags::empty();
            rustix::fs::fallocate(&file, all, 0, room + ROOM)?;
            Ok(())
        };
        let reserved = reserve();
        let removed = remove_all(&path);
        reserved.and(removed).map_err(at(&path))
    }

    /// Limits what whoever is locked in it may use.
    pub(crate) fn groups(
        &self,
        root: &Root,
        dir: &VmDir,
        record: &Record,
    ) -> Result<Arc<Groups>, JailError> {
        let io = host_io::limit(dir.path(), &record.host_io)?;
        cgroup::prepare(root, dir, &record.machine, io).map(Arc::new)
    }

    /// Hands in a file of the VM's own: from now on it is the jail's user's, too, by this name.
    pub(crate) fn give(&self, file: &Path, name: &str) -> Result<(), JailError> {
        std::os::unix::fs::lchown(file, Some(self.uid), Some(self.uid)).map_err(at(file))?;
        self.link(file, name).map_err(at(file))
    }

    /// Shows a file that others have as well, to be read.
    pub(crate) fn show(&self, file: &Path, name: &str) -> Result<(), JailError> {
        let file = fs::canonicalize(file).map_err(at(file))?;
        let mode = file.metadata().map_err(at(&file))?.mode();
        let may_read = mode & 0o006 == 0o004;
        match may_read.then(|| self.link(&file, name)) {
            Some(Ok(())) => return Ok(()),
            // It is elsewhere, or of a kind of file system that has no hard links.
            Some(Err(e)) if e.kind() == io::ErrorKind::CrossesDevices => {}
            Some(Err(e)) if e.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {}
            Some(Err(e)) => return Err(at(&file)(e)),
            None => {}
        }
        self.copy(&file, name).map_err(at(&file))
    }

    /// Lets Firecracker write so much into files without having to do with less memory for it.
    pub(crate) fn allow_more(&self, dir: &VmDir, bytes: u64) -> Result<(), JailError> {
        cgroup::allow_more(dir, bytes)
    }

    /// Makes an empty file that Firecracker writes, outside and inside. [`Jail::take_back`] follows.
    pub(crate) fn lend(&self, file: &Path, name: &str) -> Result<(), JailError> {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(file)
            // Copies' users may read it, too; the directories around it keep all others out.
            .and_then(|file| file.set_permissions(fs::Permissions::from_mode(0o644)))
            .map_err(at(file))?;
        self.give(file, name)
    }

    /// Takes a file away again that it was given or lent.
    pub(crate) fn take_back(&self, file: &Path, name: &str) -> Result<(), JailError> {
        self.unlink(name).map_err(at(file))?;
        std::os::unix::fs::lchown(file, Some(0), Some(0)).map_err(at(file))
    }

    fn link(&self, file: &Path, name: &str) -> io::Result<()> {
        let next = format!("{name}{NEXT}");
        self.unlink(&next)?;
        rustix::fs::linkat(CWD, file, &self.root, &*next, AtFlags::empty())?;
        rustix::fs::renameat(&self.root, &*next, &self.root, name)?;
        // Where both were names of one file already, the kernel has left both.
        self.unlink(&next)
    }

    fn copy(&self, file: &Path, name: &str) -> io::Result<()> {
        self.unlink(name)?;
        let copy = self.path.join(name);
        // Nobody but us has been in there: its Firecracker has no guest yet.
        copy_disk(file, &copy).map_err(io::Error::other)?;
        std::os::unix::fs::lchown(copy, Some(self.uid), Some(self.uid))
    }

    fn unlink(&self, name: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(self.root.as_fd(), name, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// The largest file that Firecracker has to write, in bytes: a drive of the VM's own, or a snapshot's memory. Nothing where a
/// drive's size is not known: one that is cut short would end the VM.
fn largest_file(machine: &Machine) -> Option<u64> {
    let memory = u64::from(machine.memory_mib) << 20;
    own_drive_sizes(machine).try_fold(memory, |largest, size| Some(largest.max(size?)))
}

/// The size of each drive that the VM writes to, in bytes; nothing for one whose size is not known.
fn own_drive_sizes(machine: &Machine) -> impl Iterator<Item = Option<u64>> {
    let drives = machine.drives.iter();
    let own = drives.filter(|drive| drive.access == Access::OwnCopy);
    own.map(|drive| Some(drive.source.metadata().ok()?.len()))
}

/// Hands a file of the VM's directory in, if the VM is jailed.
pub(crate) fn give(dir: &VmDir, name: &str) -> Result<(), JailError> {
    match Jail::of(dir)? {
        Some(jail) => jail.give(&dir.file(name), name),
        None => Ok(()),
    }
}

/// Where a socket of Firecracker's is. One that was replaced by a link, which could lead to another VM's, is refused.
pub(crate) fn socket(dir: &VmDir, name: &str) -> io::Result<PathBuf> {
    let path = match Jail::of(dir).map_err(io::Error::other)? {
        Some(jail) => jail.path.join(name),
        None => dir.file(name),
    };
    match path.symlink_metadata()?.file_type().is_symlink() {
        true => Err(io::Error::other(
            "it is a link, which Firecracker does not make",
        )),
        false => Ok(path),
    }
}

/// What Firecracker is to open, by the path by which it finds it: shown to it under this name, if the VM is jailed.
pub(crate) fn seen(dir: &VmDir, file: &Path, name: &str) -> Result<PathBuf, JailError> {
    match Jail::of(dir)? {
        Some(jail) => {
            jail.show(file, name)?;
            Ok(name.into())
        }
        None => Ok(file.to_owned()),
    }
}

/// Removes what there is of the jail outside the VM's directory: control groups, and that the user is taken. Whatever was in
/// it is dead.
pub(crate) fn give_back(dir: &VmDir, hold: &Hold) -> Result<(), JailError> {
    cgroup::release(dir, hold)?;
    Ok(uids::free(dir)?)
}

/// Removes the jail, and all that is in it.
pub(crate) fn undo(dir: &VmDir, hold: &Hold) -> Result<(), JailError> {
    give_back(dir, hold)?;
    let link = dir.file(JAIL);
    // `firecracker/ID/root`, of which the first is nothing but the jail's.
    let inside = fs::read_link(&link).unwrap_or_default();
    let top = inside.components().next().map(|top| dir.file(top));
    let links = [JAIL, API_SOCKET, VSOCK_SOCKET].map(|name| dir.file(name));
    for path in top.into_iter().chain(links) {
        remove_all(&path).map_err(at(&path))?;
    }
    Ok(())
}

/// The users and control groups that belong to no VM: somebody removed a directory by hand. Given back unless that is only
/// to be reported.
pub fn sweep(root: &Root, mode: collect::Mode) -> Result<Vec<String>, JailError> {
    // Nobody makes a directory meanwhile, which comes before its user.
    let _hold = Hold::wait(root).map_err(|e| at(root.vms())(io::Error::other(e)))?;
    let users = uids::unused(&root.uids(), &root.vms())?;
    let groups = cgroup::unused(root)?;
    if mode == collect::Mode::Reclaim {
        for link in &users {
            fs::remove_file(link).map_err(at(link))?;
        }
        groups.iter().try_for_each(|group| cgroup::remove(group))?;
    }
    let name = |path: &PathBuf| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let users = users.iter().map(|link| format!("user {}", name(link)));
    let groups = groups
        .iter()
        .map(|group| format!("control group {}", group.display()));
    Ok(users.chain(groups).collect())
}

/// The directory of the VM whose jail holds this process.
pub fn vm_of(root: &Root, pid: u32) -> Option<VmDir> {
    let names = VmDir::list(root).unwrap_or_default();
    let mut dirs = names.iter().filter_map(|name| VmDir::open(root, name).ok());
    dirs.find(|dir| Jail::of(dir).is_ok_and(|jail| jail.is_some_and(|jail| jail.holds(pid))))
}

/// Removes whatever is there; links are removed, never followed.
fn remove_all(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
