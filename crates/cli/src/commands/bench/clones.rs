//! `rekindle bench clones`.

mod flock;
mod original;

use std::time::Instant;

use anyhow::{Result, ensure};
use rekindle_engine::Engine;
use rekindle_engine::net;
use rekindle_engine::net::plan::Nat;
use rekindle_engine::net::policy::Policy;
use rekindle_engine::store::{Snapshot, VmName};
use rekindle_engine::vm::config::Isolation;
use rekindle_engine::vm::restore::RestoreConfig;
use serde::Serialize;

use self::flock::Flock;
use self::original::Originals;
use super::super::{Context, block_on};
use super::raw::micros;
use super::stats::{Samples, Spread, Summary};
use crate::output;

/// Many clones of a snapshot at once, with and without a network and a jail, and what one of each costs
///
/// The guest is a built-in one of a few dozen instructions, which runs on any KVM, paravirtual ones included: it
/// changes a byte in each of 256 pages, 1 MiB, prints a dot and halts. Its snapshot is taken right before that.
///
/// First, one at a time: every round restores one clone of each kind, in turn, through the library, and removes it.
/// RESTORE is the whole call; MORE is what it took more than the kind without network and jail in the same round.
///
/// Then, so many at once, each as rekindle restore starts it, with keeper, monitor and page server:
///
///   RESTORE   one clone, from its request to the running guest, as its monitor saw it
///   RUNNING   from the first request until the last clone ran
///   TOUCHED   from the first request until the last clone had printed its dot
///   KIB       Private_Dirty of keeper, monitor and page server of a clone, when all rest; the most in brackets
///   REMOVED   how long it took to end and remove them, one after the other
///
/// Networks and jails take root, and networks a host that forwards; without, only the other kinds are measured.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Clones {
    /// How many at once
    #[arg(long, default_value_t = 200)]
    count: u32,
    /// How many rounds of one at a time
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Print JSON; times in microseconds
    #[arg(long)]
    json: bool,
}

/// How a clone is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    what: &'static str,
    network: bool,
    jail: bool,
}

/// The first is what the others are compared with.
const KINDS: [Kind; 4] = [
    Kind {
        what: "plain",
        network: false,
        jail: false,
    },
    Kind {
        what: "network",
        network: true,
        jail: false,
    },
    Kind {
        what: "jail",
        network: false,
        jail: true,
    },
    Kind {
        what: "network, jail",
        network: true,
        jail: true,
    },
];

#[derive(Serialize)]
struct Report {
    rounds: u32,
    one: Vec<One>,
    count: u32,
    at_once: Vec<AtOnce>,
}

/// One at a time.
#[derive(Serialize)]
struct One {
    what: &'static str,
    restore: Summary,
    /// What it took more than the first kind in the same round.
    more_us: Spread,
}

/// Many at once.
#[derive(Serialize)]
struct AtOnce {
    what: &'static str,
    failed: usize,
    restore: Summary,
    running_us: f64,
    touched_us: f64,
    /// Of the processes of one clone.
    private_dirty_kib: Spread,
    removed_us: f64,
}

impl Clones {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        ensure!(self.count > 0, "--count 0 measures nothing");
        let engine = context.engine()?;
        let kinds = kinds()?;
        let originals = Originals::take(&engine, kinds.iter().any(|kind| kind.network))?;
        let one = block_on(one_at_a_time(&engine, &originals, &kinds, self.rounds))?;
        let mut at_once = Vec::new();
        for kind in &kinds {
            let flock = Flock::start(&engine, originals.of(*kind), *kind, self.count)?;
            at_once.push(flock.measure()?);
        }
        let report = Report {
            rounds: self.rounds,
            one,
            count: self.count,
            at_once,
        };
        if self.json {
            return output::json(&report);
        }
        report.print()
    }
}

/// What can be measured here. Says on standard error what cannot.
fn kinds() -> Result<Vec<Kind>> {
    let mut kinds = KINDS.to_vec();
    if let Err(e) = net::probe() {
        output::say(format_args!(
            "without networks: {:#}",
            anyhow::Error::from(e)
        ));
        kinds.retain(|kind| !kind.network);
    }
    if !rustix::process::geteuid().is_root() {
        output::say("without jails: they take root");
        kinds.retain(|kind| !kind.jail);
    }
    Ok(kinds)
}

impl Kind {
    fn config(self, name: VmName) -> RestoreConfig {
        let isolation = match self.jail {
            true => Isolation::Jailed,
            false => Isolation::None,
        };
        let mut config = RestoreConfig::new(name).no_record().isolation(isolation);
        if self.network {
            config = config.network(Nat::new(Policy::default()));
        }
        config
    }
}

/// A name that no other run takes.
fn name(n: u32) -> Result<VmName> {
    Ok(format!("bench-{}-{n}", std::process::id()).parse()?)
}

async fn one_at_a_time(
    engine: &Engine,
    originals: &Originals,
    kinds: &[Kind],
    rounds: u32,
) -> Result<Vec<One>> {
    let mut samples = vec![Samples::default(); kinds.len()];
    // One round that is not counted warms caches.
    for round in 0..=rounds {
        for (kind, samples) in kinds.iter().zip(&mut samples) {
            let took = restore(engine, originals.of(*kind), *kind, round).await?;
            if round > 0 {
                samples.push(took);
            }
        }
    }
    let plain = &samples[0];
    let one = kinds.iter().zip(&samples).map(|(kind, samples)| One {
        what: kind.what,
        restore: samples.summary(),
        more_us: samples.less(plain).spread(),
    });
    Ok(one.collect())
}

async fn restore(engine: &Engine, snapshot: &Snapshot, kind: Kind, round: u32) -> Result<f64> {
    let begun = Instant::now();
    let vm = engine.restore(snapshot, kind.config(name(round)?)).await?;
    let took = micros(begun);
    vm.remove().await?;
    Ok(took)
}

impl Report {
    fn print(&self) -> Result<()> {
        let ms = |us: f64| format!("{:.1}", us / 1000.0);
        let both = |summary: &Summary| format!("{} / {}", ms(summary.p50_us), ms(summary.p99_us));
        output::line(format!(
            "one at a time, {} rounds, ms, p50 / p99",
            self.rounds
        ))?;
        let rows = self.one.iter().map(|one| {
            let more = &one.more_us;
            [
                one.what.to_owned(),
                both(&one.restore),
                format!("{} ({} to {})", ms(more.median), ms(more.p10), ms(more.p90)),
            ]
        });
        output::table(
            ["", "RESTORE", "MORE (P10 TO P90)"],
            &rows.collect::<Vec<_>>(),
        )?;
        output::line(format!("\n{} at once, ms", self.count))?;
        let rows = self.at_once.iter().map(|many| {
            let kib = &many.private_dirty_kib;
            [
                many.what.to_owned(),
                both(&many.restore),
                ms(many.running_us),
                ms(many.touched_us),
                format!("{:.0} ({:.0})", kib.median, kib.max),
                ms(many.removed_us),
                many.failed.to_string(),
            ]
        });
        output::table(
            [
                "", "RESTORE", "RUNNING", "TOUCHED", "KIB", "REMOVED", "FAILED",
            ],
            &rows.collect::<Vec<_>>(),
        )
    }
}
