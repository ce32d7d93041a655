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
//! Files are read, not mapped. A mapping would save the copy through our buffer (about 1.6 µs of a round
//! trip of 10 and more), but a file that is cut short under a mapping gives zeros to the end of its last
//! page without a sign. A short read cannot be overlooked.

use std::fs::File;
use std::io;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rekindle_store::flatten::{Flat, FlatError, Source as Place};
use rekindle_store::layout::RootError;
use rekindle_store::snapshot::{Lease, LeaseError, OpenError, Snapshot};
use rekindle_store::store::ChainError;
use rekindle_store::{Root, Store};
use rustix::fs::{Mode, OFlags, SeekFrom, fstatfs, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use serde::{Deserialize, Serialize};

use crate::stats::BadPage;
use crate::unit::{MemoryOffset, index, length};

/// Holes and layers are told apart in pages of this many bytes, whatever the VM's page size.
const PAGE: u64 = 4096;

/// What a VM's memory is filled from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// One memory file, as Firecracker wrote it for a Full snapshot; its holes are zero.
    Memory(PathBuf),
    /// A snapshot of a store, by its directory `<root>/snapshots/<id>`; together with its parents if it is a
    /// Diff. It cannot be removed while it is served.
    Snapshot(PathBuf),
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
    layers: Vec<Layer>,
    /// For each page 0 for zeros, or its layer's number plus one.
    codes: Vec<u8>,
    /// Keeps a snapshot and its parents where they are.
    _lease: Option<Lease>,
}

const ZERO: u8 = 0;

#[derive(Debug)]
struct Layer {
    file: File,
    path: PathBuf,
    /// All of it is in memory: a tmpfs.
    in_memory: bool,
    /// The file system cannot tell what is in memory.
    mute: AtomicBool,
}

impl Backing {
    pub(crate) fn open(source: &Source) -> Result<Self, SourceError> {
        match source {
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
        fill_data(&layer.file, bytes, &mut codes).map_err(|source| SourceError::Holes {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            layers: vec![layer],
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
        let codes = flat.runs().flat_map(|run| {
            let code = match run.source {
                Place::Zero => ZERO,
                // A chain has at most 128 layers.
                Place::Layer(layer) => u8::try_from(layer.get() + 1).expect("a short chain"),
            };
            std::iter::repeat_n(code, index(run.count.get()))
        });
        Ok(Self {
            layers,
            codes: codes.collect(),
            _lease: Some(lease),
        })
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

    /// Fills `buffer` with the memory at `at`; all of it, or the page that could not be read.
    pub(crate) fn read(&self, at: MemoryOffset, buffer: &mut [u8]) -> Result<(), BadPage> {
        let first = index(at.get() / PAGE);
        let codes = &self.codes[first..first + buffer.len() / index(PAGE)];
        let mut rest = buffer;
        let mut offset = at.get();
        for run in codes.chunk_by(PartialEq::eq) {
            let bytes = length(run.len()) * PAGE;
            let (now, later) = rest.split_at_mut(index(bytes));
            match run[0].checked_sub(1) {
                None => now.fill(0),
                Some(layer) => self.layers[usize::from(layer)].read(offset, now)?,
            }
            offset += bytes;
            rest = later;
        }
        Ok(())
    }

    /// Whether a file system cannot tell what is in memory, as one has found out.
    pub(crate) fn is_mute(&self) -> bool {
        self.layers
            .iter()
            .any(|layer| layer.mute.load(Ordering::Relaxed))
    }

    /// Fills the start of `buffer` with the memory at `at`, as far as it can be had without waiting for a
    /// disk; tells how many bytes, in whole small pages.
    pub(crate) fn read_resident(
        &self,
        at: MemoryOffset,
        buffer: &mut [u8],
    ) -> Result<usize, BadPage> {
        let first = index(at.get() / PAGE);
        let codes = &self.codes[first..first + buffer.len() / index(PAGE)];
        let mut done = 0;
        for run in codes.chunk_by(PartialEq::eq) {
            let now = &mut buffer[done..done + run.len() * index(PAGE)];
            let got = match run[0].checked_sub(1) {
                None => {
                    now.fill(0);
                    now.len()
                }
                Some(layer) => {
                    self.layers[usize::from(layer)].read_resident(at.get() + length(done), now)?
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

impl Layer {
    fn open(path: PathBuf) -> Result<(Layer, u64), SourceError> {
        let open = |source| SourceError::Open {
            path: path.clone(),
            source,
        };
        // Non-blocking, or opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file: File = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|e| open(e.into()))?
            .into();
        let metadata = file.metadata().map_err(open)?;
        if !metadata.is_file() {
            return Err(SourceError::NotAFile { path });
        }
        const TMPFS: i64 = 0x0102_1994;
        let in_memory = fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS);
        let layer = Layer {
            file,
            path,
            in_memory,
            mute: AtomicBool::new(false),
        };
        Ok((layer, metadata.len()))
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), BadPage> {
        let mut done = 0;
        while done < buffer.len() {
            let offset = at + length(done);
            match self.file.read_at(&mut buffer[done..], offset) {
                Ok(0) => return Err(self.bad(offset, None)),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.bad(offset, e.raw_os_error())),
            }
        }
        Ok(())
    }

    /// As [`Backing::read_resident`].
    fn read_resident(&self, at: u64, buffer: &mut [u8]) -> Result<usize, BadPage> {
        if self.in_memory {
            self.read(at, buffer)?;
            return Ok(buffer.len());
        }
        let mut done = 0;
        while done < buffer.len() && !self.mute.load(Ordering::Relaxed) {
            let offset = at + length(done);
            let mut rest = [IoSliceMut::new(&mut buffer[done..])];
            match preadv2(&self.file, &mut rest, offset, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(self.bad(offset, None)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::OPNOTSUPP) => self.mute.store(true, Ordering::Relaxed),
                Err(errno) => return Err(self.bad(offset, Some(errno.raw_os_error()))),
            }
        }
        Ok(done - done % index(PAGE))
    }

    fn bad(&self, offset: u64, errno: Option<i32>) -> BadPage {
        BadPage {
            file: self.path.clone(),
            page: offset / PAGE,
            offset,
            errno,
        }
    }
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

    fn memory(pages: u64, written: &[u64]) -> (tempfile::NamedTempFile, Backing) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(pages * PAGE).unwrap();
        for &page in written {
            file.as_file()
                .write_all_at(&[u8::try_from(page % 255 + 1).unwrap(); 4096], page * PAGE)
                .unwrap();
        }
        let backing = Backing::open(&Source::Memory(file.path().into())).unwrap();
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
        assert_eq!(backing.read_resident(at(1), &mut buffer), Ok(4 * 4096));
        let firsts: Vec<u8> = buffer.chunks(4096).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 3, 4, 5]);
        file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if !backing.layers[0].in_memory {
            assert_eq!(backing.read_resident(at(2), &mut buffer[..4096]), Ok(0));
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
            let error = Backing::open(&Source::Memory(file.path().into())).unwrap_err();
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
            Backing::open(&missing),
            Err(SourceError::Open { .. })
        ));
        let directory = Source::Memory(dir.path().into());
        assert!(matches!(
            Backing::open(&directory),
            Err(SourceError::NotAFile { .. })
        ));
    }

    #[test]
    fn a_directory_that_is_no_snapshot_is_refused_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let stray = Source::Snapshot(dir.path().into());
        assert!(matches!(
            Backing::open(&stray),
            Err(SourceError::NotInAStore { .. })
        ));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = Source::Snapshot(dir.path().join("snapshots/0"));
        assert!(matches!(
            Backing::open(&missing),
            Err(SourceError::Open { .. })
        ));
    }
}
