//! What tells one state directory from others on the same host: a random id, in the names of all that the host has only
//! once, such as network links.

use std::fmt;
use std::fs::read_link;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::file::{At, FileError};

/// A symbolic link to nowhere, whose target is the id: it is made whole or not at all, and never changes.
const LINK: &str = "installation";
const LENGTH: usize = 5;
/// 32 characters that nobody confuses.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The id of a state directory: 5 characters of `0-9a-z`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstallationId(String);

impl InstallationId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn random() -> io::Result<InstallationId> {
        let mut bytes = [0; LENGTH];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let text = bytes.map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()]));
        Ok(InstallationId(text.iter().collect()))
    }
}

impl fmt::Display for InstallationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InstallationId {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<InstallationId> {
        if text.len() == LENGTH && text.bytes().all(|byte| ALPHABET.contains(&byte)) {
            return Ok(InstallationId(text.to_owned()));
        }
        let what = "its target is not 5 characters of 0-9 and a-z";
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// The id of the state directory at `root`. Whoever asks first makes it; all who ask get the same.
pub(crate) fn ensure(root: &Path) -> Result<InstallationId, FileError> {
    let path = root.join(LINK);
    match read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        known => return known.at("read", &path),
    }
    let id = InstallationId::random().at("make an id for", &path)?;
    match symlink(id.as_str(), &path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => read(&path).at("read", &path),
        made => made.map(|()| id).at("create", &path),
    }
}

fn read(path: &Path) -> io::Result<InstallationId> {
    read_link(path)?.to_str().unwrap_or_default().parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_who_ask_get_the_same_id() {
        let place = tempfile::tempdir().unwrap();
        let ids: Vec<InstallationId> = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| ensure(place.path()).unwrap()))
                .collect();
            asking.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(ensure(place.path()).unwrap(), ids[0]);
    }

    #[test]
    fn what_is_no_id_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let link = place.path().join(LINK);
        for bad in ["abcd", "abcdef", "../ab", "ABCDE"] {
            symlink(bad, &link).unwrap();
            assert!(ensure(place.path()).is_err(), "{bad:?}");
            std::fs::remove_file(&link).unwrap();
        }
        std::fs::write(&link, "abcde").unwrap();
        assert!(ensure(place.path()).is_err());
    }
}
