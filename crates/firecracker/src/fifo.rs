//! Firecracker's output on its way to disk: a FIFO that always has a reader.
//!
//! ```text
//!   Firecracker ── serial, log ──▶ Fifo (opened for reading and writing) ── drain ──▶ Ring
//! ```
//!
//! Whoever writes into a pipe that nobody reads gets an error, and Firecracker then logs two lines a byte. A
//! FIFO that is open for reading and writing has a reader as long as anybody holds it, Firecracker itself
//! included; what nobody takes out in time is kept, 1 MiB of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;
use tokio::net::unix::pipe::Receiver;

use crate::ring::Ring;

/// How much a FIFO keeps.
const CAPACITY: usize = 1 << 20;

/// How much is moved at a time.
const CHUNK: usize = 64 << 10;

/// A named pipe, open for reading and writing.
#[derive(Debug)]
pub struct Fifo {
    path: PathBuf,
    receiver: Receiver,
}

impl Fifo {
    /// Makes the FIFO at `path` (mode 0600), or takes the one that is there, and opens it.
    ///
    /// What is at `path` and is no FIFO stays as it is. Needs a tokio runtime.
    pub fn open(path: impl Into<PathBuf>) -> Result<Fifo, FifoError> {
        let path = path.into();
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                let source = error.into();
                return Err(FifoError::Make { path, source });
            }
        }
        let file = open_both_ways(&path, OFlags::NONBLOCK)?;
        // More than an unprivileged user may have is refused; the FIFO then keeps what it keeps.
        let _ = rustix::pipe::fcntl_setpipe_size(&file, CAPACITY);
        match Receiver::from_file(file) {
            Ok(receiver) => Ok(Fifo { path, receiver }),
            Err(source) => Err(FifoError::Open { path, source }),
        }
    }

    /// The end to hand to Firecracker, as its standard output.
    ///
    /// It is opened anew, so that its flags are its own; it can be read from as well, which is what keeps
    /// the FIFO from losing its last reader while Firecracker lives.
    pub fn writer(&self) -> Result<OwnedFd, FifoError> {
        open_both_ways(&self.path, OFlags::empty()).map(OwnedFd::from)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn open_both_ways(path: &Path, flags: OFlags) -> Result<File, FifoError> {
    let flags = flags | OFlags::NOFOLLOW;
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    match opened {
        Ok((file, metadata)) if metadata.file_type().is_fifo() => Ok(file),
        Ok(_) => Err(FifoError::NoFifo {
            path: path.to_owned(),
        }),
        Err(source) => Err(FifoError::Open {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Moves what comes out of `fifo` into `ring`, for ever; returns only with an error. Loses nothing when it
/// is cancelled.
///
/// The appends are ordinary writes to a file, which wait for memory rather than for the disk.
pub async fn drain(fifo: &Fifo, ring: &mut Ring) -> io::Error {
    let mut chunk = vec![0; CHUNK];
    loop {
        if let Err(error) = fifo.receiver.readable().await {
            return error;
        }
        // Through the runtime, which has to learn that there is no more.
        let read = |chunk: &mut [u8]| fifo.receiver.try_read(chunk);
        if let Err(error) = take(read, &mut chunk, ring) {
            return error;
        }
        // A guest that never stops writing must not keep others of this thread from their turn.
        tokio::task::yield_now().await;
    }
}

/// Moves what is in `fifo` now into `ring`, up to what a FIFO holds, and says how many bytes that were: the
/// last of a Firecracker that is dead.
pub fn drain_rest(fifo: &Fifo, ring: &mut Ring) -> io::Result<usize> {
    // From the FIFO itself: the runtime may not have heard yet that there is something.
    let read = |chunk: &mut [u8]| Ok(rustix::io::read(&fifo.receiver, chunk)?);
    take(read, &mut vec![0; CHUNK], ring)
}

/// Appends what `read` yields until there is no more, or as much as a FIFO holds.
fn take(
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    chunk: &mut [u8],
    ring: &mut Ring,
) -> io::Result<usize> {
    let mut moved = 0;
    while moved < CAPACITY {
        match read(chunk) {
            Ok(0) => break,
            Ok(length) => {
                ring.append(&chunk[..length])?;
                moved += length;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(moved)
}

/// A FIFO cannot be made or opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FifoError {
    /// It cannot be made.
    #[error("cannot make a FIFO at {path:?}")]
    Make {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be opened.
    #[error("cannot open the FIFO {path:?}")]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else is at its path.
    #[error("{path:?} is there and is no FIFO")]
    NoFifo {
        /// The path.
        path: PathBuf,
    },
}
