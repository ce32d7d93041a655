//! What connects a VM's namespace with the host. Written down before it is made, undone from what was written.
//!
//! On the host that is one link and one table, both called `rk`, the installation's id, the VM's id. The link goes with
//! the namespace; the table, and the file `net.json` in the VM's directory, are removed by the VM's owner, or by whoever
//! finds that it has none.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use ipnet::{IpNet, Ipv6Net};
use rekindle_store::InstallationId;
use serde::{Deserialize, Serialize};

use super::links::{Links, Steps};
use super::namespace::{self, Namespace};
use super::nft::Nftables;
use super::plan::{GuestLink, Nat, PREFIX, Pair, UPLINK, inside, outside};
use super::policy::{Policy, Protocol, Published};
use super::{NetError, ports, set};
use crate::vm::dir::{NETWORK, VmDir};

/// How often another link is made because its addresses are in use.
const ATTEMPTS: usize = 64;

/// The largest note that is read.
const MAX_BYTES: u64 = 4096;

/// What there is of a VM's network on the host, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Connection {
    /// What the link and the table are called.
    pub name: String,
    /// Under which addresses the host reaches the guest; none while it is made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
}

impl Connection {
    /// That of a VM, if it has one.
    pub fn read(dir: &VmDir) -> Result<Option<Connection>, NetError> {
        let path = dir.file(NETWORK);
        let size = match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            meta => meta.map(|meta| meta.len()),
        };
        let text = size.and_then(|size| match size {
            ..=MAX_BYTES => std::fs::read(&path),
            _ => Err(io::ErrorKind::FileTooLarge.into()),
        });
        match text {
            Err(source) => Err(NetError::Note { path, source }),
            // Nothing else may be removed than what can be a VM's.
            Ok(text) => match serde_json::from_slice::<Connection>(&text) {
                Ok(note) if is_ours(&note.name) => Ok(Some(note)),
                _ => Err(NetError::NotANote { path }),
            },
        }
    }

    fn write(&self, dir: &VmDir) -> Result<(), NetError> {
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        text.and_then(|text| dir.replace(NETWORK, &text))
            .map_err(|source| NetError::Note {
                path: dir.file(NETWORK),
                source,
            })
    }
}

fn is_ours(name: &str) -> bool {
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() == PREFIX.len() + 13 && name.starts_with(PREFIX) && name.bytes().all(lower)
}

/// A VM's connection with the host. Dropped while armed, it is undone.
#[derive(Debug)]
pub(crate) struct Attachment {
    plan: Arc<Planned>,
    /// Bound, so that nobody else gets the published ports.
    _ports: Vec<OwnedFd>,
    /// Who makes it, until somebody waits for that.
    making: Mutex<Option<JoinHandle<Result<(), NetError>>>>,
    on_drop: OnDrop,
}

/// What is to be made.
#[derive(Debug)]
struct Planned {
    dir: VmDir,
    name: String,
    nat: Nat,
    taps: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    Undo,
    Keep,
}

impl Attachment {
    /// Takes the ports, and writes down what there will be.
    pub(crate) fn announce(
        dir: &VmDir,
        installation: &InstallationId,
        vm_id: &str,
        nat: Nat,
        taps: u8,
    ) -> Result<Attachment, NetError> {
        let ports = nat
            .policy
            .publish
            .iter()
            .map(ports::take)
            .collect::<Result<_, _>>()?;
        let plan = Planned {
            dir: dir.clone(),
            name: format!("{PREFIX}{installation}{vm_id}"),
            nat,
            taps,
        };
        plan.note(Vec::new())?;
        Ok(Attachment {
            plan: Arc::new(plan),
            _ports: ports,
            making: Mutex::default(),
            on_drop: OnDrop::Undo,
        })
    }

    /// That of a VM that is adopted, if it has one. Its ports are taken again, unless somebody was quicker.
    pub(crate) fn adopt(dir: &VmDir, nat: Nat) -> Option<Attachment> {
        let note = Connection::read(dir).ok()??;
        let ports = nat.policy.publish.iter();
        Some(Attachment {
            _ports: ports.filter_map(|one| ports::take(one).ok()).collect(),
            plan: Arc::new(Planned {
                dir: dir.clone(),
                name: note.name,
                nat,
                taps: 0,
            }),
            making: Mutex::default(),
            on_drop: OnDrop::Keep,
        })
    }

    /// What its link and its table are called.
    #[cfg(test)]
    pub(super) fn name(&self) -> &str {
        &self.plan.name
    }

    /// Leaves it as it is when this is dropped.
    pub(crate) fn live_on(&mut self) {
        self.on_drop = OnDrop::Keep;
    }

    /// Runs `start` in a new namespace that has the TAP devices when this returns. All else is made meanwhile and later:
    /// before the guest runs, [`Attachment::connected`] must say that it is there.
    pub(super) fn run<T: Send>(&self, start: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        // Whatever became of an earlier attempt.
        let _ = self.connected();
        let (namespace, started) = namespace::enter(|namespace| {
            let started = start();
            for n in 0..self.plan.taps {
                namespace.make_tap(&GuestLink::nth(n).tap)?;
            }
            Ok((namespace, started))
        })?;
        let plan = Arc::clone(&self.plan);
        let making = thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || plan.make(&namespace))
            .map_err(NetError::Thread)?;
        *self.lock() = Some(making);
        Ok(started)
    }

    /// Waits until it is made, and says whether it is.
    pub(crate) fn connected(&self) -> Result<(), NetError> {
        let Some(making) = self.lock().take() else {
            return Ok(());
        };
        making
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn lock(&self) -> MutexGuard<'_, Option<JoinHandle<Result<(), NetError>>>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Nothing is made after this; what was not, is not needed.
        let _ = self.connected();
        if self.on_drop == OnDrop::Undo {
            // What cannot be undone now is still written down.
            let _ = undo(&self.plan.dir);
        }
    }
}

impl Planned {
    fn note(&self, addresses: Vec<IpAddr>) -> Result<(), NetError> {
        let note = Connection {
            name: self.name.clone(),
            addresses,
        };
        note.write(&self.dir)
    }

    /// Makes it, by a thread that is on the host.
    fn make(&self, namespace: &Namespace) -> Result<(), NetError> {
        let mut host = Side::open()?;
        let has_v6 = has_v6();
        let pair = namespace.within(|| self.connect(&mut host, namespace, has_v6))?;
        if !self.nat.policy.publish.is_empty() {
            // Its packets may come from and go to 127.0.0.1, if the rules say so.
            set(
                Path::new("ipv4/conf")
                    .join(&self.name)
                    .join("route_localnet"),
                "1",
            )?;
        }
        self.note(pair.vm.into())
    }

    fn connect(
        &self,
        host: &mut Side,
        namespace: &Namespace,
        has_v6: bool,
    ) -> Result<Pair, NetError> {
        let mut here = Side::open()?;
        set("ipv4/ip_forward", "1")?;
        if has_v6 {
            set("ipv6/conf/all/forwarding", "1")?;
        }
        let pair = self.link(host, namespace, has_v6)?;
        let uplink = here.links.index(UPLINK)?;
        let mut steps = Steps::default().up(uplink);
        let families = if has_v6 { 2 } else { 1 };
        if has_v6 {
            steps = steps.address(uplink, link_local(2));
        }
        for n in 0..self.taps {
            let link = GuestLink::nth(n);
            let tap = here.links.index(&link.tap)?;
            steps = steps.up_as(tap, link.tap_mac);
            if has_v6 {
                steps = steps.address(tap, link_local(1));
            }
            for family in 0..families {
                let length = link.guest[family].prefix_len();
                let net = IpNet::new(link.gateway[family], length)
                    .map_err(|_| NetError::Range(self.nat.range))?;
                steps = steps.address(tap, net);
            }
        }
        for family in 0..families {
            steps = steps
                .address_alone(uplink, IpNet::from(pair.vm[family]))
                .route(uplink, pair.host[family])
                .default_route(uplink, pair.host[family]);
        }
        here.links.run(steps)?;
        here.rules.add(&inside(&self.nat, self.taps))?;
        let table = outside(&self.name, &self.nat, &pair);
        match host.rules.add(&table) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                // What an earlier attempt to start the VM left: its link went with its namespace.
                host.rules.remove(&self.name)?;
                host.rules.add(&table)?;
            }
            added => added?,
        }
        Ok(pair)
    }

    /// Makes the pair of links, and gives the host's end addresses that nobody else has.
    fn link(&self, host: &mut Side, namespace: &Namespace, has_v6: bool) -> Result<Pair, NetError> {
        for _ in 0..ATTEMPTS {
            let pair = || Steps::default().pair(&self.name, UPLINK, namespace);
            match host.links.run(pair()) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    // What an earlier attempt to start the VM left.
                    remove_in(host, &self.name)?;
                    host.links.run(pair())?;
                }
                made => made?,
            }
            let index = host.links.index(&self.name)?;
            let pair = Pair::of(self.nat.range, index);
            let mut steps = Steps::default();
            if has_v6 {
                steps = steps.address(index, link_local(1));
            }
            for family in 0..if has_v6 { 2 } else { 1 } {
                steps = steps
                    .address_alone(index, IpNet::from(pair.host[family]))
                    .route(index, pair.vm[family]);
            }
            match host.links.run(steps) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    host.links.remove(&self.name)?;
                }
                done => return Ok(done.map(|()| pair)?),
            }
        }
        Err(NetError::RangeIsFull(self.nat.range))
    }
}

/// A link-local address. The one that the kernel takes by itself can be used after a second, and without one it asks
/// nobody for a neighbour.
fn link_local(host: u16) -> IpNet {
    let address = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host);
    IpNet::V6(Ipv6Net::new_assert(address, 64))
}

/// Whether new links of the host take IPv6 addresses.
fn has_v6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        .is_ok_and(|text| text.trim_end() == "0")
}

/// The kernel, as one network namespace shows it.
struct Side {
    links: Links,
    rules: Nftables,
}

impl Side {
    fn open() -> Result<Side, NetError> {
        Ok(Side {
            links: Links::open().map_err(NetError::Netlink)?,
            rules: Nftables::open().map_err(NetError::Netlink)?,
        })
    }
}

/// Makes a TAP device and rules of every kind in a namespace that is gone at once.
pub(super) fn probe() -> Result<(), NetError> {
    let published = Published {
        host: None,
        port: 1,
        guest_port: 1,
        protocol: Protocol::Tcp,
    };
    let nat = Nat::new(Policy {
        publish: vec![published],
        ..Policy::default()
    });
    namespace::enter(|namespace| {
        namespace.make_tap(&GuestLink::nth(0).tap)?;
        let mut here = Side::open()?;
        here.links
            .run(Steps::default().pair("probe", UPLINK, &namespace))?;
        here.rules.add(&inside(&nat, 1))?;
        Ok(here
            .rules
            .add(&outside("probe", &nat, &Pair::of(nat.range, 0)))?)
    })
}

/// Removes what a VM's directory says that there is of a network on the host, and then the note.
pub(crate) fn undo(dir: &VmDir) -> Result<(), NetError> {
    let Some(note) = Connection::read(dir)? else {
        return Ok(());
    };
    remove(&note.name)?;
    let path = dir.file(NETWORK);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NetError::Note { path, source })
        }
        _ => Ok(()),
    }
}

/// Removes a table and a link. The ports that the table published are free first.
pub(super) fn remove(name: &str) -> Result<(), NetError> {
    remove_in(&mut Side::open()?, name)
}

fn remove_in(host: &mut Side, name: &str) -> Result<(), NetError> {
    host.rules.remove(name)?;
    host.links.remove(name)?;
    Ok(())
}

/// The names of all links and tables of the host that an installation may have made.
pub(super) fn of_installation(installation: &InstallationId) -> Result<Vec<String>, NetError> {
    let mut host = Side::open()?;
    let mut names = host.links.names().map_err(NetError::Netlink)?;
    names.extend(host.rules.tables().map_err(NetError::Netlink)?);
    names.retain(|name| is_ours(name) && name[PREFIX.len()..].starts_with(installation.as_str()));
    names.sort();
    names.dedup();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use rekindle_store::Root;

    use super::*;

    #[test]
    fn a_note_that_names_anything_else_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        assert_eq!(Connection::read(&dir).unwrap(), None);
        let name = "rkabcde01234567";
        std::fs::write(dir.file(NETWORK), format!(r#"{{"name":"{name}"}}"#)).unwrap();
        assert_eq!(Connection::read(&dir).unwrap().unwrap().name, name);
        for lie in [
            "eth0",
            "rk",
            "rkabcde0123456/",
            "RKabcde01234567",
            "rkabcde012345678",
        ] {
            std::fs::write(dir.file(NETWORK), format!(r#"{{"name":"{lie}"}}"#)).unwrap();
            assert!(
                matches!(undo(&dir), Err(NetError::NotANote { .. })),
                "{lie}"
            );
        }
        std::fs::write(dir.file(NETWORK), vec![b' '; 5000]).unwrap();
        assert!(matches!(undo(&dir), Err(NetError::Note { .. })));
    }
}
