//! The files of an image, wherever they are.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::oci::document::Descriptor;
use crate::oci::{MAX_DOCUMENT, OciError, expect};
use crate::sha256::Sha256;
use rekindle_store::file::{FileError, open_regular};

pub(super) enum Blobs {
    /// Files below a directory.
    Directory(PathBuf),
    /// Stretches of one file.
    Archive(Archive),
}

/// An archive that was looked through.
pub(super) struct Archive {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Where each regular file's contents are: offset and length.
    pub(super) places: HashMap<String, (u64, u64)>,
    /// Symbolic and hard links, and what they lead to.
    pub(super) links: HashMap<String, String>,
}

impl Blobs {
    pub(super) fn directory(path: &Path) -> Self {
        Self::Directory(path.to_owned())
    }

    /// Opens a file; names are fixed, or checked digests, or those of an archive.
    pub(super) fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, OciError> {
        let missing = || OciError::Missing {
            name: name.to_owned(),
        };
        match self {
            Self::Directory(directory) => {
                let path = directory.join(name);
                match open_regular(&path) {
                    Ok(file) => Ok(Box::new(file)),
                    Err(error) if error.is_not_found() => Err(missing()),
                    Err(error) => Err(OciError::Read {
                        path,
                        source: plain(error),
                    }),
                }
            }
            Self::Archive(archive) => {
                // One link at the most: `docker save` of old has those, to a layer that two images share.
                let name = archive.links.get(name).map_or(name, String::as_str);
                let (offset, size) = *archive.places.get(name).ok_or_else(missing)?;
                Ok(Box::new(Stretch {
                    file: &archive.file,
                    at: offset,
                    end: offset + size,
                }))
            }
        }
    }

    /// Reads a small file.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>, OciError> {
        let mut bytes = Vec::new();
        let mut stream = self.open(name)?.take(MAX_DOCUMENT + 1);
        stream
            .read_to_end(&mut bytes)
            .map_err(|source| OciError::Read {
                path: self.path().join(name),
                source,
            })?;
        if crate::spool::length(bytes.len()) > MAX_DOCUMENT {
            return Err(OciError::TooLarge {
                name: name.to_owned(),
            });
        }
        Ok(bytes)
    }

    /// Reads a document that nothing says the digest of.
    pub(super) fn document<T: DeserializeOwned>(&self, name: &str) -> Result<T, OciError> {
        parse(&self.bytes(name)?, name)
    }

    /// Reads a document, and compares it with what led to it.
    pub(super) fn verified<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &'static str,
    ) -> Result<T, OciError> {
        let bytes = self.bytes(&descriptor.blob())?;
        let found = crate::spool::length(bytes.len());
        if found != descriptor.size {
            return Err(OciError::Size {
                what,
                digest: descriptor.digest.clone(),
                expected: descriptor.size,
                found,
            });
        }
        expect(what, &descriptor.digest, Sha256::of(&bytes))?;
        parse(&bytes, &format!("{what} {}", descriptor.digest))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Archive(archive) => &archive.path,
        }
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8], name: &str) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|source| OciError::Json {
        name: name.to_owned(),
        source,
    })
}

fn plain(error: FileError) -> io::Error {
    match error {
        FileError::Io { source, .. } | FileError::NoSpace { source, .. } => source,
        other => io::Error::other(other),
    }
}

/// A part of a file.
struct Stretch<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Stretch<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let wanted = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += crate::spool::length(read);
        Ok(read)
    }
}
