//! Removing names of images, and contents that nobody needs.

use super::build::lock;
use super::{FindError, ImageName, Named, list, named, record};
use crate::file::{At, Dir, FileError};
use crate::layout::{Root, SnapshotId};
use crate::manifest::{Backing, Manifest, ManifestError};
use crate::snapshot::{OpenError, read_manifest};
use crate::store::{Listed, Store};
use rustix::fs::{FlockOperation, flock};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use thiserror::Error;

pub use crate::collect::Mode;

/// Who needs the contents of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// A VM, of that name.
    Vm(String),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// Says who needs contents.
pub type Users<'a> = dyn Fn(&ImageName) -> Result<Vec<User>, FileError> + 'a;

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(name) => write!(f, "the VM {name}"),
            Self::Snapshot(id) => write!(f, "the snapshot {id}"),
        }
    }
}

/// Why an image was not removed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// The name leads to nothing.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Somebody needs it.
    #[error("the image {name} is needed by {}", words(users))]
    InUse {
        /// The image.
        name: ImageName,
        /// Who needs it.
        users: Vec<User>,
    },
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

fn words(users: &[User]) -> String {
    let words: Vec<_> = users.iter().map(User::to_string).collect();
    words.join(", ")
}

/// Removes a name, and if it was the last one, the contents; `users` says who needs contents.
///
/// # Errors
/// [`RemoveError::InUse`] if the contents would go and somebody needs them; nothing is changed then.
pub fn remove(root: &Root, name: &ImageName, users: &Users<'_>) -> Result<(), RemoveError> {
    let _lock = lock(root)?;
    let contents = match named(root, name) {
        Ok(Named { image, .. }) => Some(image.name),
        // A name of nothing can go.
        Err(FindError::Record { .. } | FindError::Gone { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let contents = contents.filter(|contents| {
        let others = list(root).into_iter().flatten();
        let mut others = others.filter(|other| other.name != *name);
        !others.any(|other| other.found.is_ok_and(|other| other.image.name == *contents))
    });
    if let Some(contents) = &contents {
        let users = users(contents)?;
        if !users.is_empty() {
            let name = name.clone();
            return Err(RemoveError::InUse { name, users });
        }
    }
    remove_file(&record::path(root, name))?;
    if let Some(contents) = contents {
        remove_file(&contents.path(root))?;
    }
    Ok(())
}

/// Finds contents that no name leads to and nobody needs, and what dead builders left; in [`Mode::Reclaim`] removes
/// them. Returns their files.
///
/// # Errors
/// If something cannot be read or removed; what comes after it is left as it is.
pub fn collect(root: &Root, mode: Mode, users: &Users<'_>) -> Result<Vec<PathBuf>, FileError> {
    let _lock = lock(root)?;
    let mut found = dead_drafts(root)?;
    for contents in nameless(root)? {
        if users(&contents)?.is_empty() {
            found.push(contents.path(root));
        }
    }
    if mode == Mode::Reclaim {
        found.iter().try_for_each(|path| remove_file(path))?;
    }
    Ok(found)
}

/// Contents that no name leads to and that stay, and who needs them.
///
/// # Errors
/// If something cannot be read.
pub fn nameless_in_use(
    root: &Root,
    users: &Users<'_>,
) -> Result<Vec<(ImageName, Vec<User>)>, FileError> {
    let _lock = lock(root)?;
    let mut kept = Vec::new();
    for contents in nameless(root)? {
        let users = users(&contents)?;
        if !users.is_empty() {
            kept.push((contents, users));
        }
    }
    Ok(kept)
}

/// Contents that no name leads to.
fn nameless(root: &Root) -> Result<Vec<ImageName>, FileError> {
    let named: Vec<ImageName> = list(root)?
        .into_iter()
        .filter_map(|listed| Some(listed.found.ok()?.image.name))
        .collect();
    let dir = root.images();
    let mut nameless = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let path = entry.at("list", &dir)?.path();
        let contents = stem(&path).and_then(|stem| stem.parse::<ImageName>().ok());
        nameless.extend(contents.filter(|name| name.digest().is_some() && !named.contains(name)));
    }
    Ok(nameless)
}

/// The snapshots that need those contents.
///
/// # Errors
/// If the snapshots cannot be listed.
pub fn snapshots_on(store: &Store, contents: &ImageName) -> Result<Vec<SnapshotId>, FileError> {
    let mut needing = Vec::new();
    for listed in store.list()? {
        let id = match &listed {
            Listed::Whole(snapshot) => snapshot.id(),
            Listed::Broken(broken) => broken.id,
        };
        let is_on = |manifest: &Manifest| {
            let drives = &manifest.devices.drives;
            drives.iter().any(
                |drive| matches!(&drive.backing, Backing::Image { name, .. } if name == contents),
            )
        };
        let needs = match listed {
            Listed::Whole(snapshot) => is_on(snapshot.manifest()),
            // Without its image, say, or of a program that knows more about images than this one.
            Listed::Broken(broken) => match read_manifest(&Dir::open(broken.dir)?) {
                Ok(manifest) => is_on(&manifest),
                Err(OpenError::Manifest { source, .. }) => {
                    matches!(source, ManifestError::Future { .. })
                }
                Err(_) => false,
            },
        };
        if needs {
            needing.push(id);
        }
    }
    Ok(needing)
}

/// Files in `tmp` that nobody holds a lock on.
fn dead_drafts(root: &Root) -> Result<Vec<PathBuf>, FileError> {
    let dir = root.tmp();
    let mut dead = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let path = entry.at("list", &dir)?.path();
        if stem(&path).is_none_or(|stem| stem.parse::<SnapshotId>().is_err()) {
            continue;
        }
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            dead.push(path);
        }
    }
    Ok(dead)
}

/// The name of an `.ext4` file without that.
fn stem(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_suffix(".ext4")
}

fn remove_file(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}
