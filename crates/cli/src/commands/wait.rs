//! `rekindle wait`.

use std::process::ExitCode;

use anyhow::Result;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::SERIAL;
use rekindle_engine::vm::follow::Follower;
use rekindle_engine::vm::state::State;

use super::{Context, block_on};
use crate::monitor::truth::look;
use crate::output;
use crate::serial::follow;

/// Waits until a VM has ended; exits 0 if it stopped, 1 if it failed
#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// The VM
    vm: VmName,
    /// Print the VM's record as JSON when it has ended
    #[arg(long)]
    json: bool,
}

impl Wait {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let (engine, dir) = context.vm(&self.vm)?;
        look(&engine, &self.vm, &dir)?;
        let follower = Follower::from_start(&dir.file(SERIAL));
        let Some(record) = block_on(follow(&engine, &self.vm, &dir, follower, &mut |_| Ok(())))?
        else {
            anyhow::bail!("{} was removed", self.vm);
        };
        if self.json {
            output::json(&record)?;
        }
        match record.state {
            State::Failed(why) => {
                output::say(format_args!("{} failed: {why}", self.vm));
                Ok(ExitCode::FAILURE)
            }
            _ => Ok(ExitCode::SUCCESS),
        }
    }
}
