//! One memory file: a Full snapshot's, or a Diff's in a chain.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, fstatfs};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::source::{PAGE, SourceError};
use crate::stats::BadPage;
use crate::unit::{index, length};

#[derive(Debug)]
pub(crate) struct Layer {
    file: File,
    path: PathBuf,
    /// All of it is in memory: a tmpfs.
    in_memory: bool,
    /// The file system cannot tell what is in memory.
    mute: AtomicBool,
}

impl Layer {
    /// Opens it, and tells its size in bytes.
    pub(crate) fn open(path: PathBuf) -> Result<(Layer, u64), SourceError> {
        let open = |source| SourceError::Open {
            path: path.clone(),
            source,
        };
        // Non-blocking, or opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file: File = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|e| open(e.into()))?
            .into();
        let metadata = file.metadata().map_err(open)?;
        if !metadata.is_file() {
            return Err(SourceError::NotAFile { path });
        }
        const TMPFS: i64 = 0x0102_1994;
        let in_memory = fstatfs(&file).is_ok_and(|fs| fs.f_type == TMPFS);
        let layer = Layer {
            file,
            path,
            in_memory,
            mute: AtomicBool::new(false),
        };
        Ok((layer, metadata.len()))
    }

    /// Fills the buffer with what is at an offset; all of it, or the page that could not be read.
    pub(crate) fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), BadPage> {
        let mut done = 0;
        while done < buffer.len() {
            let offset = at + length(done);
            match self.file.read_at(&mut buffer[done..], offset) {
                Ok(0) => return Err(self.bad(offset, None)),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.bad(offset, e.raw_os_error())),
            }
        }
        Ok(())
    }

    /// Fills the start of the buffer, as far as it can be had without waiting for a disk; tells how many bytes, in whole
    /// small pages.
    pub(crate) fn read_resident(&self, at: u64, buffer: &mut [u8]) -> Result<usize, BadPage> {
        if self.in_memory {
            self.read(at, buffer)?;
            return Ok(buffer.len());
        }
        let mut done = 0;
        while done < buffer.len() && !self.mute.load(Ordering::Relaxed) {
            let offset = at + length(done);
            let mut rest = [IoSliceMut::new(&mut buffer[done..])];
            match preadv2(&self.file, &mut rest, offset, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(self.bad(offset, None)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::OPNOTSUPP) => self.mute.store(true, Ordering::Relaxed),
                Err(errno) => return Err(self.bad(offset, Some(errno.raw_os_error()))),
            }
        }
        Ok(done - done % index(PAGE))
    }

    fn bad(&self, offset: u64, errno: Option<i32>) -> BadPage {
        BadPage {
            file: self.path.clone(),
            page: offset / PAGE,
            offset,
            errno,
        }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether its file system cannot tell what is in memory, as it has found out.
    pub(crate) fn is_mute(&self) -> bool {
        self.mute.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn is_in_memory(&self) -> bool {
        self.in_memory
    }
}
