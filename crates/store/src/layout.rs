//! The state directory: what stands where, and the names that may stand in it.
//!
//! ```text
//! <root>/
//!   snapshots/<id>/    whole snapshots                      names/<name>  ──► ../snapshots/<id>
//!   tmp/<id>/          snapshots being made, or dying       vms/<name>/   a VM's sockets, logs, record
//!   images/            base images                          assets/       what was fetched or built
//!   cache/             chunks of snapshots elsewhere
//!   installation ──►   its id, in the names of what the host has only once, such as network links
//! ```
//!
//! All of it is one file system: a snapshot is published by a rename from `tmp` to `snapshots`.

use crate::file::{At, FileError};
use crate::installation::{self, InstallationId};
use serde::{Deserialize, Serialize};
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;

/// A state directory that exists, with all its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    path: PathBuf,
    installation: InstallationId,
}

/// Why there is no state directory.
#[derive(Debug, Error)]
pub enum RootError {
    /// It, or one of its parts, could not be made or read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not root, and neither `XDG_STATE_HOME` nor `HOME` says where state belongs.
    #[error(
        "neither XDG_STATE_HOME nor HOME is an absolute path, so there is no default state directory"
    )]
    NoHome,
}

impl Root {
    /// Opens the state directory at `path`; what is missing of it is made, for its owner alone.
    ///
    /// # Errors
    /// [`RootError::File`] if a part of it cannot be made or is no directory.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, RootError> {
        let path = path.as_ref();
        make_dir(path, Parents::Make)?;
        let path = std::fs::canonicalize(path).at("resolve", path)?;
        let installation = installation::ensure(&path)?;
        let root = Self { path, installation };
        for part in [
            root.snapshots(),
            root.names(),
            root.vms(),
            root.uids(),
            root.images(),
            root.assets(),
            root.tmp(),
        ] {
            make_dir(&part, Parents::Expect)?;
        }
        Ok(root)
    }

    /// Where state is kept unless somebody says otherwise: `/var/lib/rekindle` as root, else
    /// `$XDG_STATE_HOME/rekindle`, else `~/.local/state/rekindle`.
    ///
    /// # Errors
    /// [`RootError::NoHome`] if the environment of a user names no home.
    pub fn default_path() -> Result<PathBuf, RootError> {
        let who = if rustix::process::geteuid().is_root() {
            Who::Root
        } else {
            Who::User
        };
        default_path_for(who, env::var_os("XDG_STATE_HOME"), env::var_os("HOME"))
            .ok_or(RootError::NoHome)
    }

    /// The directory itself, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells it from other state directories on this host.
    pub fn installation(&self) -> &InstallationId {
        &self.installation
    }

    /// Whole snapshots, a directory each.
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// Symbolic links from names to snapshots.
    pub fn names(&self) -> PathBuf {
        self.path.join("names")
    }

    /// VMs, a directory each.
    pub fn vms(&self) -> PathBuf {
        self.path.join("vms")
    }

    /// Base images.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }

    /// Fetched and built files: Firecracker, guest kernels.
    pub fn assets(&self) -> PathBuf {
        self.path.join("assets")
    }

    /// Which user is which jailed VM's, a link each.
    pub fn uids(&self) -> PathBuf {
        self.path.join("uids")
    }

    /// Chunks that were fetched from elsewhere; made by whoever fetches first.
    pub fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }

    /// Snapshots that are being made or removed.
    pub fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }

    /// The directory of one VM; it need not exist.
    pub fn vm(&self, name: &VmName) -> PathBuf {
        self.vms().join(name.as_str())
    }

    pub(crate) fn snapshot(&self, id: SnapshotId) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    pub(crate) fn draft(&self, id: SnapshotId) -> PathBuf {
        self.tmp().join(id.to_string())
    }

    pub(crate) fn name(&self, name: &SnapshotName) -> PathBuf {
        self.names().join(name.as_str())
    }
}

enum Who {
    Root,
    User,
}

fn default_path_for(
    who: Who,
    state_home: Option<OsString>,
    home: Option<OsString>,
) -> Option<PathBuf> {
    // The XDG specification: a relative path is to be ignored.
    let absolute = |dir: Option<OsString>| dir.map(PathBuf::from).filter(|dir| dir.is_absolute());
    match who {
        Who::Root => Some("/var/lib/rekindle".into()),
        Who::User => absolute(state_home)
            .or_else(|| absolute(home).map(|home| home.join(".local/state")))
            .map(|state| state.join("rekindle")),
    }
}

#[derive(PartialEq, Eq)]
enum Parents {
    Make,
    Expect,
}

fn make_dir(path: &Path, parents: Parents) -> Result<(), FileError> {
    let made = DirBuilder::new()
        .mode(0o700)
        .recursive(parents == Parents::Make)
        .create(path);
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other.at("create", path),
    }
}

/// The random id of a snapshot, 16 lower-case hex digits as text. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(u64);

/// A text is no snapshot id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a snapshot id is 16 lower-case hex digits")]
pub struct InvalidId;

impl SnapshotId {
    /// A new id.
    ///
    /// # Errors
    /// If the kernel gives no random bytes.
    pub(crate) fn random() -> io::Result<Self> {
        let mut bytes = [0; 8];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // The kernel promises it for up to 256 bytes.
        if filled != bytes.len() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(Self(u64::from_ne_bytes(bytes)))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

impl FromStr for SnapshotId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 16 || !text.bytes().all(hex) {
            return Err(InvalidId);
        }
        u64::from_str_radix(text, 16)
            .map(Self)
            .map_err(|_| InvalidId)
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

/// Why a text cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidName {
    /// Empty, or longer than a socket path leaves room for.
    #[error("a name has 1 to 32 characters, this one has {len}")]
    Length {
        /// How many bytes it has.
        len: usize,
    },
    /// A character that is not allowed.
    #[error("a name is made of a-z, 0-9 and '-', and {found:?} is none of them")]
    Character {
        /// The first such character.
        found: char,
    },
    /// A '-' at an end, where commands would take it for an option.
    #[error("a name neither starts nor ends with '-'")]
    Dash,
    /// The name of a snapshot that could be an id.
    #[error("16 hex digits are a snapshot's id, not a name")]
    LooksLikeId,
}

fn check_name(text: &str) -> Result<(), InvalidName> {
    if let Some(found) = text
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-'))
    {
        return Err(InvalidName::Character { found });
    }
    if !(1..=32).contains(&text.len()) {
        return Err(InvalidName::Length { len: text.len() });
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(InvalidName::Dash);
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $Name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $Name(String);

        impl $Name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $Name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $Name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                let check: fn(&str) -> Result<(), InvalidName> = $check;
                check(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $Name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$Name> for String {
            fn from(name: $Name) -> Self {
                name.0
            }
        }
    };
}

name!(
    /// The name of a VM: 1 to 32 of `a-z`, `0-9` and `-`, no `-` at either end.
    VmName,
    check_name
);

name!(
    /// The name of a snapshot: as a VM's, but never one that could be an id.
    SnapshotName,
    |text| match text.parse::<SnapshotId>() {
        Ok(_) => Err(InvalidName::LooksLikeId),
        Err(InvalidId) => check_name(text),
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_at_the_door() {
        for good in ["a", "web-1", "0", "x-----y", &"a".repeat(32)] {
            assert_eq!(good.parse::<VmName>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<VmName>(), Err(InvalidName::Length { len: 0 }));
        assert_eq!(
            "a".repeat(33).parse::<VmName>(),
            Err(InvalidName::Length { len: 33 })
        );
        assert_eq!("-a".parse::<VmName>(), Err(InvalidName::Dash));
        assert_eq!("a-".parse::<VmName>(), Err(InvalidName::Dash));
        for (bad, found) in [
            ("..", '.'),
            ("a/b", '/'),
            ("A", 'A'),
            ("a\0", '\0'),
            ("ä", 'ä'),
        ] {
            assert_eq!(
                bad.parse::<SnapshotName>(),
                Err(InvalidName::Character { found })
            );
        }
    }

    #[test]
    fn a_snapshot_name_is_never_an_id() {
        assert_eq!(
            "0123456789abcdef".parse::<SnapshotName>(),
            Err(InvalidName::LooksLikeId)
        );
        assert!("0123456789abcdef".parse::<VmName>().is_ok());
        assert!("0123456789abcdeg".parse::<SnapshotName>().is_ok());
    }

    #[test]
    fn names_and_ids_are_checked_when_deserialised() {
        assert!(serde_json::from_str::<VmName>("\"../x\"").is_err());
        assert!(serde_json::from_str::<SnapshotId>("\"0123456789ABCDEF\"").is_err());
        assert!(serde_json::from_str::<SnapshotId>("\"+123456789abcdef\"").is_err());
        let id: SnapshotId = serde_json::from_str("\"00000000000000ff\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"00000000000000ff\"");
    }

    #[test]
    fn the_default_place_follows_user_and_environment() {
        let at = |who, state: Option<&str>, home: Option<&str>| {
            default_path_for(who, state.map(Into::into), home.map(Into::into))
        };
        assert_eq!(
            at(Who::Root, Some("/s"), Some("/h")),
            Some("/var/lib/rekindle".into())
        );
        assert_eq!(
            at(Who::User, Some("/s"), Some("/h")),
            Some("/s/rekindle".into())
        );
        assert_eq!(
            at(Who::User, Some("relative"), Some("/h")),
            Some("/h/.local/state/rekindle".into())
        );
        assert_eq!(at(Who::User, None, Some("")), None);
    }

    #[test]
    fn a_root_is_private_and_opens_twice() {
        use std::os::unix::fs::PermissionsExt;
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path().join("deep/state")).unwrap();
        assert_eq!(Root::open(root.path()).unwrap(), root);
        for part in [
            root.path().to_owned(),
            root.snapshots(),
            root.names(),
            root.vms(),
            root.uids(),
            root.images(),
            root.tmp(),
        ] {
            assert_eq!(
                part.metadata().unwrap().permissions().mode() & 0o777,
                0o700,
                "{}",
                part.display()
            );
        }
    }

    #[test]
    fn a_file_where_a_part_belongs_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::write(temp.path().join("snapshots"), "").unwrap();
        let error = Root::open(temp.path()).unwrap_err();
        assert!(error.to_string().ends_with("snapshots"), "{error}");
    }
}
