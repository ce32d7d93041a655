//! Networks as the kernel makes them, with everybody in namespaces of the test's own: a host, an internet, and guests, for
//! which a namespace stands at the other end of a TAP device.

mod world;

use std::net::IpAddr;

use self::world::{Guest, HOST, INTERNET, METADATA, World};
use super::plan::{DEFAULT_RANGE, Nat};
use super::policy::{Outbound, Policy};

fn policy(change: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = Policy::default();
    change(&mut policy);
    policy
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_guest_reaches_the_internet_and_neither_its_host_nor_metadata_nor_another_guest() {
    let Some(world) = World::make() else { return };
    let internet = world.internet_listens(INTERNET, 80);
    let internet_v6 = world.internet_listens("2001:db8::2", 80);
    let metadata = world.internet_listens(METADATA, 80);
    let host = world.host_listens(HOST, 80);
    let anywhere = world.host_listens("0.0.0.0", 81);
    // It is the rules that keep the guest away: the host gets there.
    assert!(world.host_reaches(metadata.address()));

    let one = world.guest("one", policy(|_| {}));
    let other = world.guest("other", policy(|_| {}));
    let others = other.listens(80);
    assert!(one.reaches(internet.address()));
    assert!(one.reaches(internet_v6.address()));
    assert!(one.reaches_by_udp(world.internet_echoes(INTERNET, 53)));
    for (what, there) in [
        ("metadata", metadata.address()),
        ("the host's service", host.address()),
        (
            "the host by its side of the pair",
            (one.pair_host(), anywhere.address().port()).into(),
        ),
        (
            "the gateway",
            (address("172.16.0.1"), anywhere.address().port()).into(),
        ),
        (
            "another guest",
            (other.address(), others.address().port()).into(),
        ),
        (
            "another guest's IPv6",
            (other.address_v6(), others.address().port()).into(),
        ),
    ] {
        assert!(one.misses(there), "{what}");
    }
    // From the host the guest is reached, and answers.
    assert!(world.host_reaches((other.address(), others.address().port()).into()));
}

#[test]
fn a_guest_that_takes_another_address_is_not_let_out() {
    let Some(world) = World::make() else { return };
    let internet = world.internet_listens(INTERNET, 80);
    let guest = world.guest("one", policy(|_| {}));
    assert!(guest.reaches(internet.address()));
    guest.takes("172.16.0.3/24");
    assert!(!guest.reaches_from(address("172.16.0.3"), internet.address()));
    assert!(guest.reaches(internet.address()));
}

#[test]
fn lists_and_the_switch_decide_what_is_reached() {
    let Some(world) = World::make() else { return };
    let web = world.internet_listens(INTERNET, 80);
    let mail = world.internet_listens(INTERNET, 25);
    let far = world.internet_listens("203.0.113.77", 80);
    let reaches = |name, policy, expected: [bool; 3]| {
        let guest = world.guest(name, policy);
        let there = || [&web, &mail, &far].into_iter().zip(expected);
        // What it does not reach is not waited for long, so it must be connected by then.
        for (there, _) in there().filter(|(_, reached)| *reached) {
            assert!(guest.reaches(there.address()), "{name}: {there:?}");
        }
        for (there, _) in there().filter(|(_, reached)| !reached) {
            assert!(guest.misses(there.address()), "{name}: {there:?}");
        }
    };
    let allow = |targets: &[&str]| targets.iter().map(|one| one.parse().unwrap()).collect();
    reaches("all", policy(|_| {}), [true, true, true]);
    reaches(
        "deny",
        policy(|p| p.deny = allow(&["203.0.113.2:25/tcp", "203.0.113.64/26"])),
        [true, false, false],
    );
    reaches(
        "allow",
        policy(|p| p.allow = allow(&["203.0.113.2:80-90"])),
        [true, false, false],
    );
    reaches(
        "both",
        policy(|p| {
            p.allow = allow(&["203.0.113.0/24"]);
            p.deny = allow(&["203.0.113.2/32"]);
        }),
        [false, false, true],
    );
    reaches(
        "off",
        policy(|p| p.outbound = Outbound::Off),
        [false, false, false],
    );
}

#[test]
fn a_published_port_leads_into_its_guest_from_everywhere_but_other_guests() {
    let Some(world) = World::make() else { return };
    let publish = |ports: &[&str]| {
        policy(|p| {
            p.outbound = Outbound::Off;
            p.publish = ports.iter().map(|port| port.parse().unwrap()).collect();
        })
    };
    let guest = world.guest(
        "web",
        publish(&["8080:80", "127.0.0.1:9090:80", "5353:53/udp"]),
    );
    let listening = guest.listens(80);
    let unpublished = guest.listens(22);
    let other = world.guest("other", policy(|_| {}));

    let host = |port| (address(HOST), port).into();
    assert!(world.internet_reaches(host(8080)));
    assert!(world.internet_reaches((address("2001:db8::1"), 8080).into()));
    assert!(world.host_reaches(host(8080)));
    assert!(world.host_reaches((address("127.0.0.1"), 8080).into()));
    assert!(world.host_reaches((address("127.0.0.1"), 9090).into()));
    guest.echoes(53);
    assert!(world.internet_reaches_by_udp(host(5353)));
    // Not what is published on loopback only, and not around the host's address.
    assert!(world.internet_misses(host(9090)));
    assert!(world.internet_misses((address("127.0.0.1"), 9090).into()));
    assert!(world.internet_misses((guest.address(), unpublished.address().port()).into()));
    assert!(world.internet_misses((guest.address(), listening.address().port()).into()));
    assert!(other.misses(host(8080)));
    drop(guest);
    assert!(world.internet_misses(host(8080)));
}

#[test]
fn a_port_that_somebody_has_is_refused_before_anything_is_made() {
    let Some(world) = World::make() else { return };
    let taken = world.host_listens("0.0.0.0", 8080);
    let before = world.things();
    let refused = world.try_guest(
        "web",
        policy(|p| p.publish = vec!["8080:80".parse().unwrap()]),
    );
    let text = format!("{:#}", refused.err().unwrap());
    assert!(text.contains("8080:80"), "{text}");
    assert_eq!(world.things(), before);
    drop(taken);
    let first = world.guest(
        "web",
        policy(|p| p.publish = vec!["8080:80".parse().unwrap()]),
    );
    assert!(
        world
            .try_guest(
                "web2",
                policy(|p| p.publish = vec!["8080:81".parse().unwrap()])
            )
            .is_err()
    );
    drop(first);
}

#[test]
fn nothing_is_left_whoever_undoes_it_and_how_often() {
    let Some(world) = World::make() else { return };
    let before = world.things();
    let guests: Vec<Guest<'_>> = ["a", "b", "c"]
        .map(|name| world.guest(name, policy(|_| {})))
        .into();
    // A link and a table each.
    assert_eq!(world.things().len(), before.len() + 6);
    let mut addresses: Vec<IpAddr> = guests.iter().map(Guest::address).collect();
    addresses.dedup();
    assert_eq!(addresses.len(), 3);
    let [first, second, third]: [Guest<'_>; 3] = guests.try_into().ok().unwrap();
    // The owner goes.
    drop(first);
    // The owner was killed, and whoever comes next reads what was written down, twice.
    second.forgotten();
    third.forgotten_without_a_directory();
    assert_eq!(world.sweeps().len(), 1);
    assert_eq!(world.things(), before);
}

#[test]
fn what_is_started_anew_finds_what_the_first_attempt_left() {
    let Some(world) = World::make() else { return };
    let before = world.things();
    let mut guest = world.guest("one", policy(|_| {}));
    for _ in 0..2 {
        let _running = guest.starts_anew();
        assert_eq!(world.things().len(), before.len() + 2);
    }
    drop(guest);
    assert_eq!(world.things(), before);
}

#[test]
fn a_range_that_is_in_use_is_refused_in_words() {
    let Some(world) = World::make() else { return };
    let range = "198.18.7.0/31".parse().unwrap();
    let small = |name| world.try_guest_with(name, Nat::default().range(range));
    let first = small("one").unwrap();
    assert_eq!(first.address(), address("198.18.7.1"));
    let refused = small("two").err().unwrap().to_string();
    assert_eq!(
        refused,
        "no address of the range 198.18.7.0/31 is free: take a larger one"
    );
    assert_eq!(DEFAULT_RANGE.to_string(), "198.18.0.0/15");
}
