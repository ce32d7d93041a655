//! Writing something beside its place, and giving it its place when it is complete.
//!
//! ```text
//!   .rekindle-copy-0  ── locked, written, complete ──rename──▶  the name
//! ```
//!
//! A writer that is killed leaves its file beside, without a lock: the next one in that directory removes it. Who holds
//! the lock of the file that has the name owns the name, so writers side by side take `-0`, `-1`, … and do not meet.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat, renameat, statat,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::record::Name;

/// What the names begin with.
pub(crate) const PREFIX: &str = ".rekindle-copy-";

/// So many can be written to one directory at once.
const MOST: usize = 64;

/// A new file in a directory, beside what it is to become.
#[derive(Debug)]
pub(crate) struct Beside<'a> {
    dir: BorrowedFd<'a>,
    name: String,
    /// Held open and locked as long as the name is ours.
    file: File,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Remove,
    Placed,
}

impl<'a> Beside<'a> {
    /// A new, empty file that only its owner may read.
    pub(crate) fn new(dir: BorrowedFd<'a>) -> io::Result<Beside<'a>> {
        for number in 0..MOST {
            let name = format!("{PREFIX}{number}");
            if let Some(file) = make(dir, &name)? {
                let fate = Fate::Remove;
                return Ok(Beside {
                    dir,
                    name,
                    file,
                    fate,
                });
            }
        }
        Err(io::Error::other(format!(
            "{MOST} copies write to this directory already"
        )))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its place. What has the name is replaced if it is a file or a link.
    pub(crate) fn place(mut self, name: &Name) -> io::Result<()> {
        replaceable(self.dir, name)?;
        renameat(self.dir, &self.name, self.dir, name.as_bytes())?;
        self.fate = Fate::Placed;
        Ok(())
    }

    /// Makes a symbolic link instead, and gives it its place; `dress` is done to it before.
    pub(crate) fn place_link(
        self,
        name: &Name,
        target: &[u8],
        dress: impl FnOnce(&str) -> io::Result<()>,
    ) -> io::Result<()> {
        replaceable(self.dir, name)?;
        // A link cannot be locked; whoever holds the file owns this name too.
        let beside = format!("{}-link", self.name);
        remove(self.dir, &beside)?;
        symlinkat(target, self.dir, &beside)?;
        let placed = dress(&beside)
            .and_then(|()| Ok(renameat(self.dir, &beside, self.dir, name.as_bytes())?));
        if placed.is_err() {
            let _ = remove(self.dir, &beside);
        }
        placed
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        if self.fate == Fate::Remove {
            // What cannot be removed now is removed by the next writer.
            let _ = remove(self.dir, &self.name);
        }
    }
}

/// A new file of this name, locked; `None` if another writer has it, or something that is not ours to remove.
fn make(dir: BorrowedFd<'_>, name: &str) -> io::Result<Option<File>> {
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let inspect = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    loop {
        match openat(dir, name, create, Mode::RUSR | Mode::WUSR) {
            // A cleaner may have taken it for a dead writer's, in the moment before it was locked.
            Ok(file) => match is_ours(dir, name, &file)? {
                true => return Ok(Some(file.into())),
                false => continue,
            },
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let left = match openat(dir, name, inspect, Mode::empty()) {
            Ok(left) => left,
            Err(Errno::NOENT) => continue,
            Err(_) => return Ok(None),
        };
        let is_file = FileType::from_raw_mode(fstat(&left)?.st_mode) == FileType::RegularFile;
        if !is_file || flock(&left, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        if has_name(dir, name, &left)? {
            remove(dir, name)?;
        }
    }
}

fn is_ours(dir: BorrowedFd<'_>, name: &str, file: impl AsFd) -> io::Result<bool> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => has_name(dir, name, file),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => {
            let _ = remove(dir, name);
            Err(errno.into())
        }
    }
}

fn has_name(dir: BorrowedFd<'_>, name: &str, file: impl AsFd) -> io::Result<bool> {
    let here = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(here) => here,
        Err(Errno::NOENT) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let ours = fstat(file)?;
    Ok((here.st_dev, here.st_ino) == (ours.st_dev, ours.st_ino))
}

fn remove(dir: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Fails if something has the name that is neither a file nor a link.
fn replaceable(dir: BorrowedFd<'_>, name: &Name) -> io::Result<()> {
    let found = match statat(dir, name.as_bytes(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => FileType::from_raw_mode(found.st_mode),
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    match found {
        FileType::RegularFile | FileType::Symlink => Ok(()),
        FileType::Directory => Err(Errno::ISDIR.into()),
        _ => Err(Errno::EXIST.into()),
    }
}
