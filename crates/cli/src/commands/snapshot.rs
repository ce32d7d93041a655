//! `rekindle snapshot`: create, ls, inspect, verify, rm.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context as _, Result};
use rekindle_engine::store::store::Listed;
use rekindle_engine::store::{SnapshotName, VmName};
use rekindle_engine::vm::snapshot::SnapshotKind;
use serde::Serialize;

use super::{Context, inspect};
use crate::monitor::client;
use crate::monitor::protocol::{self, SnapshotAnswer, SnapshotRequest};
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
            Verb::Rm(rm) => rm.run(context),
        }
    }
}

impl Create {
    fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        let kind = if self.diff {
            SnapshotKind::Diff
        } else {
            SnapshotKind::Full
        };
        let request = SnapshotRequest {
            kind,
            name: self.name.clone(),
        };
        let waiting = output::waiting(format!("writing, hashing and publishing {}", self.vm));
        let answer: SnapshotAnswer =
            client::tell(&engine, &self.vm, &dir, protocol::SNAPSHOT, Some(&request))?;
        drop(waiting);
        if self.json {
            return output::json(&answer);
        }
        let name = self
            .name
            .map_or_else(String::new, |name| format!("  {name}"));
        output::line(format!(
            "{}{name}  paused {}, done in {}",
            answer.id,
            output::millis(answer.paused_us),
            output::millis(answer.total_us)
        ))
    }
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
