//! `push`: what a repository lacks of a snapshot, and of all that it builds on.
//!
//! ```text
//! pack ──one pack──► rendezvous ─┬─ put ─┐
//!                                ├─ put ─┼─► all there? ─► the index ─► … ─► the name
//!                                └─ put ─┘
//! ```
//!
//! No pack waits but the one that is handed over, so there are never more in memory than are put at once, and two.

use crate::layout::{SnapshotId, SnapshotName};
use crate::manifest::{Manifest, ManifestError};
use crate::packed::index::Index;
use crate::packed::objects::{Object, ObjectError, Put};
use crate::packed::pack::{KnownChunks, Pack, PackError, pack};
use crate::packed::repository::{Counter, IndexFault, Report, Repository};
use crate::snapshot::{LeaseError, Snapshot};
use crate::store::{ChainError, Store};
use crate::unit::length;
use crate::verify::VerifyError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
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
        source: PackError<Stopped>,
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
    /// An object cannot be put.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// What is there of this snapshot cannot be used.
    #[error(transparent)]
    Index(#[from] IndexFault),
    /// Another snapshot with that id is there.
    #[error("another snapshot with the id {id} is in {place}")]
    Other {
        /// The id.
        id: SnapshotId,
        /// The repository.
        place: String,
    },
    /// It was there once.
    #[error("{index} needs {pack}, which is lost; remove the first, and push again")]
    Lost {
        /// The index of the snapshot there.
        index: String,
        /// A pack that it needs.
        pack: String,
    },
    /// Another snapshot has the name there.
    #[error(
        "the name {name} is that of another snapshot in {place}; push it under another one with --name"
    )]
    NameTaken {
        /// The name.
        name: SnapshotName,
        /// The repository.
        place: String,
    },
}

impl Repository {
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
        self.objects.prepare()?;
        if let Some(name) = &name {
            self.check_name(name, id)?;
        }
        let mut known = KnownChunks::default();
        let mut missing = Vec::new();
        for snapshot in chain {
            match self.index(snapshot.id())? {
                Some(index) => {
                    self.check_same(snapshot.manifest(), index.manifest())?;
                    // What nobody can read is put again, and nothing is built on it.
                    match self.lost_pack(&index)? {
                        None => known.add(&index),
                        Some(_) => missing.push(snapshot),
                    }
                }
                None => missing.push(snapshot),
            }
        }
        let total = missing
            .iter()
            .map(|snapshot| snapshot.data_size().get())
            .sum();
        let mut pushed = Pushed::default();
        let counter = Counter::new(total, report);
        for snapshot in missing {
            let (index, bytes) = self.push_one(&snapshot, &known, &counter)?;
            known.add(&index);
            pushed.snapshots += 1;
            pushed.bytes += bytes;
        }
        if let Some(name) = &name {
            let object = Object::Name(name.clone());
            self.objects.put(&object, format!("{id}\n").into_bytes())?;
            self.check_name(name, id)?;
        }
        Ok(pushed)
    }

    /// Packs and puts a snapshot; tells how many bytes were put.
    fn push_one(
        &self,
        snapshot: &Snapshot,
        known: &KnownChunks,
        counter: &Counter<'_>,
    ) -> Result<(Index, u64), PushError> {
        let id = snapshot.id();
        snapshot
            .verify()
            .map_err(|source| PushError::Damaged { id, source })?;
        let (index, put) = self.put_packs(snapshot, known, counter)?;
        let bytes = index
            .to_bytes()
            .map_err(|source| PushError::Manifest { id, source })?;
        let size = length(bytes.len());
        if self.objects.put(&Object::Snapshot(id), bytes)? == Put::New {
            return Ok((index, put + size));
        }
        // Whoever was faster wrote one that is as good, unless its packs were lost since and are not those that were put now.
        let theirs = self.index(id)?.unwrap_or(index);
        match self.lost_pack(&theirs)? {
            None => Ok((theirs, put)),
            Some(pack) => Err(PushError::Lost {
                index: self.objects.url(&Object::Snapshot(id)),
                pack,
            }),
        }
    }

    /// One of the packs of an index that is not there, or cut off; `None` if there is none.
    fn lost_pack(&self, index: &Index) -> Result<Option<String>, ObjectError> {
        let next = AtomicUsize::new(0);
        let found = Mutex::new(Ok(None));
        let look = || {
            while let Some(pack) = index.packs().get(next.fetch_add(1, Ordering::Relaxed)) {
                let object = Object::Pack(pack.name);
                let lost = match self.objects.size(&object) {
                    Ok(size) if size == Some(pack.size.into()) => continue,
                    Ok(_) => Ok(Some(self.objects.url(&object))),
                    Err(error) => Err(error),
                };
                next.store(index.packs().len(), Ordering::Relaxed);
                *found.lock().expect("nobody panics with it") = lost;
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.objects.at_once().min(index.packs().len()) {
                scope.spawn(look);
            }
        });
        found.into_inner().expect("nobody panics with it")
    }

    /// Puts the packs while they are made.
    fn put_packs(
        &self,
        snapshot: &Snapshot,
        known: &KnownChunks,
        counter: &Counter<'_>,
    ) -> Result<(Index, u64), PushError> {
        let id = snapshot.id();
        let written = AtomicU64::new(0);
        let failure = Mutex::new(None);
        let (hand_over, packs) = mpsc::sync_channel::<(Pack, u64)>(0);
        let packs = Mutex::new(Some(packs));
        let next = || {
            let packs = packs.lock().expect("nobody panics with it");
            packs.as_ref()?.recv().ok()
        };
        let putter = || {
            while let Some((pack, pages)) = next() {
                match self.put_pack(pack) {
                    Ok(bytes) => {
                        written.fetch_add(bytes, Ordering::Relaxed);
                        counter.add(pages);
                    }
                    Err(error) => {
                        failure
                            .lock()
                            .expect("nobody panics with it")
                            .get_or_insert(error);
                        // Nobody takes what is handed over from now on.
                        packs.lock().expect("nobody panics with it").take();
                        return;
                    }
                }
            }
        };
        let packed = thread::scope(|scope| {
            for _ in 0..self.objects.at_once() {
                scope.spawn(putter);
            }
            let hand_over = hand_over;
            let mut before = 0;
            let mut put = |pack: Pack| {
                let pages = pack.pages_done.get() - before;
                before += pages;
                hand_over.send((pack, pages)).map_err(|_| Stopped)
            };
            pack(snapshot, known, &mut put)
        });
        if let Some(source) = failure.into_inner().expect("nobody panics with it") {
            return Err(source.into());
        }
        let index = packed.map_err(|source| PushError::Pack { id, source })?;
        Ok((index, written.into_inner()))
    }

    /// Tells how many bytes were put: none of a pack that was there.
    fn put_pack(&self, pack: Pack) -> Result<u64, ObjectError> {
        let (object, size) = (Object::Pack(pack.is.name), u64::from(pack.is.size));
        match self.objects.size(&object)? {
            Some(found) if found == size => return Ok(0),
            // A disk lost a part of it.
            Some(_) => self.objects.remove(&object)?,
            None => {}
        }
        match self.objects.put(&object, pack.bytes)? {
            Put::New => Ok(size),
            Put::WasThere => Ok(0),
        }
    }

    fn check_name(&self, name: &SnapshotName, id: SnapshotId) -> Result<(), PushError> {
        match self.named(name)? {
            Some(owner) if owner != id => Err(PushError::NameTaken {
                name: name.clone(),
                place: self.objects.place(),
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
                place: self.objects.place(),
            }),
        }
    }
}

/// A pack could not be put, for a reason that is told elsewhere.
#[derive(Debug, Error)]
#[error("putting packs has stopped")]
pub struct Stopped;
