//! What a monitor was asked to do, written into the VM's directory before the monitor is started, so that a
//! monitor that dies half-way can be started again by its keeper.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rekindle_engine::remote::RemoteConfig;
use rekindle_engine::vm::config::BootConfig;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::metadata::Metadata;
use rekindle_engine::vm::rehearse::RehearseConfig;
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::wake::Environment;
use serde::{Deserialize, Serialize};

const FILE: &str = "job.json";

/// The version of the file that this program writes, and the newest that it reads.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    version: u32,
    /// The Firecracker to start.
    pub(crate) firecracker: PathBuf,
    pub(crate) task: Task,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    Boot(BootConfig),
    Restore {
        snapshot: String,
        config: RestoreConfig,
    },
    /// Of a snapshot that stays in its repository.
    RestoreRemote {
        remote: RemoteConfig,
        config: RestoreConfig,
    },
    /// The VM is a throw-away copy, and gone when its monitor ends.
    Rehearse {
        snapshot: String,
        config: RehearseConfig,
    },
}

impl Job {
    pub(crate) fn new(firecracker: PathBuf, task: Task) -> Job {
        Job {
            version: VERSION,
            firecracker,
            task,
        }
    }

    /// What is not written down with it.
    pub(crate) fn environment(&self) -> &Environment {
        static NONE: Environment = Environment::new(Vec::new());
        match &self.task {
            Task::Restore { config, .. } | Task::RestoreRemote { config, .. } => {
                config.wake.as_ref().map_or(&NONE, |wake| &wake.env)
            }
            _ => &NONE,
        }
    }

    /// What is not written down either.
    pub(crate) fn metadata(&self) -> Option<&Metadata> {
        match &self.task {
            Task::Boot(config) => config.metadata.as_ref(),
            Task::Restore { config, .. } | Task::RestoreRemote { config, .. } => {
                config.metadata.as_ref()
            }
            Task::Rehearse { .. } => None,
        }
    }

    pub(crate) fn write(&self, dir: &VmDir) -> Result<()> {
        dir.replace(FILE, &serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", dir.file(FILE).display()))
    }

    pub(crate) fn read(dir: &VmDir) -> Result<Job> {
        let path = dir.file(FILE);
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let job: Job = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a monitor's job", path.display()))?;
        anyhow::ensure!(
            job.version <= VERSION,
            "{} has version {}, this program reads up to {VERSION}",
            path.display(),
            job.version
        );
        Ok(job)
    }
}
