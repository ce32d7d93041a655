//! Working sets on disk: read by anybody, replaced whole by one at a time.

use super::format::size_limit;
use super::{MAX_SIZE, Run, WorkingSet, WorkingSetError};
use crate::file::{At, FileError, create_new, lock_file, open_regular, size};
use crate::unit::{ByteSize, length};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Reads the set at `path`; `None` if there is none.
///
/// What is allocated is in proportion to the file, and to the memory that the *file* names: [`read_for`] is for who
/// knows the memory.
///
/// # Errors
/// [`WorkingSetError::File`] if it cannot be read, the rest for what is no sound set.
pub fn read(path: &Path) -> Result<Option<WorkingSet>, WorkingSetError> {
    match bytes_of(path, MAX_SIZE)? {
        Some(bytes) => WorkingSet::parse(&bytes).map(Some),
        None => Ok(None),
    }
}

/// Reads the set at `path` if it is one of a memory with `pages` pages of `page_size` bytes; `None` if there is none.
///
/// # Errors
/// As [`read`], and [`WorkingSetError::OtherMemory`].
pub fn read_for(
    path: &Path,
    page_size: u64,
    pages: u64,
) -> Result<Option<WorkingSet>, WorkingSetError> {
    match bytes_of(path, size_limit(pages))? {
        Some(bytes) => WorkingSet::parse_for(&bytes, page_size, pages).map(Some),
        None => Ok(None),
    }
}

/// As [`read_for`], from a file that somebody has opened; `path` is what errors name.
///
/// # Errors
/// As [`read_for`].
pub fn read_opened(
    file: std::fs::File,
    path: &Path,
    page_size: u64,
    pages: u64,
) -> Result<WorkingSet, WorkingSetError> {
    let bytes = bytes_in(file, path, size_limit(pages))?;
    WorkingSet::parse_for(&bytes, page_size, pages)
}

/// Merges what one run saw into the set at `path`, and returns the whole.
///
/// Whoever does so at the same time waits, so no run is lost; a reader finds the set before or the set after. A set
/// that is damaged, or of another memory, is replaced by this run's alone. One of a later version is left as it is.
///
/// Two files stand beside: `.<name>.lock`, which stays, and `.<name>.new`, which a process that is killed leaves for
/// the next one to replace. Nothing is flushed: after a power cut the set may be an old one, or damaged and so lost,
/// which costs the next guests time and nothing else.
///
/// To record into a snapshot, hold a [lease](crate::Lease) on it.
///
/// # Errors
/// [`WorkingSetError::File`] if a file cannot be read, written or locked, or is no regular file;
/// [`WorkingSetError::Memory`] and [`WorkingSetError::OutOfRange`] for what cannot be;
/// [`WorkingSetError::Version`] for a set that another program wrote; [`WorkingSetError::TooLarge`]. The set is as
/// before then.
pub fn merge_into(
    path: &Path,
    page_size: u64,
    pages: u64,
    run: &Run,
) -> Result<WorkingSet, WorkingSetError> {
    let empty = WorkingSet::new(page_size, pages)?;
    // Until this function ends.
    let _lock = lock_file(&beside(path, ".lock"))?;
    let mut set = match read_for(path, page_size, pages) {
        Ok(found) => found.unwrap_or(empty),
        Err(error @ (WorkingSetError::File(_) | WorkingSetError::Version { .. })) => {
            return Err(error);
        }
        Err(_) => empty,
    };
    set.merge(run)?;
    let bytes = set.to_bytes();
    // Or nobody would read it.
    if length(bytes.len()) > MAX_SIZE.get() {
        return Err(WorkingSetError::TooLarge { limit: MAX_SIZE });
    }
    replace(path, &bytes)?;
    Ok(set)
}

fn bytes_of(path: &Path, limit: ByteSize) -> Result<Option<Vec<u8>>, WorkingSetError> {
    let file = match open_regular(path) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    bytes_in(file, path, limit).map(Some)
}

fn bytes_in(file: std::fs::File, path: &Path, limit: ByteSize) -> Result<Vec<u8>, WorkingSetError> {
    if size(&file, path)? > limit {
        return Err(WorkingSetError::TooLarge { limit });
    }
    let mut bytes = Vec::new();
    // However much it grows meanwhile.
    file.take(limit.get())
        .read_to_end(&mut bytes)
        .at("read", path)?;
    Ok(bytes)
}

/// Only under the lock: the file beside has one name.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let new = beside(path, ".new");
    match std::fs::remove_file(&new) {
        // Somebody died before the rename.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.at("remove", &new)?,
    }
    let replaced = create_new(&new)?
        .write_all(bytes)
        .at("write", &new)
        .and_then(|()| std::fs::rename(&new, path).at("replace", path));
    if replaced.is_err() {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(&new);
    }
    replaced
}

/// `dir/.name.lock` for `dir/name`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(ending);
    path.with_file_name(name)
}
