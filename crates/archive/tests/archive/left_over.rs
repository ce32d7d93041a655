//! What a copy that was cut off leaves, and what becomes of it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;

use rekindle_archive::{Owner, UnpackError, unpack};
use rustix::fs::{FlockOperation, flock};

use crate::fixture::{Fixture, names, packed, unpacked};

const LEFT: &str = "to/.rekindle-copy-0";

#[test]
fn a_file_that_breaks_off_anywhere_is_not_there_and_an_older_one_stays() {
    let fixture = Fixture::new();
    let path = fixture.write("from/file", &"new".repeat(1000));
    let stream = packed(&path).unwrap();
    for older in [None, Some("older")] {
        if let Some(older) = older {
            fixture.write("to/file", older);
        }
        for length in 0..stream.len() {
            let error = unpacked(&stream[..length], &fixture.path("to")).unwrap_err();
            assert_eq!(error.to_string(), "the copy breaks off", "{length}");
            match older {
                Some(older) => assert_eq!(fixture.read("to/file"), older),
                None => assert_eq!(names(&fixture.path("to")), [""; 0]),
            }
        }
    }
    unpacked(&stream, &fixture.path("to")).unwrap();
    assert_eq!(names(&fixture.path("to")), ["file"]);
}

#[test]
fn a_tree_that_breaks_off_anywhere_has_whole_files_and_nothing_beside_them() {
    let fixture = Fixture::new();
    for name in ["a", "b", "sub/c"] {
        fixture.write(&format!("from/tree/{name}"), &name.repeat(100));
    }
    symlink("a", fixture.path("from/tree/link")).unwrap();
    let stream = packed(&fixture.path("from/tree")).unwrap();
    for length in 0..stream.len() {
        unpacked(&stream[..length], &fixture.path("to")).unwrap_err();
        for name in ["a", "b", "sub/c"] {
            if let Ok(content) = fs::read_to_string(fixture.path(&format!("to/tree/{name}"))) {
                assert_eq!(content, name.repeat(100), "{length}");
            }
        }
        for dir in ["to/tree", "to/tree/sub"].map(|dir| fixture.path(dir)) {
            if dir.exists() {
                assert!(
                    names(&dir).iter().all(|name| !name.starts_with('.')),
                    "{length}"
                );
            }
        }
        let _ = fs::remove_dir_all(fixture.path("to/tree"));
    }
}

#[test]
fn what_a_killed_copy_left_is_removed_by_the_next_one() {
    let fixture = Fixture::new();
    fixture.write("from/file", "x");
    fixture.write(LEFT, "half");
    symlink("nowhere", fixture.path("to/.rekindle-copy-0-link")).unwrap();
    symlink("file", fixture.path("from/link")).unwrap();
    fixture.copy("from/link", "to").unwrap();
    fixture.copy("from/file", "to").unwrap();
    assert_eq!(names(&fixture.path("to")), ["file", "link"]);
}

#[test]
fn what_another_copy_still_writes_is_left_alone() {
    let fixture = Fixture::new();
    fixture.write("from/file", "x");
    fixture.write(LEFT, "growing");
    let theirs = File::open(fixture.path(LEFT)).unwrap();
    flock(&theirs, FlockOperation::LockExclusive).unwrap();
    fixture.copy("from/file", "to").unwrap();
    assert_eq!(names(&fixture.path("to")), [".rekindle-copy-0", "file"]);
    drop(theirs);
}

#[test]
fn a_link_by_the_name_of_what_is_left_over_is_not_followed() {
    let fixture = Fixture::new();
    fixture.write("from/file", "x");
    fixture.write("victim", "stays");
    symlink("../victim", fixture.path(LEFT)).unwrap();
    fixture.copy("from/file", "to").unwrap();
    fs::remove_file(fixture.path(LEFT)).unwrap();
    fs::hard_link(fixture.path("victim"), fixture.path(LEFT)).unwrap();
    fixture.copy("from/file", "to").unwrap();
    assert_eq!(fixture.read("victim"), "stays");
    assert_eq!(fixture.read("to/file"), "x");
}

#[test]
fn many_copies_to_one_directory_do_not_meet() {
    let fixture = Fixture::new();
    let path = fixture.write("from/file", &"x".repeat(200_000));
    let stream = packed(&path).unwrap();
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let (stream, fixture) = (&stream, &fixture);
            scope.spawn(move || {
                for round in 0..20 {
                    let name = format!("to/{writer}-{round}");
                    unpacked(stream, &fixture.path(&name)).unwrap();
                    unpacked(stream, &fixture.path("to/all")).unwrap();
                }
            });
        }
    });
    let names = names(&fixture.path("to"));
    assert_eq!(names.len(), 8 * 20 + 1, "{names:?}");
    for name in names {
        assert_eq!(fixture.read(&format!("to/{name}")).len(), 200_000);
    }
}

/// A connection that breaks.
struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn a_connection_that_breaks_is_told_as_one() {
    let fixture = Fixture::new();
    let path = fixture.write("from/file", "content");
    let stream = packed(&path).unwrap();
    let breaks = stream[..stream.len() - 3].chain(Broken);
    let error = unpack(breaks, &fixture.path("to"), Owner::Unpacker, &mut |_| ()).unwrap_err();
    assert!(matches!(error, UnpackError::Stream(_)), "{error:?}");
    assert_eq!(error.to_string(), "what is copied cannot be received");
    assert_eq!(names(&fixture.path("to")), [""; 0]);
}
