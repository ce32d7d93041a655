//! Firecracker itself: who it is, what it does, all that it was told.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    Balloon, BootSource, CpuConfig, Drive, EntropyDevice, Logger, MachineConfiguration,
    MemoryHotplugConfig, Metrics, MmdsConfig, NetworkInterface, Pmem, Vsock,
};

/// Where the guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum InstanceState {
    /// It has not run yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InstanceState::NotStarted => "not started",
            InstanceState::Running => "running",
            InstanceState::Paused => "paused",
        })
    }
}

/// What `GET /` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InstanceInfo {
    /// `Firecracker`.
    pub app_name: String,
    /// The id it was started with.
    pub id: String,
    /// Where the guest stands.
    pub state: InstanceState,
    /// Its version, as it spells it.
    pub vmm_version: String,
}

/// What `GET /version` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FirecrackerVersion {
    /// The version, as Firecracker spells it.
    pub firecracker_version: String,
}

/// Something to do at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ActionType {
    /// Write a line of metrics now.
    FlushMetrics,
    /// Start the guest.
    InstanceStart,
    /// Press the keys that ask the guest to shut down (x86-64).
    SendCtrlAltDel,
}

body! {
    /// The body of `PUT /actions`.
    #[derive(Copy, Eq)]
    pub struct InstanceActionInfo {
        /// What to do.
        action_type: ActionType,
    }
    optional {}
}

impl InstanceActionInfo {
    /// Asks for this action.
    pub fn new(action_type: ActionType) -> InstanceActionInfo {
        InstanceActionInfo { action_type }
    }
}

/// A state that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum VmState {
    /// Stand still.
    Paused,
    /// Go on.
    Resumed,
}

body! {
    /// The body of `PATCH /vm`.
    #[derive(Copy, Eq)]
    pub struct Vm {
        /// The state to come to.
        state: VmState,
    }
    optional {}
}

impl Vm {
    /// Asks for this state.
    pub fn new(state: VmState) -> Vm {
        Vm { state }
    }
}

/// All that Firecracker was told. After a restore the boot source, CPU template and `smt` in it mean
/// nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct FullVmConfiguration {
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The block devices.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// What the guest boots from.
    pub boot_source: Option<BootSource>,
    /// Changes to what it sees of its CPU.
    pub cpu_config: Option<CpuConfig>,
    /// Firecracker's log.
    pub logger: Option<Logger>,
    /// CPUs and memory.
    pub machine_config: Option<MachineConfiguration>,
    /// Firecracker's metrics.
    pub metrics: Option<Metrics>,
    /// Room for memory to plug in. Firecracker ≥ 1.14.
    pub memory_hotplug: Option<MemoryHotplugConfig>,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
    /// The network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The persistent memory devices. Firecracker ≥ 1.14.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// The source of random numbers.
    pub entropy: Option<EntropyDevice>,
}
