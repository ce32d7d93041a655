//! The page server and the API under a Firecracker that somebody else started.

use std::fs;

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::machine::{Machine, SnapshotFiles, SnapshotKind, Tracking};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::{PATTERN_PAGES, pattern};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "the page server serves a firecracker of somebody else",
            the_page_server,
        ),
        story(
            "a request goes to a firecracker of somebody else",
            a_request,
        ),
        story("a page server that cannot serve says why", no_page_server),
    ]
}

pub(crate) fn machine(rekindle: &Rekindle, name: &str) -> anyhow::Result<Machine> {
    let directory = rekindle.file(name);
    fs::create_dir(&directory)?;
    Machine::start(rekindle.firecracker(), &directory)
}

pub(crate) fn snapshot(rekindle: &Rekindle) -> anyhow::Result<SnapshotFiles> {
    let mut original = machine(rekindle, "original")?;
    original.boot(&pattern(), Tracking::Off)?;
    original.serial().wait_for("vg", rekindle_e2e::SOON)?;
    original.pause()?;
    let directory = rekindle.file("snapshot");
    fs::create_dir(&directory)?;
    let files = SnapshotFiles::inside(&directory);
    original.snapshot(SnapshotKind::Full, &files)?;
    Ok(files)
}

fn the_page_server(rekindle: &Rekindle) -> anyhow::Result<()> {
    let files = snapshot(rekindle)?;
    let (socket, stats) = (rekindle.file("uffd.sock"), rekindle.file("stats.json"));
    let mut pager = rekindle.listens(&format!(
        "pager --socket {} --memory {} --stats {}",
        socket.display(),
        files.memory.display(),
        stats.display()
    ))?;
    let ready: Value = serde_json::from_str(&pager.hears("\n")?)?;
    ensure!(
        ready["listening"] == socket.display().to_string(),
        "{ready}"
    );
    ensure!(ready["pid"] == pager.child().id(), "{ready}");

    let mut copy = machine(rekindle, "copy")?;
    copy.load_uffd(&files, Tracking::Off, &socket)?;
    copy.resume()?;
    for _ in 0..3 {
        let said = copy.serial().wait_for("v", rekindle_e2e::SOON)?;
        ensure!(!said.contains('X'), "{said:?}");
    }
    let vm = copy.pid();
    drop(copy);
    let (status, rest) = pager.ends()?;
    ensure!(status == Some(0) && rest.is_empty(), "{status:?} {rest:?}");
    let stats: Value = serde_json::from_slice(&fs::read(stats)?)?;
    ensure!(stats["vm_pid"] == vm, "{stats}");
    ensure!(stats["copied"].as_u64() >= Some(PATTERN_PAGES), "{stats}");
    ensure!(stats["ended"]["how"] == "vm_exited", "{stats}");
    ensure!(!socket.exists(), "the socket is still there");
    Ok(())
}

fn a_request(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut machine = machine(rekindle, "machine")?;
    machine.boot(&pattern(), Tracking::Off)?;
    let socket = rekindle.file("machine").join("api.sock");
    let api = format!("api --socket {}", socket.display());
    let described = rekindle.tells(&format!("{api} GET /"))?;
    ensure!(
        described["state"] == "Running" && described["id"] == "kit",
        "{described}"
    );
    let said = rekindle.does(&format!("{api} PATCH /vm {{\"state\":\"Paused\"}}"))?;
    ensure!(said.is_empty(), "{said}");
    ensure!(rekindle.tells(&format!("{api} GET /"))?["state"] == "Paused");
    let said = rekindle.refuses(&format!("{api} PUT /actions {{\"action_type\":\"Fly\"}}"))?;
    ensure!(
        said.contains("PUT /actions: 400") && said.contains("Fly"),
        "{said}"
    );
    let said = rekindle.refuses(&format!("{api} PUT /actions {{"))?;
    ensure!(said.contains("not JSON"), "{said}");
    drop(machine);
    let said = rekindle.refuses(&format!("{api} GET /"))?;
    ensure!(said.contains("api.sock"), "{said}");
    Ok(())
}

fn no_page_server(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (socket, empty) = (rekindle.file("uffd.sock"), rekindle.file("empty"));
    let pager = |memory: &str| format!("pager --socket {} --memory {memory}", socket.display());
    let said = rekindle.refuses(&pager("/nonexistent/memory"))?;
    ensure!(said.contains("/nonexistent/memory"), "{said}");
    fs::write(&empty, "")?;
    let said = rekindle.refuses(&pager(empty.to_str().context("a path in UTF-8")?))?;
    ensure!(said.contains("empty"), "{said}");
    fs::write(&empty, [0; 4096])?;
    let said = rekindle.refuses(&format!(
        "pager --socket /nonexistent/socket --memory {}",
        empty.display()
    ))?;
    ensure!(said.contains("/nonexistent/socket"), "{said}");
    let bounded = format!("{} --timeout 1s", pager(&empty.display().to_string()));
    let said = rekindle.tries(&bounded)?;
    ensure!(
        said.status == Some(1) && said.err.contains("1s"),
        "{said:?}"
    );
    let said = rekindle.tries("pager --socket x")?;
    ensure!(said.status == Some(2), "{said:?}");
    Ok(())
}
