//! Making a snapshot: built beside, made durable, renamed into place.
//!
//! ```text
//! begin    mkdir tmp/<id> ─ lock it ─ take the name
//!          Firecracker writes vmstate and memory, disks are copied
//! publish  scan memory ─ write pages ─ punch zeros ─ hash ─ write manifest ─ sync ─ read back
//!          ─ rename to snapshots/<id> ─ sync the directories
//! ```
//!
//! The rename is the only step that others see, and before it everything is durable. A builder that dies
//! earlier leaves a directory in `tmp/` without a lock, which [`collect`](crate::collect) removes.

use crate::disk::{Copied, copy_disk};
use crate::file::{Access, At, Dir, FileError, create_new, shared, size, sync_dir};
use crate::layout::{SnapshotId, SnapshotName};
use crate::manifest::field::DeviceId;
use crate::manifest::{
    Backing, BackingParts, Devices, Drive, DriveParts, FORMAT_VERSION, FileRecord, Files, Kind,
    Manifest, ManifestError, ManifestParts,
};
use crate::names::{self, NameError};
use crate::pages::{LayerKind, PagesError};
use crate::seal::{Scanned, punch_zeros, scan};
use crate::snapshot::{
    DISKS, Lease, LeaseError, MANIFEST, MEMORY, OpenError, PAGES, Snapshot, VMSTATE, record,
    record_disk,
};
use crate::sparse::{Holes, probe_holes};
use crate::store::{ChainError, Store};
use crate::unit::ByteSize;
use rustix::fs::{CWD, FlockOperation, Mode, RenameFlags, fchmod, fchown, fstat, renameat_with};
use std::fs::{DirBuilder, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A snapshot that is being made, in a directory of its own; dropped before it is published, it is gone.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    id: SnapshotId,
    name: Option<SnapshotName>,
    // Holds the exclusive lock, in `tmp/` and for a moment in `snapshots/`.
    dir: Dir,
    fate: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Discard,
    Keep,
}

/// What has just been done while publishing, in this order; for whoever shows progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The memory was read.
    Scanned,
    /// `pages` was written.
    PagesWritten,
    /// Zero pages of the memory were made holes.
    Punched,
    /// The other files were read.
    Hashed,
    /// `manifest.json` was written.
    ManifestWritten,
    /// All of it is durable, and was read back.
    Synced,
    /// It has its place: from here on it is a snapshot.
    Renamed,
    /// Its place is durable.
    Published,
}

impl Step {
    /// Every step, in order.
    pub const ALL: [Self; 8] = [
        Self::Scanned,
        Self::PagesWritten,
        Self::Punched,
        Self::Hashed,
        Self::ManifestWritten,
        Self::Synced,
        Self::Renamed,
        Self::Published,
    ];
}

/// Why no draft could be begun.
#[derive(Debug, Error)]
pub enum BeginError {
    /// The name cannot be had.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The directory could not be made.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel gave no random bytes for an id.
    #[error("cannot draw a random id")]
    Random(#[source] io::Error),
    /// A snapshot with that id is here already.
    #[error("snapshot {id} is here already")]
    Published {
        /// The snapshot.
        id: SnapshotId,
    },
}

/// Why a draft was not published. It is gone then.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PublishError {
    /// A file is missing, or cannot be read or written; [`FileError::NoSpace`] if the disk is full.
    #[error(transparent)]
    File(#[from] FileError),
    /// The memory file has not the size that the memory has.
    #[error("{} has {actual} bytes, and the memory {expected}", path.display())]
    MemorySize {
        /// The memory file.
        path: PathBuf,
        /// The size of the memory.
        expected: ByteSize,
        /// The size of the file.
        actual: ByteSize,
    },
    /// The memory file cannot be described.
    #[error("cannot describe {}", path.display())]
    Pages {
        /// The memory file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PagesError,
    },
    /// The file system does not tell which pages a Diff has.
    #[error("the file system of {} does not keep holes of 4 KiB, so a Diff cannot be told from zeros; take a Full snapshot", path.display())]
    CoarseHoles {
        /// The draft's directory.
        path: PathBuf,
    },
    /// The parent of a Diff cannot be used.
    #[error("the parent {id} cannot be used")]
    Parent {
        /// The parent.
        id: SnapshotId,
        /// Why.
        #[source]
        source: ChainError,
    },
    /// The parent of a Diff was removed.
    #[error("the parent was removed")]
    ParentGone(#[source] LeaseError),
    /// The parent of a Diff is of another memory.
    #[error("the parent {id} has {parent} bytes of memory, and this snapshot {this}")]
    ParentSize {
        /// The parent.
        id: SnapshotId,
        /// The size of its memory.
        parent: ByteSize,
        /// The size of this one's.
        this: ByteSize,
    },
    /// What the manifest would say cannot be so.
    #[error("the manifest would not be sound")]
    Manifest(#[from] ManifestError),
    /// What was written could not be read back.
    #[error("the snapshot could not be read back")]
    ReadBack(#[source] OpenError),
}

impl Store {
    /// Begins a snapshot, and takes its name.
    ///
    /// # Errors
    /// [`BeginError::Name`] if the name belongs to another snapshot, which it names; [`BeginError::File`] if the
    /// directory cannot be made.
    pub fn begin(&self, name: Option<SnapshotName>) -> Result<Draft, BeginError> {
        loop {
            let id = SnapshotId::random().map_err(BeginError::Random)?;
            let path = self.root().draft(id);
            DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .at("create", &path)?;
            if let Some(dir) = lock_draft(path)? {
                return self.draft(id, name, dir);
            }
        }
    }

    /// Begins a copy of a snapshot that was made elsewhere, under its own id, and takes its name.
    ///
    /// Waits for whoever is just making the same copy; what a dead one left of it is removed.
    pub(crate) fn begin_copy(
        &self,
        id: SnapshotId,
        name: Option<SnapshotName>,
    ) -> Result<Draft, BeginError> {
        let path = self.root().draft(id);
        loop {
            let made = DirBuilder::new().mode(0o700).create(&path);
            let is_new = match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                other => other.at("create", &path).map(|()| true)?,
            };
            let Some(dir) = lock_draft(path.clone())? else {
                continue;
            };
            // Under the lock: nobody else can publish it now.
            if self.root().snapshot(id).exists() {
                std::fs::remove_dir_all(&path).at("remove", &path)?;
                return Err(BeginError::Published { id });
            }
            if is_new {
                return self.draft(id, name, dir);
            }
            std::fs::remove_dir_all(&path).at("remove", &path)?;
        }
    }

    fn draft(
        &self,
        id: SnapshotId,
        name: Option<SnapshotName>,
        dir: Dir,
    ) -> Result<Draft, BeginError> {
        let draft = Draft {
            store: self.clone(),
            id,
            name,
            dir,
            fate: Fate::Discard,
        };
        let disks = draft.dir().join(DISKS);
        DirBuilder::new()
            .mode(0o700)
            .create(&disks)
            .at("create", &disks)?;
        if let Some(name) = &draft.name {
            names::reserve(self.root(), name, id)?;
        }
        Ok(draft)
    }
}

/// Locks a draft's directory; `None` if it is gone by then: a collector may find it before it is locked.
fn lock_draft(path: PathBuf) -> Result<Option<Dir>, FileError> {
    let dir = match Dir::open(path) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    dir.lock(FlockOperation::LockExclusive)?;
    Ok(dir.is_in_place()?.then_some(dir))
}

impl Draft {
    /// The id that the snapshot will have.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The directory that it is made in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where Firecracker is to write its state.
    pub fn vmstate_path(&self) -> PathBuf {
        self.dir().join(VMSTATE)
    }

    /// Where Firecracker is to write the memory.
    ///
    /// For a Diff the file must not exist before: what it has no data for counts as unchanged.
    pub fn memory_path(&self) -> PathBuf {
        self.dir().join(MEMORY)
    }

    /// Where the writable layer of a drive belongs.
    pub fn disk_path(&self, drive: &DeviceId) -> PathBuf {
        self.dir().join(DISKS).join(drive.as_str())
    }

    /// Copies the writable layer of a drive into the draft.
    ///
    /// # Errors
    /// As [`copy_disk`].
    pub fn copy_disk(&self, drive: &DeviceId, from: &Path) -> Result<Copied, FileError> {
        copy_disk(from, &self.disk_path(drive))
    }

    /// Seals the draft and makes it a snapshot.
    ///
    /// # Errors
    /// A [`PublishError`]; the draft is gone then, and everything else as it was.
    pub fn publish(self, parts: ManifestParts) -> Result<Snapshot, PublishError> {
        self.publish_with(parts, |_| {})
    }

    /// As [`Draft::publish`], telling `progress` what has been done.
    ///
    /// # Errors
    /// As [`Draft::publish`].
    pub fn publish_with(
        self,
        parts: ManifestParts,
        mut progress: impl FnMut(Step),
    ) -> Result<Snapshot, PublishError> {
        // Held until the end, so that the parent cannot go while nothing names it yet.
        let _parent = self.lease_parent(&parts)?;
        let manifest = self.seal(parts, &mut progress)?;
        self.place(&manifest, &mut progress)
    }

    /// Gives the draft, whose files are sealed, its manifest and its place.
    pub(crate) fn place(
        mut self,
        manifest: &Manifest,
        progress: &mut impl FnMut(Step),
    ) -> Result<Snapshot, PublishError> {
        self.write_manifest(manifest)?;
        progress(Step::ManifestWritten);
        self.dir.sync()?;
        let handle = Dir::open(self.dir().to_owned())?;
        let mut snapshot =
            Snapshot::check(self.store.root(), self.id, handle).map_err(PublishError::ReadBack)?;
        progress(Step::Synced);
        let place = self.store.root().snapshot(self.id);
        renameat_with(CWD, self.dir(), CWD, &place, RenameFlags::NOREPLACE)
            .at("publish", &place)?;
        self.dir.moved_to(place.clone());
        snapshot.moved_to(place);
        progress(Step::Renamed);
        let root = self.store.root();
        [root.snapshots(), root.tmp(), root.names()]
            .into_iter()
            .try_for_each(sync_dir)?;
        self.fate = Fate::Keep;
        progress(Step::Published);
        Ok(snapshot)
    }

    fn lease_parent(&self, parts: &ManifestParts) -> Result<Option<Lease>, PublishError> {
        let Kind::Diff { parent: id } = parts.kind else {
            return Ok(None);
        };
        let refuse = |source| PublishError::Parent { id, source };
        let parent = Snapshot::open(self.store.root(), id)
            .map_err(|source| refuse(ChainError::Open { id, source }))?;
        let lease = parent.lease().map_err(PublishError::ParentGone)?;
        let size = parent.manifest().memory.size;
        if size != parts.memory.size {
            return Err(PublishError::ParentSize {
                id,
                parent: size,
                this: parts.memory.size,
            });
        }
        self.store.chain_with_room(parent).map_err(refuse)?;
        match probe_holes(&self.dir().join("probe"))? {
            Holes::Exact => Ok(Some(lease)),
            Holes::Coarse => Err(PublishError::CoarseHoles {
                path: self.dir().to_owned(),
            }),
        }
    }

    fn seal(
        &self,
        parts: ManifestParts,
        progress: &mut impl FnMut(Step),
    ) -> Result<Manifest, PublishError> {
        let (memory, pages) = self.seal_memory(&parts, progress)?;
        let vmstate = self.seal_file(VMSTATE, record)?;
        let drives = parts
            .devices
            .drives
            .into_iter()
            .map(|drive| self.seal_drive(drive))
            .collect::<Result<_, _>>()?;
        self.sync_disks()?;
        progress(Step::Hashed);
        let Devices {
            interfaces,
            vsock,
            balloon,
            mmds,
            egress,
            ..
        } = parts.devices;
        Ok(Manifest {
            format_version: FORMAT_VERSION,
            id: self.id,
            name: self.name.clone(),
            kind: parts.kind,
            created: jiff::Timestamp::now(),
            firecracker: parts.firecracker,
            host: parts.host,
            machine: parts.machine,
            boot: parts.boot,
            devices: Devices {
                drives,
                interfaces,
                vsock,
                balloon,
                mmds,
                egress,
            },
            memory: parts.memory,
            files: Files {
                vmstate,
                memory,
                pages,
            },
            notes: parts.notes,
        })
    }

    fn seal_memory(
        &self,
        parts: &ManifestParts,
        progress: &mut impl FnMut(Step),
    ) -> Result<(FileRecord, FileRecord), PublishError> {
        let path = self.memory_path();
        let memory = self.dir.open_file(MEMORY, Access::Write)?;
        let (expected, actual) = (parts.memory.size, size(&memory, &path)?);
        if expected != actual {
            return Err(PublishError::MemorySize {
                path,
                expected,
                actual,
            });
        }
        let layer = match parts.kind {
            Kind::Full => LayerKind::Full,
            Kind::Diff { .. } => LayerKind::Diff,
        };
        let scanned =
            scan(&memory, layer, actual, &parts.removed).map_err(|source| PublishError::Pages {
                path: path.clone(),
                source,
            })?;
        self.seal_scanned(&memory, scanned, progress)
    }

    /// Writes what is known of the memory, and makes it durable; tells what is recorded of both.
    pub(crate) fn seal_scanned(
        &self,
        memory: &File,
        scanned: Scanned,
        progress: &mut impl FnMut(Step),
    ) -> Result<(FileRecord, FileRecord), PublishError> {
        let path = self.memory_path();
        progress(Step::Scanned);
        let pages_path = self.dir().join(PAGES);
        let mut out = BufWriter::new(create_new(&pages_path)?);
        let (size, blake3) = scanned
            .pages
            .write(&scanned.blocks, &mut out)
            .at("write", &pages_path)?;
        out.get_ref().sync_all().at("sync", &pages_path)?;
        progress(Step::PagesWritten);
        punch_zeros(memory, &scanned.pages).at("punch holes into", &path)?;
        own(memory, &path)?;
        memory.sync_all().at("sync", &path)?;
        progress(Step::Punched);
        Ok((
            FileRecord {
                size: scanned.pages.memory_size(),
                blake3: scanned.whole,
            },
            FileRecord { size, blake3 },
        ))
    }

    /// Makes a file durable, and records it.
    pub(crate) fn seal_file<R>(
        &self,
        name: &str,
        record: fn(&File, &Path) -> Result<R, FileError>,
    ) -> Result<R, FileError> {
        let path = self.dir().join(name);
        let file = self.dir.open_file(name, Access::Read)?;
        own(&file, &path)?;
        file.sync_all().at("sync", &path)?;
        record(&file, &path)
    }

    fn seal_drive(&self, parts: DriveParts) -> Result<Drive, PublishError> {
        let backing = match parts.backing {
            BackingParts::Layer => {
                let name = format!("{DISKS}/{}", parts.id);
                let record = self.seal_file(&name, record_disk)?;
                Backing::Layer {
                    file: name.parse().expect("a device id is a plain name"),
                    record,
                }
            }
            BackingParts::Image(name) => {
                let path = name.path(self.store.root());
                let (size, modified) = shared(&path)?;
                Backing::Image {
                    name,
                    size,
                    modified: Some(modified),
                }
            }
            BackingParts::Host(path) => {
                let (size, modified) = shared(path.as_ref())?;
                Backing::Host {
                    path,
                    size,
                    modified: Some(modified),
                }
            }
        };
        Ok(Drive {
            id: parts.id,
            path: parts.path,
            read_only: parts.read_only,
            root: parts.root,
            limits: parts.limits,
            backing,
        })
    }

    /// The name that the snapshot will have.
    pub(crate) fn name(&self) -> Option<&SnapshotName> {
        self.name.as_ref()
    }

    pub(crate) fn sync_disks(&self) -> Result<(), FileError> {
        sync_dir(self.dir().join(DISKS))
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), PublishError> {
        let bytes = manifest.to_bytes()?;
        let path = self.dir().join(MANIFEST);
        let mut file = create_new(&path)?;
        file.write_all(&bytes).at("write", &path)?;
        file.sync_all().at("sync", &path)?;
        Ok(())
    }

    fn discard(&self) -> Result<(), FileError> {
        let root = self.store.root();
        names::release(root, self.id)?;
        let draft = root.draft(self.id);
        if self.dir() != draft {
            // It has its place, but that could not be made durable: nobody was told of it, so it goes as it came.
            renameat_with(CWD, self.dir(), CWD, &draft, RenameFlags::NOREPLACE)
                .at("withdraw", self.dir())?;
        }
        std::fs::remove_dir_all(&draft).at("remove", &draft)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.fate == Fate::Discard {
            // What is left has no lock once this is over, and is collected.
            let _ = self.discard();
        }
    }
}

// A jailed Firecracker wrote it as another user, who must not be able to change it afterwards.
fn own(file: &File, path: &Path) -> Result<(), FileError> {
    let us = rustix::process::geteuid();
    if fstat(file).at("inspect", path)?.st_uid != us.as_raw() {
        fchown(file, Some(us), Some(rustix::process::getegid())).at("take over", path)?;
    }
    fchmod(file, Mode::RUSR | Mode::WUSR).at("protect", path)
}
