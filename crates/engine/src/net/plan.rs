//! Who has which address and what is let through: the whole network of a VM as data, before anything is made.
//!
//! ```text
//!   guest                   the VM's namespace                            the host
//!   eth0 172.16.0.2 ──── tap 172.16.0.1 ─ filter, NAT ─ uplink ═══════ rk… ─ filter, NAT ──▶ the world
//!   the same in every guest                        198.18.0.1         198.18.0.0
//!                                                  another in each namespace
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::policy::{Outbound, Policy, Protocol, Published, Target};
use super::rules::{Action, Chain, Family, Hook, Match, Otherwise, Rule, Table};

/// What begins the names of links and tables on the host, of every installation.
pub(crate) const PREFIX: &str = "rk";
/// The namespace's end of the pair that leads to the host.
pub(crate) const UPLINK: &str = "uplink";
/// The most network interfaces that a guest gets this way.
pub const MAX_INTERFACES: u8 = 8;
/// From where guests' namespaces get their addresses, unless said otherwise. The range is set aside for tests between
/// networks (RFC 2544), so that neither a local network nor a VPN has it.
pub const DEFAULT_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15);

/// Guests' side, the same in every namespace: interface n is in the n-th network of 4 addresses.
const GUEST_V4: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 0);
/// Guests' side, the same in every namespace: interface n is in the n-th /64 of this unique local /48.
const GUEST_V6: u128 = 0xfd72_656b_696e << 80;
/// The namespaces' side: this unique local /64, numbered as in the IPv4 range.
const UPLINK_V6: u128 = 0xfd72_656b_696f << 80;

/// Where no guest gets, whatever its policy says. Beside these, a guest reaches no other guest and not its host.
const NEVER: [&str; 10] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    // Where clouds tell a machine's secrets, and other things that are no further away than a cable.
    "169.254.0.0/16",
    // Multicast, reserved addresses, broadcast.
    "224.0.0.0/3",
    "fe80::/10",
    "ff00::/8",
    // The same secrets at other addresses: Amazon's, Google's, Scaleway's, Alibaba's.
    "fd00:ec2::/32",
    "fd20:ce::254/128",
    "fd00:42::42/128",
    "100.100.100.200/32",
];

/// A network that is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Nat {
    /// What it lets through.
    pub policy: Policy,
    /// From where the VM gets its address on the host.
    pub range: Ipv4Net,
}

impl Default for Nat {
    fn default() -> Self {
        Nat {
            policy: Policy::default(),
            range: DEFAULT_RANGE,
        }
    }
}

impl Nat {
    /// With this policy.
    pub fn new(policy: Policy) -> Nat {
        Nat {
            policy,
            ..Nat::default()
        }
    }

    /// Takes addresses from this range.
    pub fn range(mut self, range: Ipv4Net) -> Nat {
        self.range = range.trunc();
        self
    }
}

/// The addresses of one pair of links, which nobody else on the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) host: [IpAddr; 2],
    pub(crate) vm: [IpAddr; 2],
}

impl Pair {
    /// The pair of the host's link with this index. No two links that exist have one index, and an index comes again
    /// only after all others: so two pairs meet only if one lives very long, and then their routes do.
    pub(crate) fn of(range: Ipv4Net, index: u32) -> Pair {
        let pairs = 1 << (31 - u32::from(range.prefix_len().min(31)));
        let first = (index % pairs) * 2;
        let v4 = |n| IpAddr::V4(Ipv4Addr::from_bits(range.network().to_bits() | n));
        let v6 = |n| IpAddr::V6(Ipv6Addr::from_bits(UPLINK_V6 | u128::from(n)));
        Pair {
            host: [v4(first), v6(first)],
            vm: [v4(first + 1), v6(first + 1)],
        }
    }
}

/// The link between a TAP device and a guest's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLink {
    /// The TAP device's name.
    pub tap: String,
    /// The TAP device's MAC address: a copy knows it from its original, and asks nobody for it.
    pub tap_mac: [u8; 6],
    /// The guest's MAC address.
    pub mac: String,
    /// The guest's addresses, with the length of their network.
    pub guest: [IpNet; 2],
    /// The namespace's addresses, which are the guest's gateways.
    pub gateway: [IpAddr; 2],
}

impl GuestLink {
    /// Of the n-th interface.
    pub fn nth(n: u8) -> GuestLink {
        let v4 = |host| Ipv4Addr::from_bits(GUEST_V4.to_bits() | (u32::from(n) * 4 + host));
        let v6 = |host| Ipv6Addr::from_bits(GUEST_V6 | (u128::from(n) << 64) | host);
        GuestLink {
            tap: format!("rktap{n}"),
            tap_mac: [0x06, 0x72, 0x6b, 0x00, 0x01, n],
            mac: format!("06:72:6b:00:00:{n:02x}"),
            guest: [
                IpNet::V4(Ipv4Net::new_assert(v4(2), 30)),
                IpNet::V6(Ipv6Net::new_assert(v6(2), 64)),
            ],
            gateway: [IpAddr::V4(v4(1)), IpAddr::V6(v6(1))],
        }
    }
}

/// The rules in the VM's namespace, which go when it does.
pub(crate) fn inside(nat: &Nat, taps: u8) -> Table {
    let guest = |n| GuestLink::nth(n).guest.map(|net| net.addr());
    let mut forward = vec![
        rule([Match::Known], Action::Accept),
        // The host has decided on it.
        rule([Match::From(UPLINK.to_owned())], Action::Accept),
    ];
    for n in 0..taps {
        let from = Match::From(GuestLink::nth(n).tap);
        forward.extend(
            guest(n).map(|address| rule([from.clone(), Match::NotSource(address)], Action::Drop)),
        );
    }
    forward.push(rule(
        [Match::FromAny("rktap"), Match::ThroughAny("rktap")],
        Action::Drop,
    ));
    forward.extend(never(nat).map(|net| rule([Match::Destination(net)], Action::Drop)));
    forward.extend(nat.policy.deny.iter().flat_map(|one| to(one, Action::Drop)));
    match (nat.policy.outbound, nat.policy.allow.as_slice()) {
        (Outbound::Off, _) => {}
        (Outbound::On, []) => forward.push(rule([Match::FromAny("rktap")], Action::Accept)),
        (Outbound::On, allowed) => {
            forward.extend(allowed.iter().flat_map(|one| to(one, Action::Accept)));
        }
    }
    let masquerade = rule([Match::Through(UPLINK.to_owned())], Action::Masquerade);
    Table {
        name: "rekindle".to_owned(),
        chains: vec![
            Chain {
                hook: Hook::Arriving,
                otherwise: Otherwise::Accept,
                rules: guest(0)
                    .map(|address| {
                        let from = Match::From(UPLINK.to_owned());
                        rule(
                            [from, Match::Family(Family::of(address))],
                            Action::SendTo(address, None),
                        )
                    })
                    .into(),
            },
            Chain {
                hook: Hook::Leaving,
                otherwise: Otherwise::Accept,
                rules: vec![masquerade],
            },
            Chain {
                hook: Hook::Input,
                otherwise: Otherwise::Drop,
                rules: vec![
                    rule([Match::Neighbour], Action::Accept),
                    rule([Match::Ping(Family::V4)], Action::Accept),
                    rule([Match::Ping(Family::V6)], Action::Accept),
                ],
            },
            Chain {
                hook: Hook::Forward,
                otherwise: Otherwise::Drop,
                rules: forward,
            },
        ],
    }
}

/// The rules on the host, which are the only thing of a VM's network there beside a link.
pub(crate) fn outside(name: &str, nat: &Nat, pair: &Pair) -> Table {
    let from = || Match::From(name.to_owned());
    let into = || Match::Through(name.to_owned());
    let mut forward = vec![
        // Whatever happens in the namespace, it has one address, and no way to another guest.
        rule([from(), Match::ThroughAny(PREFIX)], Action::Drop),
    ];
    forward.extend(
        pair.vm
            .map(|vm| rule([from(), Match::NotSource(vm)], Action::Drop)),
    );
    forward.push(rule([into(), Match::Known], Action::Accept));
    forward.push(rule([into(), Match::Redirected], Action::Accept));
    forward.push(rule([into()], Action::Drop));
    let mut leaving: Vec<Rule> = pair
        .vm
        .map(|vm| {
            let matches = [
                Match::Source(IpNet::from(vm)),
                Match::NotThrough(name.to_owned()),
            ];
            rule(matches, Action::Masquerade)
        })
        .into();
    // The host's own programs ask for a published port at 127.0.0.1, and no answer finds back to that.
    let loopback = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8));
    leaving.push(rule([into(), Match::Source(loopback)], Action::Masquerade));
    let chain = |hook, rules| Chain {
        hook,
        otherwise: Otherwise::Accept,
        rules,
    };
    // To a loopback address the host's own programs alone send, by `sending`. What arrives for one is from a neighbour on
    // the cable, and would be led on before the kernel asks what it is doing there.
    let is_loopback = |one: &&Published| one.host.is_some_and(|host| host.is_loopback());
    let published = || nat.policy.publish.iter();
    let lead = |one| redirect(one, pair);
    let open = published().filter(|one| !is_loopback(one));
    let arriving = open.flat_map(lead).map(|mut rule| {
        // Other guests do not get here by way of the host.
        rule.matches.insert(0, Match::NotFromAny(PREFIX));
        rule
    });
    // From ::1 no packet gets out. So a program that asks there is refused, and goes on to ask at 127.0.0.1.
    let loopback = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128));
    let mut sending = vec![rule([Match::Destination(loopback)], Action::Accept)];
    sending.extend(published().flat_map(lead));
    Table {
        name: name.to_owned(),
        chains: vec![
            chain(Hook::Arriving, arriving.collect()),
            chain(Hook::Sending, sending),
            chain(Hook::Leaving, leaving),
            chain(
                Hook::Input,
                vec![
                    rule([from(), Match::Known], Action::Accept),
                    rule([from(), Match::Neighbour], Action::Accept),
                    rule([from()], Action::Drop),
                ],
            ),
            chain(Hook::Forward, forward),
        ],
    }
}

/// Where no guest gets: see [`NEVER`], and where namespaces have their addresses.
fn never(nat: &Nat) -> impl Iterator<Item = IpNet> {
    let namespaces = [
        IpNet::V4(nat.range),
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(UPLINK_V6), 48)),
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(GUEST_V6), 48)),
    ];
    let never = NEVER.map(|net| net.parse().expect("a constant, and tested"));
    never.into_iter().chain(namespaces)
}

/// The rules that recognize what a target names: two if it names ports of no protocol.
fn to(target: &Target, action: Action) -> Vec<Rule> {
    let destination = Match::Destination(target.net);
    let protocols = match (target.protocol, target.ports) {
        (Some(protocol), _) => vec![protocol],
        (None, Some(_)) => vec![Protocol::Tcp, Protocol::Udp],
        (None, None) => return vec![rule([destination], action)],
    };
    let one = |protocol| {
        let mut matches = vec![destination.clone(), Match::Protocol(protocol)];
        matches.extend(target.ports.map(Match::Ports));
        Rule {
            matches,
            action: action.clone(),
        }
    };
    protocols.into_iter().map(one).collect()
}

/// The rules that lead a port of the host into a guest.
fn redirect(published: &Published, pair: &Pair) -> Vec<Rule> {
    let families = pair.vm.into_iter().filter(|vm| match published.host {
        Some(host) => host.is_ipv4() == vm.is_ipv4(),
        None => true,
    });
    let one = |vm: IpAddr| {
        let place = match published.host {
            Some(host) => Match::Destination(IpNet::from(host)),
            None => Match::ToThisMachine,
        };
        let port = published.port;
        let matches = [
            Match::Family(Family::of(vm)),
            place,
            Match::Protocol(published.protocol),
            Match::Ports(super::policy::Ports {
                first: port,
                last: port,
            }),
        ];
        rule(matches, Action::SendTo(vm, Some(published.guest_port)))
    };
    families.map(one).collect()
}

fn rule<const N: usize>(matches: [Match; N], action: Action) -> Rule {
    Rule {
        matches: matches.into(),
        action,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nat(policy: Policy) -> Nat {
        Nat::new(policy)
    }

    fn forwarded(policy: Policy) -> Vec<String> {
        let table = inside(&nat(policy), 1);
        let chain = table
            .chains
            .iter()
            .find(|chain| chain.hook == Hook::Forward);
        let chain = chain.unwrap();
        assert_eq!(chain.otherwise, Otherwise::Drop);
        chain.rules.iter().map(ToString::to_string).collect()
    }

    fn place(rules: &[String], text: &str) -> usize {
        let found = rules.iter().position(|rule| rule == text);
        found.unwrap_or_else(|| panic!("no {text:?} in {rules:#?}"))
    }

    #[test]
    fn pairs_are_in_the_range_and_meet_only_after_all_others() {
        let all = Pair::of(DEFAULT_RANGE, 0);
        assert_eq!(all.host[0], "198.18.0.0".parse::<IpAddr>().unwrap());
        assert_eq!(all.vm[0], "198.18.0.1".parse::<IpAddr>().unwrap());
        let last = Pair::of(DEFAULT_RANGE, 65_535);
        assert_eq!(last.vm[0], "198.19.255.255".parse::<IpAddr>().unwrap());
        assert_eq!(Pair::of(DEFAULT_RANGE, 65_536), all);
        let one: Ipv4Net = "10.0.0.4/31".parse().unwrap();
        assert_eq!(
            Pair::of(one, 7).vm[0],
            "10.0.0.5".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn guests_have_the_same_addresses_in_every_namespace() {
        let first = GuestLink::nth(0);
        assert_eq!(
            first.guest.map(|net| net.to_string()),
            ["172.16.0.2/30", "fd72:656b:696e::2/64"]
        );
        assert_eq!(
            first.gateway.map(|ip| ip.to_string()),
            ["172.16.0.1", "fd72:656b:696e::1"]
        );
        let second = GuestLink::nth(1);
        assert_eq!(
            second.guest.map(|net| net.to_string()),
            ["172.16.0.6/30", "fd72:656b:696e:1::2/64"]
        );
        assert_eq!(
            (second.tap.as_str(), second.mac.as_str()),
            ("rktap1", "06:72:6b:00:00:01")
        );
    }

    #[test]
    fn what_is_never_reached_is_refused_before_anything_is_allowed() {
        let everything = Policy {
            allow: vec!["0.0.0.0/0".parse().unwrap(), "[::]/0".parse().unwrap()],
            ..Policy::default()
        };
        for policy in [Policy::default(), everything] {
            let rules = forwarded(policy);
            let accepted = rules
                .iter()
                .rposition(|rule| rule.contains("drop"))
                .unwrap();
            assert!(
                rules[accepted + 1..]
                    .iter()
                    .all(|rule| rule.ends_with("accept"))
            );
            for net in [
                "ip daddr 169.254.0.0/16 drop",
                "ip daddr 198.18.0.0/15 drop",
                "ip6 daddr fd00:ec2::/32 drop",
                "ip6 daddr fd20:ce::254/128 drop",
                "ip daddr 100.100.100.200/32 drop",
                "ip saddr != 172.16.0.2 drop",
            ] {
                let net = rules
                    .iter()
                    .position(|rule| rule.ends_with(net))
                    .expect(net);
                assert!(net <= accepted);
            }
        }
    }

    #[test]
    fn denied_comes_before_allowed_and_nothing_else_is_let_through() {
        let rules = forwarded(Policy {
            allow: vec!["10.0.0.0/8:443/tcp".parse().unwrap()],
            deny: vec![
                "10.9.0.0/16".parse().unwrap(),
                "1.1.1.1:53".parse().unwrap(),
            ],
            ..Policy::default()
        });
        let allowed = place(
            &rules,
            "ip daddr 10.0.0.0/8 meta l4proto tcp th dport 443 accept",
        );
        for denied in [
            "ip daddr 10.9.0.0/16 drop",
            "ip daddr 1.1.1.1/32 meta l4proto tcp th dport 53 drop",
            "ip daddr 1.1.1.1/32 meta l4proto udp th dport 53 drop",
        ] {
            assert!(place(&rules, denied) < allowed);
        }
        assert_eq!(allowed, rules.len() - 1);
    }

    #[test]
    fn without_outbound_only_answers_get_out() {
        let rules = forwarded(Policy {
            outbound: Outbound::Off,
            allow: vec!["0.0.0.0/0".parse().unwrap()],
            ..Policy::default()
        });
        let accepting: Vec<&String> = rules
            .iter()
            .filter(|rule| rule.ends_with("accept"))
            .collect();
        assert_eq!(
            accepting,
            [
                "ct state established,related accept",
                "iifname uplink accept"
            ]
        );
    }

    #[test]
    fn the_hosts_rules_are_these() {
        let policy = Policy {
            publish: vec![
                "8080:80".parse().unwrap(),
                "127.0.0.1:53:53/udp".parse().unwrap(),
            ],
            ..Policy::default()
        };
        let table = outside("rkabcde01234567", &nat(policy), &Pair::of(DEFAULT_RANGE, 3));
        let expected = "\
table inet rkabcde01234567 {
  chain prerouting { policy accept
    iifname != rk* meta nfproto ipv4 fib daddr type local meta l4proto tcp th dport 8080 dnat to 198.18.0.7:80
    iifname != rk* meta nfproto ipv6 fib daddr type local meta l4proto tcp th dport 8080 dnat to [fd72:656b:696f::7]:80
  }
  chain output { policy accept
    ip6 daddr ::1/128 accept
    meta nfproto ipv4 fib daddr type local meta l4proto tcp th dport 8080 dnat to 198.18.0.7:80
    meta nfproto ipv6 fib daddr type local meta l4proto tcp th dport 8080 dnat to [fd72:656b:696f::7]:80
    meta nfproto ipv4 ip daddr 127.0.0.1/32 meta l4proto udp th dport 53 dnat to 198.18.0.7:53
  }
  chain postrouting { policy accept
    ip saddr 198.18.0.7/32 oifname != rkabcde01234567 masquerade
    ip6 saddr fd72:656b:696f::7/128 oifname != rkabcde01234567 masquerade
    oifname rkabcde01234567 ip saddr 127.0.0.0/8 masquerade
  }
  chain input { policy accept
    iifname rkabcde01234567 ct state established,related accept
    iifname rkabcde01234567 icmpv6 type nd-neighbor-solicit-advert accept
    iifname rkabcde01234567 drop
  }
  chain forward { policy accept
    iifname rkabcde01234567 oifname rk* drop
    iifname rkabcde01234567 ip saddr != 198.18.0.7 drop
    iifname rkabcde01234567 ip6 saddr != fd72:656b:696f::7 drop
    oifname rkabcde01234567 ct state established,related accept
    oifname rkabcde01234567 ct status dnat accept
    oifname rkabcde01234567 drop
  }
}";
        assert_eq!(table.to_string(), expected);
    }
}
