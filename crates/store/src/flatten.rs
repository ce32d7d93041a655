//! A chain of snapshots as one memory.
//!
//! ```text
//! page           0     1     2     3
//! tip   (Diff)   data  =     =     zero
//! base  (Full)   data  data  zero  data
//! Flat           tip   base  zero  zero
//! ```
//!
//! A page server resolves it when it opens a chain ([`Flat`]); [`Store::flatten`] makes a snapshot of it that needs
//! none of the others.

use crate::disk::copy_disk;
use crate::file::{At, FileError, create_new};
use crate::layout::{SnapshotId, SnapshotName};
use crate::manifest::{
    Backing, BackingParts, Devices, Drive, DriveParts, Kind, Manifest, ManifestParts,
};
use crate::pages::{LayerKind, PageKind, Pages};
use crate::publish::{BeginError, Draft, PublishError, Step};
use crate::snapshot::{LeaseError, Snapshot, WORKING_SET};
use crate::sparse::copy_range;
use crate::store::{ChainError, Store};
use crate::unit::{ByteSize, PageCount, PageNumber, index, length};
use crate::verify::VerifyError;
use std::borrow::Borrow;
use std::path::Path;
use thiserror::Error;

/// The longest chain that is read.
pub const MAX_LAYERS: usize = 128;

/// Which memory file of a chain, the base being 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerIndex(u8);

/// Where a page of a chain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Nowhere: it is all zeros.
    Zero,
    /// In the memory file of that layer, at the page's own offset.
    Layer(LayerIndex),
}

/// Pages with one source that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlatRun {
    /// The first of them.
    pub first: PageNumber,
    /// How many they are.
    pub count: PageCount,
    /// Where they are.
    pub source: Source,
}

/// For each page of a chain, which layer has it; resolved once, a byte a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flat {
    memory: ByteSize,
    // 0 is zero, n + 1 is layer n.
    sources: Vec<u8>,
}

/// Why layers are no chain.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FlatError {
    /// There is no layer.
    #[error("a chain has at least one snapshot")]
    Empty,
    /// There are too many.
    #[error(
        "a chain of {layers} snapshots is longer than the {MAX_LAYERS} that are read; flatten it"
    )]
    TooLong {
        /// How many there are.
        layers: usize,
    },
    /// The base leaves pages to a parent, or a later layer does not.
    #[error("layer {layer} of the chain is of the wrong kind: a Full is followed by Diffs alone")]
    Kind {
        /// Its index, from the base.
        layer: usize,
    },
    /// The layers are of different memories.
    #[error("layer {layer} of the chain has {actual} bytes of memory, and its parent {expected}")]
    Size {
        /// Its index, from the base.
        layer: usize,
        /// The size of its parent.
        expected: ByteSize,
        /// Its size.
        actual: ByteSize,
    },
}

/// Why a chain could not be written as one file.
#[derive(Debug, Error)]
pub enum FlattenError {
    /// The snapshots are no chain.
    #[error(transparent)]
    Chain(#[from] FlatError),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why no Full snapshot was made of a chain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FlattenSnapshotError {
    /// It stands alone already.
    #[error("snapshot {id} is a Full snapshot and builds on no other")]
    Flat {
        /// The snapshot.
        id: SnapshotId,
    },
    /// A snapshot of the chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It was removed meanwhile.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A snapshot of the chain is damaged, and the damage would get a checksum of its own.
    #[error("snapshot {id} of the chain is damaged")]
    Damaged {
        /// The snapshot.
        id: SnapshotId,
        /// Where.
        #[source]
        source: VerifyError,
    },
    /// The new one could not be begun.
    #[error(transparent)]
    Begin(#[from] BeginError),
    /// The memory could not be put together.
    #[error(transparent)]
    Memory(#[from] FlattenError),
    /// A file could not be copied.
    #[error(transparent)]
    File(#[from] FileError),
    /// The new one could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl LayerIndex {
    /// The index, from the base.
    pub fn get(self) -> usize {
        self.0.into()
    }
}

impl Source {
    const ZERO: u8 = 0;

    fn from_code(code: u8) -> Self {
        match code.checked_sub(1) {
            None => Self::Zero,
            Some(layer) => Self::Layer(LayerIndex(layer)),
        }
    }
}

impl Flat {
    /// Resolves a chain, base first.
    ///
    /// # Errors
    /// A [`FlatError`] if these layers are no chain.
    pub fn of(layers: &[&Pages]) -> Result<Self, FlatError> {
        if layers.len() > MAX_LAYERS {
            return Err(FlatError::TooLong {
                layers: layers.len(),
            });
        }
        Self::of_each(layers.iter().map(|layer| Ok(*layer)))
    }

    /// The same of layers that are made one by one, so that one at a time is in memory.
    ///
    /// # Errors
    /// A [`FlatError`] if these layers are no chain, and the first error that comes instead of a layer.
    pub fn of_each<P: Borrow<Pages>, E: From<FlatError>>(
        layers: impl IntoIterator<Item = Result<P, E>>,
    ) -> Result<Self, E> {
        let mut flat: Option<Self> = None;
        for (number, layer) in layers.into_iter().enumerate() {
            let layer = layer?;
            let layer = layer.borrow();
            let wanted = match number {
                0 => LayerKind::Full,
                _ => LayerKind::Diff,
            };
            if layer.layer() != wanted {
                return Err(FlatError::Kind { layer: number }.into());
            }
            let flat = flat.get_or_insert_with(|| Self {
                memory: layer.memory_size(),
                sources: vec![Source::ZERO; index(layer.len().get())],
            });
            flat.put(number, layer)?;
        }
        Ok(flat.ok_or(FlatError::Empty)?)
    }

    /// One more layer on top.
    fn put(&mut self, number: usize, layer: &Pages) -> Result<(), FlatError> {
        if number >= MAX_LAYERS {
            return Err(FlatError::TooLong { layers: number + 1 });
        }
        if layer.memory_size() != self.memory {
            return Err(FlatError::Size {
                layer: number,
                expected: self.memory,
                actual: layer.memory_size(),
            });
        }
        let code = u8::try_from(number + 1).expect("there are fewer layers");
        for run in layer.runs() {
            let pages = index(run.first.get())..index(run.first.get() + run.count.get());
            match run.kind {
                PageKind::Zero => self.sources[pages].fill(Source::ZERO),
                PageKind::Data => self.sources[pages].fill(code),
                PageKind::Unchanged => {}
            }
        }
        Ok(())
    }

    /// The size of the memory.
    pub fn memory_size(&self) -> ByteSize {
        self.memory
    }

    /// Where a page is; `None` beyond the end.
    pub fn source(&self, page: PageNumber) -> Option<Source> {
        if page.get() >= length(self.sources.len()) {
            return None;
        }
        Some(Source::from_code(self.sources[index(page.get())]))
    }

    /// The run that starts at `page`, at most `limit` pages of it; `None` beyond the end or without a limit to fill.
    pub fn run_from(&self, page: PageNumber, limit: PageCount) -> Option<FlatRun> {
        if page.get() >= length(self.sources.len()) {
            return None;
        }
        let rest = &self.sources[index(page.get())..];
        let rest = &rest[..rest.len().min(index(limit.get()))];
        let code = *rest.first()?;
        let same = rest.iter().take_while(|&&next| next == code).count();
        Some(FlatRun {
            first: page,
            count: PageCount::new(length(same)),
            source: Source::from_code(code),
        })
    }

    /// All runs from the first page to the last; neighbours differ in source.
    pub fn runs(&self) -> impl Iterator<Item = FlatRun> {
        let mut at = PageNumber::new(0);
        std::iter::from_fn(move || {
            let run = self.run_from(at, self.memory.pages())?;
            at = PageNumber::new(run.first.get() + run.count.get());
            Some(run)
        })
    }
}

/// Writes the memory of a chain, base first, into the new sparse file `path`, for Firecracker's File backend.
///
/// If that fails, `path` is gone again. The file is not yet durable.
///
/// # Errors
/// [`FlattenError::Chain`] if the snapshots are no chain; [`FlattenError::File`] if a file cannot be read or
/// written, or `path` exists.
pub fn flatten_to(chain: &[Snapshot], path: &Path) -> Result<(), FlattenError> {
    let pages: Vec<&Pages> = chain.iter().map(Snapshot::pages).collect();
    let flat = Flat::of(&pages)?;
    let memories = chain
        .iter()
        .map(Snapshot::open_memory)
        .collect::<Result<Vec<_>, _>>()?;
    let out = create_new(path)?;
    let write = || {
        out.set_len(flat.memory_size().get())?;
        for run in flat.runs() {
            if let Source::Layer(layer) = run.source {
                let start = run.first.offset().get();
                copy_range(
                    &memories[layer.get()],
                    &out,
                    start..start + run.count.bytes().get(),
                )?;
            }
        }
        Ok::<_, std::io::Error>(())
    };
    let written = write().at("write", path);
    if written.is_err() {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(path);
    }
    Ok(written?)
}

impl Store {
    /// Makes a Full snapshot that is what `tip` is with all that it builds on: memory, state, disks, working set.
    ///
    /// The chain stays as it is. Its contents are verified first. `progress` is told as while publishing.
    ///
    /// # Errors
    /// A [`FlattenSnapshotError`]; nothing is left of the new snapshot then.
    pub fn flatten(
        &self,
        tip: Snapshot,
        name: Option<SnapshotName>,
        progress: impl FnMut(Step),
    ) -> Result<Snapshot, FlattenSnapshotError> {
        if tip.manifest().parent().is_none() {
            return Err(FlattenSnapshotError::Flat { id: tip.id() });
        }
        let _lease = tip.lease()?;
        let draft = self.begin(name)?;
        let chain = self.chain(tip)?;
        for layer in &chain {
            layer
                .verify()
                .map_err(|source| FlattenSnapshotError::Damaged {
                    id: layer.id(),
                    source,
                })?;
        }
        flatten_to(&chain, &draft.memory_path())?;
        let tip = chain.last().expect("a chain has a tip");
        copy_rest(tip, &draft)?;
        Ok(draft.publish_with(full_parts(tip.manifest()), progress)?)
    }
}

/// Copies all but the memory.
fn copy_rest(tip: &Snapshot, draft: &Draft) -> Result<(), FileError> {
    copy_disk(&tip.vmstate_path(), &draft.vmstate_path())?;
    for drive in &tip.manifest().devices.drives {
        if let Backing::Layer { file, .. } = &drive.backing {
            draft.copy_disk(&drive.id, &tip.dir().join(file))?;
        }
    }
    match copy_disk(&tip.working_set_path(), &draft.dir().join(WORKING_SET)) {
        // None was recorded.
        Err(error) if error.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}

fn full_parts(manifest: &Manifest) -> ManifestParts {
    let Manifest {
        firecracker,
        host,
        machine,
        boot,
        devices,
        memory,
        notes,
        ..
    } = manifest.clone();
    let drive = |drive: Drive| DriveParts {
        id: drive.id,
        path: drive.path,
        read_only: drive.read_only,
        root: drive.root,
        limits: drive.limits,
        backing: match drive.backing {
            Backing::Layer { .. } => BackingParts::Layer,
            Backing::Image { name, .. } => BackingParts::Image(name),
            Backing::Host { path, .. } => BackingParts::Host(path),
        },
    };
    ManifestParts {
        kind: Kind::Full,
        firecracker,
        host,
        machine,
        boot,
        devices: Devices {
            drives: devices.drives.into_iter().map(drive).collect(),
            interfaces: devices.interfaces,
            vsock: devices.vsock,
            balloon: devices.balloon,
            mmds: devices.mmds,
            egress: devices.egress,
        },
        memory,
        removed: Vec::new(),
        notes,
    }
}
