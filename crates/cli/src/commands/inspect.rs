//! `rekindle inspect`.

use anyhow::{Result, bail};
use rekindle_engine::store::VmName;

use super::Context;
use crate::monitor::truth::{Truth, look};
use crate::output;

/// Prints all that is known of a VM, as JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Inspect {
    /// The VM
    vm: VmName,
    /// Print JSON (it is JSON anyway)
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        match look(&engine, &self.vm, &dir)? {
            Truth::Known(record) => output::json(&record),
            Truth::Starting => bail!(
                "{} is still being started, or was killed while it was",
                self.vm
            ),
        }
    }
}
