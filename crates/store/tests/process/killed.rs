//! SIGKILL on the way: what was whole stays whole, and the next run completes.

use crate::fixture::{Fixture, assert_same, lineage, pull, push};
use rekindle_store::packed::Repository;
use rekindle_store::store::Listed;
use rustix::process::{Signal, getpid, kill_process};
use std::env;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

const ROOT: &str = "REKINDLE_TEST_TRAVEL_ROOT";
const PLACE: &str = "REKINDLE_TEST_TRAVEL_PLACE";
const WHAT: &str = "REKINDLE_TEST_TRAVEL_WHAT";
const ME: &str = "killed::whoever_is_killed_on_the_way_leaves_the_next_one_to_complete";

/// What the child does: dies when it tells its progress for the time that `WHAT` says.
fn travel(root: &Path, place: &Path, what: &str) {
    let store = Fixture::at(root).store;
    let (verb, at) = what.split_once(' ').unwrap();
    let (at, told) = (at.parse::<u64>().unwrap(), AtomicU64::new(0));
    let report = |_| {
        if told.fetch_add(1, Ordering::Relaxed) == at {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
    };
    let directory = Repository::directory(place);
    match verb {
        "push" => {
            let tip = store.snapshot("tip").unwrap();
            directory
                .push(&store, tip, None, &report)
                .map(drop)
                .unwrap();
        }
        _ => directory
            .pull(&store, "tip", None, None, &report)
            .map(drop)
            .unwrap(),
    }
}

/// Runs this very test in a child; tells whether it was killed.
fn is_killed(fixture: &Fixture, place: &Path, what: &str) -> bool {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", ME])
        .env(ROOT, fixture.store.root().path())
        .env(PLACE, place)
        .env(WHAT, what)
        .output()
        .unwrap();
    assert!(
        output.status.success() || output.status.signal() == Some(9),
        "{output:?}"
    );
    !output.status.success()
}

#[test]
fn whoever_is_killed_on_the_way_leaves_the_next_one_to_complete() {
    if let (Some(root), Some(place)) = (env::var_os(ROOT), env::var_os(PLACE)) {
        return travel(root.as_ref(), place.as_ref(), &env::var(WHAT).unwrap());
    }
    let here = Fixture::new();
    let [base, tip] = lineage(&here);
    let temp = tempfile::tempdir().unwrap();
    let mut kills = 0;
    for at in 0.. {
        let place = temp.path().join(at.to_string());
        let killed = is_killed(&here, &place, &format!("push {at}"));
        // What can be seen is whole: nothing, the base alone, or both.
        let there = Fixture::new();
        for snapshot in [&base, &tip] {
            if place
                .join("snapshots")
                .join(snapshot.id().to_string())
                .exists()
            {
                pull(&there, &place, &snapshot.id().to_string()).unwrap();
                assert_same(snapshot, &there);
            }
        }
        push(&here, &place, "tip").unwrap();
        pull(&there, &place, "tip").unwrap();
        assert_same(&tip, &there);
        kills += u32::from(killed);
        if !killed {
            break;
        }
    }
    assert!(kills >= 2, "a pack of each was written");
    let place = temp.path().join("0");
    for at in (0..).step_by(5) {
        let there = Fixture::new();
        let killed = is_killed(&there, &place, &format!("pull {at}"));
        let listed = there.store.list().unwrap();
        assert!(
            listed.iter().all(|one| matches!(one, Listed::Whole(_))),
            "{listed:?}"
        );
        pull(&there, &place, "tip").unwrap();
        assert_same(&base, &there);
        assert_same(&tip, &there);
        assert_eq!(there.store.root().tmp().read_dir().unwrap().count(), 0);
        kills += u32::from(killed);
        if !killed {
            break;
        }
    }
    assert!(kills >= 5, "of each chunk is told");
}
