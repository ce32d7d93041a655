//! The bodies of requests and responses, in upstream's words.
//!
//! A type is named as in Firecracker's API description and has its fields under their names there. A
//! constructor takes what is required, a setter of the field's name adds the rest, and a field that was not
//! set is not sent. All types are `#[non_exhaustive]`: a field that a later Firecracker adds breaks nobody.
//! "Firecracker ≥ x" names the first release that knows a field; [`Client`](crate::Client) refuses to send
//! it to an older one.

use crate::version::Feature;

/// The features newer than the baseline, or as old, that a request body uses.
pub(crate) trait Uses {
    /// Calls `each` once for every such feature.
    fn uses(&self, each: &mut dyn FnMut(Feature));
}

/// Defines a body: required fields first, optional ones after, with a setter for each of the latter.
///
/// `[into]` lets a setter take anything that converts; `[since X]` names the feature that a field is;
/// `[asks]` asks the field's value, which implements `Uses`.
macro_rules! body {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$rmeta:meta])* $rname:ident: $rty:ty,)*
        }
        optional {
            $($(#[$ometa:meta])* $oname:ident: $oty:ty $([$($flag:tt)+])?,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[non_exhaustive]
        pub struct $name {
            $($(#[$rmeta])* pub $rname: $rty,)*
            $(
                $(#[$ometa])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $oname: Option<$oty>,
            )*
        }

        impl $name {
            $(body!(@setter $(#[$ometa])* $oname: $oty $([$($flag)+])?);)*
        }

        impl $crate::model::Uses for $name {
            #[allow(unused_variables, reason = "most bodies use nothing newer than the baseline")]
            fn uses(&self, each: &mut dyn FnMut($crate::version::Feature)) {
                $(body!(@uses self each $oname $([$($flag)+])?);)*
            }
        }
    };
    (@setter $(#[$meta:meta])* $name:ident: $ty:ty [into]) => {
        $(#[$meta])*
        #[must_use]
        pub fn $name(mut self, value: impl Into<$ty>) -> Self {
            self.$name = Some(value.into());
            self
        }
    };
    (@setter $(#[$meta:meta])* $name:ident: $ty:ty $([$($flag:tt)+])?) => {
        $(#[$meta])*
        #[must_use]
        pub fn $name(mut self, value: $ty) -> Self {
            self.$name = Some(value);
            self
        }
    };
    (@uses $self:ident $each:ident $name:ident [since $feature:ident]) => {
        if $self.$name.is_some() {
            $each($crate::version::Feature::$feature);
        }
    };
    (@uses $self:ident $each:ident $name:ident [asks]) => {
        if let Some(value) = &$self.$name {
            $crate::model::Uses::uses(value, $each);
        }
    };
    (@uses $self:ident $each:ident $name:ident $([into])?) => {};
}

mod balloon;
mod boot;
mod cpu;
mod drive;
mod entropy;
mod hotplug;
mod instance;
mod logger;
mod machine;
mod metrics;
mod mmds;
mod net;
mod pmem;
mod rate_limiter;
mod serial;
mod snapshot;
mod vsock;

pub use balloon::{
    Balloon, BalloonHintingStatus, BalloonStartCmd, BalloonStats, BalloonStatsUpdate, BalloonUpdate,
};
pub use boot::BootSource;
pub use cpu::{
    ArmRegisterModifier, CpuConfig, CpuTemplate, CpuidLeafModifier, CpuidRegister,
    CpuidRegisterModifier, MsrModifier, VcpuFeatures,
};
pub use drive::{CacheType, Drive, IoEngine, PartialDrive};
pub use entropy::EntropyDevice;
pub use hotplug::{MemoryHotplugConfig, MemoryHotplugSizeUpdate, MemoryHotplugStatus};
pub use instance::{
    ActionType, FirecrackerVersion, FullVmConfiguration, InstanceActionInfo, InstanceInfo,
    InstanceState, Vm, VmState,
};
pub use logger::{Level, Logger};
pub use machine::{HugePages, MachineConfiguration, MachineConfigurationUpdate};
pub use metrics::Metrics;
pub use mmds::{MmdsConfig, MmdsContentsObject, MmdsVersion};
pub use net::{NetworkInterface, PartialNetworkInterface};
pub use pmem::{PartialPmem, Pmem};
pub use rate_limiter::{RateLimiter, TokenBucket};
pub use serial::SerialDevice;
pub use snapshot::{
    LoadHugePages, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotCreateParams,
    SnapshotLoadParams, SnapshotType, VsockOverride,
};
pub use vsock::Vsock;
