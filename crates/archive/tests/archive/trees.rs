use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use rekindle_archive::{Owner, pack, unpack};

use crate::fixture::{Fixture, Trickle, look, packed, unpacked};

/// What a random tree is made of. Names are few, so that they meet.
#[derive(Clone, Debug)]
enum Node {
    Directory {
        mode: u32,
        time: u64,
        entries: Vec<(String, Node)>,
    },
    File {
        mode: u32,
        time: u64,
        size: u64,
        writes: Vec<(u64, u8, usize)>,
    },
    Link(String),
}

fn time() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_000_000_000_000_000_000u64, Just(999_999_999), Just(1)]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,3}", "[ -.0-~]{1,20}", "[ä-ü]{100}"]
        .prop_filter("no way", |name| name != "." && name != "..")
}

fn node() -> impl Strategy<Value = Node> {
    // Readable, as the tests may run as somebody who is not root.
    let mode = || (0..0o1000u32).prop_map(|mode| mode | 0o500);
    let write = (0..2_000_000u64, 1..=255u8, 1..100_000usize);
    let file = (
        mode(),
        time(),
        0..3_000_000u64,
        prop::collection::vec(write, 0..4),
    )
        .prop_map(|(mode, time, size, writes)| Node::File {
            mode,
            time,
            size,
            writes,
        });
    let link = "[a-z/.]{1,30}".prop_map(Node::Link);
    let leaf = prop_oneof![4 => file, 1 => link];
    leaf.prop_recursive(4, 24, 6, move |below| {
        let entries = prop::collection::vec((name(), below), 0..6);
        (mode(), time(), entries).prop_map(|(mode, time, entries)| Node::Directory {
            mode,
            time,
            entries,
        })
    })
}

fn dress(path: &Path, mode: u32, time: u64) {
    let time = UNIX_EPOCH + Duration::from_nanos(time);
    File::open(path)
        .unwrap()
        .set_times(FileTimes::new().set_modified(time))
        .unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn build(path: &Path, node: &Node) {
    if fs::symlink_metadata(path).is_ok() {
        return;
    }
    match node {
        Node::Directory {
            mode,
            time,
            entries,
        } => {
            fs::create_dir(path).unwrap();
            for (name, below) in entries {
                build(&path.join(name), below);
            }
            dress(path, *mode, *time);
        }
        Node::File {
            mode,
            time,
            size,
            writes,
        } => {
            let file = File::create(path).unwrap();
            file.set_len(*size).unwrap();
            for (at, byte, count) in writes {
                file.write_all_at(&vec![*byte; *count], *at).unwrap();
            }
            dress(path, *mode, *time);
        }
        Node::Link(target) => symlink(target, path).unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_tree_comes_out_as_it_went_in(node in node(), cut in prop_oneof![1..40usize, Just(1 << 20)]) {
        let fixture = Fixture::new();
        build(&fixture.path("from/root"), &node);
        let stream = packed(&fixture.path("from/root")).unwrap();
        // A byte at a time only if there are few.
        let cut = if stream.len() > 100_000 { 100_000 } else { cut };
        let (trickle, to) = (Trickle(&stream, cut), fixture.path("to/other"));
        let came = unpack(trickle, &to, Owner::Unpacker, &mut |_| ()).unwrap();
        let (from, to) = (look(&fixture.path("from/root")), look(&to));
        prop_assert_eq!(from.keys().collect::<Vec<_>>(), to.keys().collect::<Vec<_>>());
        for (path, before) in &from {
            prop_assert!(&to[path] == before, "{:?}", path);
        }
        let mut sent = Vec::new();
        let went = pack(&fixture.path("to/other"), &mut sent, &mut |_| ()).unwrap();
        prop_assert_eq!(came, went);
    }
}

#[test]
fn owners_and_setuid_are_kept_only_where_asked_for() {
    let fixture = Fixture::new();
    let path = fixture.write("from/tool", "x");
    let we = fs::metadata(&path).unwrap();
    if we.uid() == 0 {
        // Only root can give things away.
        std::os::unix::fs::chown(&path, Some(1234), Some(1235)).unwrap();
    }
    fs::set_permissions(&path, Permissions::from_mode(0o6751)).unwrap();
    let theirs = fs::metadata(&path).unwrap();
    let stream = packed(&path).unwrap();
    let to = fixture.path("to");
    for (owner, mode, uid, gid) in [
        (Owner::Unpacker, 0o751, we.uid(), we.gid()),
        (Owner::Kept, 0o6751, theirs.uid(), theirs.gid()),
    ] {
        unpack(&stream[..], &to, owner, &mut |_| ()).unwrap();
        let got = fs::metadata(to.join("tool")).unwrap();
        assert_eq!(got.mode() & 0o7777, mode, "{owner:?}");
        assert_eq!((got.uid(), got.gid()), (uid, gid), "{owner:?}");
    }
}

#[test]
fn a_file_that_is_nearly_all_hole_is_neither_sent_nor_written() {
    let fixture = Fixture::new();
    let path = fixture.path("from/sparse");
    let file = File::create(&path).unwrap();
    file.set_len(4 << 30).unwrap();
    file.write_all_at(b"middle", 3 << 30).unwrap();
    let stream = packed(&path).unwrap();
    assert!(stream.len() < 100_000, "{}", stream.len());
    let tally = unpacked(&stream, &fixture.path("to")).unwrap();
    assert!(tally.bytes < 100_000, "{tally:?}");
    let got = fs::metadata(fixture.path("to/sparse")).unwrap();
    assert_eq!(got.len(), 4 << 30);
    assert!(got.blocks() * 512 < 100_000, "{}", got.blocks());
    assert!(look(&fixture.path("to/sparse")) == look(&path));
}

#[test]
fn what_is_no_file_stays_behind_and_is_told() {
    let fixture = Fixture::new();
    fixture.write("from/tree/file", "x");
    let socket = fixture.path("from/tree/deep/socket");
    fs::create_dir(fixture.path("from/tree/deep")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let fifo = fixture.path("from/tree/fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let tally = fixture.copy("from/tree", "to").unwrap();
    assert_eq!((tally.files, tally.directories, tally.skipped), (1, 2, 2));
    let mut told: Vec<_> = tally
        .examples
        .iter()
        .map(|(path, what)| format!("{}: {what}", path.display()))
        .collect();
    told.sort();
    let to = fixture.path("to/tree");
    let expected = [
        format!("{}/deep/socket: a socket", to.display()),
        format!("{}/fifo: a FIFO", to.display()),
    ];
    assert_eq!(told, expected);
    for alone in [socket, fifo] {
        let error = packed(&alone).unwrap_err();
        assert!(
            error.to_string().ends_with("which cannot be copied"),
            "{error}"
        );
    }
}

#[test]
fn hard_links_become_files_of_their_own() {
    let fixture = Fixture::new();
    let one = fixture.write("from/tree/one", "same");
    fs::hard_link(&one, fixture.path("from/tree/two")).unwrap();
    fixture.copy("from/tree", "to").unwrap();
    let inode = |name| fs::metadata(fixture.path(name)).unwrap().ino();
    assert_ne!(inode("to/tree/one"), inode("to/tree/two"));
    assert_eq!(fixture.read("to/tree/two"), "same");
}

#[test]
fn a_tree_that_is_too_deep_is_refused_on_both_sides() {
    let fixture = Fixture::new();
    let deep = |count: usize| format!("from/{count}{}", "/d".repeat(count - 1));
    fs::create_dir_all(fixture.path(&deep(256))).unwrap();
    fs::create_dir_all(fixture.path(&deep(257))).unwrap();
    fixture.copy("from/256", "to").unwrap();
    let error = packed(&fixture.path("from/257")).unwrap_err();
    assert!(
        error.to_string().contains("more than 256 directories deep"),
        "{error}"
    );
}

#[test]
fn what_is_missing_is_said() {
    let fixture = Fixture::new();
    for path in ["from/none", "from/none/", "from/none/.", "none/at/all"] {
        let path = fixture.path(path);
        let error = packed(&path).unwrap_err().to_string();
        assert_eq!(error, format!("there is no {path:?} to copy"));
    }
}

#[test]
fn what_the_fuzzer_starts_from_is_sound() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/tree");
    let mut kinds = 0;
    for seed in fs::read_dir(seeds).unwrap() {
        let (fixture, path) = (Fixture::new(), seed.unwrap().path());
        let tally = unpacked(&fs::read(&path).unwrap(), &fixture.path("to"));
        assert!(tally.is_ok(), "{}: {tally:?}", path.display());
        kinds += 1;
    }
    assert!(kinds > 0);
}
