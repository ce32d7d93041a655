//! `rekindle exec`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use rekindle_engine::agent::Agent;
use rekindle_engine::store::VmName;

use super::{Context, block_on};
use crate::attach::{Passing, Streams, exit_code, leave_alone};
use crate::monitor::truth::{Truth, look};
use crate::program::Environment;

/// Runs a program in a guest, with the streams of this one
///
/// Its exit status is the exit status, 128 and its number for a signal; 125 is a failure of rekindle's own. A guest that
/// still boots is waited for. When this command is killed, the program is killed ten seconds later.
#[derive(Debug, clap::Args)]
pub(crate) struct Exec {
    /// The VM
    vm: VmName,
    #[command(flatten)]
    streams: Streams,
    /// Print nothing and leave it running; what it writes goes to the guest's console (`rekindle logs`)
    #[arg(long, short, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,
    #[command(flatten)]
    environment: Environment,
    /// Who it runs as: a name or number, with :group if wanted [default: root]
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Where it works [default: /]
    #[arg(long, short = 'w', value_name = "DIR")]
    dir: Option<String>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

impl Exec {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let (engine, dir) = context.vm(&self.vm)?;
        if let Truth::Starting = look(&engine, &self.vm, &dir)? {
            bail!("{} is still being started", self.vm);
        }
        let mut exec = self
            .environment
            .given_to(Agent::of(&dir).exec(self.command));
        if let Some(user) = self.user {
            exec = exec.user(user);
        }
        if let Some(dir) = self.dir {
            exec = exec.dir(dir);
        }
        if self.detach {
            block_on(leave_alone(exec))?;
            return Ok(ExitCode::SUCCESS);
        }
        let exit = block_on(self.streams.run(exec, Passing::On))?;
        Ok(exit_code(exit))
    }
}
