//! Streams that no `pack` makes.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rekindle_archive::{MAX_DATA, MAX_DEPTH, Meta, Name, Owner, Record, Special, Writer, unpack};

use crate::fixture::{Fixture, names, unpacked};

const META: Meta = Meta {
    mode: 0o755,
    uid: 0,
    gid: 0,
    seconds: 0,
    nanoseconds: 0,
};

fn name(text: &str) -> Option<Name> {
    Some(Name::new(text.as_bytes()).unwrap())
}

fn directory(text: &str) -> Record<'static> {
    Record::Directory {
        name: name(text),
        meta: META,
    }
}

fn file(text: &str) -> Record<'static> {
    Record::File {
        name: name(text),
        meta: META,
    }
}

fn link(text: &str, target: &str) -> Record<'static> {
    Record::Link {
        name: name(text),
        meta: META,
        target: target.into(),
    }
}

fn data(offset: u64, bytes: &'static [u8]) -> Record<'static> {
    Record::Data { offset, bytes }
}

fn stream(records: &[Record<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes).unwrap();
    for record in records {
        writer.put(record).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    bytes
}

/// A stream with these bytes where an entry's name is.
fn named(bytes: &[u8]) -> Vec<u8> {
    let mut stream = stream(&[directory("d"), file("X")]);
    stream.truncate(stream.len() - 3);
    stream.extend(u16::try_from(bytes.len()).unwrap().to_le_bytes());
    stream.extend(bytes);
    stream
}

fn refusal(stream: &[u8], to: &Path) -> String {
    unpacked(stream, to).unwrap_err().to_string()
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let fixture = Fixture::new();
    let to = fixture.path("to");
    let names: [&[u8]; 8] = [
        b"..",
        b".",
        b"/etc/passwd",
        b"a/b",
        b"../up",
        b"nul\0",
        b"",
        &[b'x'; 256],
    ];
    for name in names {
        let said = refusal(&named(name), &to);
        assert!(
            said.starts_with("what came is no sound copy: "),
            "{name:?}: {said}"
        );
    }
    assert_eq!(crate::fixture::names(&to), ["d"]);
    assert_eq!(crate::fixture::names(&fixture.path("")), ["from", "to"]);
}

#[test]
fn a_link_that_came_is_not_followed() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("outside")).unwrap();
    fixture.write("victim", "stays");
    let outside = fixture.path("outside");
    let through = |target: &str| {
        stream(&[
            directory("d"),
            link("way", target),
            directory("way"),
            file("in"),
            data(0, b"bad"),
            Record::FileEnd { size: 3 },
            Record::Leave,
            Record::Leave,
        ])
    };
    for target in [outside.to_str().unwrap(), "../../outside", "."] {
        let said = refusal(&through(target), &fixture.path("to"));
        assert!(
            said.ends_with("is in the way, and of another kind; remove it first"),
            "{said}"
        );
    }
    assert_eq!(names(&outside), [""; 0]);
    let over = stream(&[
        directory("d"),
        link("way", "../../victim"),
        file("way"),
        data(0, b"bad"),
        Record::FileEnd { size: 3 },
        Record::Leave,
    ]);
    unpacked(&over, &fixture.path("to")).unwrap();
    assert_eq!(fixture.read("victim"), "stays");
    assert_eq!(fixture.read("to/d/way"), "bad");
}

#[test]
fn a_link_that_was_there_is_not_followed_either() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("outside")).unwrap();
    symlink("../outside", fixture.path("to/d")).unwrap();
    let said = refusal(
        &stream(&[directory("d"), Record::Leave]),
        &fixture.path("to"),
    );
    assert!(said.contains("is in the way"), "{said}");
}

#[test]
fn lies_about_sizes_are_found_out() {
    let fixture = Fixture::new();
    let to = fixture.path("to");
    let whole = |records: &[Record<'static>]| [&[file("f")], records].concat();
    let end = |size| Record::FileEnd { size };
    let lies = [
        (
            whole(&[data(0, b"abc"), end(2)]),
            "a file shorter than its data",
        ),
        (
            whole(&[data(5, b"abc"), end(3)]),
            "a file shorter than its data",
        ),
        (
            whole(&[data(5, b"abc"), data(7, b"x"), end(9)]),
            "data that is not where it can be",
        ),
        (
            whole(&[data(u64::MAX, b"abc")]),
            "data that is not where it can be",
        ),
        (whole(&[directory("d")]), "a file that does not end"),
        (whole(&[Record::Leave]), "a file that does not end"),
        (vec![data(0, b"abc")], "it begins with no file or directory"),
        (vec![Record::Leave], "it begins with no file or directory"),
        (vec![directory("d"), data(0, b"abc")], "data of no file"),
        (
            vec![directory("d"), Record::Leave, Record::Leave],
            "more than one file or tree",
        ),
        (
            vec![Record::File {
                name: None,
                meta: META,
            }],
            "an entry without a name",
        ),
    ];
    for (records, why) in lies {
        let said = refusal(&stream(&records), &to);
        assert_eq!(
            said,
            format!("what came is no sound copy: {why}"),
            "{records:?}"
        );
        assert!(!to.join("f").exists());
    }
    for size in [u64::MAX, 1 << 63] {
        let said = refusal(&stream(&whole(&[end(size)])), &to);
        assert_eq!(said, format!("cannot write {:?}", to.join("f")));
    }
    let far = whole(&[data((1 << 63) - 2, b"abc")]);
    assert_eq!(
        refusal(&stream(&far), &to),
        format!("cannot write {:?}", to.join("f"))
    );
    assert_eq!(names(&to), ["d"]);
}

#[test]
fn lengths_that_none_has_are_refused_before_memory_is_taken() {
    let fixture = Fixture::new();
    let to = fixture.path("to");
    let mut data_too_long = stream(&[file("f")]);
    data_too_long.push(4);
    data_too_long.extend(0u64.to_le_bytes());
    let empty = [&data_too_long[..], &[0; 4]].concat();
    data_too_long.extend(u32::try_from(MAX_DATA + 1).unwrap().to_le_bytes());
    let mut link_too_long = stream(&[link("l", "t")]);
    link_too_long.truncate(link_too_long.len() - 3);
    let nowhere = [&link_too_long[..], &[0; 2]].concat();
    link_too_long.extend(4096u16.to_le_bytes());
    for bytes in [data_too_long, empty, link_too_long, nowhere] {
        let said = refusal(&bytes, &to);
        assert!(said.starts_with("what came is no sound copy: "), "{said}");
    }
    let unknown = [stream(&[]), vec![9]].concat();
    assert!(refusal(&unknown, &to).ends_with("a record of no known kind"));
    let wrong_mode = [&stream(&[])[..], &[3], &[0xff; 24]].concat();
    assert!(refusal(&wrong_mode, &to).ends_with("a mode or a time that nothing has"));
    for other in ["rekindle-tree 2\n", "hello, how are you?"] {
        assert!(refusal(other.as_bytes(), &to).starts_with("what came is no copy"));
    }
    assert_eq!(names(&to), [""; 0]);
}

#[test]
fn a_tree_that_goes_down_for_ever_ends() {
    let fixture = Fixture::new();
    let down = vec![directory("d"); MAX_DEPTH + 1];
    let said = refusal(&stream(&down), &fixture.path("to"));
    assert!(
        said.ends_with("is more than 256 directories deep"),
        "{said}"
    );
}

#[test]
fn words_from_a_stranger_cannot_move_the_cursor() {
    let fixture = Fixture::new();
    fixture.write("to/d/\u{1b}[2J/in", "x");
    let said = refusal(
        &stream(&[directory("d"), file("\u{1b}[2J")]),
        &fixture.path("to"),
    );
    assert_eq!(said, "the copy breaks off");
    let clash = [
        directory("d"),
        file("\u{1b}[2J"),
        Record::FileEnd { size: 0 },
    ];
    let said = refusal(&stream(&clash), &fixture.path("to"));
    assert!(said.contains(r#"/d/\u{1b}[2J" is in the way"#), "{said}");
}

#[test]
fn however_much_is_skipped_few_are_remembered() {
    let fixture = Fixture::new();
    let skipped = Record::Skipped {
        name: name("s").unwrap(),
        what: Special::Device,
    };
    let mut records = vec![directory("d")];
    records.extend(vec![skipped; 1000]);
    records.push(Record::Leave);
    let tally = unpack(
        &stream(&records)[..],
        &fixture.path("to"),
        Owner::Unpacker,
        &mut |_| (),
    )
    .unwrap();
    assert_eq!((tally.skipped, tally.examples.len()), (1000, 16));
}

#[test]
fn what_nobody_takes_is_an_error_of_sending() {
    struct Closed;
    impl io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fixture = Fixture::new();
    let path = fixture.write("from/file", &"x".repeat(1 << 20));
    let error = rekindle_archive::pack(&path, Closed, &mut |_| ()).unwrap_err();
    assert_eq!(error.to_string(), "what is copied cannot be sent");
}
