//! `rekindle bench takeover`.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::dir::PAGER_STATE;
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::{Engine, Vm};
use rekindle_firecracker::ProcessId;
use rekindle_pager::Live;
use serde::Serialize;

use super::super::{Context, block_on};
use super::raw::micros;
use super::stats::{Samples, Spread};
use crate::output;

/// How long a guest waits when its page server is killed: from SIGKILL to the next page that somebody waited for
///
/// Every round restores a copy, kills its page server while the guest goes through its memory for the first time, and
/// watches what the page servers keep for each other. The snapshot's guest has to touch memory all the time.
#[derive(Debug, clap::Args)]
pub(crate) struct Takeover {
    /// The snapshot to restore, by name or id
    snapshot: String,
    /// How many rounds
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The first kill comes so long after the restore, and each of the others a bit later, up to twice that.
const HEAD_START: Duration = Duration::from_millis(5);
/// How often the page servers' counts are looked at.
const LOOK: Duration = Duration::from_micros(20);
/// A guest that waits longer than that waits for ever, or has all its memory.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Report {
    rounds: u32,
    /// From SIGKILL until the successor has the VM, in microseconds.
    taken_over_us: Spread,
    /// From SIGKILL until a page is in place that the guest waited for, in microseconds.
    first_page_us: Spread,
    first_page_p99_us: f64,
}

/// What one kill costs, in microseconds.
struct Gap {
    taken_over: f64,
    first_page: f64,
}

impl Takeover {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        let engine = context.engine()?;
        let snapshot = engine.snapshot(&self.snapshot)?;
        let (mut taken_over, mut first_page) = (Samples::default(), Samples::default());
        // One round that is not counted warms caches.
        for round in 0..=self.rounds {
            let gap = block_on(one_round(&engine, &snapshot, round))?;
            if round > 0 {
                taken_over.push(gap.taken_over);
                first_page.push(gap.first_page);
            }
        }
        let report = Report {
            rounds: self.rounds,
            taken_over_us: taken_over.spread(),
            first_page_us: first_page.spread(),
            first_page_p99_us: first_page.summary().p99_us,
        };
        if self.json {
            return output::json(&report);
        }
        report.print(taken_over.summary().p99_us)
    }
}

async fn one_round(engine: &Engine, snapshot: &Snapshot, round: u32) -> Result<Gap> {
    let name = format!("bench-{}-{round}", std::process::id()).parse()?;
    let config = RestoreConfig::new(name).no_replay();
    let vm = engine.restore(snapshot, config).await?;
    let pager = vm.record().pager.context("a page server")?;
    let live = Live::open(&vm.dir().file(PAGER_STATE))?;
    // On a thread of its own: this one starts the successor.
    let measured =
        tokio::task::spawn_blocking(move || kill_and_watch(&pager, &live, round)).await?;
    finish(vm, measured).await
}

async fn finish(vm: Vm, measured: Result<Gap>) -> Result<Gap> {
    vm.remove().await?;
    measured
}

fn kill_and_watch(pager: &ProcessId, live: &Live, round: u32) -> Result<Gap> {
    sleep(HEAD_START + HEAD_START * (round % 16) / 16);
    let pidfd = pager.open_pidfd()?;
    let killed = Instant::now();
    pidfd.kill()?;
    while !pidfd.has_exited()? {
        sleep(LOOK);
    }
    let waited_for = live.stats().demand;
    let taken_over = until(killed, || live.stats().takeovers > 0)?;
    let first_page = until(killed, || live.stats().demand > waited_for)?;
    Ok(Gap {
        taken_over,
        first_page,
    })
}

/// Microseconds from `begun` until something is so.
fn until(begun: Instant, is_so: impl Fn() -> bool) -> Result<f64> {
    while !is_so() {
        if begun.elapsed() > PATIENCE {
            bail!("no page was served in {PATIENCE:?}: does this guest touch memory all the time?");
        }
        sleep(LOOK);
    }
    Ok(micros(begun))
}

impl Report {
    fn print(&self, taken_over_p99: f64) -> Result<()> {
        let row = |what: &str, spread: &Spread, p99: f64| {
            let ms = |us: f64| format!("{:.2}", us / 1000.0);
            [
                what.to_owned(),
                ms(spread.median),
                ms(p99),
                ms(spread.min),
                ms(spread.max),
            ]
        };
        output::line(format!("{} kills, ms after SIGKILL", self.rounds))?;
        output::table(
            ["", "P50", "P99", "MIN", "MAX"],
            &[
                row("taken over", &self.taken_over_us, taken_over_p99),
                row("first page", &self.first_page_us, self.first_page_p99_us),
            ],
        )
    }
}
