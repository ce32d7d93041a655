//! Where the bytes of a page come from.
//!
//! ```text
//!   page 0 1 2 3 4 5 …
//!   code 0 1 1 0 2 1 …    a byte a page: 0 is zero, n + 1 is layer n
//!            └─► pread from that layer's memory file, at the page's own offset
//! ```
//!
//! A single memory file is one layer, and its holes are zero. A snapshot's layers are its chain of Diffs, and
//! the store tells what each page is: in a Diff a page of zeros is zero, a hole is the parent's.
//!
//! The layers of a packed snapshot have no files: their pages are in chunks of a repository (`packed.rs`).
//!
//! Files are read, not mapped. A mapping would save the copy through our buffer (about 1.6 µs of a round
//! trip of 10 and more), but a file that is cut short under a mapping gives zeros to the end of its last
//! page without a sign. A short read cannot be overlooked.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rekindle_store::flatten::{Flat, FlatError, Source as Place};
use rekindle_store::layout::RootError;
use rekindle_store::snapshot::{Lease, LeaseError, OpenError, Snapshot};
use rekindle_store::store::ChainError;
use rekindle_store::{Root, Store};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::far::Haste;
use crate::layer::Layer;
use crate::packed::{OpenPlace, Packed, PackedError, PackedSource};
use crate::stats::{BadPage, KillReason};
use crate::unit::{MemoryOffset, index, length};

/// Holes and layers are told apart in pages of this many bytes, whatever the VM's page size.
pub(crate) const PAGE: u64 = 4096;

/// What a VM's memory is filled from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// One memory file, as Firecracker wrote it for a Full snapshot; its holes are zero.
    Memory(PathBuf),
    /// A snapshot of a store, by its directory `<root>/snapshots/<id>`; together with its parents if it is a
    /// Diff. It cannot be removed while it is served.
    Snapshot(PathBuf),
    /// A snapshot whose memory is fetched from a repository of packed ones.
    Packed(PackedSource),
}

/// Why the guest's memory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file cannot be opened.
    #[error("cannot open the memory file {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its holes cannot be found.
    #[error("cannot find the holes of the memory file {path}")]
    Holes {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A directory, a FIFO or a device.
    #[error("the memory file {path} is not a regular file")]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// Its size is no memory's size.
    #[error(
        "the memory file {path} holds {bytes} bytes, which is not a whole number of pages above zero"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is not where snapshots are.
    #[error("{path} is not the directory of a snapshot in a store")]
    NotInAStore {
        /// What was given.
        path: PathBuf,
    },
    /// The store around the snapshot cannot be used.
    #[error("cannot open the store of {path}")]
    Store {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: RootError,
    },
    /// The snapshot cannot be used.
    #[error("cannot use the snapshot {path}")]
    Snapshot {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: OpenError,
    },
    /// The snapshot is being removed.
    #[error("cannot keep the snapshot {path}")]
    Lease {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: LeaseError,
    },
    /// One that it stands on cannot be used.
    #[error("cannot use the chain of the snapshot {path}")]
    Chain {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ChainError,
    },
    /// Those that it stands on are no chain.
    #[error("cannot combine the chain of the snapshot {path}")]
    Flat {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: FlatError,
    },
    /// It is packed, and cannot be fetched.
    #[error(transparent)]
    Packed(#[from] PackedError),
}

/// What a stretch of memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing but zeros.
    Zero,
    /// Bytes of a file.
    Data,
}

/// The guest's memory, opened.
#[derive(Debug)]
pub(crate) struct Backing {
    bytes: Bytes,
    /// For each page 0 for zeros, or its layer's number plus one.
    codes: Vec<u8>,
    /// Keeps a snapshot and its parents where they are.
    _lease: Option<Lease>,
}

const ZERO: u8 = 0;

/// Where the bytes of the layers are.
#[derive(Debug)]
enum Bytes {
    Files(Vec<Layer>),
    Packed(Box<Packed>),
}

impl Backing {
    /// Opens the memory; one that is packed needs a way to its repository.
    pub(crate) fn open(source: &Source, open: Option<OpenPlace>) -> Result<Self, SourceError> {
        match source {
            Source::Packed(source) => Self::open_packed(source, open),
            Source::Memory(path) => Self::open_memory(path),
            Source::Snapshot(path) => Self::open_snapshot(path),
        }
    }

    fn open_memory(path: &Path) -> Result<Self, SourceError> {
        let (layer, bytes) = Layer::open(path.into())?;
        if bytes == 0 || !bytes.is_multiple_of(PAGE) {
            return Err(SourceError::Size {
                path: path.into(),
                bytes,
            });
        }
        let mut codes = vec![ZERO; index(bytes / PAGE)];
        fill_data(layer.file(), bytes, &mut codes).map_err(|source| SourceError::Holes {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            bytes: Bytes::Files(vec![layer]),
            codes,
            _lease: None,
        })
    }

    fn open_snapshot(path: &Path) -> Result<Self, SourceError> {
        let (root, id) = place_in_store(path)?;
        let path = || path.to_path_buf();
        let root = Root::open(root).map_err(|source| SourceError::Store {
            path: path(),
            source,
        })?;
        let store = Store::open(root);
        let tip = store
            .snapshot(&id)
            .map_err(|source| SourceError::Snapshot {
                path: path(),
                source,
            })?;
        let lease = tip.lease().map_err(|source| SourceError::Lease {
            path: path(),
            source,
        })?;
        let chain = store.chain(tip).map_err(|source| SourceError::Chain {
            path: path(),
            source,
        })?;
        let pages: Vec<_> = chain.iter().map(Snapshot::pages).collect();
        let flat = Flat::of(&pages).map_err(|source| SourceError::Flat {
            path: path(),
            source,
        })?;
        let layers = chain
            .iter()
            .map(|snapshot| Ok(Layer::open(snapshot.memory_path())?.0))
            .collect::<Result<_, SourceError>>()?;
        Ok(Self {
            bytes: Bytes::Files(layers),
            codes: codes(&flat),
            _lease: Some(lease),
        })
    }

    fn open_packed(source: &PackedSource, open: Option<OpenPlace>) -> Result<Self, SourceError> {
        let packed = Packed::open(source, open)?;
        Ok(Self {
            codes: codes(&packed.flat()?),
            bytes: Bytes::Packed(Box::new(packed)),
            _lease: None,
        })
    }

    fn layers(&self) -> &[Layer] {
        match &self.bytes {
            Bytes::Files(layers) => layers,
            Bytes::Packed(_) => &[],
        }
    }

    /// What is fetched, if it is.
    pub(crate) fn packed(&self) -> Option<&Packed> {
        match &self.bytes {
            Bytes::Files(_) => None,
            Bytes::Packed(packed) => Some(packed),
        }
    }

    /// The size of the guest's memory.
    pub(crate) fn bytes(&self) -> u64 {
        length(self.codes.len()) * PAGE
    }

    /// What the page of `page` bytes at `at` holds, and for how many bytes of whole pages that goes on, up to
    /// `limit`.
    ///
    /// A page is zero only if all of it is: a large one that is zero in part is data.
    pub(crate) fn content(&self, at: MemoryOffset, page: u64, limit: u64) -> (Content, u64) {
        let small = index(at.get() / PAGE)..index((at.get() + limit) / PAGE);
        let mut kinds = self.codes[small]
            .chunks_exact(index(page / PAGE))
            .map(|codes| {
                if codes.iter().all(|&code| code == ZERO) {
                    Content::Zero
                } else {
                    Content::Data
                }
            });
        let first = kinds.next().expect("the limit is a page or more");
        let more = kinds.take_while(|&kind| kind == first).count();
        (first, (1 + length(more)) * page)
    }

    /// How many of the bytes at `at`, `limit` at the most and all of them data, come with the first of them.
    pub(crate) fn come_together(&self, at: MemoryOffset, page: u64, limit: u64) -> u64 {
        match self.packed() {
            // A large page is in many chunks.
            Some(packed) if page == PAGE => {
                let (first, codes) = self.codes(at, limit);
                length(packed.in_one_chunk(first, codes)) * PAGE
            }
            _ => limit,
        }
    }

    /// Has the memory of a job read or fetched, and `finish` called with it, by this thread or another.
    pub(crate) fn fetch(
        &self,
        at: MemoryOffset,
        bytes: u64,
        haste: Haste,
        finish: impl FnOnce(Result<Vec<u8>, KillReason>) + Send + 'static,
    ) {
        if let Some(packed) = self.packed() {
            let (first, codes) = self.codes(at, bytes);
            return packed.fetch(first, codes, haste, finish);
        }
        let mut buffer = vec![0; index(bytes)];
        let read = self.read(at, &mut buffer);
        finish(read.map(|()| buffer).map_err(KillReason::BadPage));
    }

    /// Has what is packed fetched before somebody asks: a working set, and what else it was told to.
    pub(crate) fn bring(&mut self, set: impl Iterator<Item = MemoryOffset>) {
        if let Bytes::Packed(packed) = &mut self.bytes {
            packed.bring(set.map(|at| at.get() / PAGE), &self.codes);
        }
    }

    /// The number of the first page at `at`, and the codes of so many bytes from there on.
    fn codes(&self, at: MemoryOffset, bytes: u64) -> (u64, &[u8]) {
        let first = at.get() / PAGE;
        (
            first,
            &self.codes[index(first)..index(first + bytes / PAGE)],
        )
    }

    /// Fills `buffer` with the memory at `at`, out of files; all of it, or the page that could not be read.
    pub(crate) fn read(&self, at: MemoryOffset, buffer: &mut [u8]) -> Result<(), BadPage> {
        let (_, codes) = self.codes(at, length(buffer.len()));
        let mut rest = buffer;
        let mut offset = at.get();
        for run in codes.chunk_by(PartialEq::eq) {
            let bytes = length(run.len()) * PAGE;
            let (now, later) = rest.split_at_mut(index(bytes));
            match run[0].checked_sub(1) {
                None => now.fill(0),
                Some(layer) => self.layers()[usize::from(layer)].read(offset, now)?,
            }
            offset += bytes;
            rest = later;
        }
        Ok(())
    }

    /// Whether a file system cannot tell what is in memory, as one has found out.
    pub(crate) fn is_mute(&self) -> bool {
        self.layers().iter().any(Layer::is_mute)
    }

    /// Fills the start of `buffer` with the memory at `at`, as far as it can be had without waiting for a
    /// disk; tells how many bytes, in whole small pages.
    pub(crate) fn read_resident(
        &self,
        at: MemoryOffset,
        haste: Haste,
        buffer: &mut [u8],
    ) -> Result<usize, BadPage> {
        let (first, codes) = self.codes(at, length(buffer.len()));
        if let Some(packed) = self.packed() {
            return Ok(packed.read_at_hand(first, codes, haste, buffer));
        }
        let mut done = 0;
        for run in codes.chunk_by(PartialEq::eq) {
            let now = &mut buffer[done..done + run.len() * index(PAGE)];
            let got = match run[0].checked_sub(1) {
                None => {
                    now.fill(0);
                    now.len()
                }
                Some(layer) => {
                    self.layers()[usize::from(layer)].read_resident(at.get() + length(done), now)?
                }
            };
            done += got;
            if got < run.len() * index(PAGE) {
                break;
            }
        }
        Ok(done)
    }
}

/// A byte a page.
fn codes(flat: &Flat) -> Vec<u8> {
    let codes = flat.runs().flat_map(|run| {
        let code = match run.source {
            Place::Zero => ZERO,
            // A chain has at most 128 layers.
            Place::Layer(layer) => u8::try_from(layer.get() + 1).expect("a short chain"),
        };
        std::iter::repeat_n(code, index(run.count.get()))
    });
    codes.collect()
}

/// The state directory and the id of a snapshot's directory `<root>/snapshots/<id>`.
///
/// Opening a state directory makes what it lacks, so anything else must be told apart before.
fn place_in_store(path: &Path) -> Result<(PathBuf, String), SourceError> {
    let elsewhere = || SourceError::NotInAStore { path: path.into() };
    let full = std::fs::canonicalize(path).map_err(|source| SourceError::Open {
        path: path.into(),
        source,
    })?;
    let snapshots = full.parent().filter(|dir| dir.ends_with("snapshots"));
    let root = snapshots.and_then(Path::parent).ok_or_else(elsewhere)?;
    let id = full
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(elsewhere)?;
    Ok((root.into(), id.into()))
}

/// Marks every page that has any data.
fn fill_data(file: &File, bytes: u64, codes: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < bytes {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        at = seek(file, SeekFrom::Hole(data))?;
        let end = index(at.div_ceil(PAGE)).min(codes.len());
        codes[index(data / PAGE).min(end)..end].fill(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn memory(pages: u64, written: &[u64]) -> (tempfile::NamedTempFile, Backing) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(pages * PAGE).unwrap();
        for &page in written {
            file.as_file()
                .write_all_at(&[u8::try_from(page % 255 + 1).unwrap(); 4096], page * PAGE)
                .unwrap();
        }
        let backing = Backing::open(&Source::Memory(file.path().into()), None).unwrap();
        (file, backing)
    }

    fn at(page: u64) -> MemoryOffset {
        MemoryOffset::new(page * PAGE)
    }

    /// What the pages from one to another are, as runs of the given page size.
    fn contents(backing: &Backing, page: u64) -> Vec<(Content, u64)> {
        let (mut at, mut runs) = (0, Vec::new());
        while at < backing.bytes() {
            let (content, bytes) =
                backing.content(MemoryOffset::new(at), page, backing.bytes() - at);
            runs.push((content, bytes / page));
            at += bytes;
        }
        runs
    }

    #[test]
    fn holes_are_zero_and_the_rest_is_data() {
        use Content::{Data, Zero};
        let (_file, backing) = memory(64, &[3, 4, 40]);
        let runs = [(Zero, 3), (Data, 2), (Zero, 35), (Data, 1), (Zero, 23)];
        assert_eq!(contents(&backing, PAGE), runs);
        assert_eq!(backing.content(at(3), PAGE, PAGE), (Data, PAGE));
    }

    #[test]
    fn a_file_that_is_one_hole_and_one_without_any_are_read_right() {
        let (_file, hole) = memory(8, &[]);
        assert_eq!(contents(&hole, PAGE), [(Content::Zero, 8)]);
        let (_file, full) = memory(4, &[0, 1, 2, 3]);
        assert_eq!(contents(&full, PAGE), [(Content::Data, 4)]);
    }

    #[test]
    fn a_large_page_is_zero_only_if_all_of_it_is() {
        let (_file, backing) = memory(512 * 4, &[512 + 7]);
        let runs = [(Content::Zero, 1), (Content::Data, 1), (Content::Zero, 2)];
        assert_eq!(contents(&backing, 512 * PAGE), runs);
    }

    #[test]
    fn a_read_over_holes_and_data_gives_both() {
        let (_file, backing) = memory(16, &[2, 5]);
        let mut buffer = vec![0xee; 6 * 4096];
        backing.read(at(1), &mut buffer).unwrap();
        let firsts: Vec<u8> = buffer.chunks(4096).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 3, 0, 0, 6, 0]);
        assert!(
            buffer
                .chunks(4096)
                .all(|page| page.iter().all(|&b| b == page[0]))
        );
    }

    #[test]
    fn what_is_in_memory_is_read_at_once_and_the_rest_is_left() {
        let (file, backing) = memory(64, &[2, 3, 4, 40]);
        let mut buffer = vec![0xee; 4 * 4096];
        assert_eq!(
            backing.read_resident(at(1), Haste::Urgent, &mut buffer),
            Ok(4 * 4096)
        );
        let firsts: Vec<u8> = buffer.chunks(4096).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 3, 4, 5]);
        file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if !backing.layers()[0].is_in_memory() {
            assert_eq!(
                backing.read_resident(at(2), Haste::Urgent, &mut buffer[..4096]),
                Ok(0)
            );
        }
    }

    #[test]
    fn a_file_cut_short_names_the_page_where_it_ends() {
        let (file, backing) = memory(16, &[2, 3, 4, 5]);
        file.as_file().set_len(4 * PAGE + 100).unwrap();
        let bad = backing.read(at(2), &mut [0; 4 * 4096]).unwrap_err();
        let expected = BadPage {
            file: file.path().into(),
            page: 4,
            offset: 4 * PAGE + 100,
            errno: None,
        };
        assert_eq!(bad, expected);
        // What was a hole needs no file.
        backing.read(at(9), &mut [1; 4096]).unwrap();
    }

    #[test]
    fn files_of_no_memorys_size_are_refused() {
        for bytes in [0, 1, 4095, 4097] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(bytes).unwrap();
            let error = Backing::open(&Source::Memory(file.path().into()), None).unwrap_err();
            assert!(
                matches!(error, SourceError::Size { bytes: b, .. } if b == bytes),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_missing_file_and_a_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Source::Memory(dir.path().join("memory"));
        assert!(matches!(
            Backing::open(&missing, None),
            Err(SourceError::Open { .. })
        ));
        let directory = Source::Memory(dir.path().into());
        assert!(matches!(
            Backing::open(&directory, None),
            Err(SourceError::NotAFile { .. })
        ));
    }

    #[test]
    fn a_directory_that_is_no_snapshot_is_refused_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let stray = Source::Snapshot(dir.path().into());
        assert!(matches!(
            Backing::open(&stray, None),
            Err(SourceError::NotInAStore { .. })
        ));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = Source::Snapshot(dir.path().join("snapshots/0"));
        assert!(matches!(
            Backing::open(&missing, None),
            Err(SourceError::Open { .. })
        ));
    }
}
