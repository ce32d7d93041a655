//! `rekindle logs`.

use std::io::{self, Write};

use anyhow::Result;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::{LOG, SERIAL};
use rekindle_engine::vm::follow::Follower;

use super::{Context, block_on};
use crate::serial::follow;

/// Prints what a guest wrote to its serial console
///
/// The last 4 to 8 MiB are kept.
#[derive(Debug, clap::Args)]
pub(crate) struct Logs {
    /// The VM
    vm: VmName,
    /// Go on until the VM ends
    #[arg(long, short)]
    follow: bool,
    /// Firecracker's own log instead
    #[arg(long)]
    vmm: bool,
}

impl Logs {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let (engine, dir) = context.vm(&self.vm)?;
        let path = dir.file(if self.vmm { LOG } else { SERIAL });
        let mut follower = Follower::from_start(&path);
        let mut out = io::stdout().lock();
        let mut sink = |bytes: &[u8]| -> Result<()> {
            out.write_all(bytes)?;
            out.flush()?;
            Ok(())
        };
        if !self.follow {
            return follower.read_new(&mut sink);
        }
        block_on(follow(&engine, &self.vm, &dir, follower, &mut sink))?;
        Ok(())
    }
}
