//! One page server after another, by hand, under a Firecracker that Rekindle did not start: the guest checks all
//! its memory again and again, and finds no page wrong.

use std::env;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::{Listener, Rekindle};
use rekindle_kit::dice::Dice;
use rekindle_kit::machine::{Machine, Tracking};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::foreign::{machine, snapshot};
use crate::story;

/// How many page servers die unless `REKINDLE_KILLS` says otherwise.
const KILLS: u64 = 12;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "page servers that die at random moments are followed by another",
            followed,
        ),
        story("a living page server is replaced by another", replaced),
        story("a page server adopts nobody else's VM", nobody_elses),
    ]
}

/// A copy, loaded and running, its page server, and where that keeps its state.
struct Served {
    copy: Machine,
    pager: Listener,
}

impl Served {
    fn start(rekindle: &Rekindle) -> anyhow::Result<Served> {
        let files = snapshot(rekindle)?;
        let socket = rekindle.file("uffd.sock");
        let mut pager = rekindle.listens(&format!(
            "pager --socket {} --memory {} --stats {} --state {}",
            socket.display(),
            files.memory.display(),
            rekindle.file("stats.json").display(),
            rekindle.file("pager.state").display(),
        ))?;
        pager.hears("\n")?;
        let mut copy = machine(rekindle, "copy")?;
        copy.load_uffd(&files, Tracking::Off, &socket)?;
        copy.resume()?;
        Ok(Served { copy, pager })
    }

    fn adopted(&mut self, rekindle: &Rekindle) -> anyhow::Result<Listener> {
        rekindle.listens(&format!(
            "pager --adopt {} --state {}",
            self.copy.pid(),
            rekindle.file("pager.state").display()
        ))
    }

    /// The guest checks all of its memory twice more.
    fn goes_on(&mut self) -> anyhow::Result<()> {
        for _ in 0..2 {
            let said = self.copy.serial().wait_for("v", rekindle_e2e::SOON)?;
            ensure!(!said.contains('X'), "a page was wrong: {said:?}");
        }
        Ok(())
    }

    /// Ends the VM; the last page server follows it.
    fn ends(mut self, stats: &Path) -> anyhow::Result<Value> {
        self.goes_on()?;
        drop(self.copy);
        let (status, _) = self.pager.ends()?;
        ensure!(status == Some(0), "{status:?}");
        let stats: Value = serde_json::from_slice(&fs::read(stats)?)?;
        ensure!(stats["ended"]["how"] == "vm_exited", "{stats}");
        Ok(stats)
    }
}

fn followed(rekindle: &Rekindle) -> anyhow::Result<()> {
    let kills = match env::var("REKINDLE_KILLS") {
        Ok(given) => given.parse().context("REKINDLE_KILLS")?,
        Err(_) => KILLS,
    };
    let mut dice = Dice::new();
    println!("{kills} page servers die, from the seed {}", dice.seed());
    let mut takeovers = 0;
    let mut left = kills;
    while left > 0 {
        let mut served = Served::start(rekindle)?;
        // One copy is whole soon, and needs no page server any more: a few deaths each.
        for _ in 0..left.min(4) {
            sleep(Duration::from_micros(dice.up_to(8_000) as u64));
            served.pager.child().kill()?;
            served.pager = served.adopted(rekindle)?;
            left -= 1;
            takeovers += 1;
        }
        let stats = served.ends(&rekindle.file("stats.json"))?;
        // A page server can be killed again before it has taken over.
        ensure!(stats["takeovers"].as_u64() >= Some(1), "{stats}");
        for name in ["original", "copy", "snapshot"] {
            fs::remove_dir_all(rekindle.file(name))?;
        }
    }
    ensure!(takeovers == kills);
    Ok(())
}

fn replaced(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut served = Served::start(rekindle)?;
    let next = served.adopted(rekindle)?;
    let mut old = std::mem::replace(&mut served.pager, next);
    let (status, _) = old.ends()?;
    ensure!(status.is_none(), "it was not killed: {status:?}");
    let stats = served.ends(&rekindle.file("stats.json"))?;
    ensure!(stats["takeovers"] == 1, "{stats}");
    Ok(())
}

fn nobody_elses(rekindle: &Rekindle) -> anyhow::Result<()> {
    let mut served = Served::start(rekindle)?;
    let state = rekindle.file("pager.state");
    let other = machine(rekindle, "other")?;
    let said = rekindle.refuses(&format!(
        "pager --adopt {} --state {}",
        other.pid(),
        state.display()
    ))?;
    ensure!(said.contains("is not the state of process"), "{said}");
    for (bytes, reason) in [
        (&b""[..], "not the state of a page server"),
        (&[7; 40_000], "not the state of a page server"),
    ] {
        let bad = rekindle.file("bad");
        fs::write(&bad, bytes)?;
        let pid = served.copy.pid();
        let said = rekindle.refuses(&format!("pager --adopt {pid} --state {}", bad.display()))?;
        ensure!(said.contains(reason), "{said}");
    }
    let cut = rekindle.file("cut");
    let whole = fs::read(&state)?;
    fs::write(&cut, &whole[..whole.len() / 2])?;
    let pid = served.copy.pid();
    let said = rekindle.refuses(&format!("pager --adopt {pid} --state {}", cut.display()))?;
    ensure!(said.contains("cut short"), "{said}");
    served.goes_on()?;
    served.ends(&rekindle.file("stats.json"))?;
    Ok(())
}
