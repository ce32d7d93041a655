//! `pull`: what is not here of a snapshot in a repository, and of all that it builds on.

use crate::file::{FileError, shared};
use crate::flatten::MAX_LAYERS;
use crate::layout::{InvalidName, Root, SnapshotId, SnapshotName};
use crate::manifest::Backing;
use crate::packed::cache::Cache;
use crate::packed::fetch::{Fetch, FetchError};
use crate::packed::index::{Chunk, Index, MAX_INDEX};
use crate::packed::objects::Object;
use crate::packed::repository::{Counter, IndexFault, Report, Repository};
use crate::packed::unpack::{Import, ImportError};
use crate::publish::BeginError;
use crate::snapshot::OpenError;
use crate::store::Store;
use crate::unit::{ByteSize, length};
use std::sync::Arc;
use thiserror::Error;

/// What a pull did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The snapshot.
    pub id: SnapshotId,
    /// Its name here.
    pub name: Option<SnapshotName>,
    /// How many snapshots were made; the others were here.
    pub snapshots: usize,
}

/// Why a snapshot was not pulled. It is not here then, or all of it is.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PullError {
    /// There is no such snapshot.
    #[error("there is no snapshot {key} in {place}")]
    NoSuchSnapshot {
        /// What was asked for.
        key: String,
        /// The repository.
        place: String,
    },
    /// The name is there, and its snapshot is not.
    #[error(
        "{url} leads to the snapshot {id}, which is not there: the name is damaged, or that snapshot was removed by hand"
    )]
    Astray {
        /// The object with the name.
        url: String,
        /// What it leads to.
        id: SnapshotId,
    },
    /// What was asked for is neither a name nor an id.
    #[error("{key:?} is no name of a snapshot")]
    Key {
        /// What was asked for.
        key: String,
        /// Why not.
        #[source]
        source: InvalidName,
    },
    /// An index cannot be used.
    #[error(transparent)]
    Index(#[from] IndexFault),
    /// What it builds on does not end.
    #[error("snapshot {id} builds on more than {MAX_LAYERS} others, or on itself")]
    Endless {
        /// The snapshot.
        id: SnapshotId,
    },
    /// What it builds on is of another memory.
    #[error(
        "snapshot {id} has {actual} bytes of memory, and {tip}, which builds on it, {expected}"
    )]
    Memory {
        /// What it builds on.
        id: SnapshotId,
        /// The size of its memory.
        actual: ByteSize,
        /// The snapshot.
        tip: SnapshotId,
        /// The size of its memory.
        expected: ByteSize,
    },
    /// It takes too much to know where all its pages are.
    #[error(
        "the indexes of snapshot {id} and of what it builds on take more than {MAX_INDEX} bytes"
    )]
    TooLarge {
        /// The snapshot.
        id: SnapshotId,
    },
    /// Another snapshot here has the name.
    #[error(
        "the name {name} belongs to snapshot {owner} here; pull it under another one with --name"
    )]
    NameTaken {
        /// The name.
        name: SnapshotName,
        /// Whose it is.
        owner: SnapshotId,
    },
    /// It stands on a base image that is not here.
    #[error(
        "its drive {drive} is the base image {image} of {size} bytes, which must be here as it was, with its time: `cp -p`"
    )]
    NoImage {
        /// The drive.
        drive: String,
        /// The image.
        image: String,
        /// How large it must be, in bytes.
        size: u64,
    },
    /// The store here cannot be used.
    #[error(transparent)]
    Local(#[from] OpenError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A chunk cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// No snapshot can be made of it.
    #[error("cannot make snapshot {id}")]
    Import {
        /// The snapshot.
        id: SnapshotId,
        /// Why not.
        #[source]
        source: ImportError,
    },
}

impl Repository {
    /// Makes the snapshot that is called `key` there, by name or id, and all that it builds on, unless they are here.
    ///
    /// Without a `name` it gets the one that it has there. What a `cache` has is not fetched, and what is fetched stays in
    /// it, so that one that is killed goes on where it was.
    ///
    /// # Errors
    /// A [`PullError`].
    pub fn pull(
        &self,
        store: &Store,
        key: &str,
        name: Option<SnapshotName>,
        cache: Option<&Cache>,
        report: Report<'_>,
    ) -> Result<Pulled, PullError> {
        let (id, theirs) = self.resolve(key)?;
        let is_here = |id: SnapshotId| store.resolve(&id.to_string()).is_ok();
        let missing = self.chain(id, key, None, is_here)?;
        let name = name.or(theirs);
        let name = name.or_else(|| missing.last().and_then(|tip| tip.manifest().name.clone()));
        check_room(store, &missing, id, name.as_ref())?;
        let chunks = missing.iter().flat_map(|index| index.chunks());
        let counter = Counter::new(chunks.map(Chunk::raw_size).sum(), report);
        for index in &missing {
            let name = name.clone().filter(|_| index.manifest().id == id);
            self.pull_one(store, index, name, cache, &counter)?;
        }
        let tip = store.snapshot(&id.to_string())?;
        Ok(Pulled {
            id,
            name: tip.manifest().name.clone(),
            snapshots: missing.len(),
        })
    }

    pub(super) fn resolve(
        &self,
        key: &str,
    ) -> Result<(SnapshotId, Option<SnapshotName>), PullError> {
        if let Ok(id) = key.parse() {
            return Ok((id, None));
        }
        let name: SnapshotName = key.parse().map_err(|source| PullError::Key {
            key: key.to_owned(),
            source,
        })?;
        match self.named(&name)? {
            Some(id) => Ok((id, Some(name))),
            None => Err(self.no_such(key)),
        }
    }

    /// The indexes of a snapshot and what it builds on, the base first, but for what `is_here` and below.
    pub(super) fn chain(
        &self,
        tip: SnapshotId,
        key: &str,
        cache: Option<&Cache>,
        is_here: impl Fn(SnapshotId) -> bool,
    ) -> Result<Vec<Arc<Index>>, PullError> {
        let mut found: Vec<Arc<Index>> = Vec::new();
        let mut next = Some(tip);
        // As much as one index may have is enough for all.
        let mut left = MAX_INDEX.get();
        while let Some(id) = next {
            if is_here(id) {
                break;
            }
            if found.len() == MAX_LAYERS || found.iter().any(|index| index.manifest().id == id) {
                return Err(PullError::Endless { id: tip });
            }
            let index = match cache {
                Some(cache) => self.cached_index(id, cache)?,
                None => self.index(id)?,
            };
            let index = index.ok_or_else(|| match key.parse() {
                Ok(name) if id == tip && key != id.to_string() => PullError::Astray {
                    url: self.objects.url(&Object::Name(name)),
                    id,
                },
                _ => self.no_such(&id.to_string()),
            })?;
            let expected = found.first().map(|tip| tip.manifest().memory.size);
            let actual = index.manifest().memory.size;
            if let Some(expected) = expected
                && actual != expected
            {
                return Err(PullError::Memory {
                    id,
                    actual,
                    tip,
                    expected,
                });
            }
            left = left
                .checked_sub(index.size())
                .ok_or(PullError::TooLarge { id: tip })?;
            next = index.manifest().parent();
            found.push(Arc::new(index));
        }
        found.reverse();
        Ok(found)
    }

    fn pull_one(
        &self,
        store: &Store,
        index: &Arc<Index>,
        name: Option<SnapshotName>,
        cache: Option<&Cache>,
        counter: &Counter<'_>,
    ) -> Result<(), PullError> {
        let id = index.manifest().id;
        let wrong = |source| PullError::Import { id, source };
        let import = match Import::begin(store, index.clone(), name) {
            // Another process was faster.
            Err(ImportError::Begin(BeginError::Published { .. })) => return Ok(()),
            other => other.map_err(wrong)?,
        };
        let fetch = Fetch {
            objects: &*self.objects,
            cache,
        };
        fetch.all::<PullError>(index, &|number, raw| {
            import.write(number, raw)?;
            counter.add(length(raw.len()));
            Ok(())
        })?;
        import.publish().map(drop).map_err(wrong)
    }

    fn no_such(&self, key: &str) -> PullError {
        PullError::NoSuchSnapshot {
            key: key.to_owned(),
            place: self.objects.place(),
        }
    }
}

/// What can be refused before anything is made.
fn check_room(
    store: &Store,
    missing: &[Arc<Index>],
    id: SnapshotId,
    name: Option<&SnapshotName>,
) -> Result<(), PullError> {
    if let Some(name) = name
        && let Ok(owner) = store.resolve(name.as_str())
        && owner != id
    {
        return Err(PullError::NameTaken {
            name: name.clone(),
            owner,
        });
    }
    check_images(store.root(), missing)
}

/// The base images that snapshots stand on must be here.
pub(super) fn check_images(root: &Root, indexes: &[Arc<Index>]) -> Result<(), PullError> {
    let drives = indexes
        .iter()
        .flat_map(|index| &index.manifest().devices.drives);
    for drive in drives {
        let Backing::Image {
            name,
            size,
            modified,
        } = &drive.backing
        else {
            continue;
        };
        match shared(&name.path(root)) {
            Ok((found, then)) if found == *size && modified.is_none_or(|wanted| wanted == then) => {
            }
            Err(error) if !error.is_not_found() => return Err(error.into()),
            _ => {
                return Err(PullError::NoImage {
                    drive: drive.id.to_string(),
                    image: name.to_string(),
                    size: size.get(),
                });
            }
        }
    }
    Ok(())
}
