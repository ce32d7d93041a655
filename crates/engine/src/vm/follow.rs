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

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use super::dir::VmDir;

/// Why a file cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nobody tells when the directory changes.
    #[error("cannot watch {path}")]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Reads a growing file from a place on.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: Option<File>,
}

impl Follower {
    /// From the beginning of what is kept.
    pub fn from_start(path: &Path) -> Follower {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        let file = File::open(&old).or_else(|_| File::open(path)).ok();
        Follower {
            path: path.to_owned(),
            file,
        }
    }

    /// Hands over what has come since the last time.
    pub fn read_new<E: From<FollowError>>(
        &mut self,
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            if self.file.is_none() {
                self.file = File::open(&self.path).ok();
            }
            let Some(file) = &mut self.file else {
                return Ok(());
            };
            // Looked at before the rest is read: what is no longer the current file does not grow any more.
            let is_current = is_same_file(file, &self.path);
            copy(file, &self.path, sink)?;
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

fn copy<E: From<FollowError>>(
    file: &mut File,
    path: &Path,
    sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = [0; 8192];
    loop {
        let read = file.read(&mut buffer).map_err(|source| FollowError::Read {
            path: path.to_owned(),
            source,
        })?;
        match read {
            0 => return Ok(()),
            n => sink(&buffer[..n])?,
        }
    }
}

/// Tells when something in a VM's directory changes: output grows, the record is replaced.
#[derive(Debug)]
pub struct Changes {
    path: PathBuf,
    inotify: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Watches from now on. Needs a runtime.
    pub fn of(dir: &VmDir) -> Result<Changes, FollowError> {
        let watch = |source: io::Error| FollowError::Watch {
            path: dir.path().to_owned(),
            source,
        };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|e| watch(e.into()))?;
        let flags = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        inotify::add_watch(&inotify, dir.path(), flags).map_err(|e| watch(e.into()))?;
        #[expect(
            deprecated,
            reason = "unsound only for types whose descriptor changes, which an OwnedFd's does not; its \
                      successor is an unsafe function"
        )]
        let inotify = AsyncFd::new(inotify).map_err(watch)?;
        Ok(Changes {
            path: dir.path().to_owned(),
            inotify,
        })
    }

    /// Waits for the next change. May be dropped and called again.
    pub async fn next(&mut self) -> Result<(), FollowError> {
        let ready = self.inotify.readable_mut().await;
        let mut ready = ready.map_err(|source| FollowError::Watch {
            path: self.path.clone(),
            source,
        })?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(ready.get_inner_mut(), &mut buffer);
        while let Ok(_event) = events.next() {}
        ready.clear_ready();
        Ok(())
    }
}
