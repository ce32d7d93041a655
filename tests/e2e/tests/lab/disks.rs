//! What a copy writes to its disk, no other sees.

use anyhow::ensure;
use rekindle_kit::story::Story;

use crate::console::Linux;
use crate::story;

pub(crate) fn stories() -> Vec<Story> {
    vec![story(
        "siblings write to disks of their own, the original's removed",
        siblings,
    )]
}

fn siblings(linux: &Linux) -> anyhow::Result<()> {
    linux.boots("base", "")?;
    linux.types("base", "echo base > /who; sync\n")?;
    ensure!(linux.asks("base", "cat /who")? == "base");
    linux.rekindle.does("snapshot create base --name base")?;
    linux.rekindle.does("rm --force base")?;
    linux.rekindle.does("restore base --count 2 --name copy")?;
    for copy in ["copy-2", "copy-1"] {
        linux.types(
            copy,
            &format!("echo {copy} > /who; sync; echo 3 > /proc/sys/vm/drop_caches\n"),
        )?;
        ensure!(linux.asks(copy, "cat /who")? == copy);
    }
    linux.rekindle.does("rm --force copy-2")?;
    linux.rekindle.does("restore base --name third")?;
    ensure!(linux.asks("third", "cat /who")? == "base");
    ensure!(linux.asks("copy-1", "cat /who")? == "copy-1");
    Ok(())
}
