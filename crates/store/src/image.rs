//! Base images: `images/<name>.ext4`, shared read-only by whoever boots from them.

use crate::file::{At, FileError, open_regular, size};
use crate::layout::Root;
use crate::manifest::field::InvalidField;
use crate::unit::ByteSize;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The name of a base image: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName(String);

/// A base image that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// Its file.
    pub path: PathBuf,
    /// How large it is.
    pub size: ByteSize,
}

/// All base images, by name. Other files in the directory are none.
///
/// # Errors
/// If the directory or an image in it cannot be read.
pub fn list(root: &Root) -> Result<Vec<Image>, FileError> {
    let dir = root.images();
    let mut images = Vec::new();
    for entry in dir.read_dir().at("list", &dir)? {
        let file_name = entry.at("list", &dir)?.file_name();
        let name = file_name
            .to_str()
            .and_then(|name| name.strip_suffix(".ext4"))
            .and_then(|name| name.parse().ok());
        let Some(name) = name else { continue };
        match find(root, &name) {
            Ok(image) => images.push(image),
            // Removed since, or something else of that name.
            Err(error) if error.is_not_found() => {}
            Err(FileError::NotRegular { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

/// The base image of that name.
///
/// # Errors
/// If there is none ([`FileError::is_not_found`]), or what stands there is no regular file.
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
    use std::os::unix::fs::symlink;

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
        for name in ["b.ext4", "a.ext4", "a.ext4.part", ".x.ext4"] {
            std::fs::write(root.images().join(name), "12345").unwrap();
        }
        symlink("/etc/passwd", root.images().join("evil.ext4")).unwrap();
        let found: Vec<_> = list(&root)
            .unwrap()
            .into_iter()
            .map(|image| (image.name.0, image.size.get()))
            .collect();
        assert_eq!(found, [("a".to_owned(), 5), ("b".to_owned(), 5)]);
        assert!(matches!(
            find(&root, &"evil".parse().unwrap()),
            Err(FileError::NotRegular { .. })
        ));
        assert!(
            find(&root, &"none".parse().unwrap())
                .unwrap_err()
                .is_not_found()
        );
    }
}
