use crate::fixture::{
    Fixture, PAGES, Written, contents, data_pages, fill, given_data, mixed, parts,
};
use rekindle_store::file::FileError;
use rekindle_store::manifest::field::DeviceId;
use rekindle_store::manifest::{Backing, BackingParts, Kind, ManifestError};
use rekindle_store::names::NameError;
use rekindle_store::pages::{PageKind, PagesError};
use rekindle_store::publish::{BeginError, PublishError, Step};
use rekindle_store::snapshot::OpenError;
use rekindle_store::unit::{ByteSize, PageCount, PageNumber, PageRange};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

#[test]
fn a_snapshot_says_what_it_was_told_and_verifies() {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    let found = fixture.store.snapshot("base").unwrap();
    assert_eq!(found.id(), made.id());
    assert_eq!(found.manifest(), made.manifest());
    assert_eq!(
        fixture.store.snapshot(&made.id().to_string()).unwrap().id(),
        made.id()
    );
    let manifest = found.manifest();
    assert_eq!(manifest.name.as_ref().unwrap().as_str(), "base");
    assert_eq!(manifest.kind, Kind::Full);
    assert_eq!(manifest.machine, parts(Kind::Full).machine);
    assert_eq!(
        manifest.devices.interfaces,
        parts(Kind::Full).devices.interfaces
    );
    assert_eq!(manifest.notes.as_str(), "two\nlines");
    assert!(
        matches!(&manifest.devices.drives[0].backing, Backing::Layer { file, .. } if file.as_str() == "disks/rootfs")
    );
    found.verify().unwrap();
    assert_eq!(
        found.dir(),
        fixture.store.root().snapshots().join(made.id().to_string())
    );
    assert!(found.vmstate_path().is_file() && found.memory_path().is_file());
}

#[test]
fn the_manifest_is_json_and_its_digests_are_those_of_b3sum() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let bytes = std::fs::read(made.dir().join("manifest.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["format_version"], 2);
    assert_eq!(json["kind"], "full");
    assert_eq!(json["id"], made.id().to_string());
    for file in ["vmstate", "memory", "pages"] {
        let contents = std::fs::read(made.dir().join(file)).unwrap();
        assert_eq!(json["files"][file]["size"], contents.len());
        assert_eq!(
            json["files"][file]["blake3"],
            blake3::hash(&contents).to_hex().as_str(),
            "{file}"
        );
    }
    assert_eq!(
        json["devices"]["drives"][0]["backing"]["file"],
        "disks/rootfs"
    );
}

#[test]
fn files_are_their_owners_alone() {
    let fixture = Fixture::new();
    let draft = fixture.draft(None, &mixed());
    std::fs::set_permissions(draft.memory_path(), PermissionsExt::from_mode(0o666)).unwrap();
    let made = draft.publish(parts(Kind::Full)).unwrap();
    for entry in fixture.entries() {
        let path = fixture.store.root().path().join(entry);
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(
            path.metadata().unwrap().mode() & 0o777,
            wanted,
            "{}",
            path.display()
        );
    }
    made.verify().unwrap();
}

#[test]
fn in_a_full_both_holes_and_zeros_are_zero_and_become_holes() {
    let fixture = Fixture::new();
    let memory = mixed();
    let made = fixture.full(None, &memory);
    for (page, written) in (0..).zip(&memory) {
        let expected = if matches!(written, Written::Data(_)) {
            PageKind::Data
        } else {
            PageKind::Zero
        };
        assert_eq!(made.pages().kind(PageNumber::new(page)), Some(expected));
    }
    assert_eq!(data_pages(&made.memory_path()), given_data(&memory));
    let expected: Vec<u8> = memory
        .iter()
        .flat_map(|&written| contents(written))
        .collect();
    assert!(
        std::fs::read(made.memory_path()).unwrap() == expected,
        "the memory reads as it was written"
    );
}

#[test]
fn in_a_diff_a_hole_is_unchanged_and_zeros_are_zero() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let mut memory = vec![Written::Nothing; PAGES];
    memory[3] = Written::Zeros;
    memory[100..116].fill(Written::Zeros);
    memory[5] = Written::Data(7);
    memory[21] = Written::Data(0);
    let mut parts = parts(Kind::Diff { parent: base.id() });
    // A balloon took these: page 5 was written again since, the others are zero.
    parts.removed = vec![PageRange {
        first: PageNumber::new(5),
        count: PageCount::new(3),
    }];
    let made = fixture.draft(None, &memory).publish(parts).unwrap();
    for page in 0..PAGES as u64 {
        let expected = match page {
            3 | 6 | 7 | 100..116 => PageKind::Zero,
            5 | 21 => PageKind::Data,
            _ => PageKind::Unchanged,
        };
        assert_eq!(
            made.pages().kind(PageNumber::new(page)),
            Some(expected),
            "page {page}"
        );
    }
    // A run of zeros became a hole, a single page of them was not worth one.
    assert_eq!(data_pages(&made.memory_path()), [3, 5, 21]);
    made.verify().unwrap();
}

#[test]
fn a_removed_page_beyond_the_memory_is_refused() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let before = fixture.entries();
    for first in [PAGES as u64, u64::MAX - 1] {
        let mut parts = parts(Kind::Diff { parent: base.id() });
        parts.removed = vec![PageRange {
            first: PageNumber::new(first),
            count: PageCount::new(2),
        }];
        let error = fixture.draft(None, &mixed()).publish(parts).unwrap_err();
        assert!(
            matches!(
                &error,
                PublishError::Pages {
                    source: PagesError::Header {
                        field: "removed page",
                        ..
                    },
                    ..
                }
            ),
            "{error:?}"
        );
    }
    assert_eq!(fixture.entries(), before);
}

#[test]
fn a_dropped_draft_leaves_nothing() {
    let fixture = Fixture::new();
    let draft = fixture.draft(Some("base"), &mixed());
    assert!(
        fixture
            .entries()
            .iter()
            .any(|path| path.ends_with("names/base"))
    );
    drop(draft);
    assert_eq!(fixture.entries(), [""; 0]);
}

#[test]
fn a_name_has_one_owner_from_the_start() {
    let fixture = Fixture::new();
    let draft = fixture.draft(Some("base"), &mixed());
    let before = fixture.entries();
    let error = fixture
        .store
        .begin(Some("base".parse().unwrap()))
        .unwrap_err();
    assert!(
        matches!(&error, BeginError::Name(NameError::Reserved { owner, .. }) if *owner == draft.id()),
        "{error}"
    );
    assert!(matches!(
        fixture.store.snapshot("base"),
        Err(OpenError::Building { .. })
    ));
    assert_eq!(fixture.entries(), before);
    let made = draft.publish(parts(Kind::Full)).unwrap();
    let error = fixture
        .store
        .begin(Some("base".parse().unwrap()))
        .unwrap_err();
    assert!(
        matches!(&error, BeginError::Name(NameError::Taken { owner, .. }) if *owner == made.id()),
        "{error}"
    );
    assert_eq!(
        error.to_string(),
        format!("the name base belongs to snapshot {}", made.id())
    );
}

#[test]
fn of_many_that_want_a_name_at_once_one_gets_it() {
    let fixture = Fixture::new();
    let drafts: Vec<_> = std::thread::scope(|scope| {
        let begin = || fixture.store.begin(Some("base".parse().unwrap()));
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(begin)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(drafts.iter().filter(|draft| draft.is_ok()).count(), 1);
    drop(drafts);
    assert_eq!(fixture.entries(), [""; 0]);
}

#[test]
fn what_stands_in_the_way_of_a_name_is_not_removed() {
    let fixture = Fixture::new();
    std::fs::write(fixture.store.root().names().join("base"), "mine").unwrap();
    let error = fixture
        .store
        .begin(Some("base".parse().unwrap()))
        .unwrap_err();
    assert!(
        matches!(error, BeginError::Name(NameError::Foreign { .. })),
        "{error}"
    );
    assert_eq!(fixture.entries().len(), 1);
}

#[test]
fn steps_come_once_and_in_order() {
    let fixture = Fixture::new();
    let mut steps = Vec::new();
    fixture
        .draft(None, &mixed())
        .publish_with(parts(Kind::Full), |step| steps.push(step))
        .unwrap();
    assert_eq!(steps, Step::ALL);
}

/// Publishes a draft that was spoiled, and returns why that failed; everything else is as it was.
fn refused(
    spoil: impl FnOnce(&rekindle_store::Draft, &mut rekindle_store::ManifestParts),
) -> PublishError {
    let fixture = Fixture::new();
    fixture.full(Some("other"), &mixed());
    let before = fixture.entries();
    let draft = fixture.store.begin(Some("base".parse().unwrap())).unwrap();
    fill(&draft, &mixed());
    let mut parts = parts(Kind::Full);
    spoil(&draft, &mut parts);
    let error = draft.publish(parts).unwrap_err();
    assert_eq!(fixture.entries(), before, "{error}");
    error
}

#[test]
fn a_draft_without_its_files_is_refused() {
    let missing = |error: &PublishError, name: &str| match error {
        PublishError::File(file) => file.is_not_found() && file.to_string().contains(name),
        _ => false,
    };
    let error = refused(|draft, _| std::fs::remove_file(draft.memory_path()).unwrap());
    assert!(missing(&error, "/memory"), "{error}");
    let error = refused(|draft, _| std::fs::remove_file(draft.vmstate_path()).unwrap());
    assert!(missing(&error, "/vmstate"), "{error}");
    let rootfs: DeviceId = "rootfs".parse().unwrap();
    let error = refused(|draft, _| std::fs::remove_file(draft.disk_path(&rootfs)).unwrap());
    assert!(missing(&error, "/disks/rootfs"), "{error}");
}

#[test]
fn a_draft_with_unsound_files_is_refused() {
    let error = refused(|draft, _| std::fs::write(draft.memory_path(), "").unwrap());
    assert!(matches!(error, PublishError::MemorySize { .. }), "{error}");
    let error = refused(|draft, _| std::fs::write(draft.vmstate_path(), "").unwrap());
    assert!(
        matches!(
            error,
            PublishError::Manifest(ManifestError::Invalid {
                field: "files.vmstate.size",
                ..
            })
        ),
        "{error}"
    );
    let error = refused(|draft, _| {
        std::fs::remove_file(draft.memory_path()).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", draft.memory_path()).unwrap();
    });
    assert!(
        matches!(error, PublishError::File(FileError::NotRegular { .. })),
        "{error}"
    );
}

#[test]
fn parts_that_cannot_be_so_are_refused() {
    let invalid = |error: PublishError, wanted: &str| match error {
        PublishError::Manifest(ManifestError::Invalid { field, .. }) => assert_eq!(field, wanted),
        other => panic!("{other}"),
    };
    invalid(refused(|_, parts| parts.machine.vcpus = 0), "machine.vcpus");
    invalid(
        refused(|_, parts| parts.machine.vcpus = 64),
        "machine.vcpus",
    );
    invalid(
        refused(|_, parts| parts.machine.mem_mib = 0),
        "machine.mem_mib",
    );
    invalid(
        refused(|_, parts| parts.machine.mem_mib = 1_000_000),
        "machine.mem_mib",
    );
    invalid(
        refused(|_, parts| parts.memory.page_size = ByteSize::new(0)),
        "memory.page_size",
    );
    invalid(
        refused(|_, parts| parts.memory.page_size = ByteSize::new(2 << 20)),
        "memory.size",
    );
    invalid(
        refused(|_, parts| parts.devices.vsock.as_mut().unwrap().cid = 2),
        "devices.vsock.cid",
    );
    invalid(
        refused(|_, parts| {
            let again = parts.devices.drives[0].clone();
            parts.devices.drives.push(again);
        }),
        "devices.drives",
    );
    let error = refused(|_, parts| parts.memory.size = ByteSize::new(1 << 60));
    assert!(matches!(error, PublishError::MemorySize { .. }), "{error}");
}

#[test]
fn a_drive_on_an_image_needs_the_image_and_is_read_only() {
    let fixture = Fixture::new();
    let image = fixture.store.root().images().join("debian.ext4");
    std::fs::write(&image, "an image").unwrap();
    let on_image = |read_only| {
        let mut parts = parts(Kind::Full);
        parts.devices.drives[0].backing = BackingParts::Image("debian".parse().unwrap());
        parts.devices.drives[0].read_only = read_only;
        parts
    };
    let error = fixture
        .draft(None, &mixed())
        .publish(on_image(false))
        .unwrap_err();
    assert!(
        matches!(
            error,
            PublishError::Manifest(ManifestError::Invalid {
                field: "devices.drives",
                ..
            })
        ),
        "{error}"
    );
    let made = fixture
        .draft(Some("base"), &mixed())
        .publish(on_image(true))
        .unwrap();
    assert!(
        matches!(&made.manifest().devices.drives[0].backing, Backing::Image { size, .. } if size.get() == 8)
    );
    let then = image.metadata().unwrap().modified().unwrap();
    std::fs::write(&image, "an imago").unwrap();
    let later = then + std::time::Duration::from_millis(1);
    let touch = |time| std::fs::File::open(&image).unwrap().set_modified(time);
    touch(later).unwrap();
    assert!(
        matches!(fixture.store.snapshot("base"), Err(OpenError::Changed { path }) if path == image)
    );
    touch(then).unwrap();
    assert!(fixture.store.snapshot("base").is_ok());
    std::fs::write(&image, "another image").unwrap();
    assert!(
        matches!(fixture.store.snapshot("base"), Err(OpenError::Size { path, .. }) if path == image)
    );
    std::fs::remove_file(&image).unwrap();
    assert!(
        matches!(fixture.store.snapshot("base"), Err(OpenError::File(error)) if error.is_not_found())
    );
}

#[test]
fn a_drive_on_a_file_of_the_host_is_checked_as_well() {
    let fixture = Fixture::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "data").unwrap();
    let mut parts = parts(Kind::Full);
    parts.devices.drives[0].backing =
        BackingParts::Host(file.path().to_str().unwrap().parse().unwrap());
    parts.devices.drives[0].read_only = true;
    fixture
        .draft(Some("base"), &mixed())
        .publish(parts)
        .unwrap()
        .verify()
        .unwrap();
    drop(file);
    assert!(
        matches!(fixture.store.snapshot("base"), Err(OpenError::File(error)) if error.is_not_found())
    );
}

#[test]
fn keys_that_lead_nowhere_are_told_apart() {
    let fixture = Fixture::new();
    assert!(matches!(
        fixture.store.snapshot("none"),
        Err(OpenError::NoSuchName { .. })
    ));
    assert!(matches!(
        fixture.store.snapshot("0123456789abcdef"),
        Err(OpenError::NoSuchId { .. })
    ));
    for bad in ["", "..", "../../etc", "A", "a\0b"] {
        assert!(
            matches!(
                fixture.store.snapshot(bad),
                Err(OpenError::InvalidKey { .. })
            ),
            "{bad:?}"
        );
    }
}
