//! `rekindle bench exec`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rekindle_engine::Engine;
use rekindle_engine::agent::Exit;
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::restore::RestoreConfig;
use serde::Serialize;

use super::super::{Context, block_on, fresh_name};
use super::stats::{Samples, Spread};
use crate::output;

/// How long it takes until the first program in a copy of a snapshot has answered, and with what
///
/// Every round restores a copy, runs `true` in it through the guest's agent, and removes it.
///
///   START    Firecracker's process, until its API answers
///   LOAD     PUT /snapshot/load
///   RESUME   PATCH /vm
///   WAKE     from there until the agent was reached and has woken the copy up: its clock, random pool, names, hooks
///   CONNECT  from the call for the program until the agent has taken it
///   RUN      until the program has run and its exit status is here
///   TOTAL    from the request to restore to that status; what the others leave is checks and files
///
/// Times are milliseconds. The copies neither record nor replay a working set unless the snapshot has one.
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Exec {
    /// The snapshot, by name or id; its guest has an agent
    snapshot: String,
    /// How many rounds
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Print JSON; times in microseconds
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    rounds: u32,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    what: &'static str,
    #[serde(flatten)]
    micros: Spread,
}

const STEPS: [&str; 7] = ["START", "LOAD", "RESUME", "WAKE", "CONNECT", "RUN", "TOTAL"];

impl Exec {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        let engine = context.engine()?;
        let snapshot = engine.snapshot(&self.snapshot)?;
        let mut samples: [Samples; STEPS.len()] = Default::default();
        block_on(async {
            for _ in 0..self.rounds {
                let round = round(&engine, &snapshot).await?;
                for (samples, value) in samples.iter_mut().zip(round) {
                    samples.push(value);
                }
            }
            Ok(())
        })?;
        let rows = STEPS.iter().zip(&samples).map(|(what, samples)| Row {
            what,
            micros: samples.spread(),
        });
        let report = Report {
            rounds: self.rounds,
            rows: rows.collect(),
        };
        if self.json {
            return output::json(&report);
        }
        output::line(format!("{:8} {:>9} {:>9} {:>9}", "ms", "p50", "p10", "p90"))?;
        for row in &report.rows {
            let [p50, p10, p90] =
                [row.micros.median, row.micros.p10, row.micros.p90].map(|us| us / 1000.0);
            output::line(format!("{:8} {p50:9.2} {p10:9.2} {p90:9.2}", row.what))?;
        }
        Ok(())
    }
}

/// How long the steps of one round took, in microseconds.
async fn round(engine: &Engine, snapshot: &Snapshot) -> Result<[f64; STEPS.len()]> {
    let begun = Instant::now();
    let name = fresh_name("bench").parse()?;
    let vm = engine
        .restore(snapshot, RestoreConfig::new(name).no_record())
        .await?;
    let up = Instant::now();
    let process = vm.exec(["true"]).await?;
    let connecting = process.connecting();
    let exit = process.wait().await?;
    let (running, total) = (up.elapsed().saturating_sub(connecting), begun.elapsed());
    ensure!(exit == Exit::Status(0), "true ended with {exit:?}");
    let Record { timings, .. } = vm.record();
    vm.remove().await?;
    let recorded = [
        timings.api_us,
        timings.load_us,
        timings.start_us,
        timings.wake_us,
    ];
    let [start, load, resume, wake] =
        recorded.map(|us| Duration::from_micros(us.unwrap_or_default()));
    let steps = [start, load, resume, wake, connecting, running, total];
    Ok(steps.map(|step| step.as_secs_f64() * 1e6))
}
