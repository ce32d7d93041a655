//! VMs with networks of their own: what there is of them on the host, and that nothing of it is left.
//!
//! The guests here use no network. What one can reach is played in `crates/engine/src/net/tests.rs`, and with Linux in the
//! lab.

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::{Networks, Rekindle, Role};
use rekindle_kit::dice::setting;
use rekindle_kit::invariant::{Belongings, networks_of};
use rekindle_kit::nft;
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::counter;
use crate::kills::Moments;
use crate::story;

/// How many copies there are at a time in the story of cycles.
const AT_ONCE: u64 = 8;
/// How long a process that was killed may take to be gone.
const GONE: Duration = Duration::from_secs(5);

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a network is one link and one table, and goes with its VM",
            goes_with_its_vm,
        ),
        story(
            "copies have networks of their own without being told",
            copies,
        ),
        story(
            "a network is gone after any process of its VM was killed",
            killed,
        ),
        story(
            "cycles of jailed copies with networks leave the host as it was",
            cycles,
        )
        .within(Duration::from_secs(120 + 5 * cycle_count())),
        story(
            "kills of jailed copies with networks leave the host as it was",
            kills,
        )
        .within(Duration::from_secs(120 + 10 * kill_count())),
        story(
            "metadata is what the VM was given, and in no file of it or its snapshot",
            metadata,
        ),
        story(
            "networks that cannot be are refused before anything is made",
            refusals,
        ),
    ]
}

/// What there is of networks on the host: two things each.
fn things(rekindle: &Rekindle) -> anyhow::Result<usize> {
    Ok(networks_of(rekindle.state())?.len())
}

fn run(rekindle: &Rekindle, name: &str, options: &str) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    rekindle.does(&format!(
        "run {guest} --net nat --name {name} --detach {options}"
    ))?;
    Ok(())
}

fn goes_with_its_vm(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-goes")?;
    run(
        rekindle,
        "a",
        "--publish 8080:80 --interfaces 2 --net-rate 100:20",
    )?;
    rekindle.follows("a")?.hears("n=3\n")?;
    let inspected = rekindle.tells("inspect a")?;
    let name = inspected["network"]["name"].as_str().context("a name")?;
    ensure!(networks_of(rekindle.state())? == [format!("link {name}"), format!("table {name}")]);
    let address = inspected["network"]["addresses"][0]
        .as_str()
        .context("an address")?;
    ensure!(address.starts_with("198.18."), "{address}");
    // Firecracker has its TAP devices to itself.
    let firecracker = rekindle.one(Role::Firecracker)?.pid();
    let links = fs::read_to_string(format!("/proc/{firecracker}/net/dev"))?;
    for link in ["rktap0", "rktap1", "uplink"] {
        ensure!(links.contains(link), "{links}");
    }
    ensure!(!links.contains("wan"), "{links}");
    // Nobody else gets the port, and who asks for it leaves nothing.
    let guest = rekindle.guest(&counter())?;
    let said = rekindle
        .tries(&format!("run {guest} --net nat --publish 8080:81"))?
        .refused(125)?;
    ensure!(said.contains("--publish 8080:81"), "{said}");
    ensure!(things(rekindle)? == 2);

    rekindle.does("stop a --grace 0")?;
    ensure!(
        things(rekindle)? == 0,
        "{:?}",
        networks_of(rekindle.state())?
    );
    rekindle.does("rm a")?;
    ensure!(things(rekindle)? == 0);
    Ok(())
}

fn copies(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-copies")?;
    run(rekindle, "a", "--deny 10.0.0.0/8 --publish 8080:80")?;
    rekindle.follows("a")?.hears("n=3\n")?;
    rekindle.does("snapshot create a --name base")?;
    let egress = rekindle.tells("snapshot inspect base")?["devices"]["egress"].clone();
    ensure!(egress["deny"][0] == "10.0.0.0/8", "{egress}");
    // The original still has the port: copies publish none unless told to.
    rekindle.does("restore base --name c --count 3")?;
    ensure!(
        things(rekindle)? == 8,
        "{:?}",
        networks_of(rekindle.state())?
    );
    let mut addresses = Vec::new();
    for copy in ["c-1", "c-2", "c-3"] {
        rekindle.follows(copy)?.counts(3)?;
        let inspected = rekindle.tells(&format!("inspect {copy}"))?;
        ensure!(
            inspected["machine"]["nat"]["policy"]["deny"][0] == "10.0.0.0/8",
            "{inspected}"
        );
        addresses.push(inspected["network"]["addresses"][0].to_string());
    }
    addresses.sort();
    addresses.dedup();
    ensure!(addresses.len() == 3, "{addresses:?}");
    // Cut off, a copy has nothing on the host.
    rekindle.does("restore base --name alone --net none")?;
    ensure!(things(rekindle)? == 8);
    for vm in ["a", "c-1", "c-2", "c-3", "alone"] {
        rekindle.does(&format!("rm --force {vm}"))?;
    }
    ensure!(things(rekindle)? == 0);
    Ok(())
}

fn killed(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-killed")?;
    // A monitor that dies is replaced, and the guest keeps its network.
    run(rekindle, "a", "--publish 8080:80")?;
    rekindle.one(Role::Monitor)?.kill(GONE)?;
    rekindle.does("ps")?;
    ensure!(things(rekindle)? == 2);
    // Firecracker dies: its monitor removes what there was.
    rekindle.one(Role::Firecracker)?.kill(GONE)?;
    rekindle.tries("wait a")?;
    ensure!(
        things(rekindle)? == 0,
        "{:?}",
        networks_of(rekindle.state())?
    );
    rekindle.does("rm a")?;
    // All of them die in one instant: the next command finds out.
    run(rekindle, "b", "--publish 8080:80")?;
    for role in [Role::Keeper, Role::Monitor, Role::Firecracker] {
        rekindle.one(role)?.kill(GONE)?;
    }
    rekindle.does("ps")?;
    ensure!(
        things(rekindle)? == 0,
        "{:?}",
        networks_of(rekindle.state())?
    );
    rekindle.does("rm b")?;
    // Somebody removes a directory by hand.
    run(rekindle, "c", "")?;
    for role in [Role::Keeper, Role::Monitor, Role::Firecracker] {
        rekindle.one(role)?.kill(GONE)?;
    }
    fs::remove_dir_all(rekindle.vm("c"))?;
    let found = rekindle.does("gc --dry-run")?;
    ensure!(found.contains("network rk"), "{found:?}");
    rekindle.does("gc")?;
    ensure!(
        things(rekindle)? == 0,
        "{:?}",
        networks_of(rekindle.state())?
    );
    ensure!(rekindle.does("gc")?.is_empty());
    Ok(())
}

fn cycle_count() -> u64 {
    setting("REKINDLE_CYCLES", 50)
}

/// What the host has that cycles must not use up: its links and packet filter tables, whoever made them, and the
/// descriptors of those processes that stay.
fn holdings(rekindle: &Rekindle) -> anyhow::Result<Vec<String>> {
    let mut found = vec![
        fs::read_to_string("/proc/thread-self/net/dev")?
            .lines()
            .skip(2)
            .filter_map(|line| Some(line.split_once(':')?.0.trim()))
            .collect::<Vec<_>>()
            .join(" "),
    ];
    found.extend(nft::tables()?);
    for (role, process) in rekindle.processes()? {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid()))?.count();
        found.push(format!("{role:?} {descriptors}"));
    }
    found.sort();
    Ok(found)
}

/// Restore, check, destroy, `AT_ONCE` at a time, beside a VM that goes on. `cargo xtask soak --cycles N` plays more.
fn cycles(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-cycles")?;
    run(rekindle, "a", "")?;
    rekindle.does("snapshot create a --name base")?;
    // What it prints would be new files, and the first copy's working set is one.
    rekindle.does("pause a")?;
    rekindle.does("restore base --name first")?;
    rekindle.follows("first")?.counts(3)?;
    rekindle.does("rm --force first")?;
    let before = Belongings::of(rekindle.state(), "nothing-else")?;
    let held = holdings(rekindle)?;
    let mut left = cycle_count();
    println!("{left} cycles, {AT_ONCE} at a time");
    while left > 0 {
        let count = left.min(AT_ONCE);
        // One alone would be called `c`.
        let names: Vec<String> = (1..=count).map(|n| format!("c-{n}")).collect();
        match count {
            1 => rekindle.does("restore base --name c-1")?,
            _ => rekindle.does(&format!("restore base --name c --count {count}"))?,
        };
        ensure!(things(rekindle)? as u64 == 2 + 2 * count);
        for name in &names {
            rekindle.follows(name)?.counts(3)?;
        }
        rekindle.does(&format!("rm --force {}", names.join(" ")))?;
        ensure!(
            things(rekindle)? == 2,
            "{:?}",
            networks_of(rekindle.state())?
        );
        left -= count;
    }
    before.assert_same_within(GONE);
    let now = holdings(rekindle)?;
    ensure!(now == held, "before {held:?}, now {now:?}");
    Ok(())
}

fn kill_count() -> u64 {
    setting("REKINDLE_NETWORK_KILLS", 10)
}

/// Any process of a VM with a network is killed at any moment of its start and its life; `cargo xtask soak --network-kills N`
/// plays more.
fn kills(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-kills")?;
    run(rekindle, "a", "")?;
    rekindle.does("snapshot create a --name base")?;
    rekindle.does("restore base --name first")?;
    rekindle.follows("first")?.counts(3)?;
    rekindle.does("rm --force first a")?;
    let before = Belongings::of(rekindle.state(), "nothing-else")?;
    let held = holdings(rekindle)?;
    let at = Moments {
        times: kill_count(),
        within: Duration::from_millis(250),
        boots: "--net nat --publish 8080:80",
        copies: "",
    };
    at.play(rekindle, |rekindle| {
        ensure!(
            things(rekindle)? == 0,
            "{:?}",
            networks_of(rekindle.state())?
        );
        before.assert_same_within(GONE);
        let now = holdings(rekindle)?;
        ensure!(now == held, "before {held:?}, now {now:?}");
        Ok(())
    })
}

/// What a guest would be told is asked of Firecracker here.
fn metadata(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-metadata")?;
    let file = |name: &str, text: &str| -> anyhow::Result<String> {
        let path = rekindle.file(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let told = |vm: &str, path: &str| -> anyhow::Result<Value> {
        let socket = rekindle.vm(vm).join("api.sock");
        rekindle.tells(&format!("api --socket {} GET {path}", socket.display()))
    };
    let mine = file("mine", r#"{"latest": {"meta-data": {"key": "swordfish"}}}"#)?;
    run(rekindle, "a", &format!("--mmds {mine}"))?;
    ensure!(told("a", "/mmds")?["latest"]["meta-data"]["key"] == "swordfish");
    let config = told("a", "/vm/config")?;
    ensure!(config["mmds-config"]["version"] == "V2", "{config}");
    ensure!(
        config["mmds-config"]["network_interfaces"][0] == "eth0",
        "{config}"
    );
    rekindle.does("snapshot create a --name base")?;
    // Its monitor is replaced meanwhile.
    rekindle.one(Role::Monitor)?.kill(GONE)?;
    rekindle.does("ps")?;
    ensure!(told("a", "/mmds")?["latest"]["meta-data"]["key"] == "swordfish");
    let grep = rekindle
        .other("grep")
        .args(["-rls", "-D", "skip", "swordfish"])
        .arg(rekindle.state())
        .output()?;
    ensure!(
        grep.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&grep.stdout)
    );
    // A copy is told nothing of it.
    rekindle.does("restore base --name copy")?;
    let said = told("copy", "/mmds")?;
    ensure!(!said.to_string().contains("swordfish"), "{said}");
    let its = file("its", r#"{"latest": "other"}"#)?;
    rekindle.does(&format!("restore base --name other --mmds {its}"))?;
    ensure!(told("other", "/mmds")?["latest"] == "other");
    rekindle.does("rm --force a copy other")?;
    // What cannot be is refused before anything is made.
    let guest = rekindle.guest(&counter())?;
    let list = file("list", "[1]")?;
    let large = file("large", &format!(r#"{{"k":"{}"}}"#, "x".repeat(60_000)))?;
    for (options, word) in [
        (format!("--mmds {mine}"), "add --net nat"),
        (format!("--net nat --mmds {list}"), "not a JSON object"),
        (format!("--net nat --mmds {large}"), "51200"),
        ("--net nat --mmds /nonexistent".to_owned(), "/nonexistent"),
    ] {
        let said = rekindle
            .tries(&format!("run {guest} {options}"))?
            .refused(125)?;
        ensure!(said.contains("--mmds") && said.contains(word), "{said}");
    }
    run(rekindle, "b", "")?;
    rekindle.does("snapshot create b --name without")?;
    let said = rekindle.refuses(&format!("restore without --name c --mmds {mine}"))?;
    ensure!(said.contains("no metadata service"), "{said}");
    rekindle.does("rm --force b")?;
    ensure!(rekindle.vms()?.is_empty() && things(rekindle)? == 0);
    Ok(())
}

fn refusals(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let _networks = Networks::enter("native-refused")?;
    let guest = rekindle.guest(&counter())?;
    let refused = |options: &str| {
        rekindle
            .tries(&format!("run {guest} {options}"))?
            .refused(125)
    };
    for (options, word) in [
        ("--publish 8080:80", "add --net nat"),
        (
            "--net nat --publish 8080:80 --publish 8080:81",
            "published twice",
        ),
        ("--net nat --net-range 10.0.0.0/32", "no two addresses"),
    ] {
        let said = refused(options)?;
        ensure!(said.contains(word), "{said}");
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
    let said = refused("--net nat")?;
    ensure!(said.contains("sysctl -w net.ipv4.ip_forward=1"), "{said}");
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    ensure!(things(rekindle)? == 0);
    ensure!(rekindle.vms()?.is_empty());
    Ok(())
}
