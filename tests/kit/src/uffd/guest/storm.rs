//! Removals over pages that other threads look at, and what a look may see.
//!
//! ```text
//!   a page        KEPT ───a removal begins──► GOING ───it has returned──► GONE, for ever
//!   may hold      the file's bytes            these, or zeros             zeros
//! ```
//!
//! A look reads what became of the page before and after it reads the page itself. A page that was gone before must be
//! zeros, one that is still kept after must be the file's, and in between it may turn from one into the other once.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::{Guest, WORDS, word_of};
use crate::dice::Dice;
use crate::uffd::{Seen, Storm};

const KEPT: u8 = 0;
const GOING: u8 = 1;
const GONE: u8 = 2;
const FATES: [&str; 3] = ["kept", "going", "gone"];

/// How long one removal, or one look, may take. Each takes microseconds, a few milliseconds on a bad day.
const PATIENCE: Duration = Duration::from_secs(20);
const GLANCE: Duration = Duration::from_millis(100);
/// The most pages that are given back at once.
const RUN: usize = 8;
/// The longest pause between two removals, in µs. Without any nothing would be brought between them.
const PAUSE: usize = 300;
/// How far a reader walks when it does not jump.
const WALK: usize = 48;

/// Sets the threads going and waits for them, but not for one that hangs.
pub(super) fn rage(guest: &Arc<Guest>, storm: Storm) -> anyhow::Result<Seen> {
    let threads = storm.removers + storm.readers;
    let sky = Arc::new(Sky {
        guest: Arc::clone(guest),
        fates: storm.stamps.iter().map(|_| AtomicU8::new(KEPT)).collect(),
        removers: AtomicUsize::new(storm.removers),
        doing: (0..threads).map(|_| Mutex::default()).collect(),
        tally: Tally::default(),
        storm,
    });
    let (tell, told) = mpsc::channel();
    for thread in 0..threads {
        let (sky, tell) = (Arc::clone(&sky), tell.clone());
        // Nobody listens any more once one has failed.
        thread::spawn(move || tell.send(sky.take_part(thread)));
    }
    drop(tell);
    let mut left = threads;
    while left > 0 {
        match told.recv_timeout(GLANCE) {
            Ok(end) => {
                end?;
                left -= 1;
            }
            Err(RecvTimeoutError::Timeout) => sky.moves()?,
            Err(RecvTimeoutError::Disconnected) => bail!("a thread of the storm panicked"),
        }
    }
    // Nothing changes any more.
    for at in 0..sky.fates.len() {
        sky.look(at)?;
    }
    Ok(sky.tally.seen())
}

struct Sky {
    guest: Arc<Guest>,
    storm: Storm,
    fates: Vec<AtomicU8>,
    /// Those that are not done.
    removers: AtomicUsize,
    doing: Vec<Mutex<Doing>>,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    kept: AtomicU64,
    gone: AtomicU64,
    going: AtomicU64,
    removed: AtomicU64,
}

impl Tally {
    fn seen(&self) -> Seen {
        let [kept, gone, going, removed] = [&self.kept, &self.gone, &self.going, &self.removed]
            .map(|count| count.load(Ordering::Relaxed));
        Seen {
            kept,
            gone,
            going,
            removed,
        }
    }
}

/// What a thread is at.
#[derive(Default)]
enum Doing {
    #[default]
    Nothing,
    Looking {
        page: usize,
        since: Instant,
    },
    Removing {
        page: usize,
        count: usize,
        since: Instant,
    },
}

impl Doing {
    fn since(&self) -> Option<Instant> {
        match self {
            Doing::Nothing => None,
            Doing::Looking { since, .. } | Doing::Removing { since, .. } => Some(*since),
        }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doing::Nothing => write!(f, "done"),
            Doing::Looking { page, since } => {
                write!(f, "looking at page {page} for {:?}", since.elapsed())
            }
            Doing::Removing { page, count, since } => {
                let time = since.elapsed();
                write!(f, "giving back {count} pages from {page} on for {time:?}")
            }
        }
    }
}

impl Sky {
    fn take_part(&self, me: usize) -> anyhow::Result<()> {
        let number = u64::try_from(me)?;
        let mut dice = Dice::of(self.storm.seed.wrapping_add(number << 48));
        if me < self.storm.removers {
            for _ in 0..self.storm.removals {
                self.remove(me, &mut dice)?;
                if dice.up_to(2) == 0 {
                    thread::sleep(Duration::from_micros(u64::try_from(dice.up_to(PAUSE))?));
                }
            }
            self.removers.fetch_sub(1, Ordering::Relaxed);
        } else {
            while self.removers.load(Ordering::Relaxed) > 0 {
                self.read(me, &mut dice)?;
            }
        }
        self.note(me, Doing::Nothing);
        Ok(())
    }

    fn note(&self, thread: usize, doing: Doing) {
        *self.doing[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = doing;
    }

    /// Fails when a thread has been at the same thing for too long.
    fn moves(&self) -> anyhow::Result<()> {
        let doing = || {
            let locked = self.doing.iter();
            locked.map(|doing| doing.lock().unwrap_or_else(PoisonError::into_inner))
        };
        let hangs = |doing: &Doing| doing.since().is_some_and(|at| at.elapsed() > PATIENCE);
        if doing().any(|doing| hangs(&doing)) {
            let all: Vec<_> = doing().map(|doing| doing.to_string()).collect();
            bail!("it hangs: {}", all.join("; "));
        }
        Ok(())
    }

    fn remove(&self, thread: usize, dice: &mut Dice) -> anyhow::Result<()> {
        let at = dice.up_to(self.fates.len());
        let end = (at + 1 + dice.up_to(RUN)).min(self.fates.len());
        let becomes = |fate| {
            for page in &self.fates[at..end] {
                page.fetch_max(fate, Ordering::SeqCst);
            }
        };
        let (page, count, since) = (self.storm.page + at, end - at, Instant::now());
        self.note(thread, Doing::Removing { page, count, since });
        becomes(GOING);
        self.guest.drop_pages(page, count)?;
        becomes(GONE);
        self.tally
            .removed
            .fetch_add(u64::try_from(count)?, Ordering::Relaxed);
        if thread > 0 {
            self.look_at_all(thread, at..end)?;
        }
        Ok(())
    }

    fn read(&self, thread: usize, dice: &mut Dice) -> anyhow::Result<()> {
        let at = dice.up_to(self.fates.len());
        let count = if dice.up_to(8) == 0 { WALK } else { 1 };
        self.look_at_all(thread, at..(at + count).min(self.fates.len()))
    }

    fn look_at_all(&self, thread: usize, pages: std::ops::Range<usize>) -> anyhow::Result<()> {
        for at in pages {
            let (page, since) = (self.storm.page + at, Instant::now());
            self.note(thread, Doing::Looking { page, since });
            self.look(at)?;
        }
        Ok(())
    }

    fn look(&self, at: usize) -> anyhow::Result<()> {
        let (page, stamp) = (self.storm.page + at, self.storm.stamps[at]);
        let (region, offset) = self.guest.locate(page);
        let before = self.fates[at].load(Ordering::SeqCst);
        // From which word on it is zeros.
        let mut zeros_from = WORDS;
        for n in 0..WORDS {
            let (word, file) = (region.load(offset + n * 8), word_of(stamp, n));
            if word == 0 && file != 0 {
                zeros_from = zeros_from.min(n);
            }
            let right = word == file && zeros_from == WORDS || word == 0;
            ensure!(
                right,
                "page {page}: word {n} is {word:x}, the file has {file:x}, zeros from {zeros_from} on"
            );
        }
        fence(Ordering::SeqCst);
        let after = self.fates[at].load(Ordering::SeqCst);
        let (right, count) = match (before, after) {
            (GONE, _) => (zeros_from == 0, &self.tally.gone),
            (_, KEPT) => (zeros_from == WORDS, &self.tally.kept),
            _ => (true, &self.tally.going),
        };
        ensure!(
            right || stamp == 0,
            "page {page} is zeros from word {zeros_from} of {WORDS} on; it was {} before the look, {} after it",
            FATES[usize::from(before)],
            FATES[usize::from(after)]
        );
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
