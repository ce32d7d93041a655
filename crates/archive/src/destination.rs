//! Where a copy goes, by the rules of `docker cp`.
//!
//! | there is | a file or link goes | a directory goes | content alone (`SRC/.`) goes |
//! | --- | --- | --- | --- |
//! | a directory | into it, by its name | into it, by its name | into it |
//! | a file | in its place | nowhere | nowhere |
//! | nothing | there; not if a slash follows | there | there |

use std::ffi::OsStr;
use std::fs::{self, FileType};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;

use crate::record::{Name, Special};

/// Why nothing can be copied to a place.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The directory that it is to be put into is not there.
    #[error("there is no directory {path:?} to copy to; make it first")]
    NoDirectory {
        /// It.
        path: PathBuf,
    },
    /// A directory would have to become what a file is, or a file is named as if it were a directory.
    #[error("{path:?} is no directory; name one, or a place where nothing is yet")]
    NotADirectory {
        /// What it was.
        path: PathBuf,
    },
    /// It is a socket, FIFO or device.
    #[error("{path:?} is {what}, which is not copied to; name a file or a directory")]
    Special {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: Special,
    },
    /// It is a link to something that is not there.
    #[error("{path:?} is a link that leads nowhere; remove it first, or name another place")]
    Dangling {
        /// The link.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot use {path:?}")]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is to be put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goods {
    Directory,
    /// A file or a link.
    Single,
}

/// Where the first entry goes.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) dir: OwnedFd,
    /// What it is called there; nothing if it is that directory itself.
    pub(crate) name: Option<Name>,
    pub(crate) path: PathBuf,
}

/// Finds where something goes that is called `name`, if it is called anything. Links that the caller names are followed.
pub(crate) fn find(
    to: &Path,
    name: Option<&Name>,
    goods: Goods,
) -> Result<Place, DestinationError> {
    let path = || to.to_owned();
    let unusable = |source| DestinationError::Unusable {
        path: path(),
        source,
    };
    let bytes = to.as_os_str().as_bytes();
    let is_directory = [&b"/"[..], b"/.", b"/.."]
        .iter()
        .any(|end| bytes.ends_with(end));
    let found = match fs::metadata(to) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return vacant(to, goods, is_directory);
        }
        // As `file/` says.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(DestinationError::NotADirectory { path: path() });
        }
        Err(error) => return Err(unusable(error)),
    };
    if found.is_dir() {
        return Ok(Place {
            dir: open(to)?,
            name: name.cloned(),
            path: name.map_or_else(path, |name| to.join(name)),
        });
    }
    if let Some(what) = special(found) {
        return Err(DestinationError::Special { path: path(), what });
    }
    if goods == Goods::Directory {
        return Err(DestinationError::NotADirectory { path: path() });
    }
    // Where a link leads, so that the link stays one.
    beside(&fs::canonicalize(to).map_err(unusable)?)
}

/// Nothing is there.
fn vacant(to: &Path, goods: Goods, is_directory: bool) -> Result<Place, DestinationError> {
    let path = to.to_owned();
    if fs::symlink_metadata(to).is_ok() {
        return Err(DestinationError::Dangling { path });
    }
    if goods == Goods::Single && is_directory {
        return Err(DestinationError::NoDirectory { path });
    }
    beside(to)
}

fn beside(path: &Path) -> Result<Place, DestinationError> {
    let missing = |path: &Path| DestinationError::NoDirectory {
        path: path.to_owned(),
    };
    let name = path.file_name().map(OsStr::as_bytes).map(Name::new);
    let Some(Ok(name)) = name else {
        return Err(missing(path));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok(Place {
        dir: open(parent)?,
        name: Some(name),
        path: path.to_owned(),
    })
}

fn open(dir: &Path) -> Result<OwnedFd, DestinationError> {
    let path = dir.to_owned();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty()).map_err(|errno| match io::Error::from(errno) {
        error if error.kind() == io::ErrorKind::NotFound => DestinationError::NoDirectory { path },
        error if error.kind() == io::ErrorKind::NotADirectory => {
            DestinationError::NotADirectory { path }
        }
        source => DestinationError::Unusable { path, source },
    })
}

fn special(found: FileType) -> Option<Special> {
    match found {
        found if found.is_socket() => Some(Special::Socket),
        found if found.is_fifo() => Some(Special::Fifo),
        found if found.is_char_device() || found.is_block_device() => Some(Special::Device),
        _ => None,
    }
}
