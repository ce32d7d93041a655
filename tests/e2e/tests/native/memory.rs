//! A guest fills its memory with a pattern: each copy, however it comes in, finds every page right.

use std::fs;

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::story::Story;
use serde_json::Value;

use crate::bare::{PATTERN_PAGES, ZERO_PAGES, large_pattern, pattern};
use crate::story;

const BACKENDS: [&str; 2] = ["uffd", "file"];

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("every page of a copy is right", every_page),
        story("every page is right on top of diffs", on_top_of_diffs),
        story("a copy of a copy is right", a_copy_of_a_copy),
        story("a diff of a copy is right", a_diff_of_a_copy),
        story("the page server says what it did", the_page_server),
    ]
}

/// Boots the pattern guest, and waits until it has checked its memory a few times.
pub(crate) fn filled(rekindle: &Rekindle, name: &str) -> anyhow::Result<()> {
    rekindle.boots(name, &pattern())?;
    goes_on(rekindle, name)
}

/// The guest checks its memory twice more, and changes an eighth of it, and finds no wrong page.
pub(crate) fn goes_on(rekindle: &Rekindle, name: &str) -> anyhow::Result<()> {
    let mut guest = rekindle.follows(name)?;
    let seen = rekindle.output(name)?;
    let mut heard = String::new();
    while heard.len() <= seen.len() {
        heard += &guest.hears("g")?;
    }
    heard += &guest.hears("v")?;
    heard += &guest.hears("v")?;
    ensure!(!heard.contains('X'), "{name} found a wrong page: {heard}");
    Ok(())
}

/// A copy of a snapshot by each backend, each of which finds every page right.
pub(crate) fn copies_are_right(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<()> {
    for backend in BACKENDS {
        let name = format!("{snapshot}-{backend}");
        rekindle.does(&format!(
            "restore {snapshot} --name {name} --backend {backend}"
        ))?;
        goes_on(rekindle, &name)?;
        rekindle.does(&format!("rm --force {name}"))?;
    }
    Ok(())
}

fn every_page(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("original", &large_pattern())?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("stop original --grace 0")?;
    rekindle.does("snapshot verify base")?;
    copies_are_right(rekindle, "base")?;
    rekindle.does("restore base --name checked --verify")?;
    goes_on(rekindle, "checked")
}

fn on_top_of_diffs(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name latest --diff")?;
    rekindle.does("rm --force original")?;

    let base = manifest(rekindle, "base")?;
    let later = manifest(rekindle, "later")?;
    ensure!(base["kind"] == "full" && later["kind"] == "diff");
    ensure!(later["parent"] == base["id"]);
    ensure!(manifest(rekindle, "latest")?["parent"] == later["id"]);
    let (whole, part) = (on_disk(rekindle, "base")?, on_disk(rekindle, "later")?);
    ensure!(part < whole, "the diff takes {part} bytes of {whole}");

    for snapshot in ["base", "later", "latest"] {
        copies_are_right(rekindle, snapshot)?;
    }
    let said = rekindle.refuses("snapshot rm later")?;
    ensure!(
        said.contains("latest") || said.contains(text(&manifest(rekindle, "latest")?, "id")?),
        "{said}"
    );
    rekindle.does("snapshot verify latest")?;
    flattened(rekindle)
}

/// A Full snapshot with the bytes of the whole chain goes on without it.
fn flattened(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.does("snapshot flatten latest --name flat")?;
    rekindle.refuses("snapshot flatten flat")?;
    rekindle.does("snapshot rm latest later base")?;
    ensure!(manifest(rekindle, "flat")?["kind"] == "full");
    rekindle.does("snapshot verify flat")?;
    copies_are_right(rekindle, "flat")
}

fn a_copy_of_a_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    for backend in BACKENDS {
        let (copy, second) = (format!("copy-{backend}"), format!("second-{backend}"));
        rekindle.does(&format!("restore base --name {copy} --backend {backend}"))?;
        goes_on(rekindle, &copy)?;
        rekindle.does(&format!("snapshot create {copy} --name {second}"))?;
        rekindle.does(&format!("rm --force {copy}"))?;
        ensure!(manifest(rekindle, &second)?["kind"] == "full");
        copies_are_right(rekindle, &second)?;
    }
    // A copy of which no page was touched yet has them all the same.
    rekindle.does("restore base --name still --paused")?;
    rekindle.does("snapshot create still --name untouched")?;
    rekindle.does("rm --force still")?;
    copies_are_right(rekindle, "untouched")
}

fn a_diff_of_a_copy(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    for backend in BACKENDS {
        let (copy, diff) = (format!("copy-{backend}"), format!("diff-{backend}"));
        rekindle.does(&format!(
            "restore base --name {copy} --backend {backend} --track-dirty-pages"
        ))?;
        goes_on(rekindle, &copy)?;
        rekindle.does(&format!("snapshot create {copy} --name {diff} --diff"))?;
        rekindle.does(&format!("rm --force {copy}"))?;
        let manifest = manifest(rekindle, &diff)?;
        ensure!(manifest["kind"] == "diff", "{manifest}");
        copies_are_right(rekindle, &diff)?;
    }
    rekindle.does("restore base --name untracked")?;
    let said = rekindle.refuses("snapshot create untracked --diff")?;
    ensure!(said.contains("--track-dirty-pages"), "{said}");
    ensure!(rekindle.state_of("untracked")? == "running");
    Ok(())
}

fn the_page_server(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    rekindle.does("rm --force original")?;
    rekindle.does("restore base --name copy")?;
    goes_on(rekindle, "copy")?;
    rekindle.does("stop copy --grace 0")?;

    let stats: Value = serde_json::from_slice(&fs::read(rekindle.vm("copy").join("pager.json"))?)?;
    let count = |name: &str| {
        stats[name]
            .as_u64()
            .with_context(|| format!("{name} in {stats}"))
    };
    ensure!(count("memory_bytes")? == pattern().memory().bytes());
    ensure!(count("page_size")? == 4096);
    ensure!(count("copied")? >= PATTERN_PAGES, "{stats}");
    ensure!(count("bytes")? == 4096 * count("copied")?, "{stats}");
    ensure!(count("zeroed")? >= ZERO_PAGES, "{stats}");
    ensure!(count("faults")? >= count("copied")?.min(1), "{stats}");
    let latency = &stats["latency"];
    let (p50, p99) = (latency["p50_ns"].as_u64(), latency["p99_ns"].as_u64());
    ensure!(p50 > Some(0) && p50 <= p99, "{stats}");
    ensure!(stats["ended"]["how"] == "vm_exited", "{stats}");
    Ok(())
}

fn manifest(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<Value> {
    rekindle.tells(&format!("snapshot inspect {snapshot}"))
}

fn text<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a str> {
    value[field]
        .as_str()
        .with_context(|| format!("{field} in {value}"))
}

fn on_disk(rekindle: &Rekindle, snapshot: &str) -> anyhow::Result<u64> {
    let listed = rekindle.tells("snapshot ls --json")?;
    let mut rows = listed.as_array().context("a list")?.iter();
    let row = rows
        .find(|row| row["name"] == snapshot)
        .context("it is listed")?;
    row["bytes_on_disk"].as_u64().context("its size")
}
