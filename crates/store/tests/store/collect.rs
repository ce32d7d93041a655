use crate::fixture::{Fixture, mixed, parts};
use rekindle_store::collect::{Leftover, Mode, collect};
use rekindle_store::manifest::Kind;
use std::os::unix::fs::symlink;

#[test]
fn a_live_draft_and_a_whole_snapshot_are_left_alone() {
    let fixture = Fixture::new();
    fixture.full(Some("whole"), &mixed());
    let draft = fixture.draft(Some("live"), &mixed());
    let before = fixture.entries();
    assert_eq!(collect(fixture.store.root(), Mode::Reclaim).unwrap(), []);
    assert_eq!(fixture.entries(), before);
    draft.publish(parts(Kind::Full)).unwrap();
}

#[test]
fn a_dead_draft_is_reported_and_then_removed_with_its_name() {
    let fixture = Fixture::new();
    let root = fixture.store.root();
    let id = "00000000000000aa".parse().unwrap();
    std::fs::create_dir_all(root.tmp().join("00000000000000aa/disks")).unwrap();
    std::fs::write(root.tmp().join("00000000000000aa/memory"), "half").unwrap();
    symlink("../snapshots/00000000000000aa", root.names().join("base")).unwrap();
    let left = [
        Leftover::Draft { id },
        Leftover::Name {
            name: "base".parse().unwrap(),
            id,
        },
    ];
    let before = fixture.entries();
    assert_eq!(collect(root, Mode::Report).unwrap(), left);
    assert_eq!(fixture.entries(), before);
    assert_eq!(collect(root, Mode::Reclaim).unwrap(), left);
    assert_eq!(fixture.entries(), [""; 0]);
    assert_eq!(collect(root, Mode::Reclaim).unwrap(), []);
}

#[test]
fn the_name_of_a_dead_draft_is_free_without_collecting() {
    let fixture = Fixture::new();
    let root = fixture.store.root();
    std::fs::create_dir(root.tmp().join("00000000000000aa")).unwrap();
    symlink("../snapshots/00000000000000aa", root.names().join("base")).unwrap();
    let made = fixture.full(Some("base"), &mixed());
    assert_eq!(fixture.store.resolve("base").unwrap(), made.id());
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let fixture = Fixture::new();
    let root = fixture.store.root();
    std::fs::create_dir(root.tmp().join("notes")).unwrap();
    std::fs::write(root.tmp().join("00000000000000aa"), "a file").unwrap();
    symlink("/etc", root.tmp().join("00000000000000bb")).unwrap();
    symlink("/etc/passwd", root.names().join("passwd")).unwrap();
    std::fs::write(root.names().join("file"), "").unwrap();
    let before = fixture.entries();
    assert_eq!(collect(root, Mode::Reclaim).unwrap(), []);
    assert_eq!(fixture.entries(), before);
}

#[test]
fn collecting_while_others_build_harms_none() {
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        let builders: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| (0..15).for_each(|_| drop(fixture.full(None, &mixed())))))
            .collect();
        while builders.iter().any(|builder| !builder.is_finished()) {
            collect(fixture.store.root(), Mode::Reclaim).unwrap();
        }
        builders
            .into_iter()
            .for_each(|builder| builder.join().unwrap());
    });
    assert_eq!(fixture.store.list().unwrap().len(), 30);
}
