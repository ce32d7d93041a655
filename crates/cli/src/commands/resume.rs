//! `rekindle resume`.

use anyhow::Result;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::record::Record;

use super::Context;
use crate::monitor::client;
use crate::monitor::protocol;

/// Lets a paused VM run on
#[derive(Debug, clap::Args)]
pub(crate) struct Resume {
    /// The VM
    vm: VmName,
}

impl Resume {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        client::tell::<Record>(&engine, &self.vm, &dir, protocol::RESUME, None::<&()>)?;
        Ok(())
    }
}
