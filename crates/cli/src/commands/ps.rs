//! `rekindle ps`.

use anyhow::Result;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::{Origin, Purpose, Record};
use serde::Serialize;

use super::Context;
use crate::monitor::truth::{Truth, look};
use crate::output;

/// Lists the VMs and their states
///
/// A VM whose monitor was killed is adopted, or its death is recorded, before it is listed.
#[derive(Debug, clap::Args)]
pub(crate) struct Ps {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Known(Box<Record>),
    Other {
        name: String,
        state: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

impl Ps {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        let mut entries = Vec::new();
        for name in VmDir::list(engine.root())? {
            // One that was removed meanwhile is not listed.
            let Ok(dir) = VmDir::open(engine.root(), &name) else {
                continue;
            };
            let name = name.clone();
            entries.push(match look(&engine, &name, &dir) {
                Ok(Truth::Known(record)) => Entry::Known(record),
                Ok(Truth::Starting) => Entry::Other {
                    name: name.to_string(),
                    state: "starting",
                    error: None,
                },
                Err(_) if !dir.path().exists() => continue,
                Err(e) => Entry::Other {
                    name: name.to_string(),
                    state: "unknown",
                    error: Some(format!("{e:#}")),
                },
            });
        }
        if self.json {
            return output::json(&entries);
        }
        let rows: Vec<_> = entries.iter().map(row).collect();
        output::table(
            ["NAME", "STATE", "VCPUS", "MEMORY", "FROM", "CREATED", "PID"],
            &rows,
        )
    }
}

fn row(entry: &Entry) -> [String; 7] {
    match entry {
        Entry::Known(record) => [
            record.name.to_string(),
            record.state.to_string(),
            record.machine.vcpus.to_string(),
            format!("{} MiB", record.machine.memory_mib),
            match &record.origin {
                Origin::Boot { kernel, .. } => kernel
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                Origin::Restore { snapshot, .. } if record.purpose == Purpose::Rehearsal => {
                    format!("rehearsal of {snapshot}")
                }
                Origin::Restore {
                    from: Some(url), ..
                } => url.clone(),
                Origin::Restore { snapshot, .. } => format!("snapshot {snapshot}"),
                _ => String::new(),
            },
            output::ago(record.created),
            record
                .firecracker
                .as_ref()
                .map_or_else(String::new, |id| id.pid.to_string()),
        ],
        Entry::Other { name, state, error } => {
            let said = error
                .as_ref()
                .map_or_else(|| (*state).to_owned(), |e| format!("{state}: {e}"));
            let none = String::new;
            [name.clone(), said, none(), none(), none(), none(), none()]
        }
    }
}
