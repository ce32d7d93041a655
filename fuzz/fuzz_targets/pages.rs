//! Files that say what each page of a memory is, as they are and with a checksum that fits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_store::digest::Digest;
use rekindle_store::flatten::Flat;
use rekindle_store::pages::{LayerKind, PageKind, Pages};
use rekindle_store::unit::{BLOCK_SIZE, ByteSize, PageCount, PageNumber};

fuzz_target!(|data: &[u8]| {
    let body = &data[..data.len().saturating_sub(Digest::LEN)];
    let sealed = [body, Digest::of(body).as_bytes()].concat();
    for bytes in [data, &sealed] {
        let size = ByteSize::new(u64::try_from(bytes.len()).expect("a length fits"));
        if let Ok((pages, digest)) = Pages::read(bytes, size) {
            assert_eq!(digest, Digest::of(bytes));
            check(&pages);
        }
    }
});

fn check(pages: &Pages) {
    let mut next = 0;
    let mut before = None;
    for run in pages.runs() {
        assert_eq!(run.first.get(), next);
        assert!(run.count.get() > 0 && Some(run.kind) != before);
        next += run.count.get();
        assert_eq!(pages.kind(PageNumber::new(next - 1)), Some(run.kind));
        before = Some(run.kind);
    }
    assert_eq!(next, pages.len().get());
    assert_eq!(pages.kind(PageNumber::new(next)), None);
    let kinds = [PageKind::Zero, PageKind::Data, PageKind::Unchanged];
    let counted = kinds.map(|kind| pages.count(kind).get());
    assert_eq!(counted.iter().sum::<u64>(), next);
    let mut last = None;
    for block in pages.data_blocks() {
        assert!(last < Some(block.get()) && block.get() < pages.memory_size().get());
        assert!(block.get().is_multiple_of(BLOCK_SIZE));
        last = Some(block.get());
    }
    let whole = pages.layer() == LayerKind::Full;
    assert!(!whole || pages.count(PageKind::Unchanged) == PageCount::new(0));
    assert_eq!(Flat::of(&[pages]).is_ok(), whole);
}
