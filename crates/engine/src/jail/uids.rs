//! A user for each jailed VM, that no other VM of this state directory has: a link a user, whose making the kernel lets one succeed.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::JAIL;
use crate::vm::dir::VmDir;

/// The name of the variable that overrides which users there are: `FIRST-LAST`.
pub const UIDS_VARIABLE: &str = "REKINDLE_JAIL_UIDS";

/// Above what systemd, containers and subordinate users take for themselves, and below what old programs take for negative.
const DEFAULT: RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;

/// Why there is no user for a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UidError {
    /// The variable holds something else.
    #[error(
        "${UIDS_VARIABLE} is {0:?}; it has to be FIRST-LAST, two user ids above 0, such as 1900000000-1900065535"
    )]
    Range(String),
    /// All are taken.
    #[error("all {0} users of ${UIDS_VARIABLE} have a VM; remove some, or name more users")]
    None(u32),
    /// The file system refused.
    #[error("cannot use {path}")]
    Io {
        /// What was to be used.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> UidError {
    let path = path.to_owned();
    |source| UidError::Io { path, source }
}

/// The users that there are.
fn range() -> Result<RangeInclusive<u32>, UidError> {
    match std::env::var(UIDS_VARIABLE) {
        Ok(text) => parse(&text).ok_or(UidError::Range(text)),
        Err(_) => Ok(DEFAULT),
    }
}

fn parse(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.split_once('-')?;
    let range = first.parse().ok()?..=last.parse().ok()?;
    // The last of all means nobody.
    let is_fit = *range.start() > 0 && !range.is_empty() && *range.end() < u32::MAX;
    is_fit.then_some(range)
}

/// A user that no VM has, for this one.
pub(super) fn take(dir: &VmDir) -> Result<u32, UidError> {
    take_of(dir, &range()?)
}

fn take_of(dir: &VmDir, range: &RangeInclusive<u32>) -> Result<u32, UidError> {
    let folder = dir.uids();
    let count = range.end() - range.start() + 1;
    // Of two that find one whose VM is gone, the second would take away what the first has made of it.
    let alone = fs::File::open(&folder).map_err(at(&folder))?;
    rustix::fs::flock(&alone, FlockOperation::LockExclusive).map_err(|e| at(&folder)(e.into()))?;
    // Begun anywhere, so that as a rule the first is free, and that other installations' are elsewhere.
    let mut begin = [0; 4];
    let _ = rustix::rand::getrandom(&mut begin, rustix::rand::GetRandomFlags::empty());
    let begin = u32::from_ne_bytes(begin) % count;
    for n in 0..count {
        let uid = range.start() + (begin + n) % count;
        let link = folder.join(uid.to_string());
        for _ in 0..2 {
            match symlink(dir.name(), &link) {
                Ok(()) => return Ok(uid),
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(at(&link)(e)),
                Err(_) if is_in_use(dir, uid, &link) => break,
                // Whoever had it was killed before he could give it back.
                Err(_) => drop(fs::remove_file(&link)),
            }
        }
    }
    Err(UidError::None(count))
}

/// Whether the VM that the link names, beside this one, has this user.
fn is_in_use(dir: &VmDir, uid: u32, link: &Path) -> bool {
    let Ok(name) = fs::read_link(link) else {
        return false;
    };
    let other = dir.path().with_file_name(name);
    // One without a jail is just about to get it.
    let jail = other.join(JAIL).metadata();
    other.is_dir() && jail.map_or(true, |jail| jail.uid() == uid)
}

/// Gives back what this VM has.
pub(super) fn free(dir: &VmDir) -> Result<(), UidError> {
    let folder = dir.uids();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(at(&folder)(e)),
    };
    for entry in entries.flatten() {
        let link = entry.path();
        if fs::read_link(&link).is_ok_and(|name| name == Path::new(&dir.name())) {
            fs::remove_file(&link).map_err(at(&link))?;
        }
    }
    Ok(())
}

/// The users of VMs that are not there any more.
pub(super) fn unused(folder: &Path, vms: &Path) -> Result<Vec<PathBuf>, UidError> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let links = entries.flatten().map(|entry| entry.path());
    let is_unused = |link: &PathBuf| fs::read_link(link).is_ok_and(|vm| !vms.join(vm).is_dir());
    Ok(links.filter(is_unused).collect())
}

#[cfg(test)]
mod tests {
    use rekindle_store::Root;

    use super::*;

    #[test]
    fn users_are_a_range_above_root() {
        assert_eq!(parse("5-9"), Some(5..=9));
        for wrong in [
            "",
            "5",
            "0-9",
            "9-5",
            "5-4294967295",
            "a-b",
            "-1-5",
            "5-9-11",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn no_two_vms_have_one_user_and_who_is_gone_has_none() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let make = |name: &str| VmDir::create(&root, &name.parse().unwrap()).unwrap();
        let (a, b) = (make("a"), make("b"));
        let range = 70..=71;
        let first = take_of(&a, &range).unwrap();
        let second = take_of(&b, &range).unwrap();
        assert_ne!(first, second);
        let none = take_of(&a, &range).unwrap_err().to_string();
        assert!(none.contains("all 2 users"), "{none}");
        // As after a kill: the VM is gone, its user was not given back.
        fs::remove_dir_all(b.path()).unwrap();
        assert_eq!(take_of(&a, &range).unwrap(), second);
        free(&a).unwrap();
        assert_eq!(fs::read_dir(a.uids()).unwrap().count(), 0);
    }
}
