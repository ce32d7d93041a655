//! `rekindle pause`.

use anyhow::Result;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::record::Record;

use super::Context;
use crate::monitor::client;
use crate::monitor::protocol;

/// Stops a VM's virtual CPUs; memory and devices stay as they are
#[derive(Debug, clap::Args)]
pub(crate) struct Pause {
    /// The VM
    vm: VmName,
}

impl Pause {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        client::tell::<Record>(&engine, &self.vm, &dir, protocol::PAUSE, None::<&()>)?;
        Ok(())
    }
}
