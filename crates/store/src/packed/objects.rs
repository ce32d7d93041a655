//! Where the objects of a repository are kept: the few verbs that packing needs of a directory or an object store.
//!
//! Objects never change. What is put is there whole or not at all, and durable when [`Objects::put`] returns.

use crate::digest::Digest;
use crate::file::FileError;
use crate::layout::{SnapshotId, SnapshotName};
use std::error::Error as StdError;
use std::fmt;
use std::ops::Range;
use thiserror::Error;

/// What a repository is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Object {
    /// Chunks, named by the BLAKE3 of all of them.
    Pack(Digest),
    /// The index of a snapshot.
    Snapshot(SnapshotId),
    /// Leads to a snapshot.
    Name(SnapshotName),
}

/// Where the object is, relative to the repository.
impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pack(digest) => write!(f, "packs/{digest}"),
            Self::Snapshot(id) => write!(f, "snapshots/{id}"),
            Self::Name(name) => write!(f, "names/{name}"),
        }
    }
}

/// What came of putting an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is there now.
    New,
    /// One of its name was there, and stays.
    WasThere,
}

/// Why an object could not be read or put.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// Of a directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not there.
    #[error("{url} is missing")]
    Missing {
        /// The object.
        url: String,
    },
    /// It is shorter than it should be, or longer than it can be.
    #[error("{url} does not have the {expected} bytes that it should have")]
    Length {
        /// The object.
        url: String,
        /// How long it, or a part of it, should be, or may be at the most.
        expected: u64,
    },
    /// Of an object store.
    #[error("cannot {action} {url}")]
    Remote {
        /// What was tried, as a verb.
        action: &'static str,
        /// With what.
        url: String,
        /// The store's answer, or that there was none.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// A directory or an object store. Asked from several threads at once; each call waits for its answer.
pub trait Objects: fmt::Debug + Send + Sync {
    /// An object as people call it.
    fn url(&self, object: &Object) -> String;

    /// The repository as people call it.
    fn place(&self) -> String;

    /// How many calls at once are worth it.
    fn at_once(&self) -> usize;

    /// Makes what the first [`Objects::put`] needs.
    ///
    /// # Errors
    /// If it cannot be made.
    fn prepare(&self) -> Result<(), ObjectError>;

    /// How long an object is; `None` if it is not there.
    ///
    /// # Errors
    /// If that cannot be told.
    fn size(&self, object: &Object) -> Result<Option<u64>, ObjectError>;

    /// All of an object; `None` if it is not there.
    ///
    /// # Errors
    /// [`ObjectError::Length`] if it has more bytes than `limit`; if it cannot be read.
    fn get(&self, object: &Object, limit: u64) -> Result<Option<Vec<u8>>, ObjectError>;

    /// A part of an object, all of it.
    ///
    /// # Errors
    /// If the object is missing or shorter, or cannot be read.
    fn read(&self, object: &Object, range: Range<u64>) -> Result<Vec<u8>, ObjectError>;

    /// A part of an object, if it can be had without waiting for a disk or a network.
    fn read_at_once(&self, _object: &Object, _range: Range<u64>) -> Option<Vec<u8>> {
        None
    }

    /// Puts an object where none of its name is.
    ///
    /// # Errors
    /// If it cannot be written.
    fn put(&self, object: &Object, bytes: Vec<u8>) -> Result<Put, ObjectError>;

    /// Takes away an object that is damaged.
    ///
    /// # Errors
    /// If it cannot be taken away.
    fn remove(&self, object: &Object) -> Result<(), ObjectError>;
}
