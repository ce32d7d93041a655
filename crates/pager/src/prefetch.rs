//! What is brought before anybody asks: the working set, and what is known to be zero.
//!
//! ```text
//!   pieces in order of first touch   ▓▓▓▓▓▓░░░░░▓░░░░░░░░   ▓ brought
//!                                          ▲ next    guest asks for a page of the piece ▼
//!                                                                  ░░░░░░░░
//! ```
//!
//! When the guest asks for a page of a piece that is still to come, it has overtaken us: we go on from there
//! instead of racing it, and come back for what was skipped.

use rekindle_store::working_set::{Touched, WorkingSet};

use crate::source::{Backing, Content};
use crate::unit::{MemoryOffset, PageIndex, PageRun, PageSize};

/// The most that is one piece, in small pages: 64 KiB gives nearly all that batching can.
pub(crate) const PIECE: u64 = 16;
/// One of so many pages of the set is left out, to see whether the guest still asks for it.
const SAMPLE: u64 = 128;
/// What is filled with zeros at once: 2 MiB take some 15 µs.
const ZEROS: u64 = 512;

/// The pieces of a working set, and how far we are.
#[derive(Debug)]
pub(crate) struct Replay {
    pieces: Vec<PageRun>,
    brought: Vec<bool>,
    left: usize,
    next: usize,
    /// The first page of each piece and the piece, sorted.
    places: Vec<(u64, usize)>,
    /// Left out, sorted by page.
    held_back: Vec<Touched>,
}

impl Replay {
    /// What to bring of a set that is of this memory. `page_size` and number of pages have been compared.
    pub(crate) fn of(set: &WorkingSet, page_size: PageSize) -> Replay {
        let longest = match page_size {
            PageSize::Small => PIECE,
            PageSize::Huge => 1,
        };
        let mut held_back = Vec::new();
        let mut pieces: Vec<PageRun> = Vec::new();
        for &touched in set.touched() {
            let page = touched.page;
            if is_sample(page, set.runs()) {
                held_back.push(touched);
                continue;
            }
            match pieces.last_mut() {
                Some(last)
                    if last.first.get() + last.count == page
                        && last.count < longest
                        && page % longest != 0 =>
                {
                    last.count += 1;
                }
                _ => pieces.push(PageRun {
                    first: PageIndex::new(page),
                    count: 1,
                }),
            }
        }
        held_back.sort_unstable_by_key(|touched| touched.page);
        let mut places: Vec<(u64, usize)> = (0..)
            .zip(&pieces)
            .map(|(n, p)| (p.first.get(), n))
            .collect();
        places.sort_unstable();
        Replay {
            brought: vec![false; pieces.len()],
            left: pieces.len(),
            next: 0,
            pieces,
            places,
            held_back,
        }
    }

    /// The next piece, if one is left.
    pub(crate) fn next(&mut self) -> Option<PageRun> {
        if self.left == 0 {
            return None;
        }
        let rest = self.brought[self.next..].iter().position(|done| !done);
        let at = match rest {
            Some(ahead) => self.next + ahead,
            None => self.brought.iter().position(|done| !done)?,
        };
        self.brought[at] = true;
        self.left -= 1;
        self.next = at + 1;
        Some(self.pieces[at])
    }

    /// The guest asked for a page.
    pub(crate) fn asked(&mut self, page: PageIndex) {
        let after = self
            .places
            .partition_point(|(first, _)| *first <= page.get());
        let Some((first, piece)) = after.checked_sub(1).map(|at| self.places[at]) else {
            return;
        };
        if page.get() - first < self.pieces[piece].count && !self.brought[piece] {
            self.next = piece;
        }
    }

    /// All of its pages, in order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = PageIndex> {
        let pieces = self.pieces.iter();
        pieces.flat_map(|piece| (0..piece.count).map(|n| piece.first.plus(n)))
    }

    pub(crate) fn is_done(&self) -> bool {
        self.left == 0
    }

    /// Pages that are left out as a sample, in order.
    pub(crate) fn held_back(&self) -> &[Touched] {
        &self.held_back
    }

    /// How many of a run's pages come before the first that is left out as a sample.
    pub(crate) fn up_to_sample(&self, run: PageRun) -> u64 {
        let start = run.first.get();
        let at = self.held_back.partition_point(|held| held.page < start);
        let next = self.held_back.get(at).map_or(u64::MAX, |held| held.page);
        run.count.min(next - start)
    }
}

/// Another sample each run, so that every page's turn comes.
fn is_sample(page: u64, runs: u32) -> bool {
    let mixed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    mixed.wrapping_add(u64::from(runs)).is_multiple_of(SAMPLE)
}

/// The known runs of zeros, in order.
#[derive(Debug)]
pub(crate) struct Zeros {
    next: u64,
    pages: u64,
}

impl Zeros {
    /// All of a memory of so many pages. Large pages have no zeros of their own: nothing to do.
    pub(crate) fn of(pages: u64, page_size: PageSize) -> Zeros {
        let pages = match page_size {
            PageSize::Small => pages,
            PageSize::Huge => 0,
        };
        Zeros { next: 0, pages }
    }

    /// The next run that is zero.
    pub(crate) fn next(&mut self, backing: &Backing) -> Option<PageRun> {
        let page = PageSize::Small.bytes();
        while self.next < self.pages {
            let limit = (self.pages - self.next).min(ZEROS);
            let at = MemoryOffset::new(self.next * page);
            let (content, bytes) = backing.content(at, page, limit * page);
            let run = PageRun {
                first: PageIndex::new(self.next),
                count: bytes / page,
            };
            self.next += run.count;
            if content == Content::Zero {
                return Some(run);
            }
        }
        None
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next == self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::length;
    use rekindle_store::working_set::Run;

    fn set(pages: &[u64]) -> WorkingSet {
        let mut set = WorkingSet::new(4096, 1 << 20).unwrap();
        let faulted = (0..)
            .zip(pages)
            .map(|(n, &page)| Touched {
                page,
                at_us: n * 10_000,
                count: 1,
            })
            .collect();
        set.merge(&Run {
            faulted,
            held_back_untouched: Vec::new(),
        })
        .unwrap();
        set
    }

    fn all(replay: &mut Replay) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| replay.next())
            .map(|run| (run.first.get(), run.count))
            .collect()
    }

    /// Pages that are no sample after one run.
    fn replayed(pages: impl Iterator<Item = u64>) -> Vec<u64> {
        pages.filter(|page| !is_sample(*page, 1)).collect()
    }

    #[test]
    fn neighbours_in_order_are_one_piece_of_64_kib_at_the_most() {
        let pages = replayed(0..40);
        let mut replay = Replay::of(&set(&pages), PageSize::Small);
        let pieces = all(&mut replay);
        assert_eq!(
            pieces.iter().map(|(_, n)| n).sum::<u64>(),
            length(pages.len())
        );
        assert!(pieces.iter().all(|(_, n)| *n <= PIECE), "{pieces:?}");
        assert!(pieces.len() <= 5, "{pieces:?}");
        assert!(replay.is_done());
    }

    #[test]
    fn a_guest_that_is_ahead_is_followed_and_the_rest_comes_later() {
        let pages = replayed((0..20).map(|n| n * 100));
        let mut replay = Replay::of(&set(&pages), PageSize::Small);
        replay.next();
        replay.asked(PageIndex::new(pages[10]));
        assert_eq!(replay.next().unwrap().first.get(), pages[10]);
        replay.asked(PageIndex::new(pages[3]));
        assert_eq!(replay.next().unwrap().first.get(), pages[3]);
        // What is there already, or is of no piece, changes nothing.
        replay.asked(PageIndex::new(pages[10]));
        replay.asked(PageIndex::new(pages[7] + 1));
        let rest: Vec<u64> = all(&mut replay).iter().map(|(first, _)| *first).collect();
        let expected: Vec<u64> = (4..pages.len())
            .chain(1..3)
            .filter(|n| *n != 10)
            .map(|n| pages[n])
            .collect();
        assert_eq!(rest, expected);
    }

    #[test]
    fn the_sample_is_another_each_run_and_every_page_has_its_turn() {
        let sampled = |runs| (0..4096).filter(move |page| is_sample(*page, runs));
        for runs in 0..128 {
            let count = sampled(runs).count();
            assert!((8..80).contains(&count), "{count} of 4096 in run {runs}");
        }
        let mut all: Vec<u64> = (0..128).flat_map(sampled).collect();
        all.sort_unstable();
        assert_eq!(all, (0..4096).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_brought_ahead_stops_at_the_sample() {
        let replay = Replay::of(&set(&(0..1000).collect::<Vec<_>>()), PageSize::Small);
        let held: Vec<u64> = (0..1000).filter(|page| is_sample(*page, 1)).collect();
        let run = |first, count| PageRun {
            first: PageIndex::new(first),
            count,
        };
        assert_eq!(
            replay.up_to_sample(run(held[0] + 1, 1000)),
            held[1] - held[0] - 1
        );
        assert_eq!(replay.up_to_sample(run(held[0], 5)), 0);
        assert_eq!(replay.up_to_sample(run(5000, 9)), 9);
    }
}
