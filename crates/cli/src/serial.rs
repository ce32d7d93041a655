//! Following a guest's output until its VM has ended.

use std::collections::HashSet;

use anyhow::{Context, Result};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::follow::{Changes, Follower};
use rekindle_engine::vm::record::Record;
use rekindle_firecracker::ProcessId;
use tokio::task::JoinSet;

use crate::monitor::truth::{Watch, look};
use crate::monitor::watchers::watchers;

/// Waits until the VM's record says that it is over, or the VM is removed. Hands over its output meanwhile.
///
/// Who would write the record may die together with the VM. So their deaths are watched too, and after each the truth
/// is looked for, as any other verb would.
pub(crate) async fn follow(
    engine: &Engine,
    name: &VmName,
    dir: &VmDir,
    mut follower: Follower,
    sink: &mut impl FnMut(&[u8]) -> Result<()>,
) -> Result<Option<Record>> {
    let mut changes = Changes::of(dir)?;
    let mut deaths = Deaths::default();
    loop {
        // The record is read first: what it calls over writes no more.
        let record = Record::read(dir).ok();
        follower.read_new(sink)?;
        if record.is_none() && !dir.path().exists() {
            return Ok(None);
        }
        deaths.watch(engine, name, dir, record.as_ref());
        match record {
            Some(record) if record.state.is_over() => return Ok(Some(record)),
            _ => {}
        }
        tokio::select! {
            changed = changes.next() => changed?,
            () = deaths.next() => look_beside(engine, name, dir).await?,
        }
    }
}

/// Looks for the truth on a thread, as it may take a moment. A VM that is gone then is none of its errors.
async fn look_beside(engine: &Engine, name: &VmName, dir: &VmDir) -> Result<()> {
    let (engine, name, dir) = (engine.clone(), name.clone(), dir.clone());
    let looked = tokio::task::spawn_blocking(move || match look(&engine, &name, &dir) {
        Err(e) if dir.path().exists() => Err(e),
        _ => Ok(()),
    });
    looked.await.context("the look at the VM was lost")?
}

/// The deaths of the processes that a VM is made of, and of who writes down how it ends. Each is told once.
#[derive(Debug, Default)]
struct Deaths {
    watched: HashSet<ProcessId>,
    waits: JoinSet<()>,
}

impl Deaths {
    /// Watches those that were not seen before.
    fn watch(&mut self, engine: &Engine, name: &VmName, dir: &VmDir, record: Option<&Record>) {
        let mut processes: Vec<ProcessId> = record
            .into_iter()
            .flat_map(|record| [&record.firecracker, &record.pager])
            .flatten()
            .cloned()
            .collect();
        match Watch::read(dir) {
            Some(watch) => processes.push(watch.monitor),
            // Before it makes itself known, it and its keeper are found by their arguments.
            None => processes.extend(watchers(engine.root(), name).unwrap_or_default()),
        }
        for process in processes {
            if self.watched.insert(process.clone()) {
                self.waits.spawn(async move {
                    // One that cannot be opened is dead already.
                    if let Ok(pidfd) = process.open_pidfd() {
                        let _ = pidfd.exited().await;
                    }
                });
            }
        }
    }

    /// Waits for the next death; for ever, if nobody is watched that lives.
    async fn next(&mut self) {
        if self.waits.join_next().await.is_none() {
            std::future::pending().await
        }
    }
}
