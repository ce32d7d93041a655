//! Chunks of a repository, proven: many with few requests, or one.
//!
//! Chunks that lie together in a pack are asked for together. One that comes damaged is asked for once more, by itself:
//! the way may have been bad, and not the place. What a cache has is not asked for.

use crate::packed::cache::Cache;
use crate::packed::chunk::{ChunkError, decode};
use crate::packed::index::{Chunk, Index};
use crate::packed::objects::{Object, ObjectError, Objects};
use crate::unit::index as at;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use thiserror::Error;

/// The most that is asked for at once, in bytes: what a thread has in memory.
const LONGEST_RUN: u64 = 2 << 20;

/// What may lie between two chunks that are asked for together, in bytes: fetching it costs less than a request.
const GAP: u64 = 64 << 10;

/// Who takes a chunk, by its number; asked from several threads.
pub type Take<'a, E> = &'a (dyn Fn(u32, &[u8]) -> Result<(), E> + Sync);

/// The pages of a chunk, proven, or why that cannot be had.
pub type Fetched = Result<Arc<Vec<u8>>, FetchError>;

/// Where chunks are fetched from.
#[derive(Debug, Clone, Copy)]
pub struct Fetch<'a> {
    /// What has the packs.
    pub objects: &'a dyn Objects,
    /// What was fetched before, and where what is fetched is kept.
    pub cache: Option<&'a Cache>,
}

/// Why a chunk cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Its pack cannot be read.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// It is wrong, twice.
    #[error("{url} is damaged: the chunk at {offset}")]
    Damaged {
        /// The pack.
        url: String,
        /// Where the chunk starts in it, in bytes.
        offset: u32,
        /// What is wrong with it.
        #[source]
        source: ChunkError,
    },
}

impl Fetch<'_> {
    /// Gives all chunks of a snapshot to `take`, proven, with their numbers; from several threads, in any order.
    ///
    /// # Errors
    /// The first that comes up, here or in `take`. Nothing more is asked for then.
    pub fn all<E: From<FetchError> + Send>(&self, of: &Index, take: Take<'_, E>) -> Result<(), E> {
        self.some(of, (0..).zip(of.chunks()).map(|(number, _)| number), take)
    }

    /// As [`Fetch::all`], for these chunks alone.
    ///
    /// # Errors
    /// Likewise.
    pub fn some<E: From<FetchError> + Send>(
        &self,
        of: &Index,
        numbers: impl Iterator<Item = u32>,
        take: Take<'_, E>,
    ) -> Result<(), E> {
        let mut missing = Vec::new();
        for number in numbers {
            let chunk = &of.chunks()[at(number.into())];
            match self.cache.and_then(|cache| cache.get(chunk)) {
                Some(raw) => take(number, &raw)?,
                None => missing.push(number),
            }
        }
        let runs = runs(of, missing);
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let worker = || {
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.run(of, run, take) {
                    next.store(runs.len(), Ordering::Relaxed);
                    let mut failure = failure.lock().expect("nobody panics with it");
                    failure.get_or_insert(error);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.objects.at_once().min(runs.len()) {
                scope.spawn(worker);
            }
        });
        if let Some(cache) = self.cache {
            cache.trim();
        }
        match failure.into_inner().expect("nobody panics with it") {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    fn run<E: From<FetchError>>(&self, of: &Index, run: &Run, take: Take<'_, E>) -> Result<(), E> {
        self.together(of, run, &mut |number, raw| take(number, &raw?))
    }

    /// Gives each chunk of a run to `take`, proven, or why that one cannot be had: what came well first, before it is kept
    /// and before the rest is asked for once more. It need not have been looked for in the cache.
    ///
    /// # Errors
    /// If none of them can be had; the first error of `take`, and nothing follows.
    pub fn together<E: From<FetchError>>(
        &self,
        of: &Index,
        run: &Run,
        take: &mut dyn FnMut(u32, Fetched) -> Result<(), E>,
    ) -> Result<(), E> {
        let pack = pack(of, run.pack);
        let bytes = self.read(of, &pack, run.range.clone())?;
        let mut give = |number: u32, raw: Fetched| -> Result<(), E> {
            let kept = raw.as_ref().ok().cloned();
            take(number, raw)?;
            if let Some(raw) = kept {
                self.keep(&of.chunks()[at(number.into())], &raw);
            }
            Ok(())
        };
        let mut damaged = Vec::new();
        for &number in &run.chunks {
            let chunk = &of.chunks()[at(number.into())];
            let start = at(chunk.range().start - run.range.start);
            let stored = &bytes[start..start + at(chunk.stored.into())];
            match decode(chunk, stored) {
                Ok(raw) => give(number, Ok(Arc::new(raw)))?,
                Err(_) => damaged.push(number),
            }
        }
        for number in damaged {
            give(number, self.one(of, number).map(Arc::new))?;
        }
        Ok(())
    }

    /// One chunk, proven, if it can be had without waiting for a disk or a network.
    pub fn at_once(&self, of: &Index, number: u32) -> Option<Vec<u8>> {
        let chunk = &of.chunks()[at(number.into())];
        if let Some(cache) = self.cache {
            return cache.get_at_once(chunk);
        }
        let pack = pack(of, chunk.pack);
        let stored = self.objects.read_at_once(&pack, chunk.range())?;
        // What is wrong with it is for who may ask once more.
        decode(chunk, stored).ok()
    }

    /// One chunk, by a request of its own.
    fn one(&self, of: &Index, number: u32) -> Result<Vec<u8>, FetchError> {
        let chunk = &of.chunks()[at(number.into())];
        let pack = pack(of, chunk.pack);
        let stored = self.read(of, &pack, chunk.range())?;
        decode(chunk, stored).map_err(|source| FetchError::Damaged {
            url: self.objects.url(&pack),
            offset: chunk.offset,
            source,
        })
    }

    fn read(&self, of: &Index, pack: &Object, range: Range<u64>) -> Result<Vec<u8>, FetchError> {
        self.objects.read(pack, range).map_err(|error| {
            // Another index may be there by now, which needs another pack.
            if let (ObjectError::Missing { .. }, Some(cache)) = (&error, self.cache) {
                cache.forget_index(&self.objects.url(&Object::Snapshot(of.manifest().id)));
            }
            error.into()
        })
    }

    fn keep(&self, chunk: &Chunk, raw: &[u8]) {
        if let Some(cache) = self.cache {
            cache.put(chunk, raw);
        }
    }
}

fn pack(of: &Index, number: u32) -> Object {
    Object::Pack(of.packs()[at(number.into())].name)
}

/// Chunks of one pack that one request brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pack: u32,
    range: Range<u64>,
    chunks: Vec<u32>,
}

impl Run {
    /// One chunk.
    pub fn of(index: &Index, number: u32) -> Self {
        let chunk = &index.chunks()[at(number.into())];
        Self {
            pack: chunk.pack,
            range: chunk.range(),
            chunks: vec![number],
        }
    }

    /// Takes one more chunk in, if it lies behind those that it has, near enough, and if it is not too much then.
    pub fn take_in(&mut self, index: &Index, number: u32) -> bool {
        let chunk = &index.chunks()[at(number.into())];
        let range = chunk.range();
        let fits = chunk.pack == self.pack
            && (self.range.start..=self.range.end + GAP).contains(&range.start)
            && range.end <= self.range.start + LONGEST_RUN;
        if fits {
            self.range.end = self.range.end.max(range.end);
            self.chunks.push(number);
        }
        fits
    }

    /// Its chunks.
    pub fn chunks(&self) -> &[u32] {
        &self.chunks
    }

    /// How many bytes it asks for.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// The requests that bring these chunks, in the order of the packs.
fn runs(of: &Index, mut chunks: Vec<u32>) -> Vec<Run> {
    let chunk = |number: u32| &of.chunks()[at(number.into())];
    chunks.sort_by_key(|&number| (chunk(number).pack, chunk(number).offset));
    let mut runs: Vec<Run> = Vec::new();
    for number in chunks {
        if !runs.last_mut().is_some_and(|run| run.take_in(of, number)) {
            runs.push(Run::of(of, number));
        }
    }
    runs
}
