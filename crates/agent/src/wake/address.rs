//! The addresses of a guest's network interfaces, through rtnetlink(7).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rekindle_agent::Address;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};

/// More than any answer of the kernel has.
const BUFFER: usize = 64 << 10;

/// Gives an interface an address in the place of those that it has, and brings it up.
pub(super) fn set(wanted: &Address) -> io::Result<()> {
    let index = index_of(&wanted.interface)?;
    let mut kernel = Kernel::connect()?;
    for old in kernel.addresses(index, wanted.address)? {
        kernel.ask(RouteNetlinkMessage::DelAddress(old), 0)?;
    }
    let message = RouteNetlinkMessage::NewAddress(address(wanted, index));
    kernel.ask(message, NLM_F_CREATE | NLM_F_REPLACE)?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    kernel.ask(RouteNetlinkMessage::SetLink(link), 0)?;
    if let Some(gateway) = wanted.gateway {
        let message = RouteNetlinkMessage::NewRoute(route(gateway, index));
        kernel.ask(message, NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    Ok(())
}

fn index_of(interface: &str) -> io::Result<u32> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "the guest has no such interface");
    // A name, and no path.
    if interface.is_empty() || interface.contains('/') || interface.starts_with('.') {
        return Err(missing());
    }
    let index = fs::read_to_string(format!("/sys/class/net/{interface}/ifindex"));
    let index = index.map_err(|_| missing())?;
    index.trim().parse().map_err(io::Error::other)
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address(wanted: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(wanted.address);
    message.header.prefix_len = wanted.prefix;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Address(wanted.address),
        AddressAttribute::Local(wanted.address),
    ];
    if let IpAddr::V4(address) = wanted.address
        && wanted.prefix < 31
    {
        let host = u32::MAX.checked_shr(wanted.prefix.into()).unwrap_or(0);
        let broadcast = Ipv4Addr::from_bits(address.to_bits() | host);
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    message
}

/// The way to everywhere.
fn route(gateway: IpAddr, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(gateway);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    let gateway = match gateway {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    message.attributes = vec![RouteAttribute::Gateway(gateway), RouteAttribute::Oif(index)];
    message
}

/// A netlink socket to the kernel.
struct Kernel {
    socket: OwnedFd,
    sequence: u32,
}

impl Kernel {
    fn connect() -> io::Result<Kernel> {
        let family = rustix::net::AddressFamily::NETLINK;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
        let sequence = 0;
        Ok(Kernel { socket, sequence })
    }

    /// Has something done.
    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, flags | NLM_F_ACK)?;
        self.answers(|_| ())
    }

    /// The addresses of an interface that are of the same kind, and not those that it made up itself.
    fn addresses(&mut self, index: u32, like: IpAddr) -> io::Result<Vec<AddressMessage>> {
        let mut all = AddressMessage::default();
        all.header.family = family(like);
        self.send(RouteNetlinkMessage::GetAddress(all), NLM_F_DUMP)?;
        let mut found = Vec::new();
        self.answers(|message| {
            if let RouteNetlinkMessage::NewAddress(message) = message
                && message.header.index == index
                && message.header.family == family(like)
                && !is_link_local(&message)
            {
                found.push(message);
            }
        })?;
        Ok(found)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Takes all answers, up to the one that says that there are no more, or why nothing was done.
    fn answers(&mut self, mut take: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let flags = RecvFlags::empty();
            let (count, _) = rustix::net::recv(&self.socket, &mut buffer[..], flags)?;
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                // Each begins at a multiple of four.
                let length = usize::try_from(message.header.length).map_err(io::Error::other)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::InnerMessage(message) => take(message),
                    _ => {}
                }
            }
        }
    }
}

fn is_link_local(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| {
        matches!(attribute, AddressAttribute::Address(IpAddr::V6(address))
            if Ipv6Addr::is_unicast_link_local(address))
    })
}
