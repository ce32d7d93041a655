//! Root images: contents that never change, and names that lead to them.
//!
//! ```text
//! images/
//!   <64 hex digits>.ext4   contents, named by their BLAKE3, read-only: whoever builds on them finds them as they were
//!   debian.json            a name: which contents, what they were made from, what to run in them
//!   base.ext4              contents without a name of their own, as older programs built them
//! tmp/
//!   <16 hex digits>.ext4   being built, locked by the builder
//! ```
//!
//! A name is one file, replaced by rename: it leads to the old contents or to the new ones. VMs and snapshots refer to
//! contents, so building a name anew changes nothing for them.

mod build;
mod record;
mod remove;

use crate::digest::Digest;
use crate::file::{At, FileError, open_regular, size};
use crate::layout::Root;
use crate::manifest::field::InvalidField;
use crate::unit::ByteSize;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

pub use build::{Draft, PublishError};
pub use record::{Config, RECORD_VERSION, Record, RecordError};
pub use remove::{Mode, RemoveError, User, Users, collect, nameless_in_use, remove, snapshots_on};

/// The name of an image, or of the file with its contents: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(String);

/// Contents that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The name of the file, without `.ext4`.
    pub name: ImageName,
    /// The file.
    pub path: PathBuf,
    /// How large it is.
    pub size: ByteSize,
}

/// A name, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: ImageName,
    /// The contents.
    pub image: Image,
    /// What is recorded; nothing of an image that an older program built.
    pub record: Option<Record>,
}

/// An entry of a list of names.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: ImageName,
    /// What is behind it, or why it leads to nothing.
    pub found: Result<Named, FindError>,
}

/// Why a name leads to no image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FindError {
    /// There is no such name.
    #[error("there is no image {name}")]
    NoSuchName {
        /// The name.
        name: ImageName,
    },
    /// What is recorded under the name cannot be used.
    #[error("the image {name} cannot be used; build it anew")]
    Record {
        /// The name.
        name: ImageName,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// The contents are not there any more.
    #[error("the contents of the image {name} are gone: there is no {}; build it anew", path.display())]
    Gone {
        /// The name.
        name: ImageName,
        /// Where they should be.
        path: PathBuf,
    },
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// All names, sorted, each with what is behind it or why it leads to nothing.
///
/// # Errors
/// If the directory cannot be read.
pub fn list(root: &Root) -> Result<Vec<Listed>, FileError> {
    let dir = root.images();
    let mut names = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let file_name = entry.at("list", &dir)?.file_name();
        let name = file_name.to_str().and_then(|file| {
            let stem = file.strip_suffix(".ext4").or(file.strip_suffix(".json"))?;
            stem.parse::<ImageName>().ok()
        });
        names.extend(name.filter(|name| name.digest().is_none()));
    }
    names.sort();
    names.dedup();
    let listed = names.into_iter().map(|name| Listed {
        found: named(root, &name),
        name,
    });
    // Removed since, or something else of that name.
    Ok(listed
        .filter(|listed| {
            !matches!(
                listed.found,
                Err(FindError::NoSuchName { .. } | FindError::File(FileError::NotRegular { .. }))
            )
        })
        .collect())
}

/// What is behind a name.
///
/// # Errors
/// A [`FindError`], which says what is wrong with the name.
pub fn named(root: &Root, name: &ImageName) -> Result<Named, FindError> {
    let record = record::read(root, name).map_err(|source| FindError::Record {
        name: name.clone(),
        source,
    })?;
    let contents = match &record {
        Some(record) => ImageName::of(record.image),
        None => name.clone(),
    };
    let image = find(root, &contents).map_err(|error| match (error.is_not_found(), &record) {
        (true, None) => FindError::NoSuchName { name: name.clone() },
        (true, Some(_)) => FindError::Gone {
            name: name.clone(),
            path: contents.path(root),
        },
        _ => error.into(),
    })?;
    Ok(Named {
        name: name.clone(),
        image,
        record,
    })
}

/// The contents in the file of that name.
///
/// # Errors
/// If there are none ([`FileError::is_not_found`]), or what stands there is no regular file.
pub fn find(root: &Root, name: &ImageName) -> Result<Image, FileError> {
    let path = name.path(root);
    let size = size(&open_regular(&path)?, &path)?;
    Ok(Image {
        name: name.clone(),
        path,
        size,
    })
}

impl ImageName {
    /// The name of the file with those contents.
    pub fn of(contents: Digest) -> Self {
        Self(contents.to_string())
    }

    /// Which contents the file of that name has, if it is named after them.
    pub fn digest(&self) -> Option<Digest> {
        Digest::try_from(self.0.clone()).ok()
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the image of that name is, if there is one.
    pub fn path(&self, root: &Root) -> PathBuf {
        root.images().join(format!("{}.ext4", self.0))
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ImageName {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let first = text.chars().next().ok_or(InvalidField::Empty)?;
        if text.len() > 64 {
            return Err(InvalidField::TooLong {
                len: text.len(),
                max: 64,
            });
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        match text.chars().find(|&c| !allowed(c)) {
            Some(found) => Err(InvalidField::Character { found }),
            None if !first.is_ascii_alphanumeric() => Err(InvalidField::Character { found: first }),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for ImageName {
    type Error = InvalidField;

    fn try_from(text: String) -> Result<Self, InvalidField> {
        text.parse()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn image_names_cannot_leave_the_directory() {
        for good in ["debian", "Debian-12.5_x86"] {
            assert!(good.parse::<ImageName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a\0"] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_regular_files_with_a_proper_name_are_images() {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path()).unwrap();
        let contents = format!("{}.ext4", Digest::of(b"x"));
        for name in ["b.ext4", "a.ext4", "a.ext4.part", ".x.ext4", &contents] {
            std::fs::write(root.images().join(name), "12345").unwrap();
        }
        symlink("/etc/passwd", root.images().join("evil.ext4")).unwrap();
        let found: Vec<_> = list(&root)
            .unwrap()
            .into_iter()
            .map(|listed| (listed.name.0, listed.found.unwrap().image.size.get()))
            .collect();
        assert_eq!(found, [("a".to_owned(), 5), ("b".to_owned(), 5)]);
        assert!(matches!(
            named(&root, &"evil".parse().unwrap()),
            Err(FindError::File(FileError::NotRegular { .. }))
        ));
        assert!(matches!(
            named(&root, &"none".parse().unwrap()),
            Err(FindError::NoSuchName { .. })
        ));
    }

    fn build(root: &Root, name: &str, contents: &[u8]) -> Named {
        let mut draft = Draft::begin(root).unwrap();
        draft.file().write_all(contents).unwrap();
        draft
            .publish(&name.parse().unwrap(), "a test", None, Config::default())
            .unwrap()
    }

    fn names(root: &Root) -> Vec<String> {
        let entries = root.images().read_dir().unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn building_a_name_anew_leaves_the_old_contents_as_they_were() {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path()).unwrap();
        let old = build(&root, "web", b"one");
        assert_eq!(
            build(&root, "web", b"one").image,
            old.image,
            "the same contents"
        );
        let new = build(&root, "web", b"two");
        assert_ne!(old.image.path, new.image.path);
        assert_eq!(std::fs::read(&old.image.path).unwrap(), b"one");
        assert_eq!(named(&root, &new.name).unwrap(), new);
        let mode = std::fs::metadata(&new.image.path)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o444);
        assert_eq!(root.tmp().read_dir().unwrap().count(), 0);

        // Nothing needs the old ones, but for a VM that says so.
        let needs = old.image.name.clone();
        let users = |name: &ImageName| match *name == needs {
            true => Ok(vec![User::Vm("a".into())]),
            false => Ok(Vec::new()),
        };
        let nothing: [PathBuf; 0] = [];
        assert_eq!(collect(&root, Mode::Reclaim, &users).unwrap(), nothing);
        let collected = collect(&root, Mode::Reclaim, &|_| Ok(Vec::new())).unwrap();
        assert_eq!(collected, [old.image.path]);
        assert_eq!(names(&root).len(), 2, "the new contents, and their name");
    }

    #[test]
    fn the_last_name_of_what_is_needed_stays_and_what_is_not_goes_with_it() {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path()).unwrap();
        let one = build(&root, "one", b"same");
        build(&root, "two", b"same");
        let needed = |_: &ImageName| Ok(vec![User::Vm("web1".into())]);
        remove(&root, &one.name, &needed).unwrap();
        let two = "two".parse().unwrap();
        let refusal = remove(&root, &two, &needed).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the image two is needed by the VM web1"
        );
        remove(&root, &two, &|_| Ok(Vec::new())).unwrap();
        assert!(names(&root).is_empty());
        assert!(matches!(
            remove(&root, &two, &|_| Ok(Vec::new())),
            Err(RemoveError::Find(FindError::NoSuchName { .. }))
        ));
    }

    #[test]
    fn a_draft_that_is_given_up_or_whose_builder_died_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path()).unwrap();
        drop(Draft::begin(&root).unwrap());
        assert_eq!(root.tmp().read_dir().unwrap().count(), 0);
        let left = root.tmp().join("0123456789abcdef.ext4");
        std::fs::write(&left, "half").unwrap();
        let lives = Draft::begin(&root).unwrap();
        let nobody = |_: &ImageName| Ok(Vec::new());
        let reported = collect(&root, Mode::Report, &nobody).unwrap();
        assert_eq!(reported.as_slice(), std::slice::from_ref(&left));
        assert_eq!(collect(&root, Mode::Reclaim, &nobody).unwrap(), [left]);
        drop(lives);
    }

    #[test]
    fn a_record_that_was_damaged_is_said_to_be_so() {
        let temp = tempfile::tempdir().unwrap();
        let root = Root::open(temp.path()).unwrap();
        let web = build(&root, "web", b"one");
        std::fs::remove_file(&web.image.path).unwrap();
        assert!(matches!(
            named(&root, &web.name),
            Err(FindError::Gone { .. })
        ));
        for bad in ["", "{}", "[1]", "{\"format_version\": 9}"] {
            std::fs::write(root.images().join("web.json"), bad).unwrap();
            assert!(
                matches!(named(&root, &web.name), Err(FindError::Record { .. })),
                "{bad}"
            );
        }
    }
}
