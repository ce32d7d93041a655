use rekindle_store::disk::{Copied, copy_disk, copy_disk_while};
use rekindle_store::file::{FileError, FileKind};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::cell::Cell;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;

#[test]
fn a_copy_has_the_data_and_the_holes_of_its_original() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    let disk = File::create_new(&from).unwrap();
    disk.set_len((64 << 20) + 17).unwrap();
    for at in [0, 1 << 20, (32 << 20) + 5, 64 << 20] {
        disk.write_all_at(b"some data", at).unwrap();
    }
    let copied = copy_disk(&from, &to).unwrap();
    assert!(
        std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap(),
        "{copied:?}"
    );
    assert_eq!(to.metadata().unwrap().mode() & 0o777, 0o600);
    if copied == Copied::Sparse {
        assert!(
            to.metadata().unwrap().blocks() * 512 < 1 << 20,
            "holes stay holes"
        );
    }
    // Each has its own contents from now on.
    disk.write_all_at(b"other", 0).unwrap();
    assert_eq!(std::fs::read(&to).unwrap()[..9], *b"some data");
}

#[test]
fn a_copy_that_is_given_up_is_gone() {
    let temp = tempfile::tempdir().unwrap();
    // Never shared between two file systems.
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let (from, to) = (temp.path().join("from"), shm.path().join("to"));
    std::fs::write(&from, vec![1; 40 << 20]).unwrap();
    let asked = Cell::new(0);
    let error = copy_disk_while(&from, &to, &|| asked.replace(asked.get() + 1) < 2).unwrap_err();
    assert!(
        matches!(&error, FileError::Io { source, .. } if source.kind() == ErrorKind::Interrupted),
        "{error:?}"
    );
    assert_eq!(asked.get(), 3);
    assert!(!to.exists());
}

#[test]
fn an_empty_disk_is_copied_as_well() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::write(temp.path().join("from"), "").unwrap();
    copy_disk(&temp.path().join("from"), &temp.path().join("to")).unwrap();
    assert_eq!(std::fs::read(temp.path().join("to")).unwrap(), b"");
}

#[test]
fn a_copy_to_another_file_system_is_right_too() {
    let temp = tempfile::tempdir().unwrap();
    let Ok(shm) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!(
            "skipped a_copy_to_another_file_system_is_right_too: /dev/shm cannot be written to"
        );
        return;
    };
    let from = temp.path().join("from");
    let disk = File::create_new(&from).unwrap();
    disk.set_len(3 << 20).unwrap();
    disk.write_all_at(&[7; 100_000], 1_000_001).unwrap();
    assert_eq!(
        copy_disk(&from, &shm.path().join("to")).unwrap(),
        Copied::Sparse
    );
    assert!(std::fs::read(&from).unwrap() == std::fs::read(shm.path().join("to")).unwrap());
}

#[test]
fn what_is_no_regular_file_is_refused_before_it_is_read() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    std::fs::write(at("real"), "x").unwrap();
    symlink(at("real"), at("link")).unwrap();
    std::fs::create_dir(at("dir")).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _listener = UnixListener::bind(at("socket")).unwrap();
    let cases = [
        (at("link"), FileKind::SymbolicLink),
        (at("dir"), FileKind::Directory),
        (at("fifo"), FileKind::Fifo),
        (at("socket"), FileKind::Socket),
        ("/dev/zero".into(), FileKind::Device),
    ];
    for (from, kind) in cases {
        let error = copy_disk(&from, &at("to")).unwrap_err();
        assert!(
            matches!(&error, FileError::NotRegular { found, .. } if *found == kind),
            "{error}"
        );
        assert!(!at("to").exists());
    }
}

#[test]
fn a_copy_never_overwrites() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    std::fs::write(&from, "new").unwrap();
    std::fs::write(&to, "old").unwrap();
    let error = copy_disk(&from, &to).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot create {}", to.display()));
    assert_eq!(std::fs::read(&to).unwrap(), b"old");
}
