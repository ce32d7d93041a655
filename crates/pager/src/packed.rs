//! Memory that is in a repository of packed snapshots, and comes in chunk by chunk.
//!
//! ```text
//!   page ──► its layer ──► that layer's index: chunk, page in it ──► at hand? the host's cache? ──► pages
//!                                                                         └─ no: fetched ([`Far`])
//! ```

use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rekindle_store::Root;
use rekindle_store::file::FileError;
use rekindle_store::flatten::{Flat, FlatError};
use rekindle_store::layout::RootError;
use rekindle_store::packed::{Cache, Index, Objects, Outline, OutlineError, Place};
use rekindle_store::pages::PagesError;
use rekindle_store::unit::{ByteSize, PageNumber};
use serde::{Deserialize, Serialize};

use crate::far::{Far, Haste, Key, Unfetched};
use crate::stats::KillReason;
use crate::unit::{index, length};

/// Bytes of a page, as chunks count them.
const PAGE: usize = 4096;

/// From so many pages a chunk on, a working set lies together: a piece of it is in three chunks at the most, mostly in one.
const TOGETHER: usize = 8;

/// A snapshot whose memory stays in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedSource {
    /// Where the [`Outline`] of the snapshot was laid.
    pub outline: PathBuf,
    /// The repository, in the words of who [opens](OpenPlace) it.
    pub place: String,
    /// The state directory in whose cache chunks are looked for, and kept; without one they are only fetched.
    pub root: Option<PathBuf>,
    /// How much of the disk that cache may take, about, in bytes.
    pub cache_bytes: u64,
    /// How long the repository may take to answer one request, with all that is tried again.
    pub patience: Duration,
    /// What is fetched before the guest asks.
    pub prefetch: Prefetch,
}

/// What is fetched of a packed memory before the guest asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefetch {
    /// The working set, if it is replayed.
    #[default]
    WorkingSet,
    /// After that all the rest, into the cache.
    All,
}

/// A repository, or why there is none.
pub type Opened = Result<Box<dyn Objects>, Box<dyn StdError + Send + Sync>>;

/// Opens the repository at a place, whose requests then have that patience. Whoever starts a page server for a
/// [`PackedSource`] gives it one: this crate speaks to no network.
#[derive(Clone, Copy)]
pub struct OpenPlace(pub fn(&str, Duration) -> Opened);

impl fmt::Debug for OpenPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpenPlace")
    }
}

/// Why a packed memory cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackedError {
    /// Its indexes cannot be read.
    #[error("cannot read the indexes in {path}")]
    Outline {
        /// Where they should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: OutlineError,
    },
    /// Nobody said how repositories are opened.
    #[error("this page server has no way to {place}")]
    NoWay {
        /// The repository.
        place: String,
    },
    /// The repository cannot be opened.
    #[error("cannot open {place}")]
    Place {
        /// The repository.
        place: String,
        /// Why not.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The state directory with the cache cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The cache cannot be used.
    #[error("cannot use the cache of chunks")]
    Cache(#[from] FileError),
    /// The memory cannot be described.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The snapshots are no chain.
    #[error(transparent)]
    Flat(#[from] FlatError),
}

/// A packed memory, opened. What each page is, by layers, is told by [`Packed::flat`].
#[derive(Debug)]
pub(crate) struct Packed {
    far: Far,
    prefetch: Prefetch,
    /// Whether what is brought ahead lies together: the working set if there is one, and what a guest walks to.
    together: bool,
}

impl Packed {
    pub(crate) fn open(
        source: &PackedSource,
        open: Option<OpenPlace>,
    ) -> Result<Packed, PackedError> {
        let outline = Outline::open(&source.outline).map_err(|error| PackedError::Outline {
            path: source.outline.clone(),
            source: error,
        })?;
        let place = || source.place.clone();
        let OpenPlace(open) = open.ok_or_else(|| PackedError::NoWay { place: place() })?;
        let objects = open(&source.place, source.patience).map_err(|error| PackedError::Place {
            place: place(),
            source: error,
        })?;
        let cache = match &source.root {
            None => None,
            Some(root) => Some(Cache::open(
                &Root::open(root)?,
                ByteSize::new(source.cache_bytes),
            )?),
        };
        Ok(Packed {
            far: Far::new(outline.indexes().to_vec(), objects, cache),
            prefetch: source.prefetch,
            together: false,
        })
    }

    pub(crate) fn flat(&self) -> Result<Flat, PackedError> {
        let indexes = self.far.indexes().iter();
        Flat::of_each(indexes.map(|index| Ok::<_, PackedError>(index.pages()?)))
    }

    /// The chunk that has a page of a layer, and which page of it that is.
    fn place(&self, layer: u8, page: u64) -> (Key, u16) {
        let index: &Index = &self.far.indexes()[usize::from(layer)];
        let place = index.streams()[0].place(PageNumber::new(page));
        let Some(Place::Chunk { chunk, at }) = place else {
            unreachable!("the layer was said to have page {page}");
        };
        (Key { layer, chunk }, at)
    }

    /// How many of the pages from `first` on are in the chunk that has the first. `codes` are as in
    /// [`Backing`](crate::source::Backing), none of them zero.
    pub(crate) fn in_one_chunk(&self, first: u64, codes: &[u8]) -> usize {
        let mut keys = (first..)
            .zip(codes)
            .map(|(page, code)| self.place(code - 1, page).0);
        let Some(key) = keys.next() else { return 0 };
        1 + keys.take_while(|other| *other == key).count()
    }

    /// Fills the start of `buffer` with the pages from `first` on, as far as they are at hand; tells how many bytes. What the
    /// guest waits for, and a working set that lies together, is proven here and now, if its chunk is in this host's memory:
    /// to hand that to another thread takes longer.
    pub(crate) fn read_at_hand(
        &self,
        first: u64,
        codes: &[u8],
        haste: Haste,
        buffer: &mut [u8],
    ) -> usize {
        let now = haste == Haste::Urgent || self.together;
        let mut last: Option<(Key, Arc<Vec<u8>>)> = None;
        let mut done = 0;
        for ((page, &code), into) in (first..).zip(codes).zip(buffer.chunks_exact_mut(PAGE)) {
            let Some(layer) = code.checked_sub(1) else {
                into.fill(0);
                done += PAGE;
                continue;
            };
            let (key, at) = self.place(layer, page);
            if last.as_ref().is_none_or(|(other, _)| *other != key) {
                let mut raw = self.far.at_hand(key);
                if raw.is_none() && now {
                    raw = self.far.in_memory(key);
                }
                last = raw.map(|raw| (key, raw));
            }
            let Some((_, raw)) = &last else { break };
            into.copy_from_slice(page_of(raw, at));
            done += PAGE;
        }
        done
    }

    /// Has the pages from `first` on read or fetched, and `finish` called with them: now, or by the thread that brings
    /// the last of their chunks.
    pub(crate) fn fetch(
        &self,
        first: u64,
        codes: &[u8],
        haste: Haste,
        finish: impl FnOnce(Result<Vec<u8>, KillReason>) + Send + 'static,
    ) {
        let mut parts: Vec<(Key, Vec<Part>)> = Vec::new();
        for (n, (page, &code)) in (first..).zip(codes).enumerate() {
            let Some(layer) = code.checked_sub(1) else {
                continue;
            };
            let (key, at) = self.place(layer, page);
            let part = Part { into: n, at, page };
            match parts.iter_mut().find(|(other, _)| *other == key) {
                Some((_, list)) => list.push(part),
                None => parts.push((key, vec![part])),
            }
        }
        let mut buffer = vec![0; codes.len() * PAGE];
        parts.retain(|(key, parts)| match self.far.here(*key) {
            Some(raw) => {
                parts.iter().for_each(|part| part.copy(&raw, &mut buffer));
                false
            }
            None => true,
        });
        if parts.is_empty() {
            return finish(Ok(buffer));
        }
        let gathering = Arc::new(Mutex::new(Gathering {
            buffer,
            left: parts.len(),
            finish: Some(Box::new(finish)),
        }));
        for (key, parts) in parts {
            let gathering = gathering.clone();
            let reply = move |raw: Result<Arc<Vec<u8>>, Unfetched>| {
                gathering
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take(raw, &parts);
            };
            self.far.want(key, haste, Box::new(reply));
        }
    }

    /// Has fetched what will be wanted: the pages of the working set, in this order, and whatever else there is to be
    /// fetched. `codes` are those of the whole memory.
    pub(crate) fn bring(&mut self, set: impl Iterator<Item = u64>, codes: &[u8]) {
        let key = |page: u64| {
            let layer = codes[index(page)].checked_sub(1)?;
            Some(self.place(layer, page).0)
        };
        let mut keys: Vec<Key> = set.filter_map(key).collect();
        let pages = keys.len();
        keys.dedup();
        let together = pages >= TOGETHER * keys.len();
        self.far.bring(keys);
        if self.prefetch == Prefetch::All {
            let mut keys: Vec<Key> = Vec::new();
            for key in (0..length(codes.len())).filter_map(key) {
                if keys.last() != Some(&key) {
                    keys.push(key);
                }
            }
            keys.sort_unstable_by_key(|key| (key.layer, key.chunk));
            keys.dedup();
            self.far.bring(keys);
        }
        self.together = together;
    }

    /// The bytes and requests since this was asked last.
    pub(crate) fn fetched(&self) -> (u64, u64) {
        self.far.fetched()
    }
}

fn page_of(raw: &[u8], at: u16) -> &[u8] {
    // An index is compared with itself when it is read, and a chunk with its index.
    &raw[usize::from(at) * PAGE..][..PAGE]
}

/// A page of what is gathered, which is page `at` of a chunk.
struct Part {
    into: usize,
    at: u16,
    page: u64,
}

impl Part {
    fn copy(&self, raw: &[u8], buffer: &mut [u8]) {
        buffer[self.into * PAGE..][..PAGE].copy_from_slice(page_of(raw, self.at));
    }
}

type Finish = Box<dyn FnOnce(Result<Vec<u8>, KillReason>) + Send>;

/// Pages that wait for the last of their chunks.
struct Gathering {
    buffer: Vec<u8>,
    left: usize,
    /// None once it was called.
    finish: Option<Finish>,
}

impl Gathering {
    fn take(&mut self, raw: Result<Arc<Vec<u8>>, Unfetched>, parts: &[Part]) {
        let result = match raw {
            Ok(raw) => {
                for part in parts {
                    part.copy(&raw, &mut self.buffer);
                }
                self.left -= 1;
                if self.left > 0 {
                    return;
                }
                Ok(std::mem::take(&mut self.buffer))
            }
            Err(Unfetched(said)) => Err(KillReason::Unfetched {
                page: parts.first().map_or(0, |part| part.page),
                said,
            }),
        };
        if let Some(finish) = self.finish.take() {
            finish(result);
        }
    }
}
