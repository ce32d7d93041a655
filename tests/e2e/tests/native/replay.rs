//! A guest touches some thousand pages here and there, again and again: what the first copy asks for, the next one has
//! before it asks.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use rekindle_e2e::{Rekindle, Role, SOON};
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::{SCATTERED, counter, scatter};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a second copy has what the first one asked for",
            the_second_copy,
        ),
        story(
            "a copy without replay asks for everything, and one without record tells nothing",
            neither,
        ),
        story(
            "a working set that is damaged or of another memory is told, passed over and replaced",
            damaged,
        ),
        story(
            "copies that end at once all tell what they touched",
            at_once,
        ),
        story("a working set ends with its snapshot", with_its_snapshot),
    ]
}

/// A snapshot `base` of a guest that has been all over its pages.
pub(crate) fn base(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &scatter())?;
    rekindle.follows("original")?.hears(".")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    Ok(())
}

/// Restores a copy with these options, and waits until it was all over its pages.
pub(crate) fn all_over(rekindle: &Rekindle, name: &str, options: &str) -> anyhow::Result<()> {
    rekindle.does(&format!("restore base --name {name} {options}"))?;
    // The first may be that of a pass that the original began.
    rekindle.follows(name)?.hears("..")?;
    Ok(())
}

/// The same, and what its page server did until its end.
fn a_life(rekindle: &Rekindle, name: &str, options: &str) -> anyhow::Result<Value> {
    all_over(rekindle, name, options)?;
    rekindle.does(&format!("stop {name} --grace 0"))?;
    let path = rekindle.vm(name).join("pager.json");
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// A number of a page server's.
pub(crate) fn count(stats: &Value, name: &str) -> anyhow::Result<u64> {
    stats[name]
        .as_u64()
        .with_context(|| format!("{name} in {stats}"))
}

/// The working set of `base`, as `inspect` tells it.
pub(crate) fn working_set(rekindle: &Rekindle) -> anyhow::Result<Value> {
    Ok(rekindle.tells("inspect base")?["working_set"].clone())
}

/// Where it is.
fn file(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<PathBuf> {
    let id = rekindle.tells(&format!("snapshot inspect {snapshot}"))?["id"].clone();
    let id = id.as_str().context("an id")?;
    Ok(rekindle
        .state()
        .join("snapshots")
        .join(id)
        .join("working-set"))
}

fn the_second_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    ensure!(working_set(rekindle)?.is_null(), "nobody told of one yet");
    let first = a_life(rekindle, "first", "")?;
    let asked = count(&first, "demand")?;
    ensure!(asked >= u64::from(SCATTERED), "{first}");
    ensure!(count(&first, "replayed")? == 0, "{first}");
    let set = working_set(rekindle)?;
    ensure!(set["runs"] == 1, "{set}");
    let pages = count(&set, "pages")?;
    ensure!(
        pages >= u64::from(SCATTERED) && count(&set, "bytes")? == pages * 4096,
        "{set}"
    );

    let second = a_life(rekindle, "second", "")?;
    ensure!(
        count(&second, "replayed")? > pages / 2,
        "{second}, of {set}"
    );
    ensure!(
        count(&second, "demand")? * 2 < asked,
        "{second}, after {first}"
    );
    ensure!(count(&second, "replayed_by_us")? > 0, "{second}");
    // What it was not given, to see whether it still wants it, it asked for.
    let held_back = count(&second, "held_back")?;
    ensure!(
        held_back > 0 && count(&second, "held_back_touched")? == held_back,
        "{second}"
    );
    ensure!(working_set(rekindle)?["runs"] == 2);
    rekindle.does("snapshot verify base")?;
    Ok(())
}

fn neither(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    a_life(rekindle, "silent", "--no-record")?;
    ensure!(!file(rekindle, "base")?.exists(), "it told something");
    a_life(rekindle, "first", "")?;
    let set = fs::read(file(rekindle, "base")?)?;
    let third = a_life(rekindle, "third", "--no-replay --no-record")?;
    ensure!(count(&third, "replayed")? == 0, "{third}");
    ensure!(count(&third, "demand")? >= u64::from(SCATTERED), "{third}");
    ensure!(
        fs::read(file(rekindle, "base")?)? == set,
        "it told something"
    );
    let fourth = a_life(rekindle, "fourth", "--no-record")?;
    ensure!(count(&fourth, "replayed")? > 0, "{fourth}");
    ensure!(
        fs::read(file(rekindle, "base")?)? == set,
        "it told something"
    );
    Ok(())
}

fn damaged(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    // One of another memory, made by a copy of another snapshot.
    rekindle.boots("c", &counter())?;
    rekindle.follows("c")?.counts(3)?;
    rekindle.does("snapshot create c --name small")?;
    rekindle.does("restore small --name copy")?;
    rekindle.follows("copy")?.counts(3)?;
    rekindle.does("rm --force c copy")?;
    let anothers = fs::read(file(rekindle, "small")?)?;

    let mut cut_off = anothers.clone();
    cut_off.truncate(anothers.len() / 2);
    let cases = [
        ("garbage", b"no working set".to_vec()),
        ("empty", Vec::new()),
        ("cut", cut_off),
        ("anothers", anothers),
    ];
    for (name, bytes) in cases {
        let path = file(rekindle, "base")?;
        fs::write(&path, bytes)?;
        let told = working_set(rekindle)?;
        ensure!(name == "anothers" || told["error"].is_string(), "{told}");
        let stats = a_life(rekindle, name, "")?;
        ensure!(count(&stats, "replayed")? == 0, "{name}: {stats}");
        let log = fs::read_to_string(rekindle.vm(name).join("pager.log"))?;
        ensure!(
            log.contains("cannot replay") && log.contains("working-set"),
            "{name}: {log:?}"
        );
        let set = working_set(rekindle)?;
        ensure!(set["runs"] == 1, "{name}: {set}");
        ensure!(
            count(&set, "pages")? >= u64::from(SCATTERED),
            "{name}: {set}"
        );
    }
    let stats = a_life(rekindle, "last", "")?;
    ensure!(count(&stats, "replayed")? > 0, "{stats}");
    Ok(())
}

fn at_once(rekindle: &Rekindle) -> anyhow::Result<()> {
    const COPIES: usize = 4;
    base(rekindle)?;
    rekindle.does(&format!("restore base --name copy --count {COPIES}"))?;
    let names: Vec<String> = (1..=COPIES).map(|n| format!("copy-{n}")).collect();
    for name in &names {
        rekindle.follows(name)?.hears("..")?;
    }
    let killers: Vec<_> = rekindle
        .processes()?
        .into_iter()
        .filter(|(role, _)| *role == Role::Firecracker)
        .map(|(_, process)| std::thread::spawn(move || process.kill(SOON)))
        .collect();
    ensure!(killers.len() == COPIES, "{} copies", killers.len());
    for killer in killers {
        killer.join().expect("it does not panic")?;
    }
    for name in &names {
        // Their page servers are done when this returns.
        rekindle.tries(&format!("wait {name}"))?.refused(1)?;
    }
    let set = working_set(rekindle)?;
    ensure!(set["runs"] == COPIES, "{set}");
    ensure!(count(&set, "pages")? >= u64::from(SCATTERED), "{set}");
    Ok(())
}

/// A page server that still records holds the snapshot, and nothing that it leaves is in the way of its removal.
fn with_its_snapshot(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    all_over(rekindle, "copy", "")?;
    let said = rekindle.refuses("snapshot rm base")?;
    ensure!(said.contains("in use"), "{said}");
    rekindle.does("rm --force copy")?;
    let path = file(rekindle, "base")?;
    ensure!(path.exists());
    rekindle.does("snapshot rm base")?;
    let dir = path.parent().context("it is in the snapshot")?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    Ok(())
}
