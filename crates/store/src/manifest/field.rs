//! The texts and paths that a manifest may hold, each checked once, when it is read or made.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use thiserror::Error;

/// Why a text cannot be what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidField {
    /// It has nothing in it.
    #[error("it is empty")]
    Empty,
    /// It is too long.
    #[error("it has {len} bytes, and {max} are allowed")]
    TooLong {
        /// How many bytes it has.
        len: usize,
        /// How many it may have.
        max: usize,
    },
    /// A character that is not allowed: NUL, a control character, or one with a meaning elsewhere.
    #[error("{found:?} is not allowed in it")]
    Character {
        /// The first such character.
        found: char,
    },
    /// An absolute path where only a relative one belongs.
    #[error("the path is absolute")]
    Absolute,
    /// A relative path where only an absolute one belongs.
    #[error("the path is relative")]
    Relative,
    /// A path with `.`, `..` or an empty component, which could climb.
    #[error("the path has a component that is empty, '.' or '..'")]
    Climbs,
    /// Not six pairs of hex digits.
    #[error("a MAC address is six pairs of hex digits with ':' between them")]
    MacAddress,
}

fn bounded(text: &str, max: usize) -> Result<(), InvalidField> {
    match text.len() {
        len if len > max => Err(InvalidField::TooLong { len, max }),
        _ => Ok(()),
    }
}

fn only(text: &str, allowed: impl Fn(char) -> bool) -> Result<(), InvalidField> {
    text.chars()
        .find(|&c| !allowed(c))
        .map_or(Ok(()), |found| Err(InvalidField::Character { found }))
}

fn printable(text: &str, max: usize) -> Result<(), InvalidField> {
    bounded(text, max)?;
    only(text, |c| !c.is_control())
}

fn plain_components(path: &str) -> Result<(), InvalidField> {
    match path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        true => Err(InvalidField::Climbs),
        false => Ok(()),
    }
}

fn check_device_id(text: &str) -> Result<(), InvalidField> {
    if text.is_empty() {
        return Err(InvalidField::Empty);
    }
    bounded(text, 64)?;
    only(text, |c| c.is_ascii_alphanumeric() || c == '_')
}

fn check_relative(text: &str) -> Result<(), InvalidField> {
    if text.is_empty() {
        return Err(InvalidField::Empty);
    }
    printable(text, 1024)?;
    if text.starts_with('/') {
        return Err(InvalidField::Absolute);
    }
    plain_components(text)
}

fn check_host_path(text: &str) -> Result<(), InvalidField> {
    printable(text, 4095)?;
    plain_components(text.strip_prefix('/').ok_or(InvalidField::Relative)?)
}

fn check_interface(text: &str) -> Result<(), InvalidField> {
    if text.is_empty() {
        return Err(InvalidField::Empty);
    }
    bounded(text, 15)?;
    if matches!(text, "." | "..") {
        return Err(InvalidField::Climbs);
    }
    only(text, |c| c.is_ascii_graphic() && c != '/')
}

fn check_mac(text: &str) -> Result<(), InvalidField> {
    let pair = |part: &str| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    match text.split(':').count() == 6 && text.split(':').all(pair) {
        true => Ok(()),
        false => Err(InvalidField::MacAddress),
    }
}

fn check_note(text: &str) -> Result<(), InvalidField> {
    bounded(text, 16 * 1024)?;
    only(text, |c| !c.is_control() || matches!(c, '\n' | '\t'))
}

macro_rules! field {
    ($(#[$doc:meta])* $Name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $Name(String);

        impl $Name {
            /// The text itself.
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
            type Err = InvalidField;

            fn from_str(text: &str) -> Result<Self, InvalidField> {
                Self::try_from(text.to_owned())
            }
        }

        impl TryFrom<String> for $Name {
            type Error = InvalidField;

            fn try_from(text: String) -> Result<Self, InvalidField> {
                $check(&text).map(|()| Self(text))
            }
        }

        impl From<$Name> for String {
            fn from(field: $Name) -> Self {
                field.0
            }
        }
    };
}

field!(
    /// The id of a drive or an interface: 1 to 64 letters, digits and `_`, as Firecracker allows.
    DeviceId,
    check_device_id
);
field!(
    /// A path below a directory: relative, no `.` or `..`, no control characters, at most 1024 bytes.
    RelativePath,
    check_relative
);
field!(
    /// A path of the host: absolute, no `.` or `..`, no control characters, at most 4095 bytes.
    HostPath,
    check_host_path
);
field!(
    /// The name of a network device of the host, at most 15 bytes.
    InterfaceName,
    check_interface
);
field!(
    /// A MAC address, `06:00:ac:10:00:02`.
    MacAddress,
    check_mac
);
field!(
    /// A line of text without control characters, at most 4096 bytes.
    Text,
    |text: &str| printable(text, 4096)
);
field!(
    /// Lines of text, at most 16 KiB.
    #[derive(Default)]
    Note,
    check_note
);

impl AsRef<Path> for RelativePath {
    fn as_ref(&self) -> &Path {
        self.0.as_ref()
    }
}

impl AsRef<Path> for HostPath {
    fn as_ref(&self) -> &Path {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_stay_below() {
        for good in ["disk", "disks/rootfs", "a/b/c", "...", "..a"] {
            assert_eq!(good.parse::<RelativePath>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<RelativePath>(), Err(InvalidField::Empty));
        assert_eq!("/disk".parse::<RelativePath>(), Err(InvalidField::Absolute));
        for bad in ["..", "../x", "a/../b", "a/..", ".", "./a", "a//b", "a/"] {
            assert_eq!(
                bad.parse::<RelativePath>(),
                Err(InvalidField::Climbs),
                "{bad}"
            );
        }
        assert_eq!(
            "a\0b".parse::<RelativePath>(),
            Err(InvalidField::Character { found: '\0' })
        );
        assert_eq!(
            "a".repeat(1025).parse::<RelativePath>(),
            Err(InvalidField::TooLong {
                len: 1025,
                max: 1024
            })
        );
    }

    #[test]
    fn host_paths_are_absolute_and_plain() {
        assert!("/boot/vmlinux".parse::<HostPath>().is_ok());
        assert_eq!("boot".parse::<HostPath>(), Err(InvalidField::Relative));
        assert_eq!("".parse::<HostPath>(), Err(InvalidField::Relative));
        for bad in ["/", "/a/../b", "/a//b", "/./a"] {
            assert_eq!(bad.parse::<HostPath>(), Err(InvalidField::Climbs), "{bad}");
        }
    }

    #[test]
    fn texts_cannot_drive_a_terminal() {
        assert_eq!(
            "a\x1b[2J".parse::<Text>(),
            Err(InvalidField::Character { found: '\x1b' })
        );
        assert_eq!(
            "a\nb".parse::<Text>(),
            Err(InvalidField::Character { found: '\n' })
        );
        assert!("a\nb".parse::<Note>().is_ok());
        assert!("a\rb".parse::<Note>().is_err());
    }

    #[test]
    fn ids_and_addresses_are_as_firecracker_takes_them() {
        assert!("rootfs_1".parse::<DeviceId>().is_ok());
        assert!("root-fs".parse::<DeviceId>().is_err());
        assert!("tap0".parse::<InterfaceName>().is_ok());
        for bad in ["", "a/b", "..", "a b", "abcdefghijklmnop"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
        }
        assert!("06:00:ac:10:00:02".parse::<MacAddress>().is_ok());
        for bad in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:0g",
            "06:00:ac:10:00:2",
            "06:00:ac:10:00:02:",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
