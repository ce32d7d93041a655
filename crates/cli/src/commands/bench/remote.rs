//! `rekindle bench remote`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rekindle_engine::bucket::{self, Location, Patience};
use rekindle_engine::remote::{Remote, RemoteConfig};
use rekindle_engine::store::manifest::Kind;
use rekindle_engine::store::{Root, Snapshot};
use rekindle_engine::vm::config::BootConfig;
use rekindle_engine::vm::dir::{PAGER_STATE, SERIAL};
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::snapshot::SnapshotConfig;
use rekindle_engine::{Engine, Vm};
use rekindle_pager::{Live, Stats};
use serde::Serialize;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::super::{Context, block_on};
use super::deep::{DEPTH, deepened, parts};
use super::guest::{self, GATE, Guest};
use super::machine::Place;
use super::race::{Ratio, print_ratios};
use super::raw::micros;
use super::stats::{Samples, Spread};
use crate::output;

/// What a copy costs whose snapshot stays in an object store, beside a pull and a restore of the same
///
/// The guest is that of `rekindle bench replay`: 1 GiB, of which a pass changes one byte in 16,384 pages without
/// neighbours. All its other memory holds noise that nothing compresses. One copy runs here, so that the pages are
/// recorded; then the snapshot is pushed to the store, and to a directory of this host.
///
/// Every round begins with an empty state directory, and measures each of these once, in this order:
///
///   first copy         restored by the store's URL, from the request to the end of the guest's first pass
///   second copy        the same, beside the first one's cache
///   pull and restore   the same, after a whole pull, in another empty state directory
///
/// and then, of the pages that the guest waits for alone and with the recorded pages brought ahead:
///
///   raw, packed        restored from the unpacked snapshot, and from the packed one in the directory; once more as it was
///                      packed before anything was recorded, so that each page comes with neighbours that nobody wants
///   raw, 64 deep       the unpacked one, with its memory spread over a chain of 64, neighbours in different snapshots
///
/// Give it a store that takes some time for each request:
///
///   cargo run --release -p rekindle-e2e --example s3 -- target/release/rekindle bench remote s3://snapshots/bench
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Remotely {
    /// Where the snapshot is put, and stays: s3://bucket/prefix, gs://…, az://…
    store: Location,
    /// How many rounds
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Print JSON; times in microseconds
    #[arg(long)]
    json: bool,
    /// A smaller guest: how many pages a pass changes, a power of two
    #[arg(long, hide = true, default_value_t = 16_384)]
    pages: u32,
}

/// How long a guest may take for its first pass.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(1);
const CACHE_MIB: u64 = 4096;
const PAGE: u64 = 4096;

#[derive(Default)]
struct Table {
    first: Samples,
    second: Samples,
    pulled: Samples,
    fetched: Samples,
    requests: Samples,
    fetched_again: Samples,
    raw: Served,
    deep: Served,
    packed: Served,
    unlearnt: Served,
}

/// How pages come from this host, in microseconds.
#[derive(Default)]
struct Served {
    /// The page server's p50 and p99 of a fault, where nothing was brought ahead.
    fault: Samples,
    slow_fault: Samples,
    /// The first pass there.
    pass: Samples,
    /// When the working set was in place, where it was.
    by: Samples,
}

#[derive(Serialize)]
struct Report {
    rounds: u32,
    memory_mib: u32,
    set_bytes: u64,
    index_bytes: u64,
    /// From the request to the end of the first pass.
    first_copy_us: Spread,
    second_copy_us: Spread,
    pull_and_restore_us: Spread,
    /// What a first copy fetched of packs.
    fetched_bytes: Spread,
    fetched_requests: Spread,
    second_fetched_bytes: Spread,
    raw: ServedSpread,
    deep: ServedSpread,
    packed: ServedSpread,
    unlearnt: ServedSpread,
    ratios: Vec<Ratio>,
}

#[derive(Serialize)]
struct ServedSpread {
    fault_p50_us: Spread,
    fault_p99_us: Spread,
    pass_us: Spread,
    replayed_by_us: Option<Spread>,
}

impl Remotely {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        ensure!(self.rounds > 0, "--rounds 0 measures nothing");
        guest::check_pages(self.pages)?;
        let engine = context.engine()?;
        let place = Place::of(&engine)?;
        let guest = guest::scatter(self.pages, None);
        let report = block_on(self.measure(&engine, &place, &guest))?;
        match self.json {
            true => output::json(&report),
            false => report.print(),
        }
    }

    async fn measure(&self, engine: &Engine, place: &Place, guest: &Guest) -> Result<Report> {
        let at = |name: &str| -> Result<Engine> {
            let root = Root::open(place.dir().join(name))?;
            Ok(Engine::new(root, engine.programs().clone()))
        };
        let home = at("home")?;
        let packed = Location::Directory(place.dir().join("packed"));
        let unlearnt = Location::Directory(place.dir().join("unlearnt"));
        let waiting = output::waiting("a guest, its snapshot, and three pushes of it");
        let snapshot = take(&home, place, guest).await?;
        let id = snapshot.id().to_string();
        push(&home, &id, &unlearnt).await?;
        let deep = {
            let (home, flat) = (home.clone(), home.snapshot(&id)?);
            spawn_blocking(move || deepened(&home, &flat)).await??
        };
        // This one is recorded.
        copy(&home, &id, Instant::now(), Ahead::Nothing).await?;
        for store in [&packed, &self.store] {
            push(&home, &id, store).await?;
        }
        let index_bytes = std::fs::metadata(place.dir().join("packed/snapshots").join(&id))?.len();
        drop(waiting);

        let mut table = Table::default();
        for round in 1..=self.rounds {
            let _waiting = output::waiting(format!("round {round} of {}", self.rounds));
            let there = at("there")?;
            let first = remote_copy(&there, &self.store, &id, Ahead::Replay).await?;
            let second = remote_copy(&there, &self.store, &id, Ahead::Replay).await?;
            table.first.push(first.pass_us);
            table.fetched.push(float(first.stats.fetched_bytes));
            table.requests.push(float(first.stats.fetched_requests));
            table.second.push(second.pass_us);
            table.fetched_again.push(float(second.stats.fetched_bytes));
            std::fs::remove_dir_all(there.root().path())?;

            let there = at("there")?;
            let begun = Instant::now();
            pull(&there, &id, &self.store).await?;
            let pulled = copy(&there, &id, begun, Ahead::Replay).await?;
            table.pulled.push(pulled.pass_us);
            std::fs::remove_dir_all(there.root().path())?;

            let of = |ahead| copy(&home, &id, Instant::now(), ahead);
            table.raw.add(&of(Ahead::Nothing).await?);
            table.raw.add_replayed(&of(Ahead::Replay).await?)?;
            let waited = copy(&home, &deep, Instant::now(), Ahead::Nothing).await?;
            table.deep.add(&waited);
            let of = |ahead| remote_copy(&home, &packed, &id, ahead);
            table.packed.add(&of(Ahead::Nothing).await?);
            table.packed.add_replayed(&of(Ahead::Replay).await?)?;
            let waited = remote_copy(&home, &unlearnt, &id, Ahead::Nothing).await?;
            table.unlearnt.add(&waited);
        }
        Ok(self.report(&table, guest, index_bytes))
    }

    fn report(&self, table: &Table, guest: &Guest, index_bytes: u64) -> Report {
        let set_bytes = u64::from(guest.pages) * PAGE;
        let (mut all, mut sets) = (Samples::default(), Samples::default());
        for _ in 0..table.fetched.len() {
            all.push(float(index_bytes));
            sets.push(float(set_bytes));
        }
        let all = all.plus(&table.fetched);
        let ratios = vec![
            Ratio::of("bytes fetched, index and all / working set", &all, &sets).at_most(1.25),
            Ratio::of("first copy / pull and restore", &table.first, &table.pulled).at_most(0.2),
            Ratio::of("second copy / first copy", &table.second, &table.first),
            Ratio::of(
                "p50 of a fault, raw, in a chain / flat",
                &table.deep.fault,
                &table.raw.fault,
            ),
            Ratio::of(
                "p50 of a fault, packed / raw",
                &table.packed.fault,
                &table.raw.fault,
            )
            .at_most(4.0),
            Ratio::of(
                "p50 of a fault, packed, nothing recorded / raw",
                &table.unlearnt.fault,
                &table.raw.fault,
            )
            .at_most(4.0),
            Ratio::of(
                "the set in place, packed / raw",
                &table.packed.by,
                &table.raw.by,
            )
            .at_most(2.5),
        ];
        Report {
            rounds: self.rounds,
            memory_mib: guest.memory_mib,
            set_bytes,
            index_bytes,
            first_copy_us: table.first.spread(),
            second_copy_us: table.second.spread(),
            pull_and_restore_us: table.pulled.spread(),
            fetched_bytes: table.fetched.spread(),
            fetched_requests: table.requests.spread(),
            second_fetched_bytes: table.fetched_again.spread(),
            raw: table.raw.spread(),
            deep: table.deep.spread(),
            packed: table.packed.spread(),
            unlearnt: table.unlearnt.spread(),
            ratios,
        }
    }
}

/// What is brought before the guest asks.
#[derive(Clone, Copy)]
enum Ahead {
    Nothing,
    Replay,
}

/// A copy that has been through its first pass, and is gone.
struct Copy {
    /// From the request to the end of the pass.
    pass_us: f64,
    stats: Stats,
}

fn config(ahead: Ahead) -> Result<RestoreConfig> {
    let config = RestoreConfig::new("copy".parse()?);
    Ok(match ahead {
        Ahead::Nothing => config.no_replay(),
        // What is recorded stays as it is, so that every round has the same.
        Ahead::Replay => config.no_record(),
    })
}

async fn copy(engine: &Engine, id: &str, begun: Instant, ahead: Ahead) -> Result<Copy> {
    let snapshot = engine.snapshot(id)?;
    let vm = engine.restore(&snapshot, config(ahead)?).await?;
    first_pass(vm, begun, ahead).await
}

async fn remote_copy(engine: &Engine, store: &Location, id: &str, ahead: Ahead) -> Result<Copy> {
    let begun = Instant::now();
    let (root, remote) = (
        engine.root().clone(),
        RemoteConfig::new(format!("{store}/{id}")),
    );
    let remote = spawn_blocking(move || Remote::find(&root, remote)).await??;
    let vm = engine.restore_remote(remote, config(ahead)?).await?;
    first_pass(vm, begun, ahead).await
}

/// Waits for the end of the first pass, and of the replay if there is one, and ends the VM.
async fn first_pass(mut vm: Vm, begun: Instant, ahead: Ahead) -> Result<Copy> {
    let seen = watch(&mut vm, begun, ahead).await;
    vm.remove().await?;
    seen
}

async fn watch(vm: &mut Vm, begun: Instant, ahead: Ahead) -> Result<Copy> {
    let pass_us = dot(vm, begun).await?;
    let live = Live::open(&vm.dir().file(PAGER_STATE))?;
    while matches!(ahead, Ahead::Replay) && live.stats().replayed_by_us.is_none() {
        ensure!(begun.elapsed() < PATIENCE, "the replay does not end");
        sleep(LOOK).await;
    }
    let stats = live.stats();
    Ok(Copy { pass_us, stats })
}

/// Microseconds from `begun` until the guest has been through its pages.
async fn dot(vm: &Vm, begun: Instant) -> Result<f64> {
    let serial = vm.dir().file(SERIAL);
    loop {
        if std::fs::metadata(&serial).is_ok_and(|file| file.len() > 0) {
            return Ok(micros(begun));
        }
        ensure!(
            begun.elapsed() < PATIENCE && vm.state().is_alive(),
            "the guest did not go through its memory: {:?}",
            vm.record().state
        );
        sleep(LOOK).await;
    }
}

async fn push(engine: &Engine, id: &str, store: &Location) -> Result<()> {
    let (engine, id) = (engine.clone(), id.to_owned());
    let repository = bucket::repository(store, Patience::default())?;
    spawn_blocking(move || {
        let tip = engine.snapshot(&id)?;
        repository.push(engine.store(), tip, None, &|_| {})?;
        Ok(())
    })
    .await?
}

async fn pull(engine: &Engine, id: &str, store: &Location) -> Result<()> {
    let (engine, id) = (engine.clone(), id.to_owned());
    let repository = bucket::repository(store, Patience::default())?;
    let cache = bucket::cache(engine.root(), store, CACHE_MIB)?;
    spawn_blocking(move || {
        repository.pull(engine.store(), &id, None, cache.as_ref(), &|_| {})?;
        Ok(())
    })
    .await?
}

/// A snapshot of the guest before its open gate, with noise wherever it has nothing.
async fn take(engine: &Engine, place: &Place, guest: &Guest) -> Result<Snapshot> {
    let kernel = place.dir().join("scatter.elf");
    std::fs::write(&kernel, &guest.elf)?;
    let config = BootConfig::new("original".parse()?, kernel).memory_mib(guest.memory_mib);
    let mut vm = engine.boot(config).await?;
    dot(&vm, Instant::now()).await?;
    let shut = vm.snapshot(SnapshotConfig::full()).await?;
    vm.remove().await?;
    let engine = engine.clone();
    spawn_blocking(move || opened(&engine, &shut)).await?
}

fn opened(engine: &Engine, shut: &Snapshot) -> Result<Snapshot> {
    let draft = engine.store().begin(None)?;
    std::fs::copy(shut.vmstate_path(), draft.vmstate_path())?;
    std::fs::copy(shut.memory_path(), draft.memory_path())?;
    let memory = File::options().write(true).open(draft.memory_path())?;
    memory.write_all_at(&[1], GATE.into())?;
    fill_with_noise(&memory)?;
    Ok(draft.publish(parts(shut.manifest(), Kind::Full))?)
}

/// From 32 MiB on, where no code is: xorshift, which no compressor knows.
fn fill_with_noise(memory: &File) -> Result<()> {
    const FROM: u64 = 32 << 20;
    const PIECE: usize = 1 << 20;
    let (mut x, mut at) = (0x9e37_79b9_7f4a_7c15_u64, FROM);
    let (end, mut piece) = (memory.metadata()?.len(), Vec::with_capacity(PIECE));
    while at < end {
        piece.clear();
        while piece.len() < PIECE {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            piece.extend(x.to_le_bytes());
        }
        memory.write_all_at(&piece, at)?;
        at += u64::try_from(PIECE)?;
    }
    Ok(())
}

impl Served {
    /// Takes a copy for which nothing was brought ahead.
    fn add(&mut self, waited: &Copy) {
        self.fault.push(float(waited.stats.latency.p50_ns) / 1000.0);
        self.slow_fault
            .push(float(waited.stats.latency.p99_ns) / 1000.0);
        self.pass.push(waited.pass_us);
    }

    /// Takes one whose working set was.
    fn add_replayed(&mut self, replayed: &Copy) -> Result<()> {
        let by = replayed.stats.replayed_by_us;
        self.by.push(float(by.context("nothing was replayed")?));
        Ok(())
    }

    fn spread(&self) -> ServedSpread {
        ServedSpread {
            fault_p50_us: self.fault.spread(),
            fault_p99_us: self.slow_fault.spread(),
            pass_us: self.pass.spread(),
            replayed_by_us: (self.by.len() > 0).then(|| self.by.spread()),
        }
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        let ms = |spread: &Spread| {
            let [median, min, max] =
                [spread.median, spread.min, spread.max].map(|us| format!("{:.0}", us / 1000.0));
            format!("{median} ({min} to {max})")
        };
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        output::line(format!(
            "scatter, {} MiB of noise, {} pages a pass; {} rounds, ms to the end of the first pass, median (min to max)",
            self.memory_mib,
            self.set_bytes / PAGE,
            self.rounds
        ))?;
        output::table(
            ["", "LOAD TO PASS", "MIB FETCHED", "REQUESTS"],
            &[
                [
                    "first copy".to_owned(),
                    ms(&self.first_copy_us),
                    mib(self.fetched_bytes.median),
                    format!("{:.0}", self.fetched_requests.median),
                ],
                [
                    "second copy".to_owned(),
                    ms(&self.second_copy_us),
                    mib(self.second_fetched_bytes.median),
                    String::new(),
                ],
                [
                    "pull and restore".to_owned(),
                    ms(&self.pull_and_restore_us),
                    String::new(),
                    String::new(),
                ],
            ],
        )?;
        output::line(format!(
            "beside that the index, {} MiB; the working set has {} MiB",
            mib(float(self.index_bytes)),
            mib(float(self.set_bytes))
        ))?;
        output::line("")?;
        let row = |name: &str, served: &ServedSpread| {
            let by = served.replayed_by_us.as_ref();
            [
                name.to_owned(),
                format!("{:.1}", served.fault_p50_us.median),
                format!("{:.1}", served.fault_p99_us.median),
                ms(&served.pass_us),
                by.map_or_else(|| "–".to_owned(), ms),
            ]
        };
        output::table(
            [
                "ON THIS HOST",
                "FAULT P50, US",
                "P99",
                "UNREPLAYED PASS",
                "SET IN PLACE",
            ],
            &[
                row("raw", &self.raw),
                row(&format!("raw, {DEPTH} deep"), &self.deep),
                row("packed", &self.packed),
                row("packed, nothing recorded", &self.unlearnt),
            ],
        )?;
        print_ratios(&self.ratios)
    }
}

/// A count of bytes or pages, as the statistics take it.
#[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}
