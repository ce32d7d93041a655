//! Firecracker's list of regions: the JSON, then a line with the size of the memory file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_pager::{HostAddr, PageIndex, PageRun, RegionMap, parse_handshake};

/// Of inputs without a line for it.
const MEMORY: u64 = 256 << 20;

fuzz_target!(|data: &[u8]| {
    let (message, memory) = split(data);
    if let Ok(map) = parse_handshake(message, memory) {
        check(&map, memory);
    }
});

fn split(data: &[u8]) -> (&[u8], u64) {
    let line = data.trim_ascii_end();
    let cut = line.iter().rposition(|&byte| byte == b'\n');
    let size = cut.and_then(|at| std::str::from_utf8(&line[at + 1..]).ok()?.parse().ok());
    match (cut, size) {
        (Some(at), Some(size)) => (&data[..at], size),
        _ => (data, MEMORY),
    }
}

/// Every page has one place, and every place one page. All of them would take too long: those at the seams will do.
fn check(map: &RegionMap, memory: u64) {
    let page_size = map.page_size().bytes();
    assert_eq!(map.bytes(), memory);
    assert_eq!(map.pages() * page_size, memory);
    let mut first = 0;
    while first < map.pages() {
        let rest = PageRun {
            first: PageIndex::new(first),
            count: map.pages() - first,
        };
        let (address, count) = map.place(rest).expect("every page has a place");
        assert!((1..=rest.count).contains(&count));
        assert_eq!(map.offset(rest.first).get(), first * page_size);
        let end = address.get() + count * page_size;
        for (at, page) in [
            (address.get(), first),
            (address.get() + page_size - 1, first),
            (end - 1, first + count - 1),
        ] {
            assert_eq!(map.page_at(HostAddr::new(at)), Some(PageIndex::new(page)));
        }
        let region = PageRun { count, ..rest };
        assert_eq!(
            map.runs(address, HostAddr::new(end)).as_deref(),
            Some(&[region][..])
        );
        first += count;
    }
    let beyond = PageRun {
        first: PageIndex::new(first),
        count: 1,
    };
    assert_eq!(map.place(beyond), None);
    let everything = map.runs(HostAddr::new(0), HostAddr::new(u64::MAX - page_size + 1));
    assert_eq!(everything, None, "address 0 is nobody's, or the end is");
}
