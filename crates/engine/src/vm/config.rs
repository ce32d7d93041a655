//! What a VM is asked to be. Checked whole, before anything is made.

mod drive;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_store::VmName;
use serde::{Deserialize, Serialize};

pub use self::drive::{Access, Drive, Limits, Role};
use super::metadata::Metadata;
pub use crate::jail::Isolation;
use crate::net::plan::{GuestLink, Nat};
pub use crate::net::policy::NetRate;

/// The least memory that a guest gets, in MiB. Firecracker takes 1, no kernel does.
pub const MIN_MEMORY_MIB: u32 = 1;
/// The most virtual CPUs that Firecracker gives one guest.
pub const MAX_VCPUS: u8 = 32;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BootConfig {
    /// The VM's name, unique under its root.
    pub name: VmName,
    /// An uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; Firecracker's own default if absent.
    pub boot_args: Option<String>,
    /// What the machine is made of.
    pub machine: Machine,
    /// Ends the VM this long after its start.
    pub ttl: Option<Duration>,
    /// Whether the guest starts an agent.
    #[serde(default)]
    pub agent: Agent,
    /// Whether Firecracker is jailed.
    #[serde(default)]
    pub isolation: Isolation,
    /// What a jailed Firecracker may read from and write to the disk that its VM is on, each.
    #[serde(default)]
    pub host_io: Limits,
    /// What the guest may ask the metadata service for. It is written nowhere.
    #[serde(skip)]
    pub metadata: Option<Metadata>,
}

/// Whether a guest starts an agent when it boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Agent {
    /// Nobody knows.
    #[default]
    Unknown,
    /// Its init does, as that of `rekindle setup`'s initrd: whoever needs the agent waits for it.
    Expected,
}

impl BootConfig {
    /// One virtual CPU, 256 MiB, no drives, no network.
    pub fn new(name: VmName, kernel: impl Into<PathBuf>) -> Self {
        BootConfig {
            name,
            kernel: kernel.into(),
            initrd: None,
            boot_args: None,
            machine: Machine::default(),
            ttl: None,
            agent: Agent::Unknown,
            isolation: Isolation::of_this_user(),
            host_io: Limits::default(),
            metadata: None,
        }
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

    /// Sets the initial RAM disk.
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// Sets the kernel's command line.
    pub fn boot_args(mut self, args: impl Into<String>) -> Self {
        self.boot_args = Some(args.into());
        self
    }

    /// Sets the number of virtual CPUs.
    pub fn vcpus(mut self, count: u8) -> Self {
        self.machine.vcpus = count;
        self
    }

    /// Sets the memory, in MiB.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.machine.memory_mib = mib;
        self
    }

    /// Tracks dirty pages, which Diff snapshots need.
    pub fn track_dirty_pages(mut self) -> Self {
        self.machine.dirty_pages = DirtyPages::Tracked;
        self
    }

    /// Backs the memory with pages of 2 MiB, which the host must have set aside; the size must be a multiple of that.
    pub fn huge_pages(mut self) -> Self {
        self.machine.pages = Pages::Huge;
        self
    }

    /// Adds a drive.
    pub fn drive(mut self, drive: Drive) -> Self {
        self.machine.drives.push(drive);
        self
    }

    /// Adds a network interface.
    pub fn nic(mut self, nic: Nic) -> Self {
        self.machine.nics.push(nic);
        self
    }

    /// Gives it a network of its own, with this many interfaces, 1 to 8; [`GuestLink`] tells the guest's addresses.
    pub fn network(mut self, nat: Nat, interfaces: u8) -> Self {
        self.machine.nat = Some(nat);
        for n in 0..interfaces {
            let link = GuestLink::nth(n);
            self.machine.nics.push(Nic {
                id: format!("eth{n}"),
                tap: link.tap,
                mac: Some(link.mac),
            });
        }
        self
    }

    /// Limits what its guest receives and sends through each network interface, in bytes a second.
    pub fn net_rate(mut self, rate: NetRate) -> Self {
        self.machine.net_rate = Some(rate);
        self
    }

    /// Adds a vsock device with this guest CID (3 or more).
    pub fn vsock(mut self, guest_cid: u32) -> Self {
        self.machine.vsock = Some(Vsock { guest_cid });
        self
    }

    /// Says that the guest starts an agent, as one with the initrd of `rekindle setup` does, and adds the vsock device that
    /// it needs.
    pub fn with_agent(mut self) -> Self {
        self.agent = Agent::Expected;
        let vsock = Vsock { guest_cid: 3 };
        self.machine.vsock.get_or_insert(vsock);
        self
    }

    /// Adds a balloon that holds this much of the memory at the start, in MiB; 0 for none of it. It gives way when the
    /// guest runs out of memory. Its size is changed through Firecracker's own API.
    pub fn balloon(mut self, amount_mib: u32) -> Self {
        self.machine.balloon = Some(Balloon {
            amount_mib: Some(amount_mib),
        });
        self
    }

    /// Lets the guest ask the metadata service for this, by any of its network interfaces.
    pub fn metadata(mut self, metadata: Metadata) -> Self {
        self.machine.mmds = Mmds::V2;
        self.metadata = Some(metadata);
        self
    }

    /// Ends the VM this long after its start.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }
}

/// What a machine is made of; kept in the VM's record and in every snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Machine {
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Whether the pages that the guest writes are tracked.
    pub dirty_pages: DirtyPages,
    /// The host's pages under the memory.
    #[serde(default, skip_serializing_if = "Pages::are_normal")]
    pub pages: Pages,
    /// The block devices, the first one `/dev/vda`.
    pub drives: Vec<Drive>,
    /// The network interfaces.
    pub nics: Vec<Nic>,
    /// The network that they are connected to; absent if they are on TAP devices of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat: Option<Nat>,
    /// How much may go through each of them. A copy has the limits of its snapshot, which Firecracker keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_rate: Option<NetRate>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// The balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Whether the network interfaces have the metadata service.
    #[serde(default, skip_serializing_if = "Mmds::is_off")]
    pub mmds: Mmds,
}

impl Default for Machine {
    fn default() -> Self {
        Machine {
            vcpus: 1,
            memory_mib: 256,
            dirty_pages: DirtyPages::Untracked,
            pages: Pages::Normal,
            drives: Vec::new(),
            nics: Vec::new(),
            nat: None,
            net_rate: None,
            vsock: None,
            balloon: None,
            mmds: Mmds::Off,
        }
    }
}

/// Whether a guest can ask Firecracker's metadata service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mmds {
    /// It cannot.
    #[default]
    Off,
    /// It can, once it has fetched a token.
    V2,
}

impl Mmds {
    /// Whether there is none.
    pub fn is_off(&self) -> bool {
        *self == Mmds::Off
    }
}

/// Whether KVM logs which pages the guest writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirtyPages {
    /// Not logged; only Full snapshots.
    #[default]
    Untracked,
    /// Logged; Diff snapshots are possible, at the price of 4 KiB mappings.
    Tracked,
}

/// The host's pages under a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pages {
    /// Of 4 KiB.
    #[default]
    Normal,
    /// Of 2 MiB, from hugetlbfs. A copy's memory can only come in through userfaultfd, 2 MiB at a page fault.
    Huge,
}

impl Pages {
    /// Whether they are those that every host has.
    pub fn are_normal(&self) -> bool {
        *self == Pages::Normal
    }
}

/// A network interface on a TAP device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Firecracker's name for it, `[A-Za-z0-9_]+`.
    pub id: String,
    /// The TAP device's name, on the host or in the VM's own namespace.
    pub tap: String,
    /// The guest's MAC address; Firecracker makes one if absent.
    pub mac: Option<String>,
}

/// A vsock device. Its socket is `v.sock` in the VM's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub guest_cid: u32,
}

/// A balloon: memory that the guest gives back while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// How much it is told to hold at the start, in MiB. Absent in a copy: its snapshot's state says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount_mib: Option<u32>,
}

/// How a restored guest's memory comes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Through userfaultfd, from our page server.
    #[default]
    Uffd,
    /// Firecracker maps the memory file itself.
    File,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The number of virtual CPUs is out of range.
    #[error("{0} vCPUs: Firecracker gives a guest 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// The memory is out of range.
    #[error("{mib} MiB of memory: this host can give a guest {MIN_MEMORY_MIB} to {most} MiB")]
    Memory {
        /// What was asked for.
        mib: u32,
        /// The host's memory and swap together.
        most: u64,
    },
    /// The memory is no whole number of huge pages.
    #[error("{0} MiB of memory: with huge pages it must be a multiple of 2 MiB")]
    HugePages(u32),
    /// A file that the VM needs cannot be used.
    #[error("the {what} {path} cannot be used")]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file that the VM needs is empty, a directory or a device.
    #[error("the {what} {path} is {is}, it must be a regular file with something in it")]
    NotAFile {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is instead.
        is: &'static str,
    },
    /// The kernel is nothing that Firecracker can start.
    #[error(transparent)]
    Kernel(#[from] super::kernel::KernelError),
    /// Firecracker takes letters, digits and `_` only.
    #[error("the device id {0:?}: only letters, digits and _ are allowed, up to 64")]
    DeviceId(String),
    /// Two devices have one id.
    #[error("the device id {0:?} is used twice")]
    DuplicateId(String),
    /// Two drives want to be the root device.
    #[error("more than one root drive: {0:?} is the second")]
    SecondRoot(String),
    /// A limit that lets nothing through.
    #[error("the drive {0:?} is limited to nothing: a limit is 1 a second or more")]
    Limit(String),
    /// The balloon would hold more than there is.
    #[error("a balloon of {mib} MiB: the guest has {memory_mib} MiB of memory")]
    Balloon {
        /// What it was to hold.
        mib: u32,
        /// What the guest has.
        memory_mib: u32,
    },
    /// A CID that is reserved.
    #[error("the vsock CID {0}: 0 to 2 are reserved, 3 and above are for guests")]
    Cid(u32),
    /// Nothing that the metadata service could answer on.
    #[error("--mmds: the guest has no network interface to ask with; add --net nat, or --tap")]
    Mmds,
    /// A kernel's command line is too long or has a byte that cannot be in it.
    #[error(
        "the kernel's command line has {bytes} bytes, 2,047 printable ones at the most are possible"
    )]
    BootArgs {
        /// Its length.
        bytes: usize,
    },
}

impl BootConfig {
    /// Everything that can be known to be wrong without starting anything.
    pub fn check(&self, host_memory_mib: u64) -> Result<(), ConfigError> {
        self.machine.check(host_memory_mib)?;
        regular_file("kernel", &self.kernel)?;
        super::kernel::check(&self.kernel)?;
        if let Some(initrd) = &self.initrd {
            regular_file("initrd", initrd)?;
        }
        if let Some(args) = &self.boot_args
            && (args.len() > 2047 || args.bytes().any(|b| !(b' '..=b'~').contains(&b)))
        {
            return Err(ConfigError::BootArgs { bytes: args.len() });
        }
        Ok(())
    }
}

impl Machine {
    /// The pure part, and that the drives' files are there.
    pub fn check(&self, host_memory_mib: u64) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if self.memory_mib < MIN_MEMORY_MIB || u64::from(self.memory_mib) > host_memory_mib {
            return Err(ConfigError::Memory {
                mib: self.memory_mib,
                most: host_memory_mib,
            });
        }
        if self.pages == Pages::Huge && !self.memory_mib.is_multiple_of(2) {
            return Err(ConfigError::HugePages(self.memory_mib));
        }
        if let Some(mib) = self.balloon.and_then(|balloon| balloon.amount_mib)
            && mib > self.memory_mib
        {
            return Err(ConfigError::Balloon {
                mib,
                memory_mib: self.memory_mib,
            });
        }
        if self.mmds == Mmds::V2 && self.nics.is_empty() {
            return Err(ConfigError::Mmds);
        }
        let mut seen = Vec::new();
        for id in self
            .drives
            .iter()
            .map(|d| &d.id)
            .chain(self.nics.iter().map(|n| &n.id))
        {
            let valid = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if id.is_empty() || id.len() > 64 || !valid {
                return Err(ConfigError::DeviceId(id.clone()));
            }
            if seen.contains(&id) {
                return Err(ConfigError::DuplicateId(id.clone()));
            }
            seen.push(id);
        }
        if let Some(second) = self.drives.iter().filter(|d| d.role == Role::Root).nth(1) {
            return Err(ConfigError::SecondRoot(second.id.clone()));
        }
        for drive in &self.drives {
            if drive.limits.let_nothing_through() {
                return Err(ConfigError::Limit(drive.id.clone()));
            }
            regular_file("disk", &drive.source)?;
        }
        match self.vsock {
            Some(vsock) if vsock.guest_cid < 3 => Err(ConfigError::Cid(vsock.guest_cid)),
            _ => Ok(()),
        }
    }
}

/// Refuses what is not a regular file with something in it.
fn regular_file(what: &'static str, path: &Path) -> Result<(), ConfigError> {
    let meta = std::fs::metadata(path).map_err(|source| ConfigError::File {
        what,
        path: path.into(),
        source,
    })?;
    let is = if meta.is_dir() {
        "a directory"
    } else if !meta.is_file() {
        "not a regular file"
    } else if meta.len() == 0 {
        "empty"
    } else {
        return Ok(());
    };
    Err(ConfigError::NotAFile {
        what,
        path: path.into(),
        is,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine::default()
    }

    #[test]
    fn memory_and_vcpus_out_of_range_are_refused() {
        let mut m = machine();
        for vcpus in [0, 33, 64] {
            m.vcpus = vcpus;
            assert!(matches!(m.check(1024), Err(ConfigError::Vcpus(v)) if v == vcpus));
        }
        m.vcpus = 1;
        for mib in [0, 1025, 1_000_000] {
            m.memory_mib = mib;
            assert!(matches!(m.check(1024), Err(ConfigError::Memory { mib: b, .. }) if b == mib));
        }
    }

    #[test]
    fn device_ids_are_upstreams_and_unique() {
        let nic = |id: &str| Nic {
            id: id.into(),
            tap: "tap0".into(),
            mac: None,
        };
        for bad in ["", "a-b", "../x", "é"] {
            let m = Machine {
                nics: vec![nic(bad)],
                ..machine()
            };
            assert!(
                matches!(m.check(1024), Err(ConfigError::DeviceId(_))),
                "{bad}"
            );
        }
        let m = Machine {
            nics: vec![nic("eth0"), nic("eth0")],
            ..machine()
        };
        assert!(matches!(m.check(1024), Err(ConfigError::DuplicateId(_))));
    }

    #[test]
    fn a_missing_disk_is_named() {
        let m = Machine {
            drives: vec![Drive::root("/nonexistent/disk")],
            ..machine()
        };
        let text = m.check(1024).unwrap_err().to_string();
        assert_eq!(text, "the disk /nonexistent/disk cannot be used");
    }

    #[test]
    fn a_balloon_that_is_larger_than_the_memory_is_refused() {
        let balloon = |mib| Machine {
            balloon: Some(Balloon {
                amount_mib: Some(mib),
            }),
            ..machine()
        };
        assert!(balloon(256).check(1024).is_ok());
        let text = balloon(257).check(1024).unwrap_err().to_string();
        assert_eq!(
            text,
            "a balloon of 257 MiB: the guest has 256 MiB of memory"
        );
    }

    #[test]
    fn reserved_cids_are_refused() {
        let m = Machine {
            vsock: Some(Vsock { guest_cid: 2 }),
            ..machine()
        };
        assert!(matches!(m.check(1024), Err(ConfigError::Cid(2))));
    }
}
