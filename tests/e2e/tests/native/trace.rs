//! What the page server of a copy did, as `inspect` and `trace` tell it: while the guest runs, and after its end.

use std::fs;

use anyhow::{Context, ensure};
use rekindle_e2e::Rekindle;
use rekindle_kit::story::Story;
use roxmltree::{Document, Node};
use serde_json::Value;

use crate::bare::{SCATTERED, counter};
use crate::replay::{all_over, base, count};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story(
            "a page server can be looked at while it works, and after",
            looked_at,
        ),
        story(
            "a trace draws what was asked for and what was replayed",
            drawn,
        ),
        story("a VM without a page server has no trace", nothing_to_draw),
    ]
}

fn looked_at(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    all_over(rekindle, "copy", "")?;
    let running = rekindle.tells("inspect copy")?;
    ensure!(running["state"] == "running", "{running}");
    let live = &running["pager"];
    // Who it is stands where it always did.
    ensure!(count(live, "pid")? > 0, "{live}");
    ensure!(live["boot_id"].is_string(), "{live}");
    ensure!(count(live, "demand")? >= u64::from(SCATTERED), "{live}");
    ensure!(count(live, "faults")? >= count(live, "demand")?, "{live}");
    ensure!(count(live, "bytes")? > 0, "{live}");
    ensure!(
        count(&live["latency"], "p50_ns")? <= count(&live["latency"], "p99_ns")?
            && count(&live["latency"], "p99_ns")? <= count(&live["latency"], "max_ns")?,
        "{live}"
    );
    ensure!(count(live, "takeovers")? == 0, "{live}");
    ensure!(live["ended"].is_null(), "{live}");
    rekindle.does("stop copy --grace 0")?;
    let over = rekindle.tells("inspect copy")?["pager"].clone();
    ensure!(over["ended"]["how"] == "vm_exited", "{over}");
    ensure!(over["pid"].is_null(), "{over}");
    ensure!(count(&over, "demand")? >= count(live, "demand")?, "{over}");

    all_over(rekindle, "second", "")?;
    let second = rekindle.tells("inspect second")?["pager"].clone();
    ensure!(count(&second, "replayed")? > 0, "{second}");
    // Each page of the sample was asked for, so all the rest is thought to be of use.
    ensure!(count(&second, "wasted")? == 0, "{second}");

    let said = rekindle.refuses("inspect nothing")?;
    ensure!(
        said.contains("no VM") && said.contains("snapshot"),
        "{said}"
    );
    Ok(())
}

fn drawn(rekindle: &Rekindle) -> anyhow::Result<()> {
    base(rekindle)?;
    for (name, layers) in [
        ("first", &["demand"][..]),
        ("second", &["demand", "replayed"]),
    ] {
        all_over(rekindle, name, "")?;
        let picture = rekindle.file("trace.svg");
        let draw = format!("trace {name} --svg {}", picture.display());
        ensure!(rekindle.does(&draw)?.is_empty());
        let running = fs::read_to_string(&picture)?;
        is_drawn(&running, name, layers)?;
        rekindle.does(&format!("stop {name} --grace 0"))?;
        rekindle.does(&draw)?;
        is_drawn(&fs::read_to_string(&picture)?, name, layers)?;

        let traced = rekindle.tells(&format!("trace {name} --json"))?;
        pieces(&traced).with_context(|| name.to_owned())?;
    }
    // A moment of it, into a pipe.
    let moment = rekindle.does("trace second --svg - --span 1")?;
    is_drawn(&moment, "second", &[])?;
    let said = rekindle.refuses("trace second --svg /nonexistent/trace.svg")?;
    ensure!(said.contains("/nonexistent/trace.svg"), "{said}");
    rekindle.tries("trace second")?.refused(2)?;
    Ok(())
}

/// It is an SVG with axes, a legend and these layers, and draws nothing outside of itself.
fn is_drawn(text: &str, name: &str, layers: &[&str]) -> anyhow::Result<()> {
    let svg = Document::parse(text).context("it is XML")?;
    let root = svg.root_element();
    ensure!(root.has_tag_name(("http://www.w3.org/2000/svg", "svg")));
    let words: String = root
        .descendants()
        .filter_map(|node| node.text())
        .collect::<Vec<_>>()
        .join(" ");
    for word in [
        name,
        "guest memory, MiB",
        "since Firecracker",
        "demand",
        "replayed",
        "faults",
    ] {
        ensure!(words.contains(word), "no {word:?} in {words:?}");
    }
    let colour = |layer: &str| -> anyhow::Result<Option<String>> {
        let is_it = |node: &Node<'_, '_>| node.attribute("id") == Some(layer);
        let node = root.descendants().find(is_it).context("no such layer")?;
        let drawn = node
            .attribute("d")
            .is_some_and(|path| path.starts_with('M'));
        Ok(node
            .attribute("stroke")
            .filter(|_| drawn)
            .map(str::to_owned))
    };
    let mut colours = Vec::new();
    for layer in layers {
        let colour = colour(layer)?.with_context(|| format!("no stroke of {layer}"))?;
        ensure!(!colours.contains(&colour), "{layer} has {colour}, too");
        colours.push(colour);
    }
    ensure!(!text.contains("href"), "it is not self-contained");
    // 32,768 pieces, each a few dozen bytes, are the most.
    ensure!(text.len() < 2 << 20, "{} bytes", text.len());
    Ok(())
}

/// They are in order of time, within the memory, and as many pages as were counted. Zeros that somebody waited for are
/// demand by their reason, and counted by what they are.
fn pieces(traced: &Value) -> anyhow::Result<()> {
    let pieces = traced["pieces"].as_array().context("pieces")?;
    let stats = &traced["stats"];
    let mut last = 0;
    let mut pages = std::collections::BTreeMap::<&str, u64>::new();
    for piece in pieces {
        let at = count(piece, "at_us")?;
        ensure!(at >= last, "{piece} after {last}");
        last = at;
        let end = count(piece, "page")? + count(piece, "count")?;
        ensure!(end * 4096 <= count(stats, "memory_bytes")?, "{piece}");
        *pages
            .entry(piece["kind"].as_str().context("a kind")?)
            .or_default() += count(piece, "count")?;
    }
    for (kind, counted) in [
        ("demand", "demand"),
        ("replay", "replayed"),
        ("around", "around"),
    ] {
        let seen = pages.get(kind).copied().unwrap_or(0);
        ensure!(seen >= count(stats, counted)?, "{kind}: {seen} of {stats}");
    }
    let counted = count(stats, "copied")? + count(stats, "zeroed")?;
    ensure!(
        pages.values().sum::<u64>() == counted,
        "{pages:?} of {stats}"
    );
    Ok(())
}

fn nothing_to_draw(rekindle: &Rekindle) -> anyhow::Result<()> {
    rekindle.boots("booted", &counter())?;
    rekindle.follows("booted")?.counts(3)?;
    let said = rekindle.refuses("trace booted --json")?;
    ensure!(said.contains("booted, not restored"), "{said}");
    ensure!(rekindle.tells("inspect booted")?["pager"].is_null());
    rekindle.does("snapshot create booted --name base")?;
    ensure!(rekindle.tells("inspect base")?["working_set"].is_null());
    rekindle.does("restore base --name mapped --backend file")?;
    let picture = rekindle.file("trace.svg");
    let said = rekindle.refuses(&format!("trace mapped --svg {}", picture.display()))?;
    ensure!(said.contains("--backend file"), "{said}");
    ensure!(!picture.exists());
    ensure!(rekindle.tells("inspect mapped")?["pager"].is_null());
    rekindle.refuses("trace nobody --json")?;
    Ok(())
}
