//! What a guest is told when it wakes up as a copy of another, and before it is to be copied.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Exit, SessionId};

/// What a guest is to know and to be before its first command runs. What is absent stays as it is.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// The host's [`PROTOCOL`](crate::PROTOCOL).
    pub protocol: u32,
    /// The VM that the guest is from now on.
    pub vm: Vm,
    /// Bytes that nobody else has, in hexadecimal digits, for the kernel's random pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<String>,
    /// Whether the clock is set. The agent then asks with [`FromAgent::WhatTime`](super::FromAgent::WhatTime).
    #[serde(default)]
    pub clock: Clock,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its machine id, 32 of the digits 0-9 and a-f.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Its network addresses, which take the place of those that the named interfaces have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    /// What is added to the environment of every program from now on, in the place of what an earlier `wake` said.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// How long all programs in the hook directory may take together, in milliseconds; 0 runs none.
    #[serde(default)]
    pub hooks_ms: u32,
}

/// Without the values of the environment and the seed, which are nobody's business.
impl std::fmt::Debug for Wake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.env.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Wake")
            .field("vm", &self.vm)
            .field("hostname", &self.hostname)
            .field("addresses", &self.addresses)
            .field("env", &names)
            .finish_non_exhaustive()
    }
}

/// Who a VM is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// No other VM, before or after, has the same. A guest that hears another one than before is a copy.
    pub id: String,
}

/// Whether a guest's clock is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// It goes on as it is.
    #[default]
    GoesOn,
    /// It is set to the host's.
    SetToHost,
}

/// A network address of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The interface, as the guest names it.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
    /// How many bits of it are the network's.
    pub prefix: u8,
    /// Where everything else is sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// What came of a [`Wake`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {
    /// What was done, in that order.
    pub steps: Vec<Step>,
    /// The programs of the hook directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<Hook>,
    /// The programs that run on without the callers that they had in the VM that this one is a copy of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<Orphan>,
}

/// One thing that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What.
    pub what: What,
    /// How long it took, in microseconds.
    pub us: u64,
    /// What of it was not possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What is done when a guest wakes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// File systems that were frozen for the snapshot were thawed.
    Thaw,
    /// The random pool was seeded.
    Random,
    /// The clock was set.
    Clock,
    /// The guest got its name.
    Hostname,
    /// The guest got its machine id.
    MachineId,
    /// An interface got its address.
    Address,
}

/// A program of the hook directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Its file's name.
    pub name: String,
    /// How long it took, in microseconds.
    pub us: u64,
    /// How it ended.
    pub end: HookEnd,
    /// The end of what it complained about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stderr: String,
}

/// How a program of the hook directory ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HookEnd {
    /// By itself, with this status.
    Status(i32),
    /// By a signal.
    Signal(i32),
    /// It was killed, as the time for all was over.
    TimedOut,
    /// It was not started, and this is why.
    NotStarted(String),
}

impl From<Exit> for HookEnd {
    fn from(exit: Exit) -> HookEnd {
        match exit {
            Exit::Status(status) => HookEnd::Status(status),
            Exit::Signal(signal) => HookEnd::Signal(signal),
        }
    }
}

/// A program that lost its caller, who is another VM's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// The session that it had.
    pub session: SessionId,
    /// Its pid in the guest.
    pub pid: u32,
    /// When it is killed, in milliseconds; it lives on if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_after_ms: Option<u32>,
}

/// Asks for file systems that stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesce {
    /// The host's [`PROTOCOL`](crate::PROTOCOL).
    pub protocol: u32,
    /// Once so many milliseconds have passed the host waits no more, and nothing is to be frozen.
    pub within_ms: u32,
    /// They go on after so many milliseconds, whoever says what.
    pub thaw_after_ms: u32,
}

/// File systems stand still, until the connection ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiesced {
    /// The mount points of those that stand still.
    pub frozen: Vec<String>,
    /// Those that do not though they could be written to, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// How long it took to write out what was only in memory, in microseconds.
    pub sync_us: u64,
    /// How long it took to freeze, in microseconds.
    pub freeze_us: u64,
}
