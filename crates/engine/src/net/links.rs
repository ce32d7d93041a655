//! Links, addresses and routes, told to the kernel.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::net::netdevice;

use super::netlink::{Request, Socket};

/// A connection to the kernel's network configuration, in the network namespace in which it was opened.
pub(crate) struct Links(Socket);

/// Things to be done with links, in this order and without waiting between them.
#[derive(Default)]
pub(crate) struct Steps {
    requests: Vec<Request<RouteNetlinkMessage>>,
    names: Vec<String>,
}

/// Why the kernel did not do something with a link.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct LinkError {
    /// What it was to do.
    what: String,
    /// Why not.
    #[source]
    source: io::Error,
}

impl LinkError {
    pub(crate) fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

impl Links {
    pub(crate) fn open() -> io::Result<Links> {
        Ok(Links(Socket::open(NETLINK_ROUTE)?))
    }

    /// Does all of it, or stops somewhere.
    pub(crate) fn run(&mut self, steps: Steps) -> Result<(), LinkError> {
        let Steps { requests, names } = steps;
        self.0.send(requests).map_err(|(at, source)| LinkError {
            what: at
                .and_then(|at| names.into_iter().nth(at))
                .unwrap_or_else(|| "change links".to_owned()),
            source,
        })
    }

    /// Removes a link, and its peer. Whether there was one.
    pub(crate) fn remove(&mut self, name: &str) -> Result<bool, LinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        let mut steps = Steps::default();
        steps.push(
            RouteNetlinkMessage::DelLink(message),
            0,
            format!("remove the network link {name}"),
        );
        match self.run(steps) {
            Ok(()) => Ok(true),
            Err(e) if e.source.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// The index of a link.
    pub(crate) fn index(&self, name: &str) -> Result<u32, LinkError> {
        netdevice::name_to_index(&self.0, name).map_err(|e| LinkError {
            what: format!("find the network link {name}"),
            source: e.into(),
        })
    }

    /// The names of all links.
    pub(crate) fn names(&mut self) -> io::Result<Vec<String>> {
        let answers = self.0.dump(Request {
            message: RouteNetlinkMessage::GetLink(LinkMessage::default()),
            flags: NLM_F_DUMP,
        })?;
        let name = |answer| match answer {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.into_iter().find_map(|one| match one {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                })
            }
            _ => None,
        };
        Ok(answers.into_iter().filter_map(name).collect())
    }
}

impl Steps {
    fn push(&mut self, message: RouteNetlinkMessage, flags: u16, name: String) {
        self.requests.push(Request {
            message,
            flags: flags | NLM_F_ACK,
        });
        self.names.push(name);
    }

    /// Makes a pair of links, this end here and up, the other one in that namespace.
    pub(crate) fn pair(mut self, here: &str, there: &str, namespace: impl AsFd) -> Steps {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(there.to_owned()),
            LinkAttribute::NetNsFd(namespace.as_fd().as_raw_fd()),
        ];
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::IfName(here.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.push(
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("make the network link {here}"),
        );
        self
    }

    /// Switches a link on.
    pub(crate) fn up(mut self, link: u32) -> Steps {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.push(
            RouteNetlinkMessage::SetLink(message),
            0,
            "switch a network link on".to_owned(),
        );
        self
    }

    /// Gives a link that is off a MAC address, and switches it on.
    pub(crate) fn up_as(mut self, link: u32, mac: [u8; 6]) -> Steps {
        let mut message = LinkMessage::default();
        message.header.index = link;
        message.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.push(
            RouteNetlinkMessage::SetLink(message),
            0,
            "give a network link a MAC address".to_owned(),
        );
        self.up(link)
    }

    /// Gives a link an address, and with it the way to its network.
    pub(crate) fn address(self, link: u32, net: IpNet) -> Steps {
        self.add_address(link, net, AddressFlags::empty())
    }

    /// Gives a link an address, and no way to anywhere.
    pub(crate) fn address_alone(self, link: u32, net: IpNet) -> Steps {
        self.add_address(link, net, AddressFlags::Noprefixroute)
    }

    fn add_address(mut self, link: u32, net: IpNet, flags: AddressFlags) -> Steps {
        let mut message = AddressMessage::default();
        message.header.family = family(net.addr());
        message.header.prefix_len = net.prefix_len();
        message.header.index = link;
        message.attributes = vec![
            AddressAttribute::Local(net.addr()),
            AddressAttribute::Address(net.addr()),
            // Nobody else can have it, so nobody is asked.
            AddressAttribute::Flags(flags | AddressFlags::Nodad),
        ];
        self.push(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("give a network link the address {net}"),
        );
        self
    }

    /// The way to one address. Refused if there is one already.
    pub(crate) fn route(mut self, link: u32, to: IpAddr) -> Steps {
        let length = if to.is_ipv4() { 32 } else { 128 };
        let mut message = route(to, link);
        message.header.destination_prefix_length = length;
        message.header.scope = RouteScope::Link;
        message
            .attributes
            .push(RouteAttribute::Destination(address(to)));
        self.push(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("lead the address {to} to a network link"),
        );
        self
    }

    /// The way to everywhere.
    pub(crate) fn default_route(mut self, link: u32, gateway: IpAddr) -> Steps {
        let mut message = route(gateway, link);
        message
            .attributes
            .push(RouteAttribute::Gateway(address(gateway)));
        self.push(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
            format!("make {gateway} the way out"),
        );
        self
    }
}

fn route(like: IpAddr, link: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(like);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Oif(link)];
    message
}

fn family(of: IpAddr) -> AddressFamily {
    match of {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address(of: IpAddr) -> RouteAddress {
    match of {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}
