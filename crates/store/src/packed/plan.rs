//! Which pages lie together in which chunk. Pure: the same snapshot and working set always give the same plan.

use crate::packed::CHUNK_PAGES;
use crate::unit::{PageCount, PageNumber, PageRange, index};

/// A block that has at least so many pages to pack is a chunk of its own.
const DENSE: u64 = CHUNK_PAGES / 2;

/// The pages of a chunk, in the order in which they lie in it.
pub(super) type Planned = Vec<PageRange>;

/// Puts `data`, ordered runs of pages, into chunks; `first` lists those that come first, in their order.
///
/// Of `first`, pages that are not in `data`, or twice there, are passed over.
pub(super) fn plan(data: &[PageRange], first: impl Iterator<Item = u64>) -> Vec<Planned> {
    let end = data.last().map_or(0, |range| range.end().get());
    let mut left = vec![false; index(end)];
    for range in data {
        left[index(range.first.get())..index(range.end().get())].fill(true);
    }
    let mut chunks = Vec::new();
    let mut gathered = Gathered::default();
    for page in first.filter(|&page| page < end) {
        if std::mem::take(&mut left[index(page)]) {
            gathered.add(page, &mut chunks);
        }
    }
    gathered.close(&mut chunks);
    for (start, block) in (0..).step_by(16).zip(left.chunks(index(CHUNK_PAGES))) {
        let pages = (start..)
            .zip(block)
            .filter_map(|(page, &is)| is.then_some(page));
        let count = block.iter().filter(|&&is| is).count();
        if count < index(DENSE) {
            pages.for_each(|page| gathered.add(page, &mut chunks));
            continue;
        }
        let mut own = Gathered::default();
        pages.for_each(|page| own.add(page, &mut chunks));
        own.close(&mut chunks);
    }
    gathered.close(&mut chunks);
    chunks
}

/// A chunk that is being filled.
#[derive(Default)]
struct Gathered {
    runs: Planned,
    pages: u64,
}

impl Gathered {
    fn add(&mut self, page: u64, full: &mut Vec<Planned>) {
        match self.runs.last_mut() {
            Some(run) if run.end().get() == page => run.count = PageCount::new(run.count.get() + 1),
            _ => self.runs.push(PageRange {
                first: PageNumber::new(page),
                count: PageCount::new(1),
            }),
        }
        self.pages += 1;
        if self.pages == CHUNK_PAGES {
            self.close(full);
        }
    }

    fn close(&mut self, full: &mut Vec<Planned>) {
        if self.pages > 0 {
            full.push(std::mem::take(self).runs);
        }
    }
}

const _: () = assert!(CHUNK_PAGES == 16, "the blocks above have 16 pages");

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange {
            first: PageNumber::new(first),
            count: PageCount::new(count),
        }
    }

    fn planned(data: &[PageRange], first: &[u64]) -> Vec<Vec<(u64, u64)>> {
        plan(data, first.iter().copied())
            .iter()
            .map(|chunk| {
                chunk
                    .iter()
                    .map(|run| (run.first.get(), run.count.get()))
                    .collect()
            })
            .collect()
    }

    #[test]
    fn neighbours_that_fill_half_a_block_stay_together() {
        assert_eq!(
            planned(&[range(0, 16), range(20, 8), range(33, 40)], &[]),
            [
                vec![(0, 16)],
                vec![(20, 8)],
                vec![(33, 15)],
                vec![(48, 16)],
                vec![(64, 9)]
            ]
        );
    }

    #[test]
    fn scattered_pages_share_chunks() {
        let scattered: Vec<_> = (0..20).map(|n| range(n * 100, 1)).collect();
        let chunks = planned(&scattered, &[]);
        assert_eq!(chunks.iter().map(Vec::len).collect::<Vec<_>>(), [16, 4]);
    }

    #[test]
    fn the_working_set_comes_first_in_its_own_order_and_drags_no_neighbours_along() {
        let chunks = planned(&[range(0, 48)], &[40, 3, 4, 3, 999]);
        assert_eq!(chunks[0], [(40, 1), (3, 2)]);
        assert_eq!(chunks[1], [(0, 3), (5, 11)]);
        assert_eq!(chunks.len(), 4);
    }

    #[test]
    fn each_page_is_planned_once() {
        let data = [range(0, 7), range(9, 1), range(17, 31), range(1000, 3)];
        let chunks = plan(&data, [1001, 20, 5].into_iter());
        let mut pages: Vec<u64> = chunks
            .iter()
            .flatten()
            .flat_map(|run| run.first.get()..run.end().get())
            .collect();
        pages.sort_unstable();
        let expected: Vec<u64> = data
            .iter()
            .flat_map(|run| run.first.get()..run.end().get())
            .collect();
        assert_eq!(pages, expected);
        assert!(plan(&[], [1].into_iter()).is_empty());
    }
}
