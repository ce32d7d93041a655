//! A VM's directory: the names in it, and the lock that makes its holder the owner.
//!
//! ```text
//! vms/web1/
//!   lock            flock, held by whoever owns the VM
//!   record.json     what is: state, processes, machine (replaced atomically)
//!   api.sock        Firecracker's API          uffd.sock  the page server's socket
//!   v.sock          vsock                      v.sock_5253  where the guest's agent calls
//!   disks/ID        each drive: own copy, or link to a shared file
//!   serial, serial.old, log, log.old, metrics, metrics.old     bounded, readable with cat
//!   *.fifo          what Firecracker writes into and reads from
//!   pager.json      what the page server did, written when it ends
//!   pager.state     what it does, and what its successor needs if it dies
//!   pager.plan      what it was told; it cannot write that
//!   pager.touched   what the guest touched, for the moment until its owner takes it
//!   snapshot/       indexes, state and working set of a snapshot whose memory is fetched from a repository
//!   net.json        what of its network is on the host; absent when nothing is
//!   cgroups         its control groups on the host; absent when there are none
//!   jail            the link to its jail, which is in here as well (the engine's `jail`); absent without one
//! ```
//!
//! Firecracker's working directory is this directory and every path in its API is relative to it, so
//! a snapshot's paths resolve to each copy's own files.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rekindle_store::{Root, VmName};
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::jail::{self, JailError};
use crate::net::{self, NetError};

/// Firecracker's API socket, relative to the VM's directory.
pub const API_SOCKET: &str = "api.sock";
/// The page server's socket, relative to the VM's directory.
pub const PAGER_SOCKET: &str = "uffd.sock";
/// What the page server did, relative to the VM's directory.
pub const PAGER_STATS: &str = "pager.json";
/// What the page server keeps for its successor, relative to the VM's directory.
pub const PAGER_STATE: &str = "pager.state";
/// What the page server was told, for its successor and for whoever collects what it leaves, relative to the VM's directory.
pub(crate) const PAGER_PLAN: &str = "pager.plan";
/// What the guest touched, until it is collected, relative to the VM's directory.
pub(crate) const PAGER_TOUCHED: &str = "pager.touched";
/// The page server's own errors, relative to the VM's directory.
pub const PAGER_LOG: &str = "pager.log";
/// The vsock device's socket, relative to the VM's directory.
pub const VSOCK_SOCKET: &str = "v.sock";
/// Where the drives are, relative to the VM's directory.
pub const DISKS: &str = "disks";
/// The guest's serial output.
pub const SERIAL: &str = "serial";
/// The FIFO that the guest's serial port writes to.
pub(crate) const SERIAL_FIFO: &str = "serial.fifo";
/// The FIFO that the guest's serial port reads from.
pub const INPUT_FIFO: &str = "input.fifo";
/// The FIFO that Firecracker logs to.
pub(crate) const LOG_FIFO: &str = "log.fifo";
/// The FIFO that Firecracker writes its metrics to.
pub(crate) const METRICS_FIFO: &str = "metrics.fifo";
/// Firecracker's log.
pub const LOG: &str = "log";
/// Firecracker's metrics, a JSON object a line.
pub const METRICS: &str = "metrics";
/// A Diff chain's memory, merged for the File backend.
pub const MERGED_MEMORY: &str = "memory";

/// All but the memory of a snapshot that is somewhere else.
pub(crate) const OUTLINE: &str = "snapshot";

/// What of its network there is on the host.
pub const NETWORK: &str = "net.json";

const LOCK: &str = "lock";
/// What is known of the VM, relative to its directory.
pub(crate) const RECORD: &str = "record.json";

/// The path of a VM's directory, and of what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDir {
    path: PathBuf,
}

/// Why a VM's directory could not be made or locked.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// The name is in use.
    #[error(
        "the name {name} is taken by {path}; choose another, or remove it with: rekindle rm {name}"
    )]
    Taken {
        /// The name.
        name: VmName,
        /// The directory that has it.
        path: PathBuf,
    },
    /// Nothing has this name.
    #[error("no VM is called {name} in {root}")]
    Missing {
        /// The name.
        name: VmName,
        /// The folder that was searched.
        root: PathBuf,
    },
    /// Another process owns the VM.
    #[error("{path} is owned by another process")]
    Owned {
        /// The VM's directory.
        path: PathBuf,
    },
    /// Its jail's user cannot be given back.
    #[error("cannot remove the jail of {path}")]
    Jail {
        /// The VM's directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<JailError>,
    },
    /// Its network cannot be removed from the host.
    #[error("cannot remove the network of {path}")]
    Network {
        /// The VM's directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<NetError>,
    },
    /// The file system refused.
    #[error("cannot use {path}")]
    Io {
        /// What was to be used.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl DirError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        DirError::Io {
            path: path.into(),
            source: source.into(),
        }
    }
}

/// Proof that this process owns the VM. The kernel gives it up when the process ends.
#[derive(Debug)]
pub struct Ownership {
    lock: OwnedFd,
    /// The directory itself. While it is open, no other can get its inode.
    place: OwnedFd,
}

impl Drop for Ownership {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is starting has a copy of the descriptor until it
        // executes its program, and whoever takes the VM up next would find it owned.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }
}

impl Ownership {
    /// Whether the directory at this path is still the one that is owned, and not another that got its name since.
    pub(crate) fn is_of(&self, dir: &VmDir) -> bool {
        let owned = rustix::fs::fstat(&self.place);
        let named = rustix::fs::lstat(dir.path());
        matches!((owned, named), (Ok(owned), Ok(named))
            if owned.st_dev == named.st_dev && owned.st_ino == named.st_ino)
    }
}

/// While anybody holds it, nobody else makes a VM's directory, takes one over or removes one. Held for as long as it
/// takes to make a directory and its owner visible, or to remove one, never while something is waited for.
#[derive(Debug)]
pub struct Hold {
    _lock: OwnedFd,
}

impl Hold {
    /// Waits until nobody else holds it.
    pub fn wait(root: &Root) -> Result<Hold, DirError> {
        Hold::on(&root.vms())
    }

    fn on(vms: &Path) -> Result<Hold, DirError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(vms, flags, Mode::empty()).map_err(|e| DirError::io(vms, e))?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
            .map_err(|e| DirError::io(vms, e))?;
        Ok(Hold { _lock: lock })
    }
}

impl VmDir {
    /// [`Hold::wait`] on the folder that this directory is in.
    pub fn hold(&self) -> Result<Hold, DirError> {
        Hold::on(self.path.parent().unwrap_or(&self.path))
    }

    /// Makes the directory; two that ask for one name at the same time get one success.
    pub fn create(root: &Root, name: &VmName) -> Result<VmDir, DirError> {
        let path = root.vms().join(name.as_str());
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(VmDir { path }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(DirError::Taken {
                name: name.clone(),
                path,
            }),
            Err(e) => Err(DirError::io(path, e)),
        }
    }

    /// The directory of a VM that exists.
    pub fn open(root: &Root, name: &VmName) -> Result<VmDir, DirError> {
        let path = root.vms().join(name.as_str());
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(VmDir { path }),
            Ok(_) => Err(DirError::io(
                path,
                io::Error::from(io::ErrorKind::NotADirectory),
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(DirError::Missing {
                name: name.clone(),
                root: root.vms(),
            }),
            Err(e) => Err(DirError::io(path, e)),
        }
    }

    /// The names of all VMs, sorted. Entries that are no valid name are not ours and are left out.
    pub fn list(root: &Root) -> Result<Vec<VmName>, DirError> {
        let vms = root.vms();
        let entries = std::fs::read_dir(&vms).map_err(|e| DirError::io(&vms, e))?;
        let mut names: Vec<VmName> = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| DirError::io(&vms, e))?;
            let name = entry.file_name();
            names.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        Ok(names)
    }

    /// Takes the ownership of the VM, at once or not at all.
    pub fn own(&self) -> Result<Ownership, DirError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let place = rustix::fs::open(&self.path, flags, Mode::empty())
            .map_err(|e| DirError::io(&self.path, e))?;
        let path = self.file(LOCK);
        let lock = rustix::fs::openat(
            &place,
            LOCK,
            OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::RUSR | Mode::WUSR,
        )
        .map_err(|e| DirError::io(&path, e))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Ownership { lock, place }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(DirError::Owned {
                path: self.path.clone(),
            }),
            Err(e) => Err(DirError::io(path, e)),
        }
    }

    /// Removes what the VM has of a network on the host, then the directory and all that is in it. Links are removed,
    /// never followed. Whoever wants to own it waits for the hold; nothing is made in it meanwhile.
    pub fn remove(&self, hold: &Hold) -> Result<(), DirError> {
        self.undo_network()?;
        jail::give_back(self, hold).map_err(|e| self.jail_error(e))?;
        match std::fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(DirError::io(&self.path, e)),
            _ => Ok(()),
        }
    }

    /// Removes what the VM has of a network on the host, if it has anything.
    pub(crate) fn undo_network(&self) -> Result<(), DirError> {
        net::undo(self).map_err(|e| DirError::Network {
            path: self.path.clone(),
            source: Box::new(e),
        })
    }

    /// Removes its jail, and gives the user back.
    pub(crate) fn undo_jail(&self) -> Result<(), DirError> {
        let hold = self.hold()?;
        jail::undo(self, &hold).map_err(|e| self.jail_error(e))
    }

    fn jail_error(&self, source: JailError) -> DirError {
        DirError::Jail {
            path: self.path.clone(),
            source: Box::new(source),
        }
    }

    /// Replaces a file in it: whoever reads sees the old one or the new one, whole. Not flushed to the disk.
    pub fn replace(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let next = self.file(format!("{name}.next"));
        std::fs::write(&next, contents)?;
        std::fs::rename(&next, self.file(name))
    }

    /// The VM's name.
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which users the VMs beside it have, and it.
    pub(crate) fn uids(&self) -> PathBuf {
        let vms = self.path.parent().unwrap_or(&self.path);
        vms.with_file_name("uids")
    }

    /// A file in it.
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Where the record is.
    pub fn record(&self) -> PathBuf {
        self.file(RECORD)
    }

    /// Where a drive is, absolute.
    pub fn disk(&self, drive_id: &str) -> PathBuf {
        self.file(disk_path(drive_id))
    }
}

/// A drive's path as Firecracker is told it: relative to the VM's directory.
pub fn disk_path(drive_id: &str) -> PathBuf {
    Path::new(DISKS).join(drive_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_stays_as_it_was() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        let names = || -> Vec<_> {
            let entries = std::fs::read_dir(dir.path()).unwrap().flatten();
            entries.map(|entry| entry.file_name()).collect()
        };
        dir.replace("a.json", b"one").unwrap();
        let mut before = std::fs::File::open(dir.file("a.json")).unwrap();
        dir.replace("a.json", b"and two").unwrap();
        assert_eq!(std::fs::read(dir.file("a.json")).unwrap(), b"and two");
        let mut seen = String::new();
        io::Read::read_to_string(&mut before, &mut seen).unwrap();
        assert_eq!(seen, "one");
        assert_eq!(names(), ["a.json"]);

        std::fs::create_dir(dir.file("a.json.next")).unwrap();
        assert!(dir.replace("a.json", b"three").is_err());
        assert_eq!(std::fs::read(dir.file("a.json")).unwrap(), b"and two");
    }
}
