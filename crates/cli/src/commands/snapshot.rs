//! `rekindle snapshot`: create, ls, inspect, verify, flatten, rm; rebuild is in `rebuild.rs`, push and pull in `travel.rs`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rekindle_engine::Engine;
use rekindle_engine::store::store::Listed;
use rekindle_engine::store::{SnapshotName, VmName};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::rehearse::{Ending, LONGEST, RehearseConfig, Rehearsed, check_machine};
use rekindle_engine::vm::snapshot::SnapshotKind;
use serde::Serialize;

use super::rebuild::Rebuild;
use super::travel::{Pull, Push};
use super::{Context, inspect};
use crate::monitor::job::{Job, Task};
use crate::monitor::protocol::{self, SnapshotAnswer, SnapshotRequest};
use crate::monitor::{client, start};
use crate::output;

/// Takes, lists, checks and removes snapshots
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Takes a snapshot of a VM, which afterwards is in the state it was in before
    Create(Create),
    /// Lists the snapshots; broken ones with what is wrong
    Ls(Ls),
    /// Prints a snapshot's manifest, and what is known of its working set, as JSON
    Inspect(One),
    /// Compares all contents of a snapshot, and of those it builds on, with their checksums
    Verify(One),
    Rebuild(Rebuild),
    /// Makes a Full snapshot of a Diff and all that it builds on, which stay
    Flatten(Flatten),
    Push(Push),
    Pull(Pull),
    /// Removes snapshots; refused while a VM or another snapshot needs them
    Rm(Rm),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// The VM
    vm: VmName,
    /// A name for the snapshot
    #[arg(long, value_name = "S")]
    name: Option<SnapshotName>,
    /// Only what changed since the VM's last snapshot; the VM must track dirty pages
    #[arg(long)]
    diff: bool,
    /// How long the guest's agent may take to have the file systems stand still, or "off"
    #[arg(long, value_name = "SECONDS|off", default_value = "2", value_parser = parse_quiesce)]
    quiesce: u64,
    /// Then run a throw-away copy for so long, 10 at the most, so that the first restore is fast
    ///
    /// What the copy touches becomes the snapshot's working set. It is cut off from every network,
    /// for which a VM with network interfaces needs root.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "10",
        value_parser = clap::value_parser!(u64).range(1..=LONGEST.as_secs()),
    )]
    rehearse: Option<u64>,
    /// The copy has run long enough when its guest prints TEXT to the serial console, within a line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "rehearse",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    ready_on: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Ls {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// The snapshot, by name or id
    snapshot: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Flatten {
    /// The Diff snapshot, by name or id
    snapshot: String,
    /// A name for the new snapshot
    #[arg(long, value_name = "N")]
    name: Option<SnapshotName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Rm {
    /// The snapshots, by name or id
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

impl Verb {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        match self {
            Verb::Create(create) => create.run(context),
            Verb::Ls(ls) => ls.run(context),
            Verb::Inspect(one) => {
                let engine = context.engine_for_reading()?;
                inspect::snapshot(&engine.snapshot(&one.snapshot)?)
            }
            Verb::Verify(one) => one.verify(context),
            Verb::Rebuild(rebuild) => rebuild.run(context),
            Verb::Flatten(flatten) => flatten.run(context),
            Verb::Push(push) => push.run(context),
            Verb::Pull(pull) => pull.run(context),
            Verb::Rm(rm) => rm.run(context),
        }
    }
}

impl Create {
    fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        // Before anything is done: there must be one that can run the copy.
        let rehearsal = self.rehearsal(context)?;
        let kind = if self.diff {
            SnapshotKind::Diff
        } else {
            SnapshotKind::Full
        };
        let request = SnapshotRequest {
            kind,
            name: self.name.clone(),
            quiesce_ms: self.quiesce,
        };
        let waiting = output::waiting(format!("writing, hashing and publishing {}", self.vm));
        let answer: SnapshotAnswer =
            client::tell(&engine, &self.vm, &dir, protocol::SNAPSHOT, Some(&request))?;
        drop(waiting);
        let rehearsal = rehearsal
            .map(|(engine, config)| rehearse(&engine, &answer.id, config))
            .transpose()
            .with_context(|| {
                let id = &answer.id;
                format!("the snapshot {id} is taken, but could not be rehearsed")
            })?;
        if self.json {
            return output::json(&Created { answer, rehearsal });
        }
        let name = self
            .name
            .map_or_else(String::new, |name| format!("  {name}"));
        output::line(format!(
            "{}{name}  paused {}, done in {}{}",
            answer.id,
            output::millis(answer.paused_us),
            output::millis(answer.total_us),
            rehearsal.as_ref().map_or_else(String::new, told)
        ))
    }

    fn rehearsal(&self, context: &Context) -> Result<Option<(Engine, RehearseConfig)>> {
        let Some(seconds) = self.rehearse else {
            return Ok(None);
        };
        let engine = context.engine()?;
        let dir = VmDir::open(engine.root(), &self.vm)?;
        check_machine(&Record::read(&dir)?.machine).context("the copy cannot be run")?;
        let mut config = RehearseConfig::new().limit(Duration::from_secs(seconds));
        config.ready_on = self.ready_on.clone();
        Ok(Some((engine, config)))
    }
}

/// Milliseconds; 0 for none.
fn parse_quiesce(text: &str) -> Result<u64, String> {
    if text == "off" {
        return Ok(0);
    }
    match super::parse_duration(text) {
        Ok(limit) if !limit.is_zero() => {
            u64::try_from(limit.as_millis()).map_err(|error| error.to_string())
        }
        _ => Err(format!("{text:?} is neither like 2 or 30s, nor off")),
    }
}

/// What a snapshot that was taken comes to.
#[derive(Serialize)]
struct Created {
    #[serde(flatten)]
    answer: SnapshotAnswer,
    #[serde(skip_serializing_if = "Option::is_none")]
    rehearsal: Option<Rehearsed>,
}

/// Runs a throw-away copy, which has a monitor of its own: it ends and is cleared away also when this process is killed.
fn rehearse(engine: &Engine, snapshot: &str, config: RehearseConfig) -> Result<Rehearsed> {
    let name = config.name.clone();
    let until = match &config.ready_on {
        Some(text) => format!("until it prints {text:?}, "),
        None => String::new(),
    };
    let task = Task::Rehearse {
        snapshot: snapshot.to_owned(),
        config: config.clone(),
    };
    let job = Job::new(engine.programs().firecracker.clone(), task);
    let _waiting = output::waiting(format!(
        "running a throw-away copy, {until}{} s at the most",
        config.limit.as_secs()
    ));
    start::begin(engine, &name, &job)?.rehearsed()
}

fn told(rehearsed: &Rehearsed) -> String {
    let why = match rehearsed.ended {
        Ending::Ready => "until it was ready",
        Ending::TimeIsUp => "until its time was up",
        Ending::GuestEnded => "until it shut itself down",
    };
    format!(
        "; rehearsed for {}, {why}: {} pages, {}",
        output::millis(rehearsed.ran_us),
        rehearsed.pages,
        output::size(rehearsed.bytes)
    )
}

#[derive(Serialize)]
struct Row {
    id: String,
    name: Option<String>,
    kind: Option<String>,
    created: Option<jiff::Timestamp>,
    memory_mib: Option<u32>,
    /// What the directory takes on disk, in bytes.
    bytes_on_disk: u64,
    error: Option<String>,
}

impl Ls {
    fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        let rows: Vec<Row> = engine.store().list()?.iter().map(row).collect();
        if self.json {
            return output::json(&rows);
        }
        let cells: Vec<_> = rows
            .iter()
            .map(|row| {
                let kind = match &row.error {
                    Some(error) => format!("broken: {error}"),
                    None => row.kind.clone().unwrap_or_default(),
                };
                [
                    row.id.clone(),
                    row.name.clone().unwrap_or_default(),
                    kind,
                    row.memory_mib
                        .map_or_else(String::new, |mib| format!("{mib} MiB")),
                    output::size(row.bytes_on_disk),
                    row.created.map_or_else(String::new, output::ago),
                ]
            })
            .collect();
        output::table(
            ["ID", "NAME", "KIND", "MEMORY", "ON DISK", "CREATED"],
            &cells,
        )
    }
}

fn row(listed: &Listed) -> Row {
    match listed {
        Listed::Whole(snapshot) => {
            let manifest = snapshot.manifest();
            Row {
                id: snapshot.id().to_string(),
                name: manifest.name.as_ref().map(ToString::to_string),
                kind: Some(match manifest.parent() {
                    None => "full".to_owned(),
                    Some(parent) => format!("diff on {parent}"),
                }),
                created: Some(manifest.created),
                memory_mib: Some(manifest.machine.mem_mib),
                bytes_on_disk: on_disk(snapshot.dir()),
                error: None,
            }
        }
        Listed::Broken(broken) => Row {
            id: broken.id.to_string(),
            name: broken.name.as_ref().map(ToString::to_string),
            kind: None,
            created: None,
            memory_mib: None,
            bytes_on_disk: on_disk(&broken.dir),
            error: Some(format!("{:#}", anyhow::anyhow!(broken.reason.to_string()))),
        },
    }
}

/// What a directory and those in it take, by their blocks: holes take nothing.
fn on_disk(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok().map(|meta| (entry.path(), meta)))
        .map(|(path, meta)| {
            if meta.is_dir() {
                on_disk(&path)
            } else {
                meta.blocks() * 512
            }
        })
        .sum()
}

impl One {
    fn verify(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        let layers = engine.store().chain(engine.snapshot(&self.snapshot)?)?;
        let waiting = output::waiting(format!("reading {} layers", layers.len()));
        for layer in &layers {
            layer
                .verify()
                .with_context(|| format!("snapshot {} is damaged", layer.id()))?;
        }
        drop(waiting);
        if self.json {
            let ids: Vec<String> = layers.iter().map(|layer| layer.id().to_string()).collect();
            return output::json(&serde_json::json!({ "verified": ids }));
        }
        output::line(format!(
            "{} is whole ({} layers)",
            self.snapshot,
            layers.len()
        ))
    }
}

impl Flatten {
    fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        let tip = engine.snapshot(&self.snapshot)?;
        let waiting = output::waiting(format!("verifying and flattening {}", self.snapshot));
        let flat = engine.store().flatten(tip, self.name, |_| {})?;
        drop(waiting);
        if self.json {
            return output::json(&serde_json::json!({ "id": flat.id() }));
        }
        output::line(flat.id().to_string())
    }
}

impl Rm {
    fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        for key in &self.snapshots {
            // By its id alone: what is broken can be removed, too.
            let id = engine.store().resolve(key)?;
            engine.store().remove(id)?;
        }
        Ok(())
    }
}
