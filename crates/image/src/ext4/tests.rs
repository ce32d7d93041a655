use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use ext4_view::{Ext4, FileType};
use tempfile::NamedTempFile;

use super::*;
use crate::tree::{Device, Time};

struct Scene {
    tree: Tree,
    spool: Spool,
}

impl Scene {
    fn new() -> Self {
        Self {
            tree: Tree::new(),
            spool: Spool::new(&std::env::temp_dir()).unwrap(),
        }
    }

    fn put(&mut self, path: &str, body: Body, meta: Meta) {
        let inode = Inode { body, meta };
        self.tree.put(path.as_bytes(), inode, Layer(1)).unwrap();
    }

    fn file(&mut self, path: &str, contents: &[u8]) {
        let contents = self.spool.add(&mut &*contents).unwrap();
        self.put(path, Body::File(contents), Meta::root(0o644));
    }

    fn write(&self, min_size: u64) -> NamedTempFile {
        let image = NamedTempFile::new().unwrap();
        let options = Options { min_size };
        let written = write(self.tree.clone(), &self.spool, image.as_file(), options).unwrap();
        assert_eq!(written.size, image.as_file().metadata().unwrap().len());
        check(image.path());
        image
    }
}

/// Has e2fsprogs look for anything that is wrong.
fn check(image: &Path) {
    let mut e2fsck = Command::new("e2fsck");
    e2fsck.arg("-fn").arg(image).env("PATH", "/usr/sbin:/sbin");
    let output = e2fsck.output().expect("e2fsck of the package e2fsprogs");
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{words}");
}

fn debugfs(image: &Path, request: &str) -> String {
    let mut debugfs = Command::new("debugfs");
    debugfs
        .args(["-R", request])
        .arg(image)
        .env("PATH", "/usr/sbin:/sbin");
    let output = debugfs.output().expect("debugfs of the package e2fsprogs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn open(image: &NamedTempFile) -> Ext4 {
    Ext4::load_from_path(image.path()).unwrap()
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; bytes];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn an_empty_tree_is_a_whole_file_system() {
    let image = Scene::new().write(0);
    let names = open(&image).read_dir("/").unwrap();
    let mut names = names.map(|e| e.unwrap().file_name().display().to_string());
    assert!(names.any(|name| name == "lost+found"));
}

#[test]
fn a_second_reader_finds_every_kind_of_file_as_it_was_put() {
    let mut scene = Scene::new();
    let mut meta = Meta::root(0o6751);
    meta.uid = 70_000;
    meta.gid = 3_000_000_000;
    meta.mtime = Time {
        seconds: 5_000_000_000,
        nanoseconds: 123_456_789,
    };
    let big = noise(9_000_001, 1);
    scene.file("bin/big", &big);
    scene.file("empty", b"");
    let program = scene.spool.add(&mut &b"#!"[..]).unwrap();
    scene.put("bin/program", Body::File(program), meta);
    let long = format!("/{}", "x/".repeat(60));
    scene.put(
        "short",
        Body::Symlink(b"bin/big".to_vec()),
        Meta::root(0o777),
    );
    scene.put(
        "long",
        Body::Symlink(long.clone().into_bytes()),
        Meta::root(0o777),
    );
    let (old, new) = (
        Device { major: 5, minor: 1 },
        Device {
            major: 259,
            minor: 70_000,
        },
    );
    scene.put("dev/console", Body::Character(old), Meta::root(0o600));
    scene.put("dev/disk", Body::Block(new), Meta::root(0o660));
    scene.put("fifo", Body::Fifo, Meta::root(0o600));
    scene.tree.link(b"linked", b"bin/big", Layer(1)).unwrap();

    let image = scene.write(0);
    let found = open(&image);
    assert_eq!(found.read("/bin/big").unwrap(), big);
    assert_eq!(found.read("/linked").unwrap(), big);
    assert_eq!(found.read("/short").unwrap(), big);
    assert_eq!(found.read("/empty").unwrap(), b"");
    assert_eq!(
        found.read_link("/long").unwrap().display().to_string(),
        long
    );
    let program = found.symlink_metadata("/bin/program").unwrap();
    assert_eq!(
        (program.mode() & 0o7777, program.uid(), program.gid()),
        (0o6751, 70_000, 3_000_000_000)
    );
    let kind = |path: &str| found.symlink_metadata(path).unwrap().file_type();
    assert_eq!(kind("/dev/console"), FileType::CharacterDevice);
    assert_eq!(kind("/dev/disk"), FileType::BlockDevice);
    assert_eq!(kind("/fifo"), FileType::Fifo);
    let stat = debugfs(image.path(), "stat /bin/program");
    // 5,000,000,000 wraps once: the lower 32 bits, the epoch and the nanoseconds.
    assert!(stat.contains("mtime: 0x2a05f200:1d6f3455"), "{stat}");
    let stat = debugfs(image.path(), "stat /linked");
    assert!(stat.contains("Links: 2"), "{stat}");
    let stat = debugfs(image.path(), "stat /dev/disk");
    assert!(
        stat.contains("(New-style) Device major/minor number: 259:70000"),
        "{stat}"
    );
}

#[test]
fn a_file_with_thousands_of_holes_keeps_them() {
    let mut scene = Scene::new();
    let mut bytes = vec![0; 24 << 20];
    for at in (0..bytes.len()).step_by(2 * BLOCK) {
        bytes[at + 7] = 1;
    }
    scene.file("holes", &bytes);
    scene.file("sparse-end", &[&[1; 10][..], &vec![0; 1 << 20]].concat());
    let image = scene.write(0);
    assert_eq!(open(&image).read("/holes").unwrap(), bytes);
    let blocks = image.as_file().metadata().unwrap().blocks();
    assert!(blocks * 512 < 16 << 20, "{blocks}");
    assert!(debugfs(image.path(), "stat /sparse-end").contains("Blockcount: 8"));
}

#[test]
fn extended_attributes_are_in_the_inode_or_in_a_block() {
    let mut scene = Scene::new();
    let (small, large) = (b"\x01\0\0\x02\0\x20\0\0".to_vec(), noise(2000, 2));
    let mut meta = Meta::root(0o755);
    meta.xattrs = BTreeMap::from([(b"security.capability".to_vec(), small.clone())]);
    scene.put("ping", Body::Fifo, meta.clone());
    meta.xattrs.insert(b"user.large".to_vec(), large.clone());
    meta.xattrs.insert(b"user.a".to_vec(), Vec::new());
    scene.put("both", Body::Fifo, meta);
    let image = scene.write(0);
    for (path, name, value) in [
        ("/ping", "security.capability", &small),
        ("/both", "security.capability", &small),
        ("/both", "user.large", &large),
    ] {
        let out = NamedTempFile::new().unwrap();
        let request = format!("ea_get -f {} {path} {name}", out.path().display());
        debugfs(image.path(), &request);
        assert_eq!(&std::fs::read(out.path()).unwrap(), value, "{path} {name}");
    }
    assert!(debugfs(image.path(), "ea_list /both").contains("user.a"));
}

#[test]
fn ten_thousand_files_in_one_directory_are_all_there() {
    let mut scene = Scene::new();
    for n in 0..10_000 {
        scene.file(
            &format!("many/file-with-a-rather-long-name-{n}"),
            format!("{n}").as_bytes(),
        );
    }
    let image = scene.write(0);
    let found = open(&image);
    assert_eq!(found.read_dir("/many").unwrap().count(), 10_002);
    for n in (0..10_000).step_by(97) {
        let path = format!("/many/file-with-a-rather-long-name-{n}");
        assert_eq!(found.read_to_string(path.as_str()).unwrap(), format!("{n}"));
    }
}

#[test]
fn a_file_goes_around_the_copies_of_the_superblock() {
    let mut scene = Scene::new();
    // Three groups of 128 MiB: two copies are in its way.
    let bytes = noise(300 << 20, 3);
    scene.file("large", &bytes);
    let image = scene.write(3 << 30);
    assert!(open(&image).read("/large").unwrap() == bytes);
    let backup = debugfs(image.path(), "show_super_stats -h");
    assert!(
        backup.contains("Block count:              786432"),
        "{backup}"
    );
    let mut e2fsck = Command::new("e2fsck");
    e2fsck
        .args(["-fn", "-b", "32768", "-B", "4096"])
        .arg(image.path());
    assert!(
        e2fsck
            .env("PATH", "/usr/sbin:/sbin")
            .output()
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn the_same_tree_gives_the_same_bytes_and_another_one_another_uuid() {
    let scene = |last: &str| {
        let mut scene = Scene::new();
        scene.file("etc/hostname", b"rekindle\n");
        scene.file("etc/last", last.as_bytes());
        scene
    };
    let bytes = |scene: Scene| std::fs::read(scene.write(0).path()).unwrap();
    let (one, two, other) = (bytes(scene("a")), bytes(scene("a")), bytes(scene("b")));
    assert!(one == two);
    assert_ne!(one[1024 + 104..1024 + 120], other[1024 + 104..1024 + 120]);
}

#[test]
fn many_empty_files_get_as_many_groups_as_their_inodes_need() {
    let mut scene = Scene::new();
    for n in 0..70_000 {
        scene.put(&format!("{}/{n}", n % 300), Body::Fifo, Meta::root(0o600));
    }
    scene.write(0);
}

#[test]
fn deep_directories_have_their_parents() {
    let mut scene = Scene::new();
    scene.file(&format!("{}end", "d/".repeat(1000)), b"deep");
    let image = scene.write(0);
    assert_eq!(
        debugfs(image.path(), "stat /d/d/d/..").lines().next(),
        debugfs(image.path(), "stat /d/d").lines().next()
    );
}
