//! What our own processes cost a VM: memory that is theirs alone.

use std::fmt::Display;

use anyhow::{Context as _, Result};
use rekindle_engine::store::{Root, VmName};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_firecracker::ProcessId;

use crate::monitor::truth::Watch;

/// `Private_Dirty` of each process, in KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrivateDirty {
    pub(super) keeper: f64,
    pub(super) monitor: f64,
    pub(super) pager: f64,
}

/// Measures the processes of a VM that runs.
pub(super) fn private_dirty(root: &Root, name: &VmName) -> Result<PrivateDirty> {
    let dir = VmDir::open(root, name)?;
    let watch = Watch::read(&dir).context("the VM has no monitor")?;
    Ok(PrivateDirty {
        keeper: of(watch.keeper.as_ref())?,
        monitor: of(Some(&watch.monitor))?,
        pager: of(Record::read(&dir)?.pager.as_ref())?,
    })
}

fn of(process: Option<&ProcessId>) -> Result<f64> {
    let Some(process) = process else {
        return Ok(0.0);
    };
    of_process(process.pid)
}

/// `Private_Dirty` of any process, in KiB.
pub(super) fn of_process(pid: impl Display) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    parse(&text).with_context(|| format!("{path} has no Private_Dirty"))
}

fn parse(text: &str) -> Option<f64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let text = "Rss:  1234 kB\nPrivate_Clean:  5 kB\nPrivate_Dirty:       652 kB\n";
        assert_eq!(parse(text), Some(652.0));
        assert_eq!(parse("Rss: 1 kB\n"), None);
    }
}
