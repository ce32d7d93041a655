use crate::fixture::{Fixture, PAGES, Written, contents, fill, memory, mixed, parts};
use proptest::collection::vec;
use proptest::prelude::*;
use rekindle_store::digest::Digest;
use rekindle_store::manifest::{BackingParts, Kind};
use rekindle_store::packed::{
    Import, ImportError, Index, IndexError, KnownChunks, Pack, PackError, Place, decode, pack,
};
use rekindle_store::publish::BeginError;
use rekindle_store::unit::PageNumber;
use rekindle_store::working_set::{Run, Touched, merge_into};
use rekindle_store::{Snapshot, Store};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

type Packs = HashMap<Digest, Vec<u8>>;

fn packed(snapshot: &Snapshot, known: &KnownChunks, packs: &mut Packs) -> Index {
    let mut put = |pack: Pack| {
        assert_eq!(pack.is.name, Digest::of(&pack.bytes));
        packs.insert(pack.is.name, pack.bytes);
        Ok::<(), Infallible>(())
    };
    pack(snapshot, known, &mut put).unwrap()
}

/// As it would arrive: written, read, and each chunk out of its pack.
fn imported(store: &Store, index: &Index, packs: &Packs) -> Result<Snapshot, ImportError> {
    let index = Arc::new(Index::parse(&index.to_bytes().unwrap()).unwrap());
    let import = Import::begin(store, index.clone(), None)?;
    for (number, chunk) in (0..).zip(index.chunks()) {
        let pack = &packs[&index.packs()[chunk.pack as usize].name];
        let range = chunk.range();
        let stored = &pack[range.start.try_into().unwrap()..range.end.try_into().unwrap()];
        import
            .write(number, &decode(chunk, stored).unwrap())
            .unwrap();
    }
    import.publish()
}

fn with_noise(seed: u8) -> Vec<Written> {
    let mut memory = mixed();
    memory[100..140].fill(Written::Data(seed));
    memory
}

#[test]
fn what_was_packed_is_the_same_snapshot_elsewhere() {
    let (here, there) = (Fixture::new(), Fixture::new());
    let base = here.full(Some("base"), &with_noise(1));
    let tip = here.diff(base.id(), &with_noise(2));
    let mut packs = Packs::new();
    for snapshot in [base, tip] {
        let index = packed(&snapshot, &KnownChunks::default(), &mut packs);
        let copy = imported(&there.store, &index, &packs).unwrap();
        copy.verify().unwrap();
        let (mut ours, theirs) = (snapshot.manifest().clone(), copy.manifest().clone());
        // A name is what each store gives it.
        ours.name = None;
        assert_eq!(ours, theirs);
        assert_eq!(
            std::fs::read(snapshot.memory_path()).unwrap(),
            std::fs::read(copy.memory_path()).unwrap()
        );
        let again = imported(&there.store, &index, &packs).unwrap_err();
        assert!(
            matches!(again, ImportError::Begin(BeginError::Published { id }) if id == snapshot.id())
        );
    }
}

#[test]
fn a_diff_does_not_arrive_before_its_parent_and_leaves_nothing() {
    let (here, there) = (Fixture::new(), Fixture::new());
    let base = here.full(None, &mixed());
    let tip = here.diff(base.id(), &mixed());
    let mut packs = Packs::new();
    let index = packed(&tip, &KnownChunks::default(), &mut packs);
    let before = there.entries();
    let error = imported(&there.store, &index, &packs).unwrap_err();
    assert!(matches!(error, ImportError::Parent(_)), "{error}");
    assert_eq!(there.entries(), before);
}

#[test]
fn chunks_that_are_known_are_not_packed_again() {
    let here = Fixture::new();
    let base = here.full(None, &with_noise(1));
    let twin = here.full(None, &with_noise(1));
    let mut packs = Packs::new();
    let first = packed(&base, &KnownChunks::default(), &mut packs);
    let mut known = KnownChunks::default();
    known.add(&first);
    assert!(!known.is_empty() && known.len() == first.chunks().len());
    let before = packs.len();
    let second = packed(&twin, &known, &mut packs);
    assert_eq!(packs.len(), before, "all of it is there");
    assert_eq!(second.chunks(), first.chunks());
    let there = Fixture::new();
    imported(&there.store, &second, &packs)
        .unwrap()
        .verify()
        .unwrap();
}

#[test]
fn the_working_set_comes_first_and_alone() {
    let here = Fixture::new();
    let base = here.full(None, &[Written::Data(9); PAGES]);
    let faulted = [200, 3, 90].into_iter().zip([2000, 9000, 50_000]);
    let faulted = faulted
        .map(|(page, at_us)| Touched {
            page,
            at_us,
            count: 1,
        })
        .collect();
    let run = Run {
        faulted,
        ..Run::default()
    };
    merge_into(&base.working_set_path(), 4096, PAGES as u64, &run).unwrap();
    let mut packs = Packs::new();
    let index = packed(&base, &KnownChunks::default(), &mut packs);
    let place = |page| index.streams()[0].place(PageNumber::new(page));
    for (at, page) in (0..).zip([200, 3, 90]) {
        assert_eq!(place(page), Some(Place::Chunk { chunk: 0, at }));
    }
    assert_eq!(index.chunks()[0].pages, 3);
    let there = Fixture::new();
    let copy = imported(&there.store, &index, &packs).unwrap();
    assert_eq!(
        std::fs::read(copy.working_set_path()).unwrap(),
        std::fs::read(base.working_set_path()).unwrap()
    );
}

#[test]
fn a_drive_that_is_a_file_of_the_host_does_not_travel() {
    let here = Fixture::new();
    let temp = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(temp.path(), "a disk").unwrap();
    let mut with_host = parts(Kind::Full);
    with_host.devices.drives[0].read_only = true;
    with_host.devices.drives[0].backing =
        BackingParts::Host(temp.path().to_str().unwrap().parse().unwrap());
    let draft = here.store.begin(None).unwrap();
    fill(&draft, &mixed());
    let snapshot = draft.publish(with_host).unwrap();
    let error = pack(&snapshot, &KnownChunks::default(), &mut |_| {
        Ok::<(), Infallible>(())
    });
    assert!(matches!(
        error,
        Err(PackError::Index(IndexError::HostFile { .. }))
    ));
}

/// A reader of its own: it knows `docs/packed-format.md`, and nothing of the one that is tested.
fn memory_by_hand(index: &[u8], packs: &Packs) -> Vec<Option<[u8; 4096]>> {
    let word = |at: usize| u32::from_le_bytes(index[at..at + 4].try_into().unwrap()) as usize;
    let digest = |at: usize| <[u8; 32]>::try_from(&index[at..at + 32]).unwrap();
    assert_eq!(&index[..8], b"RKDLINDX");
    assert_eq!((word(8), word(12)), (1, 4096));
    let (pack_count, chunk_count, stream_count) = (word(16), word(20), word(24));
    let (pack_table, chunk_table) = (64, 64 + 40 * pack_count);
    let streams = chunk_table + 48 * chunk_count;
    let extents = streams + 16 * stream_count;
    let mut pages = vec![None; word(streams) / 4096];
    for extent in (0..word(streams + 8)).map(|n| extents + 16 * n) {
        let (first, count, chunk, at) = (
            word(extent),
            word(extent + 4),
            word(extent + 8),
            word(extent + 12),
        );
        for n in 0..count {
            pages[first + n] = Some(match chunk {
                0xffff_ffff => [0; 4096],
                _ => {
                    let chunk = chunk_table + 48 * chunk;
                    let name = Digest::from_bytes(digest(pack_table + 40 * word(chunk + 32)));
                    let (offset, stored) = (word(chunk + 36), word(chunk + 40));
                    let stored = &packs[&name][offset..offset + stored];
                    let raw = match word(chunk + 44) >> 16 {
                        0 => stored.to_vec(),
                        _ => zstd::stream::decode_all(stored).unwrap(),
                    };
                    assert_eq!(blake3::hash(&raw).as_bytes(), &digest(chunk));
                    assert_eq!(raw.len(), 4096 * (word(chunk + 44) & 0xffff));
                    raw[4096 * (at + n)..][..4096].try_into().unwrap()
                }
            });
        }
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn another_reader_finds_every_page(full in memory(), diff in memory(), touched in vec(0..PAGES as u64, 0..50)) {
        let (here, there) = (Fixture::new(), Fixture::new());
        let base = here.full(None, &full);
        let faulted = touched.iter().map(|&page| Touched { page, at_us: 0, count: 1 }).collect();
        let run = Run { faulted, ..Run::default() };
        merge_into(&base.working_set_path(), 4096, PAGES as u64, &run).unwrap();
        let tip = here.diff(base.id(), &diff);
        let mut packs = Packs::new();
        let mut known = KnownChunks::default();
        for (snapshot, written) in [(base, full), (tip, diff)] {
            let index = packed(&snapshot, &known, &mut packs);
            known.add(&index);
            let is_diff = snapshot.manifest().parent().is_some();
            let found = memory_by_hand(&index.to_bytes().unwrap(), &packs);
            for (found, &written) in found.iter().zip(&written) {
                let expected = match written {
                    Written::Nothing => None,
                    Written::Zeros => is_diff.then_some([0; 4096]),
                    Written::Data(_) => Some(contents(written)),
                };
                prop_assert!(*found == expected);
            }
            imported(&there.store, &index, &packs).unwrap().verify().unwrap();
        }
    }
}

/// An index whose bytes were changed by somebody who can make checksums.
fn forged(index: &Index, change: impl FnOnce(&mut Vec<u8>)) -> Result<Index, IndexError> {
    let mut bytes = index.to_bytes().unwrap();
    bytes.truncate(bytes.len() - 32);
    change(&mut bytes);
    let seal = blake3::hash(&bytes);
    bytes.extend(seal.as_bytes());
    Index::parse(&bytes)
}

fn put(at: usize, value: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes())
}

#[test]
fn an_index_that_lies_is_refused_whatever_it_lies_about() {
    let here = Fixture::new();
    let base = here.full(None, &with_noise(1));
    let mut packs = Packs::new();
    let index = packed(&base, &KnownChunks::default(), &mut packs);
    assert!(forged(&index, |_| {}).is_ok());
    let length = |at, value| {
        let error = forged(&index, put(at, value)).unwrap_err();
        assert!(matches!(error, IndexError::Length { .. }), "{at}: {error}");
    };
    // Counts and sizes of the header: packs, chunks, streams, manifest, state, working set.
    for field in [16, 20, 24, 28, 32, 36] {
        length(field, u32::MAX);
        length(field, 1000);
    }
    let chunk = 64 + 40 * index.packs().len();
    let stream = chunk + 48 * index.chunks().len();
    let extent = stream + 16 * index.streams().len();
    length(stream + 8, u32::MAX);
    length(stream + 12, u32::MAX);
    let invalid = |at, value, said: &str| {
        let error = forged(&index, put(at, value)).unwrap_err().to_string();
        assert!(error.contains(said), "{at}: {error}");
    };
    invalid(12, 8192, "page size");
    invalid(44, 1, "header");
    invalid(64 + 32, 0, "a size that no pack has");
    invalid(64 + 36, 1, "a size that no pack has");
    invalid(chunk + 32, 99, "in a pack that is not there");
    invalid(chunk + 36, u32::MAX, "reaches beyond its pack");
    invalid(chunk + 40, u32::MAX, "longer than its pages");
    invalid(chunk + 44, 0x0001_0000, "a size that no chunk has");
    invalid(chunk + 44, 0x0001_0000 | 999, "a size that no chunk has");
    invalid(chunk + 44, 0x0007_0001, "in an unknown way");
    invalid(chunk + 44, 0x0000_0010, "as long as its pages");
    invalid(extent, u32::MAX, "reaches beyond its file");
    invalid(extent + 4, 0, "has no pages");
    invalid(extent + 4, 17, "reaches beyond its chunk");
    invalid(extent + 8, 9999, "in a chunk that is not there");
    invalid(extent + 8, u32::MAX, "is zero where");
    invalid(extent + 16, 0, "not after the one before");
    invalid(8, 2, "version 2");
    invalid(0, 0, "no index");
    invalid(stream, 4096, "disagree about the sizes");
    let mut bytes = index.to_bytes().unwrap();
    for cut in [0, 7, 64, 95, bytes.len() - 1] {
        assert!(Index::parse(&bytes[..cut]).is_err(), "{cut}");
    }
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    assert!(matches!(Index::parse(&bytes), Err(IndexError::Checksum)));
}

#[test]
fn pages_that_were_swapped_by_the_index_are_found_before_anything_is_published() {
    let (here, there) = (Fixture::new(), Fixture::new());
    let mut memory = vec![Written::Nothing; PAGES];
    memory[0..16].fill(Written::Data(1));
    memory[16..32].fill(Written::Data(2));
    let base = here.full(None, &memory);
    let mut packs = Packs::new();
    let index = packed(&base, &KnownChunks::default(), &mut packs);
    let extent = 64 + 40 * index.packs().len() + 48 * index.chunks().len() + 32;
    let swapped = forged(&index, |bytes| {
        let (first, second) = (bytes[extent + 8], bytes[extent + 24]);
        assert_ne!(first, second);
        (bytes[extent + 8], bytes[extent + 24]) = (second, first);
    });
    let before = there.entries();
    let error = imported(&there.store, &swapped.unwrap(), &packs).unwrap_err();
    assert!(matches!(error, ImportError::Differs { .. }), "{error}");
    assert_eq!(there.entries(), before);
}
