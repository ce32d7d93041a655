//! Following a bounded file that rotates: the guest's serial output, Firecracker's log.
//!
//! The writer appends to `NAME` and now and then renames it to `NAME.old`. A reader that holds the file open
//! reads the rest of it through its descriptor after the rename, then opens the new one: it loses nothing
//! unless it falls behind by a whole file.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rekindle_engine::Engine;
use rekindle_engine::store::VmName;
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rekindle_firecracker::ProcessId;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

use crate::monitor::truth::{Watch, look};
use crate::monitor::watchers::watchers;

/// Reads a growing file from a place on.
#[derive(Debug)]
pub(crate) struct Follower {
    path: PathBuf,
    file: Option<File>,
}

impl Follower {
    /// From the beginning of what is kept.
    pub(crate) fn from_start(path: &Path) -> Follower {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        let file = File::open(&old).or_else(|_| File::open(path)).ok();
        Follower {
            path: path.to_owned(),
            file,
        }
    }

    /// Hands over what has come since the last time.
    pub(crate) fn read_new(&mut self, sink: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        loop {
            if self.file.is_none() {
                self.file = File::open(&self.path).ok();
            }
            let Some(file) = &mut self.file else {
                return Ok(());
            };
            // Looked at before the rest is read: what is no longer the current file does not grow any more.
            let is_current = is_same_file(file, &self.path);
            copy(file, sink).with_context(|| format!("cannot read {}", self.path.display()))?;
            if is_current {
                return Ok(());
            }
            self.file = match File::open(&self.path) {
                Ok(next) => Some(next),
                Err(_) => return Ok(()),
            };
        }
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(held), Ok(named)) => held.ino() == named.ino() && held.dev() == named.dev(),
        (_, Err(e)) => e.kind() == io::ErrorKind::NotFound,
        _ => true,
    }
}

fn copy(file: &mut File, sink: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => sink(&buffer[..n])?,
        }
    }
}

/// Tells when something in a VM's directory changes: output grows, the record is replaced.
#[derive(Debug)]
pub(crate) struct Changes {
    inotify: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Watches from now on. Needs a runtime.
    pub(crate) fn of(dir: &VmDir) -> Result<Changes> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context("cannot watch files")?;
        let flags = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        inotify::add_watch(&inotify, dir.path(), flags)
            .with_context(|| format!("cannot watch {}", dir.path().display()))?;
        #[expect(
            deprecated,
            reason = "unsound only for types whose descriptor changes, which an OwnedFd's does not; its \
                      successor is an unsafe function"
        )]
        let inotify = AsyncFd::new(inotify)?;
        Ok(Changes { inotify })
    }

    /// Waits for the next change.
    pub(crate) async fn next(&mut self) -> Result<()> {
        let mut ready = self.inotify.readable_mut().await?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(ready.get_inner_mut(), &mut buffer);
        while let Ok(_event) = events.next() {}
        ready.clear_ready();
        Ok(())
    }
}

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
