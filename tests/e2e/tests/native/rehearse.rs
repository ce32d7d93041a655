//! A snapshot is rehearsed: a throw-away copy runs for a moment, cut off from every network, and leaves nothing but what
//! it touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rekindle_e2e::{Rekindle, Role, SOON, Said, Taps, finish, until};
use rekindle_engine::Engine;
use rekindle_engine::programs::Programs;
use rekindle_engine::store::Root;
use rekindle_engine::vm::rehearse::{Ending, RehearseConfig};
use rekindle_kit::processes::{self, Process};
use rekindle_kit::require::requires_root;
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::{SCATTERED, counter, scatter};
use crate::replay::{all_over, base, count, working_set};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "the first copy after a rehearsal is given its pages",
            the_first_copy,
        ),
        story("a rehearsal ends in time, or with its guest", ends_in_time),
        story(
            "a rehearsal is cut off from the network that its original is on",
            cut_off,
        ),
        story("what cannot be rehearsed is not begun", not_begun),
        story("a rehearsal can be stopped and nothing else", stopped),
        story("a killed rehearsal leaves nothing", killed),
        story(
            "a rehearsal killed at any step of its way leaves nothing",
            each_step,
        ),
        Story::future("the library rehearses and leaves nothing", the_library),
    ]
}

const READY: &str = "snapshot create original --name base --json --rehearse --ready-on ..";

/// Boots the guest that is all over its pages.
fn boots(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &scatter())?;
    rekindle.follows("original")?.hears(".")?;
    Ok(())
}

/// The directories of rehearsals.
fn places(rekindle: &Rekindle) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(rekindle.state().join("vms"))? {
        let path = entry?.path();
        if is_rehearsal(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

fn is_rehearsal(path: &Path) -> bool {
    path.to_string_lossy().contains("/vms/rehearsal-")
}

/// The processes of rehearsals.
fn processes(rekindle: &Rekindle) -> anyhow::Result<Vec<(Role, Process)>> {
    let mut theirs = Vec::new();
    for place in places(rekindle)? {
        theirs.extend(processes::naming(&place)?);
    }
    let mut found = rekindle.processes()?;
    found.retain(|(_, process)| {
        process.command().contains(" rehearsal-") || theirs.contains(process)
    });
    Ok(found)
}

/// Nothing of a rehearsal is there.
fn nothing_left(rekindle: &Rekindle) -> anyhow::Result<()> {
    let places = places(rekindle)?;
    ensure!(places.is_empty(), "{places:?} are left");
    let processes = processes(rekindle)?;
    ensure!(processes.is_empty(), "{processes:?} are left");
    ensure!(
        rekindle.vms()?.iter().all(|vm| vm["name"] == "original"),
        "{:?}",
        rekindle.vms()
    );
    Ok(())
}

/// A `snapshot create` whose rehearsal takes so many seconds, and has begun when this returns.
struct Rehearsing {
    verb: Child,
    line: String,
}

impl Rehearsing {
    fn begin(rekindle: &Rekindle, seconds: u64) -> anyhow::Result<Rehearsing> {
        let line = format!("snapshot create original --name base --json --rehearse={seconds}");
        let mut verb = rekindle.command(&line);
        let verb = verb.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut begun = Rehearsing { verb, line };
        let mut ended = false;
        until("the copy runs, or the verb ended", || {
            ended = begun.verb.try_wait()?.is_some();
            let runs = |vm: &Value| vm["purpose"] == "rehearsal" && vm["state"] == "running";
            Ok(ended || rekindle.vms()?.iter().any(runs))
        })?;
        if ended {
            bail!("no copy was seen: {:?}", begun.ends()?);
        }
        Ok(begun)
    }

    fn ends(self) -> anyhow::Result<Said> {
        Said::of(self.verb, self.line)
    }
}

fn the_first_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    boots(rekindle)?;
    let created = rekindle.tells(READY)?;
    let rehearsal = &created["rehearsal"];
    ensure!(rehearsal["ended"] == "ready", "{created}");
    ensure!(
        count(rehearsal, "pages")? >= u64::from(SCATTERED),
        "{created}"
    );
    ensure!(count(rehearsal, "ran_us")? > 0, "{created}");
    nothing_left(rekindle)?;
    let set = working_set(rekindle)?;
    ensure!(
        set["runs"] == 1
            && set["pages"] == rehearsal["pages"]
            && set["bytes"] == rehearsal["bytes"],
        "{set} after {created}"
    );
    // The original went on all the time, and the copy begins where the snapshot was taken.
    ensure!(rekindle.state_of("original")? == "running");
    all_over(rekindle, "copy", "")?;
    let pager = rekindle.tells("inspect copy")?["pager"].clone();
    ensure!(count(&pager, "replayed")? > 0, "{pager}");
    ensure!(
        count(&pager, "demand")? * 2 < u64::from(SCATTERED),
        "{pager}"
    );
    rekindle.does("rm --force copy")?;

    rekindle.does("snapshot verify base")?;
    let plain = rekindle.tells("snapshot create original --name plain --json")?;
    ensure!(plain["rehearsal"].is_null(), "{plain}");
    let said = rekindle.does("snapshot create original --name told --rehearse=1")?;
    ensure!(
        said.contains("rehearsed for") && said.contains(" pages"),
        "{said}"
    );
    Ok(())
}

fn ends_in_time(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(3)?;
    let create = |name: &str, options: &str| {
        rekindle.tells(&format!(
            "snapshot create original --name {name} --json {options}"
        ))
    };
    let created = create("late", "--rehearse=1 --ready-on never")?;
    ensure!(created["rehearsal"]["ended"] == "time_is_up", "{created}");
    ensure!(
        count(&created["rehearsal"], "ran_us")? >= 1_000_000,
        "{created}"
    );
    ensure!(count(&created["rehearsal"], "pages")? > 0, "{created}");
    nothing_left(rekindle)?;
    // Only what the copy prints counts, not what the original printed before.
    let line = "snapshot create original --name early --json --rehearse=1 --ready-on";
    let words = line.split_whitespace().chain(["n=2\n"]);
    let created = finish(rekindle.command_of(words), line)?.json()?;
    ensure!(created["rehearsal"]["ended"] == "time_is_up", "{created}");
    // A paused VM's copy runs all the same.
    rekindle.does("pause original")?;
    let created = create("paused", "--rehearse --ready-on n=")?;
    ensure!(created["rehearsal"]["ended"] == "ready", "{created}");
    ensure!(rekindle.state_of("original")? == "paused");
    nothing_left(rekindle)
}

/// The network namespace of a process.
fn network(pid: i32) -> anyhow::Result<PathBuf> {
    Ok(fs::read_link(format!("/proc/{pid}/ns/net"))?)
}

/// The names and numbers of all links whose names begin so, as the kernel gives them.
fn links(prefix: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut links = Vec::new();
    for link in fs::read_dir("/sys/class/net")? {
        let link = link?;
        let name = link.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            links.push((name, fs::read_to_string(link.path().join("ifindex"))?));
        }
    }
    links.sort();
    Ok(links)
}

fn cut_off(rekindle: &Rekindle) -> anyhow::Result<()> {
    requires_root()?;
    let taps = Taps::make("rk-reh", 2)?;
    let before = links("rk-reh")?;
    ensure!(before.len() == 2, "{before:?}");
    let guest = rekindle.guest(&scatter())?;
    let (first, second) = (taps.name(0), taps.name(1));
    // The original keeps both: a copy on the host's network could not have them.
    rekindle.does(&format!(
        "run {guest} --name original --detach --tap {first} --tap {second}"
    ))?;
    rekindle.follows("original")?.hears(".")?;

    // Refused before anything is done.
    let said = without(rekindle, "net_admin", "snapshot create original --rehearse")?.refused(1)?;
    ensure!(
        said.contains("run as root") && said.contains("network"),
        "{said}"
    );
    ensure!(rekindle.tells("snapshot ls --json")? == serde_json::json!([]));

    let rehearsing = Rehearsing::begin(rekindle, 5)?;
    let own = network(i32::try_from(std::process::id())?)?;
    for (role, process) in processes(rekindle)? {
        let is_apart = network(process.pid())? != own;
        ensure!(
            is_apart == (role == Role::Firecracker),
            "{role:?} is apart: {is_apart}"
        );
        if is_apart {
            let links = fs::read_to_string(format!("/proc/{}/net/dev", process.pid()))?;
            ensure!(links.contains(first) && links.contains(second), "{links}");
            ensure!(!links.contains("eth0"), "{links}");
        }
    }
    ensure!(links("rk-reh")? == before, "the host's links changed");
    let created = rehearsing.ends()?.json()?;
    ensure!(count(&created["rehearsal"], "pages")? > 0, "{created}");
    nothing_left(rekindle)?;
    ensure!(links("rk-reh")? == before, "the host's links changed");

    rekindle.does("rm --force original")?;
    rekindle.does("restore base --name copy")?;
    rekindle.follows("copy")?.hears("..")?;
    let pager = rekindle.tells("inspect copy")?["pager"].clone();
    ensure!(count(&pager, "replayed")? > 0, "{pager}");
    rekindle.does("rm --force copy")?;
    taps.remove()
}

/// A command of the program that has not this capability.
fn without(rekindle: &Rekindle, capability: &str, line: &str) -> anyhow::Result<Said> {
    let mut command = rekindle.other("setpriv");
    command
        .arg("--bounding-set")
        .arg(format!("-{capability}"))
        .arg(rekindle.program())
        .args(line.split_whitespace());
    finish(command, line)
}

fn not_begun(rekindle: &Rekindle) -> anyhow::Result<()> {
    for options in [
        "--rehearse=0",
        "--rehearse=11",
        "--rehearse=soon",
        "--ready-on x",
        "--rehearse --ready-on=",
    ] {
        let line = format!("snapshot create original {options}");
        rekindle.tries(&line)?.refused(2)?;
    }
    rekindle.refuses("snapshot create nobody --rehearse")?;
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(3)?;
    rekindle.does("stop original --grace 0")?;
    rekindle.refuses("snapshot create original --rehearse")?;
    ensure!(rekindle.tells("snapshot ls --json")? == serde_json::json!([]));
    nothing_left(rekindle)
}

fn stopped(rekindle: &Rekindle) -> anyhow::Result<()> {
    boots(rekindle)?;
    let rehearsing = Rehearsing::begin(rekindle, 10)?;
    let name = place_name(rekindle)?;
    for line in [format!("pause {name}"), format!("snapshot create {name}")] {
        let said = rekindle.refuses(&line)?;
        ensure!(said.contains("can only be stopped"), "{said}");
    }
    ensure!(rekindle.tells(&format!("inspect {name}"))?["purpose"] == "rehearsal");
    let listed = rekindle.does("ps")?;
    ensure!(listed.contains("rehearsal of"), "{listed}");
    rekindle.does(&format!("stop {name}"))?;
    let said = rehearsing.ends()?.refused(1)?;
    ensure!(
        said.contains("is taken, but could not be rehearsed") && said.contains("was stopped"),
        "{said}"
    );
    nothing_left(rekindle)?;
    rekindle.does("snapshot verify base")?;
    rekindle.does("snapshot rm base")?;

    let rehearsing = Rehearsing::begin(rekindle, 10)?;
    rekindle.does(&format!("rm --force {}", place_name(rekindle)?))?;
    rehearsing.ends()?.refused(1)?;
    nothing_left(rekindle)
}

fn place_name(rekindle: &Rekindle) -> anyhow::Result<String> {
    let place = places(rekindle)?.pop().context("there is a rehearsal")?;
    let name = place.file_name().context("it has a name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Who is killed, and whether the command that was typed can be told that all went well.
const VICTIMS: [(&[Role], Outcome); 6] = [
    (&[Role::Keeper], Outcome::Done),
    // Its successor begins anew.
    (&[Role::Monitor], Outcome::Done),
    (&[Role::Firecracker], Outcome::Failed),
    (&[Role::Pager], Outcome::Either),
    (&[Role::Keeper, Role::Monitor], Outcome::Failed),
    (
        &[Role::Keeper, Role::Monitor, Role::Firecracker, Role::Pager],
        Outcome::Failed,
    ),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed,
    Either,
}

fn killed(rekindle: &Rekindle) -> anyhow::Result<()> {
    boots(rekindle)?;
    for (victims, outcome) in VICTIMS {
        let rehearsing = Rehearsing::begin(rekindle, 3)?;
        for (role, process) in processes(rekindle)? {
            if victims.contains(&role) {
                process.kill(SOON)?;
            }
        }
        let said = rehearsing.ends()?;
        ensure!(
            outcome == Outcome::Either || (said.status == Some(0)) == (outcome == Outcome::Done),
            "{victims:?} killed: {said:?}"
        );
        if said.status != Some(0) {
            let said = said.refused(1)?;
            ensure!(said.contains("could not be rehearsed"), "{said}");
        }
        // The next command clears away what nobody was left to. A monitor without its keeper may still be at that.
        rekindle.does("ps")?;
        until("its processes are gone", || {
            Ok(processes(rekindle)?.is_empty())
        })?;
        nothing_left(rekindle).with_context(|| format!("{victims:?} killed"))?;
        rekindle.does("snapshot verify base")?;
        rekindle.does("snapshot rm base")?;
    }

    // The verb is not missed: the copy ends by itself, and what it touched is known.
    let mut rehearsing = Rehearsing::begin(rekindle, 3)?;
    rehearsing.verb.kill()?;
    rehearsing.verb.wait()?;
    until("the copy is gone", || Ok(places(rekindle)?.is_empty()))?;
    until("its processes are gone", || {
        Ok(processes(rekindle)?.is_empty())
    })?;
    let set = working_set(rekindle)?;
    ensure!(set["runs"] == 1, "{set}");
    nothing_left(rekindle)
}

/// What appears in a rehearsal's directory, in about this order, and how long after that all is killed.
const STEPS: [(&str, u64); 12] = [
    ("", 0),
    ("job.json", 0),
    ("monitor.log", 0),
    ("lock", 0),
    ("monitor.json", 0),
    ("record.json", 0),
    ("uffd.sock", 0),
    ("api.sock", 0),
    ("pager.state", 0),
    ("pager.state", 100),
    // The last are about when its second is over.
    ("pager.state", 950),
    ("pager.state", 1000),
];

fn each_step(rekindle: &Rekindle) -> anyhow::Result<()> {
    boots(rekindle)?;
    for (step, delay) in STEPS {
        let line = "snapshot create original --name base --rehearse=1";
        let mut verb = rekindle.command(line);
        let mut verb = verb.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        until("the step is reached", || {
            let places = places(rekindle)?;
            Ok(places.iter().any(|place| place.join(step).exists()) || verb.try_wait()?.is_some())
        })?;
        std::thread::sleep(Duration::from_millis(delay));
        for (_, process) in processes(rekindle)? {
            // It may have ended by itself, or become another program.
            let killed = process.kill(SOON);
            // The verb is this process's child: one that has just ended is there until it is asked for.
            let is_verb = i64::from(process.pid()) == i64::from(verb.id());
            if let Err(e) = killed
                && is_verb
            {
                ensure!(verb.try_wait()?.is_some(), "the verb lives: {e:#}");
            }
        }
        let said = Said::of(verb, line.to_owned())?;
        ensure!(matches!(said.status, Some(0 | 1)), "{step:?}: {said:?}");
        rekindle.does("ps")?;
        // A monitor that was just being started may have lived, and rehearses to the end.
        until("the copy is gone", || Ok(places(rekindle)?.is_empty()))?;
        until("its processes are gone", || {
            Ok(processes(rekindle)?.is_empty())
        })?;
        nothing_left(rekindle).with_context(|| format!("killed at {step:?} and {delay} ms"))?;
        rekindle.does("snapshot verify base")?;
        rekindle.does("snapshot rm base")?;
    }
    Ok(())
}

async fn the_library() -> anyhow::Result<()> {
    let rekindle = Rekindle::new()?;
    base(&rekindle)?;
    let programs = Programs {
        firecracker: rekindle.firecracker().to_owned(),
        rekindle: rekindle.program().to_owned(),
    };
    let engine = Engine::new(Root::open(rekindle.state())?, programs);
    let snapshot = engine.snapshot("base")?;

    let given_up = engine.rehearse(&snapshot, RehearseConfig::new());
    let given_up = tokio::time::timeout(Duration::from_millis(500), given_up).await;
    ensure!(given_up.is_err(), "{given_up:?}");
    nothing_left(&rekindle)?;

    let config = RehearseConfig::new().ready_on("..");
    let rehearsed = engine.rehearse(&snapshot, config).await?;
    ensure!(rehearsed.ended == Ending::Ready, "{rehearsed:?}");
    ensure!(rehearsed.pages >= u64::from(SCATTERED), "{rehearsed:?}");
    nothing_left(&rekindle)?;

    // One that nobody can write down is an error, as that is all that it was for.
    let path = snapshot.working_set_path();
    fs::remove_file(&path)?;
    fs::create_dir(&path)?;
    let config = RehearseConfig::new().limit(Duration::from_secs(1));
    let unrecorded = engine.rehearse(&snapshot, config).await;
    ensure!(unrecorded.is_err(), "{unrecorded:?}");
    nothing_left(&rekindle)?;
    fs::remove_dir(&path)?;
    let told: Value = working_set(&rekindle)?;
    ensure!(told.is_null(), "{told}");
    drop(snapshot);
    rekindle.leaves_nothing()
}
