//! Copies of a snapshot that stays in an object store: they run at once, and every page that a guest sees is right.
//!
//! `REKINDLE_REMOTE_RESTORES` says how many restores over a bad line there are; `REKINDLE_SEED` repeats a run.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rekindle_e2e::s3::{Fault, Line, S3, SECRET};
use rekindle_e2e::{Rekindle, Role, finish, until};
use rekindle_kit::dice::setting;
use rekindle_kit::guest::Guest;
use rekindle_kit::story::Story;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bare::{large_pattern, pattern};
use crate::buckets::{LATENCY, lineage, tries};
use crate::memory::{copies_are_right, goes_on};
use crate::story;

/// How many restores over a bad line there are unless `REKINDLE_REMOTE_RESTORES` says otherwise.
const RESTORES: u64 = 10;
/// How long one of them may take, one way or the other.
const LONGEST: Duration = Duration::from_secs(90);

pub(crate) fn stories() -> Vec<Story> {
    let many = Duration::from_secs(60)
        + Duration::from_secs(20) * u32::try_from(restores()).unwrap_or(u32::MAX);
    vec![
        story(
            "a copy runs from an object store, and the next one fetches nothing",
            by_url,
        ),
        story("a copy runs from an object store behind TLS", behind_tls),
        story(
            "what a copy from an object store touched is there for the next one",
            learns,
        ),
        story(
            "credentials are with who fetches, and with nobody who serves a guest otherwise",
            credentials,
        ),
        story(
            "a copy from an object store is the base of a diff only where its parent is",
            a_diff_of_it,
        ),
        story(
            "all of a snapshot is fetched if that is asked for",
            all_of_it,
        ),
        story(
            "a page server that dies while it fetches is replaced",
            killed_while_it_fetches,
        ),
        story(
            "a store that is gone for good, or damaged, ends the VM with the reason",
            gone_for_good,
        ),
        story(
            "restores over a bad line are right or say why not, and none hangs",
            over_a_bad_line,
        )
        .within(many),
    ]
}

fn restores() -> u64 {
    setting("REKINDLE_REMOTE_RESTORES", RESTORES)
}

/// A snapshot called `base`, of which no copy ran yet.
fn based(rekindle: &Rekindle, guest: &Guest) -> anyhow::Result<()> {
    rekindle.boots("original", guest)?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original").map(drop)
}

/// One in a store, and its URL.
fn pushed(rekindle: &Rekindle, line: Line, guest: &Guest) -> anyhow::Result<(S3, String)> {
    based(rekindle, guest)?;
    push(rekindle, line, "base")
}

fn push(rekindle: &Rekindle, line: Line, name: &str) -> anyhow::Result<(S3, String)> {
    push_to(rekindle, S3::start(&rekindle.file("s3"), line)?, name)
}

fn push_to(rekindle: &Rekindle, s3: S3, name: &str) -> anyhow::Result<(S3, String)> {
    let place = s3.url("a/prefix");
    tries(rekindle, &s3, &format!("snapshot push {name} {place}"))?.done()?;
    Ok((s3, format!("{place}/{name}")))
}

fn learn(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<()> {
    rekindle.does(&format!("restore {snapshot} --name teacher"))?;
    goes_on(rekindle, "teacher")?;
    rekindle.does("rm --force teacher").map(drop)
}

fn fetched(rekindle: &Rekindle, vm: &str) -> anyhow::Result<u64> {
    let told = rekindle.tells(&format!("inspect {vm}"))?;
    let bytes = told["pager"]["fetched_bytes"].as_u64();
    bytes.with_context(|| format!("no fetched_bytes: {told}"))
}

/// Why a VM failed, if it has.
fn failed(rekindle: &Rekindle, vm: &str) -> anyhow::Result<Option<String>> {
    let text = fs::read(rekindle.vm(vm).join("record.json"))?;
    let record: Value = serde_json::from_slice(&text)?;
    let failed = record["state"] == "failed";
    Ok(failed.then(|| record["why"].to_string()))
}

/// No file under a directory has the secret in it, nor any process in its command line.
fn no_secret(rekindle: &Rekindle) -> anyhow::Result<()> {
    fn look(dir: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                look(&entry.path())?;
            } else if kind.is_file() && entry.metadata()?.len() < 1 << 20 {
                let text = fs::read(entry.path())?;
                let found = text.windows(SECRET.len()).any(|w| w == SECRET.as_bytes());
                ensure!(!found, "{} has the secret", entry.path().display());
            }
        }
        Ok(())
    }
    look(rekindle.state())?;
    for (_, process) in rekindle.processes()? {
        let line = fs::read(format!("/proc/{}/cmdline", process.pid()))?;
        let line = String::from_utf8_lossy(&line).into_owned();
        ensure!(!line.contains(SECRET), "{line}");
    }
    Ok(())
}

/// All its threads, also those that fetch: no capability but CAP_KILL, of root, and filters of system calls.
fn is_confined(pager: i32) -> anyhow::Result<()> {
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pager}/task"))?
        .flatten()
        .collect();
    ensure!(threads.len() > 1, "nothing fetches");
    for thread in threads {
        let status = fs::read_to_string(thread.path().join("status"))?;
        let has = |line: &str| status.lines().any(|other| other == line);
        let capabilities = ["CapEff:\t0000000000000020", "CapEff:\t0000000000000000"];
        let confined = capabilities.into_iter().any(has) && has("Seccomp:\t2");
        ensure!(confined && has("NoNewPrivs:\t1"), "{status}");
    }
    Ok(())
}

fn by_url(rekindle: &Rekindle) -> anyhow::Result<()> {
    lineage(rekindle)?;
    learn(rekindle, "later")?;
    let (s3, url) = push(rekindle, Line::of(LATENCY), "later")?;
    let elsewhere = Rekindle::new()?;
    let restore = |name: &str| {
        tries(
            &elsewhere,
            &s3,
            &format!("restore {url} --name {name} --json"),
        )?
        .json()
    };
    let one = restore("one")?;
    ensure!(
        one[0]["origin"]["restore"]["from"]
            .as_str()
            .is_some_and(|from| from.starts_with("s3://")),
        "{one}"
    );
    goes_on(&elsewhere, "one")?;
    no_secret(&elsewhere)?;
    is_confined(elsewhere.one(Role::Pager)?.pid())?;
    let told = elsewhere.tells("inspect one")?;
    ensure!(
        told["pager"]["fetched_bytes"].as_u64() > Some(0)
            && told["pager"]["replayed"].as_u64() > Some(0),
        "{told}"
    );
    // Its disk is its own, and whole.
    let disks: Vec<_> =
        fs::read_dir(elsewhere.vm("one").join("disks"))?.collect::<Result<_, _>>()?;
    ensure!(disks.len() == 1, "{disks:?}");
    ensure!(fs::read(disks[0].path())? == fs::read(rekindle.file("noise"))?);

    let before = (s3.line().packs_read(), s3.line().requests());
    restore("two")?;
    goes_on(&elsewhere, "two")?;
    ensure!(fetched(&elsewhere, "two")? == 0);
    let after = (s3.line().packs_read(), s3.line().requests());
    // What its name leads to is asked for.
    ensure!(
        after.0 == before.0 && after.1 <= before.1 + 1,
        "{before:?} {after:?}"
    );

    for (option, said) in [
        ("--backend file", "snapshot pull s3://"),
        ("--verify", "snapshot pull s3://"),
    ] {
        let refused = tries(&elsewhere, &s3, &format!("restore {url} {option}"))?.refused(1)?;
        ensure!(refused.contains(said), "{refused}");
    }
    let refused = tries(&elsewhere, &s3, &format!("restore {}x", url))?.refused(1)?;
    ensure!(
        refused.contains("there is no snapshot laterx in s3://"),
        "{refused}"
    );
    elsewhere.does("rm --force one two")?;
    elsewhere.leaves_nothing()
}

fn learns(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(LATENCY), &pattern())?;
    let elsewhere = Rekindle::new()?;
    let replayed = |name: &str, options: &str| -> anyhow::Result<u64> {
        let line = format!("restore {url} --name {name} {options}");
        tries(&elsewhere, &s3, &line)?.done()?;
        goes_on(&elsewhere, name)?;
        let told = elsewhere.tells(&format!("inspect {name}"))?;
        // The last words of its page server are what it recorded.
        elsewhere.does(&format!("stop {name} --grace 0"))?;
        told["pager"]["replayed"].as_u64().context("a count")
    };
    ensure!(replayed("silent", "--no-record")? == 0);
    ensure!(replayed("first", "")? == 0, "nobody had touched anything");
    ensure!(replayed("second", "")? > 1000);
    // One that is damaged is none.
    let set = fs::read_dir(elsewhere.state().join("cache"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().contains("/set-"))
        .context("a set")?;
    fs::write(&set, "no set")?;
    ensure!(replayed("third", "")? == 0);
    ensure!(replayed("fourth", "")? > 1000);
    elsewhere.leaves_nothing()
}

/// The environment of a process.
fn environment(pid: &Value) -> anyhow::Result<String> {
    let pid = pid["pid"].as_u64().context("a pid")?;
    let environment = fs::read(format!("/proc/{pid}/environ"))?;
    Ok(String::from_utf8_lossy(&environment).into_owned())
}

/// A page server reads certificates when it is confined already.
fn behind_tls(rekindle: &Rekindle) -> anyhow::Result<()> {
    based(rekindle, &pattern())?;
    let s3 = S3::start_with_tls(&rekindle.file("s3"), Line::of(LATENCY))?;
    let (s3, url) = push_to(rekindle, s3, "base")?;
    let elsewhere = Rekindle::new()?;
    for line in [
        format!("restore {url} --name jailed"),
        format!("restore {url} --no-jail --name free"),
    ] {
        tries(&elsewhere, &s3, &line)?.done()?;
    }
    for name in ["jailed", "free"] {
        goes_on(&elsewhere, name)?;
        ensure!(failed(&elsewhere, name)?.is_none());
    }
    ensure!(fetched(&elsewhere, "jailed")? > 0);
    elsewhere.does("rm --force jailed free")?;
    // Who does not believe the certificate gets nothing, and is told so at once.
    let another = S3::start_with_tls(&rekindle.file("another"), Line::of(LATENCY))?;
    let trusted = another.certificate().context("it has one")?;
    let line = format!("restore {url} --name stranger");
    let mut command = elsewhere.command(&line);
    s3.known_to(&mut command)
        .env("SSL_CERT_FILE", trusted)
        .env_remove("SSL_CERT_DIR");
    let begun = Instant::now();
    let said = finish(command, &line)?.refused(1)?;
    ensure!(said.contains("certificate"), "{said}");
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "it took {:?}",
        begun.elapsed()
    );
    elsewhere.leaves_nothing()
}

fn credentials(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(Duration::ZERO), &pattern())?;
    let starts = |line: &str| {
        let mut command = rekindle.command(line);
        s3.known_to(&mut command)
            .env("AZURE_STORAGE_ACCOUNT_KEY", SECRET)
            .env("GOOGLE_SERVICE_ACCOUNT_KEY", SECRET);
        finish(command, line)?.done()
    };
    let guest = rekindle.guest(&pattern())?;
    let lines = [
        format!("run {guest} --detach --name booted"),
        "restore base --no-jail --name near".to_owned(),
        format!("restore {url} --no-jail --name far"),
        // As root, in a jail.
        format!("restore {url} --name jailed"),
    ];
    for line in lines {
        starts(&line)?;
        let name = line.rsplit(' ').next().context("a name")?;
        goes_on(rekindle, name)?;
        let told = rekindle.tells(&format!("inspect {name}"))?;
        let firecracker = environment(&told["firecracker"])?;
        ensure!(firecracker.is_empty(), "{line}: {firecracker}");
        if told["pager"].is_null() {
            continue;
        }
        // A successor has what the first one had.
        for _ in 0..2 {
            let pager = rekindle.tells(&format!("inspect {name}"))?["pager"].clone();
            let environment = environment(&pager)?;
            let fetches = line.contains("s3://");
            ensure!(environment.contains(SECRET) == fetches, "{line}");
            ensure!(fetches || environment.is_empty(), "{line}: {environment}");
            let pid = i32::try_from(pager["pid"].as_i64().context("a pid")?)?;
            kill_process(Pid::from_raw(pid).context("a pid")?, Signal::KILL)?;
            until("another one serves", || {
                let now = rekindle.tells(&format!("inspect {name}"))?;
                Ok(now["pager"]["pid"].is_u64() && now["pager"]["pid"] != pager["pid"])
            })?;
        }
        goes_on(rekindle, name)?;
        rekindle.does(&format!("rm --force {name}"))?;
    }
    rekindle.does("rm --force booted").map(drop)
}

fn a_diff_of_it(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(LATENCY), &pattern())?;
    let elsewhere = Rekindle::new()?;
    tries(
        &elsewhere,
        &s3,
        &format!("restore {url} --name copy --track-dirty-pages"),
    )?
    .done()?;
    goes_on(&elsewhere, "copy")?;
    let refused = elsewhere.refuses("snapshot create copy --name diff --diff")?;
    ensure!(
        refused.contains("rekindle snapshot pull s3://"),
        "{refused}"
    );
    goes_on(&elsewhere, "copy")?;
    tries(&elsewhere, &s3, &format!("snapshot pull {url}"))?.done()?;
    elsewhere.does("snapshot create copy --name diff --diff")?;
    goes_on(&elsewhere, "copy")?;
    elsewhere.does("snapshot verify diff")?;
    copies_are_right(&elsewhere, "diff")?;
    // All of it is read for this one.
    elsewhere.does("snapshot create copy --name full")?;
    elsewhere.does("rm --force copy")?;
    copies_are_right(&elsewhere, "full")?;
    elsewhere.leaves_nothing()
}

fn all_of_it(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(LATENCY), &large_pattern())?;
    let packs = fs::read_dir(s3.file("a/prefix/packs"))?;
    let packs: Vec<u64> = packs
        .map(|pack| Ok(pack?.metadata()?.len()))
        .collect::<anyhow::Result<_>>()?;
    let all: u64 = packs.iter().sum();
    let elsewhere = Rekindle::new()?;
    // A guest that stands still asks for nothing.
    tries(
        &elsewhere,
        &s3,
        &format!("restore {url} --name copy --paused --prefetch all"),
    )?
    .done()?;
    until("all is fetched", || Ok(s3.line().packs_read() >= all))?;
    s3.line().goes_wrong(100, &[Fault::Internal]);
    elsewhere.does("resume copy")?;
    goes_on(&elsewhere, "copy")?;
    elsewhere.does("rm --force copy")?;
    elsewhere.leaves_nothing()
}

fn killed_while_it_fetches(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(4 * LATENCY), &pattern())?;
    let elsewhere = Rekindle::new()?;
    tries(&elsewhere, &s3, &format!("restore {url} --name copy"))?.done()?;
    for _ in 0..3 {
        let before = s3.line().packs_read();
        until("it fetches", || Ok(s3.line().packs_read() > before))?;
        let pager = elsewhere.one(Role::Pager)?;
        let pid = Pid::from_raw(pager.pid()).context("a pid")?;
        kill_process(pid, Signal::KILL)?;
        until("another one serves", || {
            let told = elsewhere.tells("inspect copy")?;
            Ok(told["pager"]["takeovers"].as_u64() > Some(0)
                && elsewhere
                    .one(Role::Pager)
                    .is_ok_and(|now| now.pid() != pager.pid()))
        })?;
    }
    goes_on(&elsewhere, "copy")?;
    elsewhere.does("rm --force copy")?;
    elsewhere.leaves_nothing()
}

fn gone_for_good(rekindle: &Rekindle) -> anyhow::Result<()> {
    let (s3, url) = pushed(rekindle, Line::of(LATENCY), &large_pattern())?;
    let elsewhere = Rekindle::new()?;
    let restore = |name: &str| {
        tries(
            &elsewhere,
            &s3,
            &format!("restore {url} --name {name} --patience 3s --paused"),
        )?
        .done()
    };
    let ends_with = |name: &str, why: &str| -> anyhow::Result<()> {
        elsewhere.does(&format!("resume {name}"))?;
        until("the VM has failed", || {
            Ok(failed(&elsewhere, name)?.is_some())
        })?;
        let said = failed(&elsewhere, name)?.unwrap_or_default();
        ensure!(
            said.contains("cannot be fetched") && said.contains(why) && !said.contains(SECRET),
            "{said}"
        );
        ensure!(!elsewhere.output(name)?.contains('X'));
        elsewhere.does(&format!("rm --force {name}"))?;
        let _ = fs::remove_dir_all(elsewhere.state().join("cache"));
        Ok(())
    };
    for (name, fault) in [
        ("silent", Fault::Silence),
        ("ill", Fault::Internal),
        ("busy", Fault::Busy),
    ] {
        restore(name)?;
        s3.line().goes_wrong(100, &[fault]);
        ends_with(name, "there was no good answer")?;
        s3.line().goes_wrong(0, &[]);
    }
    restore("damaged")?;
    for pack in fs::read_dir(s3.file("a/prefix/packs"))? {
        let path = pack?.path();
        let bytes: Vec<u8> = fs::read(&path)?.iter().map(|byte| byte ^ 1).collect();
        fs::write(&path, bytes)?;
    }
    ends_with("damaged", "is damaged: the chunk at")?;
    elsewhere.leaves_nothing()
}

fn over_a_bad_line(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &pattern())?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    learn(rekindle, "base")?;
    let (s3, url) = push(rekindle, Line::of(LATENCY), "base")?;
    let seed = s3.line().goes_wrong(20, &Fault::ALL);
    let elsewhere = Rekindle::new()?;
    let (mut right, all) = (0, restores());
    for round in 0..all {
        let told = |what: String| format!("round {round}, REKINDLE_SEED={seed}: {what}");
        let begun = Instant::now();
        let name = format!("copy-{round}");
        let said = tries(
            &elsewhere,
            &s3,
            &format!("restore {url} --name {name} --patience 8s"),
        )?;
        if said.status == Some(0) {
            right += u64::from(
                comes_to_an_end(&elsewhere, &name, begun).with_context(|| told(String::new()))?,
            );
            elsewhere.does(&format!("rm --force {name}"))?;
        } else {
            ensure!(said.err.contains("s3://"), "{}", told(format!("{said:?}")));
        }
        ensure!(
            begun.elapsed() < LONGEST,
            "{}",
            told(format!("{:?}", begun.elapsed()))
        );
        // Nothing of the round before helps.
        let _ = fs::remove_dir_all(elsewhere.state().join("cache"));
        elsewhere.leaves_nothing()?;
    }
    println!("{right} of {all} restores over a bad line were right, the others said why not");
    // One fault in five is what retries are for.
    ensure!(right * 10 >= all * 7, "{right} of {all}, seed {seed}");
    Ok(())
}

/// Whether a guest found all its pages right twice, or else its VM failed because a page could not be fetched.
fn comes_to_an_end(rekindle: &Rekindle, vm: &str, begun: Instant) -> anyhow::Result<bool> {
    while begun.elapsed() < LONGEST {
        let output = rekindle.output(vm)?;
        ensure!(!output.contains('X'), "a page was wrong: {output}");
        if let Some(why) = failed(rekindle, vm)? {
            ensure!(why.contains("cannot be fetched"), "{why}");
            return Ok(false);
        }
        // The first pass was begun before the snapshot.
        if output.matches('v').count() >= 3 {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("{vm} hangs")
}
