//! All snapshots of a state directory.

use crate::file::{At, Dir, FileError, TryLock, sync_dir};
use crate::flatten::MAX_LAYERS;
use crate::layout::{Root, SnapshotId, SnapshotName};
use crate::manifest::ManifestError;
use crate::names::{self, Presence};
use crate::snapshot::{OpenError, Snapshot, read_manifest};
use rustix::fs::{CWD, FlockOperation, RenameFlags, renameat_with};
use std::path::PathBuf;
use thiserror::Error;

/// The snapshots of a state directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: Root,
}

/// An entry of a list of snapshots.
#[derive(Debug)]
pub enum Listed {
    /// A snapshot that can be used.
    Whole(Box<Snapshot>),
    /// One that cannot.
    Broken(Broken),
}

/// A snapshot that cannot be used.
#[derive(Debug)]
pub struct Broken {
    /// Its id.
    pub id: SnapshotId,
    /// The name that leads to it, if any.
    pub name: Option<SnapshotName>,
    /// Its directory.
    pub dir: PathBuf,
    /// What is wrong with it.
    pub reason: OpenError,
}

/// Why a snapshot was not removed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// There is no snapshot with that id.
    #[error("there is no snapshot {id}")]
    NoSuchId {
        /// The id.
        id: SnapshotId,
    },
    /// A VM uses it, or it is just being published.
    #[error("snapshot {id} is in use by a VM")]
    InUse {
        /// The snapshot.
        id: SnapshotId,
    },
    /// A Diff needs it.
    #[error(
        "snapshot {id} is the parent of {}; flatten that to keep it without its parents, or remove it first",
        list(children)
    )]
    HasChildren {
        /// The snapshot.
        id: SnapshotId,
        /// The Diffs that need it.
        children: Vec<SnapshotId>,
    },
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a chain cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A snapshot of it cannot be used, or is missing.
    #[error("snapshot {id} of the chain cannot be used")]
    Open {
        /// The snapshot.
        id: SnapshotId,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// A snapshot is its own ancestor.
    #[error("snapshot {id} is its own ancestor")]
    Cycle {
        /// The snapshot.
        id: SnapshotId,
    },
    /// It is longer than any chain that is read.
    #[error("the chain is longer than {MAX_LAYERS} snapshots; flatten it")]
    TooLong,
}

fn list(ids: &[SnapshotId]) -> String {
    ids.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

impl Store {
    /// The store of a state directory.
    pub fn open(root: Root) -> Self {
        Self { root }
    }

    /// The state directory.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The id behind a name or an id; whether the snapshot is whole is not looked at.
    ///
    /// # Errors
    /// [`OpenError::NoSuchName`], [`OpenError::NoSuchId`], [`OpenError::Building`] and [`OpenError::InvalidKey`].
    pub fn resolve(&self, key: &str) -> Result<SnapshotId, OpenError> {
        if let Ok(id) = key.parse() {
            return match names::presence(&self.root, id)? {
                Presence::Published => Ok(id),
                Presence::Building | Presence::Gone => Err(OpenError::NoSuchId { id }),
            };
        }
        let parsed = key.parse::<SnapshotName>();
        let name = parsed.map_err(|source| OpenError::InvalidKey {
            key: key.to_owned(),
            source,
        })?;
        let Some(id) = names::target(&self.root, &name)? else {
            return Err(OpenError::NoSuchName { name });
        };
        match names::presence(&self.root, id)? {
            Presence::Published => Ok(id),
            Presence::Building => Err(OpenError::Building { name }),
            Presence::Gone => Err(OpenError::NoSuchName { name }),
        }
    }

    /// The snapshot of that name or id, its small files checked whole, its large ones by their size.
    ///
    /// # Errors
    /// An [`OpenError`] that names what is missing or wrong.
    pub fn snapshot(&self, key: &str) -> Result<Snapshot, OpenError> {
        Snapshot::open(&self.root, self.resolve(key)?)
    }

    /// All snapshots, oldest first; broken ones last, with what is wrong with them.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, FileError> {
        let links = names::links(&self.root)?;
        let (mut whole, mut broken) = (Vec::new(), Vec::new());
        for id in self.ids()? {
            match Snapshot::open(&self.root, id) {
                Ok(snapshot) => whole.push(Box::new(snapshot)),
                // Removed since.
                Err(_) if names::presence(&self.root, id)? != Presence::Published => {}
                Err(reason) => {
                    let name = links
                        .iter()
                        .find(|link| link.id == id)
                        .map(|link| link.name.clone());
                    broken.push(Broken {
                        id,
                        name,
                        dir: self.root.snapshot(id),
                        reason,
                    });
                }
            }
        }
        whole.sort_by_key(|snapshot| (snapshot.manifest().created, snapshot.id()));
        broken.sort_by_key(|broken| broken.id);
        Ok(whole
            .into_iter()
            .map(Listed::Whole)
            .chain(broken.into_iter().map(Listed::Broken))
            .collect())
    }

    fn ids(&self) -> Result<Vec<SnapshotId>, FileError> {
        let dir = self.root.snapshots();
        let mut ids = Vec::new();
        for entry in dir.read_dir().at("list", &dir)? {
            // Whatever else stands there is none of ours.
            let name = entry.at("list", &dir)?.file_name();
            ids.extend(
                name.to_str()
                    .and_then(|name| name.parse::<SnapshotId>().ok()),
            );
        }
        Ok(ids)
    }

    /// The chain that ends in a snapshot, its base first.
    ///
    /// While the last one is leased, none of them can be removed.
    ///
    /// # Errors
    /// A [`ChainError`] if one of them is missing or broken, or there is no end to them.
    pub fn chain(&self, tip: Snapshot) -> Result<Vec<Snapshot>, ChainError> {
        let mut chain = vec![tip];
        while let Some(id) = chain.last().and_then(|last| last.manifest().parent()) {
            if chain.iter().any(|snapshot| snapshot.id() == id) {
                return Err(ChainError::Cycle { id });
            }
            if chain.len() == MAX_LAYERS {
                return Err(ChainError::TooLong);
            }
            chain.push(
                Snapshot::open(&self.root, id).map_err(|source| ChainError::Open { id, source })?,
            );
        }
        chain.reverse();
        Ok(chain)
    }

    /// Checks that a Diff can stand on the chain that ends in `tip`.
    pub(crate) fn chain_with_room(&self, tip: Snapshot) -> Result<(), ChainError> {
        match self.chain(tip)?.len() < MAX_LAYERS {
            true => Ok(()),
            false => Err(ChainError::TooLong),
        }
    }

    /// Removes a snapshot, broken or not, and frees its name.
    ///
    /// # Errors
    /// [`RemoveError::InUse`] while anybody holds a lease on it, [`RemoveError::HasChildren`] while a Diff names it
    /// as its parent.
    pub fn remove(&self, id: SnapshotId) -> Result<(), RemoveError> {
        let (place, grave) = (self.root.snapshot(id), self.root.draft(id));
        let dir = match Dir::open(place.clone()) {
            Err(error) if error.is_not_found() => return Err(RemoveError::NoSuchId { id }),
            other => other?,
        };
        if dir.try_lock(FlockOperation::NonBlockingLockExclusive)? == TryLock::Held {
            return Err(RemoveError::InUse { id });
        }
        if !dir.is_in_place()? {
            return Err(RemoveError::NoSuchId { id });
        }
        // A Diff that is being published holds a lease on its parent until it can be found here.
        let children = self.children(id)?;
        if !children.is_empty() {
            return Err(RemoveError::HasChildren { id, children });
        }
        renameat_with(CWD, &place, CWD, &grave, RenameFlags::NOREPLACE).at("remove", &place)?;
        // Durable before the first file goes, or a power cut could bring half of it back.
        [self.root.snapshots(), self.root.tmp()]
            .into_iter()
            .try_for_each(sync_dir)?;
        names::release(&self.root, id)?;
        Ok(std::fs::remove_dir_all(&grave).at("remove", &grave)?)
    }

    fn children(&self, parent: SnapshotId) -> Result<Vec<SnapshotId>, FileError> {
        let mut children = Vec::new();
        for id in self.ids()? {
            let read = Dir::open(self.root.snapshot(id)).map(|dir| read_manifest(&dir));
            let needs_it = match read {
                Ok(Ok(manifest)) => manifest.parent() == Some(parent),
                // Of a later program, whose manifests this one cannot read: it may be anybody's child.
                Ok(Err(OpenError::Manifest {
                    source: ManifestError::Future { .. },
                    ..
                })) => true,
                // One without a sound manifest cannot be restored with or without its parent.
                Ok(Err(_)) | Err(_) => false,
            };
            if needs_it {
                children.push(id);
            }
        }
        Ok(children)
    }
}
