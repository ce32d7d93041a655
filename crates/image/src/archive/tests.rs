use super::*;
use crate::tree::{InodeId, ROOT};

/// An archive, made entry by entry.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// The name goes in as it is: the builder would refuse a hostile one.
    fn entry(mut self, kind: EntryType, name: &str, link: &str, contents: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(1000);
        header.set_gid(2_000_000);
        header.set_mtime(1_700_000_000);
        header.set_size(u64::try_from(contents.len()).unwrap());
        header.set_cksum();
        self.0.append(&header, contents).unwrap();
        self
    }

    fn file(self, name: &str, contents: &str) -> Self {
        self.entry(EntryType::Regular, name, "", contents.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    fn pax(mut self, extensions: &[(&str, &[u8])]) -> Self {
        self.0
            .append_pax_extensions(extensions.iter().copied())
            .unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn layers(limits: Limits) -> Layers {
    Layers::new(Spool::new(&std::env::temp_dir()).unwrap(), limits)
}

fn applied(archives: Vec<Tar>) -> Layers {
    let mut layers = layers(Limits::default());
    for archive in archives {
        layers.apply(&*archive.bytes()).unwrap();
    }
    layers
}

fn refusal(archive: Tar) -> ArchiveError {
    let mut layers = layers(Limits::default());
    layers.apply(&*archive.bytes()).unwrap_err()
}

impl Layers {
    fn text(&self, path: &str) -> Option<String> {
        let Body::File(contents) = &self.tree.inode(self.tree.find(path.as_bytes())?).body else {
            return None;
        };
        Some(String::from_utf8(self.spool.read(contents).unwrap()).unwrap())
    }

    /// All paths, sorted.
    fn paths(&self) -> Vec<String> {
        fn visit(tree: &Tree, at: InodeId, path: &str, paths: &mut Vec<String>) {
            for (name, id) in tree.names(at) {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                paths.push(path.clone());
                visit(tree, id, &path, paths);
            }
        }
        let mut paths = Vec::new();
        visit(&self.tree, ROOT, "", &mut paths);
        paths
    }
}

#[test]
fn what_an_entry_says_is_kept() {
    let layers = applied(vec![
        Tar::new()
            .pax(&[
                ("mtime", b"1700000000.25"),
                ("SCHILY.xattr.security.capability", b"\x01\0\xff"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.system.posix_acl_access", b"x"),
            ])
            .file("./usr/bin/ping", "program"),
    ]);
    assert_eq!(layers.paths(), ["/usr", "/usr/bin", "/usr/bin/ping"]);
    let meta = &layers
        .tree
        .inode(layers.tree.find(b"usr/bin/ping").unwrap())
        .meta;
    assert_eq!((meta.mode, meta.uid, meta.gid), (0o640, 1000, 2_000_000));
    assert_eq!(
        meta.mtime,
        Time {
            seconds: 1_700_000_000,
            nanoseconds: 250_000_000
        }
    );
    let names = meta.xattrs.keys().map(|name| String::from_utf8_lossy(name));
    assert_eq!(names.collect::<Vec<_>>(), ["security.capability"]);
    assert_eq!(meta.xattrs[&b"security.capability"[..]], b"\x01\0\xff");
    let usr = &layers.tree.inode(layers.tree.find(b"usr").unwrap()).meta;
    assert_eq!(usr, &Meta::root(0o755), "a directory that nobody described");
}

#[test]
fn later_layers_replace_and_white_out_what_is_below() {
    let base = Tar::new()
        .directory("a")
        .file("a/kept", "1")
        .file("a/replaced", "1")
        .file("a/gone", "1")
        .directory("b")
        .file("b/old", "1")
        .directory("c")
        .file("c/x/y", "1")
        .file("d", "1");
    let top = Tar::new()
        .file("a/replaced", "2")
        .file("a/.wh.gone", "")
        .file("b/new", "2")
        .file("b/.wh..wh..opq", "")
        .file(".wh.c", "")
        .file("c/x/z", "2")
        .file(".wh..wh.plnk", "")
        .directory("d");
    let layers = applied(vec![base, top]);
    let expected = [
        "/a",
        "/a/kept",
        "/a/replaced",
        "/b",
        "/b/new",
        "/c",
        "/c/x",
        "/c/x/z",
        "/d",
    ];
    assert_eq!(layers.paths(), expected);
    assert_eq!(layers.text("a/replaced").as_deref(), Some("2"));
}

#[test]
fn a_whiteout_of_what_the_same_layer_brings_means_the_layers_below() {
    for archive in [
        Tar::new().file("f", "2").file(".wh.f", ""),
        Tar::new().file(".wh.f", "").file("f", "2"),
    ] {
        let layers = applied(vec![Tar::new().file("f", "1"), archive]);
        assert_eq!(layers.text("f").as_deref(), Some("2"));
    }
}

#[test]
fn a_second_name_is_the_same_file_until_a_layer_replaces_one() {
    let layers = applied(vec![
        Tar::new().file("one", "1").hard_link("two", "one"),
        Tar::new().file("one", "2"),
    ]);
    assert_eq!(layers.text("one").as_deref(), Some("2"));
    assert_eq!(layers.text("two").as_deref(), Some("1"));
}

#[test]
fn a_name_through_a_symbolic_link_ends_where_the_guest_would_find_it() {
    let layers = applied(vec![
        Tar::new()
            .directory("usr/lib")
            .symlink("lib", "usr/lib")
            .symlink("out", "../../../../..")
            .symlink("etc", "/config")
            .directory("config"),
        Tar::new()
            .file("lib/a", "1")
            .file("out/b", "2")
            .file("etc/c", "3")
            .file("/d", "4"),
    ]);
    assert_eq!(layers.text("usr/lib/a").as_deref(), Some("1"));
    assert_eq!(layers.text("b").as_deref(), Some("2"));
    assert_eq!(layers.text("config/c").as_deref(), Some("3"));
    assert_eq!(layers.text("d").as_deref(), Some("4"));
}

#[test]
fn names_that_climb_and_links_that_lead_out_are_refused() {
    let refused = |archive: Tar| match refusal(archive) {
        ArchiveError::Refused { source, .. } => source,
        other => panic!("{other}"),
    };
    assert_eq!(
        refused(Tar::new().file("../etc/passwd", "")),
        TreeError::Climbs
    );
    assert_eq!(refused(Tar::new().file("a/../../b", "")), TreeError::Climbs);
    assert_eq!(
        refused(Tar::new().hard_link("a", "../../etc/passwd")),
        TreeError::Climbs
    );
    assert_eq!(
        refused(Tar::new().hard_link("a", "/etc/passwd")),
        TreeError::Missing(b"/etc/passwd".to_vec())
    );
    assert_eq!(
        refused(Tar::new().directory("d").hard_link("a", "d")),
        TreeError::LinkToDirectory(b"d".to_vec())
    );
    let circle = Tar::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", "");
    assert_eq!(refused(circle), TreeError::TooManyLinks);
    let through = Tar::new().file("f", "").file("f/x", "");
    assert_eq!(refused(through), TreeError::NotADirectory(b"f".to_vec()));
    assert_eq!(refused(Tar::new().file(".", "")), TreeError::ReplacesRoot);
    assert_eq!(refused(Tar::new().file("a/.wh...", "")), TreeError::BadName);
    assert_eq!(refused(Tar::new().symlink("a", "")), TreeError::BadTarget);
    let deep = format!("{}x", "d/".repeat(2100));
    let deep = Tar::new().pax(&[("path", deep.as_bytes())]).file("x", "");
    assert_eq!(refused(deep), TreeError::TooLong);
}

#[test]
fn what_is_too_much_is_refused_before_it_is_read() {
    let mut small = layers(Limits {
        bytes: 10,
        entries: 3,
    });
    let error = small
        .apply(&*Tar::new().file("f", "12345678901").bytes())
        .unwrap_err();
    assert!(matches!(error, ArchiveError::TooLarge { limit: 10 }));
    let many = Tar::new()
        .file("a", "")
        .file("b", "")
        .file("c", "")
        .file("d", "");
    let error = layers(Limits {
        bytes: 10,
        entries: 3,
    })
    .apply(&*many.bytes())
    .unwrap_err();
    assert!(matches!(error, ArchiveError::TooMany { limit: 3 }));
    let value = vec![b'x'; 2 << 20];
    let error = refusal(Tar::new().pax(&[("comment", &value)]).file("a", ""));
    assert!(
        format!("{error:?}").contains("bytes of headers"),
        "{error:?}"
    );
    let value = vec![b'x'; 5000];
    let error = refusal(
        Tar::new()
            .pax(&[("SCHILY.xattr.user.a", &value)])
            .file("a", ""),
    );
    assert!(matches!(error, ArchiveError::Xattrs { .. }));
}

#[test]
fn an_archive_that_was_cut_off_or_is_none_is_an_error() {
    let whole = Tar::new()
        .file("a", &"x".repeat(2000))
        .file("b", "y")
        .bytes();
    for cut in [100, 512, 1000, 2000, 2600] {
        assert!(
            layers(Limits::default()).apply(&whole[..cut]).is_err(),
            "{cut}"
        );
    }
    let error = layers(Limits::default())
        .apply(&b"no archive at all".repeat(100)[..])
        .unwrap_err();
    assert!(
        matches!(error, ArchiveError::Read { entries: 0, .. }),
        "{error}"
    );
    let kind = Tar::new().entry(EntryType::new(b'M'), "a", "", b"");
    assert!(matches!(
        refusal(kind),
        ArchiveError::Kind { kind: 'M', .. }
    ));
}

#[test]
fn holes_are_read_in_the_posix_form() {
    let mut data = b"2\n0\n3\n10000\n4\n".to_vec();
    data.resize(512, 0);
    data.extend_from_slice(b"abcdefg");
    let said: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"dir/real"),
        ("GNU.sparse.realsize", b"10010"),
    ];
    let archive =
        Tar::new()
            .pax(&said)
            .entry(EntryType::Regular, "GNUSparseFile.1/real", "", &data);
    let layers = applied(vec![archive]);
    let text = layers.text("dir/real").unwrap();
    assert_eq!(
        (text.len(), &text[..4], &text[9999..10005]),
        (10_010, "abc\0", "\0defg\0")
    );
    let archive = Tar::new().pax(&said[..3]).file("x", "");
    assert!(format!("{:?}", refusal(archive)).contains("unknown form"));
    let mut hostile = b"1\n5000\n99999999999\n".to_vec();
    hostile.resize(512, 0);
    let archive = Tar::new()
        .pax(&said)
        .entry(EntryType::Regular, "x", "", &hostile);
    assert!(format!("{:?}", refusal(archive)).contains("beyond its end"));
}
