//! Files as a stranger would make them: those that fuzzing starts from, and what becomes of them when they are changed
//! a little and sealed again. `cargo xtask soak` goes on where this ends.

use proptest::prelude::*;
use proptest::sample::Index;
use rekindle_store::digest::Digest;
use rekindle_store::pages::{Pages, PagesError};
use rekindle_store::unit::ByteSize;
use rekindle_store::{Manifest, WorkingSet};
use std::path::Path;

const SEAL: &str = ",\n  \"checksum\": \"";

/// The files that a fuzz target starts from.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let files = dir.join(target).read_dir().unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

fn read_pages(bytes: &[u8]) -> Result<Pages, PagesError> {
    let size = ByteSize::new(bytes.len() as u64);
    Pages::read(bytes, size).map(|(pages, _)| pages)
}

/// The same with a checksum that fits, where the checksum is the last 32 bytes.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let body = &bytes[..bytes.len().saturating_sub(Digest::LEN)];
    [body, Digest::of(body).as_bytes()].concat()
}

fn sealed_manifest(bytes: &[u8]) -> Vec<u8> {
    let cut = bytes
        .windows(SEAL.len())
        .rposition(|window| window == SEAL.as_bytes());
    let body = &bytes[..cut.unwrap_or(bytes.len())];
    let seal = format!("{SEAL}{}\"\n}}\n", Digest::of(body));
    [body, seal.as_bytes()].concat()
}

#[derive(Debug, Clone)]
enum Change {
    Set(Index, u8),
    Remove(Index),
    Repeat(Index, Index),
    Swap(Index, Index),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Self::Set(at, byte) => bytes[at.index(len)] = *byte,
            Self::Remove(at) => {
                bytes.remove(at.index(len));
            }
            Self::Repeat(from, to) => {
                let (from, to) = (from.index(len), to.index(len));
                let piece = bytes[from.min(to)..from.max(to)].to_vec();
                bytes.splice(to..to, piece);
            }
            Self::Swap(a, b) => bytes.swap(a.index(len), b.index(len)),
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    // Digits matter most in a text, and small numbers in the rest.
    let byte = prop_oneof![any::<u8>(), 0..4_u8, b'0'..=b'9'];
    let at = any::<Index>;
    prop_oneof![
        4 => (at(), byte).prop_map(|(at, byte)| Change::Set(at, byte)),
        1 => at().prop_map(Change::Remove),
        1 => (at(), at()).prop_map(|(from, to)| Change::Repeat(from, to)),
        1 => (at(), at()).prop_map(|(a, b)| Change::Swap(a, b)),
    ]
}

fn changed(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec(change(), 1..4);
    (proptest::sample::select(seeds(target)), changes).prop_map(|(mut bytes, changes)| {
        changes.iter().for_each(|change| change.apply(&mut bytes));
        bytes
    })
}

#[test]
fn what_fuzzing_starts_from_is_sound() {
    for bytes in seeds("manifest") {
        Manifest::parse(&bytes).unwrap();
        assert_eq!(sealed_manifest(&bytes), bytes);
    }
    for bytes in seeds("pages") {
        read_pages(&bytes).unwrap();
        assert_eq!(sealed(&bytes), bytes);
    }
    for bytes in seeds("working_set") {
        assert_eq!(WorkingSet::parse(&bytes).unwrap().to_bytes(), bytes);
        assert_eq!(sealed(&bytes), bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn a_changed_manifest_is_refused_or_can_be_written(bytes in changed("manifest")) {
        for bytes in [sealed_manifest(&bytes), bytes] {
            if let Ok(manifest) = Manifest::parse(&bytes) {
                let written = manifest.to_bytes().unwrap();
                prop_assert_eq!(Manifest::parse(&written).unwrap(), manifest);
            }
        }
    }

    #[test]
    fn changed_pages_are_refused_or_describe_each_page(bytes in changed("pages")) {
        for bytes in [sealed(&bytes), bytes] {
            if let Ok(pages) = read_pages(&bytes) {
                let counted: u64 = pages.runs().map(|run| run.count.get()).sum();
                prop_assert_eq!(counted, pages.len().get());
            }
        }
    }

    #[test]
    fn a_changed_working_set_is_refused_or_is_the_only_file_of_its_set(
        bytes in changed("working_set"),
    ) {
        for bytes in [sealed(&bytes), bytes] {
            if let Ok(set) = WorkingSet::parse(&bytes) {
                prop_assert_eq!(set.to_bytes(), bytes);
            }
        }
    }
}
