//! Copies of a Linux guest, copies of copies, and Diffs.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::Taps;
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

/// Counts in memory, on the disk and on the console.
const COUNT: &str = "n=0; while sleep 0.2; do n=$((n+1)); echo $n > /n.new; mv /n.new /n; done &\n";

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "three copies on TAPs of their own count on from where the original stood",
            three_copies,
        ),
        story(
            "a copy of a copy, and a Diff on top, are in the later state",
            later_states,
        ),
        story(
            "a rehearsal on no network gives the first copy its pages",
            rehearsed,
        ),
    ]
}

/// Reads all its files, and says so.
const READ: &str =
    "while cat /bin/* /etc/* > /dev/null; echo tick-$((1)); do sleep 1; done 2> /dev/null &\n";

fn number(linux: &Linux, vm: &str) -> anyhow::Result<u64> {
    let said = linux.asks(vm, "cat /n")?;
    said.trim()
        .parse()
        .with_context(|| format!("{vm} said {said:?}"))
}

fn three_copies(linux: &Linux) -> anyhow::Result<()> {
    let taps = Taps::make("rk-lin", 4)?;
    linux.boots("base", &format!("--tap {}", taps.name(0)))?;
    linux.types("base", COUNT)?;
    sleep(Duration::from_secs(2));
    let before = number(linux, "base")?;
    ensure!(before > 0, "it does not count");
    linux.rekindle.does("pause base")?;
    let still = linux.rekindle.last_output("base")?;
    linux
        .rekindle
        .does("snapshot create base --name counting")?;
    ensure!(
        linux.rekindle.state_of("base")? == "paused",
        "the snapshot resumed it"
    );
    ensure!(
        linux.rekindle.last_output("base")? == still,
        "it went on while paused"
    );
    linux.rekindle.does("rm --force base")?;

    for copy in 1..=3 {
        linux.rekindle.does(&format!(
            "restore counting --name copy-{copy} --tap {} --address eth0=10.7.{copy}.2/24,10.7.{copy}.1 --wake-within 60s --must-wake",
            taps.name(copy)
        ))?;
    }
    for copy in 1..=3 {
        let vm = format!("copy-{copy}");
        let first = number(linux, &vm)?;
        ensure!(
            first >= before,
            "{vm} counts from {first}, the original was at {before}"
        );
        sleep(Duration::from_secs(1));
        ensure!(number(linux, &vm)? > first, "{vm} stands still");
        let mac = linux.asks(&vm, "cat /sys/class/net/eth0/address")?;
        ensure!(
            mac.split(':').count() == 6,
            "{vm} has no interface: {mac:?}"
        );
        let said = linux.asks(&vm, "ip -4 -o addr show eth0; ip route")?;
        let (address, gateway) = (
            format!("inet 10.7.{copy}.2/24 "),
            format!("default via 10.7.{copy}.1 "),
        );
        ensure!(
            said.contains(&address) && said.contains(&gateway),
            "{vm} is elsewhere: {said:?}"
        );
    }
    let refusal = linux
        .rekindle
        .refuses("restore counting --name copy-4 --tap rk-lin-none")?;
    ensure!(refusal.contains("rk-lin-none"), "{refusal}");
    for copy in 1..=3 {
        linux.rekindle.does(&format!("rm --force copy-{copy}"))?;
    }
    taps.remove()
}

fn later_states(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "--track-dirty-pages")?;
    linux.types("base", "word=first; echo $word > /word\n")?;
    ensure!(linux.asks("base", "echo $word $(cat /word)")? == "first first");
    linux.rekindle.does("snapshot create base --name full")?;
    linux.types("base", "word=second; echo $word > /word\n")?;
    ensure!(linux.asks("base", "echo $word $(cat /word)")? == "second second");
    linux
        .rekindle
        .does("snapshot create base --diff --name diff")?;
    linux.rekindle.does("rm --force base")?;

    linux.rekindle.does("restore full --name early")?;
    linux.rekindle.does("restore diff --name late")?;
    linux
        .rekindle
        .does("restore diff --name mapped --backend file")?;
    ensure!(linux.asks("early", "echo $word $(cat /word)")? == "first first");
    ensure!(linux.asks("late", "echo $word $(cat /word)")? == "second second");
    ensure!(linux.asks("mapped", "echo $word $(cat /word)")? == "second second");

    linux.types("late", "word=third; echo $word > /word\n")?;
    ensure!(linux.asks("late", "echo $word $(cat /word)")? == "third third");
    linux.rekindle.does("snapshot create late --name again")?;
    linux.rekindle.does("restore again --name copy")?;
    ensure!(linux.asks("copy", "echo $word $(cat /word)")? == "third third");
    Ok(())
}

fn rehearsed(linux: &Linux) -> anyhow::Result<()> {
    let rekindle = &linux.rekindle;
    let taps = Taps::make("rk-reh", 1)?;
    linux.boots("base", &format!("--tap {}", taps.name(0)))?;
    linux.types("base", READ)?;
    rekindle.follows("base")?.hears("tick-1")?;
    // The original is on its TAP all the time.
    let created =
        rekindle.tells("snapshot create base --name warm --json --rehearse --ready-on tick-1")?;
    ensure!(created["rehearsal"]["ended"] == "ready", "{created}");
    let vms = rekindle.vms()?;
    ensure!(vms.len() == 1 && vms[0]["state"] == "running", "{vms:?}");
    rekindle.does("rm --force base")?;

    rekindle.does("restore warm --name copy")?;
    rekindle.follows("copy")?.hears("tick-1")?;
    let pager = rekindle.tells("inspect copy")?["pager"].clone();
    let count = |name: &str| pager[name].as_u64().unwrap_or(0);
    ensure!(count("replayed") > count("demand"), "{pager}");
    rekindle.does("rm --force copy")?;
    taps.remove()
}
