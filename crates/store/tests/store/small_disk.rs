use crate::fixture::{Fixture, PAGES, Written, data_pages, mixed, parts, write_memory};
use rekindle_store::file::FileError;
use rekindle_store::manifest::Kind;
use rekindle_store::publish::PublishError;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CStr;
use std::io::Write;
use std::path::Path;

/// A small file system of its own, unmounted when it is dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(test: &str, options: &CStr) -> Option<Self> {
        let temp = tempfile::tempdir().unwrap();
        match mount("tmpfs", temp.path(), "tmpfs", MountFlags::empty(), options) {
            Ok(()) => Some(Self(temp)),
            Err(errno) => {
                eprintln!("skipped {test}: cannot mount a tmpfs with {options:?}: {errno}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    fn empty(&self) {
        std::fs::remove_file(self.path().join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(self.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_is_one_clear_error_and_changes_nothing() {
    let Some(disk) = SmallDisk::mount(
        "a_full_disk_is_one_clear_error_and_changes_nothing",
        c"size=8m",
    ) else {
        return;
    };
    let fixture = Fixture::at(&disk.path().join("state"));
    let base = fixture.full(Some("base"), &mixed());
    let before = fixture.entries();
    for kind in [Kind::Full, Kind::Diff { parent: base.id() }] {
        // No zeros to punch, so that nothing is given back on the way.
        let draft = fixture.draft(Some("next"), &[Written::Data(3); PAGES]);
        disk.fill();
        let error = draft.publish(parts(kind)).unwrap_err();
        assert!(
            matches!(&error, PublishError::File(file) if file.is_no_space()),
            "{error:?}"
        );
        assert!(
            error.to_string().starts_with("no space left to "),
            "{error}"
        );
        assert_eq!(fixture.entries(), before);
        disk.empty();
    }
    base.verify().unwrap();
    fixture.full(Some("next"), &mixed());
}

#[test]
fn a_disk_copied_onto_a_full_disk_is_gone_again() {
    let Some(disk) = SmallDisk::mount("a_disk_copied_onto_a_full_disk_is_gone_again", c"size=8m")
    else {
        return;
    };
    let from = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(from.path(), vec![1; 9 << 20]).unwrap();
    let to = disk.path().join("to");
    let error = rekindle_store::disk::copy_disk(from.path(), &to).unwrap_err();
    assert!(matches!(error, FileError::NoSpace { .. }), "{error:?}");
    assert!(!to.exists());
}

#[test]
fn a_diff_is_refused_where_a_page_makes_more_than_a_page_of_data() {
    let test = "a_diff_is_refused_where_a_page_makes_more_than_a_page_of_data";
    let Some(disk) = SmallDisk::mount(test, c"size=64m,huge=always") else {
        return;
    };
    let mut memory = vec![Written::Nothing; PAGES];
    memory[7] = Written::Data(1);
    write_memory(&disk.path().join("probe"), &memory);
    if data_pages(&disk.path().join("probe")) == [7] {
        eprintln!("skipped {test}: this kernel keeps holes of a page among huge pages");
        return;
    }
    let fixture = Fixture::at(&disk.path().join("state"));
    let base = fixture.full(None, &mixed());
    base.verify().unwrap();
    let before = fixture.entries();
    let error = fixture
        .draft(None, &memory)
        .publish(parts(Kind::Diff { parent: base.id() }))
        .unwrap_err();
    assert!(matches!(error, PublishError::CoarseHoles { .. }), "{error}");
    assert_eq!(fixture.entries(), before);
}
