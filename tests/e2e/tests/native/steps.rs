//! SIGKILL at each step of what changes snapshots and caches, and two of each at once: what was whole stays whole, and the
//! next one completes.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rekindle_e2e::s3::{Line, S3};
use rekindle_e2e::{Rekindle, Role, SOON, finish, until};
use rekindle_kit::steps::{End, kill_before, kill_running_before};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::{counter, pattern};
use crate::buckets::tries;
use crate::memory::{copies_are_right, goes_on};
use crate::story;

/// More steps than anything has here.
const MANY: u64 = 500;

pub(crate) fn stories() -> Vec<Story> {
    let long = Duration::from_secs(300);
    vec![
        story(
            "a flatten killed at each step is finished by the next",
            flatten,
        )
        .within(long),
        story("a gc killed at each step is finished by the next", gc).within(long),
        story("a push killed at each step goes on", push).within(long),
        story("a pull through a cache killed at each step goes on", pull).within(long),
        story(
            "a page server killed at each step of filling the cache is replaced",
            cache_fill,
        )
        .within(long),
        story("two flattens of one snapshot at once", two_flattens),
        story(
            "gc beside pushes, pulls and copies takes nothing away",
            gc_beside,
        ),
        story(
            "two copies that fill one cache at once are right",
            two_fills,
        ),
    ]
}

/// Runs a command again and again, killed one step below `place` later each time, until it ends by itself, which must be
/// well; tells how many steps it had. `before` and `after` are called around each.
fn each_step(
    place: &Path,
    command: &Command,
    mut before: impl FnMut() -> anyhow::Result<()>,
    mut after: impl FnMut(&End) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    for step in 0..MANY {
        before()?;
        let end = kill_before(command, place, step)?;
        let label = || format!("step {step}: {end:?}");
        after(&end).with_context(label)?;
        if let End::Itself(status) = end {
            ensure!(status == 0, "{}", label());
            return Ok(step);
        }
    }
    anyhow::bail!("more than {MANY} steps");
}

/// The names of the snapshots that are here, all of them whole.
fn names(rekindle: &Rekindle) -> anyhow::Result<Vec<String>> {
    let listed = rekindle.tells("snapshot ls --json")?;
    let rows = listed.as_array().context("a list")?;
    ensure!(rows.iter().all(|row| row["error"].is_null()), "{listed}");
    let names = rows.iter().filter_map(|row| row["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// `base`, and `later`, a Diff of it.
fn chain(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &pattern())?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original").map(drop)
}

fn is_empty(dir: &Path) -> anyhow::Result<bool> {
    Ok(fs::read_dir(dir)?.next().is_none())
}

fn flatten(rekindle: &Rekindle) -> anyhow::Result<()> {
    chain(rekindle)?;
    let command = rekindle.command("snapshot flatten later --name flat");
    let nothing = || Ok(());
    let steps = each_step(rekindle.state(), &command, nothing, |end| {
        let there = names(rekindle)?;
        ensure!(there.iter().any(|name| name == "later"), "{there:?}");
        let made = there.iter().any(|name| name == "flat");
        ensure!(made || matches!(end, End::Killed(_)));
        if made && matches!(end, End::Killed(_)) {
            // It has its place, and only that this is for good was not said yet.
            rekindle.does("snapshot verify flat")?;
            rekindle.does("snapshot rm flat")?;
        }
        Ok(())
    })?;
    ensure!(steps > 15, "{steps} steps");
    println!("{steps} steps");
    for snapshot in ["base", "later", "flat"] {
        rekindle.does(&format!("snapshot verify {snapshot}"))?;
    }
    rekindle.does("gc")?;
    ensure!(is_empty(&rekindle.state().join("tmp"))?);
    rekindle.does("snapshot rm later base")?;
    copies_are_right(rekindle, "flat")
}

/// What dead processes leave: a draft, a name, a VM, an image that nobody needs; and chunks beyond what is allowed.
fn litter(rekindle: &Rekindle) -> anyhow::Result<()> {
    let state = rekindle.state();
    let id = "00000000000000aa";
    let draft = state.join("tmp").join(id);
    fs::create_dir_all(draft.join("disks"))?;
    fs::write(draft.join("memory"), "half")?;
    let name = state.join("names/dangling");
    if name.symlink_metadata().is_err() {
        std::os::unix::fs::symlink(format!("../snapshots/{id}"), name)?;
    }
    let image = format!("images/{}.ext4", "0".repeat(64));
    fs::write(state.join(image), "nobody's")?;
    let cache = state.join("cache");
    fs::create_dir_all(&cache)?;
    for chunk in ["a", "b"] {
        fs::write(cache.join(chunk), vec![1; 1 << 20])?;
    }
    if !rekindle.vm("dead").exists() {
        rekindle.does("restore base --name dead")?;
        // The keeper first: it starts others.
        for (_, process) in rekindle.processes()? {
            let _ = process.kill(SOON);
        }
    }
    Ok(())
}

fn gc(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &counter())?;
    rekindle.follows("original")?.counts(2)?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    let command = rekindle.command("gc --cache 1");
    let before = || litter(rekindle);
    let steps = each_step(rekindle.state(), &command, before, |_| {
        ensure!(names(rekindle)? == ["base"]);
        // A VM that is half gone is not told as one that runs.
        let vms = rekindle.vms()?;
        ensure!(vms.iter().all(|vm| vm["state"] != "running"), "{vms:?}");
        Ok(())
    })?;
    ensure!(steps > 10, "{steps} steps");
    println!("{steps} steps");
    rekindle.does("snapshot verify base")?;
    for place in ["tmp", "vms"] {
        ensure!(is_empty(&rekindle.state().join(place))?, "{place}");
    }
    ensure!(
        rekindle
            .does("gc")?
            .lines()
            .all(|line| line.starts_with("cache"))
    );
    rekindle.does("restore base --name copy")?;
    rekindle.follows("copy")?.counts(3).map(drop)
}

fn push(rekindle: &Rekindle) -> anyhow::Result<()> {
    chain(rekindle)?;
    let (place, elsewhere) = (rekindle.file("place"), Rekindle::new()?);
    let url = format!("file://{}", place.display());
    let command = rekindle.command(&format!("snapshot push later {url}"));
    let nothing = || Ok(());
    let mut seen = [0, 0];
    let steps = each_step(&place, &command, nothing, |_| {
        // What can be seen there is whole: nothing, the base alone, or both.
        for entry in fs::read_dir(place.join("snapshots")).into_iter().flatten() {
            let id = entry?.file_name().to_string_lossy().into_owned();
            elsewhere.does(&format!("snapshot pull {url}/{id}"))?;
            elsewhere.does(&format!("snapshot verify {id}"))?;
            seen[0] += 1;
        }
        if place.join("names/later").exists() {
            elsewhere.does(&format!("snapshot pull {url}/later"))?;
            seen[1] += 1;
        }
        elsewhere.leaves_nothing()
    })?;
    ensure!(
        steps > 10 && seen[0] > seen[1] && seen[1] > 0,
        "{steps} steps, {seen:?}"
    );
    println!("{steps} steps");
    elsewhere.does(&format!("snapshot pull {url}/later"))?;
    copies_are_right(&elsewhere, "later")?;
    elsewhere.leaves_nothing()
}

/// A snapshot called `base` in a store, and its URL.
fn pushed(rekindle: &Rekindle) -> anyhow::Result<(S3, String)> {
    rekindle.boots("original", &pattern())?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(Duration::ZERO))?;
    let place = s3.url("a/prefix");
    tries(rekindle, &s3, &format!("snapshot push base {place}"))?.done()?;
    Ok((s3, format!("{place}/base")))
}

/// Chunks and indexes in the cache; all files are called as the cache calls them.
fn cached(rekindle: &Rekindle) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(rekindle.state().join("cache"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.trim_start_matches('.').starts_with("set-") {
            continue;
        }
        let digest = name.strip_prefix("index-").unwrap_or(&name);
        let is_digest = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        ensure!(is_digest, "{name} is in the cache");
        count += 1;
    }
    Ok(count)
}

fn pull(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle)?;
    let elsewhere = Rekindle::new()?;
    let mut command = elsewhere.command(&format!("snapshot pull {url}"));
    s3.known_to(&mut command);
    let nothing = || Ok(());
    let steps = each_step(elsewhere.state(), &command, nothing, |end| {
        let there = names(&elsewhere)?;
        if there == ["base"] {
            elsewhere.does("snapshot verify base")?;
            if matches!(end, End::Killed(_)) {
                elsewhere.does("snapshot rm base")?;
            }
        } else {
            ensure!(there.is_empty(), "{there:?}");
        }
        Ok(())
    })?;
    ensure!(steps > 20, "{steps} steps");
    println!("{steps} steps");
    ensure!(cached(&elsewhere)? > 0);
    copies_are_right(&elsewhere, "base")?;
    elsewhere.leaves_nothing()
}

fn cache_fill(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle)?;
    let elsewhere = Rekindle::new()?;
    let mut kills = 0;
    for step in 0..12 {
        let _ = fs::remove_dir_all(elsewhere.state().join("cache"));
        let name = format!("copy-{step}");
        let restore = format!("restore {url} --name {name} --paused");
        tries(&elsewhere, &s3, &restore)?.done()?;
        let pager = elsewhere.one(Role::Pager)?;
        let cache = elsewhere.state().join("cache");
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let killer = scope.spawn(|| kill_running_before(pager.pid(), &cache, step));
            until("it is traced", || {
                let status = fs::read_to_string(format!("/proc/{}/status", pager.pid()))?;
                Ok(!status.contains("TracerPid:\t0"))
            })?;
            elsewhere.does(&format!("resume {name}"))?;
            let end = killer.join().expect("it does not panic")?;
            kills += u32::from(matches!(end, End::Killed(_)));
            Ok(())
        })?;
        goes_on(&elsewhere, &name).with_context(|| format!("step {step}"))?;
        cached(&elsewhere)?;
        let told = elsewhere.tells(&format!("inspect {name}"))?;
        ensure!(told["pager"]["takeovers"].as_u64() > Some(0), "{told}");
        elsewhere.does(&format!("rm --force {name}"))?;
    }
    ensure!(kills == 12, "{kills} kills");
    // What they left serves the next one.
    tries(&elsewhere, &s3, &format!("restore {url} --name last"))?.done()?;
    goes_on(&elsewhere, "last")?;
    elsewhere.leaves_nothing()
}

/// Two commands at once.
fn both(one: Command, other: Command) -> anyhow::Result<[rekindle_e2e::Said; 2]> {
    std::thread::scope(|scope| {
        let one = scope.spawn(|| finish(one, "one"));
        let other = finish(other, "other")?;
        Ok([one.join().expect("it does not panic")?, other])
    })
}

fn two_flattens(rekindle: &Rekindle) -> anyhow::Result<()> {
    chain(rekindle)?;
    let flatten = |name: &str| rekindle.command(&format!("snapshot flatten later --name {name}"));
    for said in both(flatten("one"), flatten("other"))? {
        said.done()?;
    }
    let [one, other] =
        ["one", "other"].map(|name| rekindle.tells(&format!("snapshot inspect {name}")));
    let (one, other) = (one?, other?);
    ensure!(
        one["files"] == other["files"] && one["id"] != other["id"],
        "{one} {other}"
    );
    rekindle.does("snapshot rm one other")?;

    // Of one name: one has it, the other one says who does.
    let said = both(flatten("flat"), flatten("flat"))?;
    let done = said.iter().filter(|said| said.status == Some(0)).count();
    ensure!(done == 1, "{said:?}");
    for said in said.into_iter().filter(|said| said.status != Some(0)) {
        let refused = said.refused(1)?;
        ensure!(refused.contains("the name flat"), "{refused}");
    }
    rekindle.does("snapshot verify flat")?;
    copies_are_right(rekindle, "flat")
}

fn gc_beside(rekindle: &Rekindle) -> anyhow::Result<()> {
    chain(rekindle)?;
    let s3 = S3::start(&rekindle.file("s3"), Line::of(Duration::from_millis(2)))?;
    let elsewhere = Rekindle::new()?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let busy = || !stop.load(std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let sweepers = [rekindle, &elsewhere].map(|place| {
            scope.spawn(move || {
                let mut sweeps = 0;
                while busy() {
                    place.does("gc --cache 0")?;
                    sweeps += 1;
                }
                anyhow::Ok(sweeps)
            })
        });
        let told = (0..4).try_for_each(|round| {
            let place = s3.url(&format!("round-{round}"));
            tries(rekindle, &s3, &format!("snapshot push later {place}"))?.done()?;
            let flat = format!("flat-{round}");
            rekindle.does(&format!("snapshot flatten later --name {flat}"))?;
            rekindle.does(&format!("snapshot verify {flat}"))?;
            tries(&elsewhere, &s3, &format!("snapshot pull {place}/later"))?.done()?;
            elsewhere.does("snapshot verify later")?;
            tries(
                &elsewhere,
                &s3,
                &format!("restore {place}/later --name far"),
            )?
            .done()?;
            elsewhere.does("restore later --name near")?;
            goes_on(&elsewhere, "far")?;
            goes_on(&elsewhere, "near")?;
            elsewhere.does("rm --force far near")?;
            let later = elsewhere.tells("snapshot inspect later")?;
            let base = later["parent"].as_str().context("a parent")?;
            elsewhere
                .does(&format!("snapshot rm later {base}"))
                .map(drop)
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for sweeper in sweepers {
            let sweeps = sweeper.join().expect("it does not panic")?;
            ensure!(sweeps > 4, "{sweeps} sweeps");
        }
        told
    })?;
    elsewhere.leaves_nothing()
}

fn two_fills(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle)?;
    let elsewhere = Rekindle::new()?;
    let restore = |name: &str| {
        let mut command = elsewhere.command(&format!("restore {url} --name {name}"));
        s3.known_to(&mut command);
        command
    };
    for round in 0..3 {
        let _ = fs::remove_dir_all(elsewhere.state().join("cache"));
        for said in both(restore("one"), restore("other"))? {
            said.done().with_context(|| format!("round {round}"))?;
        }
        for name in ["one", "other"] {
            goes_on(&elsewhere, name)?;
        }
        ensure!(cached(&elsewhere)? > 0);
        elsewhere.does("rm --force one other")?;
    }
    let fetched = |told: &Value| told["pager"]["fetched_bytes"].as_u64();
    restore("third").status()?;
    goes_on(&elsewhere, "third")?;
    let told = elsewhere.tells("inspect third")?;
    ensure!(fetched(&told) == Some(0), "{told}");
    elsewhere.leaves_nothing()
}
