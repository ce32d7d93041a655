use super::*;
use crate::digest::Digest;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

mod hostile;
mod on_disk;

const PAGES: u64 = 1000;

fn at(page: u64, at_us: u32) -> Touched {
    Touched {
        page,
        at_us,
        count: 1,
    }
}

fn faulted(faulted: impl IntoIterator<Item = Touched>) -> Run {
    Run {
        faulted: faulted.into_iter().collect(),
        held_back_untouched: Vec::new(),
    }
}

fn set_of(page_size: u64, pages: u64, runs: &[Run]) -> WorkingSet {
    let mut set = WorkingSet::new(page_size, pages).unwrap();
    for run in runs {
        set.merge(run).unwrap();
    }
    set
}

fn pages_and_counts(set: &WorkingSet) -> Vec<(u64, u8)> {
    set.touched()
        .iter()
        .map(|touched| (touched.page, touched.count))
        .collect()
}

fn any_run() -> impl Strategy<Value = Run> {
    let touched = (0..PAGES, prop_oneof![0..20_000_u32, any::<u32>()])
        .prop_map(|(page, at_us)| at(page, at_us));
    let neighbours = (0..PAGES, 0..600_u64, 0..20_000_u32).prop_map(|(start, len, time)| {
        let pages = start..PAGES.min(start + len);
        pages.map(|page| at(page, time)).collect::<Vec<_>>()
    });
    let faulted = prop_oneof![vec(touched, 0..200), neighbours];
    (faulted, vec(0..PAGES, 0..100)).prop_map(|(faulted, held_back_untouched)| Run {
        faulted,
        held_back_untouched,
    })
}

#[test]
fn a_new_set_is_empty_and_of_a_memory_that_there_can_be() {
    let set = WorkingSet::new(4096, PAGES).unwrap();
    assert_eq!((set.runs(), set.page_size(), set.pages()), (0, 4096, PAGES));
    assert_eq!(set.touched(), []);
    WorkingSet::new(2 << 20, 2 << 20).unwrap();
    for (page_size, pages) in [
        (0, 1),
        (4096, 0),
        (8192, 1),
        (4096, (1 << 30) + 1),
        (4096, u64::MAX),
        (2 << 20, u64::MAX),
    ] {
        assert!(
            matches!(
                WorkingSet::new(page_size, pages),
                Err(WorkingSetError::Memory { .. })
            ),
            "{pages} of {page_size}"
        );
    }
}

#[test]
fn pages_stand_in_the_order_of_their_first_touch() {
    let set = set_of(
        4096,
        PAGES,
        &[faulted([
            at(7, 0),
            at(3, 5_000),
            at(900, 2_000),
            // Of the same coarse time as the first one, and before it in the memory.
            at(2, 900),
            at(7, 9_000),
        ])],
    );
    assert_eq!(
        set.touched(),
        [at(2, 0), at(7, 0), at(900, 1024), at(3, 4096)]
    );
}

#[test]
fn a_page_that_is_asked_for_again_is_surer_and_keeps_its_place() {
    let first = faulted([at(5, 3_000), at(6, 0)]);
    let later = faulted([at(5, 0), at(6, 80_000)]);
    let mut runs = vec![first];
    runs.extend(std::iter::repeat_n(later, 20));
    let set = set_of(4096, PAGES, &runs);
    let known = |page, at_us| Touched {
        page,
        at_us,
        count: MAX_COUNT,
    };
    assert_eq!(set.touched(), [known(6, 0), known(5, 2048)]);
    assert_eq!(set.runs(), 21);
}

#[test]
fn a_page_that_nobody_asks_for_fades_and_leaves() {
    let seen = faulted([at(5, 0), at(6, 0)]);
    let held_back = Run {
        faulted: Vec::new(),
        // Twice is once, and one that is not in the set is nothing.
        held_back_untouched: vec![6, 6, 700],
    };
    let mut set = set_of(4096, PAGES, &[seen.clone(), seen.clone(), seen]);
    assert_eq!(pages_and_counts(&set), [(5, 3), (6, 3)]);
    set.merge(&held_back).unwrap();
    assert_eq!(pages_and_counts(&set), [(5, 3), (6, 1)]);
    set.merge(&held_back).unwrap();
    assert_eq!(pages_and_counts(&set), [(5, 3)]);
}

#[test]
fn a_page_that_was_held_back_and_asked_for_is_confirmed() {
    let seen = faulted([at(5, 0)]);
    let both = Run {
        held_back_untouched: vec![5],
        ..seen.clone()
    };
    assert_eq!(
        pages_and_counts(&set_of(4096, PAGES, &[seen, both])),
        [(5, 2)]
    );
}

#[test]
fn a_run_with_a_page_that_does_not_exist_changes_nothing() {
    let mut set = set_of(4096, PAGES, &[faulted([at(5, 0)])]);
    let before = set.clone();
    let beyond = Run {
        faulted: Vec::new(),
        held_back_untouched: vec![5, PAGES],
    };
    for run in [faulted([at(1, 0), at(PAGES, 0)]), beyond] {
        assert!(matches!(
            set.merge(&run),
            Err(WorkingSetError::OutOfRange {
                page: PAGES,
                pages: PAGES
            })
        ));
        assert_eq!(set, before);
    }
}

#[test]
fn a_coarse_time_is_never_later_and_never_far_off() {
    let mut different = BTreeSet::new();
    let mut check = |at_us: u32| {
        let kept = coarse(at_us);
        assert_eq!(coarse(kept), kept);
        let lost = at_us.checked_sub(kept).unwrap();
        assert!(lost < 1024.max(at_us / 64), "{at_us} became {kept}");
        different.insert(kept);
    };
    let mut at_us = 0_u32;
    while let Some(next) = at_us.checked_add(at_us / 700 + 300) {
        check(at_us);
        at_us = next;
    }
    check(u32::MAX);
    assert_eq!(different.len(), 1088);
}

#[test]
fn sweeps_and_scatters_are_small_files() {
    // As fast as a page can be copied, and as slow as a fault can be.
    for each_us in [2, 70] {
        let sweep =
            faulted((0..49_152).map(|page| at(page, u32::try_from(page).unwrap() * each_us)));
        let bytes = set_of(4096, 65_536, &[sweep]).to_bytes();
        assert!(bytes.len() < 4096, "sweep: {} bytes", bytes.len());

        let scatter = (0..16_384_u32).map(|n| at(u64::from(n) * 40_503 % 131_072, n * each_us));
        let bytes = set_of(4096, 131_072, &[faulted(scatter)]).to_bytes();
        assert!(bytes.len() < 64 * 1024, "scatter: {} bytes", bytes.len());
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    let again = faulted([at(300, 0), at(4, 5_000), at(5, 5_000)]);
    let set = set_of(
        4096,
        PAGES,
        &[
            faulted([at(300, 0), at(2, 5_000), at(3, 5_000), at(4, 5_000)]),
            again,
        ],
    );
    let bytes = set.to_bytes();
    assert_eq!(bytes[..4], *b"RKWS");
    assert_eq!(bytes[4..12], [1, 0, 0, 0, 0, 16, 0, 0]);
    assert_eq!(bytes[12..24], [2, 0, 0, 0, 0xe8, 3, 0, 0, 0, 0, 0, 0]);
    // At 0, one run: 300 pages on, one page that was seen twice.
    assert_eq!(bytes[24..29], [0, 1, 0xac, 2, 1]);
    // 4 times 1024 µs later, three runs: 2 and 3 seen once, 4 twice, 5 once.
    assert_eq!(bytes[29..37], [4, 3, 2, 8, 0, 1, 0, 0]);
    assert_eq!(bytes[37..], *Digest::of(&bytes[..37]).as_bytes());
}

proptest! {
    #[test]
    fn a_set_comes_back_as_it_was(runs in vec(any_run(), 0..6)) {
        let set = set_of(4096, PAGES, &runs);
        let bytes = set.to_bytes();
        prop_assert_eq!(&WorkingSet::parse(&bytes).unwrap(), &set);
        prop_assert_eq!(&WorkingSet::parse_for(&bytes, 4096, PAGES).unwrap(), &set);
        prop_assert!(length(bytes.len()) <= format::size_limit(PAGES).get());
    }

    #[test]
    fn merging_is_what_a_map_would_do(runs in vec(any_run(), 0..12)) {
        let mut model: BTreeMap<u64, (u32, u8)> = BTreeMap::new();
        for run in &runs {
            let asked: BTreeSet<u64> = run.faulted.iter().map(|touched| touched.page).collect();
            let unasked: BTreeSet<u64> = run.held_back_untouched.iter().copied().collect();
            for page in unasked.difference(&asked) {
                if let Some((_, count)) = model.get_mut(page) {
                    *count = count.saturating_sub(2);
                }
            }
            for page in &asked {
                let times = run.faulted.iter().filter(|touched| touched.page == *page);
                let first = times.map(|touched| touched.at_us).min().unwrap();
                let (_, count) = model.entry(*page).or_insert((coarse(first), 0));
                *count = (*count + 1).min(MAX_COUNT);
            }
            model.retain(|_, (_, count)| *count > 0);
        }
        let mut expected: Vec<Touched> = model
            .into_iter()
            .map(|(page, (at_us, count))| Touched { page, at_us, count })
            .collect();
        expected.sort_by_key(|touched| (touched.at_us, touched.page));
        let set = set_of(4096, PAGES, &runs);
        prop_assert_eq!(set.touched(), expected);
        prop_assert_eq!(set.runs(), u32::try_from(runs.len()).unwrap());
    }
}

fn length(n: usize) -> u64 {
    crate::unit::length(n)
}
