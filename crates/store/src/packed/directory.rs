//! A repository in a directory: a disk that is carried, a file system that several hosts share.
//!
//! A file is written without a name, made durable, and then given its name, if nobody has it (`O_TMPFILE`, `linkat`). So
//! whoever is killed leaves whole files and nothing else, and two that push the same do not meet. Where a file system knows
//! no such files, it has another name first.

use crate::file::{At, FileError, open_regular, read_at_once, size, sync_dir};
use crate::packed::objects::{Object, ObjectError, Objects, Put};
use crate::unit::{index, length};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

/// A directory that holds a repository.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// The directory at `path`, which the first push makes.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn path(&self, object: &Object) -> PathBuf {
        self.path.join(object.to_string())
    }

    fn open(&self, object: &Object) -> Result<Option<(File, PathBuf)>, FileError> {
        let path = self.path(object);
        match open_regular(&path) {
            Err(error) if error.is_not_found() => Ok(None),
            other => Ok(Some((other?, path))),
        }
    }
}

impl Objects for Directory {
    fn url(&self, object: &Object) -> String {
        self.path(object).display().to_string()
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn at_once(&self) -> usize {
        thread::available_parallelism().map_or(1, NonZero::get)
    }

    fn prepare(&self) -> Result<(), ObjectError> {
        for part in ["packs", "snapshots", "names"] {
            let path = self.path.join(part);
            std::fs::create_dir_all(&path).at("create", &path)?;
        }
        Ok(())
    }

    fn size(&self, object: &Object) -> Result<Option<u64>, ObjectError> {
        match self.open(object)? {
            Some((file, path)) => Ok(Some(size(&file, &path)?.get())),
            None => Ok(None),
        }
    }

    fn get(&self, object: &Object, limit: u64) -> Result<Option<Vec<u8>>, ObjectError> {
        let Some((file, path)) = self.open(object)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .at("read", &path)?;
        match length(bytes.len()) > limit {
            true => Err(ObjectError::Length {
                url: self.url(object),
                expected: limit,
            }),
            false => Ok(Some(bytes)),
        }
    }

    fn read(&self, object: &Object, range: Range<u64>) -> Result<Vec<u8>, ObjectError> {
        let Some((file, path)) = self.open(object)? else {
            return Err(ObjectError::Missing {
                url: self.url(object),
            });
        };
        let mut bytes = vec![0; index(range.end - range.start)];
        file.read_exact_at(&mut bytes, range.start)
            .at("read", &path)?;
        Ok(bytes)
    }

    fn read_at_once(&self, object: &Object, range: Range<u64>) -> Option<Vec<u8>> {
        read_at_once(&self.path(object), range)
    }

    fn put(&self, object: &Object, bytes: Vec<u8>) -> Result<Put, ObjectError> {
        Ok(put_new(&self.path(object), &bytes, Durable::Yes)?)
    }

    fn remove(&self, object: &Object) -> Result<(), ObjectError> {
        let path = self.path(object);
        Ok(std::fs::remove_file(&path).at("remove", &path)?)
    }
}

/// Whether a file has to outlive a loss of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durable {
    Yes,
    No,
}

/// Writes a file that appears whole, where none is.
pub(super) fn put_new(path: &Path, bytes: &[u8], durable: Durable) -> Result<Put, FileError> {
    let dir = path.parent().expect("each file is in a directory");
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let put = match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => {
            let file = File::from(file);
            fill(&file, bytes, durable, path)?;
            let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
            name(nameless.as_ref(), path)?
        }
        // Overlayfs before Linux 6.3, NFS.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => put_named(path, bytes, durable)?,
        Err(error) => Err(error).at("write to", dir)?,
    };
    if put == Put::WasThere {
        return Ok(put);
    }
    if durable == Durable::Yes {
        sync_dir(dir.to_owned())?;
    }
    Ok(Put::New)
}

/// The same where no file can be without a name: under another one first, which a kill leaves behind.
fn put_named(path: &Path, bytes: &[u8], durable: Durable) -> Result<Put, FileError> {
    let own = path.file_name().unwrap_or_default().to_string_lossy();
    // Of all processes of all hosts that have the directory nobody else has it.
    let mut random = [0; 16];
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty()).at("name", path)?;
    let random = u128::from_ne_bytes(random);
    let other = path.with_file_name(format!(".{own}.{random:032x}"));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(&other, flags, Mode::RUSR | Mode::WUSR).at("create", &other)?;
    let put = fill(&file.into(), bytes, durable, &other).and_then(|()| name(&other, path));
    std::fs::remove_file(&other).at("remove", &other)?;
    put
}

fn fill(mut file: &File, bytes: &[u8], durable: Durable, path: &Path) -> Result<(), FileError> {
    file.write_all(bytes).at("write", path)?;
    if durable == Durable::Yes {
        file.sync_all().at("sync", path)?;
    }
    Ok(())
}

/// Gives a file its name, if nobody has it.
fn name(file: &Path, path: &Path) -> Result<Put, FileError> {
    match rustix::fs::linkat(CWD, file, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::EXIST) => Ok(Put::WasThere),
        Err(error) => Err(error).at("name", path),
        Ok(()) => Ok(Put::New),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_put_once_also_where_it_needs_another_name_first() {
        for put in [put_new, put_named] {
            let place = tempfile::tempdir().unwrap();
            let path = place.path().join("x");
            assert_eq!(put(&path, b"one", Durable::Yes).unwrap(), Put::New);
            assert_eq!(put(&path, b"two", Durable::Yes).unwrap(), Put::WasThere);
            assert_eq!(std::fs::read(&path).unwrap(), b"one");
            assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
        }
    }
}
