//! What a guest may reach, and what of it may be reached. Pure data: read from the command line, kept in the VM's record
//! and in its snapshots.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The most entries that each list of a policy may have. Each is a rule that packets pass one by one.
pub const MAX_ENTRIES: usize = 256;

/// What a guest's network lets through.
///
/// Whatever it says, a guest reaches neither this host's own services, nor other guests, nor link-local addresses, of
/// which 169.254.169.254 is where clouds tell secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Policy {
    /// Whether the guest may open connections at all.
    #[serde(default)]
    pub outbound: Outbound,
    /// If there are any, the guest reaches only these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Target>,
    /// The guest does not reach these, also if they are allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Target>,
    /// Ports of the host that lead into the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Published>,
}

impl Policy {
    /// The same, but no port is published: what a copy takes over from its snapshot.
    pub fn unpublished(mut self) -> Policy {
        self.publish.clear();
        self
    }

    /// Refuses lists that are too long, and ports that are published twice.
    pub fn check(&self) -> Result<(), PolicyError> {
        for (what, length) in [
            ("allowed", self.allow.len()),
            ("denied", self.deny.len()),
            ("published", self.publish.len()),
        ] {
            if length > MAX_ENTRIES {
                return Err(PolicyError::TooMany { what, length });
            }
        }
        for (n, one) in self.publish.iter().enumerate() {
            if self.publish[..n].iter().any(|other| other.meets(one)) {
                return Err(PolicyError::Twice(*one));
            }
        }
        Ok(())
    }
}

/// Whether a guest may open connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outbound {
    /// To whatever the lists let through.
    #[default]
    On,
    /// To nothing; it answers on published ports only.
    Off,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One port, or all from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The first.
    pub first: u16,
    /// The last, not below the first.
    pub last: u16,
}

/// A network and some ports in it: `10.0.0.0/8`, `1.1.1.1:53/udp`, `[2001:db8::]/32`, `[::1]:8000-8999/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target {
    /// The addresses.
    pub net: IpNet,
    /// The ports; all, and all protocols, if absent.
    pub ports: Option<Ports>,
    /// The protocol; TCP and UDP if absent.
    pub protocol: Option<Protocol>,
}

/// A port of the host that leads into a guest: `8080:80`, `127.0.0.1:8080:80`, `[::1]:53:53/udp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Published {
    /// The host's address; all of them if absent.
    pub host: Option<IpAddr>,
    /// The host's port.
    pub port: u16,
    /// The guest's port.
    pub guest_port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

impl Published {
    /// Whether both want the same port.
    fn meets(&self, other: &Published) -> bool {
        let hosts = match (self.host, other.host) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        hosts && self.port == other.port && self.protocol == other.protocol
    }
}

/// How much may go through a network interface, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetRate {
    /// What the guest receives.
    pub down: NonZeroU64,
    /// What the guest sends.
    pub up: NonZeroU64,
}

/// What is wrong with a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// No target looks so.
    #[error(
        "{0:?} is no target: write a network with ports and a protocol if need be, such as 10.0.0.0/8, 1.1.1.1:53/udp \
         or [2001:db8::]/32"
    )]
    Target(String),
    /// No published port looks so.
    #[error("{0:?} is no published port: write [HOSTIP:]HOSTPORT:GUESTPORT[/udp], such as 8080:80")]
    Published(String),
    /// A list is too long.
    #[error("{length} {what} entries: a network takes {MAX_ENTRIES} at the most")]
    TooMany {
        /// The list.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// A port is published twice.
    #[error("the port {0} is published twice")]
    Twice(Published),
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for Ports {
    type Err = ();

    fn from_str(text: &str) -> Result<Ports, ()> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (port(first)?, port(last)?) {
            (first, last) if first <= last => Ok(Ports { first, last }),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, length) = (self.net.addr(), self.net.prefix_len());
        match address {
            IpAddr::V4(address) => write!(f, "{address}/{length}")?,
            IpAddr::V6(address) => write!(f, "[{address}]/{length}")?,
        }
        if let Some(ports) = self.ports {
            write!(f, ":{ports}")?;
        }
        write_protocol(f, self.protocol)
    }
}

impl FromStr for Target {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Target, PolicyError> {
        parse_target(text).map_err(|()| PolicyError::Target(text.to_owned()))
    }
}

fn parse_target(text: &str) -> Result<Target, ()> {
    let (rest, protocol) = split_protocol(text);
    let (address, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or(())?,
        None => rest.split_at(rest.find(['/', ':']).unwrap_or(rest.len())),
    };
    let address: IpAddr = address.parse().map_err(drop)?;
    if address.is_ipv6() != text.starts_with('[') {
        return Err(());
    }
    let (length, ports) = match rest.strip_prefix('/') {
        None => (None, rest),
        Some(rest) => {
            let (length, ports) = rest.split_at(rest.find(':').unwrap_or(rest.len()));
            (Some(length.parse().map_err(drop)?), ports)
        }
    };
    let whole = if address.is_ipv4() { 32 } else { 128 };
    let net = IpNet::new(address, length.unwrap_or(whole)).map_err(drop)?;
    let ports = match ports {
        "" => None,
        ports => Some(ports.strip_prefix(':').ok_or(())?.parse()?),
    };
    Ok(Target {
        net: net.trunc(),
        ports,
        protocol,
    })
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            None => {}
            Some(IpAddr::V4(host)) => write!(f, "{host}:")?,
            Some(IpAddr::V6(host)) => write!(f, "[{host}]:")?,
        }
        write!(f, "{}:{}", self.port, self.guest_port)?;
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => write!(f, "/udp"),
        }
    }
}

impl FromStr for Published {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Published, PolicyError> {
        parse_published(text).map_err(|()| PolicyError::Published(text.to_owned()))
    }
}

fn parse_published(text: &str) -> Result<Published, ()> {
    let (rest, protocol) = split_protocol(text);
    let (rest, guest_port) = rest.rsplit_once(':').ok_or(())?;
    let (host, port_text) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((host, port_text)) => {
            let bare = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'));
            let address: IpAddr = bare.unwrap_or(host).parse().map_err(drop)?;
            if address.is_ipv6() != bare.is_some() {
                return Err(());
            }
            (Some(address), port_text)
        }
    };
    Ok(Published {
        // "On all addresses" in the words of others.
        host: host.filter(|host| *host != IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        port: port(port_text)?,
        guest_port: port(guest_port)?,
        protocol: protocol.unwrap_or(Protocol::Tcp),
    })
}

/// Port 0 is none.
fn port(text: &str) -> Result<u16, ()> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(()),
    }
}

fn split_protocol(text: &str) -> (&str, Option<Protocol>) {
    for (suffix, protocol) in [("/tcp", Protocol::Tcp), ("/udp", Protocol::Udp)] {
        if let Some(rest) = text.strip_suffix(suffix) {
            return (rest, Some(protocol));
        }
    }
    (text, None)
}

fn write_protocol(f: &mut fmt::Formatter<'_>, protocol: Option<Protocol>) -> fmt::Result {
    match protocol {
        None => Ok(()),
        Some(protocol) => write!(f, "/{protocol}"),
    }
}

impl TryFrom<String> for Target {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Target, PolicyError> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> String {
        target.to_string()
    }
}

impl TryFrom<String> for Published {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Published, PolicyError> {
        text.parse()
    }
}

impl From<Published> for String {
    fn from(published: Published) -> String {
        published.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_they_are_written() {
        for (text, written) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("1.1.1.1", "1.1.1.1/32"),
            ("1.1.1.1:53/udp", "1.1.1.1/32:53/udp"),
            ("0.0.0.0/0:8000-8999/tcp", "0.0.0.0/0:8000-8999/tcp"),
            ("[2001:db8::1]/32:443", "[2001:db8::]/32:443"),
            ("[::]/0", "[::]/0"),
            ("10.0.0.0/8/tcp", "10.0.0.0/8/tcp"),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), written, "{text}");
            assert_eq!(written.parse::<Target>().unwrap(), target, "{text}");
        }
        for bad in [
            "",
            "example.org",
            "10.0.0.0/33",
            "1.1.1.1:0",
            "1.1.1.1:9-8",
            "1.1.1.1:x",
            "::1",
            "[1.1.1.1]",
            "[::1",
            "1.1.1.1:70000",
        ] {
            assert_eq!(
                bad.parse::<Target>(),
                Err(PolicyError::Target(bad.to_owned()))
            );
        }
    }

    #[test]
    fn published_ports_are_read_as_they_are_written() {
        for (text, written) in [
            ("8080:80", "8080:80"),
            ("8080:80/tcp", "8080:80"),
            ("53:53/udp", "53:53/udp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080:80"),
            ("0.0.0.0:8080:80", "8080:80"),
            ("[::1]:8080:80", "[::1]:8080:80"),
        ] {
            let published: Published = text.parse().unwrap();
            assert_eq!(published.to_string(), written, "{text}");
        }
        for bad in [
            "",
            "80",
            "0:80",
            "80:0",
            "a:80",
            "::1:8080:80",
            "1.2.3:8080:80",
            "80:80/icmp",
            "80:70000",
        ] {
            assert_eq!(
                bad.parse::<Published>(),
                Err(PolicyError::Published(bad.to_owned()))
            );
        }
    }

    #[test]
    fn a_port_is_published_once() {
        let policy = |ports: &[&str]| Policy {
            publish: ports.iter().map(|port| port.parse().unwrap()).collect(),
            ..Policy::default()
        };
        assert_eq!(policy(&["80:80", "80:80/udp", "81:80"]).check(), Ok(()));
        assert_eq!(
            policy(&["127.0.0.1:80:80", "127.0.0.2:80:80"]).check(),
            Ok(())
        );
        let twice = policy(&["80:80", "127.0.0.1:80:81"]).check().unwrap_err();
        assert_eq!(
            twice.to_string(),
            "the port 127.0.0.1:80:81 is published twice"
        );
    }

    #[test]
    fn a_policy_survives_being_written_down() {
        let policy = Policy {
            outbound: Outbound::Off,
            allow: vec!["1.1.1.1:53/udp".parse().unwrap()],
            deny: vec!["[fd00::]/8".parse().unwrap()],
            publish: vec!["8080:80".parse().unwrap()],
        };
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
        assert_eq!(
            serde_json::from_str::<Policy>("{}").unwrap(),
            Policy::default()
        );
        assert!(serde_json::from_str::<Policy>(r#"{"allow":["nonsense"]}"#).is_err());
    }
}
