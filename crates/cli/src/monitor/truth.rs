//! What is true of a VM: its record, if somebody keeps it true; else whoever asks has it adopted or buried first.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::adopt::{end_leftovers, end_workers_in};
use rekindle_engine::vm::dir::{DirError, Hold, VmDir};
use rekindle_engine::vm::record::{Purpose, Record, RecordError};
use rekindle_firecracker::ProcessId;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;
use serde::{Deserialize, Serialize};

use super::start;
use super::watchers::watchers;
use crate::commands::block_on;
use crate::output;

/// How long a keeper may take to have a monitor up again. It takes some 10 ms unless the host is short of processors;
/// what is told without it may not be true.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked again when who was to set it right died.
const ROUNDS: usize = 4;

const FILE: &str = "monitor.json";

/// Who looks after a VM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Watch {
    pub(crate) monitor: ProcessId,
    pub(crate) keeper: Option<ProcessId>,
}

impl Watch {
    pub(crate) fn write(&self, dir: &VmDir) -> Result<()> {
        dir.replace(FILE, &serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", dir.file(FILE).display()))
    }

    pub(crate) fn read(dir: &VmDir) -> Option<Watch> {
        serde_json::from_slice(&std::fs::read(dir.file(FILE)).ok()?).ok()
    }

    /// Whether the monitor that made itself known lives.
    pub(crate) fn is_kept(dir: &VmDir) -> bool {
        Watch::read(dir).is_some_and(|watch| watch.monitor.is_alive())
    }
}

/// The truth about a VM.
#[derive(Debug)]
pub(crate) enum Truth {
    /// Its record, which is right.
    Known(Box<Record>),
    /// It is being started, or the start was killed half-way: it has no record yet.
    Starting,
}

/// Finds out, and sets right what a killed monitor left. Says on standard error what it did.
///
/// A start that was cut short, with nobody left to finish it, is cleared away; it is then an error like any VM that
/// is not there.
pub(crate) fn look(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Truth> {
    for _ in 0..ROUNDS {
        if let Some(truth) = look_once(engine, name, dir)? {
            return Ok(truth);
        }
    }
    Ok(known(read(dir)?))
}

/// Nothing if it has to be looked again, because whoever was to set it right is gone, too.
fn look_once(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<Option<Truth>> {
    // Asked before the record is read: what a living monitor has written is right.
    let kept = Watch::is_kept(dir);
    match read(dir)? {
        Some(record) if is_final(&record) || (kept && is_whole(&record)) => {
            return Ok(Some(known(Some(record))));
        }
        Some(_) if kept => {
            // Its monitor is about to find out that it ended.
            let monitor = Watch::read(dir).map(|watch| watch.monitor);
            return settle(dir, monitor.as_ref());
        }
        _ => {}
    }
    let hold = Hold::wait(engine.root())?;
    let watchers = watchers(engine.root(), name)?;
    // Read again: until the hold was had, anything could happen.
    let record = read(dir)?;
    let alive = record
        .as_ref()
        .is_some_and(|record| record.state.is_alive());
    if let Some(keeper) = watchers.first() {
        drop(hold);
        return match record {
            Some(_) if alive => settle(dir, Some(keeper)),
            // Its start failed, and the keeper is about to end.
            None if !dir.path().exists() => Err(missing(engine, name)),
            record => Ok(Some(known(record))),
        };
    }
    match dir.own() {
        // A program that uses the library.
        Err(DirError::Owned { .. }) => return Ok(Some(known(record))),
        Err(_) if !dir.path().exists() => return Err(missing(engine, name)),
        Err(e) => return Err(e.into()),
        Ok(_) => {}
    }
    if record.as_ref().is_some_and(is_final) {
        return Ok(Some(known(record)));
    }
    let rehearsal = record.as_ref().is_some_and(is_rehearsal);
    if alive && !rehearsal {
        let starting = start::revive(engine, name, dir)?;
        drop(hold);
        let record = starting.wait()?;
        output::say(format_args!(
            "the monitor of {name} was dead; the VM is {} now",
            record.state
        ));
        return Ok(Some(known(Some(record))));
    }
    block_on(async {
        if let Some(record) = &record {
            end_leftovers(record)
                .await
                .context("cannot look for the processes of the VM")?;
        }
        end_workers_in(dir).await;
        Ok(())
    })?;
    dir.remove(&hold)?;
    let what = if rehearsal { "rehearsal" } else { "start of" };
    output::say(format_args!(
        "the {what} {name} was cut short; what there was of it is removed"
    ));
    Err(missing(engine, name))
}

fn known(record: Option<Record>) -> Truth {
    record.map_or(Truth::Starting, |record| Truth::Known(Box::new(record)))
}

fn missing(engine: &Engine, name: &VmName) -> anyhow::Error {
    let root = engine.root().vms();
    let name = name.clone();
    DirError::Missing { name, root }.into()
}

/// Waits until what is written down is true again: a monitor that died is replaced, one that lives has written that
/// the VM ended. Nothing if `watcher`, who was to see to it, ended without.
fn settle(dir: &VmDir, watcher: Option<&ProcessId>) -> Result<Option<Truth>> {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC).context("cannot watch files")?;
    inotify::add_watch(&changes, dir.path(), inotify::WatchFlags::MOVED_TO)
        .with_context(|| format!("cannot watch {}", dir.path().display()))?;
    let Some(watcher) = watcher.and_then(|process| process.open_pidfd().ok()) else {
        return Ok(None);
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        if is_settled(dir)? {
            break;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("it is short")?;
        let mut ready = [
            PollFd::new(&changes, PollFlags::IN),
            PollFd::new(&watcher, PollFlags::IN),
        ];
        let came = rustix::event::poll(&mut ready, Some(&left)).unwrap_or(0);
        if came == 0 {
            break;
        }
        if !ready[1].revents().is_empty() {
            return Ok(None);
        }
        let _ = rustix::io::read(&changes, &mut [0; 4096]);
    }
    Ok(Some(known(read(dir)?)))
}

/// Whether a VM has ended and is to be looked at. A rehearsal that has ended is as good as gone.
fn is_final(record: &Record) -> bool {
    record.state.is_over() && !is_rehearsal(record)
}

fn is_rehearsal(record: &Record) -> bool {
    record.purpose == Purpose::Rehearsal
}

fn is_settled(dir: &VmDir) -> Result<bool> {
    let kept = Watch::is_kept(dir);
    let settled = |record: Record| record.state.is_over() || (kept && is_whole(&record));
    Ok(read(dir)?.is_some_and(settled))
}

/// Whether the processes that the record names are alive.
fn is_whole(record: &Record) -> bool {
    let needed = [&record.firecracker, &record.pager];
    needed.into_iter().flatten().all(ProcessId::is_alive)
}

fn read(dir: &VmDir) -> Result<Option<Record>> {
    match Record::read(dir) {
        Ok(record) => Ok(Some(record)),
        Err(RecordError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}
