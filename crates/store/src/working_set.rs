//! The file `working-set`: which pages the guests of a snapshot touched first, and how surely the next one will.
//!
//! ```text
//! a guest runs     ──faults, in order─────────────► Run::faulted              +1, or enters with 1
//!   the page server replays the set, but for a
//!   small sample of it that changes from run to run
//!                  ──sample, never asked for──────► Run::held_back_untouched  −2, leaves at 0
//! merge_into       lock beside ► read ► merge ► write beside ► rename
//! ```
//!
//! A page that was replayed is there before the guest asks, so nobody can see whether it would have asked: a set that
//! is only ever added to would grow until it is all of the memory. So the page server holds a few pages of the set
//! back in each run and looks whether the guest asks for them. A page that it asks for is confirmed; one that nobody
//! asks for fades, twice as fast as it came, and leaves. How often it was seen decides how many such tests it
//! survives.
//!
//! Times are coarse: see [`coarse`]. Pages that came at the same coarse time stand in the order of the memory, which
//! is the order to read them in.
//!
//! A set is a hint. A wrong one costs time and never a wrong byte, so it is neither sealed by the manifest nor
//! flushed to the disk; but it is read with the care for a file that a stranger wrote. Bytes:
//! `docs/snapshot-format.md`.

mod file;
mod format;

pub use file::{merge_into, read, read_for, read_opened};

use crate::file::FileError;
use crate::manifest::MAX_MEMORY;
use crate::unit::{ByteOffset, ByteSize, HUGE_PAGE_SIZE, PAGE_SIZE};
use thiserror::Error;

/// The version of the file that this program writes, and the only one that it reads.
pub const VERSION: u32 = 1;

/// The most that a page is known for; a page that was seen oftener is not surer.
pub const MAX_COUNT: u8 = 8;

/// The largest file that is read or written.
pub const MAX_SIZE: ByteSize = ByteSize::new(64 << 20);

/// What a page loses that was held back, and that the guest did not ask for.
const FADE: u8 = 2;

/// A page that guests touched: where, when, how surely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Its index, in pages of the VM's page size.
    pub page: u64,
    /// When it was touched: µs since the first fault of the run that brought it in, [`coarse`].
    pub at_us: u32,
    /// In how many runs it was seen, less what it lost since; 1 to [`MAX_COUNT`].
    pub count: u8,
}

/// The pages that guests of a snapshot touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    page_size: u64,
    pages: u64,
    runs: u32,
    // By time, then page; each page once.
    touched: Vec<Touched>,
}

/// What one run of a guest tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The pages that the guest asked for. Their counts mean nothing, and of a page that stands here twice the
    /// earliest counts.
    pub faulted: Vec<Touched>,
    /// Pages of the set that were held back on purpose, and that the guest never asked for. One that faulted all
    /// the same, or is not in the set, is passed over.
    pub held_back_untouched: Vec<u64>,
}

/// Why there is no working set.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// A file could not be read, written or locked.
    #[error(transparent)]
    File(#[from] FileError),
    /// No memory is like that: pages have 4096 bytes or 2 MiB, and there are some, and not too many.
    #[error("no memory has {pages} pages of {page_size} bytes")]
    Memory {
        /// The size of a page, in bytes.
        page_size: u64,
        /// How many there are.
        pages: u64,
    },
    /// The set is that of another memory.
    #[error(
        "the working set is that of {pages} pages of {page_size} bytes, which is another memory"
    )]
    OtherMemory {
        /// The size of a page of that memory, in bytes.
        page_size: u64,
        /// How many it has.
        pages: u64,
    },
    /// A page does not exist.
    #[error("page {page} is beyond the end of a memory of {pages} pages")]
    OutOfRange {
        /// The page, or the first one of a run that reaches too far.
        page: u64,
        /// How many there are.
        pages: u64,
    },
    /// It is too short to hold even an empty set.
    #[error("the working set is cut off")]
    TooShort,
    /// It is longer than any set of such a memory.
    #[error("the working set is larger than {limit} bytes")]
    TooLarge {
        /// The most that it can have.
        limit: ByteSize,
    },
    /// It is something else.
    #[error("it is no working set")]
    NotWorkingSet,
    /// A program of another version wrote it.
    #[error("the working set has version {found}, and this program reads version {VERSION}")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// Its checksum is not that of its contents.
    #[error("the working set's checksum is not that of its contents")]
    Checksum,
    /// Its contents are none that a program writes.
    #[error("the working set has {problem} at byte {at}")]
    Malformed {
        /// Where.
        at: ByteOffset,
        /// What is wrong there.
        problem: &'static str,
    },
    /// A page stands in it twice.
    #[error("page {page} is twice in the working set")]
    Twice {
        /// The page.
        page: u64,
    },
}

/// The time that is kept for a page: whole units of 1024 µs, and of a longer time the first 7 binary digits.
///
/// Rounded down, by 1024 µs or 1/64 of it. So a set has no more than 1088 different times however long its runs were,
/// and a time never moves again once it is coarse.
pub const fn coarse(at_us: u32) -> u32 {
    let digits = u32::BITS - at_us.leading_zeros();
    let lost = digits.saturating_sub(7);
    let lost = if lost < format::TICK_BITS {
        format::TICK_BITS
    } else {
        lost
    };
    at_us >> lost << lost
}

impl WorkingSet {
    /// The empty set of a memory that has `pages` pages of `page_size` bytes.
    ///
    /// # Errors
    /// [`WorkingSetError::Memory`] if no memory is like that.
    pub fn new(page_size: u64, pages: u64) -> Result<Self, WorkingSetError> {
        let size = pages.checked_mul(page_size);
        let known = matches!(page_size, PAGE_SIZE | HUGE_PAGE_SIZE);
        match size {
            Some(size) if known && size > 0 && size <= MAX_MEMORY.get() => Ok(Self {
                page_size,
                pages,
                runs: 0,
                touched: Vec::new(),
            }),
            _ => Err(WorkingSetError::Memory { page_size, pages }),
        }
    }

    /// How many runs were merged; no more than fit are counted.
    pub fn runs(&self) -> u32 {
        self.runs
    }

    /// The size of the memory's pages, in bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// How many pages the memory has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The pages in the order of their first touch: by time, then by page; each at most once.
    pub fn touched(&self) -> &[Touched] {
        &self.touched
    }

    /// Adds what one run saw.
    ///
    /// A page that faulted and is known counts one more and keeps its time; one that is new enters with 1. A page that
    /// was held back and not asked for loses 2, and leaves at 0.
    ///
    /// # Errors
    /// [`WorkingSetError::OutOfRange`] if the run names a page that the memory has not; the set is as before then.
    pub fn merge(&mut self, run: &Run) -> Result<(), WorkingSetError> {
        let named = run.faulted.iter().map(|touched| touched.page);
        let named = named.chain(run.held_back_untouched.iter().copied());
        let (mut named, pages) = (named, self.pages);
        if let Some(page) = named.find(|&page| page >= pages) {
            return Err(WorkingSetError::OutOfRange { page, pages });
        }
        let asked = earliest(&run.faulted);
        let mut unasked = run.held_back_untouched.clone();
        unasked.sort_unstable();
        let mut known: Vec<u64> = self.touched.iter().map(|touched| touched.page).collect();
        known.sort_unstable();

        self.touched.retain_mut(|touched| {
            let page = touched.page;
            if asked
                .binary_search_by_key(&page, |asked| asked.page)
                .is_ok()
            {
                touched.count = touched.count.saturating_add(1).min(MAX_COUNT);
            } else if unasked.binary_search(&page).is_ok() {
                touched.count = touched.count.saturating_sub(FADE);
            }
            touched.count > 0
        });
        let new = asked
            .into_iter()
            .filter(|touched| known.binary_search(&touched.page).is_err());
        self.touched.extend(new);
        self.touched
            .sort_unstable_by_key(|touched| (touched.at_us, touched.page));
        self.runs = self.runs.saturating_add(1);
        Ok(())
    }
}

/// Each page once, by page, at its earliest time, seen once.
fn earliest(faulted: &[Touched]) -> Vec<Touched> {
    let seen_once = |touched: &Touched| Touched {
        at_us: coarse(touched.at_us),
        count: 1,
        ..*touched
    };
    let mut pages: Vec<Touched> = faulted.iter().map(seen_once).collect();
    pages.sort_unstable_by_key(|touched| (touched.page, touched.at_us));
    pages.dedup_by_key(|touched| touched.page);
    pages
}

#[cfg(test)]
mod tests;
