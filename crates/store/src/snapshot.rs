//! A published snapshot.
//!
//! ```text
//! open    manifest, vmstate, pages: by BLAKE3   memory, disks, images: present and of the right size
//! verify  everything by BLAKE3                  (`verify.rs`)
//! lease   a shared lock on the directory: while anybody holds one, it is not removed
//! ```

use crate::digest::{self, Digest};
use crate::file::{Access, At, Dir, FileError, shared, size};
use crate::layout::{InvalidName, Root, SnapshotId, SnapshotName};
use crate::manifest::{
    Backing, DiskDigest, DiskRecord, FileRecord, Kind, MAX_SIZE, Manifest, ManifestError,
};
use crate::names::NameError;
use crate::pages::{LayerKind, PageKind, Pages, PagesError};
use crate::unit::ByteSize;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const VMSTATE: &str = "vmstate";
pub(crate) const MEMORY: &str = "memory";
pub(crate) const PAGES: &str = "pages";
pub(crate) const DISKS: &str = "disks";
pub(crate) const WORKING_SET: &str = "working-set";

/// A whole snapshot, whose small files were found right and whose large ones have the right size.
#[derive(Debug)]
pub struct Snapshot {
    id: SnapshotId,
    dir: Dir,
    manifest: Manifest,
    pages: Pages,
}

/// Keeps a snapshot from being removed, for as long as its descriptor or a copy of it is open anywhere.
///
/// The lock belongs to the open file, not to the process: handed to a child, it holds until both are gone. A child
/// that is not meant to have it still does between its fork and its exec.
#[derive(Debug)]
pub struct Lease {
    dir: Dir,
}

/// Why a snapshot cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// What was asked for is neither a name nor an id.
    #[error("{key:?} is no name of a snapshot")]
    InvalidKey {
        /// What was asked for.
        key: String,
        /// Why it is none.
        #[source]
        source: InvalidName,
    },
    /// There is no snapshot of that name.
    #[error("there is no snapshot named {name}")]
    NoSuchName {
        /// The name.
        name: SnapshotName,
    },
    /// The snapshot of that name is being made.
    #[error("the snapshot named {name} is still being made")]
    Building {
        /// The name.
        name: SnapshotName,
    },
    /// There is no snapshot with that id.
    #[error("there is no snapshot {id}")]
    NoSuchId {
        /// The id.
        id: SnapshotId,
    },
    /// The name cannot be read.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A file of the snapshot is missing, or is no regular file, or cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The manifest cannot be used.
    #[error("cannot use {}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// The manifest is that of another snapshot.
    #[error("the manifest in {} is that of snapshot {found}", path.display())]
    OtherId {
        /// The snapshot's directory.
        path: PathBuf,
        /// Whose manifest it is.
        found: SnapshotId,
    },
    /// A file was cut off, or grew.
    #[error("{} has {actual} bytes instead of {expected}", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What the manifest says.
        expected: ByteSize,
        /// What it has.
        actual: ByteSize,
    },
    /// A file's contents changed.
    #[error("{} was damaged: its contents are not those that the manifest records", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// A file that the guest reads was written to since.
    #[error(
        "{} was changed after the snapshot was taken, whose guest has parts of it in its memory; put back what it was, \
         with its time",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The `pages` file cannot be used.
    #[error("cannot use {}", path.display())]
    Pages {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PagesError,
    },
    /// The `pages` file describes something else than the manifest does.
    #[error("{} and the manifest describe different memories", path.display())]
    OtherMemory {
        /// The file.
        path: PathBuf,
    },
}

/// Why a snapshot could not be leased.
#[derive(Debug, Error)]
pub enum LeaseError {
    /// It was removed in the meantime.
    #[error("snapshot {id} was removed")]
    Removed {
        /// The snapshot.
        id: SnapshotId,
    },
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

impl Snapshot {
    /// Opens and checks the snapshot in `snapshots/<id>`.
    pub(crate) fn open(root: &Root, id: SnapshotId) -> Result<Self, OpenError> {
        match Dir::open(root.snapshot(id)) {
            Ok(dir) => Self::check(root, id, dir),
            Err(error) if error.is_not_found() => Err(OpenError::NoSuchId { id }),
            Err(error) => Err(error.into()),
        }
    }

    /// Checks the snapshot in the directory `dir`, wherever that is.
    pub(crate) fn check(root: &Root, id: SnapshotId, dir: Dir) -> Result<Self, OpenError> {
        let manifest = read_manifest(&dir)?;
        if manifest.id != id {
            return Err(OpenError::OtherId {
                path: dir.path().to_owned(),
                found: manifest.id,
            });
        }
        let snapshot = Self {
            pages: read_pages(&dir, &manifest)?,
            id,
            dir,
            manifest,
        };
        snapshot.open_sized(MEMORY, snapshot.manifest.files.memory.size)?;
        snapshot.check_contents(VMSTATE, snapshot.manifest.files.vmstate)?;
        snapshot.check_drives(root)?;
        Ok(snapshot)
    }

    /// What an [outline](crate::packed::Outline) was laid out as: it has no memory file.
    pub(crate) fn of_outline(dir: Dir, manifest: Manifest, pages: Pages) -> Self {
        Self {
            id: manifest.id,
            dir,
            manifest,
            pages,
        }
    }

    fn check_drives(&self, root: &Root) -> Result<(), OpenError> {
        for drive in &self.manifest.devices.drives {
            let (path, size, modified) = match &drive.backing {
                Backing::Layer { file, record } => {
                    self.open_sized(file, record.size)?;
                    continue;
                }
                Backing::Image {
                    name,
                    size,
                    modified,
                } => (name.path(root), size, modified),
                Backing::Host {
                    path,
                    size,
                    modified,
                } => (path.as_ref().to_owned(), size, modified),
            };
            let (found, changed) = shared(&path)?;
            check_size(&path, *size, found)?;
            if modified.is_some_and(|then| then != changed) {
                return Err(OpenError::Changed { path });
            }
        }
        Ok(())
    }

    /// Opens a file of the snapshot that has the recorded size.
    pub(crate) fn open_sized(
        &self,
        file: impl AsRef<Path>,
        size: ByteSize,
    ) -> Result<File, OpenError> {
        open_sized(&self.dir, file.as_ref(), size)
    }

    /// Reads a file of the snapshot, which must have the recorded size and digest.
    pub(crate) fn check_contents(
        &self,
        file: impl AsRef<Path>,
        record: FileRecord,
    ) -> Result<(), OpenError> {
        let whole = DiskRecord {
            size: record.size,
            digest: DiskDigest::Whole(record.blake3),
        };
        self.check_disk(file, whole)
    }

    /// Reads a disk of the snapshot, which must have the recorded size and digest.
    pub(crate) fn check_disk(
        &self,
        file: impl AsRef<Path>,
        DiskRecord { size, digest }: DiskRecord,
    ) -> Result<(), OpenError> {
        let path = self.dir.path().join(&file);
        let file = self.open_sized(file, size)?;
        let (found, recorded) = match digest {
            DiskDigest::Whole(recorded) => (digest::of_file(&file, size), recorded),
            DiskDigest::Data(recorded) => (digest::of_data(&file, size), recorded),
        };
        match found.at("read", &path)? == recorded {
            true => Ok(()),
            false => Err(OpenError::Damaged { path }),
        }
    }

    /// Its id.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What each page of its memory file is.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Firecracker's state file.
    pub fn vmstate_path(&self) -> PathBuf {
        self.dir().join(VMSTATE)
    }

    /// The memory file; that of a Diff is worth nothing without its parents.
    pub fn memory_path(&self) -> PathBuf {
        self.dir().join(MEMORY)
    }

    /// The memory file, open for reading: for a page server that has no rights of its own.
    ///
    /// # Errors
    /// If it is no longer there, or no longer a regular file.
    pub fn open_memory(&self) -> Result<File, FileError> {
        self.dir.open_file(MEMORY, Access::Read)
    }

    /// Where the pages are recorded that guests touch first; there is no such file until one was.
    ///
    /// The one file that changes after a snapshot is published: [`working_set`](crate::working_set).
    pub fn working_set_path(&self) -> PathBuf {
        self.dir().join(WORKING_SET)
    }

    /// How many bytes of it are neither zeros nor its parent's: pages of its memory, and blocks of its disks.
    pub fn data_size(&self) -> ByteSize {
        let memory = self.pages.count(PageKind::Data).bytes().get();
        let layers = self.manifest.layers();
        let disks = layers.filter_map(|(file, _)| self.dir().join(file).metadata().ok());
        let disks = disks.map(|disk| disk.blocks() * 512).sum::<u64>();
        ByteSize::new(memory + disks)
    }

    /// Keeps the snapshot from being removed. Waits while it is just being published or removed.
    ///
    /// # Errors
    /// [`LeaseError::Removed`] if it is gone.
    pub fn lease(&self) -> Result<Lease, LeaseError> {
        let removed = || LeaseError::Removed { id: self.id };
        let dir = match Dir::open(self.dir().to_owned()) {
            Err(error) if error.is_not_found() => return Err(removed()),
            other => other?,
        };
        dir.lock(FlockOperation::LockShared)?;
        // It may have been removed between the look and the lock.
        match dir.is_in_place()? {
            true => Ok(Lease { dir }),
            false => Err(removed()),
        }
    }

    pub(crate) fn handle(&self) -> &Dir {
        &self.dir
    }

    pub(crate) fn moved_to(&mut self, path: PathBuf) {
        self.dir.moved_to(path);
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Reads a manifest and nothing else.
pub(crate) fn read_manifest(dir: &Dir) -> Result<Manifest, OpenError> {
    let path = dir.path().join(MANIFEST);
    let file = dir.open_file(MANIFEST, Access::Read)?;
    let mut bytes = Vec::new();
    // One byte more than is allowed, so that too much is seen.
    file.take(MAX_SIZE.get() + 1)
        .read_to_end(&mut bytes)
        .at("read", &path)?;
    Manifest::parse(&bytes).map_err(|source| OpenError::Manifest { path, source })
}

fn read_pages(dir: &Dir, manifest: &Manifest) -> Result<Pages, OpenError> {
    let (path, record) = (dir.path().join(PAGES), manifest.files.pages);
    let file = open_sized(dir, Path::new(PAGES), record.size)?;
    let read = Pages::read(io::BufReader::new(file), record.size);
    let (pages, digest) = read.map_err(|source| OpenError::Pages {
        path: path.clone(),
        source,
    })?;
    let layer = match manifest.kind {
        Kind::Full => LayerKind::Full,
        Kind::Diff { .. } => LayerKind::Diff,
    };
    match digest {
        digest if digest != record.blake3 => Err(OpenError::Damaged { path }),
        _ if (pages.layer(), pages.memory_size()) != (layer, manifest.memory.size) => {
            Err(OpenError::OtherMemory { path })
        }
        _ => Ok(pages),
    }
}

fn open_sized(dir: &Dir, name: &Path, expected: ByteSize) -> Result<File, OpenError> {
    let path = dir.path().join(name);
    let file = dir.open_file(name, Access::Read)?;
    check_size(&path, expected, size(&file, &path)?)?;
    Ok(file)
}

fn check_size(path: &Path, expected: ByteSize, actual: ByteSize) -> Result<(), OpenError> {
    match expected == actual {
        true => Ok(()),
        false => Err(OpenError::Size {
            path: path.to_owned(),
            expected,
            actual,
        }),
    }
}

/// Records a file as it is now.
pub(crate) fn record(file: &File, path: &Path) -> Result<FileRecord, FileError> {
    let size = size(file, path)?;
    let blake3: Digest = digest::of_file(file, size).at("read", path)?;
    Ok(FileRecord { size, blake3 })
}

/// Records a disk as it is now.
pub(crate) fn record_disk(file: &File, path: &Path) -> Result<DiskRecord, FileError> {
    let size = size(file, path)?;
    let digest = DiskDigest::Data(digest::of_data(file, size).at("read", path)?);
    Ok(DiskRecord { size, digest })
}
