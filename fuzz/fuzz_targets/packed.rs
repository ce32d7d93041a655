//! Indexes of packed snapshots, as they are and with a checksum that fits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rekindle_store::digest::Digest;
use rekindle_store::packed::{Index, Place, decode};
use rekindle_store::unit::PageNumber;

fuzz_target!(|data: &[u8]| {
    let body = &data[..data.len().saturating_sub(Digest::LEN)];
    let sealed = [body, Digest::of(body).as_bytes()].concat();
    for bytes in [data, &sealed] {
        if let Ok(index) = Index::parse(bytes) {
            check(&index, bytes);
        }
    }
});

fn check(index: &Index, bytes: &[u8]) {
    assert_eq!(
        Index::parse(&index.to_bytes().expect("it was read")).expect("it was written"),
        *index
    );
    for chunk in index.chunks() {
        let pack = index.packs()[usize::try_from(chunk.pack).expect("small")];
        assert!(chunk.range().end <= pack.size.into() && chunk.pages > 0);
        // Bytes that are anything but a chunk.
        let len = bytes
            .len()
            .min(usize::try_from(chunk.stored).expect("small"));
        assert!(decode(chunk, &bytes[..len]).is_err());
    }
    for stream in index.streams() {
        let mut next = 0;
        for extent in &stream.extents {
            let first = extent.pages.first;
            assert!(first.get() >= next && extent.pages.count.get() > 0);
            next = extent.pages.end().get();
            assert_eq!(stream.place(first), Some(extent.place));
            match (extent.place, stream.place(PageNumber::new(next - 1))) {
                (Place::Zero, last) => assert_eq!(last, Some(Place::Zero)),
                (
                    Place::Chunk { chunk, at },
                    Some(Place::Chunk {
                        chunk: same,
                        at: last,
                    }),
                ) => {
                    assert_eq!(chunk, same);
                    assert_eq!(u64::from(last - at), extent.pages.count.get() - 1);
                    assert!(last < index.chunks()[usize::try_from(chunk).expect("small")].pages);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(next <= stream.size.pages().get());
        assert_eq!(stream.place(PageNumber::new(next)), None);
    }
}
