//! The rules of `docker cp`, a test for each cell of its table.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use crate::fixture::{Fixture, names};

/// `from` has a file `f` and a directory `d` with a file `in`.
fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.write("from/f", "file");
    fixture.write("from/d/in", "inner");
    fixture
}

fn refusal(fixture: &Fixture, from: &str, to: &str) -> String {
    let error = fixture.copy(from, to).unwrap_err().to_string();
    error.replace(fixture.path("").to_str().unwrap(), "")
}

#[test]
fn a_file_goes_into_a_directory_by_its_name() {
    let fixture = fixture();
    for to in ["to", "to/", "to/."] {
        fixture.copy("from/f", to).unwrap();
        assert_eq!(names(&fixture.path("to")), ["f"]);
    }
}

#[test]
fn a_file_takes_the_place_of_a_file_or_of_nothing() {
    let fixture = fixture();
    fixture.write("to/old", "old");
    for name in ["to/old", "to/new"] {
        fixture.copy("from/f", name).unwrap();
        assert_eq!(fixture.read(name), "file");
    }
    assert_eq!(
        refusal(&fixture, "from/f", "to/none/"),
        r#"there is no directory "to/none/" to copy to; make it first"#
    );
    assert_eq!(
        refusal(&fixture, "from/f", "to/none/f"),
        r#"there is no directory "to/none" to copy to; make it first"#
    );
    let said = refusal(&fixture, "from/f", "to/old/");
    assert!(said.starts_with(r#""to/old/" is no directory"#), "{said}");
    assert_eq!(names(&fixture.path("to")), ["new", "old"]);
}

#[test]
fn a_directory_goes_into_a_directory_by_its_name_and_its_content_without() {
    let fixture = fixture();
    fixture.copy("from/d", "to").unwrap();
    fixture.copy("from/d/", "to/d").unwrap();
    assert_eq!(fixture.read("to/d/in"), "inner");
    assert_eq!(fixture.read("to/d/d/in"), "inner");
    fixture.copy("from/d/.", "to").unwrap();
    assert_eq!(names(&fixture.path("to")), ["d", "in"]);
}

#[test]
fn a_directory_becomes_what_is_not_there() {
    let fixture = fixture();
    for (from, to) in [
        ("from/d", "to/a"),
        ("from/d/.", "to/b/"),
        ("from/d/../d/..", "to/c"),
    ] {
        fixture.copy(from, to).unwrap();
    }
    assert_eq!(fixture.read("to/a/in"), "inner");
    assert_eq!(fixture.read("to/b/in"), "inner");
    assert_eq!(fixture.read("to/c/d/in"), "inner");
    let said = refusal(&fixture, "from/d", "to/x/y");
    assert!(
        said.starts_with(r#"there is no directory "to/x""#),
        "{said}"
    );
}

#[test]
fn a_directory_takes_the_place_of_no_file() {
    let fixture = fixture();
    fixture.write("to/old", "old");
    for from in ["from/d", "from/d/."] {
        let said = refusal(&fixture, from, "to/old");
        assert!(said.starts_with(r#""to/old" is no directory"#), "{said}");
    }
    fixture.write("to/d", "in the way");
    let said = refusal(&fixture, "from/d", "to");
    assert_eq!(
        said,
        r#""to/d" is in the way, and of another kind; remove it first"#
    );
    fs::remove_file(fixture.path("to/d")).unwrap();
    fs::create_dir_all(fixture.path("to/f/full")).unwrap();
    let said = refusal(&fixture, "from/f", "to");
    assert!(said.starts_with(r#""to/f" is in the way"#), "{said}");
    assert_eq!(fixture.read("to/old"), "old");
}

#[test]
fn a_directory_that_is_there_keeps_its_permissions_and_what_is_in_it() {
    let fixture = fixture();
    fixture.write("to/d/other", "stays");
    fs::set_permissions(fixture.path("to/d"), fs::Permissions::from_mode(0o710)).unwrap();
    fixture.copy("from/d", "to").unwrap();
    assert_eq!(names(&fixture.path("to/d")), ["in", "other"]);
    let mode = fs::metadata(fixture.path("to/d"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o710);
}

#[test]
fn links_that_the_caller_names_are_followed_to_a_destination_and_copied_from_a_source() {
    let fixture = fixture();
    fixture.write("real/old", "old");
    symlink("../real", fixture.path("to/dir")).unwrap();
    symlink("../real/old", fixture.path("to/file")).unwrap();
    symlink("nowhere", fixture.path("to/dangling")).unwrap();
    fixture.copy("from/f", "to/dir").unwrap();
    assert_eq!(fixture.read("real/f"), "file");
    fixture.copy("from/f", "to/file").unwrap();
    assert_eq!(fixture.read("real/old"), "file");
    assert!(
        fs::symlink_metadata(fixture.path("to/file"))
            .unwrap()
            .is_symlink()
    );
    let said = refusal(&fixture, "from/f", "to/dangling");
    assert!(
        said.starts_with(r#""to/dangling" is a link that leads nowhere"#),
        "{said}"
    );

    fs::create_dir(fixture.path("out")).unwrap();
    fixture.copy("to/dir", "out").unwrap();
    assert_eq!(
        fs::read_link(fixture.path("out/dir")).unwrap().to_str(),
        Some("../real")
    );
    fixture.copy("to/dir/", "out/followed").unwrap();
    assert_eq!(names(&fixture.path("out/followed")), ["f", "old"]);
}

#[test]
fn a_device_is_no_destination() {
    let fixture = fixture();
    let fifo = fixture.path("to/fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let said = refusal(&fixture, "from/f", "to/fifo");
    assert!(
        said.starts_with(r#""to/fifo" is a FIFO, which is not copied to"#),
        "{said}"
    );
    fs::rename(&fifo, fixture.path("to/f")).unwrap();
    let said = refusal(&fixture, "from/f", "to");
    assert!(said.starts_with(r#""to/f" is in the way"#), "{said}");
}
