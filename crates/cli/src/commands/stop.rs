//! `rekindle stop`.

use anyhow::Result;
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::STOP_GRACE;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_engine::vm::stop::stop_unowned;

use super::{Context, block_on};
use crate::monitor::client::{self, Killed};
use crate::monitor::protocol::{self, StopRequest};
use crate::monitor::truth::{Truth, look};
use crate::output;

/// Ends a VM: the guest gets Ctrl-Alt-Del, time, then SIGKILL
///
/// A paused guest cannot shut itself down and is killed at once. The VM's directory stays, with its serial
/// output and log, until `rekindle rm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Stop {
    /// The VM
    vm: VmName,
    /// How many seconds the guest gets to shut itself down; 0 kills it at once
    #[arg(long, value_name = "SECONDS", default_value_t = STOP_GRACE.as_secs())]
    grace: u64,
}

impl Stop {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        if let Truth::Known(record) = look(&engine, &self.vm, &dir)?
            && record.state.is_over()
        {
            return Ok(());
        }
        if self.grace == 0 {
            return kill(&engine, &self.vm, &dir);
        }
        let _waiting = output::waiting(format!("asking {} to shut down", self.vm));
        let request = StopRequest {
            grace_ms: self.grace.saturating_mul(1000),
        };
        client::tell::<Record>(&engine, &self.vm, &dir, protocol::STOP, Some(&request))?;
        Ok(())
    }
}

/// Kills a VM, whatever its monitor is doing.
fn kill(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<()> {
    if client::kill(engine, name, dir)? == Killed::Overruled {
        block_on(async { Ok(stop_unowned(dir.clone()).await?) })?;
    }
    Ok(())
}
