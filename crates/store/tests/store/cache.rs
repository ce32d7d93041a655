use crate::fixture::{Fixture, assert_same, lineage, push};
use rekindle_store::packed::{Cache, Chunk, Directory, Fetch, FetchError, Repository};
use rekindle_store::unit::ByteSize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const PLENTY: ByteSize = ByteSize::new(1 << 30);

fn pull(fixture: &Fixture, from: &Path) {
    let cache = Cache::open(fixture.store.root(), PLENTY).unwrap();
    Repository::directory(from)
        .pull(&fixture.store, "base", None, Some(&cache), &|_| {})
        .unwrap();
}

/// What was pulled is gone, but for what is cached.
fn forget(fixture: &Fixture) {
    let id = fixture.store.resolve("base").unwrap();
    fixture.store.remove(id).unwrap();
}

fn cached(fixture: &Fixture) -> Vec<PathBuf> {
    let entries = fixture.store.root().cache().read_dir().unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A repository with the snapshot `base`, where that is from, and where it was pulled to.
fn pulled() -> (tempfile::TempDir, Fixture, Fixture) {
    let (temp, here, there) = (tempfile::tempdir().unwrap(), Fixture::new(), Fixture::new());
    lineage(&here);
    push(&here, temp.path(), "base").unwrap();
    pull(&there, temp.path());
    (temp, here, there)
}

#[test]
fn what_was_fetched_once_is_not_fetched_again() {
    let (temp, here, there) = pulled();
    forget(&there);
    std::fs::remove_dir_all(temp.path().join("packs")).unwrap();
    pull(&there, temp.path());
    assert_same(&here.store.snapshot("base").unwrap(), &there);
}

#[test]
fn what_is_damaged_in_the_cache_is_fetched_again() {
    let (temp, here, there) = pulled();
    forget(&there);
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
    pull(&there, temp.path());
    assert_same(&here.store.snapshot("base").unwrap(), &there);
    assert_eq!(cached(&there).len(), damaged.len());
}

#[test]
fn what_is_asked_for_stays_though_it_is_not_read() {
    let (temp, here, there) = pulled();
    let all = cached(&there);
    let old = SystemTime::now() - Duration::from_secs(3600);
    for path in &all {
        File::open(path).unwrap().set_modified(old).unwrap();
    }
    let id = here.store.resolve("base").unwrap();
    let index = Repository::directory(temp.path())
        .index(id)
        .unwrap()
        .unwrap();
    let wanted = &index.chunks()[0];
    let cache = Cache::open(there.store.root(), ByteSize::new(wanted.raw_size())).unwrap();
    assert!(cache.has(wanted));
    cache.trim();
    assert!(cache.has(wanted));
    assert_eq!(cached(&there).len(), 1);
}

#[test]
fn an_index_that_lies_about_a_chunks_length_is_given_nothing() {
    let (temp, here, there) = pulled();
    let id = here.store.resolve("base").unwrap();
    let index = Repository::directory(temp.path())
        .index(id)
        .unwrap()
        .unwrap();
    let cache = Cache::open(there.store.root(), PLENTY).unwrap();
    let honest = index.chunks()[0];
    let longer = Chunk {
        pages: honest.pages + 1,
        ..honest
    };
    assert!(cache.get(&longer).is_none() && cache.get_at_once(&longer).is_none());
    let found = cache.get(&honest).unwrap();
    assert_eq!(u64::try_from(found.len()).unwrap(), honest.raw_size());
}

#[test]
fn an_index_whose_pack_is_not_there_is_asked_for_anew() {
    let (temp, here, there) = pulled();
    let cache = Cache::open(there.store.root(), PLENTY).unwrap();
    let repository = Repository::directory(temp.path());
    let outline = || repository.outline(there.store.root(), "base", Some(&cache));
    let indexes = || {
        cached(&there)
            .into_iter()
            .filter(|path| is_index(path))
            .count()
    };
    let first = outline().unwrap();
    assert_eq!(indexes(), 1);
    for path in cached(&there).iter().filter(|path| !is_index(path)) {
        fs::remove_file(path).unwrap();
    }
    fs::remove_dir_all(temp.path().join("packs")).unwrap();
    let objects = Directory::at(temp.path());
    let fetch = Fetch {
        objects: &objects,
        cache: Some(&cache),
    };
    let lost = fetch.all::<FetchError>(&first.indexes()[0], &|_, _| Ok(()));
    assert!(lost.is_err());
    assert_eq!(indexes(), 0);
    drop(here);
}

fn is_index(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("index-"))
}

#[test]
fn the_cache_is_bounded_and_what_was_wanted_last_stays() {
    let (_temp, _here, there) = pulled();
    let all = cached(&there);
    let old = SystemTime::now() - Duration::from_secs(3600);
    for path in &all[1..] {
        let file = File::options().append(true).open(path).unwrap();
        file.set_modified(old).unwrap();
    }
    let first = all[0].metadata().unwrap().len();
    let cache = Cache::open(there.store.root(), ByteSize::new(first)).unwrap();
    assert!(cache.size().get() > first);
    cache.trim();
    assert_eq!(cache.size().get(), first);
    assert!(all.len() > 2);
    assert_eq!(cached(&there), [all[0].clone()]);
}
