use crate::fixture::{Fixture, assert_same, lineage, push};
use rekindle_store::packed::{Cache, PullError, Pulled, Repository};
use rekindle_store::unit::ByteSize;
use std::path::{Path, PathBuf};

const PLENTY: ByteSize = ByteSize::new(1 << 30);

fn pull(fixture: &Fixture, from: &Path, limit: ByteSize) -> Result<Pulled, PullError> {
    let cache = Cache::open(fixture.store.root(), limit).unwrap();
    Repository::directory(from).pull(&fixture.store, "base", None, Some(&cache), &|_| {})
}

fn cached(fixture: &Fixture) -> Vec<PathBuf> {
    let entries = fixture.store.root().cache().read_dir().unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A repository with the snapshot `base`.
fn repository() -> (tempfile::TempDir, Fixture) {
    let (temp, here) = (tempfile::tempdir().unwrap(), Fixture::new());
    lineage(&here);
    push(&here, temp.path(), "base").unwrap();
    (temp, here)
}

#[test]
fn what_was_fetched_once_is_not_fetched_again() {
    let (temp, here) = repository();
    let there = Fixture::new();
    pull(&there, temp.path(), PLENTY).unwrap();
    let id = there.store.resolve("base").unwrap();
    there.store.remove(id).unwrap();
    std::fs::remove_dir_all(temp.path().join("packs")).unwrap();
    pull(&there, temp.path(), PLENTY).unwrap();
    assert_same(&here.store.snapshot("base").unwrap(), &there);
}

#[test]
fn what_is_damaged_in_the_cache_is_fetched_again() {
    let (temp, here) = repository();
    let there = Fixture::new();
    pull(&there, temp.path(), PLENTY).unwrap();
    let id = there.store.resolve("base").unwrap();
    there.store.remove(id).unwrap();
    let damaged = cached(&there);
    for (n, path) in damaged.iter().enumerate() {
        let mut bytes = std::fs::read(path).unwrap();
        match n % 3 {
            0 => bytes[0] ^= 1,
            1 => bytes.clear(),
            _ => bytes.push(0),
        }
        std::fs::write(path, bytes).unwrap();
    }
    pull(&there, temp.path(), PLENTY).unwrap();
    assert_same(&here.store.snapshot("base").unwrap(), &there);
    assert_eq!(cached(&there).len(), damaged.len());
}

#[test]
fn the_cache_is_bounded_and_what_was_wanted_last_stays() {
    let (temp, _here) = repository();
    let there = Fixture::new();
    pull(&there, temp.path(), PLENTY).unwrap();
    let all = cached(&there);
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    for path in &all[1..] {
        let file = std::fs::File::options().append(true).open(path).unwrap();
        file.set_modified(old).unwrap();
    }
    let first = all[0].metadata().unwrap().len();
    Cache::open(there.store.root(), ByteSize::new(first))
        .unwrap()
        .trim();
    assert!(all.len() > 2);
    assert_eq!(cached(&there), [all[0].clone()]);
}
