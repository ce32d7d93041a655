//! Packed snapshots in one place: a directory, or an object store.
//!
//! ```text
//! push   packs/<BLAKE3> … all of them ─► snapshots/<id> ─► names/<name>      the base of a chain first
//! pull   snapshots/<id> … to the base ─► chunks, each proven, into a draft ─► published, the base first
//! ```

use crate::layout::{SnapshotId, SnapshotName};
use crate::packed::cache::Cache;
use crate::packed::directory::Directory;
use crate::packed::index::{Index, IndexError, MAX_INDEX};
use crate::packed::objects::{Object, ObjectError, Objects};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

/// A place that has packed snapshots.
#[derive(Debug)]
pub struct Repository {
    pub(super) objects: Box<dyn Objects>,
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
    Object(#[from] ObjectError),
    /// It is damaged, or not one.
    #[error("cannot use {url}")]
    Unsound {
        /// The object.
        url: String,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// It is that of another snapshot.
    #[error("{url} is not the index of that snapshot")]
    Other {
        /// The object.
        url: String,
    },
    /// It leads to no snapshot.
    #[error("{url} is not the name of a snapshot")]
    NoName {
        /// The object.
        url: String,
    },
}

impl Repository {
    /// What is kept there.
    pub fn of(objects: Box<dyn Objects>) -> Self {
        Self { objects }
    }

    /// In the directory at `path`, which the first push makes.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Self::of(Box::new(Directory::at(path)))
    }

    /// The index of a snapshot; `None` if it is not there.
    ///
    /// One that is damaged is read once more: it may be so only here.
    ///
    /// # Errors
    /// An [`IndexFault`].
    pub fn index(&self, id: SnapshotId) -> Result<Option<Index>, IndexFault> {
        let index = match self.index_once(id) {
            Err(IndexFault::Unsound { .. }) => self.index_once(id)?,
            other => other?,
        };
        match index {
            Some(index) if index.manifest().id != id => Err(IndexFault::Other {
                url: self.objects.url(&Object::Snapshot(id)),
            }),
            other => Ok(other),
        }
    }

    /// As [`Repository::index`], from a cache if that has it. What an id leads to never changes.
    pub(super) fn cached_index(
        &self,
        id: SnapshotId,
        cache: &Cache,
    ) -> Result<Option<Index>, IndexFault> {
        let url = self.objects.url(&Object::Snapshot(id));
        if let Some(index) = cache.index(&url).filter(|index| index.manifest().id == id) {
            return Ok(Some(index));
        }
        let index = self.index(id)?;
        if let Some(bytes) = index.as_ref().and_then(|index| index.to_bytes().ok()) {
            cache.put_index(&url, &bytes);
        }
        Ok(index)
    }

    fn index_once(&self, id: SnapshotId) -> Result<Option<Index>, IndexFault> {
        let object = Object::Snapshot(id);
        let Some(bytes) = self.objects.get(&object, MAX_INDEX.get())? else {
            return Ok(None);
        };
        let index = Index::parse(&bytes).map_err(|source| IndexFault::Unsound {
            url: self.objects.url(&object),
            source,
        })?;
        Ok(Some(index))
    }

    /// The snapshot that a name leads to; `None` if nothing has that name.
    ///
    /// # Errors
    /// An [`IndexFault`].
    pub fn named(&self, name: &SnapshotName) -> Result<Option<SnapshotId>, IndexFault> {
        match self.named_once(name) {
            Err(IndexFault::NoName { .. }) => self.named_once(name),
            other => other,
        }
    }

    fn named_once(&self, name: &SnapshotName) -> Result<Option<SnapshotId>, IndexFault> {
        let object = Object::Name(name.clone());
        let Some(bytes) = self.objects.get(&object, 64)? else {
            return Ok(None);
        };
        let id = std::str::from_utf8(&bytes).ok();
        let id = id.and_then(|text| text.trim_end().parse().ok());
        id.map(Some).ok_or_else(|| IndexFault::NoName {
            url: self.objects.url(&object),
        })
    }
}

/// Counts what is done with, for all threads.
pub(super) struct Counter<'a> {
    done: AtomicU64,
    total: u64,
    report: Report<'a>,
}

impl<'a> Counter<'a> {
    pub(super) fn new(total: u64, report: Report<'a>) -> Self {
        let done = AtomicU64::new(0);
        Self {
            done,
            total,
            report,
        }
    }

    pub(super) fn add(&self, more: u64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        (self.report)(Progress {
            done,
            total: self.total,
        });
    }
}
