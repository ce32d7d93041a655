//! Booting a snapshot anew: what is left to do with one whose state this Firecracker cannot read.
//!
//! ```text
//!   manifest: kernel, initrd, their digests ─▶ still those files? ─┐
//!             machine, devices, the image, disks as of then ───────┴─▶ a `BootConfig`, booted like any other
//! ```
//!
//! The memory is not used: the guest starts as after a power cut at the moment of the snapshot.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_store::digest::Digest;
use rekindle_store::manifest::BootInfo;
use rekindle_store::{Root, Snapshot, SnapshotId, VmName};

use super::config::{Agent, Balloon, BootConfig, DirtyPages};
use super::portable::{self, Unportable, field};
use super::restore::{RestoreConfig, TapOverride};
use crate::net::policy::PolicyError;

/// What a VM is booted from cannot be written down.
#[derive(Debug, thiserror::Error)]
pub enum BootedError {
    /// A file cannot be read.
    #[error("cannot read the {what} {path}")]
    Read {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No manifest could hold it.
    #[error(transparent)]
    Unportable(#[from] Unportable),
}

/// What a snapshot of a VM says that it was booted from. Blocks while it reads the files.
pub(crate) fn booted(
    kernel: &Path,
    initrd: Option<&Path>,
    args: Option<&str>,
) -> Result<BootInfo, BootedError> {
    Ok(BootInfo {
        kernel: Some(field("kernel's path", &kernel.to_string_lossy())?),
        kernel_blake3: Some(digest("kernel", kernel)?),
        initrd: initrd
            .map(|initrd| field("initrd's path", &initrd.to_string_lossy()))
            .transpose()?,
        initrd_blake3: initrd.map(|initrd| digest("initrd", initrd)).transpose()?,
        args: args
            .map(|args| field("kernel's command line", args))
            .transpose()?,
    })
}

fn digest(what: &'static str, path: &Path) -> Result<Digest, BootedError> {
    Digest::of_file(path).map_err(|source| BootedError::Read {
        what,
        path: path.into(),
        source,
    })
}

/// How to boot a snapshot anew.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebuildConfig {
    /// The VM's name, unique under its root.
    pub name: VmName,
    /// Another kernel than the manifest says.
    pub kernel: Option<PathBuf>,
    /// Another initial RAM disk than the manifest says.
    pub initrd: Option<PathBuf>,
    /// Other TAP devices than the manifest says, by interface id.
    pub taps: Vec<TapOverride>,
    /// Ends the VM this long after its start.
    pub ttl: Option<Duration>,
}

impl RebuildConfig {
    /// As the manifest says.
    pub fn new(name: VmName) -> Self {
        RebuildConfig {
            name,
            kernel: None,
            initrd: None,
            taps: Vec::new(),
            ttl: None,
        }
    }
}

/// Why a snapshot cannot be booted anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebuildError {
    /// What its network let through cannot be read.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// An older program made the snapshot, of a copy.
    #[error(
        "the snapshot {snapshot} does not say what its VM was booted from; say it with --kernel and --initrd"
    )]
    Unknown {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The kernel or the initrd was replaced since, as `rekindle setup` does with newer ones.
    #[error(
        "the {what} {path} is not known to be the one that the VM of snapshot {snapshot} was booted from; \
         --{what} {path} takes it all the same"
    )]
    Replaced {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The kernel or the initrd cannot be read.
    #[error("give another one with --kernel or --initrd")]
    Read(#[from] BootedError),
}

/// What to boot. Reads the kernel and the initrd to see that they are those of then.
///
/// The drives' sources are the snapshot's own files: hold a [`Lease`](rekindle_store::Lease) on it until the VM is up.
pub fn boot_config(
    root: &Root,
    snapshot: &Snapshot,
    wanted: &RebuildConfig,
) -> Result<BootConfig, RebuildError> {
    let boot = &snapshot.manifest().boot;
    let id = snapshot.id();
    let recorded = boot.kernel.as_ref().map(AsRef::as_ref);
    let kernel = part(
        id,
        "kernel",
        wanted.kernel.as_deref(),
        recorded,
        boot.kernel_blake3,
    )?
    .ok_or(RebuildError::Unknown { snapshot: id })?;
    let recorded = boot.initrd.as_ref().map(AsRef::as_ref);
    let initrd = part(
        id,
        "initrd",
        wanted.initrd.as_deref(),
        recorded,
        boot.initrd_blake3,
    )?;

    let mut like = RestoreConfig::new(wanted.name.clone());
    like.taps.clone_from(&wanted.taps);
    if snapshot.manifest().machine.track_dirty_pages {
        like.dirty_pages = DirtyPages::Tracked;
    }
    let mut config = BootConfig::new(wanted.name.clone(), kernel);
    config.initrd = initrd;
    config.boot_args = boot.args.as_ref().map(ToString::to_string);
    config.ttl = wanted.ttl;
    if portable::agent(snapshot.manifest()).is_some() {
        config.agent = Agent::Expected;
    }
    config.machine = portable::machine(root, snapshot, &like)?;
    // How much it held is in the state that cannot be read.
    config.machine.balloon = config.machine.balloon.map(|_| Balloon {
        amount_mib: Some(0),
    });
    Ok(config)
}

/// The file that was asked for; if none was, the one of then, if it still is.
fn part(
    snapshot: SnapshotId,
    what: &'static str,
    wanted: Option<&Path>,
    recorded: Option<&Path>,
    then: Option<Digest>,
) -> Result<Option<PathBuf>, RebuildError> {
    let Some(path) = wanted.or(recorded) else {
        return Ok(None);
    };
    if wanted.is_none() && then != Some(digest(what, path)?) {
        return Err(RebuildError::Replaced {
            what,
            path: path.into(),
            snapshot,
        });
    }
    Ok(Some(path.into()))
}
