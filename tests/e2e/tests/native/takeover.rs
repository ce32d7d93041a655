//! A page server that dies, at any moment and however often: the guest waits a moment, and then reads every page right.
//!
//! `REKINDLE_TAKEOVERS` says how many kills at random moments there are; `REKINDLE_SEED` repeats a run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_e2e::{Rekindle, Role, SOON, wait_for};
use rekindle_engine::Engine;
use rekindle_engine::programs::Programs;
use rekindle_engine::store::Root;
use rekindle_engine::vm::restore::RestoreConfig;
use rekindle_engine::vm::state::{State, Why};
use rekindle_kit::dice::{Dice, setting};
use rekindle_kit::guest::Guest;
use rekindle_kit::processes::Process;
use rekindle_kit::story::Story;
use rekindle_pager::Live;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bare::{large_pattern, pattern};
use crate::story;

/// How many kills at random moments there are unless `REKINDLE_TAKEOVERS` says otherwise.
const TAKEOVERS: u64 = 10;
/// One page server after the other may be killed so often within ten seconds.
const PATIENCE: usize = 5;

pub(crate) fn stories() -> Vec<Story> {
    let soak = Duration::from_secs(60)
        + Duration::from_secs(5) * u32::try_from(takeovers()).unwrap_or(u32::MAX);
    vec![
        story(
            "a page server killed three times in a row is replaced each time",
            three_in_a_row,
        ),
        story(
            "a page server killed while the snapshot is loaded is replaced",
            during_load,
        ),
        story(
            "a page server killed in a snapshot delays it",
            during_a_snapshot,
        ),
        story(
            "a restore whose page server dies before it has the VM starts again",
            before_the_handshake,
        ),
        story(
            "a page server that dies again and again ends the VM with the reason",
            again_and_again,
        ),
        story(
            "a successor that fails ends the VM with its own words",
            a_successor_that_fails,
        ),
        story(
            "monitor and page server killed together are both replaced",
            with_the_monitor,
        ),
        story(
            "a page server that died without a watcher is replaced by the next command",
            without_a_watcher,
        ),
        story(
            "a page server is replaced by hand without a lost fault",
            by_hand,
        ),
        Story::future("a VM of the library outlives its page servers", || async {
            let rekindle = Rekindle::new()?;
            in_the_library(&rekindle).await?;
            rekindle.leaves_nothing()
        }),
        story(
            "a page server killed at a random moment costs nothing",
            random_moments,
        )
        .within(soak),
    ]
}

fn takeovers() -> u64 {
    setting("REKINDLE_TAKEOVERS", TAKEOVERS)
}

/// A snapshot of a guest that checks all its pages, called `base`.
fn a_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot_of(rekindle, &pattern())
}

fn a_snapshot_of(rekindle: &Rekindle, guest: &Guest) -> anyhow::Result<()> {
    rekindle.boots("original", guest)?;
    rekindle.follows("original")?.hears("vg")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    Ok(())
}

fn a_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    rekindle.does("restore base --name copy --track-dirty-pages")?;
    Ok(())
}

/// The guest goes through all its memory three times from now on, and every page is right.
fn all_is_right(rekindle: &Rekindle, vm: &str) -> anyhow::Result<()> {
    let before = rekindle.output(vm)?;
    let mut guest = rekindle.follows(vm)?;
    let mut heard = String::new();
    while heard.matches('v').count() < before.matches('v').count() + 3 {
        heard += &guest.hears("v")?;
        ensure!(!heard.contains('X'), "a page was wrong: {heard:?}");
    }
    Ok(())
}

/// What is written down of a VM.
fn record(rekindle: &Rekindle, vm: &str) -> anyhow::Result<Value> {
    let text = fs::read(rekindle.vm(vm).join("record.json"))?;
    Ok(serde_json::from_slice(&text)?)
}

/// The page server that the VM's record names, once it is another one than `old`.
fn next_pager(rekindle: &Rekindle, vm: &str, old: i32) -> anyhow::Result<Process> {
    let deadline = Instant::now() + SOON;
    loop {
        let record = record(rekindle, vm)?;
        ensure!(record["state"] != "failed", "{record}");
        let now = record["pager"]["pid"].as_i64();
        for (role, process) in rekindle.processes()? {
            let pid = process.pid();
            if role == Role::Pager && pid != old && Some(i64::from(pid)) == now {
                return Ok(process);
            }
        }
        ensure!(
            Instant::now() < deadline,
            "none after {old}: {}",
            record["pager"]
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// There is one process of each kind, and the record names the page server that there is.
fn is_whole(rekindle: &Rekindle) -> anyhow::Result<()> {
    for role in [Role::Keeper, Role::Monitor, Role::Firecracker] {
        rekindle.one(role)?;
    }
    let deadline = Instant::now() + SOON;
    loop {
        let all = rekindle.processes()?;
        let pagers = all.iter().filter(|(role, _)| *role == Role::Pager);
        let pids: Vec<_> = pagers.map(|(_, process)| process.pid()).collect();
        let record = record(rekindle, "copy")?;
        if let [pid] = pids[..]
            && record["pager"]["pid"] == pid
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{pids:?}, but {}",
            record["pager"]
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn three_in_a_row(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    let mut old = 0;
    for _ in 0..3 {
        let pager = next_pager(rekindle, "copy", old)?;
        old = pager.pid();
        pager.kill(SOON)?;
    }
    all_is_right(rekindle, "copy")?;
    is_whole(rekindle)?;
    let log = fs::read_to_string(rekindle.vm("copy").join("pager.log"))?;
    ensure!(log.matches("takes over").count() == 3, "{log}");
    // A copy of what was served by four page servers.
    rekindle.does("snapshot create copy --name again")?;
    rekindle.does("rm --force copy")?;
    rekindle.does("restore again --name copy")?;
    all_is_right(rekindle, "copy")
}

/// A restore under way, which has got as far as this file.
fn restoring(rekindle: &Rekindle, until: &str) -> anyhow::Result<Child> {
    let mut verb = rekindle.command("restore base --name copy");
    let mut verb = verb.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let file = rekindle.vm("copy").join(until);
    // A state is one once the handshake is had.
    let is_there = || match until {
        "pager.state" => Live::open(&file).is_ok(),
        _ => file.exists(),
    };
    let deadline = Instant::now() + SOON;
    while !is_there() && verb.try_wait()?.is_none() {
        ensure!(Instant::now() < deadline, "{until} never came");
        std::hint::spin_loop();
    }
    Ok(verb)
}

fn during_load(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    for round in 0..5 {
        // The state is there before the first page is served, and so before the load is answered.
        let mut verb = restoring(rekindle, "pager.state")?;
        rekindle.one(Role::Pager)?.kill(SOON)?;
        let status = wait_for(&mut verb, SOON)?;
        ensure!(status.success(), "round {round}: {status}");
        all_is_right(rekindle, "copy")?;
        is_whole(rekindle)?;
        rekindle.does("rm --force copy")?;
    }
    Ok(())
}

fn during_a_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot_of(rekindle, &large_pattern())?;
    // Nothing of it is there yet, so the snapshot reads all of it through the page server.
    rekindle.does("restore base --name copy --paused")?;
    let mut verb = rekindle.command("snapshot create copy --name again");
    let mut verb = verb.stdout(Stdio::null()).spawn()?;
    std::thread::sleep(Duration::from_millis(15));
    rekindle.one(Role::Pager)?.kill(SOON)?;
    ensure!(wait_for(&mut verb, SOON)?.success());
    rekindle.does("snapshot verify again")?;
    rekindle.does("rm --force copy")?;
    rekindle.does("restore again --name copy")?;
    all_is_right(rekindle, "copy")
}

/// A program that stands in front of `rekindle`: `script` decides, with the arguments, before the real one runs.
fn in_front(rekindle: &Rekindle, script: &str) -> anyhow::Result<PathBuf> {
    let path = rekindle.file("in-front");
    let real = rekindle.program().display();
    fs::write(&path, format!("#!/bin/sh\n{script}\nexec {real} \"$@\"\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// An engine of the library whose page servers are this program.
fn engine(rekindle: &Rekindle, program: PathBuf) -> anyhow::Result<Engine> {
    let programs = Programs {
        firecracker: rekindle.firecracker().to_owned(),
        rekindle: program,
    };
    Ok(Engine::new(Root::open(rekindle.state())?, programs))
}

/// Runs a future on a runtime of one thread, as the monitor does.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build()?.block_on(future)
}

fn before_the_handshake(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    // The first two kill themselves.
    let count = rekindle.file("count");
    let script = format!(
        "echo x >> {0}\n[ $(wc -l < {0}) -gt 2 ] || kill -9 $$",
        count.display()
    );
    let program = in_front(rekindle, &script)?;
    let flaky = engine(rekindle, program)?;
    let broken = rekindle.file("broken");
    fs::create_dir(&broken)?;
    block_on(async {
        let snapshot = flaky.snapshot("base")?;
        let mut vm = flaky
            .restore(&snapshot, RestoreConfig::new("copy".parse()?))
            .await?;
        ensure!(fs::read_to_string(&count)?.lines().count() == 3);
        ensure!(*vm.state() == State::Running);
        verified(&mut vm).await?;
        let log = fs::read_to_string(vm.dir().file("pager.log"))?;
        ensure!(log.matches("starting anew").count() == 2, "{log}");
        vm.remove().await?;
        // One that always dies is not tried for ever, and what it said is told.
        let program = in_front(rekindle, "echo its last words >&2; kill -9 $$")?;
        let hopeless = engine(rekindle, program)?;
        let refused = hopeless
            .restore(&snapshot, RestoreConfig::new("copy".parse()?))
            .await;
        let Err(error) = refused else {
            bail!("it was restored without a page server");
        };
        let said = error.to_string();
        ensure!(
            said.contains("the page server") && said.contains("its last words"),
            "{said}"
        );
        Ok(())
    })?;
    ensure!(!rekindle.vm("copy").exists());
    let left = rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// The guest goes through all its memory three times, and every page is right.
async fn verified(vm: &mut rekindle_engine::Vm) -> anyhow::Result<()> {
    let serial = vm.dir().file("serial");
    let passes = |text: &str| text.matches('v').count();
    let before = passes(&fs::read_to_string(&serial).unwrap_or_default());
    let deadline = Instant::now() + SOON;
    loop {
        let said = fs::read_to_string(&serial).unwrap_or_default();
        ensure!(!said.contains('X'), "a page was wrong: {said:?}");
        if passes(&said) >= before + 3 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it stands still: {said:?}");
        tokio::select! {
            () = vm.death() => bail!("it died"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
}

async fn in_the_library(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    let engine = engine(rekindle, rekindle.program().to_owned())?;
    let snapshot = engine.snapshot("base")?;
    let mut vm = engine
        .restore(&snapshot, RestoreConfig::new("copy".parse()?))
        .await?;
    for _ in 0..3 {
        let before = vm.record().pager.context("a page server")?;
        rekindle.one(Role::Pager)?.kill(SOON)?;
        verified(&mut vm).await?;
        let now = vm.record().pager.context("another page server")?;
        ensure!(now != before, "it is the same");
        ensure!(now.is_alive());
    }
    // A call goes on, too.
    rekindle.one(Role::Pager)?.kill(SOON)?;
    vm.pause().await?;
    vm.resume().await?;
    verified(&mut vm).await?;
    // And in the end nobody takes over.
    vm.remove().await?;
    let left = rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");

    // Whoever lets go of a VM does not look after it any more.
    let vm = engine
        .restore(&snapshot, RestoreConfig::new("copy".parse()?))
        .await?;
    vm.detach();
    rekindle.one(Role::Pager)?.kill(SOON)?;
    let said = rekindle.tries("ps --json")?;
    ensure!(said.err.contains("the VM is running now"), "{said:?}");
    all_is_right(rekindle, "copy")
}

fn again_and_again(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    let mut kills = 0;
    let deadline = Instant::now() + SOON;
    while rekindle.vm("copy").join("api.sock").exists() {
        ensure!(Instant::now() < deadline, "it lives after {kills} kills");
        for (role, process) in rekindle.processes()? {
            if role == Role::Pager && process.kill(SOON).is_ok() {
                kills += 1;
            }
        }
    }
    ensure!(kills >= PATIENCE, "it had only {kills} page servers");
    rekindle.tries("wait copy")?.refused(1)?;
    let record = rekindle.tells("inspect copy")?;
    ensure!(record["state"] == "failed", "{record}");
    ensure!(record["why"]["kind"] == "pager_died", "{record}");
    let said = record["why"]["exit"].as_str().context("words")?;
    ensure!(
        said.contains("within 10 s") && said.contains('9'),
        "{said:?}"
    );
    let left = rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn a_successor_that_fails(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot(rekindle)?;
    successor(rekindle, "echo no luck >&2; exit 1", "no luck")?;
    successor(rekindle, "exec sleep 600", "it had not taken over after")
}

/// A page server whose successor does this instead of what it should; the VM's record then says so.
fn successor(rekindle: &Rekindle, does: &str, said: &str) -> anyhow::Result<()> {
    let script = format!("case \"$*\" in *--adopt*) {does};; esac");
    let engine = engine(rekindle, in_front(rekindle, &script)?)?;
    block_on(async {
        let snapshot = engine.snapshot("base")?;
        let config = RestoreConfig::new("copy".parse()?);
        let mut vm = engine.restore(&snapshot, config).await?;
        rekindle.one(Role::Pager)?.kill(SOON)?;
        let State::Failed(Why::PagerDied { exit }) = vm.ended().await else {
            bail!("it ended as {}", vm.state());
        };
        ensure!(exit.contains('9') && exit.contains(said), "{exit}");
        ensure!(vm.resume().await.is_err());
        vm.remove().await?;
        Ok(())
    })
}

fn with_the_monitor(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    for role in [Role::Monitor, Role::Pager] {
        let old = rekindle.one(role)?;
        let other = rekindle.one(if role == Role::Pager {
            Role::Monitor
        } else {
            Role::Pager
        })?;
        old.kill(SOON)?;
        // Its keeper may have been that fast.
        let _ = other.kill(SOON);
        all_is_right(rekindle, "copy")?;
        is_whole(rekindle)?;
        ensure!(rekindle.state_of("copy")? == "running");
    }
    rekindle.does("pause copy")?;
    rekindle.does("resume copy")?;
    Ok(())
}

fn without_a_watcher(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    for role in [Role::Keeper, Role::Monitor, Role::Pager] {
        rekindle.one(role)?.kill(SOON)?;
    }
    let said = rekindle.tries("ps --json")?;
    ensure!(said.err.contains("the VM is running now"), "{said:?}");
    all_is_right(rekindle, "copy")?;
    is_whole(rekindle)
}

fn by_hand(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_copy(rekindle)?;
    let mut by_hand = Vec::new();
    for _ in 0..3 {
        let old = rekindle.one(Role::Pager)?;
        let firecracker = rekindle.one(Role::Firecracker)?;
        let mut command = rekindle.command(&format!("pager --adopt {}", firecracker.pid()));
        let child = command.stderr(Stdio::piped()).spawn()?;
        let pid = i32::try_from(child.id())?;
        by_hand.push(child);
        ensure!(old.ends(SOON)?, "the old one lives");
        // Whoever watches may have started one, too; that one finds the VM served, and ends.
        all_is_right(rekindle, "copy")?;
        is_whole(rekindle)?;
        let now = rekindle.one(Role::Pager)?.pid();
        ensure!(now == pid, "{now} serves, and not {pid}");
    }
    // Whoever serves is watched.
    rekindle.one(Role::Pager)?.kill(SOON)?;
    all_is_right(rekindle, "copy")?;
    is_whole(rekindle)?;
    for mut child in by_hand {
        wait_for(&mut child, SOON)?;
    }
    Ok(())
}

fn random_moments(rekindle: &Rekindle) -> anyhow::Result<()> {
    a_snapshot_of(rekindle, &large_pattern())?;
    let mut dice = Dice::new();
    let mut done = 0;
    while done < takeovers() {
        let mut verb = restoring(rekindle, "pager.state")?;
        // Some of them while the guest waits for nearly every page, some while the one before has hardly begun.
        let mut moments = Vec::new();
        for _ in 0..=dice.up_to(3) {
            let most = [3_000, 60_000][dice.up_to(2)];
            let delay = Duration::from_micros(dice.up_to(most) as u64);
            moments.push(delay);
            std::thread::sleep(delay);
            done += u64::from(kill_recorded(rekindle)?);
        }
        goes_on(rekindle, &mut verb).with_context(|| {
            format!(
                "kill {done}: after {moments:?}, REKINDLE_SEED={}",
                dice.seed()
            )
        })?;
    }
    Ok(())
}

/// Kills the page server that is written down, without looking for it; says whether there was one.
fn kill_recorded(rekindle: &Rekindle) -> anyhow::Result<bool> {
    let pid = record(rekindle, "copy")?["pager"]["pid"].as_i64();
    let pid = Pid::from_raw(i32::try_from(pid.context("a page server")?)?);
    Ok(kill_process(pid.context("a pid")?, Signal::KILL).is_ok())
}

fn goes_on(rekindle: &Rekindle, verb: &mut Child) -> anyhow::Result<()> {
    let status = wait_for(verb, SOON)?;
    ensure!(status.success(), "the restore failed: {status}");
    all_is_right(rekindle, "copy")?;
    is_whole(rekindle)?;
    rekindle.does("rm --force copy")?;
    let left = rekindle.processes()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}
