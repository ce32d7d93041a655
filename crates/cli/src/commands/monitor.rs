//! `rekindle monitor`, which only `run`, `restore` and a keeper call.

use std::path::PathBuf;

use anyhow::Result;
use rekindle_engine::Engine;
use rekindle_engine::programs::Programs;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::VmDir;
use rekindle_firecracker::ProcessId;

use super::{Context, block_on, this_program};
use crate::monitor::job::Job;
use crate::monitor::progress::Progress;
use crate::monitor::secrets::Secrets;
use crate::monitor::truth::Watch;
use crate::monitor::{self, keeper};

/// Owns a VM until it ends; started by its keeper, which is this verb without --kept
#[derive(Debug, clap::Args)]
pub(crate) struct Monitor {
    vm: VmName,
    /// A keeper watches this process
    #[arg(long)]
    kept: bool,
}

impl Monitor {
    pub(crate) fn run(self, context: &Context) -> Result<()> {
        let root = context.root()?;
        let dir = VmDir::open(&root, &self.vm)?;
        if !self.kept {
            return keeper::run(&self.vm, &root, &dir);
        }
        let keeper = rustix::process::getppid()
            .and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
            .and_then(|pid| ProcessId::of(pid).ok());
        let watch = Watch {
            monitor: ProcessId::of(std::process::id())?,
            keeper,
        };
        let programs = Programs {
            // A VM that the library started has no job; to adopt it takes no Firecracker.
            firecracker: Job::read(&dir).map_or_else(|_| PathBuf::new(), |job| job.firecracker),
            rekindle: this_program()?,
        };
        let engine = Engine::new(root, programs);
        // A monitor that failed has told the verb that waits, which prints it.
        let secrets = Secrets::of_stdin();
        block_on(async {
            Ok(monitor::run(&engine, dir, &watch, &mut Progress::new(), secrets).await)
        })?
    }
}
