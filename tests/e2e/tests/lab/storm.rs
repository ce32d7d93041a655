//! A balloon that never rests: beside it faults, replay, and page servers that are killed at random moments.
//!
//! ```text
//!   original ── a file, its checksums, and memory full of a mark, let go ──▶ snapshot, rehearsed
//!      storm: the balloon up and down from the first moment on ──────────┐
//!      kills: the same, and SIGKILL for the page server; five a copy ────┤
//!                                                                        ▼
//!                every round of the guest was right; in a Full of it no page that the balloon took has the mark
//! ```
//!
//! `cargo xtask soak` plays it: `REKINDLE_BALLOON_STORM` says how many seconds the storm takes, `REKINDLE_BALLOON_KILLS`
//! how many page servers are killed, `REKINDLE_SEED` repeats a run. Without the first two nothing is played; in every run
//! of the tests the stories of `balloon.rs` do a little of both.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::SOON;
use rekindle_kit::dice::{Dice, setting};
use rekindle_kit::story::Story;
use rekindle_pager::{Live, Stats};
use rustix::process::{Pid, Signal, kill_process};

use crate::balloon::resize;
use crate::console::Linux;
use crate::marks::{leave, taken};
use crate::story;

/// One page server after the other may be killed so often within ten seconds.
const KILLS_OF_ONE: u64 = 5;
/// How much of the original's memory gets the mark, in MiB.
const MARKED: u32 = 64;
/// What the balloon takes at the most, in MiB.
const LARGEST: usize = 64;
/// The longest pause between two changes of mind, in milliseconds.
const PAUSE: usize = 800;

/// Files in memory whose checksums are known, and others that are only ever copies of them.
const FILL: &str = "mkdir /m; mount -t tmpfs -o size=80% m /m; cd /m; \
                    for i in 0 1 2 3; do dd if=/dev/urandom of=f$i bs=1M count=1 2>/dev/null; cp f$i g$i; done; \
                    md5sum f0 f1 f2 f3 > sums";

/// Reads all of both, makes the copy anew in memory that it has not had, and says how it was.
const ROUNDS: &str = "cd /m; while true; do said=right; md5sum -cs sums || said=WRONG; \
                      for i in 0 1 2 3; do cmp -s f$i g$i && cp f$i h && mv h g$i || said=WRONG; done; \
                      echo \"$said ro\"\"und\"; done &\n";

pub(crate) fn stories() -> Vec<Story> {
    let (seconds, kills) = (seconds(), kills());
    if seconds + kills == 0 {
        return Vec::new();
    }
    let limit = Duration::from_secs(600 + 2 * seconds + 60 * kills);
    let name = "a balloon in a storm, and page servers killed in it, leave no stale page";
    vec![story(name, storm).within(limit)]
}

fn seconds() -> u64 {
    setting("REKINDLE_BALLOON_STORM", 0)
}

fn kills() -> u64 {
    setting("REKINDLE_BALLOON_KILLS", 0)
}

/// What the page servers of all copies did.
#[derive(Debug, Default)]
struct Sum {
    copies: u64,
    takeovers: u64,
    faults: u64,
    replayed: u64,
    removed: u64,
    /// Pages with the mark that were removed, each counted once a copy.
    marked: usize,
    retries: u64,
    rounds: usize,
}

fn storm(linux: &Linux) -> anyhow::Result<()> {
    let mut dice = Dice::new();
    let seed = dice.seed();
    let mut sum = Sum::default();
    original(linux)?;
    if seconds() > 0 {
        let copy = Copy::of(linux, "storm")?;
        weather(&copy, &mut dice)
            .and_then(|()| copy.ends_right(0, &mut sum))
            .with_context(|| format!("in the storm, REKINDLE_SEED={seed}"))?;
    }
    let mut done = 0;
    while done < kills() {
        let of_this = KILLS_OF_ONE.min(kills() - done);
        let copy = Copy::of(linux, "struck")?;
        for _ in 0..of_this {
            done += 1;
            strike(&copy, &mut dice)
                .with_context(|| format!("kill {done}, REKINDLE_SEED={seed}"))?;
        }
        copy.ends_right(of_this, &mut sum)
            .with_context(|| format!("after kill {done}, REKINDLE_SEED={seed}"))?;
    }
    println!(
        "\nseed {seed}, storm {} s, kills {done}: {sum:?}",
        seconds()
    );
    Ok(())
}

/// The snapshot `marked`, whose working set has pages with the mark.
fn original(linux: &Linux) -> anyhow::Result<()> {
    linux.boots_with(192, "original", "--balloon 0")?;
    let line = format!("{FILL}; {}; echo filled", leave(MARKED));
    let said = linux.asks("original", &line)?;
    ensure!(said.contains("filled"), "{said}");
    linux.types("original", ROUNDS)?;
    linux.rekindle.follows("original")?.hears("right round")?;
    linux
        .rekindle
        .does("snapshot create original --name marked --rehearse=4")?;
    linux.rekindle.does("rm --force original")?;
    let snapshot = linux.rekindle.tells("snapshot inspect marked")?;
    let learnt = snapshot["working_set"]["pages"].as_u64();
    ensure!(learnt.is_some_and(|pages| pages > 0), "{snapshot}");
    Ok(())
}

/// The balloon changes its mind all the time, from the moment on in which the working set comes in.
fn weather(copy: &Copy<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds());
    while Instant::now() < end {
        copy.balloons(dice)?;
        sleep(Duration::from_millis(dice.up_to(PAUSE) as u64));
    }
    copy.goes_on()
}

/// Kills the page server at some moment of a balloon's move.
fn strike(copy: &Copy<'_>, dice: &mut Dice) -> anyhow::Result<()> {
    let before = copy.stats()?.takeovers;
    copy.balloons(dice)?;
    sleep(Duration::from_millis(dice.up_to(PAUSE) as u64));
    copy.kills_the_pager()?;
    // The guest may need nobody for a while.
    let deadline = Instant::now() + SOON;
    while copy.stats()?.takeovers == before {
        ensure!(Instant::now() < deadline, "nobody has taken over");
        sleep(Duration::from_millis(10));
    }
    copy.goes_on()
}

/// A restored copy of `marked`, one at a time.
struct Copy<'a> {
    linux: &'a Linux,
    name: &'static str,
}

impl Copy<'_> {
    fn of<'a>(linux: &'a Linux, name: &'static str) -> anyhow::Result<Copy<'a>> {
        linux
            .rekindle
            .does(&format!("restore marked --name {name}"))?;
        Ok(Copy { linux, name })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.linux.rekindle.vm(self.name).join(name)
    }

    fn live(&self) -> anyhow::Result<Live> {
        Ok(Live::open(&self.file("pager.state"))?)
    }

    fn stats(&self) -> anyhow::Result<Stats> {
        Ok(self.live()?.stats())
    }

    fn balloons(&self, dice: &mut Dice) -> anyhow::Result<()> {
        resize(self.linux, self.name, dice.up_to(LARGEST + 1) as u64)
    }

    /// Kills the page server that is written down, which has the VM.
    fn kills_the_pager(&self) -> anyhow::Result<()> {
        let server = i32::try_from(self.live()?.server())?;
        let server = Pid::from_raw(server).context("a page server")?;
        Ok(kill_process(server, Signal::KILL)?)
    }

    /// How many rounds the guest has told of. All were right.
    fn rounds(&self) -> anyhow::Result<usize> {
        let said = self.linux.rekindle.output(self.name)?;
        ensure!(
            !said.contains("WRONG"),
            "the guest read something wrong: {said}"
        );
        Ok(said.matches("right round").count())
    }

    /// Two rounds end from now on, so that one has also begun since; all were right.
    fn goes_on(&self) -> anyhow::Result<()> {
        let enough = self.rounds()? + 2;
        let mut guest = self.linux.rekindle.follows(self.name)?;
        for _ in 0..enough {
            guest.hears(" round")?;
        }
        self.rounds().map(drop)
    }

    /// Looks through all its memory, and at what is known of it, and removes it.
    fn ends_right(&self, kills: u64, sum: &mut Sum) -> anyhow::Result<()> {
        let rekindle = &self.linux.rekindle;
        let name = self.name;
        rekindle.does(&format!("pause {name}"))?;
        let removed = self.live()?.recently_removed();
        // It reads every page of the guest.
        rekindle.does(&format!("snapshot create {name} --name full"))?;
        let marked = taken(self.linux, "marked", "full", &removed)?;
        rekindle.does("snapshot rm full")?;
        rekindle.does(&format!("resume {name}"))?;
        self.goes_on()?;

        let vm = rekindle.tells(&format!("inspect {name}"))?;
        ensure!(vm["state"] == "running", "{vm}");
        ensure!(vm["pager"]["takeovers"] == kills, "{vm}");
        let stats = self.stats()?;
        ensure!(stats.replayed > 0, "{stats:?}");
        sum.copies += 1;
        sum.takeovers += stats.takeovers;
        sum.faults += stats.faults;
        sum.replayed += stats.replayed;
        sum.removed += stats.removed;
        sum.marked += marked;
        sum.retries += stats.retries;
        sum.rounds += self.rounds()?;
        rekindle.does(&format!("rm --force {name}"))?;
        Ok(())
    }
}
