//! Making a snapshot of a packed one: its pages are written as they come, in any order, and then it is published.

use crate::file::{At, FileError, create_new};
use crate::layout::SnapshotName;
use crate::manifest::{DiskDigest, DiskRecord, FileRecord, Kind};
use crate::packed::index::{Extent, Index, Place};
use crate::pages::PagesError;
use crate::publish::{BeginError, Draft, PublishError};
use crate::seal;
use crate::snapshot::{
    Lease, LeaseError, OpenError, Snapshot, VMSTATE, WORKING_SET, record, record_disk,
};
use crate::store::Store;
use crate::unit::{PAGE_SIZE, index};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// A snapshot that is being made of a packed one; dropped before it is published, it is gone.
#[derive(Debug)]
pub struct Import {
    files: Files,
    draft: Draft,
    _parent: Option<Lease>,
}

/// The files of a snapshot that chunks are written to.
#[derive(Debug)]
pub(super) struct Files {
    index: Arc<Index>,
    // By stream; none for what is left out.
    files: Vec<Option<(File, PathBuf)>>,
    // Which pages a chunk is: by chunk.
    uses: Vec<Use>,
}

#[derive(Debug, Clone, Copy)]
struct Use {
    chunk: u32,
    stream: usize,
    extent: Extent,
    at: u16,
}

/// Why no snapshot was made of a packed one. Nothing is left of it then.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// It could not be begun.
    #[error(transparent)]
    Begin(#[from] BeginError),
    /// What it builds on is not here.
    #[error("the parent of the snapshot is not here")]
    Parent(#[source] OpenError),
    /// What it builds on was removed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A file of it could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its memory cannot be described.
    #[error("the memory cannot be described")]
    Pages(#[from] PagesError),
    /// A file has become another than the manifest records, though each chunk is right.
    #[error("{} is not what the manifest records: the index is damaged or lies", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
    },
    /// It could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Import {
    /// Begins a snapshot of what `index` describes, with its id, and with that name.
    ///
    /// # Errors
    /// [`ImportError::Begin`] if it is here already or its name is taken, [`ImportError::Parent`] if it is a Diff of
    /// one that is not here, [`ImportError::File`] if its files cannot be made.
    pub fn begin(
        store: &Store,
        index: Arc<Index>,
        name: Option<SnapshotName>,
    ) -> Result<Self, ImportError> {
        let parent = match index.manifest.kind {
            Kind::Full => None,
            Kind::Diff { parent } => {
                let parent = Snapshot::open(store.root(), parent).map_err(ImportError::Parent)?;
                Some(parent.lease()?)
            }
        };
        let draft = store.begin_copy(index.manifest.id, name)?;
        let disks = index.manifest.layers();
        let disks = disks.map(|(file, _)| draft.dir().join(file));
        let paths = std::iter::once(draft.memory_path()).chain(disks);
        let files = paths.zip(&index.streams).map(|(path, stream)| {
            let file = create_new(&path)?;
            file.set_len(stream.size.get()).at("write", &path)?;
            Ok(Some((file, path)))
        });
        let files = files.collect::<Result<_, FileError>>()?;
        Ok(Self {
            files: Files::new(index, files),
            draft,
            _parent: parent,
        })
    }

    /// Writes the pages of a chunk, which were proven, to wherever they belong.
    ///
    /// # Errors
    /// If a file cannot be written; [`FileError::NoSpace`] if the disk is full.
    pub fn write(&self, chunk: u32, raw: &[u8]) -> Result<(), FileError> {
        self.files.write(chunk, raw)
    }

    /// Publishes the snapshot, all of whose chunks were written.
    ///
    /// # Errors
    /// [`ImportError::Differs`] if memory or disks are not what the manifest records.
    pub fn publish(self) -> Result<Snapshot, ImportError> {
        let index = &self.files.index;
        let mut manifest = index.manifest.clone();
        let files = manifest.files;
        write_file(&self.draft.vmstate_path(), &index.vmstate)?;
        self.draft.seal_file(VMSTATE, record)?;
        if !index.working_set.is_empty() {
            write_file(&self.draft.dir().join(WORKING_SET), &index.working_set)?;
        }
        let (memory, path) = self.files.files[0].as_ref().expect("all have a file");
        let scanned = seal::read(memory, index.pages()?).at("read", path)?;
        let found = self.draft.seal_scanned(memory, scanned, &mut |_| {})?;
        same(path, &found.0, &files.memory)?;
        same(path, &found.1, &files.pages)?;
        for (file, recorded) in manifest.layers() {
            let found = match recorded.digest {
                DiskDigest::Whole(_) => {
                    let FileRecord { size, blake3 } =
                        self.draft.seal_file(file.as_str(), record)?;
                    let digest = DiskDigest::Whole(blake3);
                    DiskRecord { size, digest }
                }
                DiskDigest::Data(_) => self.draft.seal_file(file.as_str(), record_disk)?,
            };
            same(&self.draft.dir().join(file), &found, &recorded)?;
        }
        self.draft.sync_disks()?;
        manifest.name = self.draft.name().cloned();
        Ok(self.draft.place(&manifest, &mut |_| {})?)
    }
}

impl Files {
    /// Files for the streams of an index.
    pub(super) fn new(index: Arc<Index>, files: Vec<Option<(File, PathBuf)>>) -> Self {
        let uses = uses(&index);
        Self { index, files, uses }
    }

    /// The chunks that have something for them.
    pub(super) fn chunks(&self) -> Vec<u32> {
        let uses = self.uses.iter();
        let mut chunks: Vec<u32> = uses
            .filter(|one| self.files[one.stream].is_some())
            .map(|one| one.chunk)
            .collect();
        chunks.dedup();
        chunks
    }

    /// Writes the pages of a chunk, which were proven, to wherever they belong.
    ///
    /// # Errors
    /// If a file cannot be written; [`FileError::NoSpace`] if the disk is full.
    pub(super) fn write(&self, chunk: u32, raw: &[u8]) -> Result<(), FileError> {
        let from = self.uses.partition_point(|one| one.chunk < chunk);
        for one in self.uses[from..]
            .iter()
            .take_while(|one| one.chunk == chunk)
        {
            let Some((file, path)) = &self.files[one.stream] else {
                continue;
            };
            let start = index(u64::from(one.at) * PAGE_SIZE);
            let offset = one.extent.pages.first.offset().get();
            // A disk need not end with a page.
            let end = self.index.streams[one.stream].size.get();
            let len = one.extent.pages.count.bytes().get().min(end - offset);
            file.write_all_at(&raw[start..start + index(len)], offset)
                .at("write", path)?;
        }
        Ok(())
    }
}

fn uses(index: &Index) -> Vec<Use> {
    let mut uses = Vec::new();
    for (stream, extents) in index.streams.iter().map(|one| &one.extents).enumerate() {
        for &extent in extents {
            if let Place::Chunk { chunk, at } = extent.place {
                uses.push(Use {
                    chunk,
                    stream,
                    extent,
                    at,
                });
            }
        }
    }
    uses.sort_by_key(|one| one.chunk);
    uses
}

fn same<R: PartialEq>(path: &Path, found: &R, recorded: &R) -> Result<(), ImportError> {
    match found == recorded {
        true => Ok(()),
        false => Err(ImportError::Differs {
            path: path.to_owned(),
        }),
    }
}

pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    create_new(path)?.write_all(bytes).at("write", path)
}
