use crate::fixture::{Fixture, assert_same, lineage, pull, push};
use rekindle_store::digest::Digest;
use rekindle_store::packed::{Progress, PullError, PushError, Pushed, Repository};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

fn place() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("deep/repository");
    (temp, path)
}

fn only_file(dir: &Path) -> PathBuf {
    let mut entries = dir.read_dir().unwrap();
    let only = entries.next().unwrap().unwrap().path();
    assert!(entries.next().is_none());
    only
}

#[test]
fn a_snapshot_travels_with_all_that_it_builds_on() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, tip] = lineage(&here);
    assert_eq!(push(&here, &path, "tip").unwrap().snapshots, 2);
    let pulled = pull(&there, &path, "tip").unwrap();
    assert_eq!((pulled.id, pulled.snapshots), (tip.id(), 2));
    assert_eq!(pulled.name.unwrap().as_str(), "tip");
    assert_same(&base, &there);
    assert_same(&tip, &there);
    assert_eq!(there.store.root().tmp().read_dir().unwrap().count(), 0);
}

#[test]
fn only_what_the_other_side_lacks_is_written() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, tip] = lineage(&here);
    assert_eq!(push(&here, &path, "base").unwrap().snapshots, 1);
    assert_eq!(push(&here, &path, "tip").unwrap().snapshots, 1);
    assert_eq!(push(&here, &path, "tip").unwrap(), Pushed::default());
    assert_eq!(pull(&there, &path, "base").unwrap().snapshots, 1);
    assert_eq!(pull(&there, &path, "tip").unwrap().snapshots, 1);
    assert_eq!(pull(&there, &path, "tip").unwrap().snapshots, 0);
    assert_same(&base, &there);
    assert_same(&tip, &there);
}

#[test]
fn it_can_have_other_names_there_and_here_and_progress_is_told() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, _] = lineage(&here);
    let last = Mutex::new(Progress::default());
    let report = |now| *last.lock().unwrap() = now;
    let directory = Repository::directory(&path);
    let other = Some("other".parse().unwrap());
    let snapshot = here.store.snapshot("base").unwrap();
    directory
        .push(&here.store, snapshot, other, &report)
        .unwrap();
    let told = *last.lock().unwrap();
    assert!(told.done > 0 && told.total >= 1 << 20, "{told:?}");
    let mine = Some("mine".parse().unwrap());
    directory
        .pull(&there.store, "other", mine, None, &report)
        .unwrap();
    let told = *last.lock().unwrap();
    assert_eq!(told.done, told.total);
    assert_same(&base, &there);
    assert_eq!(there.store.resolve("mine").unwrap(), base.id());
}

#[test]
fn two_that_push_or_pull_the_same_at_once_both_succeed() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, tip] = lineage(&here);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| push(&here, &path, "tip").unwrap());
        }
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| pull(&there, &path, "tip").unwrap());
        }
    });
    assert_same(&base, &there);
    assert_same(&tip, &there);
}

#[test]
fn what_is_not_there_and_what_is_taken_is_said_before_anything_is_made() {
    let (_temp, path) = place();
    let (here, other) = (Fixture::new(), Fixture::new());
    let error = pull(&other, &path, "base").unwrap_err();
    assert!(
        matches!(&error, PullError::NoSuchSnapshot { key, .. } if key == "base"),
        "{error}"
    );
    let error = pull(&other, &path, "No Name").unwrap_err();
    assert!(matches!(error, PullError::Key { .. }), "{error}");
    lineage(&here);
    push(&here, &path, "base").unwrap();
    let error = pull(&other, &path, "0123456789abcdef").unwrap_err();
    assert!(matches!(error, PullError::NoSuchSnapshot { .. }), "{error}");
    // One flipped bit may lead to another id.
    fs::write(path.join("names/astray"), "0123456789abcdef\n").unwrap();
    let error = pull(&other, &path, "astray").unwrap_err();
    assert!(
        matches!(&error, PullError::Astray { url, .. } if url.ends_with("names/astray")),
        "{error}"
    );
    assert_eq!(other.entries(), [""; 0]);
    let owner = lineage(&other)[0].id();
    let error = push(&other, &path, "base").unwrap_err();
    assert!(matches!(error, PushError::NameTaken { .. }), "{error}");
    let error = pull(&other, &path, "base").unwrap_err();
    assert!(
        matches!(error, PullError::NameTaken { owner: who, .. } if who == owner),
        "{error}"
    );
    assert_eq!(other.store.list().unwrap().len(), 2);
}

#[test]
fn an_index_that_is_damaged_newer_or_of_another_snapshot_is_refused() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, _] = lineage(&here);
    push(&here, &path, "base").unwrap();
    let index = path.join("snapshots").join(base.id().to_string());
    let good = std::fs::read(&index).unwrap();
    let sealed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        let body = bytes.len() - 32;
        let seal = Digest::of(&bytes[..body]);
        bytes[body..].copy_from_slice(seal.as_bytes());
        bytes
    };
    for (bytes, why) in [
        (
            sealed(8, 2),
            "has version 2, and this program reads version 1",
        ),
        (sealed(23, 255), "bytes instead of"),
        (good[..good.len() / 2].to_vec(), "checksum"),
        (b"hello".to_vec(), "no index"),
        (Vec::new(), "no index"),
    ] {
        std::fs::write(&index, bytes).unwrap();
        let error = pull(&there, &path, "base").unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(why), "{error}: {cause}");
        assert!(
            error.to_string().contains(&base.id().to_string()),
            "{error}"
        );
    }
    std::fs::write(path.join("snapshots/0123456789abcdef"), &good).unwrap();
    let error = pull(&there, &path, "0123456789abcdef").unwrap_err();
    assert!(
        error.to_string().contains("not the index of that snapshot"),
        "{error}"
    );
    assert_eq!(there.entries(), [""; 0]);
}

#[test]
fn a_pack_that_is_damaged_cut_off_or_missing_is_named_and_pushed_again() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [base, _] = lineage(&here);
    push(&here, &path, "base").unwrap();
    let pack = only_file(&path.join("packs"));
    let good = std::fs::read(&pack).unwrap();
    let mut wrong = good.clone();
    wrong[good.len() / 2] ^= 1;
    for bytes in [Some(wrong.as_slice()), Some(&good[..good.len() - 1]), None] {
        match bytes {
            Some(bytes) => std::fs::write(&pack, bytes).unwrap(),
            None => std::fs::remove_file(&pack).unwrap(),
        }
        let error = pull(&there, &path, "base").unwrap_err().to_string();
        assert!(error.contains(pack.to_str().unwrap()), "{error}");
        assert_eq!(there.entries(), [""; 0]);
    }
    for bytes in [Some(&good[..10]), None] {
        match bytes {
            Some(bytes) => std::fs::write(&pack, bytes).unwrap(),
            None => std::fs::remove_file(&pack).unwrap(),
        }
        push(&here, &path, "base").unwrap();
        assert_eq!(std::fs::read(&pack).unwrap(), good);
    }
    pull(&there, &path, "base").unwrap();
    assert_same(&base, &there);
}

#[test]
fn nothing_is_built_on_what_was_lost() {
    let (_temp, path) = place();
    let (here, there) = (Fixture::new(), Fixture::new());
    let [_, tip] = lineage(&here);
    push(&here, &path, "base").unwrap();
    fs::remove_file(only_file(&path.join("packs"))).unwrap();
    assert_eq!(push(&here, &path, "tip").unwrap().snapshots, 2);
    pull(&there, &path, "tip").unwrap();
    assert_same(&tip, &there);
}

#[test]
fn a_damaged_snapshot_is_not_pushed() {
    let (_temp, path) = place();
    let here = Fixture::new();
    let [base, _] = lineage(&here);
    let mut memory = std::fs::read(base.memory_path()).unwrap();
    memory[5000] ^= 1;
    std::fs::write(base.memory_path(), memory).unwrap();
    let error = push(&here, &path, "base").unwrap_err();
    assert!(matches!(error, PushError::Damaged { .. }), "{error}");
    for part in ["packs", "snapshots", "names"] {
        assert_eq!(path.join(part).read_dir().unwrap().count(), 0, "{part}");
    }
}
