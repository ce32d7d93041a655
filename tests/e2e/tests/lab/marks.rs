//! Memory that a guest fills with a mark and lets go, so that whoever reads it later knows where it came from.

use std::fs;

use anyhow::{Context, ensure};
use rekindle_pager::PageRun;

use crate::console::Linux;

/// Nobody writes it again once it is let go.
const MARK: &[u8; 16] = b"was thrown away\n";
const PAGE: usize = 4096;

/// A shell line that fills so many MiB with the mark and lets them go, where a tmpfs is mounted on `/m`.
pub(crate) fn leave(mib: u32) -> String {
    format!(
        "yes was thrown away | head -c 1048576 > /m/j; \
         for i in $(seq 2 {mib}); do cp /m/j /m/j$i; done; rm /m/j*"
    )
}

/// How many pages with the mark a balloon took, by the Full from before that, and by what it took; in one from after it
/// none of them may have the mark.
pub(crate) fn taken(
    linux: &Linux,
    before: &str,
    after: &str,
    pages: &[PageRun],
) -> anyhow::Result<usize> {
    let stale = marked(linux, after, pages)?;
    let some = &stale[..stale.len().min(16)];
    ensure!(
        some.is_empty(),
        "{} pages were taken and are there again: {some:?}",
        stale.len()
    );
    let had = marked(linux, before, pages)?;
    ensure!(!had.is_empty(), "it took none of the marked pages");
    Ok(had.len())
}

/// Those of these pages that are full of the mark in a Full's memory.
fn marked(linux: &Linux, snapshot: &str, pages: &[PageRun]) -> anyhow::Result<Vec<u64>> {
    let snapshot = linux
        .rekindle
        .tells(&format!("snapshot inspect {snapshot}"))?;
    let id = snapshot["id"].as_str().context("an id")?;
    let directory = linux.rekindle.state().join("snapshots").join(id);
    let memory = fs::read(directory.join("memory"))?;
    let full = MARK.repeat(PAGE / MARK.len());
    let found = (0..).zip(memory.chunks(PAGE));
    let found = found.filter(|(page, bytes)| *bytes == full && is_one_of(pages, *page));
    Ok(found.map(|(page, _)| page).collect())
}

/// Whether a page is in these runs, which are in order.
fn is_one_of(runs: &[PageRun], page: u64) -> bool {
    let after = runs.partition_point(|run| run.first.get() <= page);
    let run = after.checked_sub(1).map(|at| runs[at]);
    run.is_some_and(|run| page - run.first.get() < run.count)
}
