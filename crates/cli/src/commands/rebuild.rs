//! `rekindle snapshot rebuild`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::boot::check;
use rekindle_engine::vm::rebuild::{RebuildConfig, boot_config};

use super::restore::tap_override;
use super::{Context, fresh_name, parse_duration};
use crate::monitor::job::{Job, Task};
use crate::monitor::start;
use crate::output;

/// Boots a VM anew from what a snapshot says of it, with its disks as they were then
///
/// For a snapshot that another Firecracker or another host made, so that it cannot be restored. Its memory is not
/// used: the guest starts as after a power cut.
#[derive(Debug, clap::Args)]
pub(crate) struct Rebuild {
    /// The snapshot, by name or id
    snapshot: String,
    /// The new VM's name
    #[arg(long)]
    name: Option<VmName>,
    /// Boot this kernel, not the one that the snapshot says
    #[arg(long, value_name = "F")]
    kernel: Option<PathBuf>,
    /// Boot this initial RAM disk, not the one that the snapshot says
    #[arg(long, value_name = "F")]
    initrd: Option<PathBuf>,
    /// Put a network interface on this TAP device
    #[arg(long, value_name = "[ID=]TAP")]
    tap: Vec<String>,
    /// End the VM after this long (30s, 5m, 2h)
    #[arg(long, value_name = "T", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Print the VM's record as JSON
    #[arg(long)]
    json: bool,
}

impl Rebuild {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let engine = context.engine()?;
        let snapshot = engine.snapshot(&self.snapshot)?;
        // Its disks are copied from it.
        let _lease = snapshot.lease()?;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => fresh_name(&self.snapshot).parse()?,
        };
        let mut wanted = RebuildConfig::new(name.clone());
        wanted.kernel = self.kernel.map(std::path::absolute).transpose()?;
        wanted.initrd = self.initrd.map(std::path::absolute).transpose()?;
        wanted.ttl = self.ttl;
        for tap in &self.tap {
            wanted.taps.push(tap_override(tap, snapshot.manifest())?);
        }
        let config = boot_config(engine.root(), &snapshot, &wanted)?;
        check(&config)?;
        let job = Job::new(engine.programs().firecracker.clone(), Task::Boot(config));
        let record = start::start(&engine, &name, &job)?;
        if self.json {
            return output::json(&record);
        }
        output::line(name.as_str())
    }
}
