//! Names of snapshots: symbolic links `names/<name>` to `../snapshots/<id>`.
//!
//! A name is taken before the snapshot is made, so that two cannot be made under it. It is free again once
//! its snapshot is gone, or was never finished and its builder is dead; nobody has to clean up first.
//! Changes happen under a lock on `names/`, looking up needs none.

use crate::file::{At, Dir, FileError, TryLock};
use crate::layout::{Root, SnapshotId, SnapshotName};
use rustix::fs::FlockOperation;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// What is behind a name, or an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// A published snapshot.
    Published,
    /// One that is being made, or removed, by a process that lives.
    Building,
    /// Nothing.
    Gone,
}

/// How often, and how long, a name is waited for whose draft may just be being collected.
const COLLECTING_TRIES: u32 = 20;
const COLLECTING_PAUSE: Duration = Duration::from_millis(10);

/// Why a name could not be read or taken.
#[derive(Debug, Error)]
pub enum NameError {
    /// A snapshot has it.
    #[error("the name {name} belongs to snapshot {owner}")]
    Taken {
        /// The name.
        name: SnapshotName,
        /// The snapshot.
        owner: SnapshotId,
    },
    /// A snapshot that is being made has it.
    #[error("the name {name} is reserved for snapshot {owner}, which is being made")]
    Reserved {
        /// The name.
        name: SnapshotName,
        /// The snapshot.
        owner: SnapshotId,
    },
    /// What stands in `names/` is no link to a snapshot.
    #[error("{} is no link to a snapshot", path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
    },
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A link in `names/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: SnapshotName,
    pub(crate) id: SnapshotId,
}

/// The snapshot that a name leads to, whether or not it is there.
pub(crate) fn target(root: &Root, name: &SnapshotName) -> Result<Option<SnapshotId>, NameError> {
    let path = root.name(name);
    match path.read_link() {
        Ok(target) => parse_target(&target)
            .map(Some)
            .ok_or(NameError::Foreign { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Not a link.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(NameError::Foreign { path })
        }
        Err(error) => Ok(Err(error).at("read", &path)?),
    }
}

fn parse_target(target: &Path) -> Option<SnapshotId> {
    target.to_str()?.strip_prefix("../snapshots/")?.parse().ok()
}

/// All links to snapshots; what else is in `names/` is left out.
pub(crate) fn links(root: &Root) -> Result<Vec<Link>, FileError> {
    let dir = root.names();
    let mut links = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let file_name = entry.at("list", &dir)?.file_name();
        let Some(name) = file_name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match target(root, &name) {
            Ok(Some(id)) => links.push(Link { name, id }),
            Ok(None)
            | Err(
                NameError::Foreign { .. } | NameError::Taken { .. } | NameError::Reserved { .. },
            ) => {}
            Err(NameError::File(error)) => return Err(error),
        }
    }
    links.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(links)
}

/// Takes a name for a draft that is locked by its builder already.
///
/// A dead draft is locked for a moment by who collects it, and looks like one that is being made: such a name is
/// tried again before it is refused.
pub(crate) fn reserve(root: &Root, name: &SnapshotName, id: SnapshotId) -> Result<(), NameError> {
    for _ in 0..COLLECTING_TRIES {
        match try_reserve(root, name, id) {
            Err(NameError::Reserved { .. }) => std::thread::sleep(COLLECTING_PAUSE),
            done => return done,
        }
    }
    try_reserve(root, name, id)
}

fn try_reserve(root: &Root, name: &SnapshotName, id: SnapshotId) -> Result<(), NameError> {
    let _lock = lock(root)?;
    let path = root.name(name);
    if let Some(owner) = target(root, name)? {
        // Whoever was copying the same snapshot died, and the draft is ours now.
        if owner == id {
            return Ok(());
        }
        let name = name.clone();
        match presence(root, owner)? {
            Presence::Published => return Err(NameError::Taken { name, owner }),
            Presence::Building => return Err(NameError::Reserved { name, owner }),
            Presence::Gone => std::fs::remove_file(&path).at("remove", &path)?,
        }
    }
    Ok(symlink(format!("../snapshots/{id}"), &path).at("create", &path)?)
}

/// Frees all names of a snapshot.
pub(crate) fn release(root: &Root, id: SnapshotId) -> Result<(), FileError> {
    let _lock = lock(root)?;
    for link in links(root)?.into_iter().filter(|link| link.id == id) {
        remove(root, &link)?;
    }
    Ok(())
}

/// The links to nothing; `found` is called for each while no name can change.
pub(crate) fn dangling(
    root: &Root,
    mut found: impl FnMut(&Link) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let _lock = lock(root)?;
    for link in links(root)? {
        if presence(root, link.id)? == Presence::Gone {
            found(&link)?;
        }
    }
    Ok(())
}

/// Frees one name, under the lock.
pub(crate) fn remove(root: &Root, link: &Link) -> Result<(), FileError> {
    let path = root.name(&link.name);
    std::fs::remove_file(&path).at("remove", &path)
}

/// What there is of a snapshot.
pub(crate) fn presence(root: &Root, id: SnapshotId) -> Result<Presence, FileError> {
    // First the draft, then the snapshot: one that is published in between is found by the second look.
    let is_made = match Dir::open(root.draft(id)) {
        Ok(draft) => draft.try_lock(FlockOperation::NonBlockingLockShared)? == TryLock::Held,
        Err(error) if error.is_not_found() => false,
        Err(error) => return Err(error),
    };
    match root.snapshot(id).symlink_metadata() {
        // Whoever pulls the same may make a draft of it still, before he finds out.
        Ok(_) => Ok(Presence::Published),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(match is_made {
            true => Presence::Building,
            false => Presence::Gone,
        }),
        Err(error) => Err(error).at("inspect", &root.snapshot(id)),
    }
}

fn lock(root: &Root) -> Result<Dir, FileError> {
    let dir = Dir::open(root.names())?;
    dir.lock(FlockOperation::LockExclusive)?;
    Ok(dir)
}
