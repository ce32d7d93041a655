use crate::fixture::{Fixture, mixed, parts};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rekindle_store::file::{FileError, FileKind};
use rekindle_store::manifest::{Kind, MAX_SIZE, ManifestError};
use rekindle_store::snapshot::OpenError;
use rekindle_store::unit::ByteSize;
use rekindle_store::verify::VerifyError;
use rekindle_store::{Manifest, Snapshot};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

const FILES: [&str; 5] = [
    "manifest.json",
    "vmstate",
    "memory",
    "pages",
    "disks/rootfs",
];

/// Spoils one file of a fresh snapshot, and opens it.
fn opened(file: &str, spoil: impl FnOnce(&Path)) -> Result<Snapshot, OpenError> {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    spoil(&made.dir().join(file));
    let opened = fixture.store.snapshot(&made.id().to_string());
    assert_eq!(
        fixture.store.list().unwrap().len(),
        1,
        "{file}: it is still listed"
    );
    opened
}

fn names(error: &OpenError, file: &str) -> bool {
    error.to_string().contains(file)
}

#[test]
fn a_missing_file_is_named() {
    for file in FILES {
        let error = opened(file, |path| std::fs::remove_file(path).unwrap()).unwrap_err();
        assert!(
            matches!(&error, OpenError::File(missing) if missing.is_not_found()),
            "{error}"
        );
        assert!(names(&error, file), "{error}");
    }
}

#[test]
fn an_empty_or_truncated_or_grown_file_is_named() {
    for file in FILES {
        let len = |path: &Path| path.metadata().unwrap().len();
        let resize = |path: &Path, len| {
            std::fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(len)
                .unwrap()
        };
        let spoils: [&dyn Fn(&Path); 4] = [
            &|path| resize(path, 0),
            &|path| resize(path, len(path) - 1),
            &|path| resize(path, len(path) / 2),
            &|path| resize(path, len(path) + 1),
        ];
        for spoil in spoils {
            let error = opened(file, spoil).unwrap_err();
            let expected = match file {
                "manifest.json" => matches!(error, OpenError::Manifest { .. }),
                _ => matches!(error, OpenError::Size { .. }),
            };
            assert!(expected && names(&error, file), "{error}");
        }
    }
}

#[test]
fn a_symbolic_link_is_refused_even_if_it_leads_to_the_right_contents() {
    for file in FILES {
        let error = opened(file, |path| {
            let moved = path.with_extension("moved");
            std::fs::rename(path, &moved).unwrap();
            symlink(&moved, path).unwrap();
        });
        let error = error.unwrap_err();
        assert!(
            matches!(
                &error,
                OpenError::File(FileError::NotRegular {
                    found: FileKind::SymbolicLink,
                    ..
                })
            ),
            "{error}"
        );
    }
    let error = opened("disks", |path| {
        std::fs::rename(path, path.with_extension("moved")).unwrap();
        symlink(path.with_extension("moved"), path).unwrap();
    });
    assert!(matches!(
        error.unwrap_err(),
        OpenError::File(FileError::NotRegular { .. })
    ));
}

#[test]
fn a_device_a_fifo_or_a_directory_in_place_of_a_file_is_refused() {
    let device = mknodat(
        CWD,
        tempfile::tempdir().unwrap().path().join("zero"),
        FileType::CharacterDevice,
        Mode::RUSR,
        makedev(1, 5),
    );
    let mut kinds = vec![
        (FileType::Fifo, FileKind::Fifo),
        (FileType::Directory, FileKind::Directory),
    ];
    match device {
        Ok(()) => kinds.push((FileType::CharacterDevice, FileKind::Device)),
        Err(errno) => eprintln!("skipped device nodes: cannot make one: {errno}"),
    }
    for file in FILES {
        for (make, expected) in &kinds {
            let error = opened(file, |path| {
                std::fs::remove_file(path).unwrap();
                match make {
                    FileType::Directory => std::fs::create_dir(path).unwrap(),
                    _ => mknodat(CWD, path, *make, Mode::RUSR, makedev(1, 5)).unwrap(),
                }
            });
            let error = error.unwrap_err();
            assert!(
                matches!(&error, OpenError::File(FileError::NotRegular { found, .. }) if found == expected),
                "{error}"
            );
        }
    }
}

#[test]
fn a_snapshot_directory_that_is_a_link_is_refused() {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    let moved = fixture.store.root().path().join("moved");
    std::fs::rename(made.dir(), &moved).unwrap();
    symlink(&moved, made.dir()).unwrap();
    assert!(matches!(
        fixture.store.snapshot("base"),
        Err(OpenError::File(_))
    ));
    assert!(made.lease().is_err());
    assert!(fixture.store.remove(made.id()).is_err());
    assert!(moved.join("memory").exists());
}

fn flip(path: &Path, bit: u64) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

#[test]
fn a_flipped_bit_of_memory_is_found_at_its_place() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let memory = made.memory_path();
    // Page 30 is data, in the block that starts with page 16.
    flip(&memory, (30 * 4096 + 77) * 8);
    let error = fixture
        .store
        .snapshot(&made.id().to_string())
        .unwrap()
        .verify()
        .unwrap_err();
    assert!(
        matches!(&error, VerifyError::Block { path, offset } if *path == memory && offset.get() == 65536),
        "{error}"
    );
    flip(&memory, (30 * 4096 + 77) * 8);
    made.verify().unwrap();
    // Page 3 is a hole, in a block without data.
    flip(&memory, (3 * 4096 + 1) * 8);
    let error = made.verify().unwrap_err();
    assert!(
        matches!(&error, VerifyError::Page { page, .. } if page.get() == 3),
        "{error}"
    );
}

#[test]
fn a_flipped_bit_of_a_disk_is_found_by_verify() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let disk: PathBuf = made.dir().join("disks/rootfs");
    flip(&disk, 9);
    let error = made.verify().unwrap_err();
    assert!(
        matches!(&error, VerifyError::Open(OpenError::Damaged { path }) if *path == disk),
        "{error}"
    );
}

#[test]
fn any_flipped_bit_anywhere_is_found() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 100,
        ..ProptestConfig::default()
    });
    let found = runner.run(&any::<u64>(), |at| {
        for file in FILES {
            let path = made.dir().join(file);
            let bit = at % (path.metadata().unwrap().len() * 8);
            flip(&path, bit);
            let opened = fixture.store.snapshot(&made.id().to_string());
            // What is small is looked at on the way in.
            if matches!(file, "memory" | "disks/rootfs") {
                prop_assert!(opened.unwrap().verify().is_err(), "{} bit {}", file, bit);
            } else {
                prop_assert!(opened.is_err(), "{} bit {}", file, bit);
            }
            flip(&path, bit);
        }
        Ok(())
    });
    found.unwrap();
    fixture
        .store
        .snapshot(&made.id().to_string())
        .unwrap()
        .verify()
        .unwrap();
}

fn manifest() -> (Manifest, String) {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    let text = std::fs::read_to_string(made.dir().join("manifest.json")).unwrap();
    (made.manifest().clone(), text)
}

/// Changes the text of a manifest and seals it again, as a stranger would.
fn forged(text: &str, from: &str, to: &str) -> Result<Manifest, ManifestError> {
    assert!(text.contains(from), "{from}");
    Manifest::parse(resealed(&text.replacen(from, to, 1)).as_bytes())
}

fn resealed(text: &str) -> String {
    let body = text.rsplit_once(",\n  \"checksum\"").unwrap().0;
    let checksum = blake3::hash(body.as_bytes()).to_hex();
    format!("{body},\n  \"checksum\": \"{checksum}\"\n}}\n")
}

#[test]
fn a_snapshot_of_version_1_is_read_and_verified_by_the_digest_of_its_whole_disk() {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    let path = made.dir().join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let disk = made.dir().join("disks/rootfs");
    let (before, digest) = text.split_once("\"data_blake3\": \"").unwrap();
    let whole = blake3::hash(&std::fs::read(&disk).unwrap()).to_hex();
    let old = format!("{before}\"blake3\": \"{whole}{}", &digest[64..])
        .replace("\"format_version\": 2", "\"format_version\": 1");
    std::fs::write(&path, resealed(&old)).unwrap();

    fixture.store.snapshot("base").unwrap().verify().unwrap();
    std::fs::write(&disk, "the contents of a dusk").unwrap();
    let damaged = fixture.store.snapshot("base").unwrap().verify();
    assert!(matches!(damaged, Err(VerifyError::Open(OpenError::Damaged { path })) if path == disk));
}

#[test]
fn a_manifest_from_the_future_names_both_versions() {
    let (_, text) = manifest();
    let error = forged(&text, "\"format_version\": 2", "\"format_version\": 7").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the manifest has format version 7, and this program reads up to 2"
    );
    // However it is sealed, and whatever else it says.
    let error = Manifest::parse(b"{\"format_version\": 3, \"new\": []}").unwrap_err();
    assert!(matches!(error, ManifestError::Future { found: 3 }));
    assert!(forged(&text, "\"format_version\": 2", "\"format_version\": 0").is_err());
}

#[test]
fn an_edited_manifest_is_refused() {
    let (_, text) = manifest();
    assert!(matches!(
        Manifest::parse(text.replace("tap0", "tap1").as_bytes()),
        Err(ManifestError::Checksum)
    ));
    assert!(matches!(
        Manifest::parse(b"{}"),
        Err(ManifestError::NoChecksum)
    ));
    assert!(matches!(Manifest::parse(b""), Err(ManifestError::Empty)));
    let large = vec![b' '; usize::try_from(MAX_SIZE.get()).unwrap() + 1];
    assert!(matches!(
        Manifest::parse(&large),
        Err(ManifestError::TooLarge)
    ));
}

#[test]
fn paths_that_climb_are_refused() {
    let (_, text) = manifest();
    for (from, to) in [
        ("\"disks/rootfs\"", "\"../../etc/shadow\""),
        ("\"disks/rootfs\"", "\"/etc/shadow\""),
        ("\"disks/rootfs\"", "\"disks/../memory\""),
        ("\"disks/rootfs\"", "\"memory\""),
        ("\"disks/rootfs\"", "\"disks/ro\\u0000ot\""),
        ("\"path\": \"disk\"", "\"path\": \"../disk\""),
        ("\"path\": \"disk\"", "\"path\": \"\""),
        ("\"v.sock\"", "\"/run/v.sock\""),
        ("\"tap0\"", "\"../tap0\""),
        ("\"base\"", "\"../base\""),
        ("\"/boot/vmlinux\"", "\"/boot/../vmlinux\""),
    ] {
        assert!(forged(&text, from, to).is_err(), "{from} -> {to}");
    }
    assert!(forged(&text, "\"tap0\"", "\"tap1\"").is_ok());
}

#[test]
fn huge_and_negative_numbers_are_refused() {
    let (_, text) = manifest();
    let size = "\"size\": 1048576";
    for (from, to) in [
        (size, "\"size\": 18446744073709551615"),
        (size, "\"size\": 18446744073709551616"),
        (size, "\"size\": 1152921504606846976"),
        (size, "\"size\": -1"),
        (size, "\"size\": 1e400"),
        (size, "\"size\": 0"),
        ("\"vcpus\": 1", "\"vcpus\": 64"),
        ("\"vcpus\": 1", "\"vcpus\": 256"),
        ("\"mem_mib\": 1", "\"mem_mib\": 4294967295"),
        ("\"mem_mib\": 1", "\"mem_mib\": 4294967296"),
        ("\"page_size\": 4096", "\"page_size\": 0"),
        (
            "\"regions\": []",
            "\"regions\": [{\"offset\": 18446744073709551615, \"size\": 18446744073709551615}]",
        ),
        (
            "\"regions\": []",
            "\"regions\": [{\"offset\": 0, \"size\": 4096}]",
        ),
        (
            "\"regions\": []",
            "\"regions\": [{\"offset\": 0, \"size\": 0}, {\"offset\": 0, \"size\": 1048576}]",
        ),
        ("\"size\": 17", "\"size\": 0"),
        ("\"size\": 17", "\"size\": 67108865"),
    ] {
        assert!(forged(&text, from, to).is_err(), "{from} -> {to}");
    }
    assert!(
        forged(
            &text,
            "\"regions\": []",
            "\"regions\": [{\"offset\": 0, \"size\": 1048576}]"
        )
        .is_ok()
    );
}

#[test]
fn many_devices_and_deep_nesting_are_refused() {
    let (manifest, text) = manifest();
    let mut many = manifest;
    many.devices.interfaces = (0..65)
        .map(|n| {
            let mut interface = many.devices.interfaces[0].clone();
            interface.id = format!("eth{n}").parse().unwrap();
            interface
        })
        .collect();
    assert!(matches!(
        many.to_bytes(),
        Err(ManifestError::Invalid {
            field: "devices",
            ..
        })
    ));
    let deep = format!(
        "\"regions\": {}{}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert!(matches!(
        forged(&text, "\"regions\": []", &deep),
        Err(ManifestError::Json(_))
    ));
}

#[test]
fn a_field_of_a_later_program_of_this_version_is_passed_over() {
    let (manifest, text) = manifest();
    assert_eq!(
        forged(&text, "\"regions\": []", "\"regions\": [], \"later\": {}").unwrap(),
        manifest
    );
    assert_eq!(manifest.memory.size, ByteSize::new(1 << 20));
}

#[test]
fn a_manifest_of_another_snapshot_is_refused() {
    let fixture = Fixture::new();
    let (first, second) = (fixture.full(None, &mixed()), fixture.full(None, &mixed()));
    std::fs::copy(
        first.dir().join("manifest.json"),
        second.dir().join("manifest.json"),
    )
    .unwrap();
    let error = fixture
        .store
        .snapshot(&second.id().to_string())
        .unwrap_err();
    assert!(
        matches!(&error, OpenError::OtherId { found, .. } if *found == first.id()),
        "{error}"
    );
}

#[test]
fn pages_of_another_kind_than_the_manifest_are_refused() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let diff = fixture.diff(base.id(), &mixed());
    let mut manifest = diff.manifest().clone();
    manifest.kind = parts(Kind::Full).kind;
    std::fs::write(
        diff.dir().join("manifest.json"),
        manifest.to_bytes().unwrap(),
    )
    .unwrap();
    let error = fixture.store.snapshot(&diff.id().to_string()).unwrap_err();
    assert!(matches!(error, OpenError::OtherMemory { .. }), "{error}");
}

proptest! {
    #[test]
    fn random_bytes_are_no_manifest(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Manifest::parse(&bytes).is_err());
    }

    #[test]
    fn random_json_is_no_manifest(text in "[\\[\\]{}\":,a-z0-9. -]{0,200}") {
        prop_assert!(Manifest::parse(text.as_bytes()).is_err());
        let sealed = format!("{text},\n  \"checksum\": \"{}\"\n}}\n", blake3::hash(text.as_bytes()).to_hex());
        prop_assert!(Manifest::parse(sealed.as_bytes()).is_err());
    }
}
