//! The engine: a state directory, and the programs that VMs run on.

use std::path::PathBuf;
use std::sync::Arc;

use rekindle_store::layout::RootError;
use rekindle_store::snapshot::OpenError;
use rekindle_store::{Root, Snapshot, Store};

use crate::jail::{self, Isolation, JailError};
use crate::programs::Programs;
use crate::remote::Remote;
use crate::vm::boot::BootError;
use crate::vm::config::{BootConfig, Limits};
use crate::vm::rehearse::{RehearseConfig, RehearseError, Rehearsed};
use crate::vm::restore::{Prepared, RestoreConfig, RestoreError};
use crate::vm::{Vm, boot, rehearse, restore};

/// The variable that names another state directory.
const ROOT_VARIABLE: &str = "REKINDLE_ROOT";

/// Boots and restores VMs whose state is under one [`Root`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    programs: Programs,
}

/// Why an engine could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The state directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A program is missing.
    #[error(transparent)]
    Program(#[from] crate::programs::ProgramError),
}

impl Engine {
    /// Over a state directory, with programs that were found or given.
    pub fn new(root: Root, programs: Programs) -> Engine {
        Engine {
            inner: Arc::new(Inner {
                store: Store::open(root),
                programs,
            }),
        }
    }

    /// Over the state directory that the program `rekindle` uses too, with the programs that
    /// [`Programs::discover`] finds.
    pub fn open_default() -> Result<Engine, EngineError> {
        let root = match std::env::var_os(ROOT_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Root::open(PathBuf::from(path))?,
            None => Root::open(Root::default_path()?)?,
        };
        let programs = Programs::discover(&root)?;
        Ok(Engine::new(root, programs))
    }

    /// The snapshots.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The state directory.
    pub fn root(&self) -> &Root {
        self.inner.store.root()
    }

    /// The programs.
    pub fn programs(&self) -> &Programs {
        &self.inner.programs
    }

    /// Refuses where VMs cannot be jailed: it takes root, and Firecracker's jailer.
    pub fn check_jail(&self) -> Result<(), JailError> {
        jail::check(self, Isolation::Jailed, &Limits::default())
    }

    /// A snapshot by name or id.
    pub fn snapshot(&self, name_or_id: &str) -> Result<Snapshot, OpenError> {
        self.inner.store.snapshot(name_or_id)
    }

    /// Boots a VM that this process owns: dropping it ends it, unless it is [detached](Vm::detach).
    pub async fn boot(&self, config: BootConfig) -> Result<Vm, BootError> {
        boot::boot(self, config).await
    }

    /// Restores a copy of a snapshot, owned by this process like one that was booted.
    pub async fn restore(
        &self,
        snapshot: &Snapshot,
        config: RestoreConfig,
    ) -> Result<Vm, RestoreError> {
        restore::restore(self, snapshot, config).await
    }

    /// Restores a copy of a snapshot that stays in its repository: it runs once the small parts and the disks are here,
    /// and its memory is fetched as it is wanted.
    pub async fn restore_remote(
        &self,
        remote: Remote,
        config: RestoreConfig,
    ) -> Result<Vm, RestoreError> {
        restore::restore_remote(self, remote, config).await
    }

    /// Runs a throw-away copy of a snapshot for a moment, so that the copies that follow have their memory earlier.
    pub async fn rehearse(
        &self,
        snapshot: &Snapshot,
        config: RehearseConfig,
    ) -> Result<Rehearsed, RehearseError> {
        rehearse::rehearse(self, snapshot, config).await
    }

    /// Prepares a copy of a snapshot, so that only [`Prepared::start`] is left when it is wanted.
    pub async fn prepare(
        &self,
        snapshot: &Snapshot,
        config: RestoreConfig,
    ) -> Result<Prepared, RestoreError> {
        restore::prepare(self, snapshot, config).await
    }
}
