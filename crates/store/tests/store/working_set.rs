use crate::fixture::{Fixture, PAGES, mixed, parts};
use rekindle_store::Snapshot;
use rekindle_store::collect::{Mode, collect};
use rekindle_store::flatten::Flat;
use rekindle_store::manifest::Kind;
use rekindle_store::store::Listed;
use rekindle_store::working_set::{self, Run, Touched, merge_into};
use std::path::Path;

fn run() -> Run {
    let faulted = [3, 200, 4].map(|page| Touched {
        page,
        at_us: 0,
        count: 1,
    });
    Run {
        faulted: faulted.into(),
        held_back_untouched: Vec::new(),
    }
}

/// All that recording leaves, also when it is killed in the middle.
fn record(snapshot: &Snapshot) {
    merge_into(&snapshot.working_set_path(), 4096, PAGES as u64, &run()).unwrap();
    std::fs::write(snapshot.dir().join(".working-set.new"), "half of").unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entries = dir.read_dir().unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_with_a_working_set_is_as_good_as_without() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let base = fixture.full(Some("base"), &mixed());
    assert!(
        working_set::read(&base.working_set_path())
            .unwrap()
            .is_none()
    );
    record(&base);
    let tip = fixture.diff(base.id(), &mixed());
    record(&tip);

    let opened = store.snapshot("base").unwrap();
    opened.verify().unwrap();
    let set = working_set::read(&opened.working_set_path()).unwrap();
    assert_eq!(set.unwrap().touched().len(), 3);
    let list = store.list().unwrap();
    assert!(
        matches!(list.as_slice(), [Listed::Whole(_), Listed::Whole(_)]),
        "{list:?}"
    );
    let before = fixture.entries();
    assert_eq!(collect(store.root(), Mode::Reclaim).unwrap(), []);
    assert_eq!(fixture.entries(), before);
    let chain = store.chain(tip).unwrap();
    let layers: Vec<&Snapshot> = chain.iter().collect();
    let pages: Vec<_> = layers.iter().map(|layer| layer.pages()).collect();
    assert_eq!(Flat::of(&pages).unwrap().memory_size().get(), 1 << 20);

    for snapshot in chain.iter().rev() {
        let lease = snapshot.lease().unwrap();
        store.remove(snapshot.id()).unwrap_err();
        drop(lease);
        store.remove(snapshot.id()).unwrap();
    }
    assert_eq!(fixture.entries(), [""; 0]);
}

#[test]
fn recording_waits_for_nobody_who_uses_the_snapshot() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let _first = made.lease().unwrap();
    let _second = made.lease().unwrap();
    record(&made);
}

#[test]
fn a_damaged_working_set_harms_nothing_but_itself() {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    for damage in [
        "",
        "not a working set at all",
        "RKWS\u{9}\0\0\0 of tomorrow",
    ] {
        std::fs::write(made.working_set_path(), damage).unwrap();
        fixture.store.snapshot("base").unwrap().verify().unwrap();
        working_set::read(&made.working_set_path()).unwrap_err();
    }
    std::fs::remove_file(made.working_set_path()).unwrap();
    std::fs::create_dir(made.working_set_path()).unwrap();
    fixture.store.snapshot("base").unwrap().verify().unwrap();
    merge_into(&made.working_set_path(), 4096, PAGES as u64, &run()).unwrap_err();
    fixture.store.remove(made.id()).unwrap();
    assert_eq!(fixture.entries(), [""; 0]);
}

#[test]
fn a_draft_may_bring_a_working_set_along() {
    let fixture = Fixture::new();
    let draft = fixture.draft(None, &mixed());
    let path = draft.dir().join("working-set");
    let recorded = merge_into(&path, 4096, PAGES as u64, &run()).unwrap();
    let made = draft.publish(parts(Kind::Full)).unwrap();
    made.verify().unwrap();
    let kept = working_set::read(&made.working_set_path()).unwrap();
    assert_eq!(kept.unwrap(), recorded);
}

#[test]
fn nothing_is_recorded_into_a_snapshot_that_is_gone() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    fixture.store.remove(made.id()).unwrap();
    let path = made.working_set_path();
    merge_into(&path, 4096, PAGES as u64, &run()).unwrap_err();
    assert!(working_set::read(&path).unwrap().is_none());
    assert_eq!(names(&fixture.store.root().snapshots()), [""; 0]);
}
