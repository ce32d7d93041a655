//! A guest whose memory is made of huge pages: refused where there are none, and right in every copy.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON};
use rekindle_kit::huge_pages::HugePages;
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;

use crate::bare::{counter, large_pattern};
use crate::memory::goes_on;
use crate::replay::count;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "a guest of huge pages is right in every copy, and ends where there are none left",
        every_copy,
    )]
}

fn every_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let guest = rekindle.guest(&large_pattern())?;
    let run = format!("run {guest} --huge-pages --track-dirty-pages --detach --name original");
    {
        let _allowed = HugePages::limited_to(3)?;
        let said = rekindle.tries(&run)?.refused(125)?;
        ensure!(said.contains("has 6 MiB of them left"), "{said}");
        ensure!(said.contains("echo 32 > "), "{said}");
    }
    let odd = rekindle.guest(&counter())?.replace("--mem 32", "--mem 31");
    let said = rekindle
        .tries(&format!("run {odd} --huge-pages --detach"))?
        .refused(125)?;
    ensure!(said.contains("multiple of 2 MiB"), "{said}");
    let _allowed = HugePages::limited_to(256)?;
    rekindle.does(&run)?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original")?;
    rekindle.does("snapshot verify later")?;

    let said = rekindle.refuses("restore base --backend file")?;
    ensure!(said.contains("userfaultfd only"), "{said}");
    for (snapshot, name) in [("base", "first"), ("base", "second"), ("later", "third")] {
        rekindle.does(&format!("restore {snapshot} --name {name}"))?;
        goes_on(rekindle, name)?;
        let pager = rekindle.tells(&format!("inspect {name}"))?["pager"].clone();
        ensure!(count(&pager, "page_size")? == 2 << 20, "{pager}");
        let replayed = count(&pager, "replayed")?;
        ensure!((replayed > 0) == (name == "second"), "{name}: {pager}");
        if name == "third" {
            rekindle.one(Role::Pager)?.kill(SOON)?;
            goes_on(rekindle, name)?;
        }
        // By this its page server adds what it saw to the working set.
        rekindle.does(&format!("stop {name} --grace 0"))?;
    }
    // Enough for each alone, with the one page that is written into a copy as it is loaded.
    let _few = HugePages::limited_to(33)?;
    for name in ["this", "that"] {
        rekindle.does(&format!("restore base --name {name} --paused --no-replay"))?;
    }
    rekindle.does("resume this")?;
    rekindle.does("resume that")?;
    one_runs_out(rekindle)
}

/// One of the two ends at least, with the reason.
fn one_runs_out(rekindle: &Rekindle) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let mut left = rekindle.vms()?;
        left.retain(|vm| vm["name"] == "this" || vm["name"] == "that");
        let failed = left.iter().filter(|vm| vm["state"] == "failed");
        let failed: Vec<_> = failed.collect();
        for vm in &failed {
            let why = vm["why"]["exit"].as_str().context("a reason")?;
            ensure!(why.contains("no huge page left"), "{vm}");
        }
        if !failed.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "both run: {left:?}");
        sleep(Duration::from_millis(20));
    }
}
