//! Files and directories, opened without trusting what stands there.
//!
//! A state directory can hold what somebody else put into it: a device node, a FIFO or a symbolic link
//! where a file belongs. Everything here refuses those before a byte is read.

use crate::unit::{ByteSize, index, length};
use jiff::Timestamp;
use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why something could not be done to a file.
#[derive(Debug, Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file system (or the quota) is full.
    #[error("no space left to {action} {}", path.display())]
    NoSpace {
        /// What was tried, as a verb.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A regular file belongs there, and something else stands there.
    #[error("{} is {found}, not a regular file", path.display())]
    NotRegular {
        /// Where.
        path: PathBuf,
        /// What stands there.
        found: FileKind,
    },
}

impl FileError {
    /// Whether the file is simply not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the file system had no room left.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }
}

/// What can stand where a regular file belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A symbolic link, in the path or at its end.
    SymbolicLink,
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A block or character device.
    Device,
    /// Something this program does not know.
    Unknown,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "a directory",
            Self::SymbolicLink => "a symbolic link",
            Self::Fifo => "a FIFO",
            Self::Socket => "a socket",
            Self::Device => "a device node",
            Self::Unknown => "something unknown",
        })
    }
}

impl From<FileType> for FileKind {
    fn from(kind: FileType) -> Self {
        match kind {
            FileType::Directory => Self::Directory,
            FileType::Symlink => Self::SymbolicLink,
            FileType::Fifo => Self::Fifo,
            FileType::Socket => Self::Socket,
            FileType::BlockDevice | FileType::CharacterDevice => Self::Device,
            FileType::RegularFile | FileType::Unknown => Self::Unknown,
        }
    }
}

/// Gives a failed system call the action and the path that it failed on.
pub(crate) trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|source| {
            let (path, source) = (path.to_owned(), source.into());
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::NoSpace {
                    action,
                    path,
                    source,
                },
                _ => FileError::Io {
                    action,
                    path,
                    source,
                },
            }
        })
    }
}

// O_NONBLOCK: the open of a FIFO must not wait for its writer. It means nothing to a regular file.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

/// Opens a regular file for reading. A symbolic link at the end of `path` is refused; one on the way is followed.
///
/// # Errors
/// [`FileError::NotRegular`] for anything but a regular file, [`FileError::Io`] if it cannot be opened.
pub fn open_regular(path: &Path) -> Result<File, FileError> {
    let opened = fs::open(path, READ | OFlags::NOFOLLOW, Mode::empty());
    accept_regular(opened, path)
}

/// A part of a regular file, if all of it is in memory, its name as well: this waits for no disk. Whatever is wrong is for
/// those to tell who may wait.
pub(crate) fn read_at_once(path: &Path, range: Range<u64>) -> Option<Vec<u8>> {
    let resolve = ResolveFlags::CACHED | ResolveFlags::NO_MAGICLINKS;
    let flags = READ | OFlags::NOFOLLOW;
    let opened = fs::openat2(fs::CWD, path, flags, Mode::empty(), resolve);
    let file = accept_regular(opened, path).ok()?;
    let mut bytes = vec![0; index(range.end.checked_sub(range.start)?)];
    let mut done = 0;
    while done < bytes.len() {
        let mut rest = [IoSliceMut::new(&mut bytes[done..])];
        let at = range.start + length(done);
        match preadv2(&file, &mut rest, at, ReadWriteFlags::NOWAIT) {
            Ok(0) => return None,
            Ok(more) => done += more,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(bytes)
}

/// A directory that is held open, so that what is opened below it is below this one and no other.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Dir {
    /// Opens a directory, which must not be a symbolic link.
    pub(crate) fn open(path: PathBuf) -> Result<Self, FileError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::open(&path, flags, Mode::empty()).at("open", &path)?;
        Ok(Self { fd, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Says where the directory is after a rename.
    pub(crate) fn moved_to(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Whether the directory still is what its path leads to.
    pub(crate) fn is_in_place(&self) -> Result<bool, FileError> {
        let this = fs::fstat(&self.fd).at("inspect", &self.path)?;
        match fs::statat(fs::CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) => Ok((this.st_dev, this.st_ino) == (there.st_dev, there.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno).at("inspect", &self.path),
        }
    }

    /// Opens a regular file: no component of `relative` may be a symbolic link or climb out.
    pub(crate) fn open_file(
        &self,
        relative: impl AsRef<Path>,
        access: Access,
    ) -> Result<File, FileError> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = match access {
            Access::Read => READ,
            Access::Write => READ | OFlags::RDWR,
        };
        let opened = fs::openat2(&self.fd, relative.as_ref(), flags, Mode::empty(), resolve);
        accept_regular(opened, &self.path.join(relative))
    }

    /// Takes a lock, and waits for it.
    pub(crate) fn lock(&self, operation: FlockOperation) -> Result<(), FileError> {
        loop {
            match fs::flock(&self.fd, operation) {
                Err(Errno::INTR) => {}
                other => return other.at("lock", &self.path),
            }
        }
    }

    /// Takes a lock if nobody stands in its way; `operation` is one that does not block.
    pub(crate) fn try_lock(&self, operation: FlockOperation) -> Result<TryLock, FileError> {
        match fs::flock(&self.fd, operation) {
            Ok(()) => Ok(TryLock::Taken),
            Err(Errno::WOULDBLOCK) => Ok(TryLock::Held),
            Err(errno) => Err(errno).at("lock", &self.path),
        }
    }

    /// Makes the directory's entries durable.
    pub(crate) fn sync(&self) -> Result<(), FileError> {
        match fs::fsync(&self.fd) {
            // Not every file system can; those that cannot have nothing to flush.
            Err(Errno::INVAL) => Ok(()),
            other => other.at("sync", &self.path),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a lock was had without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TryLock {
    Taken,
    Held,
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(path: PathBuf) -> Result<(), FileError> {
    Dir::open(path)?.sync()
}

fn accept_regular(opened: rustix::io::Result<OwnedFd>, path: &Path) -> Result<File, FileError> {
    let refuse = |found| FileError::NotRegular {
        path: path.to_owned(),
        found,
    };
    let fd = match opened {
        Err(Errno::LOOP) => return Err(refuse(FileKind::SymbolicLink)),
        // A socket, or a device without a driver.
        Err(Errno::NXIO) => return Err(refuse(FileKind::Socket)),
        other => other.at("open", path)?,
    };
    match FileType::from_raw_mode(fs::fstat(&fd).at("inspect", path)?.st_mode) {
        FileType::RegularFile => Ok(File::from(fd)),
        found => Err(refuse(found.into())),
    }
}

/// The size of an open file.
pub(crate) fn size(file: &File, path: &Path) -> Result<ByteSize, FileError> {
    file.metadata()
        .map(|meta| ByteSize::new(meta.len()))
        .at("inspect", path)
}

/// The size of a file that several read, and when it was last written to.
pub(crate) fn shared(path: &Path) -> Result<(ByteSize, Timestamp), FileError> {
    let meta = open_regular(path)?.metadata().at("inspect", path)?;
    let modified = meta.modified().at("inspect", path)?;
    let modified = Timestamp::try_from(modified)
        .map_err(io::Error::other)
        .at("tell the age of", path)?;
    Ok((ByteSize::new(meta.len()), modified))
}

/// Creates a file that did not exist, readable and writable by its owner alone.
pub(crate) fn create_new(path: &Path) -> Result<File, FileError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .at("create", path)
}

/// A lock that is a file of its own, made if it is missing; held until it is closed. Waits for whoever has it.
pub(crate) fn lock_file(path: &Path) -> Result<File, FileError> {
    let flags = READ | OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW;
    let file = accept_regular(fs::open(path, flags, Mode::RUSR | Mode::WUSR), path)?;
    loop {
        match fs::flock(&file, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            other => return other.map(|()| file).at("lock", path),
        }
    }
}
