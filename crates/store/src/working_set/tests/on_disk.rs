//! Sets as files.

use super::*;
use crate::file::FileKind;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_merged_is_what_is_read() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    assert!(read(&path).unwrap().is_none());
    assert!(read_for(&path, 4096, PAGES).unwrap().is_none());
    for runs in 1..4 {
        let merged = merge_into(&path, 4096, PAGES, &faulted([at(runs, 0)])).unwrap();
        assert_eq!(u64::from(merged.runs()), runs);
        assert_eq!(length(merged.touched().len()), runs);
        assert_eq!(read(&path).unwrap().unwrap(), merged);
        assert_eq!(read_for(&path, 4096, PAGES).unwrap().unwrap(), merged);
    }
    assert_eq!(names(temp.path()), [".working-set.lock", "working-set"]);
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn a_set_that_is_damaged_or_of_another_memory_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    let run = faulted([at(1, 0)]);
    let alone = set_of(4096, PAGES, std::slice::from_ref(&run));
    let other = set_of(4096, PAGES + 1, std::slice::from_ref(&run)).to_bytes();
    let mut flipped = alone.to_bytes();
    flipped[13] ^= 1;
    for damage in [
        &b""[..],
        b"something else, of some length",
        &other,
        &flipped,
    ] {
        fs::write(&path, damage).unwrap();
        assert!(read_for(&path, 4096, PAGES).is_err());
        assert_eq!(merge_into(&path, 4096, PAGES, &run).unwrap(), alone);
        assert_eq!(read(&path).unwrap().unwrap(), alone);
    }
}

#[test]
fn the_set_of_a_later_program_is_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    let mut later = set_of(4096, PAGES, &[]).to_bytes();
    later[4] = 2;
    fs::write(&path, &later).unwrap();
    assert!(matches!(
        merge_into(&path, 4096, PAGES, &Run::default()),
        Err(WorkingSetError::Version { found: 2 })
    ));
    assert_eq!(fs::read(&path).unwrap(), later);
}

#[test]
fn a_run_that_cannot_be_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    merge_into(&path, 4096, PAGES, &faulted([at(1, 0)])).unwrap();
    let before = fs::read(&path).unwrap();
    let beyond = faulted([at(PAGES, 0)]);
    merge_into(&path, 4096, PAGES, &beyond).unwrap_err();
    merge_into(&path, 8192, PAGES, &Run::default()).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_a_dead_process_left_beside_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let victim = temp.path().join("victim");
    fs::write(&victim, "somebody's").unwrap();
    symlink(&victim, temp.path().join(".working-set.new")).unwrap();
    let path = temp.path().join("working-set");
    for _ in 0..2 {
        merge_into(&path, 4096, PAGES, &faulted([at(1, 0)])).unwrap();
        assert!(!names(temp.path()).contains(&".working-set.new".to_owned()));
        fs::write(temp.path().join(".working-set.new"), "half of").unwrap();
    }
    assert_eq!(fs::read(&victim).unwrap(), b"somebody's");
}

#[test]
fn what_is_no_regular_file_is_neither_read_nor_replaced() {
    for name in ["working-set", ".working-set.lock"] {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("working-set");
        symlink("/etc/passwd", temp.path().join(name)).unwrap();
        let error = merge_into(&path, 4096, PAGES, &Run::default()).unwrap_err();
        assert!(
            matches!(
                error,
                WorkingSetError::File(FileError::NotRegular {
                    found: FileKind::SymbolicLink,
                    ..
                })
            ),
            "{error}"
        );
    }
}

#[test]
fn an_endless_file_is_refused_before_it_is_read() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(matches!(read(&path), Err(WorkingSetError::TooLarge { limit }) if limit == MAX_SIZE));
    assert!(matches!(
        read_for(&path, 4096, PAGES),
        Err(WorkingSetError::TooLarge { limit }) if limit.get() == 56 + 16 * PAGES
    ));
}

#[test]
fn nobody_who_merges_at_the_same_time_is_lost() {
    const EACH: u64 = 50;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let path = &path;
            scope.spawn(move || {
                for run in 0..EACH {
                    let page = thread * EACH + run;
                    merge_into(path, 4096, PAGES, &faulted([at(page, 0)])).unwrap();
                }
            });
        }
        // Whoever reads meanwhile finds a whole one.
        for _ in 0..200 {
            read(&path).unwrap();
        }
    });
    let set = read(&path).unwrap().unwrap();
    assert_eq!(set.runs(), 200);
    let pages: Vec<u64> = set.touched().iter().map(|touched| touched.page).collect();
    assert_eq!(pages, (0..200).collect::<Vec<_>>());
}
