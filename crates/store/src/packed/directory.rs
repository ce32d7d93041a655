//! Packed snapshots in a directory: a disk that is carried, a file system that several hosts share.
//!
//! ```text
//! push   packs/<BLAKE3> … all of them ─► snapshots/<id> ─► names/<name>      the base of a chain first
//! pull   snapshots/<id> … to the base ─► chunks, each proven, into a draft ─► published, the base first
//! ```
//!
//! A file is written without a name, made durable, and then given its name, if nobody has it (`O_TMPFILE`, `linkat`). So
//! whoever is killed leaves whole files and nothing else, and two that push the same do not meet.

use crate::file::{At, FileError, open_regular, sync_dir};
use crate::layout::{SnapshotId, SnapshotName};
use crate::packed::index::{Index, IndexError, MAX_INDEX, PackRef};
use crate::unit::length;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A directory that holds packed snapshots.
#[derive(Debug, Clone)]
pub struct Directory {
    pub(super) path: PathBuf,
}

/// How far a push or a pull is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Pages of memory and disks that are done with.
    pub done: u64,
    /// How many there are, about.
    pub total: u64,
}

/// Who wants to know how far it is; asked from several threads.
pub type Report<'a> = &'a (dyn Fn(Progress) + Sync);

/// Why an index cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IndexFault {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is damaged, or not one.
    #[error("cannot use {}", path.display())]
    Unsound {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// It is that of another snapshot, or longer than any.
    #[error("{} is not the index of that snapshot", path.display())]
    Other {
        /// The file.
        path: PathBuf,
    },
}

impl Directory {
    /// The directory at `path`, which the first push makes.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub(super) fn pack(&self, pack: PackRef) -> PathBuf {
        self.path.join("packs").join(pack.name.to_string())
    }

    pub(super) fn snapshot(&self, id: SnapshotId) -> PathBuf {
        self.path.join("snapshots").join(id.to_string())
    }

    pub(super) fn name(&self, name: &SnapshotName) -> PathBuf {
        self.path.join("names").join(name.as_str())
    }

    pub(super) fn index(&self, id: SnapshotId) -> Result<Option<Index>, IndexFault> {
        let path = self.snapshot(id);
        let Some(bytes) = read_bounded(&path, MAX_INDEX.get())? else {
            return Ok(None);
        };
        let index = Index::parse(&bytes).map_err(|source| IndexFault::Unsound {
            path: path.clone(),
            source,
        })?;
        match index.manifest().id == id {
            true => Ok(Some(index)),
            false => Err(IndexFault::Other { path }),
        }
    }

    pub(super) fn named(&self, name: &SnapshotName) -> Result<Option<SnapshotId>, IndexFault> {
        let path = self.name(name);
        let Some(bytes) = read_bounded(&path, 64)? else {
            return Ok(None);
        };
        let id = std::str::from_utf8(&bytes).ok();
        let id = id.and_then(|text| text.trim_end().parse().ok());
        id.map(Some).ok_or(IndexFault::Other { path })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Put {
    New,
    WasThere,
}

/// Writes a durable file that appears whole, where none is.
pub(super) fn put_new(path: &Path, bytes: &[u8]) -> Result<Put, FileError> {
    let dir = path.parent().expect("each file is in a directory");
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).at("write to", dir)?;
    let mut file = File::from(file);
    file.write_all(bytes).at("write", path)?;
    file.sync_all().at("sync", path)?;
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, nameless, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::EXIST) => return Ok(Put::WasThere),
        other => other.at("name", path)?,
    }
    sync_dir(dir.to_owned())?;
    Ok(Put::New)
}

/// A file that is no longer than `limit`; `None` if it is not there.
fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, IndexFault> {
    let file = match open_regular(path) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .at("read", path)?;
    match length(bytes.len()) > limit {
        true => Err(IndexFault::Other {
            path: path.to_owned(),
        }),
        false => Ok(Some(bytes)),
    }
}
