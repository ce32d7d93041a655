//! VMs that nobody looks after and of which nothing runs: what `gc` may remove.

use anyhow::{Context, Result};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::store::collect::Mode;
use rekindle_engine::vm::adopt::workers_in;
use rekindle_engine::vm::dir::{DirError, Hold, VmDir};
use rekindle_engine::vm::record::{Purpose, Record, RecordError};
use rekindle_engine::vm::state::{State, Why};
use rekindle_firecracker::find_by_id;

use super::watchers::watchers;

/// What is to become of a VM.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Somebody looks after it.
    Watched,
    /// It stays, because of this.
    Kept(String),
    /// Its owner died, and nothing of it is alive. Nobody can have it back.
    Abandoned(String),
}

/// Judges all VMs, and in [`Mode::Reclaim`] removes those that are abandoned, with all that they have on the host. Nothing
/// is ended: what runs without its owner can be adopted.
pub(crate) fn sweep(engine: &Engine, mode: Mode) -> Result<Vec<(VmName, Standing)>> {
    let mut judged = Vec::new();
    for name in VmDir::list(engine.root())? {
        // Until it is let go, nobody starts or adopts any.
        let hold = Hold::wait(engine.root())?;
        // One that was removed meanwhile is none.
        let Ok(dir) = VmDir::open(engine.root(), &name) else {
            continue;
        };
        let standing = judge(engine, &name, &dir)?;
        if mode == Mode::Reclaim && matches!(standing, Standing::Abandoned(_)) {
            dir.remove(&hold)?;
        }
        judged.push((name, standing));
    }
    Ok(judged)
}

fn judge(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Standing> {
    if !watchers(engine.root(), name)?.is_empty() {
        return Ok(watched(dir));
    }
    let _ownership = match dir.own() {
        // A program that uses the library.
        Err(DirError::Owned { .. }) => return Ok(watched(dir)),
        owned => owned?,
    };
    Ok(match Record::read(dir) {
        Ok(record) => {
            let runs = find_by_id(&record.id).context("cannot look for what runs of it")?;
            standing(&record, !runs.is_empty())
        }
        Err(RecordError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            cut_short(!workers_in(dir).is_empty())
        }
        Err(e) => Standing::Kept(format!("{:#}", anyhow::Error::from(e))),
    })
}

/// One that has ended is kept also while its monitor has not ended yet.
fn watched(dir: &VmDir) -> Standing {
    match Record::read(dir).map(|record| standing(&record, false)) {
        Ok(kept @ Standing::Kept(_)) => kept,
        _ => Standing::Watched,
    }
}

/// What becomes of a VM that nobody looks after, of which something runs or nothing.
fn standing(record: &Record, runs: bool) -> Standing {
    let rm = format!("rekindle rm {}", record.name);
    match &record.state {
        State::Failed(Why::Vanished { what }) => Standing::Abandoned(what.clone()),
        State::Stopped => Standing::Kept(format!("it has ended, and its output is there: {rm}")),
        State::Failed(why) => Standing::Kept(format!(
            "it has failed, and the record says why ({why}): {rm}"
        )),
        State::Configured => cut_short(runs),
        _ if record.purpose == Purpose::Rehearsal => cut_short(runs),
        _ if runs => Standing::Kept(
            "it runs without its monitor, which the next rekindle ps starts again".into(),
        ),
        _ => Standing::Abandoned("its monitor was killed, and nothing of it runs any more".into()),
    }
}

fn cut_short(runs: bool) -> Standing {
    if runs {
        Standing::Kept(
            "its start was cut short, and the next rekindle ps ends what runs of it".into(),
        )
    } else {
        Standing::Abandoned("its start was cut short".into())
    }
}
