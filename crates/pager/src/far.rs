//! Chunks of a repository, fetched by threads of their own: what somebody waits for first, then what will be wanted.
//!
//! ```text
//!   want(chunk) ──► urgent ─┐                       ┌─► the host's cache, what is at hand
//!                   later ──┼─► a few requests ─────┤
//!   bring(order) ─► later ──┘   at once, of chunks  └─► everybody who waits for one of its chunks
//!                               that lie together
//! ```
//!
//! Who is waited for never stands behind what nobody waits for: of the requests under way a half at the most are for
//! that. A chunk is under way once, however many want it. One that cannot be had is wanted anew by whoever asks next.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rekindle_store::causes::with_causes;
use rekindle_store::packed::{Cache, Fetch, FetchError, Index, Objects, Run};

use crate::recent::Recent;
use crate::trace::Kind;
use crate::unit::index as at;

/// As many requests are under way at once.
const THREADS: usize = 16;
/// So many of them at the most for what nobody waits for.
const LATER: usize = 8;

/// After so many looks into the cache for what may not have to be fetched, whoever waits for the queue is let in.
const MOST_LOOKS: usize = 512;

/// A chunk: the number of its layer's index, and its own in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) layer: u8,
    pub(crate) chunk: u32,
}

/// Why a chunk cannot be had, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unfetched(pub(crate) String);

/// Whether somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Haste {
    /// The guest does.
    Urgent,
    /// Nobody does.
    Later,
}

impl From<Kind> for Haste {
    fn from(kind: Kind) -> Haste {
        match kind {
            Kind::Demand => Haste::Urgent,
            Kind::Around | Kind::Replay | Kind::Zero => Haste::Later,
        }
    }
}

type Raw = Arc<Vec<u8>>;
type Reply = Box<dyn FnOnce(Result<Raw, Unfetched>) + Send>;

/// The repository, and what was fetched of it.
#[derive(Debug)]
pub(crate) struct Far {
    shared: Arc<Shared>,
}

struct Shared {
    indexes: Vec<Arc<Index>>,
    objects: Box<dyn Objects>,
    cache: Option<Cache>,
    recent: Mutex<Recent>,
    queue: Mutex<Queue>,
    more: Condvar,
    bytes: AtomicU64,
    requests: AtomicU64,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Key>,
    later: VecDeque<Key>,
    waiting: HashMap<Key, Waiting>,
    under_way: HashSet<Key>,
    later_under_way: usize,
    threads: usize,
    closed: bool,
}

#[derive(Default)]
struct Waiting {
    urgent: bool,
    replies: Vec<Reply>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Far").field(&self.objects).finish()
    }
}

impl Far {
    pub(crate) fn new(
        indexes: Vec<Arc<Index>>,
        objects: Box<dyn Objects>,
        cache: Option<Cache>,
    ) -> Far {
        Far {
            shared: Arc::new(Shared {
                indexes,
                objects,
                cache,
                recent: Mutex::default(),
                queue: Mutex::default(),
                more: Condvar::new(),
                bytes: AtomicU64::new(0),
                requests: AtomicU64::new(0),
            }),
        }
    }

    pub(crate) fn indexes(&self) -> &[Arc<Index>] {
        &self.shared.indexes
    }

    /// A chunk that was used a moment ago, without waiting for anything.
    pub(crate) fn at_hand(&self, key: Key) -> Option<Raw> {
        self.shared.recent().get(key)
    }

    /// A chunk that is in this host's memory, though it has to be read and proven first.
    pub(crate) fn in_memory(&self, key: Key) -> Option<Raw> {
        self.shared.in_memory(key)
    }

    /// A chunk that is on this host. Waits for its disk.
    pub(crate) fn here(&self, key: Key) -> Option<Raw> {
        self.shared.here(key)
    }

    /// Has a chunk fetched, and `reply` called by whoever fetches it.
    pub(crate) fn want(&self, key: Key, haste: Haste, reply: Reply) {
        let mut queue = self.shared.queue();
        // It may have come since it was looked for.
        let recent = self.shared.recent().get(key);
        if let Some(raw) = recent {
            drop(queue);
            return reply(Ok(raw));
        }
        let waiting = queue.waiting.entry(key).or_default();
        waiting.replies.push(reply);
        let first = waiting.replies.len() == 1;
        let more_urgent = haste == Haste::Urgent && !waiting.urgent;
        waiting.urgent |= more_urgent;
        if !queue.under_way.contains(&key) {
            match haste {
                Haste::Urgent if more_urgent => queue.urgent.push_back(key),
                Haste::Later if first => queue.later.push_back(key),
                _ => {}
            }
        }
        self.shared.work(&mut queue);
    }

    /// Has chunks fetched that will be wanted, in this order, after all that was asked for before.
    pub(crate) fn bring(&self, keys: impl IntoIterator<Item = Key>) {
        if self.shared.cache.is_none() {
            // There is nowhere to keep them.
            return;
        }
        let mut queue = self.shared.queue();
        queue.later.extend(keys);
        for _ in 0..LATER {
            self.shared.work(&mut queue);
        }
    }

    /// The bytes and requests since this was asked last.
    pub(crate) fn fetched(&self) -> (u64, u64) {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        (take(&self.shared.bytes), take(&self.shared.requests))
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.more.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn here(&self, key: Key) -> Option<Raw> {
        if let Some(raw) = self.recent().get(key) {
            return Some(raw);
        }
        let index = &self.indexes[usize::from(key.layer)];
        let chunk = &index.chunks()[at(key.chunk.into())];
        let raw = Arc::new(self.cache.as_ref()?.get(chunk)?);
        self.recent().put(key, raw.clone());
        Some(raw)
    }

    fn in_memory(&self, key: Key) -> Option<Raw> {
        let index = &self.indexes[usize::from(key.layer)];
        let raw = Arc::new(self.fetch_from().at_once(index, key.chunk)?);
        self.recent().put(key, raw.clone());
        Some(raw)
    }

    fn fetch_from(&self) -> Fetch<'_> {
        Fetch {
            objects: &*self.objects,
            cache: self.cache.as_ref(),
        }
    }

    /// Sees to it that somebody does what there is to do.
    fn work(self: &Arc<Self>, queue: &mut Queue) {
        if queue.threads < THREADS {
            let shared = self.clone();
            let spawned = thread::Builder::new()
                .name("pager-far".into())
                .spawn(move || shared.fetch_all());
            // Those that there are do it, a little later.
            queue.threads += usize::from(spawned.is_ok());
        }
        if queue.threads == 0 {
            let why = Unfetched("there can be no thread to fetch it".into());
            let waiting = std::mem::take(&mut queue.waiting).into_values();
            waiting
                .flat_map(|one| one.replies)
                .for_each(|reply| reply(Err(why.clone())));
        }
        self.more.notify_one();
    }

    fn fetch_all(&self) {
        let mut queue = self.queue();
        loop {
            if queue.closed {
                return;
            }
            let (layer, run, haste) = match self.next(&mut queue) {
                Next::Run(layer, run, haste) => (layer, run, haste),
                Next::Nothing => {
                    queue = self
                        .more
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Next::Perhaps => {
                    drop(queue);
                    thread::yield_now();
                    queue = self.queue();
                    continue;
                }
            };
            drop(queue);
            self.fetch(UnderWay {
                far: self,
                layer,
                left: run.chunks().to_vec(),
                run,
                haste,
                why: Unfetched("the thread that fetched it panicked".into()),
            });
            queue = self.queue();
        }
    }

    /// What to ask for next: the first chunk in the row, with those in the row that lie behind it.
    fn next(&self, queue: &mut Queue) -> Next {
        for _ in 0..MOST_LOOKS {
            let (haste, key) = match queue.urgent.pop_front() {
                Some(key) => (Haste::Urgent, key),
                None if queue.later_under_way == LATER => return Next::Nothing,
                None => match queue.later.pop_front() {
                    Some(key) => (Haste::Later, key),
                    None => return Next::Nothing,
                },
            };
            if !self.is_wanted(queue, key) {
                continue;
            }
            let index = &self.indexes[usize::from(key.layer)];
            let mut run = Run::of(index, key.chunk);
            queue.under_way.insert(key);
            let row = match haste {
                Haste::Urgent => &mut queue.urgent,
                Haste::Later => &mut queue.later,
            };
            let mut row = std::mem::take(row);
            for _ in 0..MOST_LOOKS {
                let Some(&next) = row.front() else { break };
                if self.is_wanted(queue, next) {
                    if next.layer != key.layer || !run.take_in(index, next.chunk) {
                        break;
                    }
                    queue.under_way.insert(next);
                }
                row.pop_front();
            }
            match haste {
                Haste::Urgent => queue.urgent = row,
                Haste::Later => queue.later = row,
            }
            queue.later_under_way += usize::from(haste == Haste::Later);
            return Next::Run(key.layer, run, haste);
        }
        Next::Perhaps
    }

    /// Whether a chunk that stands in a row has to be fetched still.
    fn is_wanted(&self, queue: &Queue, key: Key) -> bool {
        if queue.under_way.contains(&key) {
            return false;
        }
        let chunk = &self.indexes[usize::from(key.layer)].chunks()[at(key.chunk.into())];
        let lacks = |cache: &Cache| !cache.has(chunk);
        queue.waiting.contains_key(&key) || self.cache.as_ref().is_some_and(lacks)
    }

    fn fetch(&self, mut under_way: UnderWay<'_>) {
        let (layer, haste) = (under_way.layer, under_way.haste);
        let UnderWay { run, left, .. } = &mut under_way;
        let fetch = self.fetch_from();
        let index = &self.indexes[usize::from(layer)];
        self.bytes.fetch_add(run.bytes(), Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        let fetched = fetch.together::<FetchError>(index, run, &mut |chunk, raw| {
            let raw = raw.map_err(|error| in_words(&error));
            left.retain(|other| *other != chunk);
            self.came(Key { layer, chunk }, haste, raw);
            Ok(())
        });
        if let Err(error) = fetched {
            under_way.why = in_words(&error);
        }
    }

    fn came(&self, key: Key, haste: Haste, raw: Result<Raw, Unfetched>) {
        let mut queue = self.queue();
        queue.under_way.remove(&key);
        let urgent = queue.waiting.get(&key).map(|waiting| waiting.urgent);
        if raw.is_err() && haste == Haste::Later && urgent == Some(true) {
            // It was tried before anybody waited: who waits now has a right to all the patience.
            queue.urgent.push_back(key);
            self.more.notify_one();
            return;
        }
        if let Ok(raw) = &raw {
            self.recent().put(key, raw.clone());
        }
        let waiting = queue.waiting.remove(&key);
        drop(queue);
        for reply in waiting.into_iter().flat_map(|waiting| waiting.replies) {
            reply(raw.clone());
        }
    }
}

/// What there is to do.
enum Next {
    /// To ask for this, of that layer.
    Run(u8, Run, Haste),
    /// Nothing, until something is wanted.
    Nothing,
    /// That is not known yet.
    Perhaps,
}

/// A request. However it ends, nobody waits for it for ever: what has not come by then does not come.
struct UnderWay<'a> {
    far: &'a Shared,
    layer: u8,
    run: Run,
    /// What has not come yet.
    left: Vec<u32>,
    haste: Haste,
    why: Unfetched,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let panicked = thread::panicking();
        // A panic may come again.
        let haste = match panicked {
            true => Haste::Urgent,
            false => self.haste,
        };
        for &chunk in &self.left {
            let layer = self.layer;
            self.far
                .came(Key { layer, chunk }, haste, Err(self.why.clone()));
        }
        let mut queue = self.far.queue();
        queue.threads -= usize::from(panicked);
        queue.later_under_way -= usize::from(self.haste == Haste::Later);
    }
}

fn in_words(error: &FetchError) -> Unfetched {
    Unfetched(with_causes(error))
}
