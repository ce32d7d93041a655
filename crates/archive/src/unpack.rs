//! From a stream, which a stranger may have made, to a file or tree.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod, fchown,
    futimens, mkdirat, openat, utimensat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::MAX_DEPTH;
use crate::beside::Beside;
use crate::destination::{DestinationError, Goods, find};
use crate::record::{Meta, Name, Record};
use crate::records::{NAMELESS, Records, StreamError};
use crate::tally::Tally;

/// Whose the copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// Whoever unpacks. Nothing is setuid or setgid then: it would not be for who it was.
    #[default]
    Unpacker,
    /// The same numbers as where it comes from, and setuid and setgid with them, which takes root.
    Kept,
}

/// Why something was not unpacked. Files that were complete before stay.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// What came is not whole, or not sound.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// There is no place for it.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The disk is full.
    #[error("there is no space left for {path:?}")]
    NoSpace {
        /// What did not fit.
        path: PathBuf,
    },
    /// Something of another kind is where it should be put.
    #[error("{path:?} is in the way, and of another kind; remove it first")]
    InTheWay {
        /// What is there.
        path: PathBuf,
    },
    /// Directories are too deep.
    #[error("{path:?} is more than {MAX_DEPTH} directories deep")]
    TooDeep {
        /// The first that is.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("cannot write {path:?}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Unpacks what [`pack`](crate::pack) made to the place `to`, by the rules of `docker cp`: into a directory that is there,
/// else under that name. Directories that are there keep what is in them, and their permissions; files and links are
/// replaced.
///
/// `progress` is told after each entry, and now and then within a file.
pub fn unpack(
    from: impl Read,
    to: &Path,
    owner: Owner,
    progress: &mut dyn FnMut(&Tally),
) -> Result<Tally, UnpackError> {
    let mut unpacker = Unpacker {
        records: Records::new(from)?,
        path: to.to_owned(),
        owner,
        tally: Tally::default(),
        progress,
    };
    unpacker.root(to)?;
    unpacker.records.finish()?;
    Ok(unpacker.tally)
}

struct Unpacker<'a, R: Read> {
    records: Records<R>,
    /// Of what is being unpacked, for errors.
    path: PathBuf,
    owner: Owner,
    tally: Tally,
    progress: &'a mut dyn FnMut(&Tally),
}

/// A directory that is being filled.
struct Level {
    dir: OwnedFd,
    /// What it gets when it is complete, if it was made for this copy.
    made: Option<Meta>,
}

/// What a record says is to be made.
enum Entry {
    Directory(Meta),
    File(Meta),
    Link(Meta, Vec<u8>),
}

impl<R: Read> Unpacker<'_, R> {
    fn root(&mut self, to: &Path) -> Result<(), UnpackError> {
        let (name, entry) = match self.records.next_record()? {
            Record::Directory { name, meta } => (name, Entry::Directory(meta)),
            Record::File { name, meta } => (name, Entry::File(meta)),
            Record::Link { name, meta, target } => (name, Entry::Link(meta, target)),
            _ => return Err(StreamError::Nonsense("it begins with no file or directory").into()),
        };
        let goods = match entry {
            Entry::Directory(_) => Goods::Directory,
            Entry::File(_) | Entry::Link(..) if name.is_none() => return Err(NAMELESS.into()),
            Entry::File(_) | Entry::Link(..) => Goods::Single,
        };
        let place = find(to, name.as_ref(), goods)?;
        self.path = place.path;
        let level = match place.name {
            Some(name) => self.entry(place.dir.as_fd(), &name, entry)?,
            None => Some(Level {
                dir: place.dir,
                made: None,
            }),
        };
        match level {
            Some(level) => self.tree(level),
            None => Ok(()),
        }
    }

    /// What is in a directory that was entered, until it is left.
    fn tree(&mut self, root: Level) -> Result<(), UnpackError> {
        self.tally.directories += 1;
        let mut down = vec![root];
        while let Some(level) = down.last() {
            let (name, entry) = match self.records.next_record()? {
                Record::Leave => {
                    self.leave(level)?;
                    down.pop();
                    if !down.is_empty() {
                        self.path.pop();
                    }
                    continue;
                }
                Record::Skipped { name, what } => {
                    self.tally.skip(&self.path.join(&name), what);
                    continue;
                }
                Record::Directory { name, meta } => (name, Entry::Directory(meta)),
                Record::File { name, meta } => (name, Entry::File(meta)),
                Record::Link { name, meta, target } => (name, Entry::Link(meta, target)),
                Record::Data { .. } | Record::FileEnd { .. } => {
                    return Err(StreamError::Nonsense("data of no file").into());
                }
            };
            let name = name.ok_or(NAMELESS)?;
            self.path.push(&name);
            if matches!(entry, Entry::Directory(_)) && down.len() == MAX_DEPTH {
                return Err(UnpackError::TooDeep {
                    path: self.path.clone(),
                });
            }
            match self.entry(level.dir.as_fd(), &name, entry)? {
                Some(below) => {
                    self.tally.directories += 1;
                    down.push(below);
                }
                None => {
                    self.path.pop();
                }
            }
            (self.progress)(&self.tally);
        }
        Ok(())
    }

    /// Makes an entry of a directory; returns it if it is one itself.
    fn entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &Name,
        entry: Entry,
    ) -> Result<Option<Level>, UnpackError> {
        match entry {
            Entry::Directory(meta) => {
                let entered = enter(dir, name, meta);
                return entered.map(Some).map_err(|error| self.unwritten(error));
            }
            Entry::File(meta) => {
                self.file(dir, name, &meta)?;
                self.tally.files += 1;
            }
            Entry::Link(meta, target) => {
                let owner = self.owner;
                let dress = |beside: &str| dress_link(dir, beside, &meta, owner);
                Beside::new(dir)
                    .and_then(|beside| beside.place_link(name, &target, dress))
                    .map_err(|error| self.unwritten(error))?;
                self.tally.links += 1;
            }
        }
        Ok(None)
    }

    fn file(&mut self, dir: BorrowedFd<'_>, name: &Name, meta: &Meta) -> Result<(), UnpackError> {
        let beside = Beside::new(dir).map_err(|error| self.unwritten(error))?;
        let size = self.content(beside.file())?;
        let owner = self.owner;
        let complete = || {
            beside.file().set_len(size)?;
            dress(beside.file(), meta, owner)?;
            beside.place(name)
        };
        complete().map_err(|error| self.unwritten(error))
    }

    /// Writes the data of a file; returns how long it is to be.
    fn content(&mut self, file: &File) -> Result<u64, UnpackError> {
        let mut written = 0;
        loop {
            let (offset, bytes) = match self.records.next_record()? {
                Record::Data { offset, bytes } => (offset, bytes),
                Record::FileEnd { size } if size < written => {
                    return Err(StreamError::Nonsense("a file shorter than its data").into());
                }
                Record::FileEnd { size } => return Ok(size),
                _ => return Err(StreamError::Nonsense("a file that does not end").into()),
            };
            let count = bytes.len() as u64;
            let end = offset.checked_add(count).filter(|_| offset >= written);
            let Some(end) = end else {
                return Err(StreamError::Nonsense("data that is not where it can be").into());
            };
            if let Err(error) = file.write_all_at(bytes, offset) {
                return Err(self.unwritten(error));
            }
            written = end;
            self.tally.bytes += count;
            (self.progress)(&self.tally);
        }
    }

    fn leave(&self, level: &Level) -> Result<(), UnpackError> {
        match &level.made {
            Some(meta) => {
                dress(&level.dir, meta, self.owner).map_err(|error| self.unwritten(error))
            }
            None => Ok(()),
        }
    }

    fn unwritten(&self, source: io::Error) -> UnpackError {
        let path = self.path.clone();
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => UnpackError::NoSpace { path },
            Some(Errno::EXIST | Errno::ISDIR | Errno::NOTDIR | Errno::LOOP) => {
                UnpackError::InTheWay { path }
            }
            _ => UnpackError::Write { path, source },
        }
    }
}

/// Makes a directory, or enters the one that is there.
fn enter(at: BorrowedFd<'_>, name: &Name, meta: Meta) -> io::Result<Level> {
    let made = match mkdirat(at, name.as_bytes(), Mode::RWXU) {
        Ok(()) => Some(meta),
        Err(Errno::EXIST) => None,
        Err(errno) => return Err(errno.into()),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(at, name.as_bytes(), flags, Mode::empty())?;
    Ok(Level { dir, made })
}

/// Gives a file or directory its owner, permissions and time, in this order: a change of the owner takes setuid away.
fn dress(file: impl AsFd, meta: &Meta, owner: Owner) -> io::Result<()> {
    let mode = match owner {
        Owner::Unpacker => meta.mode & 0o1777,
        Owner::Kept => {
            fchown(
                &file,
                Some(Uid::from_raw(meta.uid)),
                Some(Gid::from_raw(meta.gid)),
            )?;
            meta.mode
        }
    };
    fchmod(&file, Mode::from_raw_mode(mode))?;
    Ok(futimens(&file, &times(meta))?)
}

fn dress_link(dir: BorrowedFd<'_>, name: &str, meta: &Meta, owner: Owner) -> io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    if owner == Owner::Kept {
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        chownat(dir, name, Some(uid), Some(gid), flags)?;
    }
    Ok(utimensat(dir, name, &times(meta), flags)?)
}

fn times(meta: &Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: meta.seconds,
            tv_nsec: meta.nanoseconds.into(),
        },
    }
}
