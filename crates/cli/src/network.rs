//! The flags that say what network a guest gets, and how a Linux guest is told its addresses.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU64;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use rekindle_engine::net::plan::{DEFAULT_RANGE, GuestLink, Nat};
use rekindle_engine::net::policy::{Outbound, Policy, Published, Target};
use rekindle_engine::vm::config::NetRate;
use rekindle_engine::vm::metadata::Metadata;

/// What a network lets through; `run` and `restore` have these flags.
#[derive(Debug, clap::Args)]
pub(crate) struct NetworkArgs {
    /// Lead this port of the host into the guest: 8080:80, 127.0.0.1:53:53/udp
    #[arg(long, value_name = "[IP:]H:G[/udp]")]
    publish: Vec<Published>,
    /// Let the guest reach only this: 10.0.0.0/8, 1.1.1.1:53/udp
    #[arg(long, value_name = "CIDR[:PORTS]")]
    allow: Vec<Target>,
    /// Do not let the guest reach this, also if it is allowed
    #[arg(long, value_name = "CIDR[:PORTS]")]
    deny: Vec<Target>,
    /// Let the guest answer on published ports, and open no connection itself
    #[arg(long)]
    no_outbound: bool,
    /// Take the VM's own address on the host from this range
    #[arg(long, value_name = "CIDR", env = "REKINDLE_NET_RANGE", default_value_t = DEFAULT_RANGE)]
    net_range: Ipv4Net,
}

impl NetworkArgs {
    /// The network that they describe, where they say nothing as before.
    pub(crate) fn nat(&self, mut before: Policy) -> Nat {
        before.publish = self.publish.clone();
        if !self.allow.is_empty() {
            before.allow = self.allow.clone();
        }
        if !self.deny.is_empty() {
            before.deny = self.deny.clone();
        }
        if self.no_outbound {
            before.outbound = Outbound::Off;
        }
        Nat::new(before).range(self.net_range)
    }

    /// Refuses flags of a network that there is none of.
    pub(crate) fn none(&self) -> Result<()> {
        let flags = [
            ("--publish", !self.publish.is_empty()),
            ("--allow", !self.allow.is_empty()),
            ("--deny", !self.deny.is_empty()),
            ("--no-outbound", self.no_outbound),
        ];
        match flags.iter().find(|(_, given)| *given) {
            Some((flag, _)) => bail!("{flag} is about a network of the VM's own: add --net nat"),
            None => Ok(()),
        }
    }
}

/// `100` or `100:20`: what a guest may receive and send, in megabits a second.
pub(crate) fn parse_rate(text: &str) -> Result<NetRate, String> {
    let (down, up) = text.split_once(':').unwrap_or((text, text));
    let bytes = |megabits: &str| {
        let number: NonZeroU64 = megabits.parse().ok()?;
        number.checked_mul(NonZeroU64::new(125_000)?)
    };
    match (bytes(down), bytes(up)) {
        (Some(down), Some(up)) => Ok(NetRate { down, up }),
        _ => Err(format!("{text:?} is not like 100 or 100:20")),
    }
}

/// What `--mmds` names.
pub(crate) fn metadata(file: &Path) -> Result<Metadata> {
    let named = || format!("--mmds {}", file.display());
    let text = std::fs::read(file).with_context(named)?;
    Metadata::parse(&text).with_context(named)
}

/// What tells a Linux guest its addresses, on the kernel's command line: for IPv4 in the kernel's own words
/// (`Documentation/admin-guide/nfs/nfsroot.rst`), for IPv6 in words that our initrd knows.
pub(crate) fn kernel_arguments(interfaces: u8, resolvers: &[Ipv4Addr]) -> String {
    let one = |n: u8| {
        let GuestLink { guest, gateway, .. } = GuestLink::nth(n);
        let [v4, v6] = guest;
        // The first interface is the way out.
        let ways = match n {
            0 => gateway.map(|way| way.to_string()),
            _ => Default::default(),
        };
        let resolvers: String = match n {
            0 => resolvers
                .iter()
                .take(2)
                .map(|ip| format!(":{ip}"))
                .collect(),
            _ => String::new(),
        };
        format!(
            " ip={}::{}:{}::eth{n}:off{resolvers} rekindle.ip6=eth{n},{v6},{}",
            v4.addr(),
            ways[0],
            v4.netmask(),
            ways[1],
        )
    };
    (0..interfaces).map(one).collect()
}

/// The host's name servers, but for those on the host itself, which no guest reaches.
pub(crate) fn resolvers() -> Vec<Ipv4Addr> {
    // Where the first one names systemd's own server, the second has those that it asks.
    let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
    let texts = files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok());
    texts
        .map(|text| resolvers_in(&text))
        .find(|found| !found.is_empty())
        .unwrap_or_default()
}

fn resolvers_in(text: &str) -> Vec<Ipv4Addr> {
    let address = |line: &str| match line.trim().strip_prefix("nameserver")?.trim().parse() {
        Ok(IpAddr::V4(address)) if !address.is_loopback() && !address.is_link_local() => {
            Some(address)
        }
        _ => None,
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_its_addresses_and_one_way_out() {
        let words = kernel_arguments(2, &[Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(9, 9, 9, 9)]);
        assert_eq!(
            words,
            " ip=172.16.0.2::172.16.0.1:255.255.255.252::eth0:off:1.1.1.1:9.9.9.9 \
             rekindle.ip6=eth0,fd72:656b:696e::2/64,fd72:656b:696e::1 \
             ip=172.16.0.6:::255.255.255.252::eth1:off \
             rekindle.ip6=eth1,fd72:656b:696e:1::2/64,"
        );
    }

    #[test]
    fn name_servers_that_no_guest_reaches_are_left_out() {
        let text = "# nameserver 9.9.9.9\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\nsearch x\n";
        assert_eq!(resolvers_in(text), [Ipv4Addr::new(10, 0, 0, 1)]);
    }

    #[test]
    fn rates_are_megabits() {
        let rate = parse_rate("100:20").unwrap();
        assert_eq!((rate.down.get(), rate.up.get()), (12_500_000, 2_500_000));
        assert_eq!(parse_rate("8").unwrap().up.get(), 1_000_000);
        for bad in [
            "",
            "0",
            "1:",
            "x",
            "1:2:3",
            "99999999999999999999",
            "18446744073709551615",
        ] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }
}
