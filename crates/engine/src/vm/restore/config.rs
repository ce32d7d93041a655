//! What a restore is asked for.

use std::time::Duration;

use rekindle_store::VmName;
use serde::{Deserialize, Serialize};

use crate::jail::Isolation;
use crate::net::plan::Nat;
use crate::vm::config::{Backend, DirtyPages, Limits};
use crate::vm::metadata::Metadata;
use crate::vm::record::Purpose;
use crate::vm::wake::WakeConfig;

/// How to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RestoreConfig {
    /// The copy's name, unique under its root.
    pub name: VmName,
    /// How its memory comes in.
    pub backend: Backend,
    /// Whether the guest runs at once.
    pub then: Then,
    /// Other TAP devices than the snapshot names, by interface id (Firecracker ≥ 1.12).
    pub taps: Vec<TapOverride>,
    /// Whether the guest's clock is set forward (Firecracker ≥ 1.16, 1.15.1, 1.14.4).
    pub clock: Clock,
    /// Whether the pages that the guest writes are tracked, for Diff snapshots.
    pub dirty_pages: DirtyPages,
    /// Whether all contents are compared with their checksums first.
    pub check: Check,
    /// Whether a snapshot from another kind of host is tried all the same.
    pub mismatch: Mismatch,
    /// Whether the pages that earlier copies touched first come before the guest asks for them.
    #[serde(default)]
    pub replay: Replay,
    /// Whether the pages that this copy touches first are taken down for later ones.
    #[serde(default)]
    pub record: Recording,
    /// What its network interfaces are connected to.
    #[serde(default)]
    pub network: Network,
    /// What its guest is told as soon as it runs, if it has an agent; nothing if absent.
    #[serde(default = "wakes")]
    pub wake: Option<WakeConfig>,
    /// Whether Firecracker is jailed, whatever the snapshot's was.
    #[serde(default)]
    pub isolation: Isolation,
    /// What a jailed Firecracker may read from and write to the disk that its VM is on, each.
    #[serde(default)]
    pub host_io: Limits,
    /// What its guest may ask the metadata service for, if it had that service; nothing if absent. It is written nowhere.
    #[serde(skip)]
    pub metadata: Option<Metadata>,
    /// What it is for.
    #[serde(skip)]
    pub(crate) purpose: Purpose,
    /// Ends the VM this long after its restore.
    pub ttl: Option<Duration>,
}

/// What happens once the snapshot is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// The guest runs.
    #[default]
    Run,
    /// The guest stays paused.
    StayPaused,
}

/// A TAP device for one interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapOverride {
    /// The interface, as the snapshot names it.
    pub iface_id: String,
    /// The TAP device on this host.
    pub tap: String,
}

/// What a restored guest's clock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// It goes on from the snapshot's time.
    #[default]
    GoesOn,
    /// It jumps to the host's time.
    SetToHost,
}

/// How much of a snapshot is checked before it is used. Sizes, manifest and the small files always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Not the contents of memory and disks.
    #[default]
    Quick,
    /// Everything.
    Everything,
}

/// What to do with a snapshot that was made on another kind of host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mismatch {
    /// Refuse it.
    #[default]
    Refuse,
    /// Try all the same.
    TryAnyway,
}

/// What happens with the pages that earlier copies of the snapshot touched first. Only where memory comes in through
/// userfaultfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Replay {
    /// They are brought before the guest asks, if the snapshot has a working set. A damaged one costs speed only.
    #[default]
    On,
    /// They come when the guest asks, like all others.
    Off,
}

/// What happens with the pages that this copy touches in its first ten seconds. Only where memory comes in through
/// userfaultfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recording {
    /// They are added to the snapshot's working set, when the time is over or the copy ends.
    #[default]
    On,
    /// Nothing is taken down; the snapshot's directory is not written to.
    Off,
}

/// What a copy's network interfaces are connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// What the snapshot's were connected to: a network of the VM's own, with the policy that it had but for published
    /// ports, or TAP devices of the host.
    #[default]
    #[serde(alias = "host")]
    AsBefore,
    /// A network of the VM's own. The snapshot's VM must have had one.
    Nat(Nat),
    /// Nothing: TAP devices that lead nowhere, in a network namespace of its own. For a copy that has interfaces this
    /// takes `CAP_SYS_ADMIN` and `CAP_NET_ADMIN`.
    CutOff,
}

fn wakes() -> Option<WakeConfig> {
    Some(WakeConfig::new())
}

impl RestoreConfig {
    /// Runs at once, memory through userfaultfd, everything else as the snapshot has it.
    pub fn new(name: VmName) -> Self {
        RestoreConfig {
            name,
            backend: Backend::default(),
            then: Then::default(),
            taps: Vec::new(),
            clock: Clock::default(),
            dirty_pages: DirtyPages::default(),
            check: Check::default(),
            mismatch: Mismatch::default(),
            replay: Replay::default(),
            record: Recording::default(),
            network: Network::default(),
            wake: wakes(),
            isolation: Isolation::of_this_user(),
            host_io: Limits::default(),
            metadata: None,
            purpose: Purpose::default(),
            ttl: None,
        }
    }

    /// Chooses how the memory comes in.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Sets whether Firecracker is locked in a jail, which takes root. Root's is, unless this is said.
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Limits what a jailed Firecracker may read from and write to the disk that its VM is on, each: its drives, and the
    /// snapshots that it writes.
    pub fn host_io(mut self, limits: Limits) -> Self {
        self.host_io = limits;
        self
    }

    /// Leaves the guest paused once it is loaded.
    pub fn paused(mut self) -> Self {
        self.then = Then::StayPaused;
        self
    }

    /// Puts an interface on another TAP device.
    pub fn tap(mut self, iface_id: impl Into<String>, tap: impl Into<String>) -> Self {
        self.taps.push(TapOverride {
            iface_id: iface_id.into(),
            tap: tap.into(),
        });
        self
    }

    /// Tracks dirty pages, which Diff snapshots need.
    pub fn track_dirty_pages(mut self) -> Self {
        self.dirty_pages = DirtyPages::Tracked;
        self
    }

    /// Compares all contents with their checksums first.
    pub fn verify(mut self) -> Self {
        self.check = Check::Everything;
        self
    }

    /// Chooses what the copy's network lets through.
    pub fn network(mut self, nat: Nat) -> Self {
        self.network = Network::Nat(nat);
        self
    }

    /// Cuts the copy off from every network.
    pub fn cut_off(mut self) -> Self {
        self.network = Network::CutOff;
        self
    }

    /// Lets its guest ask the metadata service for this.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Chooses what its guest is told.
    pub fn wake(mut self, wake: WakeConfig) -> Self {
        self.wake = Some(wake);
        self
    }

    /// Tells its guest nothing: it takes itself for the original.
    pub fn no_wake(mut self) -> Self {
        self.wake = None;
        self
    }

    /// Brings no page before the guest asks for it.
    pub fn no_replay(mut self) -> Self {
        self.replay = Replay::Off;
        self
    }

    /// Does not take down which pages the guest touches.
    pub fn no_record(mut self) -> Self {
        self.record = Recording::Off;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_program_wrote_down_is_read_with_the_defaults_of_today() {
        let today = RestoreConfig::new("web".parse().unwrap());
        let mut json = serde_json::to_value(&today).unwrap();
        let fields = json.as_object_mut().unwrap();
        for later in ["replay", "record", "network", "wake"] {
            assert!(fields.remove(later).is_some(), "{later}");
        }
        assert_eq!(
            serde_json::from_value::<RestoreConfig>(json).unwrap(),
            today
        );
    }
}
