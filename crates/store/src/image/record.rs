//! What is recorded under an image's name.

use crate::digest::Digest;
use crate::file::{At, FileError, open_regular};
use crate::image::ImageName;
use crate::layout::Root;
use crate::unit::ByteSize;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::PathBuf;
use thiserror::Error;

/// The version of the record that this program writes, and the newest that it reads.
pub const RECORD_VERSION: u32 = 1;

/// The largest record that is read, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// What is recorded under an image's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`] of the program that wrote it.
    pub format_version: u32,
    /// The contents, as `b3sum` prints them.
    pub image: Digest,
    /// How large they are, most of it holes.
    pub size: ByteSize,
    /// When the name was built.
    pub built: Timestamp,
    /// What from, in the words of who asked for it.
    pub source: String,
    /// A digest of that, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<String>,
    /// What to run in it.
    #[serde(default)]
    pub config: Config,
}

/// What an image wants to be run in it, in the words of the OCI image specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The program, and its first arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// What follows, unless something else is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Its environment, `NAME=VALUE` each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Where it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Who it runs as: `user` or `uid`, with `:group` or `:gid` if wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Where it listens, `80/tcp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
}

/// Why a record cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is larger than any record is.
    #[error("{} is larger than {MAX_SIZE} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A newer program wrote it.
    #[error("{} has version {found}, and this program reads up to {RECORD_VERSION}", path.display())]
    Future {
        /// The file.
        path: PathBuf,
        /// The version that it has.
        found: u32,
    },
    /// It is no record.
    #[error("{} is no record of an image", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// Where the record of that name is, if there is one.
pub(super) fn path(root: &Root, name: &ImageName) -> PathBuf {
    root.images().join(format!("{name}.json"))
}

/// The record of that name; nothing if there is none.
pub(super) fn read(root: &Root, name: &ImageName) -> Result<Option<Record>, RecordError> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let path = path(root, name);
    let file = match open_regular(&path) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_SIZE + 1)
        .read_to_end(&mut bytes)
        .at("read", &path)?;
    if crate::unit::length(bytes.len()) > MAX_SIZE {
        return Err(RecordError::TooLarge { path });
    }
    if let Ok(Version { format_version }) = serde_json::from_slice(&bytes)
        && format_version > RECORD_VERSION
    {
        return Err(RecordError::Future {
            path,
            found: format_version,
        });
    }
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| RecordError::Json { path, source })
}
