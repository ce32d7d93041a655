//! Tables told to the kernel: one transaction makes a table whole or not at all, one removes it.
//!
//! Expressions are the kernel's own (`nf_tables.h`): a rule loads something into a register, compares it, and so on until
//! one does not fit or the last gives a verdict. What `netlink-packet-netfilter` has no type for (`ct`, `fib`, `nat`,
//! `masq`) is written down here as attributes.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook as HookAttribute,
    Immediate, InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage, Operator, Payload,
    Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::netlink::{Request, Socket};
use super::policy::{Ports, Protocol};
use super::rules::{Action, Chain, Family, Hook, Match, Otherwise, Rule, Table};

/// nf_tables' subsystem, for which a batch is meant.
const SUBSYSTEM: u16 = 10;

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;

/// A connection to the kernel's nf_tables, in the network namespace in which it was opened.
pub(crate) struct Nftables(Socket);

impl Nftables {
    pub(crate) fn open() -> io::Result<Nftables> {
        Ok(Nftables(Socket::open(NETLINK_NETFILTER)?))
    }

    /// Makes a table that is not there yet, with all that is in it, or nothing.
    pub(crate) fn add(&mut self, table: &Table) -> Result<(), NftError> {
        let mut requests = vec![request(
            NfTablesMessage::NewTable(TableMessage {
                attributes: vec![TableAttribute::Name(table.name.clone())],
            }),
            NLM_F_CREATE | NLM_F_EXCL,
        )];
        let mut names = vec![format!("the table {}", table.name)];
        for chain in &table.chains {
            names.push(format!("the chain {} of {}", chain.hook.name(), table.name));
            requests.push(request(
                NfTablesMessage::NewChain(chain_message(table, chain)),
                NLM_F_CREATE,
            ));
            for rule in &chain.rules {
                names.push(format!("the rule {:?} in {}", rule.to_string(), table.name));
                requests.push(request(
                    NfTablesMessage::NewRule(rule_message(table, chain, rule)),
                    NLM_F_CREATE | NLM_F_APPEND,
                ));
            }
        }
        self.transact(requests).map_err(|(at, source)| NftError {
            what: at
                .and_then(|at| names.into_iter().nth(at))
                .unwrap_or_else(|| format!("the table {}", table.name)),
            source,
        })
    }

    /// Removes a table with all that is in it. Whether there was one.
    pub(crate) fn remove(&mut self, table: &str) -> Result<bool, NftError> {
        let message = NfTablesMessage::DeleteTable(TableMessage {
            attributes: vec![TableAttribute::Name(table.to_owned())],
        });
        match self.transact(vec![request(message, 0)]) {
            Ok(()) => Ok(true),
            Err((_, source)) if source.kind() == io::ErrorKind::NotFound => Ok(false),
            Err((_, source)) => Err(NftError {
                what: format!("the table {table}"),
                source,
            }),
        }
    }

    /// The names of all tables of family `inet`.
    pub(crate) fn tables(&mut self) -> io::Result<Vec<String>> {
        let message = NfTablesMessage::GetTable(TableMessage {
            attributes: Vec::new(),
        });
        let answers = self.0.dump(request(message, NLM_F_DUMP))?;
        let names = answers
            .into_iter()
            .filter_map(|answer: NetfilterMessage| match answer.inner {
                netlink_packet_netfilter::NetfilterMessageInner::NfTables(
                    NfTablesMessage::NewTable(table),
                ) if answer.header.family == NetfilterProtoFamily::Inet => {
                    table.attributes.into_iter().find_map(|one| match one {
                        TableAttribute::Name(name) => Some(name),
                        _ => None,
                    })
                }
                _ => None,
            });
        Ok(names.collect())
    }

    fn transact(
        &mut self,
        requests: Vec<Request<NetfilterMessage>>,
    ) -> Result<(), (Option<usize>, io::Error)> {
        let around = |message| Request {
            message: NetfilterMessage::new(
                NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM),
                message,
            ),
            flags: 0,
        };
        let mut all = vec![around(ControlMessage::BatchBegin)];
        all.extend(requests);
        if let Some(last) = all.last_mut() {
            last.flags |= NLM_F_ACK;
        }
        all.push(around(ControlMessage::BatchEnd));
        // The batch's beginning is the first message.
        self.0
            .send(all)
            .map_err(|(at, e)| (at.and_then(|at| at.checked_sub(1)), e))
    }
}

/// Why the kernel took no table.
#[derive(Debug, thiserror::Error)]
#[error("the kernel's packet filter (nf_tables) refused {what}")]
pub struct NftError {
    /// What it did not take.
    what: String,
    /// Why not.
    #[source]
    source: io::Error,
}

impl NftError {
    pub(crate) fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

fn request(message: NfTablesMessage, flags: u16) -> Request<NetfilterMessage> {
    Request {
        message: NetfilterMessage::new(
            NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
            message,
        ),
        flags,
    }
}

fn chain_message(table: &Table, chain: &Chain) -> ChainMessage {
    // The numbers are those that `nft` has names for: dstnat, srcnat, filter.
    let (number, kind, priority) = match chain.hook {
        Hook::Arriving => (InetHookNumber::PreRouting, "nat", -100),
        Hook::Sending => (InetHookNumber::LocalOut, "nat", -100),
        Hook::Leaving => (InetHookNumber::PostRouting, "nat", 100),
        Hook::Input => (InetHookNumber::LocalIn, "filter", 0),
        Hook::Forward => (InetHookNumber::Forward, "filter", 0_i32),
    };
    let policy = match chain.otherwise {
        Otherwise::Accept => NF_ACCEPT,
        Otherwise::Drop => NF_DROP,
    };
    ChainMessage {
        attributes: vec![
            ChainAttribute::Table(table.name.clone()),
            ChainAttribute::Name(chain.hook.name().to_owned()),
            ChainAttribute::Hook(vec![
                HookAttribute::Number(number.into()),
                HookAttribute::Priority(priority.cast_unsigned()),
            ]),
            ChainAttribute::Policy(policy),
            ChainAttribute::Type(kind.to_owned()),
        ],
    }
}

fn rule_message(table: &Table, chain: &Chain, rule: &Rule) -> RuleMessage {
    let mut all: Vec<Expressions> = rule.matches.iter().flat_map(expressions).collect();
    all.extend(verdict(&rule.action));
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(table.name.clone()),
            RuleAttribute::Chain(chain.hook.name().to_owned()),
            RuleAttribute::Expressions(all.into_iter().map(ListAttribute::from).collect()),
        ],
    }
}

fn expressions(one: &Match) -> Vec<Expressions> {
    match one {
        Match::From(link) => vec![meta(MetaKey::Iifname), equal(whole_name(link))],
        Match::FromAny(prefix) => vec![meta(MetaKey::Iifname), equal(prefix.as_bytes())],
        Match::NotFromAny(prefix) => vec![meta(MetaKey::Iifname), differs(prefix.as_bytes())],
        Match::Through(link) => vec![meta(MetaKey::Oifname), equal(whole_name(link))],
        Match::ThroughAny(prefix) => vec![meta(MetaKey::Oifname), equal(prefix.as_bytes())],
        Match::NotThrough(link) => vec![meta(MetaKey::Oifname), differs(whole_name(link))],
        Match::Family(family) => is_family(*family).into(),
        Match::Source(net) => in_net(*net, Side::Source),
        Match::Destination(net) => in_net(*net, Side::Destination),
        Match::NotSource(address) => {
            let mut all = Vec::from(is_family(Family::of(*address)));
            all.extend([
                address_of(*address, Side::Source),
                differs(octets(*address)),
            ]);
            all
        }
        Match::ToThisMachine => {
            const ADDRESS_TYPE: u32 = 3;
            const OF_DESTINATION: u32 = 2;
            const LOCAL: u32 = 2;
            let fib = other(
                "fib",
                &[(1, REGISTER), (2, ADDRESS_TYPE), (3, OF_DESTINATION)],
            );
            vec![fib, equal(LOCAL.to_ne_bytes())]
        }
        Match::Protocol(protocol) => is_protocol(match protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
        })
        .into(),
        Match::Ports(Ports { first, last }) => {
            let ports = payload(TRANSPORT, 2, 2);
            let (first, last) = (first.to_be_bytes(), last.to_be_bytes());
            vec![
                ports,
                compare(Operator::GreatherThanEqual, first),
                compare(Operator::LessThanEqual, last),
            ]
        }
        Match::Known => conntrack(0, ESTABLISHED | RELATED),
        Match::Redirected => conntrack(2, DESTINATION_CHANGED),
        Match::Ping(Family::V4) => icmp(ICMP, 8, 8),
        Match::Ping(Family::V6) => icmp(ICMP_V6, 128, 128),
        Match::Neighbour => icmp(ICMP_V6, 135, 136),
    }
}

const ESTABLISHED: u32 = 2;
const RELATED: u32 = 4;
/// The bit of a connection's status that says so.
const DESTINATION_CHANGED: u32 = 1 << 5;

/// Whether any of these bits is set in something that is known of the packet's connection.
fn conntrack(key: u32, bits: u32) -> Vec<Expressions> {
    vec![
        other("ct", &[(1, REGISTER), (2, key)]),
        masked(&bits.to_ne_bytes()),
        differs([0; 4]),
    ]
}

fn icmp(protocol: u8, first: u8, last: u8) -> Vec<Expressions> {
    let [load, is] = is_protocol(protocol);
    vec![
        load,
        is,
        payload(TRANSPORT, 0, 1),
        compare(Operator::GreatherThanEqual, [first]),
        compare(Operator::LessThanEqual, [last]),
    ]
}

fn verdict(action: &Action) -> Vec<Expressions> {
    match action {
        Action::Accept => vec![final_verdict(NF_ACCEPT)],
        Action::Drop => vec![final_verdict(NF_DROP)],
        Action::Masquerade => vec![other("masq", &[])],
        Action::SendTo(address, port) => {
            const DESTINATION: u32 = 1;
            let family = match Family::of(*address) {
                Family::V4 => NetfilterProtoFamily::IPv4,
                Family::V6 => NetfilterProtoFamily::IPv6,
            };
            let mut all = vec![immediate(Register::Reg1, octets(*address))];
            let mut nat = vec![
                (1, DESTINATION),
                (2, u32::from(u8::from(family))),
                (3, REGISTER),
            ];
            if let Some(port) = port {
                all.push(immediate(Register::Reg2, port.to_be_bytes()));
                nat.push((5, REGISTER + 1));
            }
            all.push(other("nat", &nat));
            all
        }
    }
}

/// The number of [`Register::Reg1`], through which everything goes.
const REGISTER: u32 = 1;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

fn address_of(like: IpAddr, side: Side) -> Expressions {
    // Where the IPv4 and the IPv6 header have them.
    let (offset, length) = match (like, side) {
        (IpAddr::V4(_), Side::Source) => (12, 4),
        (IpAddr::V4(_), Side::Destination) => (16, 4),
        (IpAddr::V6(_), Side::Source) => (8, 16),
        (IpAddr::V6(_), Side::Destination) => (24, 16),
    };
    payload(NETWORK, offset, length)
}

fn in_net(net: IpNet, side: Side) -> Vec<Expressions> {
    let mut all = Vec::from(is_family(Family::of(net.addr())));
    if net.prefix_len() > 0 {
        all.push(address_of(net.addr(), side));
        if net.prefix_len() < net.max_prefix_len() {
            all.push(masked(&octets(net.netmask())));
        }
        all.push(equal(octets(net.network())));
    }
    all
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

fn is_family(family: Family) -> [Expressions; 2] {
    let number = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    [meta(MetaKey::Nfproto), equal([u8::from(number)])]
}

fn is_protocol(number: u8) -> [Expressions; 2] {
    [meta(MetaKey::L4Proto), equal([number])]
}

/// A link's name as the kernel compares it: whole, with the zeros behind it.
fn whole_name(name: &str) -> [u8; 16] {
    let mut whole = [0; 16];
    for (place, byte) in whole.iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    whole
}

fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![
        Meta::Key(key),
        Meta::DestinationRegister(Register::Reg1),
    ])
}

fn payload(base: u32, offset: u32, length: u32) -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ])
}

fn compare(how: Operator, value: impl AsRef<[u8]>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(how),
        Cmp::Data(DataAttribute::Value(value.as_ref().to_vec())),
    ])
}

fn equal(value: impl AsRef<[u8]>) -> Expressions {
    compare(Operator::Equal, value)
}

fn differs(value: impl AsRef<[u8]>) -> Expressions {
    compare(Operator::NotEqual, value)
}

fn masked(mask: &[u8]) -> Expressions {
    let length = u32::try_from(mask.len()).unwrap_or(0);
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(length),
        Bitwise::Mask(DataAttribute::Value(mask.to_vec())),
        Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
    ])
}

fn immediate(register: Register, value: impl AsRef<[u8]>) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(register),
        Immediate::Data(DataAttribute::Value(value.as_ref().to_vec())),
    ])
}

fn final_verdict(code: u32) -> Expressions {
    let code = VerdictAttribute::Code(Verdict::Other(code));
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![code])),
    ])
}

/// An expression whose attributes are all numbers.
fn other(name: &str, attributes: &[(u16, u32)]) -> Expressions {
    Expressions::Other {
        expression_type: name.to_owned(),
        attributes: attributes
            .iter()
            .map(|(kind, value)| DefaultNla::new(*kind, value.to_be_bytes().into()))
            .collect(),
    }
}
