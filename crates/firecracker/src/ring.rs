//! A log on disk that cannot grow beyond its bound.
//!
//! ```text
//!   append ──▶ serial      at most N bytes, then it becomes
//!              serial.old  the one before, in place of the one before that
//! ```
//!
//! Both are plain text files for `cat` and `tail -F`. Between N and 2 N bytes of the newest are there.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A bounded log in two files.
#[derive(Debug)]
pub struct Ring {
    path: PathBuf,
    file: File,
    length: u64,
    segment: NonZeroU64,
    written: u64,
}

impl Ring {
    /// Opens the log at `path`, or begins it, with files of at most `segment` bytes. What is there is
    /// continued.
    pub fn open(path: impl Into<PathBuf>, segment: NonZeroU64) -> io::Result<Ring> {
        let path = path.into();
        let file = open_segment(&path)?;
        let length = file.metadata()?.len();
        let older = match older(&path).metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        Ok(Ring {
            path,
            file,
            length,
            segment,
            written: older + length,
        })
    }

    /// Adds bytes at the end.
    pub fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.segment.get().saturating_sub(self.length);
            if room == 0 {
                self.rotate()?;
                continue;
            }
            let fits = usize::try_from(room).map_or(bytes.len(), |room| room.min(bytes.len()));
            let done = match self.file.write(&bytes[..fits]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(done) => done,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            bytes = &bytes[done..];
            self.length += done as u64;
            self.written += done as u64;
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, older(&self.path))?;
        self.file = open_segment(&self.path)?;
        self.length = 0;
        Ok(())
    }

    /// How many bytes were appended, those included that were there when the log was opened. It never
    /// falls, so a follower knows from two of these how many bytes came in between.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What was appended since [`Ring::written`] said `from`, and how many bytes of it are no longer there.
    pub fn since(&self, from: u64) -> io::Result<(Vec<u8>, u64)> {
        let wanted = self.written.saturating_sub(from);
        let bytes = tail(&self.path, wanted)?;
        let missed = wanted - bytes.len() as u64;
        Ok((bytes, missed))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The last `bytes` bytes of the log at `path`, or as many as there are; none if there is no log.
pub fn tail(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    // The newer file first: if the log is rotated meanwhile, what is read twice is more harmless than what
    // is not read at all, and the older file is asked only for what is missing.
    let newer = tail_of(path, bytes)?;
    let mut both = tail_of(&older(path), bytes - newer.len() as u64)?;
    both.extend_from_slice(&newer);
    Ok(both)
}

fn tail_of(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    if bytes == 0 {
        return Ok(read);
    }
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(read),
        Err(error) => return Err(error),
    };
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    file.take(bytes).read_to_end(&mut read)?;
    Ok(read)
}

fn open_segment(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".old");
    PathBuf::from(name)
}
