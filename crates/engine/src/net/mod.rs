//! A VM's network.
//!
//! ```text
//!   ┌ the VM's namespace ─────────────────────┐       ┌ the host ───────────────────────────────┐
//!   │ firecracker ─ rktap0 ─ filter ─ uplink ═╪═══════╪═ rk…  ─ filter, NAT, published ports ── │ ── the world
//!   └─────────────────────────────────────────┘       └─────────────────────────────────────────┘
//!      gone with firecracker, and the links too         one table, removed by whoever comes next
//! ```
//!
//! [`policy`] says what is let through and `plan` makes rules and addresses of it, both pure. `namespace` is where
//! Firecracker lives, `attachment` what connects that with the host, and takes it away again. Everything is told to the
//! kernel by netlink; no program is run, and nothing of the host's own settings is changed.

mod attachment;
mod links;
mod namespace;
mod netlink;
mod nft;
pub mod plan;
pub mod policy;
mod ports;
mod rules;
pub mod sweep;
#[expect(
    unsafe_code,
    reason = "a namespace and an ioctl; the file opens with its safety model"
)]
mod sys;
mod taps;

use std::io;
use std::path::{Path, PathBuf};

pub use self::attachment::Connection;
pub(crate) use self::attachment::{Attachment, undo};
pub use self::links::LinkError;
pub use self::nft::NftError;
use self::plan::Nat;
use self::policy::{PolicyError, Published};
pub use self::taps::TapError;
pub(crate) use self::taps::check as check_tap;
use crate::vm::dir::DirError;
use crate::vm::record::Record;

/// Says whether this host forwards IPv4 packets.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Why a VM cannot have its network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// This process may not make networks.
    #[error(
        "a network of its own for a VM takes CAP_SYS_ADMIN and CAP_NET_ADMIN: run as root; without, a guest has its \
         vsock device and no other network"
    )]
    Rights,
    /// The host keeps packets that are not for itself.
    #[error(
        "this host does not forward packets, so that no guest gets further than to it: sysctl -w net.ipv4.ip_forward=1"
    )]
    NotForwarding,
    /// Its policy is wrong.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The range of addresses is too small.
    #[error(
        "the range {0} has no two addresses for a VM: take a larger one, such as 198.18.0.0/15"
    )]
    Range(ipnet::Ipv4Net),
    /// Every pair of addresses in the range is in use.
    #[error("no address of the range {0} is free: take a larger one")]
    RangeIsFull(ipnet::Ipv4Net),
    /// There are more interfaces than there can be.
    #[error("{0} network interfaces: a guest gets {max} at the most", max = plan::MAX_INTERFACES)]
    Interfaces(usize),
    /// Somebody else has a port.
    #[error("the port of --publish {published} cannot be had")]
    Port {
        /// What was to be published.
        published: Published,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMs that there are cannot be looked at.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// What is made could not be written down.
    #[error("cannot write down the network in {path}")]
    Note {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What is written down is no network of a VM.
    #[error("{path} names no network of a VM")]
    NotANote {
        /// The file.
        path: PathBuf,
    },
    /// There is no thread for it.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The kernel cannot be talked to.
    #[error("cannot open a netlink socket")]
    Netlink(#[source] io::Error),
    /// The kernel refused a namespace.
    #[error("cannot make a network namespace")]
    Namespace(#[source] io::Error),
    /// TAP devices are not to be had.
    #[error("cannot open /dev/net/tun")]
    Tun(#[source] io::Error),
    /// A TAP device was refused.
    #[error("cannot make a TAP device {name} in a new network namespace")]
    Tap {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A setting of a new namespace, or of a new link, was refused.
    #[error("cannot write {path}")]
    Setting {
        /// The setting.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A link, an address or a route was refused.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The rules were refused.
    #[error(transparent)]
    Rules(#[from] NftError),
}

/// Where Firecracker is started.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    /// On the host, with the host's TAP devices.
    Host,
    /// Where these TAP devices are, and nothing else.
    CutOff(Vec<&'a str>),
    /// In a namespace that is connected with the host.
    Attached(&'a Attachment),
}

impl Place<'_> {
    /// Where a VM without a network of its own is started: with the host's TAP devices if it has any. A jailed one without
    /// sees no link at all, so whoever gets hold of its Firecracker reaches no service of the host either.
    pub(crate) fn without_network(record: &Record) -> Place<'static> {
        match record.jailed_as.is_some() && record.machine.nics.is_empty() {
            true => Place::CutOff(Vec::new()),
            false => Place::Host,
        }
    }

    /// Runs `start` there. The processes that it starts stay there.
    pub(crate) fn run<T: Send>(&self, start: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        match self {
            Place::Host => Ok(start()),
            Place::CutOff(taps) => namespace::enter(|namespace| {
                taps.iter().try_for_each(|name| namespace.make_tap(name))?;
                Ok(start())
            }),
            Place::Attached(attachment) => attachment.run(start),
        }
    }
}

/// Refuses when this process may make no namespaces.
pub(crate) fn check_rights() -> Result<(), NetError> {
    namespace::check()
}

/// Everything that can be refused before a network is made.
pub(crate) fn check(nat: &Nat, interfaces: usize) -> Result<(), NetError> {
    nat.policy.check()?;
    if !(1..=usize::from(plan::MAX_INTERFACES)).contains(&interfaces) {
        return Err(NetError::Interfaces(interfaces));
    }
    if nat.range.prefix_len() > 31 {
        return Err(NetError::Range(nat.range));
    }
    check_rights()?;
    check_forwarding()
}

/// Refuses when the host keeps packets that are not for itself.
pub fn check_forwarding() -> Result<(), NetError> {
    match std::fs::read_to_string(FORWARDING) {
        Ok(text) if text.trim_end() == "1" => Ok(()),
        _ => Err(NetError::NotForwarding),
    }
}

/// Tries all that a network of a VM needs, in a namespace that is gone afterwards.
pub fn probe() -> Result<(), NetError> {
    check_rights()?;
    attachment::probe()?;
    check_forwarding()
}

/// Writes a setting of the network in which the calling thread is.
fn set(path: impl AsRef<Path>, value: &str) -> Result<(), NetError> {
    let path = Path::new("/proc/sys/net").join(path);
    std::fs::write(&path, value).map_err(|source| NetError::Setting { path, source })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod cut_off {
    use super::*;

    fn links() -> Vec<String> {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let mut links: Vec<String> = text
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .collect();
        links.sort();
        links
    }

    #[test]
    fn what_is_cut_off_sees_its_own_taps_alone_and_the_host_keeps_its_links() {
        if check_rights().is_err() {
            // Refused in words, which is all that can be seen without the rights.
            assert!(NetError::Rights.to_string().contains("run as root"));
            return;
        }
        let before = links();
        let place = Place::CutOff(vec!["tap0", "a-very-long-one"]);
        let seen = place.run(links).unwrap();
        // Where the modules are loaded, a new network has tunnel devices that lead nowhere.
        assert!(seen.contains(&"tap0".to_owned()), "{seen:?}");
        assert!(seen.contains(&"a-very-long-one".to_owned()), "{seen:?}");
        assert!(!seen.contains(&"eth0".to_owned()), "{seen:?}");
        assert_eq!(links(), before);
        let long = Place::CutOff(vec!["sixteen-bytes-xx"]).run(|| ());
        assert!(
            matches!(&long, Err(NetError::Tap { name, .. }) if name.len() == 16),
            "{long:?}"
        );
    }
}
