//! From a source to an image under its name.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rekindle_store::Root;
use rekindle_store::image::{Config, Draft, ImageName, Named, PublishError};
use thiserror::Error;

use crate::archive::{ArchiveError, Layers};
use crate::decompress::decompress;
use crate::directory::{self, DirectoryError, Owner};
use crate::ext4::{self, Ext4Error, Options};
use crate::limits::Limits;
use crate::oci::{self, Form, OciError};
use crate::sha256::Hashing;
use crate::spool::Spool;
use crate::tree::{Body, Inode, Layer, Meta, Tree};

/// What is read to make an image; what has to be fetched was fetched before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A directory of the host.
    Directory(PathBuf),
    /// A tar archive, plain or packed by gzip, xz or zstd.
    Tar(PathBuf),
    /// An OCI image layout.
    OciLayout {
        /// The directory.
        directory: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// An archive of `docker save`.
    DockerArchive {
        /// The file.
        file: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
}

/// An image that is to be built.
#[derive(Debug, Clone)]
pub struct Build {
    /// Its name.
    pub name: ImageName,
    /// What it is made from.
    pub input: Input,
    /// The same, for people.
    pub source: String,
    /// What to run in it, where the input does not say.
    pub config: Config,
    /// Who owns the files of a directory.
    pub owner: Owner,
    /// How much may be read.
    pub limits: Limits,
    /// At least this large, in bytes; there are 64 MiB free in any case.
    pub min_size: u64,
}

/// Why an image was not built. The name leads to what it led to before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no place for what is read.
    #[error("cannot make a file in {}", path.display())]
    Spool {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The host's disk is full.
    #[error("no space left in {}", path.display())]
    NoSpace {
        /// The state directory.
        path: PathBuf,
    },
    /// An archive cannot be used.
    #[error("cannot use {}", path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ArchiveError,
    },
    /// A directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// An OCI image cannot be used.
    #[error(transparent)]
    Oci(#[from] OciError),
    /// The file system cannot be written.
    #[error(transparent)]
    Ext4(#[from] Ext4Error),
    /// The image cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Build {
    /// One with the usual limits.
    #[must_use]
    pub fn new(name: ImageName, input: Input, source: impl Into<String>) -> Self {
        Self {
            name,
            input,
            source: source.into(),
            config: Config::default(),
            owner: Owner::Kept,
            limits: Limits::default(),
            min_size: 0,
        }
    }

    /// Builds it. Nothing is left of one that fails or is killed, and the name leads to the whole image or to what it
    /// led to before.
    ///
    /// # Errors
    /// A [`BuildError`].
    pub fn run(self, root: &Root) -> Result<Named, BuildError> {
        let place = root.path().to_owned();
        self.build(root).map_err(|error| {
            if is_full(&error) {
                return BuildError::NoSpace { path: place };
            }
            error
        })
    }

    fn build(self, root: &Root) -> Result<Named, BuildError> {
        if self.name.digest().is_some() {
            return Err(PublishError::LooksLikeContents.into());
        }
        let tmp = root.tmp();
        let spool = Spool::new(&tmp).map_err(|source| BuildError::Spool { path: tmp, source })?;
        let mut layers = Layers::new(spool, self.limits);
        let mut config = self.config;
        let mut oci = |form, path: &Path, tag: &Option<String>, layers: &mut Layers| {
            let about = oci::apply(form, path, tag.as_deref(), self.limits, layers)?;
            config = about.program;
            Ok::<_, OciError>(Some(about.digest.to_string()))
        };
        let digest = match &self.input {
            Input::Directory(path) => {
                directory::apply(path, self.owner, &mut layers)?;
                None
            }
            Input::Tar(path) => Some(tar(path, &mut layers)?),
            Input::OciLayout { directory, tag } => oci(Form::Layout, directory, tag, &mut layers)?,
            Input::DockerArchive { file, tag } => oci(Form::DockerArchive, file, tag, &mut layers)?,
        };
        let (mut tree, spool) = layers.into_parts();
        mount_points(&mut tree);
        let mut draft = Draft::begin(root)?;
        let options = Options {
            min_size: self.min_size,
        };
        ext4::write(tree, &spool, draft.file(), options)?;
        Ok(draft.publish(&self.name, &self.source, digest, config)?)
    }
}

/// What a guest mounts something on; images that were made for containers may not have it.
const MOUNT_POINTS: [(&str, u16); 5] = [
    ("dev", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

fn mount_points(tree: &mut Tree) {
    for (name, mode) in MOUNT_POINTS {
        if tree.find(name.as_bytes()).is_none() {
            let directory = Inode {
                body: Body::Directory(std::collections::BTreeMap::new()),
                meta: Meta::root(mode),
            };
            // Directly below the root, so there is nothing that it could lead through.
            let _ = tree.put(name.as_bytes(), directory, Layer(0));
        }
    }
}

fn tar(path: &Path, layers: &mut Layers) -> Result<String, BuildError> {
    let read = |source| BuildError::Read {
        path: path.to_owned(),
        source,
    };
    let fail = |source| BuildError::Archive {
        path: path.to_owned(),
        source,
    };
    let mut packed = Hashing::new(File::open(path).map_err(read)?);
    let mut stream = decompress(&mut packed).map_err(read)?;
    layers.apply(&mut stream).map_err(fail)?;
    // What comes after the archive's end must be whole as well.
    layers.skip_rest(&mut stream).map_err(fail)?;
    drop(stream);
    io::copy(&mut packed, &mut io::sink()).map_err(read)?;
    Ok(packed.finish().0.to_string())
}

/// Whether the reason is a disk without room, wherever it was met.
fn is_full(error: &BuildError) -> bool {
    let mut reason: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = reason {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        {
            return true;
        }
        if let Some(Ext4Error::NoSpace) = error.downcast_ref() {
            return true;
        }
        reason = error.source();
    }
    false
}

#[cfg(test)]
mod tests;
