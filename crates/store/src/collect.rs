//! Finding and removing what dead processes left: drafts without a builder, names without a snapshot.
//!
//! Nothing waits for this: a dead draft takes room and nothing else, and its name is free without it.

use crate::file::{At, Dir, FileError, TryLock};
use crate::layout::{Root, SnapshotId, SnapshotName};
use crate::names;
use rustix::fs::FlockOperation;

/// Whether to remove what is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only say what there is.
    Report,
    /// Remove it.
    Reclaim,
}

/// Something that a dead process left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A draft whose builder, or a removed snapshot whose remover, is dead.
    Draft {
        /// Its id.
        id: SnapshotId,
    },
    /// A name that leads nowhere.
    Name {
        /// The name.
        name: SnapshotName,
        /// Where it led.
        id: SnapshotId,
    },
}

/// Finds what dead processes left, and in [`Mode::Reclaim`] removes it; returns what was found.
///
/// # Errors
/// If something cannot be read or removed; what comes after it is left as it is.
pub fn collect(root: &Root, mode: Mode) -> Result<Vec<Leftover>, FileError> {
    let mut found = Vec::new();
    let dir = root.tmp();
    for entry in dir.read_dir().at("list", &dir)? {
        let entry = entry.at("list", &dir)?;
        let id = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // Whatever else stands there is none of ours.
        let Some(id) = id.filter(|_| entry.file_type().is_ok_and(|kind| kind.is_dir())) else {
            continue;
        };
        if collect_draft(root, id, mode)? {
            found.push(Leftover::Draft { id });
        }
    }
    names::dangling(root, |link| {
        found.push(Leftover::Name {
            name: link.name.clone(),
            id: link.id,
        });
        match mode {
            Mode::Report => Ok(()),
            Mode::Reclaim => names::remove(root, link),
        }
    })?;
    Ok(found)
}

fn collect_draft(root: &Root, id: SnapshotId, mode: Mode) -> Result<bool, FileError> {
    let path = root.draft(id);
    let draft = match Dir::open(path.clone()) {
        Err(error) if error.is_not_found() => return Ok(false),
        other => other?,
    };
    if draft.try_lock(FlockOperation::NonBlockingLockExclusive)? == TryLock::Held {
        return Ok(false);
    }
    // It may have been published between the look and the lock.
    if !draft.is_in_place()? {
        return Ok(false);
    }
    if mode == Mode::Reclaim {
        std::fs::remove_dir_all(&path).at("remove", &path)?;
    }
    Ok(true)
}
