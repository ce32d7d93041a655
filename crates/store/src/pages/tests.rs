use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

const KINDS: [PageKind; 3] = [PageKind::Zero, PageKind::Data, PageKind::Unchanged];

fn describe(layer: LayerKind, kinds: &[PageKind]) -> Pages {
    let mut pages = Pages::new(layer, PageCount::new(length(kinds.len())).bytes()).unwrap();
    for (page, &kind) in (0..).zip(kinds) {
        pages.set(PageNumber::new(page), kind);
    }
    pages
}

fn digests_of(pages: &Pages) -> Vec<Digest> {
    pages
        .data_blocks()
        .map(|block| Digest::of(&block.get().to_le_bytes()))
        .collect()
}

fn bytes_of(pages: &Pages) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (size, digest) = pages.write(&digests_of(pages), &mut bytes).unwrap();
    assert_eq!(size.get(), length(bytes.len()));
    assert_eq!(digest, Digest::of(&bytes));
    bytes
}

fn read(bytes: &[u8]) -> Result<(Pages, Digest), PagesError> {
    Pages::read(bytes, ByteSize::new(length(bytes.len())))
}

/// Gives changed bytes a checksum that fits, as a stranger would.
fn reseal(bytes: &mut [u8]) {
    let body = bytes.len() - Digest::LEN;
    let checksum = Digest::of(&bytes[..body]);
    bytes[body..].copy_from_slice(checksum.as_bytes());
}

fn sample() -> Vec<u8> {
    bytes_of(&describe(
        LayerKind::Full,
        &[
            PageKind::Data,
            PageKind::Zero,
            PageKind::Data,
            PageKind::Zero,
            PageKind::Zero,
        ],
    ))
}

#[test]
fn the_layout_is_the_documented_one() {
    let kinds = [
        PageKind::Data,
        PageKind::Zero,
        PageKind::Unchanged,
        PageKind::Data,
        PageKind::Unchanged,
    ];
    let bytes = bytes_of(&describe(LayerKind::Diff, &kinds));
    assert_eq!(bytes.len(), 64 + 8 + 32 + 32);
    assert_eq!(&bytes[..8], b"RKDLPAGE");
    assert_eq!(
        bytes[8..24],
        [1, 0, 0, 0, 0, 16, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]
    );
    assert_eq!(
        bytes[24..40],
        [0, 0x50, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(bytes[40..64], [0; 24]);
    assert_eq!(bytes[64..72], [0b01_10_00_01, 0b10, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[72..104], *Digest::of(&0_u64.to_le_bytes()).as_bytes());
    assert_eq!(bytes[104..], *Digest::of(&bytes[..104]).as_bytes());
}

#[test]
fn a_new_description_is_one_hole() {
    for (layer, kind) in [
        (LayerKind::Full, PageKind::Zero),
        (LayerKind::Diff, PageKind::Unchanged),
    ] {
        let pages = Pages::new(layer, PageCount::new(7).bytes()).unwrap();
        let runs: Vec<Run> = pages.runs().collect();
        assert_eq!(
            runs,
            [Run {
                first: PageNumber::new(0),
                count: PageCount::new(7),
                kind
            }]
        );
        assert_eq!(read(&bytes_of(&pages)).unwrap().0, pages);
    }
}

#[test]
fn impossible_memory_sizes_are_refused() {
    for size in [0, 1, 4095, 4097, MAX_MEMORY.get() + 4096, u64::MAX] {
        let error = Pages::new(LayerKind::Full, ByteSize::new(size)).unwrap_err();
        assert!(
            matches!(error, PagesError::Header { field: "memory size", value } if value == size),
            "{error}"
        );
    }
}

#[test]
fn a_file_that_is_cut_off_or_grew_is_refused_at_every_length() {
    let bytes = sample();
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "{len}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(read(&longer), Err(PagesError::Length { .. })));
    // Shorter than it claims to be, whatever the file system says.
    let size = ByteSize::new(length(bytes.len()));
    assert!(matches!(
        Pages::read(&bytes[..70], size),
        Err(PagesError::Read(_))
    ));
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = sample();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&flipped).is_err(), "bit {bit}");
    }
}

#[test]
fn lies_with_a_sound_checksum_are_refused() {
    let lie = |at: usize, byte: u8| {
        let mut bytes = sample();
        bytes[at] = byte;
        reseal(&mut bytes);
        read(&bytes).unwrap_err()
    };
    assert!(matches!(lie(0, b'X'), PagesError::NotPages));
    assert!(matches!(lie(8, 2), PagesError::Version { found: 2 }));
    assert!(matches!(
        lie(13, 32),
        PagesError::Header {
            field: "page size",
            value: 8192
        }
    ));
    assert!(matches!(
        lie(17, 1),
        PagesError::Header {
            field: "block size",
            ..
        }
    ));
    assert!(matches!(
        lie(20, 2),
        PagesError::Header {
            field: "kind",
            value: 2
        }
    ));
    assert!(matches!(
        lie(24, 1),
        PagesError::Header {
            field: "memory size",
            ..
        }
    ));
    assert!(matches!(
        lie(30, 4),
        PagesError::Header {
            field: "memory size",
            ..
        }
    ));
    assert!(matches!(
        lie(39, 255),
        PagesError::Header {
            field: "number of digests",
            ..
        }
    ));
    assert!(matches!(
        lie(50, 1),
        PagesError::Header {
            field: "reserved part",
            value: 1
        }
    ));
    // More memory than there are kinds for: no allocation before the length is found wrong.
    assert!(matches!(lie(29, 1), PagesError::Length { .. }));
    assert!(matches!(lie(64, 0b11), PagesError::Kind { page } if page.get() == 0));
    assert!(matches!(lie(64, 0b10_00_01), PagesError::Kind { page } if page.get() == 2));
    assert!(matches!(lie(65, 0b01_00), PagesError::Padding));
    assert!(matches!(
        lie(64, 0),
        PagesError::Digests {
            expected: 0,
            found: 1
        }
    ));
}

fn kinds(layer: LayerKind) -> impl Strategy<Value = Vec<PageKind>> {
    let some = match layer {
        LayerKind::Full => &KINDS[..2],
        LayerKind::Diff => &KINDS[..],
    };
    // Runs, so that whole bytes and words of one kind come up.
    vec((proptest::sample::select(some), 1..40_usize), 1..12).prop_map(|runs| {
        runs.into_iter()
            .flat_map(|(kind, count)| vec![kind; count])
            .collect()
    })
}

fn layer() -> impl Strategy<Value = LayerKind> {
    prop_oneof![Just(LayerKind::Full), Just(LayerKind::Diff)]
}

proptest! {
    #[test]
    fn what_was_written_is_read((layer, kinds) in layer().prop_flat_map(|layer| (Just(layer), kinds(layer)))) {
        let pages = describe(layer, &kinds);
        let bytes = bytes_of(&pages);
        let (back, digest) = read(&bytes).unwrap();
        prop_assert_eq!(&back, &pages);
        prop_assert_eq!(digest, Digest::of(&bytes));
        let found: Vec<_> = back.digests(bytes.as_slice()).map(|item| item.unwrap()).collect();
        let expected: Vec<_> = pages.data_blocks().zip(digests_of(&pages)).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn runs_are_the_pages_in_order(kinds in kinds(LayerKind::Diff)) {
        let pages = describe(LayerKind::Diff, &kinds);
        let runs: Vec<Run> = pages.runs().collect();
        let flat: Vec<PageKind> =
            runs.iter().flat_map(|run| vec![run.kind; index(run.count.get())]).collect();
        prop_assert_eq!(flat, kinds.clone());
        prop_assert!(runs.windows(2).all(|pair| pair[0].kind != pair[1].kind));
        for (page, &kind) in (0..).zip(&kinds) {
            prop_assert_eq!(pages.kind(PageNumber::new(page)), Some(kind));
        }
        prop_assert_eq!(pages.kind(PageNumber::new(length(kinds.len()))), None);
        for kind in KINDS {
            let counted = kinds.iter().filter(|&&other| other == kind).count();
            prop_assert_eq!(pages.count(kind).get(), length(counted));
        }
    }

    #[test]
    fn blocks_with_data_are_those_of_the_data_pages(kinds in kinds(LayerKind::Full)) {
        let pages = describe(LayerKind::Full, &kinds);
        let found: Vec<u64> = pages.data_blocks().map(|block| block.get()).collect();
        let mut expected: Vec<u64> = (0..)
            .zip(&kinds)
            .filter(|(_, kind)| **kind == PageKind::Data)
            .map(|(page, _)| page / 16 * 65536)
            .collect();
        expected.dedup();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn random_bytes_behind_a_sound_head_never_panic(
        changes in vec((0..104_usize, any::<u8>()), 1..6)
    ) {
        let mut bytes = sample();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        reseal(&mut bytes);
        if let Ok((pages, _)) = read(&bytes) {
            prop_assert_eq!(pages.runs().map(|run| run.count.get()).sum::<u64>(), pages.len().get());
        }
    }
}
