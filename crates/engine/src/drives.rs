//! A VM's drives in its directory: `disks/ID` is its own copy, or a link to a file that all may read.
//!
//! Firecracker is told the relative path, so the same vmstate finds each copy's own file.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle_store::disk::copy_disk_while;
use rekindle_store::file::FileError;

use crate::jail::{Jail, JailError};
use crate::vm::config::{Access, Drive};
use crate::vm::dir::{DISKS, VmDir, disk_path};

/// Why a drive could not be put into a VM's directory.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// Copying it failed.
    #[error("cannot copy the drive {id}")]
    Copy {
        /// The drive.
        id: String,
        /// Why not.
        #[source]
        source: FileError,
    },
    /// It cannot be put into the jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The file system refused.
    #[error("cannot make {path}")]
    Io {
        /// What was to be made.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Where a drive's bytes come from, for one VM.
#[derive(Clone, Debug)]
pub(crate) struct DriveSource {
    pub(crate) id: String,
    pub(crate) file: PathBuf,
    pub(crate) access: Access,
}

impl From<&Drive> for DriveSource {
    fn from(drive: &Drive) -> Self {
        DriveSource {
            id: drive.id.clone(),
            file: drive.source.clone(),
            access: drive.access,
        }
    }
}

/// Puts the drives into the directory, unless that is given up meanwhile. Blocks while it copies.
pub(crate) fn prepare(
    dir: &VmDir,
    drives: &[DriveSource],
    given_up: &AtomicBool,
) -> Result<(), DriveError> {
    if drives.is_empty() {
        return Ok(());
    }
    let disks = dir.file(DISKS);
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&disks)
        .map_err(|source| DriveError::Io {
            path: disks,
            source,
        })?;
    let jail = Jail::of(dir)?;
    for drive in drives {
        let target = dir.disk(&drive.id);
        match drive.access {
            Access::OwnCopy => {
                let goes_on = || !given_up.load(Ordering::Relaxed);
                copy_disk_while(&drive.file, &target, &goes_on).map_err(|source| {
                    DriveError::Copy {
                        id: drive.id.clone(),
                        source,
                    }
                })?;
            }
            Access::ReadOnly => link(&drive.file, &target)?,
        }
        if let Some(jail) = &jail {
            let name = disk_path(&drive.id);
            let name = name.to_string_lossy();
            match drive.access {
                Access::OwnCopy => jail.give(&target, &name)?,
                Access::ReadOnly => jail.show(&target, &name)?,
            }
        }
    }
    Ok(())
}

fn link(file: &Path, target: &Path) -> Result<(), DriveError> {
    let io = |source| DriveError::Io {
        path: target.into(),
        source,
    };
    let file = std::path::absolute(file).map_err(io)?;
    std::os::unix::fs::symlink(file, target).map_err(io)
}
