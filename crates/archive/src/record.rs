//! What the stream is made of.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use thiserror::Error;

/// The longest name, in bytes, as Linux has it.
pub const MAX_NAME: usize = 255;

/// The longest target of a link, in bytes: a path has 4096 with the zero at its end.
pub const MAX_TARGET: usize = 4095;

/// The most bytes of a file in one record.
pub const MAX_DATA: usize = 64 << 10;

/// The name of an entry in its directory: one part of a path, and never `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(Vec<u8>);

/// What no entry of a directory can be called.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("no entry of a directory has such a name")]
pub struct InvalidName;

impl Name {
    /// The name of these bytes.
    pub fn new(bytes: &[u8]) -> Result<Name, InvalidName> {
        let is_way = matches!(bytes, b"" | b"." | b"..");
        let is_odd = bytes.len() > MAX_NAME || bytes.iter().any(|&b| b == b'/' || b == 0);
        match is_way || is_odd {
            true => Err(InvalidName),
            false => Ok(Name(bytes.to_vec())),
        }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<Path> for Name {
    fn as_ref(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(OsStr::from_bytes(&self.0), f)
    }
}

/// What is known of an entry beside its name and content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions, with setuid, setgid and the sticky bit: at most 0o7777.
    pub mode: u32,
    /// Whose it is.
    pub uid: u32,
    /// Whose group it is.
    pub gid: u32,
    /// When its content last changed: seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds, less than 1,000,000,000.
    pub nanoseconds: u32,
}

/// What is not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// A socket.
    Socket,
    /// A FIFO.
    Fifo,
    /// A block or character device.
    Device,
}

impl fmt::Display for Special {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Special::Socket => "a socket",
            Special::Fifo => "a FIFO",
            Special::Device => "a device",
        })
    }
}

/// One step of a walk through a tree. Only the first entry can have no name: its directory's content is meant then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// A directory, which is entered.
    Directory {
        /// Its name.
        name: Option<Name>,
        /// What else is known of it.
        meta: Meta,
    },
    /// The directory that was entered last is complete.
    Leave,
    /// A file, whose data follows.
    File {
        /// Its name.
        name: Option<Name>,
        /// What else is known of it.
        meta: Meta,
    },
    /// Data of the file.
    Data {
        /// Where, in bytes from the file's beginning; never before the end of earlier data. What is between is a hole.
        offset: u64,
        /// 1 to [`MAX_DATA`] bytes.
        bytes: &'a [u8],
    },
    /// The file is complete.
    FileEnd {
        /// How long it is.
        size: u64,
    },
    /// A symbolic link.
    Link {
        /// Its name.
        name: Option<Name>,
        /// What else is known of it.
        meta: Meta,
        /// Where it leads: 1 to [`MAX_TARGET`] bytes without a zero.
        target: Vec<u8>,
    },
    /// Something that is not copied.
    Skipped {
        /// Its name.
        name: Name,
        /// What it is.
        what: Special,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_part_of_a_path() {
        for fine in [&b"a"[..], b"...", b" ", b"\xff", b"-rf", &[b'x'; 255]] {
            assert_eq!(Name::new(fine).unwrap().as_bytes(), fine);
        }
        for wrong in [
            &b""[..],
            b".",
            b"..",
            b"/",
            b"a/b",
            b"/etc",
            b"a\0",
            &[b'x'; 256],
        ] {
            assert_eq!(Name::new(wrong), Err(InvalidName), "{wrong:?}");
        }
    }
}
