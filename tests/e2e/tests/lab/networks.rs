//! Linux guests on networks of their own: what they reach, and who reaches them.

use std::io::Read;
use std::net::TcpStream;

use anyhow::{Context, ensure};
use rekindle_e2e::{HOST, INTERNET, METADATA, Networks};
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "guests and copies reach the internet and are published, and reach neither each other nor their host",
        networks,
    )]
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
    ensure!(hears(linux, "a", HOST, 81)?.is_empty(), "it heard its host");
    ensure!(tells(&networks, 8080)? == "42");

    linux.rekindle.does("snapshot create a --name base")?;
    linux.rekindle.does("restore base --name c --count 2")?;
    linux
        .rekindle
        .does("restore base --name web --publish 8081:80")?;
    for copy in ["c-1", "c-2"] {
        ensure!(hears(linux, copy, INTERNET, 80)? == "internet", "{copy}");
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
    let address = inspected["network"]["addresses"][0]
        .as_str()
        .context("an address")?;
    for (there, port) in [(address, 80), (HOST, 8080), (HOST, 8081)] {
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
