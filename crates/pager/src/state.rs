//! What must outlast a page server, in a file that it maps: whoever comes after it reads that and goes on.
//!
//! ```text
//!   header │ counts │ inbox │ histogram │ saved handshake (JSON) │ removed │ recently removed │ trace
//!                      ▲                                            ▲
//!                      │ the kernel writes what it says here        │ a bit a page, for ever
//! ```
//!
//! A page that was given back is zero for ever; a successor that did not know of it would bring the file's
//! bytes back. So no removal may be lost, at whatever instruction a page server dies: the kernel itself writes
//! each message into the [inbox](State::inbox), which is the file, as part of the `read` that lets the removal
//! go on. A successor applies the inbox again, which changes nothing if it was applied before.
//!
//! Everything is in words of this host's byte order: the file means nothing to another host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, MemfdFlags, fallocate, flock, memfd_create};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::bits::Bits;
use crate::histogram::Histogram;
use crate::plan::Plan;
use crate::region::{Region, RegionError, RegionMap};
use crate::sandbox::Confinement;
use crate::stats::Ended;
use crate::sys::{MESSAGE_WORDS, SharedMap};
use crate::trace::{TRACE_WORDS, Trace};
use crate::unit::{PageSize, index, length};
use crate::vm::VmIdentity;

const MAGIC: u64 = u64::from_le_bytes(*b"RKPAGER\x01");
/// The words of one page.
const PAGE: usize = 512;
/// How many messages one `read` may bring.
const MESSAGES: usize = 64;
/// Room for what is saved of a handshake with a few regions; what takes more is given more.
const HANDSHAKE: u64 = 16 * 1024;
/// More than any handshake that is taken, as JSON of ours.
const SAVED_LIMIT: u64 = 1 << 20;

/// What the first words of the file are.
mod header {
    pub(super) const MAGIC: usize = 0;
    pub(super) const SAVED_BYTES: usize = 1;
    /// How many bytes stand from the next word on, which tell how it ended.
    pub(super) const ENDED_BYTES: usize = 2;
    pub(super) const ENDED: usize = 3;
}

/// Numbers that are counted, or noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Count {
    /// The process that serves, or served last.
    Server,
    /// When the handshake came, in nanoseconds of `CLOCK_MONOTONIC`.
    Started,
    /// How many servers there were before this one.
    Takeovers,
    Faults,
    /// Data pages that somebody waited for.
    Demand,
    /// Data pages of the working set, brought before anybody asked.
    Replayed,
    /// Data pages beside one that somebody waited for.
    Around,
    Zeroed,
    Present,
    Removed,
    Bytes,
    Retries,
    /// Pages that had to come from the disk.
    Cold,
    /// When the last page of the working set was in place, in nanoseconds after the handshake.
    ReplayedBy,
    /// When the last known run of zeros was in place, likewise.
    ZeroedBy,
    /// Pages of the working set that were left out as a sample.
    HeldBack,
    /// Those of them that were asked for.
    HeldBackTouched,
    /// Slots of the trace that are taken.
    Traced,
    /// What was fetched from a repository.
    FetchedBytes,
    FetchedRequests,
    /// The user that the page server became, and what else confines it.
    User,
    Confined,
}

/// Bits of [`Count::Confined`].
mod confined {
    pub(super) const SECCOMP: u64 = 1;
    pub(super) const LANDLOCK: u64 = 2;
}

/// What a successor has to know, written before the first page is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub(crate) vm: VmIdentity,
    pub(crate) regions: Vec<Region>,
    pub(crate) memory_bytes: u64,
    #[serde(flatten)]
    pub(crate) plan: Plan,
}

/// Why a page server's state cannot be kept or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file system refused.
    #[error("cannot use the page server's state {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is none, or of another version.
    #[error("{path} is not the state of a page server of this version")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It is shorter than it says.
    #[error("{path} is cut short")]
    Short {
        /// The file.
        path: PathBuf,
    },
    /// The saved handshake cannot be read.
    #[error("the handshake saved in {path} is damaged")]
    Saved {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The saved handshake cannot be right.
    #[error("the regions saved in {path} cannot be served")]
    Regions {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        #[source]
        source: RegionError,
    },
    /// Another page server holds it.
    #[error("the VM is served by process {server}")]
    Served {
        /// The page server.
        server: u64,
    },
}

/// Where everything is, in words.
#[derive(Debug, Clone, Copy)]
struct Layout {
    removed: usize,
    recent: usize,
    trace: usize,
    total: usize,
    /// Words of one set of pages.
    set: usize,
}

const COUNTS: usize = PAGE;
const INBOX: usize = 2 * PAGE;
const HISTOGRAM: usize = 3 * PAGE;
const SAVED: usize = 4 * PAGE;
/// Behind the word that tells whether it is being read into, on a line of its own.
const INBOX_MESSAGES: usize = INBOX + 8;

impl Layout {
    fn of(saved_bytes: u64, pages: u64) -> Layout {
        let set = Bits::words_for(pages);
        let removed = SAVED + index(saved_bytes).div_ceil(8).next_multiple_of(PAGE);
        let recent = removed + set.next_multiple_of(PAGE);
        let trace = recent + set.next_multiple_of(PAGE);
        Layout {
            removed,
            recent,
            trace,
            total: trace + TRACE_WORDS,
            set,
        }
    }

    fn bytes(self) -> u64 {
        length(self.total) * 8
    }
}

/// A page server's state, mapped.
#[derive(Debug)]
pub(crate) struct State {
    map: SharedMap,
    layout: Layout,
    saved: Saved,
    regions: RegionMap,
    /// Carries the lock.
    file: File,
}

impl State {
    /// Starts a state in the room that was taken for it.
    ///
    /// It is one, to whoever looks, when all of it is there.
    pub(crate) fn create(
        room: Room,
        saved: Saved,
        regions: RegionMap,
    ) -> Result<State, StateError> {
        let io = |source: io::Error| room.failed(source);
        let text = serde_json::to_vec(&saved).map_err(|e| io(e.into()))?;
        let layout = Layout::of(length(text.len()), regions.pages());
        let file = &room.file;
        fallocate(file, FallocateFlags::empty(), 0, layout.bytes()).map_err(|e| io(e.into()))?;
        file.write_all_at(&text, length(SAVED) * 8).map_err(io)?;
        let map = SharedMap::of(file, layout.total).map_err(io)?;
        map.words()[header::SAVED_BYTES].store(length(text.len()), Ordering::Relaxed);
        let state = State {
            map,
            layout,
            saved,
            regions,
            file: room.keep(),
        };
        state.set(Count::Started, now());
        state.set(Count::Server, u64::from(std::process::id()));
        state.map.words()[header::MAGIC].store(MAGIC, Ordering::Release);
        Ok(state)
    }

    /// Reads the state that a page server left, or keeps; anything in it may be wrong.
    pub(crate) fn open(path: &Path) -> Result<State, StateError> {
        let io = |source: io::Error| StateError::Io {
            path: path.into(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)
            .map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        let foreign = || StateError::Foreign { path: path.into() };
        if !metadata.is_file() || metadata.len() < length(SAVED) * 8 {
            return Err(foreign());
        }
        let mut start = [0; 16];
        file.read_exact_at(&mut start, 0).map_err(io)?;
        let (words, _) = start.as_chunks();
        let [magic, saved_bytes] = [words[header::MAGIC], words[header::SAVED_BYTES]];
        if magic == [0; 8] {
            // The handshake has not come yet.
            return Err(io(io::ErrorKind::NotFound.into()));
        }
        let saved_bytes = u64::from_ne_bytes(saved_bytes);
        if u64::from_ne_bytes(magic) != MAGIC || saved_bytes > SAVED_LIMIT {
            return Err(foreign());
        }
        let mut text = vec![0; index(saved_bytes)];
        file.read_exact_at(&mut text, length(SAVED) * 8)
            .map_err(io)?;
        let mut saved: Saved =
            serde_json::from_slice(&text).map_err(|source| StateError::Saved {
                path: path.into(),
                source,
            })?;
        if let Some(plan) = Plan::read(path)? {
            saved.plan = plan;
        }
        let regions =
            RegionMap::new(saved.regions.clone(), saved.memory_bytes).map_err(|source| {
                StateError::Regions {
                    path: path.into(),
                    source,
                }
            })?;
        let layout = Layout::of(saved_bytes, regions.pages());
        if metadata.len() < layout.bytes() {
            return Err(StateError::Short { path: path.into() });
        }
        let map = SharedMap::of(&file, layout.total).map_err(io)?;
        Ok(State {
            map,
            layout,
            saved,
            regions,
            file,
        })
    }

    /// Becomes the one that serves, unless somebody else does.
    pub(crate) fn own(&self) -> Result<(), StateError> {
        let how = FlockOperation::NonBlockingLockExclusive;
        match rustix::io::retry_on_intr(|| flock(&self.file, how)) {
            Ok(()) => {
                self.set(Count::Server, u64::from(std::process::id()));
                self.add(Count::Takeovers, 1);
                Ok(())
            }
            Err(Errno::WOULDBLOCK) => Err(StateError::Served {
                server: self.get(Count::Server),
            }),
            Err(errno) => Err(StateError::Io {
                path: PathBuf::from("(lock)"),
                source: errno.into(),
            }),
        }
    }

    pub(crate) fn saved(&self) -> &Saved {
        &self.saved
    }

    pub(crate) fn regions(&self) -> &RegionMap {
        &self.regions
    }

    pub(crate) fn get(&self, count: Count) -> u64 {
        self.count(count).load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, count: Count, n: u64) {
        self.count(count).store(n, Ordering::Relaxed);
    }

    /// Only the one that serves counts, on one thread, so there is nothing to be lost between the two halves.
    pub(crate) fn add(&self, count: Count, n: u64) {
        let count = self.count(count);
        count.store(
            count.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// Nanoseconds since the handshake.
    pub(crate) fn age(&self) -> u64 {
        now().saturating_sub(self.get(Count::Started))
    }

    /// Where the kernel writes messages to.
    pub(crate) fn inbox(&self) -> &[AtomicU64] {
        &self.map.words()[INBOX_MESSAGES..INBOX_MESSAGES + MESSAGES * MESSAGE_WORDS]
    }

    /// A message of the inbox; all zeros where there never was one.
    pub(crate) fn message(&self, at: usize) -> [u64; MESSAGE_WORDS] {
        let words = &self.inbox()[at * MESSAGE_WORDS..];
        std::array::from_fn(|word| words[word].load(Ordering::Relaxed))
    }

    /// How many messages the inbox holds.
    pub(crate) const MESSAGES: usize = MESSAGES;

    /// Says whether messages are being read that are not applied yet.
    pub(crate) fn set_reading(&self, reading: bool) {
        self.map.words()[INBOX].store(u64::from(reading), Ordering::Release);
    }

    pub(crate) fn is_reading(&self) -> bool {
        self.map.words()[INBOX].load(Ordering::Acquire) != 0
    }

    /// Says how serving ended, for whoever asks when this process is gone. What is too long for its place is told without
    /// its words.
    pub(crate) fn set_ended(&self, ended: &Ended) {
        let words = &self.map.words()[header::ENDED..PAGE];
        let text = serde_json::to_vec(ended).unwrap_or_default();
        let text = match text.len() > words.len() * 8 {
            true => serde_json::to_vec(&ended.in_short()).unwrap_or_default(),
            false => text,
        };
        let mut chunks = text.chunks(8);
        for (word, chunk) in words.iter().zip(&mut chunks) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        let bytes = length(text.len());
        self.map.words()[header::ENDED_BYTES].store(bytes, Ordering::Release);
    }

    /// How serving ended, if it has, and this program knows the words.
    pub(crate) fn ended(&self) -> Option<Ended> {
        let bytes = index(self.map.words()[header::ENDED_BYTES].load(Ordering::Acquire));
        let words = &self.map.words()[header::ENDED..PAGE];
        if bytes > words.len() * 8 {
            return None;
        }
        let words = words.iter().take(bytes.div_ceil(8));
        let text: Vec<u8> = words
            .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
            .collect();
        serde_json::from_slice(&text[..bytes]).ok()
    }

    pub(crate) fn set_confinement(&self, confinement: Option<Confinement>) {
        let bits = confinement.map_or(0, |confinement| {
            u64::from(confinement.seccomp) * confined::SECCOMP
                + u64::from(confinement.landlock) * confined::LANDLOCK
        });
        let user = confinement.and_then(|confinement| confinement.user);
        self.set(Count::User, u64::from(user.unwrap_or(0)));
        self.set(Count::Confined, bits);
    }

    pub(crate) fn confinement(&self) -> Option<Confinement> {
        let bits = self.get(Count::Confined);
        (bits != 0).then(|| Confinement {
            user: u32::try_from(self.get(Count::User))
                .ok()
                .filter(|user| *user != 0),
            landlock: bits & confined::LANDLOCK != 0,
            seccomp: bits & confined::SECCOMP != 0,
        })
    }

    /// How many bytes it takes.
    pub(crate) fn bytes(&self) -> u64 {
        self.layout.bytes()
    }

    pub(crate) fn histogram(&self) -> Histogram<'_> {
        let words = &self.map.words()[HISTOGRAM..HISTOGRAM + PAGE];
        Histogram::new(words.try_into().expect("a page of words"))
    }

    /// Pages that were given back, ever.
    pub(crate) fn removed(&self) -> Bits<'_> {
        self.set_at(self.layout.removed)
    }

    /// Pages that were given back since somebody last took them out.
    pub(crate) fn recently_removed(&self) -> Bits<'_> {
        self.set_at(self.layout.recent)
    }

    pub(crate) fn trace(&self) -> Trace<'_> {
        let words = &self.map.words()[self.layout.trace..self.layout.total];
        Trace::new(words, self.count(Count::Traced))
    }

    fn set_at(&self, start: usize) -> Bits<'_> {
        Bits::new(&self.map.words()[start..start + self.layout.set])
    }

    fn count(&self, count: Count) -> &AtomicU64 {
        &self.map.words()[COUNTS + count as usize]
    }
}

/// Room for a state, taken before anybody depends on it: a full disk is an error then, and not a SIGBUS later.
/// Dropped, it is gone again, if this process may still do that.
#[derive(Debug)]
pub(crate) struct Room {
    file: File,
    /// Where it is to be.
    path: Option<PathBuf>,
    at: Passing,
}

/// Where a file is that goes with whoever made it.
#[derive(Debug)]
struct Passing(Option<PathBuf>);

impl Drop for Passing {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

impl Room {
    /// Makes a file beside `path`, or in memory alone.
    pub(crate) fn make(path: Option<&Path>) -> Result<Room, StateError> {
        let failed = |source: io::Error| StateError::Io {
            path: path.unwrap_or(Path::new("(memory)")).into(),
            source,
        };
        let next = path.map(|path| path.with_extension("next"));
        let file = match &next {
            None => memfd_create("rekindle-pager", MemfdFlags::CLOEXEC)
                .map_err(|e| failed(e.into()))?
                .into(),
            Some(next) => create(next).map_err(failed)?,
        };
        let (path, at) = (path.map(Path::to_owned), Passing(next));
        Ok(Room { file, path, at })
    }

    /// Takes the room for a guest with that much memory.
    pub(crate) fn reserve(&self, memory_bytes: u64) -> Result<(), StateError> {
        let most = Room::of(memory_bytes);
        fallocate(&self.file, FallocateFlags::empty(), 0, most).map_err(|e| self.failed(e.into()))
    }

    /// How many bytes the state of a guest with that much memory takes.
    pub(crate) fn of(memory_bytes: u64) -> u64 {
        Layout::of(HANDSHAKE, memory_bytes / PageSize::Small.bytes()).bytes()
    }

    /// Gives it its name, and who serves the lock. Whoever had a state there must be dead: it is replaced.
    pub(crate) fn name(&mut self) -> Result<(), StateError> {
        flock(&self.file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| self.failed(e.into()))?;
        if let (Some(at), Some(path)) = (&self.at.0, &self.path)
            && at != path
        {
            fs::rename(at, path).map_err(|e| self.failed(e))?;
            self.at.0 = Some(path.clone());
        }
        Ok(())
    }

    /// It is a state now, and stays.
    fn keep(self) -> File {
        let Room { file, mut at, .. } = self;
        at.0 = None;
        file
    }

    fn failed(&self, source: io::Error) -> StateError {
        let path = self.path.as_deref();
        StateError::Io {
            path: path.unwrap_or(Path::new("(memory)")).into(),
            source,
        }
    }
}

pub(crate) fn create(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Nanoseconds of a clock that all processes of this boot share.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

impl AsFd for State {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}
