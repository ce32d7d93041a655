//! An image in the making.

use super::record::{self, Config, RECORD_VERSION, Record};
use super::{Image, ImageName, Named};
use crate::digest;
use crate::file::{At, Dir, FileError, create_new, size, sync_dir};
use crate::layout::{Root, SnapshotId};
use jiff::Timestamp;
use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why an image was not published.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// No random name could be had.
    #[error("the kernel gives no random bytes")]
    Random(#[source] io::Error),
    /// The name is what contents are called.
    #[error("64 hex digits are the contents of an image, not a name")]
    LooksLikeContents,
    /// What is recorded cannot be written.
    #[error("the record of the image cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

/// A file that becomes the contents of an image, or vanishes when it is dropped.
#[derive(Debug)]
pub struct Draft {
    root: Root,
    path: PathBuf,
    file: File,
}

impl Draft {
    /// Makes an empty one.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn begin(root: &Root) -> Result<Self, PublishError> {
        // Whoever collects may see it before it is locked. Then another one will do.
        loop {
            let id = SnapshotId::random().map_err(PublishError::Random)?;
            let path = root.tmp().join(format!("{id}.ext4"));
            let file = create_new(&path)?;
            flock(&file, FlockOperation::LockExclusive).at("lock", &path)?;
            if path.exists() {
                return Ok(Self {
                    root: root.clone(),
                    path,
                    file,
                });
            }
        }
    }

    /// The file.
    pub fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Makes it the contents behind `name`, of which it says where they came from and what to run.
    ///
    /// # Errors
    /// A [`PublishError`]; the name leads to what it led to before.
    pub fn publish(
        self,
        name: &ImageName,
        source: &str,
        source_digest: Option<String>,
        config: Config,
    ) -> Result<Named, PublishError> {
        if name.digest().is_some() {
            return Err(PublishError::LooksLikeContents);
        }
        let size = size(&self.file, &self.path)?;
        fchmod(&self.file, Mode::RUSR | Mode::RGRP | Mode::ROTH).at("protect", &self.path)?;
        self.file.sync_all().at("sync", &self.path)?;
        let digest = digest::of_file(&self.file, size).at("read", &self.path)?;
        let contents = ImageName::of(digest);
        let record = Record {
            format_version: RECORD_VERSION,
            image: digest,
            size,
            built: Timestamp::now(),
            source: source.to_owned(),
            source_digest,
            config,
        };
        let mut json = serde_json::to_vec_pretty(&record)?;
        json.push(b'\n');
        let place = contents.path(&self.root);
        // Nobody collects contents that have no name yet.
        let _lock = lock(&self.root)?;
        // The same contents over the same contents, or over what was damaged.
        std::fs::rename(&self.path, &place).at("publish", &place)?;
        replace(&record::path(&self.root, name), &json)?;
        sync_dir(self.root.images())?;
        Ok(Named {
            name: name.clone(),
            image: Image {
                name: contents,
                path: place,
                size,
            },
            record: Some(record),
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // It is not there any more once it is published; otherwise what is left has no lock, and is collected.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Writes a whole file in place of what stands there.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    // Under the lock, so what stands there was left by a builder that died.
    let next = path.with_extension("json.next");
    let _ = std::fs::remove_file(&next);
    let mut file = create_new(&next)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .at("write", &next)
        .and_then(|()| std::fs::rename(&next, path).at("publish", path));
    if written.is_err() {
        let _ = std::fs::remove_file(&next);
    }
    written
}

/// Names and contents change under this lock; looking needs none.
pub(super) fn lock(root: &Root) -> Result<Dir, FileError> {
    let dir = Dir::open(root.images())?;
    dir.lock(FlockOperation::LockExclusive)?;
    Ok(dir)
}
