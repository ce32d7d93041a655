//! What a VM's page server did, as verbs tell it: while it works from its state, afterwards from what it left.

use std::path::{Path, PathBuf};

use rekindle_engine::store::Snapshot;
use rekindle_engine::store::working_set::{WorkingSetError, read};
use rekindle_engine::vm::dir::{PAGER_STATE, PAGER_STATS, VmDir};
use rekindle_pager::{Live, StateError, Stats};
use serde::Serialize;

/// What is known of a page server, or why nothing is.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Report {
    Known(Box<Counts>),
    Unknown { error: String },
}

/// The counts of a page server, and what follows from them.
#[derive(Debug, Serialize)]
pub(crate) struct Counts {
    #[serde(flatten)]
    stats: Stats,
    /// About how many of the replayed pages the guest had no use for; absent where no sample tells.
    wasted: Option<u64>,
}

impl From<Stats> for Report {
    fn from(stats: Stats) -> Report {
        let wasted = stats.wasted();
        Report::Known(Box::new(Counts { stats, wasted }))
    }
}

/// What the page server of a VM did so far; nothing if the VM has none.
pub(crate) fn report(dir: &VmDir) -> Option<Report> {
    // Written when the VM has ended, and better than the state then: it says how.
    if let Some(stats) = left(&dir.file(PAGER_STATS)) {
        return Some(stats.into());
    }
    match live(dir)? {
        Ok(live) => Some(live.stats().into()),
        Err(error) => Some(Report::Unknown {
            error: format!("{:#}", anyhow::Error::from(error)),
        }),
    }
}

/// The state of a VM's page server, whether that lives or not; nothing if the VM never had one.
pub(crate) fn live(dir: &VmDir) -> Option<Result<Live, StateError>> {
    match Live::open(&dir.file(PAGER_STATE)) {
        Err(StateError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        opened => Some(opened),
    }
}

fn left(path: &Path) -> Option<Stats> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// The working set of a snapshot, or why it has none that can be used.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum WorkingSet {
    Sound {
        /// How many pages are in it.
        pages: usize,
        /// How much that is.
        bytes: u64,
        /// How many copies it was learnt from.
        runs: u32,
    },
    Unusable {
        path: PathBuf,
        error: String,
    },
}

/// The working set of a snapshot; nothing if no copy told of one yet.
pub(crate) fn working_set(snapshot: &Snapshot) -> Option<WorkingSet> {
    let path = snapshot.working_set_path();
    let unusable = |error: WorkingSetError| WorkingSet::Unusable {
        path: path.clone(),
        error: format!("{:#}", anyhow::Error::from(error)),
    };
    let set = match read(&path) {
        Ok(set) => set?,
        Err(error) => return Some(unusable(error)),
    };
    let pages = set.touched().len();
    let bytes = u64::try_from(pages).unwrap_or(u64::MAX);
    Some(WorkingSet::Sound {
        pages,
        bytes: bytes.saturating_mul(set.page_size()),
        runs: set.runs(),
    })
}
