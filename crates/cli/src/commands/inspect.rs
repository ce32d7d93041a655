//! `rekindle inspect`.

use anyhow::{Result, bail};
use rekindle_engine::Engine;
use rekindle_engine::net::Connection;
use rekindle_engine::store::manifest::Manifest;
use rekindle_engine::store::{Snapshot, VmName};
use rekindle_engine::vm::dir::{DirError, VmDir};
use rekindle_engine::vm::record::Record;
use rekindle_firecracker::ProcessId;
use serde::Serialize;

use super::Context;
use crate::monitor::truth::{Truth, look};
use crate::output;
use crate::page_server::{self, Report, WorkingSet};

/// Prints all that is known of a VM, or of a snapshot, as JSON
///
/// Of a VM: its record, and what its page server did so far. Of a snapshot: its manifest, and its
/// working set. Where both have the name it is the VM.
#[derive(Debug, clap::Args)]
pub(crate) struct Inspect {
    /// The VM, or a snapshot by name or id
    name: String,
    /// Print JSON (it is JSON anyway)
    #[arg(long)]
    json: bool,
}

/// A VM. Its page server stands beside the record, which names its process only.
#[derive(Serialize)]
struct OfVm {
    #[serde(flatten)]
    record: Box<Record>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pager: Option<Pager>,
    /// What there is of its network on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<Connection>,
}

/// A page server: who it is, as long as the VM lives, and what it did.
#[derive(Serialize)]
struct Pager {
    #[serde(flatten)]
    process: Option<ProcessId>,
    #[serde(flatten)]
    report: Option<Report>,
}

/// A snapshot.
#[derive(Serialize)]
struct OfSnapshot<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    #[serde(skip_serializing_if = "Option::is_none")]
    working_set: Option<WorkingSet>,
}

impl Inspect {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine_for_reading()?;
        let missing = match self.name.parse() {
            Ok(name) => match VmDir::open(engine.root(), &name) {
                Ok(dir) => return vm(&engine, &name, &dir),
                Err(e @ DirError::Missing { .. }) => anyhow::Error::from(e),
                Err(e) => return Err(e.into()),
            },
            Err(e) => anyhow::Error::new(e).context(format!("the name {:?}", self.name)),
        };
        match engine.store().resolve(&self.name) {
            Ok(_) => snapshot(&engine.snapshot(&self.name)?),
            Err(_) => bail!("{missing:#}; nor is there a snapshot of that name"),
        }
    }
}

fn vm(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<()> {
    match look(engine, name, dir)? {
        Truth::Known(mut record) => {
            let (process, report) = (record.pager.take(), page_server::report(dir));
            let is_known = process.is_some() || report.is_some();
            let pager = is_known.then_some(Pager { process, report });
            let network = Connection::read(dir)?;
            output::json(&OfVm {
                record,
                pager,
                network,
            })
        }
        Truth::Starting => bail!("{name} is still being started, or was killed while it was"),
    }
}

/// Prints a snapshot.
pub(crate) fn snapshot(snapshot: &Snapshot) -> Result<()> {
    output::json(&OfSnapshot {
        manifest: snapshot.manifest(),
        working_set: page_server::working_set(snapshot),
    })
}
