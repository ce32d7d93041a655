//! `rekindle bench`: figures that anyone can reproduce, always beside what they are compared with, in one run.

mod clones;
mod contender;
mod deep;
mod exec;
mod faults;
mod floor;
mod guest;
mod handler;
mod image;
mod machine;
mod memory;
mod race;
mod raw;
mod remote;
mod replay;
mod restore;
mod stats;
mod takeover;

use anyhow::Result;

use super::Context;

/// Measures this host, each figure beside its baseline
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    Restore(restore::Restore),
    Faults(faults::Faults),
    Replay(replay::Replay),
    Takeover(takeover::Takeover),
    Exec(exec::Exec),
    Clones(clones::Clones),
    Remote(remote::Remotely),
    #[command(hide = true)]
    Handler(handler::Serve),
}

impl Verb {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        match self {
            Verb::Restore(restore) => restore.run(context),
            Verb::Faults(faults) => faults.run(context),
            Verb::Replay(replay) => replay.run(context),
            Verb::Takeover(takeover) => takeover.run(context),
            Verb::Exec(exec) => exec.run(context),
            Verb::Clones(clones) => clones.run(context),
            Verb::Remote(remote) => remote.run(context),
            Verb::Handler(serve) => serve.run(),
        }
    }
}
