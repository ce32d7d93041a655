//! `rekindle bench restore`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rekindle_engine::Engine;
use rekindle_engine::store::Snapshot;
use rekindle_engine::vm::config::{Backend, Isolation};
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_firecracker::Client;
use serde::Serialize;

use super::super::{Context, block_on, this_program};
use super::floor::{self, Steps};
use super::machine::Place;
use super::memory::{PrivateDirty, private_dirty};
use super::raw::{Raw, micros};
use super::stats::{Samples, Summary};
use crate::output;

/// How long a restore takes: our library beside the bare requests and the File backend, and the command as a person calls it
///
/// Every round measures each once, in turn, so that what drifts in the machine hits all alike; ratios are
/// medians of ratios within a round. The floor sends the same requests as fixed bytes on a raw socket. The page
/// server is started beforehand in both; what our library does before is in its whole call.
#[derive(Debug, clap::Args)]
pub(crate) struct Restore {
    /// The snapshot to restore, by name or id
    snapshot: String,
    /// Another snapshot, to be compared: the same one flattened, or one that is larger
    #[arg(long, value_name = "SNAPSHOT")]
    beside: Option<String>,
    /// How many rounds
    #[arg(long, default_value_t = 50)]
    rounds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How long a page server may take to be ready.
const HEAD_START: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Table {
    floor: StepSamples,
    uffd: StepSamples,
    file: StepSamples,
    jailed: StepSamples,
    beside: StepSamples,
    command: Samples,
    command_jailed: Samples,
    keeper_kib: Samples,
    monitor_kib: Samples,
    pager_kib: Samples,
    client_call: Samples,
    raw_call: Samples,
}

#[derive(Default)]
struct StepSamples {
    api: Samples,
    load: Samples,
    resume: Samples,
    total: Samples,
    call: Samples,
}

#[derive(Serialize)]
struct Report {
    rounds: u32,
    floor: StepSummary,
    library_uffd: StepSummary,
    library_file: StepSummary,
    /// With a jail; absent where there can be none.
    #[serde(skip_serializing_if = "Option::is_none")]
    library_jailed: Option<StepSummary>,
    /// The other snapshot, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    library_beside: Option<StepSummary>,
    command: Summary,
    /// As it is unless `--no-jail` is said; absent where there can be no jail.
    #[serde(skip_serializing_if = "Option::is_none")]
    command_jailed: Option<Summary>,
    /// Median of the library's total divided by the floor's.
    library_over_floor: f64,
    /// Median of the library's total with the File backend divided by that with UFFD.
    file_over_uffd: f64,
    /// Median of the whole call with a jail less that without, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    jail_adds_us: Option<f64>,
    /// Median of the snapshot's load divided by the other one's.
    #[serde(skip_serializing_if = "Option::is_none")]
    load_over_beside: Option<f64>,
    /// Median of the command's time less the library's, in microseconds.
    command_less_library_us: f64,
    /// Median `Private_Dirty` of each of our processes right after the restore.
    keeper_private_dirty_kib: f64,
    monitor_private_dirty_kib: f64,
    pager_private_dirty_kib: f64,
    /// Median of a call through the client less the raw exchange, in microseconds.
    client_less_raw_us: f64,
}

#[derive(Serialize)]
struct StepSummary {
    api: Summary,
    load: Summary,
    resume: Summary,
    total: Summary,
    call: Summary,
}

impl Restore {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        let engine = context.engine()?;
        let snapshot = engine.snapshot(&self.snapshot)?;
        let beside = self.beside.as_deref().map(|other| engine.snapshot(other));
        let beside = beside.transpose()?;
        let mut table = Table::default();
        // One round that is not counted warms caches.
        for round in 0..=self.rounds {
            let measured = block_on(one_round(&engine, &snapshot, beside.as_ref(), round))?;
            if round > 0 {
                table.add(&measured);
            }
        }
        let report = table.report(self.rounds);
        if self.json {
            output::json(&report)
        } else {
            report.print()
        }
    }
}

struct Round {
    floor: Steps,
    uffd: Steps,
    file: Steps,
    jailed: Option<Steps>,
    beside: Option<Steps>,
    command: f64,
    command_jailed: Option<f64>,
    memory: PrivateDirty,
    client_call: f64,
    raw_call: f64,
}

async fn one_round(
    engine: &Engine,
    snapshot: &Snapshot,
    beside: Option<&Snapshot>,
    round: u32,
) -> Result<Round> {
    let programs = engine.programs();
    let place = Place::of(engine)?;
    let floor = floor::restore(
        &programs.firecracker,
        &programs.rekindle,
        snapshot,
        place.dir(),
    );
    drop(place);
    let config = || -> Result<RestoreConfig> {
        let name = format!("bench-{}-{round}", std::process::id()).parse()?;
        Ok(RestoreConfig::new(name).isolation(Isolation::None))
    };
    let uffd = library(engine, snapshot, config()?).await?;
    let file = library(engine, snapshot, config()?.backend(Backend::File)).await?;
    let jailed = match engine.check_jail() {
        Ok(()) => Some(library(engine, snapshot, config()?.isolation(Isolation::Jailed)).await?),
        Err(_) => None,
    };
    let beside = match beside {
        Some(other) => Some(library(engine, other, config()?).await?),
        None => None,
    };
    let (command, memory) = person(engine, snapshot, round, &["--no-jail"])?;
    let command_jailed = match jailed {
        Some(_) => Some(person(engine, snapshot, round, &[])?.0),
        None => None,
    };
    let (client_call, raw_call) = calls(engine, snapshot, round).await?;
    Ok(Round {
        floor: floor?,
        uffd,
        file,
        jailed,
        beside,
        command,
        command_jailed,
        client_call,
        raw_call,
        memory,
    })
}

/// What a program that links the library sees. The page server gets the same head start as the floor's.
async fn library(engine: &Engine, snapshot: &Snapshot, config: RestoreConfig) -> Result<Steps> {
    let begun = Instant::now();
    let prepared = engine.prepare(snapshot, config).await?;
    let preparing = micros(begun);
    // Nothing tells that it waits; it takes a tenth of this.
    std::thread::sleep(HEAD_START);
    let begun = Instant::now();
    let vm = prepared.start().await?;
    let call = preparing + micros(begun);
    let timings = vm.record().timings;
    vm.remove().await?;
    let step = |micros: Option<u64>| {
        micros.map_or(f64::NAN, |us| u32::try_from(us).map_or(f64::NAN, f64::from))
    };
    Ok(Steps {
        api: step(timings.api_us),
        load: step(timings.load_us),
        resume: step(timings.start_us),
        total: step(timings.spawn_to_guest_us),
        call,
    })
}

/// What a person sees: from the exec of `rekindle restore` to its end, when the guest runs.
fn person(
    engine: &Engine,
    snapshot: &Snapshot,
    round: u32,
    flags: &[&str],
) -> Result<(f64, PrivateDirty)> {
    let name = format!("bench-{}-{round}", std::process::id());
    let run = |args: &[&str]| -> Result<()> {
        let status = Command::new(this_program()?)
            .args(args)
            .arg("--root")
            .arg(engine.root().path())
            .env("REKINDLE_FIRECRACKER", &engine.programs().firecracker)
            .stdout(Stdio::null())
            .status()?;
        ensure!(
            status.success(),
            "rekindle {} failed: {status}",
            args.join(" ")
        );
        Ok(())
    };
    let id = snapshot.id().to_string();
    let begun = Instant::now();
    run(&[&["restore", &id, "--name", &name], flags].concat())?;
    let took = micros(begun);
    let memory = private_dirty(engine.root(), &name.parse()?);
    run(&["rm", "--force", &name])?;
    Ok((took, memory?))
}

/// One small call, through the client and as raw bytes, each the median of a hundred on a kept connection.
async fn calls(engine: &Engine, snapshot: &Snapshot, round: u32) -> Result<(f64, f64)> {
    let name = format!("bench-{}-{round}", std::process::id()).parse()?;
    let vm = engine
        .restore(snapshot, RestoreConfig::new(name).paused())
        .await?;
    let socket = vm.dir().file(rekindle_engine::vm::dir::API_SOCKET);
    let client = Client::new(&socket);
    let mut raw = Raw::to(&socket)?;
    client.describe().await?;
    let (mut through, mut bare) = (Samples::default(), Samples::default());
    for _ in 0..100 {
        let begun = Instant::now();
        client.describe().await?;
        through.push(micros(begun));
        let begun = Instant::now();
        raw.exchange(b"GET / HTTP/1.1\r\nHost: l\r\n\r\n")?;
        bare.push(micros(begun));
    }
    vm.remove().await?;
    Ok((through.summary().p50_us, bare.summary().p50_us))
}

impl Table {
    fn add(&mut self, round: &Round) {
        self.floor.add(round.floor);
        self.uffd.add(round.uffd);
        self.file.add(round.file);
        if let Some(jailed) = round.jailed {
            self.jailed.add(jailed);
        }
        if let Some(beside) = round.beside {
            self.beside.add(beside);
        }
        self.command.push(round.command);
        if let Some(jailed) = round.command_jailed {
            self.command_jailed.push(jailed);
        }
        self.keeper_kib.push(round.memory.keeper);
        self.monitor_kib.push(round.memory.monitor);
        self.pager_kib.push(round.memory.pager);
        self.client_call.push(round.client_call);
        self.raw_call.push(round.raw_call);
    }

    fn report(&self, rounds: u32) -> Report {
        Report {
            rounds,
            floor: self.floor.summary(),
            library_uffd: self.uffd.summary(),
            library_file: self.file.summary(),
            library_jailed: (self.jailed.call.len() > 0).then(|| self.jailed.summary()),
            library_beside: (self.beside.call.len() > 0).then(|| self.beside.summary()),
            load_over_beside: (self.beside.call.len() > 0)
                .then(|| self.uffd.load.ratio(&self.beside.load)),
            jail_adds_us: (self.jailed.call.len() > 0)
                .then(|| self.jailed.call.difference(&self.uffd.call)),
            command: self.command.summary(),
            command_jailed: (self.command_jailed.len() > 0).then(|| self.command_jailed.summary()),
            library_over_floor: self.uffd.total.ratio(&self.floor.total),
            file_over_uffd: self.file.total.ratio(&self.uffd.total),
            command_less_library_us: self.command.difference(&self.uffd.call),
            keeper_private_dirty_kib: self.keeper_kib.median(),
            monitor_private_dirty_kib: self.monitor_kib.median(),
            pager_private_dirty_kib: self.pager_kib.median(),
            client_less_raw_us: self.client_call.difference(&self.raw_call),
        }
    }
}

impl StepSamples {
    fn add(&mut self, steps: Steps) {
        self.api.push(steps.api);
        self.load.push(steps.load);
        self.resume.push(steps.resume);
        self.total.push(steps.total);
        self.call.push(steps.call);
    }

    fn summary(&self) -> StepSummary {
        StepSummary {
            api: self.api.summary(),
            load: self.load.summary(),
            resume: self.resume.summary(),
            total: self.total.summary(),
            call: self.call.summary(),
        }
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        let cell = |s: Summary| format!("{:.2} / {:.2}", s.p50_us / 1000.0, s.p99_us / 1000.0);
        let row = |what: &str, s: &StepSummary| {
            [
                what.to_owned(),
                cell(s.api),
                cell(s.load),
                cell(s.resume),
                cell(s.total),
                cell(s.call),
            ]
        };
        let none = String::new;
        output::line(format!("{} rounds, p50 / p99 in ms", self.rounds))?;
        let mut rows = vec![
            row("floor (raw, uffd)", &self.floor),
            row("library, uffd", &self.library_uffd),
            row("library, file", &self.library_file),
        ];
        if let Some(jailed) = &self.library_jailed {
            rows.push(row("library, uffd, jailed", jailed));
        }
        if let Some(beside) = &self.library_beside {
            rows.push(row("library, uffd, the other", beside));
        }
        let mut whole = |what: &str, call| {
            rows.push([what.to_owned(), none(), none(), none(), none(), cell(call)]);
        };
        whole("rekindle restore --no-jail", self.command);
        if let Some(jailed) = self.command_jailed {
            whole("rekindle restore", jailed);
        }
        output::table(
            [
                "",
                "SPAWN TO API",
                "LOAD",
                "RESUME",
                "SPAWN TO GUEST",
                "WHOLE CALL",
            ],
            &rows,
        )?;
        output::line(format!(
            "library / floor          {:.3}",
            self.library_over_floor
        ))?;
        output::line(format!(
            "file / uffd              {:.3}",
            self.file_over_uffd
        ))?;
        if let Some(ratio) = self.load_over_beside {
            output::line(format!("load / the other's       {ratio:.3}"))?;
        }
        if let Some(adds) = self.jail_adds_us {
            output::line(format!("jailed - not jailed      {:.2} ms", adds / 1000.0))?;
        }
        output::line(format!(
            "command - library        {:.2} ms",
            self.command_less_library_us / 1000.0
        ))?;
        output::line(format!(
            "client call - raw call   {:.0} us",
            self.client_less_raw_us
        ))?;
        output::line(format!(
            "private dirty memory     keeper {:.0}, monitor {:.0}, pager {:.0} KiB",
            self.keeper_private_dirty_kib,
            self.monitor_private_dirty_kib,
            self.pager_private_dirty_kib
        ))
    }
}
