//! Files that no program of ours wrote.

use super::*;

/// A header that fits, then these groups, then a checksum that fits, as a stranger would make them.
fn sealed(pages: u64, groups: &[u8]) -> Vec<u8> {
    let mut bytes = WorkingSet::new(4096, pages).unwrap().to_bytes();
    bytes.truncate(24);
    bytes.extend(groups);
    seal(bytes)
}

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = Digest::of(&bytes);
    bytes.extend(checksum.as_bytes());
    bytes
}

fn sample() -> WorkingSet {
    let sweep = (0..400).map(|page| at(page, 3_000));
    let scatter = (0..200).map(|n| at(400 + n * 3, u32::try_from(n).unwrap() * 700));
    let again = faulted((0..40).map(|n| at(n * 17, 0)));
    set_of(4096, PAGES, &[faulted(sweep.chain(scatter)), again])
}

#[test]
fn a_file_that_is_cut_off_or_grew_is_refused_at_every_length() {
    let bytes = sample().to_bytes();
    for len in 0..bytes.len() {
        assert!(WorkingSet::parse(&bytes[..len]).is_err(), "{len}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(
        WorkingSet::parse(&longer),
        Err(WorkingSetError::Checksum)
    ));
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = sample().to_bytes();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(WorkingSet::parse(&flipped).is_err(), "bit {bit}");
    }
}

#[test]
fn lies_in_the_header_are_refused() {
    let lie = |at: usize, byte: u8| {
        let mut bytes = sample().to_bytes();
        bytes.truncate(bytes.len() - Digest::LEN);
        bytes[at] = byte;
        WorkingSet::parse(&seal(bytes)).unwrap_err()
    };
    assert!(matches!(lie(0, b'X'), WorkingSetError::NotWorkingSet));
    assert!(matches!(lie(4, 0), WorkingSetError::Version { found: 0 }));
    let later = lie(4, 2);
    assert!(matches!(later, WorkingSetError::Version { found: 2 }));
    assert_eq!(
        later.to_string(),
        "the working set has version 2, and this program reads version 1"
    );
    assert!(matches!(lie(9, 32), WorkingSetError::Memory { .. }));
    assert!(matches!(lie(23, 1), WorkingSetError::Memory { .. }));
    // Fewer pages than it has runs for.
    assert!(matches!(
        lie(17, 0),
        WorkingSetError::OutOfRange { pages: 0xe8, .. }
    ));
}

#[test]
fn a_later_version_is_told_from_damage_however_it_is_sealed() {
    let mut bytes = b"RKWS\x07\0\0\0".to_vec();
    bytes.resize(24, 0xff);
    assert!(matches!(
        WorkingSet::parse(&bytes),
        Err(WorkingSetError::Version { found: 7 })
    ));
}

#[test]
fn groups_that_no_program_writes_are_refused() {
    let problem = |groups: &[u8]| match WorkingSet::parse(&sealed(PAGES, groups)) {
        Err(WorkingSetError::Malformed { at, problem }) => (at.get(), problem),
        other => panic!("{groups:?} gave {other:?}"),
    };
    let end = "its end in the middle of a group";
    assert_eq!(problem(&[0]), (25, end));
    assert_eq!(problem(&[0, 1]), (26, end));
    assert_eq!(problem(&[0, 1, 5]), (27, end));
    assert_eq!(problem(&[0, 2, 5, 0]), (28, end));
    assert_eq!(problem(&[0x80]), (25, end));
    assert_eq!(problem(&[0, 0]), (26, "an empty group"));
    assert_eq!(
        problem(&[1, 1, 5, 0, 0, 1, 9, 0]),
        (29, "two groups of one time")
    );
    // 129 units: finer than 1/64.
    assert_eq!(
        problem(&[0x81, 1, 1, 5, 0]),
        (26, "a time that is too fine")
    );
    let too_late = (28, "a time that is too late");
    assert_eq!(problem(&[0x80, 0x80, 0x80, 2, 1, 5, 0]), too_late);
    let (longer, too_large) = (
        "a number that is longer than it must be",
        "a number that is too large",
    );
    assert_eq!(problem(&[0x80, 0, 1, 5, 0]), (26, longer));
    assert_eq!(
        problem(&[[0xff; 9].as_slice(), &[2]].concat()),
        (34, too_large)
    );
    assert_eq!(problem(&[0xff; 12]), (34, too_large));
    assert_eq!(problem(&[0, 2, 5, 0, 0, 0]), (30, "a run in two pieces"));
    // 257 pages.
    assert_eq!(
        problem(&[0, 1, 5, 0x80, 16]),
        (29, "a run that is too long")
    );
}

#[test]
fn pages_that_do_not_exist_or_stand_twice_are_refused() {
    let parse = |pages, groups: &[u8]| WorkingSet::parse(&sealed(pages, groups)).unwrap_err();
    assert!(matches!(
        parse(5, &[0, 1, 5, 0]),
        WorkingSetError::OutOfRange { page: 5, pages: 5 }
    ));
    assert!(matches!(
        parse(5, &[0, 1, 4, 8]),
        WorkingSetError::OutOfRange { page: 4, pages: 5 }
    ));
    let furthest = [[0, 2, 5, 0].as_slice(), &[0xff; 9], &[1, 0]].concat();
    assert!(matches!(
        parse(PAGES, &furthest),
        WorkingSetError::OutOfRange { page: u64::MAX, .. }
    ));
    assert!(matches!(
        parse(PAGES, &[0, 1, 5, 16, 1, 1, 7, 0]),
        WorkingSetError::Twice { page: 7 }
    ));
    // Fewer pages than runs, and a file that is no longer than theirs may be.
    let again = [0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0];
    assert!(matches!(
        parse(2, &again),
        WorkingSetError::Malformed {
            problem: "more runs than there are pages",
            ..
        }
    ));
}

#[test]
fn a_file_that_is_longer_than_its_memory_deserves_is_refused() {
    assert!(matches!(
        WorkingSet::parse(&sealed(2, &[0; 33])),
        Err(WorkingSetError::TooLarge { limit }) if limit.get() == 24 + 32 + 2 * 16
    ));
}

#[test]
fn the_set_of_another_memory_is_refused_by_who_knows_the_memory() {
    let bytes = sample().to_bytes();
    for (page_size, pages) in [(4096, PAGES + 1), (2 << 20, PAGES)] {
        assert!(matches!(
            WorkingSet::parse_for(&bytes, page_size, pages),
            Err(WorkingSetError::OtherMemory {
                page_size: 4096,
                pages: PAGES
            })
        ));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_a_stranger_seals_is_refused_or_is_one_set(
        pages in prop_oneof![1..50_u64, Just(1 << 30)],
        groups in vec(prop_oneof![Just(0_u8), 0..4_u8, any::<u8>()], 0..60),
    ) {
        let bytes = sealed(pages, &groups);
        if let Ok(set) = WorkingSet::parse(&bytes) {
            prop_assert_eq!(set.to_bytes(), bytes);
            prop_assert!(length(set.touched().len()) <= pages.min(length(groups.len()) * 128));
        }
    }

    #[test]
    fn changed_bytes_are_refused_or_are_one_set(
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = sample().to_bytes();
        bytes.truncate(bytes.len() - Digest::LEN);
        for (at, byte) in changes {
            *at.get_mut(&mut bytes) = byte;
        }
        let bytes = seal(bytes);
        if let Ok(mut set) = WorkingSet::parse(&bytes) {
            prop_assert_eq!(set.to_bytes(), bytes);
            set.merge(&faulted([at(0, 0)])).unwrap();
        }
    }
}
