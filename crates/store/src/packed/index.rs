//! The index of a packed snapshot: one object that has all of it but memory and disks, and says where those are.
//!
//! ```text
//! header 64 B │ packs 40 B each │ chunks 48 B │ streams 16 B │ extents 16 B │ manifest │ vmstate │ working set │ BLAKE3
//! ```
//!
//! It may come from a stranger. Every count is compared with the length of what was read before anything is
//! allocated, every number with what it points into, and all of it with the manifest that it carries.

mod read;
mod write;

use crate::digest::Digest;
use crate::manifest::{Backing, Kind, Manifest, ManifestError};
use crate::packed::Codec;
use crate::pages::{LayerKind, PageKind, Pages, PagesError};
use crate::unit::{ByteSize, PAGE_SIZE, PageNumber, PageRange, length};
use thiserror::Error;

/// The version that this program writes, and the only one that it reads.
pub(super) const VERSION: u32 = 1;

/// The largest index that is read: enough for the memory of a terabyte of data.
pub const MAX_INDEX: ByteSize = ByteSize::new(1 << 30);

/// What is known of a packed snapshot without its packs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    pub(super) manifest: Manifest,
    pub(super) vmstate: Vec<u8>,
    pub(super) working_set: Vec<u8>,
    pub(super) packs: Vec<PackRef>,
    pub(super) chunks: Vec<Chunk>,
    pub(super) streams: Vec<Stream>,
}

/// A pack that has chunks of a snapshot; others may be in it as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackRef {
    /// Its name: the BLAKE3 of its bytes.
    pub name: Digest,
    /// How long it is.
    pub size: u32,
}

/// A chunk, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// The BLAKE3 of its pages.
    pub digest: Digest,
    /// Its pack, by its place in [`Index::packs`].
    pub pack: u32,
    /// Where it starts there, in bytes.
    pub offset: u32,
    /// How many bytes it has there.
    pub stored: u32,
    /// How many pages it has.
    pub pages: u16,
    /// How it is stored.
    pub codec: Codec,
}

/// A file of the snapshot that is in chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// How long the file is.
    pub size: ByteSize,
    /// Where its pages are, ordered by page; what is in none of them is a hole.
    pub extents: Vec<Extent>,
}

/// Pages that follow each other in a file and in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The pages of the file.
    pub pages: PageRange,
    /// Where they are.
    pub place: Place,
}

/// Where pages of a packed file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they are zeros, and not the parent's. Only in the memory of a Diff.
    Zero,
    /// In a chunk, by its place in [`Index::chunks`], from that page of it on.
    Chunk {
        /// The chunk.
        chunk: u32,
        /// The first page in it.
        at: u16,
    },
}

/// Why an index cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IndexError {
    /// It is something else.
    #[error("it is no index of a packed snapshot")]
    NotIndex,
    /// A program of another version wrote it.
    #[error("the index has version {found}, and this program reads version {VERSION}")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// It does not have the length that its header demands.
    #[error("the index has {actual} bytes instead of {expected}")]
    Length {
        /// The length that follows from its counts.
        expected: u64,
        /// The length that it has.
        actual: u64,
    },
    /// Its checksum is not that of its contents.
    #[error("the index's checksum is not that of its contents")]
    Checksum,
    /// A number in it has a value that it cannot have.
    #[error("the index's {what} {number} {problem}")]
    Invalid {
        /// Of what there are several.
        what: &'static str,
        /// Which of them.
        number: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The manifest in it cannot be used.
    #[error("the manifest in the index cannot be used")]
    Manifest(#[from] ManifestError),
    /// The manifest in it speaks of other files.
    #[error("the index and its manifest disagree about {what}")]
    Disagrees {
        /// About what.
        what: &'static str,
    },
    /// Its snapshot has a drive that is a file of the host that it was made on.
    #[error(
        "the drive {drive} is a file of the host that the snapshot was made on, and cannot travel"
    )]
    HostFile {
        /// The drive.
        drive: String,
    },
}

impl Index {
    /// The manifest of the snapshot.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Firecracker's state file.
    pub fn vmstate(&self) -> &[u8] {
        &self.vmstate
    }

    /// The working set as a file; empty if none was recorded.
    pub fn working_set(&self) -> &[u8] {
        &self.working_set
    }

    /// The packs that have the chunks, in the order in which they were made.
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// The chunks; those of the working set first.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The files that are in chunks: the memory, and then each drive that is in the snapshot, as the manifest has them.
    pub fn streams(&self) -> &[Stream] {
        &self.streams
    }

    /// How many bytes it has as a file, without its manifest, which is short.
    pub(super) fn size(&self) -> u64 {
        let extents = self.streams.iter().map(|stream| stream.extents.len());
        let parts = [
            (self.packs.len(), PACK),
            (self.chunks.len(), CHUNK),
            (self.streams.len(), STREAM),
            (extents.sum(), EXTENT),
            (self.vmstate.len(), 1),
            (self.working_set.len(), 1),
        ];
        parts
            .map(|(count, bytes)| length(count * bytes))
            .iter()
            .sum()
    }

    /// The bytes that its chunks take in their packs.
    pub fn stored(&self) -> ByteSize {
        ByteSize::new(
            self.chunks
                .iter()
                .map(|chunk| u64::from(chunk.stored))
                .sum(),
        )
    }

    /// What each page of the memory is.
    ///
    /// # Errors
    /// If the memory has a size that no memory has.
    pub fn pages(&self) -> Result<Pages, PagesError> {
        let mut pages = Pages::new(layer_of(&self.manifest), self.streams[0].size)?;
        for extent in &self.streams[0].extents {
            let kind = match extent.place {
                Place::Zero => PageKind::Zero,
                Place::Chunk { .. } => PageKind::Data,
            };
            for page in extent.pages.first.get()..extent.pages.end().get() {
                pages.set(PageNumber::new(page), kind);
            }
        }
        Ok(pages)
    }
}

impl Chunk {
    /// Where its bytes are in its pack.
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.stored)
    }

    /// How many bytes its pages have.
    pub fn raw_size(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE
    }
}

impl Stream {
    /// Where a page is; `None` if it is in no extent.
    pub fn place(&self, page: PageNumber) -> Option<Place> {
        let after = self
            .extents
            .partition_point(|extent| extent.pages.first <= page);
        let extent = self.extents.get(after.checked_sub(1)?)?;
        let skipped = page.get() - extent.pages.first.get();
        if skipped >= extent.pages.count.get() {
            return None;
        }
        Some(match extent.place {
            Place::Zero => Place::Zero,
            Place::Chunk { chunk, at } => Place::Chunk {
                chunk,
                at: at + u16::try_from(skipped).expect("an extent ends within its chunk"),
            },
        })
    }
}

pub(super) fn layer_of(manifest: &Manifest) -> LayerKind {
    match manifest.kind {
        Kind::Full => LayerKind::Full,
        Kind::Diff { .. } => LayerKind::Diff,
    }
}

/// Refuses a snapshot with a drive that is a file of one host: elsewhere its path leads to anything.
pub(super) fn refuse_host_files(manifest: &Manifest) -> Result<(), IndexError> {
    let drives = &manifest.devices.drives;
    match drives
        .iter()
        .find(|drive| matches!(drive.backing, Backing::Host { .. }))
    {
        None => Ok(()),
        Some(drive) => Err(IndexError::HostFile {
            drive: drive.id.to_string(),
        }),
    }
}

/// The sizes that the streams of a snapshot have.
pub(super) fn stream_sizes(manifest: &Manifest) -> Vec<ByteSize> {
    let disks = manifest.layers().map(|(_, record)| record.size);
    std::iter::once(manifest.memory.size).chain(disks).collect()
}

const MAGIC: [u8; 8] = *b"RKDLINDX";
const HEADER: usize = 64;
const PACK: usize = 40;
const CHUNK: usize = 48;
const STREAM: usize = 16;
const EXTENT: usize = 16;
/// Stands for a chunk where there is none.
const NO_CHUNK: u32 = u32::MAX;
