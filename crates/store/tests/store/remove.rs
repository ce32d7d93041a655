use crate::fixture::{Fixture, PAGES, Written, mixed, parts};
use rekindle_store::manifest::Kind;
use rekindle_store::publish::PublishError;
use rekindle_store::snapshot::{LeaseError, OpenError};
use rekindle_store::store::{ChainError, Listed, RemoveError};
use std::time::Duration;

#[test]
fn removal_leaves_nothing_and_frees_the_name() {
    let fixture = Fixture::new();
    let made = fixture.full(Some("base"), &mixed());
    fixture.store.remove(made.id()).unwrap();
    assert_eq!(fixture.entries(), [""; 0]);
    assert!(matches!(
        fixture.store.snapshot("base"),
        Err(OpenError::NoSuchName { .. })
    ));
    assert!(matches!(
        fixture.store.remove(made.id()),
        Err(RemoveError::NoSuchId { .. })
    ));
    assert!(matches!(made.lease(), Err(LeaseError::Removed { .. })));
    fixture.full(Some("base"), &mixed());
}

#[test]
fn what_a_vm_uses_is_not_removed() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let first = made.lease().unwrap();
    let second = made.lease().unwrap();
    let before = fixture.entries();
    for lease in [first, second] {
        assert!(matches!(
            fixture.store.remove(made.id()),
            Err(RemoveError::InUse { .. })
        ));
        assert_eq!(fixture.entries(), before);
        drop(lease);
    }
    fixture.store.remove(made.id()).unwrap();
}

#[test]
fn a_parent_is_not_removed_before_its_children() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let child = fixture.diff(base.id(), &mixed());
    let error = fixture.store.remove(base.id()).unwrap_err();
    assert!(
        matches!(&error, RemoveError::HasChildren { children, .. } if *children == [child.id()])
    );
    assert!(
        error.to_string().contains(&format!("of {};", child.id())),
        "{error}"
    );
    fixture.store.remove(child.id()).unwrap();
    fixture.store.remove(base.id()).unwrap();
}

#[test]
fn a_parent_is_not_removed_under_a_diff_that_is_being_published() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let mut refused = 0;
    let draft = fixture.draft(None, &mixed());
    draft
        .publish_with(parts(Kind::Diff { parent: base.id() }), |_| {
            let error = fixture.store.remove(base.id()).unwrap_err();
            assert!(matches!(
                error,
                RemoveError::InUse { .. } | RemoveError::HasChildren { .. }
            ));
            refused += 1;
        })
        .unwrap();
    assert_eq!(refused, 8);
}

#[test]
fn a_diff_without_a_fitting_parent_is_refused() {
    let fixture = Fixture::new();
    let base = fixture.full(None, &mixed());
    let draft = fixture.draft(None, &mixed());
    fixture.store.remove(base.id()).unwrap();
    let error = draft
        .publish(parts(Kind::Diff { parent: base.id() }))
        .unwrap_err();
    let PublishError::Parent {
        source: ChainError::Open { source, .. },
        ..
    } = error
    else {
        panic!("{error}")
    };
    assert!(matches!(source, OpenError::NoSuchId { .. }));
    assert_eq!(fixture.entries(), [""; 0]);
}

#[test]
fn a_broken_snapshot_is_listed_as_broken_and_can_be_removed() {
    let fixture = Fixture::new();
    let whole = fixture.full(Some("whole"), &mixed());
    let broken = fixture.full(Some("broken"), &[Written::Data(1); PAGES]);
    std::fs::remove_file(broken.dir().join("manifest.json")).unwrap();
    std::fs::create_dir(fixture.store.root().snapshots().join("something-else")).unwrap();
    let list = fixture.store.list().unwrap();
    let [Listed::Whole(first), Listed::Broken(second)] = list.as_slice() else {
        panic!("{list:?}")
    };
    assert_eq!(first.id(), whole.id());
    assert_eq!(
        (second.id, second.name.as_ref().unwrap().as_str()),
        (broken.id(), "broken")
    );
    assert!(
        second.reason.to_string().ends_with("manifest.json"),
        "{}",
        second.reason
    );
    let id = fixture.store.resolve("broken").unwrap();
    fixture.store.remove(id).unwrap();
    assert_eq!(fixture.store.list().unwrap().len(), 1);
}

#[test]
fn whoever_leases_while_another_removes_gets_all_or_nothing() {
    let fixture = Fixture::new();
    for _ in 0..20 {
        let made = fixture.full(Some("base"), &mixed());
        let id = made.id();
        std::thread::scope(|scope| {
            let leasing = scope.spawn(|| {
                let lease = made.lease();
                if lease.is_ok() {
                    std::thread::sleep(Duration::from_millis(1));
                    made.verify().unwrap();
                }
                lease.map(drop)
            });
            let removing = scope.spawn(|| fixture.store.remove(id));
            let (leased, removed) = (leasing.join().unwrap(), removing.join().unwrap());
            match (leased, removed) {
                (Err(LeaseError::Removed { .. }), Ok(())) => {}
                // Removed after the lease was given back, or refused while it was held.
                (Ok(()), Ok(()) | Err(RemoveError::InUse { .. })) => {}
                other => panic!("{other:?}"),
            }
        });
        match fixture.store.remove(id) {
            Ok(()) | Err(RemoveError::NoSuchId { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        assert_eq!(fixture.entries(), [""; 0]);
    }
}
