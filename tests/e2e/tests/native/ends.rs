//! How a VM ends: its time is up, it is stopped, its terminal is interrupted.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, SOON, wait_for};
use rekindle_kit::story::Story;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};

use crate::bare::counter;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a VM ends when its time is up", time_is_up),
        story(
            "who waits for a VM and who follows it learn of its end",
            an_end_is_told,
        ),
        story(
            "a VM is killed also while its monitor grants it time to end",
            killed_in_its_grace,
        ),
        story("a VM in the foreground ends with Ctrl-C", ctrl_c),
        story(
            "a VM in the foreground that ends is removed",
            ended_in_the_foreground,
        ),
        story("Ctrl-C during the start leaves no VM", ctrl_c_at_once),
        story("Ctrl-C ends a start that goes on and on", ctrl_c_in_a_start),
        story(
            "a firecracker that dies is told and cleaned up",
            a_firecracker_that_dies,
        ),
    ]
}

/// A paused guest cannot be asked to end, and is killed at once.
fn time_is_up(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    rekindle.does(&format!("run {guest} --name original --detach --ttl 60s"))?;
    rekindle.follows("original")?.counts(3)?;
    rekindle.does("snapshot create original --name base")?;
    let begun = Instant::now();
    rekindle.does("restore base --name copy --paused --ttl 1s")?;
    ensure!(rekindle.state_of("copy")? == "paused");
    rekindle.does("wait copy")?;
    let lived = begun.elapsed();
    ensure!(lived >= Duration::from_secs(1), "it ended after {lived:?}");
    ensure!(rekindle.state_of("copy")? == "stopped");
    ensure!(rekindle.state_of("original")? == "running");
    Ok(())
}

fn an_end_is_told(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("c", &counter())?;
    let mut follower = rekindle.follows("c")?;
    let mut waiter = rekindle.listens("wait c --json")?;
    let (_, heard) = follower.counts(5)?;
    rekindle.does("stop c --grace 0")?;
    let (status, rest) = follower.ends()?;
    ensure!(status == Some(0), "logs -f ended with {status:?}");
    let said = rekindle.output("c")?;
    ensure!(
        said.ends_with(&rest) && said.contains(&format!("n={heard}\n")),
        "{rest:?}"
    );
    let (status, said) = waiter.ends()?;
    ensure!(status == Some(0) && said.contains("\"stopped\""), "{said}");
    // Of what has ended already, too.
    rekindle.does("wait c")?;
    rekindle.does("logs -f c")?;
    Ok(())
}

/// The guest knows nothing of Ctrl-Alt-Del, and would be given an hour.
fn killed_in_its_grace(rekindle: &Rekindle) -> anyhow::Result<()> {
    for kill in ["stop c --grace 0", "rm --force c"] {
        rekindle.boots("c", &counter())?;
        let mut asked = rekindle.command("stop c --grace 3600");
        let mut asked = asked.stderr(Stdio::null()).spawn()?;
        is_connected(rekindle, "c")?;
        rekindle.does(kill)?;
        wait_for(&mut asked, SOON).context("the one who grants it time")?;
        let left = rekindle.processes()?;
        ensure!(left.is_empty(), "after {kill}: {left:?}");
        if kill.starts_with("stop") {
            let record = rekindle.tells("inspect c --json")?;
            ensure!(record["state"] == "stopped", "{record}");
            ensure!(rekindle.output("c")?.contains("n=1\n"));
            rekindle.does("rm c")?;
        }
        ensure!(rekindle.vms()?.is_empty());
    }
    Ok(())
}

/// Waits until somebody has a connection to a VM's monitor.
fn is_connected(rekindle: &Rekindle, vm: &str) -> anyhow::Result<()> {
    // Its name when it was bound, and each connection has it, too.
    let socket = rekindle.vm(vm).join("control.next");
    let socket = socket.to_str().context("a path of text")?;
    let deadline = Instant::now() + SOON;
    loop {
        let sockets = std::fs::read_to_string("/proc/net/unix")?;
        if sockets
            .lines()
            .filter(|line| line.ends_with(socket))
            .count()
            > 1
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "nobody is connected");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A command in the foreground, whose guest has counted to three.
fn in_the_foreground(rekindle: &Rekindle, options: &str) -> anyhow::Result<rekindle_e2e::Listener> {
    let guest = rekindle.guest(&counter())?;
    let mut run = rekindle.listens(&format!("run {guest} {options}"))?;
    run.hears("n=3\n")?;
    Ok(run)
}

fn interrupt(child: &Child) -> anyhow::Result<()> {
    Ok(kill_process(Pid::from_child(child), Signal::INT)?)
}

fn ctrl_c(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut run = in_the_foreground(rekindle, "")?;
    ensure!(rekindle.vms()?.len() == 1);
    interrupt(run.child())?;
    let (status, _) = run.ends()?;
    ensure!(status == Some(130), "it ended with {status:?}");
    ensure!(rekindle.vms()?.is_empty());
    Ok(())
}

fn ended_in_the_foreground(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut unnamed = in_the_foreground(rekindle, "")?;
    let vms = rekindle.vms()?;
    rekindle.does(&format!(
        "stop {} --grace 0",
        vms[0]["name"].as_str().unwrap_or("")
    ))?;
    ensure!(unnamed.ends()?.0 == Some(0));
    ensure!(rekindle.vms()?.is_empty());

    let mut named = in_the_foreground(rekindle, "--name kept")?;
    rekindle.does("stop kept --grace 0")?;
    ensure!(named.ends()?.0 == Some(0));
    ensure!(rekindle.state_of("kept")? == "stopped");
    Ok(())
}

/// Whenever it comes: the VM is gone, or was never there.
fn ctrl_c_at_once(rekindle: &Rekindle) -> anyhow::Result<()> {
    let guest = rekindle.guest(&counter())?;
    for delay in [2, 10, 25, 50, 100] {
        // Whoever starts the tests in the background lets them, and all that they start, ignore it.
        let mut run = rekindle.other("env");
        run.arg("--default-signal=INT").arg(rekindle.program());
        run.args(format!("run {guest}").split_whitespace());
        let mut run = run.stdout(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(delay));
        interrupt(&run)?;
        wait_for(&mut run, SOON).with_context(|| {
            let left = rekindle.processes();
            format!("interrupted after {delay} ms; then there are {left:?}")
        })?;
        let vms = rekindle.vms()?;
        ensure!(vms.is_empty(), "after {delay} ms: {vms:?}");
    }
    Ok(())
}

/// The firecracker of this story never answers.
fn ctrl_c_in_a_start(rekindle: &Rekindle) -> anyhow::Result<()> {
    let place = rekindle.file("mute");
    std::fs::create_dir(&place)?;
    let (program, gate) = (place.join("firecracker"), place.join("gate"));
    // It starts no other program, which nobody would know to end.
    let script = format!("#!/bin/sh\nread line < {}\n", gate.display());
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, Permissions::from_mode(0o700))?;
    mknodat(CWD, &gate, FileType::Fifo, Mode::RUSR, 0)?;
    let guest = rekindle.guest(&counter())?;
    let mut run = rekindle.command(&format!("run {guest} --name c"));
    run.env("REKINDLE_FIRECRACKER", &program);
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let record = rekindle.vm("c").join("record.json");
    let deadline = Instant::now() + SOON;
    while !std::fs::read_to_string(&record).is_ok_and(|text| text.contains("\"firecracker\": {")) {
        ensure!(Instant::now() < deadline, "it starts no firecracker");
        std::thread::sleep(Duration::from_millis(1));
    }
    interrupt(&run)?;
    let status = wait_for(&mut run, SOON)?;
    // 125 would be the start's own failure, once its patience is over.
    ensure!(status.code() == Some(130), "it ended with {status:?}");
    ensure!(rekindle.vms()?.is_empty());
    let left = rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_firecracker_that_dies(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut run = in_the_foreground(rekindle, "--name c")?;
    let (_, process) = rekindle
        .processes()?
        .into_iter()
        .find(|(role, _)| *role == rekindle_e2e::Role::Firecracker)
        .ok_or_else(|| anyhow::anyhow!("no firecracker"))?;
    process.kill(SOON)?;
    let (status, _) = run.ends()?;
    ensure!(status == Some(125), "it ended with {status:?}");
    ensure!(rekindle.state_of("c")? == "failed");
    let said = rekindle.tries("wait c")?;
    ensure!(said.status == Some(1), "{said:?}");
    ensure!(
        said.err.contains("firecracker ended by itself") && said.err.contains("9"),
        "{said:?}"
    );
    let said = rekindle.refuses("pause c")?;
    ensure!(said.contains("the VM has failed"), "{said}");
    Ok(())
}
