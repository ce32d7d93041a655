//! Working sets, as they are and with a checksum that fits; and what a run does to them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_store::WorkingSet;
use rekindle_store::digest::Digest;
use rekindle_store::working_set::{MAX_COUNT, Run, Touched, coarse};

fuzz_target!(|data: &[u8]| {
    let body = &data[..data.len().saturating_sub(Digest::LEN)];
    let sealed = [body, Digest::of(body).as_bytes()].concat();
    for bytes in [data, &sealed] {
        if let Ok(set) = WorkingSet::parse(bytes) {
            assert_eq!(set.to_bytes(), bytes, "a set has one file");
            check(&set);
            merge(set, bytes);
        }
    }
});

fn check(set: &WorkingSet) {
    let order = |touched: &Touched| (touched.at_us, touched.page);
    assert!(set.touched().is_sorted_by(|a, b| order(a) < order(b)));
    let mut pages: Vec<u64> = set.touched().iter().map(|touched| touched.page).collect();
    pages.sort_unstable();
    assert!(pages.is_sorted_by(|a, b| a < b), "a page is there once");
    assert!(pages.last().is_none_or(|&last| last < set.pages()));
    for touched in set.touched() {
        assert!((1..=MAX_COUNT).contains(&touched.count));
        assert_eq!(coarse(touched.at_us), touched.at_us);
    }
}

/// Merges a run that is made of the file's own bytes: some pages of the set, and some others.
fn merge(mut set: WorkingSet, bytes: &[u8]) {
    let mut run = Run::default();
    for (n, &[a, b, c, d]) in bytes.as_chunks().0.iter().enumerate() {
        let number = u32::from_le_bytes([a, b, c, d]);
        let known = set.touched().get(n * 3).map(|touched| touched.page);
        let page = known.unwrap_or(u64::from(number) % set.pages());
        match a % 2 {
            0 => run.held_back_untouched.push(page),
            _ => run.faulted.push(Touched {
                page,
                at_us: number,
                count: b,
            }),
        }
    }
    let before = set.clone();
    set.merge(&run).expect("all of its pages exist");
    check(&set);
    assert_eq!(WorkingSet::parse(&set.to_bytes()).expect("sound"), set);
    assert_eq!(set.runs(), before.runs().saturating_add(1));
    for touched in &run.faulted {
        assert!(set.touched().iter().any(|kept| kept.page == touched.page));
    }
    run.held_back_untouched.push(set.pages());
    let unchanged = set.clone();
    set.merge(&run).expect_err("that page does not exist");
    assert_eq!(set, unchanged);
}
