//! `rekindle bench`: figures that anyone can reproduce, always beside what they are compared with, in one run.

mod floor;
mod memory;
mod restore;
mod stats;

use anyhow::Result;

use super::Context;

/// Measures this host, each figure beside its baseline
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    Restore(restore::Restore),
}

impl Verb {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        match self {
            Verb::Restore(restore) => restore.run(context),
        }
    }
}
