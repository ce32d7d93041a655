//! Chunks that were fetched, on this host: a file each, named by the BLAKE3 of the pages that it has. Indexes likewise, named
//! by where they are.
//!
//! All processes of a state directory share it, without a word to each other: a file appears whole, is never written to
//! again, and is proven each time that it is read, so it need not even be durable. One that is wrong is removed. What was not
//! wanted for longest goes when there is too much; who has it open keeps it. A cache that cannot be written to costs
//! time, and nothing else.

use crate::digest::Digest;
use crate::file::{At, Dir, FileError, TryLock, open_regular, read_at_once};
use crate::layout::Root;
use crate::packed::directory::{Durable, put_new};
use crate::packed::index::{Chunk, Index, MAX_INDEX};
use crate::unit::{ByteSize, index, length};
use rustix::fs::FlockOperation;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// How much is put before it is looked whether it is too much: the cache may become so much larger, for each process.
const LOOK_AFTER: u64 = 64 << 20;

/// Who is wanted again within this time is as good as just wanted.
const WANTED: Duration = Duration::from_secs(60);

/// The chunks that a host has of snapshots elsewhere.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limit: ByteSize,
    put: AtomicU64,
}

impl Cache {
    /// The cache of a state directory, which is to take about so much of its disk at the most.
    ///
    /// # Errors
    /// If its directory cannot be made.
    pub fn open(root: &Root, limit: ByteSize) -> Result<Self, FileError> {
        let dir = root.cache();
        std::fs::create_dir_all(&dir).at("create", &dir)?;
        let put = AtomicU64::new(0);
        Ok(Self { dir, limit, put })
    }

    /// The pages of a chunk, proven; `None` if they are not here.
    pub fn get(&self, chunk: &Chunk) -> Option<Vec<u8>> {
        let path = self.path(chunk);
        let file = open_regular(&path).ok()?;
        let mut raw = Vec::with_capacity(index(chunk.raw_size()));
        let read = (&file).take(chunk.raw_size() + 1).read_to_end(&mut raw);
        if read.is_err() || Digest::of(&raw) != chunk.digest {
            // If it cannot be removed it is found wrong again.
            let _ = std::fs::remove_file(&path);
            return None;
        }
        wanted(&file);
        // Two indexes may say different things of one digest. One of them lies, and not the file.
        (length(raw.len()) == chunk.raw_size()).then_some(raw)
    }

    /// The same, if it can be had without waiting for a disk.
    pub fn get_at_once(&self, chunk: &Chunk) -> Option<Vec<u8>> {
        // One that is longer than it should be is found out by who may remove it.
        let raw = read_at_once(&self.path(chunk), 0..chunk.raw_size())?;
        (Digest::of(&raw) == chunk.digest).then_some(raw)
    }

    /// Whether the pages of a chunk, which are wanted, seem to be here. They are not looked at.
    pub fn has(&self, chunk: &Chunk) -> bool {
        let path = self.path(chunk);
        let Ok(metadata) = std::fs::metadata(&path) else {
            return false;
        };
        if is_due(&metadata)
            && let Ok(file) = open_regular(&path)
        {
            wanted(&file);
        }
        metadata.len() == chunk.raw_size()
    }

    /// The index that was at a URL; it proves itself.
    pub(super) fn index(&self, url: &str) -> Option<Index> {
        let path = self.index_path(url);
        let mut bytes = Vec::new();
        let file = open_regular(&path).ok()?;
        (&file).take(MAX_INDEX.get()).read_to_end(&mut bytes).ok()?;
        let index = Index::parse(&bytes).ok();
        match &index {
            Some(_) => wanted(&file),
            // If it cannot be removed it is found wrong again.
            None => drop(std::fs::remove_file(&path)),
        }
        index
    }

    /// Keeps the index that is at a URL, if there is room.
    pub(super) fn put_index(&self, url: &str, bytes: &[u8]) {
        // One that is not kept is fetched again.
        if put_new(&self.index_path(url), bytes, Durable::No).is_ok() {
            self.grew(length(bytes.len()));
        }
    }

    /// Forgets the index that is at a URL: it may not be the one that is there now.
    pub(super) fn forget_index(&self, url: &str) {
        let _ = std::fs::remove_file(self.index_path(url));
    }

    fn index_path(&self, url: &str) -> PathBuf {
        self.dir
            .join(format!("index-{}", Digest::of(url.as_bytes())))
    }

    /// Keeps the pages of a chunk, which were proven, if there is room.
    pub fn put(&self, chunk: &Chunk, raw: &[u8]) {
        if put_new(&self.path(chunk), raw, Durable::No).is_ok() {
            self.grew(length(raw.len()));
        }
    }

    fn grew(&self, by: u64) {
        let before = self.put.fetch_add(by, Ordering::Relaxed);
        if (before + by) / LOOK_AFTER > before / LOOK_AFTER {
            self.trim();
        }
    }

    /// Removes what was not wanted for longest, until the rest is within the limit. Leaves it to another process that is
    /// at it.
    pub fn trim(&self) {
        let Ok(dir) = Dir::open(self.dir.clone()) else {
            return;
        };
        let Ok(TryLock::Taken) = dir.try_lock(FlockOperation::NonBlockingLockExclusive) else {
            return;
        };
        let mut files = self.files();
        let mut size: u64 = files.iter().map(|(_, size, _)| size).sum();
        files.sort_unstable();
        for (_, its, path) in files {
            if size <= self.limit.get() {
                return;
            }
            if std::fs::remove_file(path).is_ok() {
                size -= its;
            }
        }
    }

    /// How much of the disk it takes.
    pub fn size(&self) -> ByteSize {
        ByteSize::new(self.files().iter().map(|(_, size, _)| size).sum())
    }

    /// When each file was last wanted, its size in bytes, and where it is.
    fn files(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let entries = self.dir.read_dir().into_iter().flatten();
        let files = entries.filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        });
        files.collect()
    }

    fn path(&self, chunk: &Chunk) -> PathBuf {
        self.dir.join(chunk.digest.to_string())
    }
}

/// Notes that a file was wanted, unless that was noted just now.
fn wanted(file: &File) {
    if file.metadata().is_ok_and(|metadata| is_due(&metadata)) {
        // One that seems older than it is goes sooner.
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Whether it is some time ago that the file was noted to be wanted.
fn is_due(metadata: &Metadata) -> bool {
    let modified = metadata.modified();
    modified.is_ok_and(|then| then.elapsed().is_ok_and(|ago| ago > WANTED))
}
