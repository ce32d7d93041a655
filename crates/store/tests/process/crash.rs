use crate::fixture::{Fixture, fill, mixed, parts};
use rekindle_store::collect::{Leftover, Mode, collect};
use rekindle_store::manifest::Kind;
use rekindle_store::publish::Step;
use rekindle_store::store::Listed;
use rustix::process::{Signal, getpid, kill_process};
use std::env;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

const ROOT: &str = "REKINDLE_TEST_CRASH_ROOT";
const POINT: &str = "REKINDLE_TEST_CRASH_POINT";

fn die() {
    kill_process(getpid(), Signal::KILL).unwrap();
}

/// What the child does: publishes, and dies at the named point.
fn publish_until(point: &str, root: &Path) {
    let at = |here: String| {
        if here == point {
            die();
        }
    };
    let fixture = Fixture::at(root);
    let draft = fixture.store.begin(Some("base".parse().unwrap())).unwrap();
    at("begun".into());
    fill(&draft, &mixed());
    at("filled".into());
    draft
        .publish_with(parts(Kind::Full), |step| at(format!("{step:?}")))
        .unwrap();
}

/// Runs the test `name`, which is this very one, in a child, which dies at `point` of what it does in `root`.
fn crash(name: &str, point: &str, root: &Path) {
    let status = Command::new(env::current_exe().unwrap())
        .args(["--exact", name])
        .env(ROOT, root)
        .env(POINT, point)
        .output()
        .unwrap()
        .status;
    assert_eq!(status.signal(), Some(9), "{point}");
}

#[test]
fn whoever_dies_at_any_step_leaves_a_whole_snapshot_or_a_leftover() {
    const ME: &str = "crash::whoever_dies_at_any_step_leaves_a_whole_snapshot_or_a_leftover";
    if let (Some(root), Ok(point)) = (env::var_os(ROOT), env::var(POINT)) {
        publish_until(&point, root.as_ref());
        unreachable!("the child dies at {point}");
    }
    let steps = Step::ALL.map(|step| format!("{step:?}"));
    for point in ["begun", "filled"]
        .into_iter()
        .chain(steps.iter().map(String::as_str))
    {
        let fixture = Fixture::new();
        let root = fixture.store.root();
        crash(ME, point, root.path());
        let list = fixture.store.list().unwrap();
        let left = collect(root, Mode::Report).unwrap();
        if matches!(point, "Renamed" | "Published") {
            let [Listed::Whole(snapshot)] = list.as_slice() else {
                panic!("{point}: {list:?}")
            };
            snapshot.verify().unwrap();
            assert_eq!(fixture.store.resolve("base").unwrap(), snapshot.id());
            assert_eq!(left, [], "{point}");
            continue;
        }
        assert!(list.is_empty(), "{point}: {list:?}");
        assert!(
            matches!(
                left.as_slice(),
                [Leftover::Draft { .. }, Leftover::Name { .. }]
            ),
            "{point}: {left:?}"
        );
        // The name is free at once; then the rest is collected.
        fixture.full(Some("base"), &mixed());
        assert_eq!(collect(root, Mode::Reclaim).unwrap(), left[..1], "{point}");
        assert_eq!(fixture.store.list().unwrap().len(), 1);
        assert_eq!(root.tmp().read_dir().unwrap().count(), 0);
    }
}

#[test]
fn whoever_dies_while_flattening_leaves_the_chain_and_a_whole_snapshot_or_a_leftover() {
    const ME: &str =
        "crash::whoever_dies_while_flattening_leaves_the_chain_and_a_whole_snapshot_or_a_leftover";
    if let (Some(root), Ok(point)) = (env::var_os(ROOT), env::var(POINT)) {
        let store = Fixture::at(root.as_ref()).store;
        let tip = store.snapshot("tip").unwrap();
        let name = Some("flat".parse().unwrap());
        store
            .flatten(tip, name, |step| {
                if format!("{step:?}") == point {
                    die();
                }
            })
            .unwrap();
        unreachable!("the child dies at {point}");
    }
    for step in Step::ALL {
        let point = format!("{step:?}");
        let fixture = Fixture::new();
        let base = fixture.full(None, &mixed());
        let kind = Kind::Diff { parent: base.id() };
        let tip = fixture
            .draft(Some("tip"), &mixed())
            .publish(parts(kind))
            .unwrap();
        crash(ME, &point, fixture.store.root().path());
        for snapshot in [base, tip] {
            snapshot.verify().unwrap();
        }
        collect(fixture.store.root(), Mode::Reclaim).unwrap();
        match fixture.store.snapshot("flat") {
            Ok(flat) => {
                assert!(matches!(step, Step::Renamed | Step::Published), "{point}");
                flat.verify().unwrap();
            }
            Err(_) => {
                assert_eq!(fixture.store.list().unwrap().len(), 2, "{point}");
                let tip = fixture.store.snapshot("tip").unwrap();
                let name = Some("flat".parse().unwrap());
                fixture.store.flatten(tip, name, |_| {}).unwrap();
            }
        }
    }
}
