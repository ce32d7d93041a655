//! A directory of the host as an image.
//!
//! Links are not followed, and hard links stay what they are. Sockets are left out: they mean nothing to anybody but
//! who made them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;
use thiserror::Error;

use crate::archive::{ArchiveError, Layers, is_kept_attribute};
use crate::tree::{Body, Device, Inode, Meta, Time};

/// The longest list of extended attributes, and the longest of them, in bytes: what Linux allows.
const MAX_XATTR: usize = 64 * 1024;

/// Why a directory cannot be an image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Something in it cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It has something that an image cannot have.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// Who owns the files of an image that is made from a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Owner {
    /// Who owns them on this host.
    #[default]
    Kept,
    /// This user and group.
    Ids(u32, u32),
}

struct Walk<'a> {
    layers: &'a mut Layers,
    owner: Owner,
    /// The first path in the image of each file that has several, by device and inode.
    linked: HashMap<(u64, u64), Vec<u8>>,
}

/// Puts all that is in a directory into an image.
pub(crate) fn apply(path: &Path, owner: Owner, layers: &mut Layers) -> Result<(), DirectoryError> {
    layers.next_layer();
    let mut walk = Walk {
        layers,
        owner,
        linked: HashMap::new(),
    };
    // What was asked for may be a link.
    let path = std::fs::canonicalize(path).map_err(|e| read(path, e))?;
    walk.visit(&path, b"")
}

impl Walk<'_> {
    fn visit(&mut self, path: &Path, name: &[u8]) -> Result<(), DirectoryError> {
        let metadata = path.symlink_metadata().map_err(|e| read(path, e))?;
        let kind = metadata.file_type();
        let key = (metadata.dev(), metadata.ino());
        if kind.is_socket() {
            return Ok(());
        }
        if let Some(first) = self.linked.get(&key) {
            return Ok(self.layers.link(name, &first.clone())?);
        }
        if metadata.nlink() > 1 && !kind.is_dir() {
            self.linked.insert(key, name.to_owned());
        }
        let body = if kind.is_dir() {
            Body::Directory(BTreeMap::new())
        } else if kind.is_symlink() {
            let target = path.read_link().map_err(|e| read(path, e))?;
            Body::Symlink(target.into_os_string().into_vec())
        } else if kind.is_char_device() {
            Body::Character(device(&metadata))
        } else if kind.is_block_device() {
            Body::Block(device(&metadata))
        } else if kind.is_fifo() {
            Body::Fifo
        } else {
            let file = rekindle_store::file::open_regular(path);
            let mut file = file.map_err(|e| read(path, io::Error::other(e)))?;
            self.layers.contents_of(&mut file, metadata.size(), name)?
        };
        let meta = self.meta(path, &metadata)?;
        let is_directory = matches!(body, Body::Directory(_));
        self.layers.put(name, Inode { body, meta })?;
        if is_directory {
            let entries = path.read_dir().map_err(|e| read(path, e))?;
            let mut names = entries
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()
                .map_err(|e| read(path, e))?;
            // The first of several names is always the same one.
            names.sort();
            for entry in names {
                let below = [name, b"/", entry.as_bytes()].concat();
                self.visit(&path.join(&entry), &below)?;
            }
        }
        Ok(())
    }

    fn meta(&self, path: &Path, metadata: &Metadata) -> Result<Meta, DirectoryError> {
        let (uid, gid) = match self.owner {
            Owner::Kept => (metadata.uid(), metadata.gid()),
            Owner::Ids(uid, gid) => (uid, gid),
        };
        Ok(Meta {
            mode: u16::try_from(metadata.mode() & 0o7777).unwrap_or_default(),
            uid,
            gid,
            mtime: Time {
                seconds: metadata.mtime(),
                nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or_default(),
            },
            xattrs: attributes(path).map_err(|e| read(path, e.into()))?,
        })
    }
}

fn attributes(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    let mut found = BTreeMap::new();
    let mut buffer = vec![0; MAX_XATTR];
    let length = match llistxattr(path, &mut buffer) {
        Err(Errno::NOTSUP) => return Ok(found),
        other => other?,
    };
    let names = buffer[..length]
        .split(|byte| *byte == 0)
        .map(<[u8]>::to_vec);
    for name in names.collect::<Vec<_>>() {
        let Ok(c_name) = CString::new(name.clone()) else {
            continue;
        };
        if is_kept_attribute(&name) {
            let length = lgetxattr(path, &c_name, &mut buffer)?;
            found.insert(name, buffer[..length].to_vec());
        }
    }
    Ok(found)
}

fn device(metadata: &Metadata) -> Device {
    Device {
        major: major(metadata.rdev()),
        minor: minor(metadata.rdev()),
    }
}

fn read(path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Read {
        path: path.to_owned(),
        source,
    }
}
