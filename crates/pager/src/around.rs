//! Which pages a guest is about to ask for, told from the order in which it asks.
//!
//! ```text
//!   fault 7 ─► nothing      fault 8 ─► it walks: 9 to 12      fault 13 ─► on it goes: 14 to 21 …
//! ```
//!
//! A guest that jumps about gets nothing beside what it asked for: those pages would be work in vain, and
//! delay the next fault.

use crate::unit::{PageIndex, PageRun};

/// The most that is brought ahead, in pages: 256 KiB of small ones.
const LARGEST: u64 = 64;
/// What is brought when a guest is first seen to walk.
const SMALLEST: u64 = 4;
/// How many walks are followed at once.
const WALKS: usize = 16;
/// Pages that a walk may leave out.
const SLACK: u64 = 2;

/// Walks that the guest is on.
#[derive(Debug, Default)]
pub(crate) struct Walks {
    walks: Vec<Walk>,
    oldest: usize,
}

#[derive(Debug, Clone, Copy)]
struct Walk {
    /// Where it should be met next.
    next: u64,
    /// What was brought ahead of it last.
    ahead: u64,
}

/// What a fault means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// To be brought: behind the page that was asked for.
    pub(crate) bring: PageRun,
    /// Brought earlier, and walked over since.
    pub(crate) passed: PageRun,
}

impl Walks {
    /// The guest asked for a page.
    pub(crate) fn met(&mut self, page: PageIndex) -> Option<Ahead> {
        let page = page.get();
        let on = |walk: &&mut Walk| (walk.next..=walk.next + SLACK).contains(&page);
        let Some(walk) = self.walks.iter_mut().find(on) else {
            self.follow(Walk {
                next: page + 1,
                ahead: 0,
            });
            return None;
        };
        let passed = PageRun {
            first: PageIndex::new(walk.next - walk.ahead),
            count: walk.ahead,
        };
        walk.ahead = (walk.ahead * 2).clamp(SMALLEST, LARGEST);
        walk.next = page + 1 + walk.ahead;
        let bring = PageRun {
            first: PageIndex::new(page + 1),
            count: walk.ahead,
        };
        Some(Ahead { bring, passed })
    }

    fn follow(&mut self, walk: Walk) {
        if self.walks.len() < WALKS {
            self.walks.push(walk);
        } else {
            self.walks[self.oldest] = walk;
            self.oldest = (self.oldest + 1) % WALKS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn met(walks: &mut Walks, page: u64) -> Option<(u64, u64)> {
        let ahead = walks.met(PageIndex::new(page))?;
        Some((ahead.bring.first.get(), ahead.bring.count))
    }

    #[test]
    fn a_walk_is_met_where_it_should_be_and_gets_more_each_time() {
        let mut walks = Walks::default();
        assert_eq!(met(&mut walks, 7), None);
        assert_eq!(met(&mut walks, 8), Some((9, 4)));
        assert_eq!(met(&mut walks, 13), Some((14, 8)));
        let ahead = walks.met(PageIndex::new(22)).unwrap();
        assert_eq!((ahead.bring.first.get(), ahead.bring.count), (23, 16));
        assert_eq!((ahead.passed.first.get(), ahead.passed.count), (14, 8));
        for _ in 0..10 {
            let next = walks.walks[0].next;
            met(&mut walks, next);
        }
        assert_eq!(walks.walks[0].ahead, LARGEST);
    }

    #[test]
    fn jumps_get_nothing_and_do_not_end_a_walk() {
        let mut walks = Walks::default();
        met(&mut walks, 100);
        for jump in 1..10 {
            assert_eq!(met(&mut walks, jump * 1000), None);
        }
        assert_eq!(met(&mut walks, 101), Some((102, 4)));
    }

    #[test]
    fn two_walks_are_followed_side_by_side() {
        let mut walks = Walks::default();
        assert_eq!((met(&mut walks, 10), met(&mut walks, 5000)), (None, None));
        assert_eq!(met(&mut walks, 11), Some((12, 4)));
        assert_eq!(met(&mut walks, 5001), Some((5002, 4)));
        assert_eq!(met(&mut walks, 16), Some((17, 8)));
    }
}
