//! Linux guests on networks of their own: what they reach, and who reaches them.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::{HOST, HOST_V6, INTERNET, INTERNET_V6, METADATA, Networks, until};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "guests and copies reach the internet and are published, and reach neither each other nor their host",
            networks,
        ),
        story(
            "a guest moves no more than its rate, and asks for what it and nobody else was told",
            limited_and_told,
        )
        .takes(110),
    ]
}

/// What a guest is told when it connects there; nothing if it does not get there.
fn hears(linux: &Linux, vm: &str, there: &str, port: u16) -> anyhow::Result<String> {
    let said = linux.asks(
        vm,
        &format!("nc -w 3 {there} {port} < /dev/null 2> /dev/null"),
    )?;
    Ok(said.trim().to_owned())
}

/// What the internet is told by a port of the host.
fn tells(networks: &Networks, port: u16) -> anyhow::Result<String> {
    greeting(networks.from_internet(format!("{HOST}:{port}").parse()?)?)
}

fn greeting(mut stream: TcpStream) -> anyhow::Result<String> {
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said.trim().to_owned())
}

fn networks(linux: &Linux) -> anyhow::Result<()> {
    let networks = Networks::enter("lab")?;
    networks.internet_greets(INTERNET, 80, "internet")?;
    networks.internet_greets(INTERNET_V6, 80, "internet")?;
    networks.internet_greets(METADATA, 80, "secret")?;
    networks.host_greets(81, "host")?;
    // It is the rules that keep guests away: others get there.
    ensure!(greeting(TcpStream::connect((METADATA, 80))?)? == "secret");
    ensure!(tells(&networks, 81)? == "host");
    linux.boots("a", "--net nat --publish 8080:80")?;
    linux.types("a", "nc -ll -p 80 -e cat /n & echo $((40+2)) > /n\n")?;

    let reached = linux.asks(
        "a",
        &format!("ping -c 1 -W 10 {INTERNET} > /dev/null && echo yes"),
    )?;
    ensure!(reached.trim() == "yes", "no ping: {reached:?}");
    ensure!(hears(linux, "a", INTERNET, 80)? == "internet");
    ensure!(
        hears(linux, "a", METADATA, 80)?.is_empty(),
        "it heard the secret"
    );
    ensure!(hears(linux, "a", INTERNET_V6, 80)? == "internet", "no IPv6");
    for host in [HOST, HOST_V6] {
        ensure!(
            hears(linux, "a", host, 81)?.is_empty(),
            "it heard its host at {host}"
        );
    }
    ensure!(tells(&networks, 8080)? == "42");

    linux.rekindle.does("snapshot create a --name base")?;
    linux.rekindle.does("restore base --name c --count 2")?;
    linux
        .rekindle
        .does("restore base --name web --publish 8081:80")?;
    for copy in ["c-1", "c-2"] {
        ensure!(hears(linux, copy, INTERNET, 80)? == "internet", "{copy}");
        ensure!(hears(linux, copy, INTERNET_V6, 80)? == "internet", "{copy}");
        ensure!(
            hears(linux, copy, METADATA, 80)?.is_empty(),
            "{copy} heard the secret"
        );
    }
    linux.types("web", "echo $((40+3)) > /n\n")?;
    linux.asks("web", "true")?;
    ensure!(tells(&networks, 8081)? == "43", "the copy's port");
    ensure!(tells(&networks, 8080)? == "42", "the original's port");
    let inspected = linux.rekindle.tells("inspect a")?;
    let addresses = inspected["network"]["addresses"]
        .as_array()
        .context("addresses")?;
    ensure!(addresses.len() == 2, "{inspected}");
    let addresses = addresses.iter().filter_map(|address| address.as_str());
    let published = [HOST, HOST_V6]
        .into_iter()
        .flat_map(|host| [(host, 8080), (host, 8081)]);
    for (there, port) in addresses.map(|address| (address, 80)).chain(published) {
        ensure!(
            hears(linux, "c-1", there, port)?.is_empty(),
            "it reached another guest by {there}:{port}"
        );
    }
    for vm in ["a", "c-1", "c-2", "web"] {
        linux.rekindle.does(&format!("rm --force {vm}"))?;
    }
    ensure!(tells(&networks, 8080).is_err());
    Ok(())
}

/// What is moved in either direction, …
const MOVED: usize = 1 << 20;
/// … and how long that takes at a megabit a second, of which the first second's worth comes at once.
const AT_A_MEGABIT: Duration = Duration::from_secs(7);

fn limited_and_told(linux: &Linux) -> anyhow::Result<()> {
    let networks = Networks::enter("limits")?;
    networks.internet_sends(90, MOVED)?;
    networks.internet_counts(91)?;
    let (first, second) = (linux.rekindle.file("first"), linux.rekindle.file("second"));
    fs::write(&first, r#"{"role":"db"}"#)?;
    fs::write(&second, r#"{"role":"cache"}"#)?;
    linux.boots(
        "slow",
        &format!("--net nat --net-rate 1 --mmds {}", first.display()),
    )?;
    linux.boots("free", "--net nat")?;
    let ways = [
        format!("nc {INTERNET} 90 < /dev/null | wc -c"),
        format!("head -c {MOVED} /dev/zero | nc {INTERNET} 91"),
    ];
    for way in &ways {
        let slow = takes(linux, "slow", way)?;
        ensure!(slow >= AT_A_MEGABIT, "{way}: {slow:?}");
        takes(linux, "free", way)?;
    }
    // The lab is slow by itself: whether it was the rate, Firecracker knows.
    for direction in ["rx", "tx"] {
        let slow = held_back(linux, "slow", direction)?;
        let free = held_back(linux, "free", direction)?;
        ensure!(slow > 0 && free == 0, "{direction}: {slow}, without {free}");
    }

    linux.asks("slow", &format!("ip route add {METADATA} dev eth0"))?;
    is_told(linux, "slow", Some("db"))?;
    linux.rekindle.does("snapshot create slow --name base")?;
    linux.rekindle.does(&format!(
        "restore base --name copy --mmds {}",
        second.display()
    ))?;
    is_told(linux, "copy", Some("cache"))?;
    linux.rekindle.does("restore base --name untold")?;
    is_told(linux, "untold", None)?;
    // Who was told nothing at the start has nobody to ask, whatever way it takes.
    linux.asks("free", &format!("ip route add {METADATA} dev eth0"))?;
    let heard = linux.asks("free", &asking("GET / HTTP/1.1"))?;
    ensure!(heard.is_empty(), "{heard:?}");
    linux.rekindle.does("rm --force slow free copy untold")?;
    Ok(())
}

/// How long a guest takes to move it all.
fn takes(linux: &Linux, vm: &str, way: &str) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let moved = linux.asks(vm, way)?;
    ensure!(moved.trim() == MOVED.to_string(), "{vm}: {way}: {moved:?}");
    Ok(begun.elapsed())
}

/// How often a guest's network had to wait for its rate.
fn held_back(linux: &Linux, vm: &str, direction: &str) -> anyhow::Result<u64> {
    let dir = linux.rekindle.vm(vm);
    let api = format!("api --socket {}", dir.join("api.sock").display());
    let flush = r#"{"action_type":"FlushMetrics"}"#;
    linux
        .rekindle
        .does(&format!("{api} PUT /actions {flush}"))?;
    // Each line has what came since the one before.
    let counts = || -> anyhow::Result<Vec<u64>> {
        let lines = fs::read_to_string(dir.join("metrics"))?;
        let lines = lines
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let counter = format!("{direction}_rate_limiter_throttled");
        Ok(lines
            .filter_map(|line| line["net"][&counter].as_u64())
            .collect())
    };
    until("its metrics are there", || Ok(!counts()?.is_empty()))?;
    Ok(counts()?.iter().sum())
}

/// A line that sends a request to the metadata service and prints what comes back.
fn asking(request: &str) -> String {
    format!(
        "{{ printf '{request}\\r\\n\\r\\n'; sleep 3; }} | timeout 5 nc -w 3 {METADATA} 80 2> /dev/null"
    )
}

/// Whether a guest with a token is told this role, or none, and one without a token nothing.
fn is_told(linux: &Linux, vm: &str, role: Option<&str>) -> anyhow::Result<()> {
    let put = "PUT /latest/api/token HTTP/1.1\\r\\nX-metadata-token-ttl-seconds: 60\\r\\nContent-Length: 0";
    let token = linux.asks(vm, &format!("{} | tail -n 1", asking(put)))?;
    let token = token.trim();
    let is_one = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    ensure!(
        !token.is_empty() && token.chars().all(is_one),
        "{vm} got no token: {token:?}"
    );
    let get = format!("GET /role HTTP/1.1\\r\\nX-metadata-token: {token}");
    let heard = linux.asks(vm, &asking(&get))?;
    match role {
        Some(role) => ensure!(heard.contains("200") && heard.ends_with(role), "{heard:?}"),
        None => ensure!(!heard.contains("200"), "{heard:?}"),
    }
    let heard = linux.asks(vm, &asking("GET /role HTTP/1.1"))?;
    ensure!(heard.contains("401"), "{heard:?}");
    Ok(())
}
