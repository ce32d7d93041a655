//! `push`: what a directory lacks of a snapshot, and of all that it builds on.

use crate::file::{At, FileError, open_regular, size};
use crate::layout::{SnapshotId, SnapshotName};
use crate::manifest::{Manifest, ManifestError};
use crate::packed::directory::{Directory, IndexFault, Progress, Put, Report, put_new};
use crate::packed::index::{Index, PackRef};
use crate::packed::pack::{KnownChunks, PackError, pack};
use crate::snapshot::{LeaseError, Snapshot};
use crate::store::{ChainError, Store};
use crate::unit::length;
use crate::verify::VerifyError;
use std::path::PathBuf;
use thiserror::Error;

/// What a push did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pushed {
    /// How many snapshots were written; the others were there.
    pub snapshots: usize,
    /// How many bytes were written.
    pub bytes: u64,
}

/// Why a snapshot was not pushed. It is not there then, or all of it is.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PushError {
    /// The snapshot, or one that it builds on, cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It was removed meanwhile.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Its contents are damaged.
    #[error("snapshot {id} is damaged, and is not sent")]
    Damaged {
        /// The snapshot.
        id: SnapshotId,
        /// Where.
        #[source]
        source: VerifyError,
    },
    /// It cannot be packed.
    #[error("cannot pack snapshot {id}")]
    Pack {
        /// The snapshot.
        id: SnapshotId,
        /// Why not.
        #[source]
        source: PackError<FileError>,
    },
    /// Its index cannot be written.
    #[error("cannot write the index of snapshot {id}")]
    Manifest {
        /// The snapshot.
        id: SnapshotId,
        /// Why not.
        #[source]
        source: ManifestError,
    },
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is there of this snapshot cannot be used.
    #[error(transparent)]
    Index(#[from] IndexFault),
    /// Another snapshot with that id is there.
    #[error("another snapshot with the id {id} is in {}", path.display())]
    Other {
        /// The id.
        id: SnapshotId,
        /// The directory.
        path: PathBuf,
    },
    /// Another snapshot has the name there.
    #[error("the name {name} is that of another snapshot in {}; push it under another one with --name", path.display())]
    NameTaken {
        /// The name.
        name: SnapshotName,
        /// The directory.
        path: PathBuf,
    },
}

impl Directory {
    /// Writes the snapshot `tip` and all that it builds on, and lets `name` lead to it there.
    ///
    /// Without a `name` it gets the one that it has here, if any.
    ///
    /// # Errors
    /// A [`PushError`].
    pub fn push(
        &self,
        store: &Store,
        tip: Snapshot,
        name: Option<SnapshotName>,
        report: Report<'_>,
    ) -> Result<Pushed, PushError> {
        let id = tip.id();
        let name = name.or_else(|| tip.manifest().name.clone());
        let _lease = tip.lease()?;
        let chain = store.chain(tip)?;
        for part in ["packs", "snapshots", "names"] {
            let path = self.path.join(part);
            std::fs::create_dir_all(&path).at("create", &path)?;
        }
        if let Some(name) = &name {
            self.check_name(name, id)?;
        }
        let mut known = KnownChunks::default();
        let mut missing = Vec::new();
        for snapshot in chain {
            match self.index(snapshot.id())? {
                Some(index) => {
                    self.check_same(snapshot.manifest(), index.manifest())?;
                    known.add(&index);
                }
                None => missing.push(snapshot),
            }
        }
        let total = missing
            .iter()
            .map(|snapshot| snapshot.data_size().get())
            .sum();
        let mut pushed = Pushed::default();
        let mut done = 0;
        for snapshot in missing {
            let told = |pages| {
                report(Progress {
                    done: done + pages,
                    total,
                })
            };
            let index = self.push_one(&snapshot, &known, &mut pushed, &told)?;
            known.add(&index);
            done += snapshot.data_size().get();
        }
        if let Some(name) = &name {
            put_new(&self.name(name), format!("{id}\n").as_bytes())?;
            self.check_name(name, id)?;
        }
        Ok(pushed)
    }

    fn push_one(
        &self,
        snapshot: &Snapshot,
        known: &KnownChunks,
        pushed: &mut Pushed,
        told: &dyn Fn(u64),
    ) -> Result<Index, PushError> {
        let id = snapshot.id();
        snapshot
            .verify()
            .map_err(|source| PushError::Damaged { id, source })?;
        let mut put = |pack: crate::packed::Pack| {
            if self.put_pack(pack.is, &pack.bytes)? == Put::New {
                pushed.bytes += u64::from(pack.is.size);
            }
            told(pack.pages_done.get());
            Ok(())
        };
        let index =
            pack(snapshot, known, &mut put).map_err(|source| PushError::Pack { id, source })?;
        let bytes = index
            .to_bytes()
            .map_err(|source| PushError::Manifest { id, source })?;
        // Whoever was faster wrote one that is as good.
        put_new(&self.snapshot(id), &bytes)?;
        pushed.snapshots += 1;
        pushed.bytes += length(bytes.len());
        Ok(index)
    }

    fn put_pack(&self, is: PackRef, bytes: &[u8]) -> Result<Put, FileError> {
        let path = self.pack(is);
        match open_regular(&path) {
            Ok(file) if size(&file, &path)?.get() == u64::from(is.size) => {
                return Ok(Put::WasThere);
            }
            // A disk lost a part of it.
            Ok(_) => std::fs::remove_file(&path).at("remove", &path)?,
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        put_new(&path, bytes)
    }

    fn check_name(&self, name: &SnapshotName, id: SnapshotId) -> Result<(), PushError> {
        match self.named(name)? {
            Some(owner) if owner != id => Err(PushError::NameTaken {
                name: name.clone(),
                path: self.path.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// The same snapshot, but for the name, which each place gives it.
    fn check_same(&self, ours: &Manifest, theirs: &Manifest) -> Result<(), PushError> {
        match (ours.files, ours.kind, &ours.devices) == (theirs.files, theirs.kind, &theirs.devices)
        {
            true => Ok(()),
            false => Err(PushError::Other {
                id: ours.id,
                path: self.path.clone(),
            }),
        }
    }
}
