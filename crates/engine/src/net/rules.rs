//! Packet filter rules as data, in the words of `nft`. What they do is [`super::plan`]'s business, how the kernel is told
//! [`super::nft`]'s.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::policy::{Ports, Protocol};

/// A table of family `inet`: for IPv4 and IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) chains: Vec<Chain>,
}

/// Rules for one place that packets pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) hook: Hook,
    /// What happens to a packet that no rule decides on.
    pub(crate) otherwise: Otherwise,
    pub(crate) rules: Vec<Rule>,
}

/// A place that packets pass, and what may be done there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// A packet came in: its destination may be changed.
    Arriving,
    /// This machine sends a packet: its destination may be changed.
    Sending,
    /// A packet goes out: its source may be changed.
    Leaving,
    /// A packet is for this machine.
    Input,
    /// A packet is for somebody else.
    Forward,
}

/// See [`Chain::otherwise`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Otherwise {
    Accept,
    Drop,
}

/// All matches must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) matches: Vec<Match>,
    pub(crate) action: Action,
}

/// What a packet can be recognized by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// It came in through this link.
    From(String),
    /// It came in through a link whose name begins so.
    FromAny(&'static str),
    /// It came in through a link whose name begins otherwise.
    NotFromAny(&'static str),
    /// It goes out through this link.
    Through(String),
    /// It goes out through a link whose name begins so.
    ThroughAny(&'static str),
    /// It goes out through another link.
    NotThrough(String),
    /// Its family is IPv4, or IPv6.
    Family(Family),
    /// Its source is in this network.
    Source(IpNet),
    /// It is of this family, and its source is another address.
    NotSource(IpAddr),
    /// Its destination is in this network.
    Destination(IpNet),
    /// Its destination is one of this machine's own addresses.
    ToThisMachine,
    /// It is of this protocol.
    Protocol(Protocol),
    /// Its destination port is one of these. Stands behind a protocol.
    Ports(Ports),
    /// It belongs to a connection that was let through, or answers one.
    Known,
    /// Its connection's destination was changed: it is for a published port.
    Redirected,
    /// It is an ICMP echo request.
    Ping(Family),
    /// It asks for, or tells, who has an IPv6 address.
    Neighbour,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(address: IpAddr) -> Family {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Accept,
    Drop,
    /// It goes to this address instead, and to this port if one is said.
    SendTo(IpAddr, Option<u16>),
    /// It gets the address of the link that it leaves through.
    Masquerade,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for chain in &self.chains {
            let policy = match chain.otherwise {
                Otherwise::Accept => "accept",
                Otherwise::Drop => "drop",
            };
            writeln!(f, "  chain {} {{ policy {policy}", chain.hook.name())?;
            for rule in &chain.rules {
                writeln!(f, "    {rule}")?;
            }
            writeln!(f, "  }}")?;
        }
        write!(f, "}}")
    }
}

impl Hook {
    /// The chain's name, which is also the kernel's for the place.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Hook::Arriving => "prerouting",
            Hook::Sending => "output",
            Hook::Leaving => "postrouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for one in &self.matches {
            write!(f, "{one} ")?;
        }
        match &self.action {
            Action::Accept => write!(f, "accept"),
            Action::Drop => write!(f, "drop"),
            Action::SendTo(address, None) => write!(f, "dnat to {address}"),
            Action::SendTo(IpAddr::V4(address), Some(port)) => {
                write!(f, "dnat to {address}:{port}")
            }
            Action::SendTo(address, Some(port)) => write!(f, "dnat to [{address}]:{port}"),
            Action::Masquerade => write!(f, "masquerade"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = |v4| if v4 { "ip" } else { "ip6" };
        match self {
            Match::From(link) => write!(f, "iifname {link}"),
            Match::FromAny(prefix) => write!(f, "iifname {prefix}*"),
            Match::NotFromAny(prefix) => write!(f, "iifname != {prefix}*"),
            Match::Through(link) => write!(f, "oifname {link}"),
            Match::ThroughAny(prefix) => write!(f, "oifname {prefix}*"),
            Match::NotThrough(link) => write!(f, "oifname != {link}"),
            Match::Family(Family::V4) => write!(f, "meta nfproto ipv4"),
            Match::Family(Family::V6) => write!(f, "meta nfproto ipv6"),
            Match::Source(net) => write!(f, "{} saddr {net}", ip(net.addr().is_ipv4())),
            Match::NotSource(address) => write!(f, "{} saddr != {address}", ip(address.is_ipv4())),
            Match::Destination(net) => write!(f, "{} daddr {net}", ip(net.addr().is_ipv4())),
            Match::ToThisMachine => write!(f, "fib daddr type local"),
            Match::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
            Match::Ports(ports) => write!(f, "th dport {ports}"),
            Match::Known => write!(f, "ct state established,related"),
            Match::Redirected => write!(f, "ct status dnat"),
            Match::Ping(Family::V4) => write!(f, "icmp type echo-request"),
            Match::Ping(Family::V6) => write!(f, "icmpv6 type echo-request"),
            Match::Neighbour => write!(f, "icmpv6 type nd-neighbor-solicit-advert"),
        }
    }
}
