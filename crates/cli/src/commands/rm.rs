//! `rekindle rm`.

use anyhow::Result;
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::adopt::end_workers_in;
use rekindle_engine::vm::dir::{Hold, VmDir};
use rekindle_engine::vm::state::{Ask, State, decide};

use super::{Context, block_on};
use crate::monitor::client::{self, Killed};
use crate::monitor::truth::{Truth, Watch, look};
use crate::monitor::watchers::{Farewell, end_watchers, watchers};

/// Removes VMs that have ended, with their disks, serial output and logs
#[derive(Debug, clap::Args)]
pub(crate) struct Rm {
    /// The VMs
    #[arg(required = true, value_name = "VM")]
    vms: Vec<VmName>,
    /// Kill those that still run; remove also what has no readable record
    #[arg(long, short)]
    force: bool,
}

impl Rm {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        for name in &self.vms {
            let (engine, dir) = context.vm(name)?;
            remove(&engine, name, &dir, self.force)?;
        }
        Ok(())
    }
}

/// How often others may start a monitor for a VM while it is removed.
const ROUNDS: usize = 8;

/// Removes one VM; kills it first if `force` says so.
pub(crate) fn remove(engine: &Engine, name: &VmName, dir: &VmDir, force: bool) -> Result<()> {
    let mut farewell = Farewell::None;
    match look(engine, name, dir) {
        Ok(Truth::Known(record)) if record.state.is_over() => farewell = Farewell::Answers,
        Ok(Truth::Known(record)) if record.state.is_alive() && force && Watch::is_kept(dir) => {
            // What still runs then is ended below.
            if let Ok(Killed::Asked) = client::kill(engine, name, dir) {
                farewell = Farewell::Answers;
            }
        }
        Ok(Truth::Known(record)) if !force && record.state != State::Configured => {
            decide(&record.state, Ask::Remove)?;
        }
        Ok(_) if !force => anyhow::bail!("{name} is still being started; use --force"),
        Err(_) if !dir.path().exists() => return Ok(()),
        Err(e) if !force => return Err(e),
        Ok(_) | Err(_) => {}
    }
    for _ in 0..ROUNDS {
        // Keeper and monitor end with the VM, and may still be about to.
        end_watchers(engine.root(), name, farewell)?;
        block_on(async {
            end_workers_in(dir).await;
            Ok(())
        })?;
        let hold = Hold::wait(engine.root())?;
        // Somebody who looked meanwhile may have found a VM without a monitor, and started one.
        if watchers(engine.root(), name)?.is_empty() {
            return Ok(dir.remove(&hold)?);
        }
    }
    anyhow::bail!("the monitor of {name} is started again and again")
}
