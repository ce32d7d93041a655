//! A balloon, which takes pages away from the guest behind everybody's back: page servers that die meanwhile, and Diffs.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::Role;
use rekindle_kit::story::Story;
use rekindle_pager::Live;

use crate::console::Linux;
use crate::marks::{leave, taken};
use crate::story;

/// A file in memory, and nothing that could come from anywhere else.
const FILL: &str = "mkdir /m; mount -t tmpfs -o size=80% m /m; \
                    dd if=/dev/urandom of=/m/f bs=1M count=8 2>/dev/null";
/// It is read in parts: a page that comes in takes the lab milliseconds.
const PARTS: u32 = 8;

/// How much of what it takes has the mark, at the most, in MiB.
const MARKED: u32 = 20;
/// How much the balloon takes, in MiB.
const TAKEN: u64 = 64;
/// The pages that Firecracker writes to for its vsock device: an event, and that it is there.
const VSOCK_PAGES: usize = 2;

/// The guest gives its pages back in its own time, and the lab is slow.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a balloon grows and shrinks while page servers are killed, and Diffs have what it took",
            grows_and_shrinks,
        )
        .within(Duration::from_secs(600))
        .takes(210),
    ]
}

/// A copy of a guest with a balloon, a file in its memory, and the file's checksums.
fn a_copy(linux: &Linux) -> anyhow::Result<Vec<String>> {
    linux.boots_with(192, "base", "--balloon 0 --track-dirty-pages")?;
    let line = format!("{FILL}; {}; echo filled", leave(MARKED));
    let said = linux.asks("base", &line)?;
    ensure!(said.contains("filled"), "{said}");
    let sums = sums(linux, "base", "f")?;
    linux.rekindle.does("snapshot create base --name filled")?;
    let said = linux.rekindle.refuses("snapshot create base --diff")?;
    ensure!(said.contains("balloon") && said.contains("full"), "{said}");
    linux.rekindle.does("rm --force base")?;
    linux
        .rekindle
        .does("restore filled --name copy --track-dirty-pages")?;
    Ok(sums)
}

/// The checksum of each part of a file in a guest's memory.
fn sums(linux: &Linux, vm: &str, file: &str) -> anyhow::Result<Vec<String>> {
    let part = |n: u32| {
        let line = format!("dd if=/m/{file} bs=1M skip={n} count=1 2>/dev/null | md5sum");
        let sum = linux.asks(vm, &line)?;
        ensure!(sum.len() >= 32, "{sum:?}");
        Ok(sum)
    };
    (0..PARTS).map(part).collect()
}

/// Tells the balloon how much to hold; the guest has hardly begun when this returns.
pub(crate) fn resize(linux: &Linux, vm: &str, mib: u64) -> anyhow::Result<()> {
    let socket = linux.rekindle.vm(vm).join("api.sock");
    let line = format!(
        "api --socket {} PATCH /balloon {{\"amount_mib\":{mib}}}",
        socket.display()
    );
    linux.rekindle.does(&line).map(drop)
}

/// How much it holds, in MiB.
fn holds(linux: &Linux, vm: &str) -> anyhow::Result<u64> {
    let socket = linux.rekindle.vm(vm).join("api.sock");
    let line = format!("api --socket {} GET /balloon/statistics", socket.display());
    let said = linux.rekindle.tells(&line)?;
    said["actual_mib"]
        .as_u64()
        .with_context(|| said.to_string())
}

fn until(linux: &Linux, vm: &str, mib: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while holds(linux, vm)? != mib {
        ensure!(
            Instant::now() < deadline,
            "it holds {} MiB, not {mib}",
            holds(linux, vm)?
        );
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn memory_of(linux: &Linux, snapshot: &str) -> anyhow::Result<Vec<u8>> {
    let told = linux
        .rekindle
        .tells(&format!("snapshot inspect {snapshot}"))?;
    let id = told["id"].as_str().context("an id")?;
    let snapshots = linux.rekindle.state().join("snapshots");
    Ok(fs::read(snapshots.join(id).join("memory"))?)
}

/// The numbers of the pages that are not alike.
fn differing(one: &[u8], other: &[u8]) -> Vec<usize> {
    let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
    let unlike = pages.filter(|(_, (one, other))| one != other);
    unlike.map(|(page, _)| page).collect()
}

fn kill_the_pager(linux: &Linux) -> anyhow::Result<()> {
    for (role, process) in linux.rekindle.processes()? {
        if role == Role::Pager {
            // It may be one that was killed already, and that the kernel has not let go of yet.
            let _ = process.kill(rekindle_e2e::SOON);
        }
    }
    Ok(())
}

fn grows_and_shrinks(linux: &Linux) -> anyhow::Result<()> {
    let sum = a_copy(linux)?;
    let copy = || sums(linux, "copy", "f");
    resize(linux, "copy", TAKEN)?;
    for _ in 0..2 {
        kill_the_pager(linux)?;
        sleep(Duration::from_millis(400));
    }
    until(linux, "copy", TAKEN)?;
    ensure!(copy()? == sum, "it was wrong when the balloon had grown");

    a_diff_and_a_full(linux)?;
    kill_the_pager(linux)?;
    resize(linux, "copy", 0)?;
    until(linux, "copy", 0)?;
    // Memory that comes back is used, and is what the guest made of it.
    let said = linux.asks(
        "copy",
        "dd if=/dev/zero of=/m/z bs=1M count=32 2>/dev/null; tr -d '\\0' < /m/z | wc -c; rm /m/z",
    )?;
    ensure!(said.trim() == "0", "{said:?}");
    ensure!(copy()? == sum, "it was wrong when the balloon had shrunk");

    // Once more, and what came back is written again before a Full: it is none of the next Diff's business.
    resize(linux, "copy", TAKEN)?;
    kill_the_pager(linux)?;
    until(linux, "copy", TAKEN)?;
    resize(linux, "copy", 0)?;
    kill_the_pager(linux)?;
    until(linux, "copy", 0)?;
    linux.asks("copy", "cp /m/f /m/g; cp /m/f /m/h; rm /m/g; cp /m/f /m/g")?;
    linux.rekindle.does("snapshot create copy --name later")?;
    linux
        .rekindle
        .does("snapshot create copy --diff --name last")?;
    let live = Live::open(&linux.rekindle.vm("copy").join("pager.state"))?;
    let stats = live.stats();
    ensure!(stats.removed >= 2 * TAKEN * 256, "{stats:?}");
    ensure!(stats.takeovers >= 4, "{stats:?}");
    ensure!(linux.rekindle.state_of("copy")? == "running");
    linux.rekindle.does("rm --force copy")?;
    linux.rekindle.does("restore last --name again")?;
    for file in ["f", "g", "h"] {
        ensure!(
            sums(linux, "again", file)? == sum,
            "{file} is wrong in the end"
        );
    }
    Ok(())
}

/// Nothing runs between the two, so they must be of one mind about every byte but those that Firecracker itself writes:
/// each snapshot tells the guest that its vsock connections are reset. What those are, a second Full says. What the
/// balloon took is not what it was.
fn a_diff_and_a_full(linux: &Linux) -> anyhow::Result<()> {
    let rekindle = &linux.rekindle;
    rekindle.does("pause copy")?;
    let live = Live::open(&rekindle.vm("copy").join("pager.state"))?;
    let removed = live.recently_removed();
    rekindle.does("snapshot create copy --diff --name diff")?;
    rekindle.does("snapshot create copy --name full")?;
    rekindle.does("snapshot create copy --name again")?;
    rekindle.does("restore diff --name mapped --backend file --paused --track-dirty-pages")?;
    let merged = fs::read(rekindle.vm("mapped").join("memory"))?;
    let [full, again] = [memory_of(linux, "full")?, memory_of(linux, "again")?];
    let firecrackers = differing(&full, &again);
    ensure!(
        firecrackers.len() <= VSOCK_PAGES,
        "{firecrackers:?} differ in two Fulls of a VM that stands still"
    );
    let differ = differing(&merged, &full);
    ensure!(
        merged.len() == full.len() && differ.iter().all(|page| firecrackers.contains(page)),
        "the pages {differ:?} differ, and Firecracker writes {firecrackers:?}"
    );
    rekindle.does("snapshot rm again")?;
    taken(linux, "filled", "full", &removed)?;
    let said = rekindle.refuses("snapshot create mapped --diff")?;
    ensure!(said.contains("balloon"), "{said}");
    rekindle.does("rm --force mapped")?;
    rekindle.does("resume copy")?;
    Ok(())
}
