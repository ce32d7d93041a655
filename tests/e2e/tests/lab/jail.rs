//! A jailed Linux guest, with all that one may have: image, layer, agent, network, control groups of version 2.

use std::fs;

use anyhow::{Context, ensure};
use rekindle_e2e::{INTERNET, Networks};
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "a jailed guest and its copy have disks, a network and commands as any other, within limits",
        jailed,
    )]
}

fn jailed(linux: &Linux) -> anyhow::Result<()> {
    let networks = Networks::enter("jail")?;
    networks.internet_greets(INTERNET, 80, "internet")?;
    linux.boots("a", "--net nat")?;
    works(linux, "a")?;
    linux.asks("a", "echo written > /file")?;
    linux.rekindle.does("snapshot create a --name base")?;
    linux.rekindle.does("restore base --name copy")?;
    works(linux, "copy")?;
    let read = linux.rekindle.does("exec copy -- cat /file")?;
    ensure!(read == "written\n", "{read:?}");
    linux.rekindle.does("rm --force a copy")?;
    let groups = linux.rekindle.control_groups()?;
    ensure!(groups.is_empty(), "left: {groups:?}");
    Ok(())
}

fn works(linux: &Linux, vm: &str) -> anyhow::Result<()> {
    let said = linux.rekindle.does(&format!("exec {vm} -- uname"))?;
    ensure!(said == "Linux\n", "{said:?}");
    let heard = linux.asks(vm, &format!("nc -w 3 {INTERNET} 80 < /dev/null"))?;
    ensure!(heard.trim() == "internet", "{heard:?}");
    let noted = fs::read_to_string(linux.rekindle.vm(vm).join("cgroups"))?;
    let group = noted.lines().next().context("a control group")?;
    ensure!(noted.lines().count() == 1, "version 2 has one: {noted}");
    let record = linux.rekindle.tells(&format!("inspect {vm}"))?;
    let pid = record["firecracker"]["pid"].to_string();
    // Beside it are the kernel's own threads that work for this VM.
    let held = fs::read_to_string(format!("{group}/cgroup.procs"))?;
    ensure!(held.lines().any(|line| line == pid), "{held}");
    for file in ["memory.max", "pids.max", "cpu.max"] {
        let limit = fs::read_to_string(format!("{group}/{file}"))?;
        ensure!(!limit.starts_with("max"), "{file}: {limit}");
    }
    ensure!(!record["jailed_as"].is_null(), "{record}");
    Ok(())
}
