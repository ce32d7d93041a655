//! The host's ports that lead into guests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use super::NetError;
use super::policy::{Protocol, Published};

/// Takes a port of the host without listening there: the kernel gives it to nobody else.
pub(super) fn take(published: &Published) -> Result<OwnedFd, NetError> {
    let kind = match published.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let bound_to = |host: IpAddr| {
        let family = match host {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
        if host == Ipv6Addr::UNSPECIFIED {
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        bind(&socket, &SocketAddr::new(host, published.port))?;
        Ok::<OwnedFd, rustix::io::Errno>(socket)
    };
    let taken = match published.host {
        Some(host) => bound_to(host),
        None => match bound_to(Ipv6Addr::UNSPECIFIED.into()) {
            // A kernel without IPv6.
            Err(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL) => {
                bound_to(Ipv4Addr::UNSPECIFIED.into())
            }
            taken => taken,
        },
    };
    taken.map_err(|e| NetError::Port {
        published: *published,
        source: e.into(),
    })
}
