//! From a file or tree to a stream.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek,
    statat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::MAX_DEPTH;
use crate::record::{MAX_DATA, MAX_TARGET, Meta, Name, Record, Special};
use crate::records::Writer;
use crate::tally::Tally;

/// Why something was not packed. What was sent before is not complete, which its receiver sees.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PackError {
    /// There is no such file or directory.
    #[error("there is no {path:?} to copy")]
    Missing {
        /// What was asked for.
        path: PathBuf,
    },
    /// A socket, FIFO or device was asked for.
    #[error("{path:?} is {what}, which cannot be copied")]
    Special {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: Special,
    },
    /// It cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Directories are too deep.
    #[error("{path:?} is more than {MAX_DEPTH} directories deep; pack it with tar first")]
    TooDeep {
        /// The first that is.
        path: PathBuf,
    },
    /// Whoever receives it does so no more.
    #[error("what is copied cannot be sent")]
    Send(#[source] io::Error),
}

/// Packs the file, link or tree `source`. A link is copied as one, save where a slash follows it; of `DIR/.` only the
/// content is. A file that grows meanwhile is copied as long as it was; what vanishes meanwhile was not there.
///
/// `progress` is told after each entry, and now and then within a file.
pub fn pack(
    source: &Path,
    to: impl Write,
    progress: &mut dyn FnMut(&Tally),
) -> Result<Tally, PackError> {
    let root = Root::of(source)?;
    let mut packer = Packer {
        to: Writer::new(to).map_err(PackError::Send)?,
        path: root.path,
        buffer: vec![0; MAX_DATA],
        tally: Tally::default(),
        progress,
    };
    packer.root(root.name)?;
    packer.to.flush().map_err(PackError::Send)?;
    Ok(packer.tally)
}

/// What is to be packed.
struct Root {
    path: PathBuf,
    /// None if only the content is meant.
    name: Option<Name>,
}

impl Root {
    fn of(source: &Path) -> Result<Root, PackError> {
        let bytes = source.as_os_str().as_bytes();
        let last = bytes.rsplit(|&b| b == b'/').next().unwrap_or(bytes);
        let path = || source.to_owned();
        if last == b"." || last == b".." {
            return Ok(Root {
                path: path(),
                name: None,
            });
        }
        if !last.is_empty() {
            let name = Name::new(last).map_err(|_| PackError::Missing { path: path() })?;
            return Ok(Root {
                path: path(),
                name: Some(name),
            });
        }
        // `dir/`, with its own name; a link with a slash is what it leads to.
        let is_way = |part: &&[u8]| !part.is_empty();
        let name = bytes.rsplit(|&b| b == b'/').find(is_way).map(Name::new);
        Ok(Root {
            path: path(),
            name: name.and_then(Result::ok),
        })
    }
}

struct Packer<'a, W: Write> {
    to: Writer<W>,
    path: PathBuf,
    buffer: Vec<u8>,
    tally: Tally,
    progress: &'a mut dyn FnMut(&Tally),
}

impl<W: Write> Packer<'_, W> {
    fn root(&mut self, name: Option<Name>) -> Result<(), PackError> {
        let path = self.path.clone();
        let stat = match statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(PackError::Missing { path }),
            Err(errno) => return Err(self.unread(errno)),
        };
        match kind(&stat) {
            Kind::Special(what) => Err(PackError::Special { path, what }),
            Kind::Directory => {
                let (dir, stat) = self.open_dir(CWD, path.as_os_str().as_bytes())?;
                self.tree(name, dir, &stat)
            }
            Kind::File => self.file(CWD, path.as_os_str().as_bytes(), name),
            Kind::Link => self.link(CWD, path.as_os_str().as_bytes(), name, &stat),
        }
    }

    /// A directory and all below it.
    fn tree(&mut self, name: Option<Name>, dir: Dir, stat: &Stat) -> Result<(), PackError> {
        self.enter(name, stat)?;
        let mut down = vec![dir];
        while let Some(dir) = down.last_mut() {
            let entry = match dir.read() {
                Some(Ok(entry)) => entry,
                Some(Err(errno)) => return Err(self.unread(errno)),
                None => {
                    down.pop();
                    if !down.is_empty() {
                        self.path.pop();
                    }
                    self.put(&Record::Leave)?;
                    continue;
                }
            };
            // `.` and `..`.
            let Ok(name) = Name::new(entry.file_name().to_bytes()) else {
                continue;
            };
            let fd = dir.fd().map_err(|errno| self.unread(errno))?;
            self.path.push(&name);
            match self.entry(fd, name)? {
                Some(_) if down.len() == MAX_DEPTH => {
                    return Err(PackError::TooDeep {
                        path: self.path.clone(),
                    });
                }
                Some(below) => down.push(below),
                None => {
                    self.path.pop();
                }
            }
        }
        Ok(())
    }

    /// An entry of a directory; returns it, entered, if it is one itself.
    fn entry(&mut self, dir: BorrowedFd<'_>, name: Name) -> Result<Option<Dir>, PackError> {
        let bytes = name.as_bytes();
        let stat = match statat(dir, bytes, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.unread(errno)),
        };
        let done = match kind(&stat) {
            Kind::Directory => {
                return match self.open_dir(dir, bytes) {
                    Ok((below, stat)) => {
                        self.enter(Some(name), &stat)?;
                        Ok(Some(below))
                    }
                    Err(PackError::Missing { .. }) => Ok(None),
                    Err(error) => Err(error),
                };
            }
            Kind::File => self.file(dir, bytes, Some(name.clone())),
            Kind::Link => self.link(dir, bytes, Some(name.clone()), &stat),
            Kind::Special(what) => {
                self.tally.skip(&self.path, what);
                self.put(&Record::Skipped { name, what })
            }
        };
        match done {
            // Gone since.
            Err(PackError::Missing { .. }) => Ok(None),
            done => done.map(|()| None),
        }
    }

    fn enter(&mut self, name: Option<Name>, stat: &Stat) -> Result<(), PackError> {
        let meta = meta(stat);
        self.tally.directories += 1;
        self.put(&Record::Directory { name, meta })
    }

    fn open_dir(&self, at: BorrowedFd<'_>, name: &[u8]) -> Result<(Dir, Stat), PackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || {
            let dir = Dir::new(openat(at, name, flags, Mode::empty())?)?;
            let stat = dir.stat()?;
            Ok((dir, stat))
        };
        open().map_err(|errno| self.unread(errno))
    }

    fn file(
        &mut self,
        at: BorrowedFd<'_>,
        bytes: &[u8],
        name: Option<Name>,
    ) -> Result<(), PackError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = openat(at, bytes, flags, Mode::empty()).map_err(|errno| self.unread(errno))?;
        let stat = fstat(&fd).map_err(|errno| self.unread(errno))?;
        if let Kind::Special(what) = kind(&stat) {
            let path = self.path.clone();
            return Err(PackError::Special { path, what });
        }
        let meta = meta(&stat);
        self.put(&Record::File { name, meta })?;
        let size = self.content(
            &File::from(fd),
            u64::try_from(stat.st_size).unwrap_or_default(),
        )?;
        self.tally.files += 1;
        self.put(&Record::FileEnd { size })
    }

    /// The data of a file, up to `size`; returns how long it turned out to be.
    fn content(&mut self, file: &File, size: u64) -> Result<u64, PackError> {
        let mut at = 0;
        while let Some((start, stop)) =
            next_data(file, at, size).map_err(|errno| self.unread(errno))?
        {
            at = start;
            while at < stop {
                let most = usize::try_from(stop - at).map_or(MAX_DATA, |left| left.min(MAX_DATA));
                let count = match file.read_at(&mut self.buffer[..most], at) {
                    // It was cut off meanwhile.
                    Ok(0) => return Ok(at),
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(source) => {
                        let path = self.path.clone();
                        return Err(PackError::Read { path, source });
                    }
                };
                let bytes = &self.buffer[..count];
                self.to
                    .put(&Record::Data { offset: at, bytes })
                    .map_err(PackError::Send)?;
                at += count as u64;
                self.tally.bytes += count as u64;
                (self.progress)(&self.tally);
            }
        }
        Ok(size)
    }

    fn link(
        &mut self,
        at: BorrowedFd<'_>,
        bytes: &[u8],
        name: Option<Name>,
        stat: &Stat,
    ) -> Result<(), PackError> {
        let target = readlinkat(at, bytes, Vec::new()).map_err(|errno| self.unread(errno))?;
        let target = target.into_bytes();
        // Links of the kernel's own, in /proc, can lead anywhere.
        if target.is_empty() || target.len() > MAX_TARGET {
            return Err(self.unread(Errno::NAMETOOLONG));
        }
        let meta = meta(stat);
        self.tally.links += 1;
        self.put(&Record::Link { name, meta, target })
    }

    fn put(&mut self, record: &Record<'_>) -> Result<(), PackError> {
        self.to.put(record).map_err(PackError::Send)?;
        (self.progress)(&self.tally);
        Ok(())
    }

    fn unread(&self, errno: Errno) -> PackError {
        let path = self.path.clone();
        match errno {
            Errno::NOENT => PackError::Missing { path },
            _ => PackError::Read {
                path,
                source: errno.into(),
            },
        }
    }
}

enum Kind {
    Directory,
    File,
    Link,
    Special(Special),
}

fn kind(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        FileType::RegularFile => Kind::File,
        FileType::Symlink => Kind::Link,
        FileType::Fifo => Kind::Special(Special::Fifo),
        FileType::Socket => Kind::Special(Special::Socket),
        _ => Kind::Special(Special::Device),
    }
}

fn meta(stat: &Stat) -> Meta {
    Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        seconds: stat.st_mtime,
        nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
    }
}

/// The next stretch of data at or after `from`, before `end`. A file system that knows no holes has data alone.
fn next_data(file: &File, from: u64, end: u64) -> Result<Option<(u64, u64)>, Errno> {
    if from >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) if start >= end => return Ok(None),
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((from, end))),
        Err(errno) => return Err(errno),
    };
    let stop = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, stop.min(end))))
}
