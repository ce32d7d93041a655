use rekindle_store::WorkingSet;
use rekindle_store::digest::Digest;
use rekindle_store::working_set::{Run, Touched, merge_into, read_for};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const PATH: &str = "REKINDLE_TEST_WORKING_SET";
const FIRST: &str = "REKINDLE_TEST_FIRST_PAGE";
const EACH: u64 = 25;
const PAGES: u64 = 1 << 20;

fn run_of(page: u64) -> Run {
    Run {
        faulted: vec![Touched {
            page,
            at_us: 0,
            count: 1,
        }],
        held_back_untouched: Vec::new(),
    }
}

/// Runs one test of these in a child.
fn child(test: &str, path: &Path, first: u64) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("working_set::{test}")])
        .env(PATH, path)
        .env(FIRST, first.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_child() -> Option<(PathBuf, u64)> {
    let first = env::var(FIRST).ok()?.parse().ok()?;
    Some((env::var_os(PATH)?.into(), first))
}

#[test]
fn no_run_is_lost_when_processes_merge_at_the_same_time() {
    if let Some((path, first)) = is_child() {
        for page in first..first + EACH {
            merge_into(&path, 4096, PAGES, &run_of(page)).unwrap();
        }
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    let children = [0, 1, 2, 3].map(|n| {
        child(
            "no_run_is_lost_when_processes_merge_at_the_same_time",
            &path,
            n * EACH,
        )
    });
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let set = read_for(&path, 4096, PAGES).unwrap().unwrap();
    assert_eq!(u64::from(set.runs()), 4 * EACH);
    let pages: Vec<u64> = set.touched().iter().map(|touched| touched.page).collect();
    assert_eq!(pages, (0..4 * EACH).collect::<Vec<_>>());
}

#[test]
fn whoever_dies_while_merging_leaves_a_whole_set_and_no_lock() {
    if let Some((path, first)) = is_child() {
        for page in first.. {
            merge_into(&path, 4096, PAGES, &run_of(page)).unwrap();
        }
    }
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("working-set");
    for round in 0..10 {
        let known = || {
            let set = read_for(&path, 4096, PAGES).unwrap();
            set.map_or(0, |set| set.runs())
        };
        let before = known();
        let mut child = child(
            "whoever_dies_while_merging_leaves_a_whole_set_and_no_lock",
            &path,
            round * 10_000,
        );
        while known() < before + 20 {
            assert!(child.try_wait().unwrap().is_none(), "the child goes on");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let left = read_for(&path, 4096, PAGES).unwrap().unwrap();
        let merged = merge_into(&path, 4096, PAGES, &run_of(PAGES - 1)).unwrap();
        assert_eq!(merged.runs(), left.runs() + 1);
        assert!(merged.touched().len() >= left.touched().len());
    }
}

/// A set that claims to be of 4 TiB, with these groups.
fn sealed(groups: &[u8]) -> Vec<u8> {
    let mut bytes = WorkingSet::new(4096, 1 << 30).unwrap().to_bytes();
    bytes.truncate(24);
    bytes.extend(groups);
    let checksum = Digest::of(&bytes);
    bytes.extend(checksum.as_bytes());
    bytes
}

/// So much address space more than there is now.
fn allow_more(bytes: u64) {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = status.split(' ').next().unwrap().parse().unwrap();
    let limit = Rlimit {
        current: Some(pages * 4096 + bytes),
        maximum: None,
    };
    setrlimit(Resource::As, limit).unwrap();
}

#[test]
fn a_short_file_never_takes_much_memory() {
    const LEN: usize = 8 * 1024;
    if is_child().is_none() {
        let test = "a_short_file_never_takes_much_memory";
        assert!(child(test, Path::new(""), 0).wait().unwrap().success());
        return;
    }
    // The most pages that a file can name: runs of 256, each right behind the one before.
    let runs = LEN / 3;
    let mut most = vec![
        0,
        0x80 | runs.to_le_bytes()[0],
        (runs >> 7).to_le_bytes()[0],
    ];
    most.extend([0, 0xf8, 0x0f].repeat(runs));
    // The most runs: of one page, at the start of the memory in each group.
    let mut overlapping = vec![0, 1, 0, 0];
    overlapping.extend([1, 1, 0, 0].repeat(100));
    // Counts that the file cannot hold.
    let lies = [
        [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f].as_slice(),
        &[0; LEN],
    ]
    .concat();
    let files = [most, overlapping, lies].map(|groups| sealed(&groups));

    allow_more(32 << 20);
    let pages = 256 * runs;
    assert_eq!(WorkingSet::parse(&files[0]).unwrap().touched().len(), pages);
    WorkingSet::parse(&files[1]).unwrap_err();
    WorkingSet::parse(&files[2]).unwrap_err();
}
