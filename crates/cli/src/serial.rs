//! Following a bounded file that rotates: the guest's serial output, Firecracker's log.
//!
//! The writer appends to `NAME` and now and then renames it to `NAME.old`. A reader that holds the file open
//! reads the rest of it through its descriptor after the rename, then opens the new one: it loses nothing
//! unless it falls behind by a whole file.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

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
pub(crate) async fn follow(
    dir: &VmDir,
    mut follower: Follower,
    sink: &mut impl FnMut(&[u8]) -> Result<()>,
) -> Result<Option<Record>> {
    let mut changes = Changes::of(dir)?;
    loop {
        // The record is read first: what it calls over writes no more.
        let record = Record::read(dir).ok();
        follower.read_new(sink)?;
        match record {
            Some(record) if record.state.is_over() => return Ok(Some(record)),
            None if !dir.path().exists() => return Ok(None),
            _ => {}
        }
        changes.next().await?;
    }
}
