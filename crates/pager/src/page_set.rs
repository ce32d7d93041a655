//! A set of pages, a bit each.

use crate::unit::{PageIndex, PageRun, index};

/// Pages out of a number that is known from the start.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// An empty set that can hold the first `pages` pages. Takes no memory until something is put in.
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            words: vec![0; index(pages.div_ceil(64))],
        }
    }

    pub(crate) fn insert(&mut self, run: PageRun) {
        for page in run.first.get()..run.first.get() + run.count {
            self.words[index(page / 64)] |= 1 << (page % 64);
        }
    }

    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        self.words[index(page.get() / 64)] >> (page.get() % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_set_holds_what_was_put_in() {
        let mut set = PageSet::new(130);
        set.insert(PageRun {
            first: PageIndex::new(62),
            count: 4,
        });
        set.insert(PageRun {
            first: PageIndex::new(129),
            count: 1,
        });
        let held: Vec<u64> = (0..130)
            .filter(|&p| set.contains(PageIndex::new(p)))
            .collect();
        assert_eq!(held, [62, 63, 64, 65, 129]);
    }
}
