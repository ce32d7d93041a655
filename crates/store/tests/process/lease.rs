use crate::fixture::{Fixture, mixed};
use rekindle_store::store::RemoveError;

#[test]
fn a_lease_lives_in_whoever_inherited_it() {
    let fixture = Fixture::new();
    let made = fixture.full(None, &mixed());
    let lease = made.lease().unwrap();
    let child = std::process::Command::new("sleep")
        .arg("60")
        .stdin(
            std::os::fd::AsFd::as_fd(&lease)
                .try_clone_to_owned()
                .unwrap(),
        )
        .spawn();
    let mut child = child.unwrap();
    drop(lease);
    assert!(matches!(
        fixture.store.remove(made.id()),
        Err(RemoveError::InUse { .. })
    ));
    child.kill().unwrap();
    child.wait().unwrap();
    fixture.store.remove(made.id()).unwrap();
}
