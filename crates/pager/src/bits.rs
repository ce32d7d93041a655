//! A set of pages, a bit each, in words that may be shared with a file.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::unit::{PageIndex, PageRun, index, length};

/// Pages out of a number that is known from the start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bits<'a> {
    words: &'a [AtomicU64],
}

impl<'a> Bits<'a> {
    /// How many words a set of the first `pages` pages takes.
    pub(crate) fn words_for(pages: u64) -> usize {
        index(pages.div_ceil(64))
    }

    pub(crate) fn new(words: &'a [AtomicU64]) -> Self {
        Self { words }
    }

    pub(crate) fn insert(self, run: PageRun) {
        self.each_word(run, |word, mask| {
            word.fetch_or(mask, Ordering::Relaxed);
        });
    }

    pub(crate) fn remove(self, run: PageRun) {
        self.each_word(run, |word, mask| {
            word.fetch_and(!mask, Ordering::Relaxed);
        });
    }

    pub(crate) fn contains(self, page: PageIndex) -> bool {
        let word = self.words[index(page.get() / 64)].load(Ordering::Relaxed);
        word >> (page.get() % 64) & 1 == 1
    }

    /// How many of the pages from here on, `limit` at the most, are in the set, or out of it, like the first.
    pub(crate) fn alike(self, run: PageRun) -> (bool, u64) {
        let first = self.contains(run.first);
        let same = (1..run.count).take_while(|n| self.contains(run.first.plus(*n)) == first);
        (first, 1 + length(same.count()))
    }

    /// The pages that are in the set, as runs.
    #[cfg(test)]
    pub(crate) fn pages(self) -> Vec<u64> {
        (0..length(self.words.len()) * 64)
            .filter(|&page| self.contains(PageIndex::new(page)))
            .collect()
    }

    fn each_word(self, run: PageRun, mut change: impl FnMut(&AtomicU64, u64)) {
        let end = run.first.get() + run.count;
        let mut page = run.first.get();
        while page < end {
            let (bit, left) = (page % 64, end - page);
            let here = left.min(64 - bit);
            let mask = (u64::MAX >> (64 - here)) << bit;
            change(&self.words[index(page / 64)], mask);
            page += here;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun {
            first: PageIndex::new(first),
            count,
        }
    }

    #[test]
    fn a_set_holds_what_was_put_in() {
        let words: Vec<AtomicU64> = (0..Bits::words_for(300)).map(|_| 0.into()).collect();
        let set = Bits::new(&words);
        set.insert(run(62, 4));
        set.insert(run(129, 1));
        set.insert(run(64, 2));
        assert_eq!(set.pages(), [62, 63, 64, 65, 129]);
        set.remove(run(63, 2));
        assert_eq!(set.pages(), [62, 65, 129]);
        set.insert(run(0, 300));
        assert_eq!(set.pages(), (0..300).collect::<Vec<_>>());
    }

    #[test]
    fn neighbours_that_are_alike_are_counted_up_to_the_limit() {
        let words: Vec<AtomicU64> = (0..Bits::words_for(130)).map(|_| 0.into()).collect();
        let set = Bits::new(&words);
        set.insert(run(60, 10));
        assert_eq!(set.alike(run(60, 100)), (true, 10));
        assert_eq!(set.alike(run(60, 3)), (true, 3));
        assert_eq!(set.alike(run(50, 100)), (false, 10));
    }
}
