//! A snapshot goes away packed, is removed, and comes back: its copies find every page right.

use anyhow::ensure;
use rekindle_e2e::Rekindle;
use rekindle_kit::story::Story;

use crate::memory::{copies_are_right, filled, goes_on};
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "a snapshot travels by a directory with all that it builds on",
        by_a_directory,
    )]
}

fn by_a_directory(rekindle: &Rekindle) -> anyhow::Result<()> {
    filled(rekindle, "original")?;
    rekindle.does("snapshot create original --name base")?;
    goes_on(rekindle, "original")?;
    rekindle.does("snapshot create original --name later --diff")?;
    rekindle.does("rm --force original")?;
    // A working set travels, too.
    copies_are_right(rekindle, "later")?;
    let before = rekindle.tells("snapshot inspect later")?;
    let place = format!("file://{}", rekindle.file("place").display());

    let pushed = rekindle.tells(&format!("snapshot push later {place} --json"))?;
    ensure!(
        pushed["snapshots"] == 2 && pushed["url"] == format!("{place}/later"),
        "{pushed}"
    );
    let again = rekindle.tells(&format!("snapshot push later {place} --json"))?;
    ensure!(again["snapshots"] == 0 && again["bytes"] == 0, "{again}");
    rekindle.does("snapshot rm later base")?;
    rekindle.refuses("snapshot inspect later")?;

    let said = rekindle.refuses(&format!("snapshot pull {place}/latter"))?;
    ensure!(said.contains("latter"), "{said}");
    let pulled = rekindle.tells(&format!("snapshot pull {place}/later --json"))?;
    ensure!(
        pulled["snapshots"] == 2 && pulled["id"] == before["id"],
        "{pulled}"
    );
    ensure!(rekindle.tells("snapshot inspect later")? == before);
    rekindle.does("snapshot verify later")?;
    copies_are_right(rekindle, "later")
}
