//! What the tests share: a place with a source and a destination, and what a tree looks like from outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rekindle_archive::{Owner, PackError, Tally, UnpackError, pack, unpack};
use rustix::fs::{SeekFrom, seek};
use tempfile::TempDir;

/// A place with two directories, `from` and `to`.
pub(crate) struct Fixture {
    temp: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        let temp = tempfile::tempdir().unwrap();
        for name in ["from", "to"] {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        Fixture { temp }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// From a path of this place to another, as it is written there.
    pub(crate) fn copy(&self, from: &str, to: &str) -> Result<Tally, UnpackError> {
        let stream = packed(&self.path(from)).unwrap();
        unpacked(&stream, &self.path(to))
    }
}

pub(crate) fn packed(from: &Path) -> Result<Vec<u8>, PackError> {
    let mut stream = Vec::new();
    pack(from, &mut stream, &mut |_| ())?;
    Ok(stream)
}

pub(crate) fn unpacked(stream: &[u8], to: &Path) -> Result<Tally, UnpackError> {
    unpack(stream, to, Owner::Unpacker, &mut |_| ())
}

/// An entry, as who looks at it sees it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    mode: u32,
    owner: (u32, u32),
    changed: (i64, i64),
    is: Is,
}

#[derive(Debug, PartialEq, Eq)]
enum Is {
    Directory,
    Link(PathBuf),
    /// Its size, and its data: a hole is not in it.
    File(u64, Vec<(u64, Vec<u8>)>),
}

/// All of a tree, by the paths within it.
pub(crate) fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut all = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(below) = left.pop() {
        let path = match below.as_os_str().is_empty() {
            // A slash would follow it.
            true => root.to_owned(),
            false => root.join(&below),
        };
        let found = fs::symlink_metadata(&path).unwrap();
        let is = if found.is_symlink() {
            Is::Link(fs::read_link(&path).unwrap())
        } else if found.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|e| below.join(e.unwrap().file_name())),
            );
            Is::Directory
        } else {
            Is::File(found.len(), data(&File::open(&path).unwrap()))
        };
        let seen = Seen {
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            changed: (found.mtime(), found.mtime_nsec()),
            is,
        };
        all.insert(below, seen);
    }
    all
}

fn data(file: &File) -> Vec<(u64, Vec<u8>)> {
    let mut stretches = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; usize::try_from(at - start).unwrap()];
        file.read_exact_at(&mut bytes, start).unwrap();
        stretches.push((start, bytes));
    }
    stretches
}

/// The names in a directory.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Hands out a stream as slowly as a connection does: a few bytes each time.
pub(crate) struct Trickle<'a>(pub(crate) &'a [u8], pub(crate) usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = self.1.min(buffer.len());
        self.0.read(&mut buffer[..most])
    }
}
