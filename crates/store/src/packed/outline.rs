//! A snapshot whose memory stays in its repository: what must be here to run a copy of it.
//!
//! ```text
//! <directory>/index-0 … index-n   of the snapshot and what it builds on, the base first: where each page is
//!             vmstate, working-set
//!             disks/…             whole, since a disk has nobody who fetches a block when it is read
//! ```

use crate::file::{At, Dir, FileError, create_new};
use crate::flatten::MAX_LAYERS;
use crate::layout::Root;
use crate::manifest::{Manifest, ManifestError};
use crate::packed::cache::Cache;
use crate::packed::fetch::{Fetch, FetchError};
use crate::packed::index::{Index, IndexError, MAX_INDEX};
use crate::packed::pull::{PullError, check_images};
use crate::packed::repository::Repository;
use crate::packed::unpack::{Files, write_file};
use crate::pages::PagesError;
use crate::snapshot::{DISKS, Snapshot, VMSTATE, WORKING_SET};
use std::fs::DirBuilder;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// All of a snapshot but its memory and disks, and where those are.
#[derive(Debug, Clone)]
pub struct Outline {
    /// The base first; never empty.
    indexes: Vec<Arc<Index>>,
}

/// Why a snapshot could not be laid out in a directory, or cannot be read from one.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OutlineError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A chunk of a disk cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// An index cannot be written.
    #[error("cannot write the index of the snapshot")]
    Manifest(#[from] ManifestError),
    /// An index that was written cannot be used.
    #[error("cannot use {}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// Its memory has a size that no memory has.
    #[error("the memory cannot be described")]
    Pages(#[from] PagesError),
}

impl Repository {
    /// What is known of the snapshot that is called `key` there, by name or id, and of all that it builds on. Nothing but
    /// indexes is fetched, and those not if a `cache` has them.
    ///
    /// # Errors
    /// A [`PullError`]; [`PullError::NoImage`] if it stands on a base image that is not under `root`.
    pub fn outline(
        &self,
        root: &Root,
        key: &str,
        cache: Option<&Cache>,
    ) -> Result<Outline, PullError> {
        let (id, _) = self.resolve(key)?;
        let indexes = self.chain(id, key, cache, |_| false)?;
        check_images(root, &indexes)?;
        Ok(Outline { indexes })
    }
}

impl Outline {
    /// What the snapshot says about itself.
    pub fn manifest(&self) -> &Manifest {
        self.tip().manifest()
    }

    /// The indexes of what it builds on, the base first, and its own.
    pub fn indexes(&self) -> &[Arc<Index>] {
        &self.indexes
    }

    fn tip(&self) -> &Arc<Index> {
        self.indexes.last().expect("it has an index")
    }

    /// Writes it into `path`, a directory that it makes anew, and fetches the disks. The memory file is not there.
    ///
    /// # Errors
    /// An [`OutlineError`]. What was written stays.
    pub fn lay(&self, fetch: Fetch<'_>, path: &Path) -> Result<Snapshot, OutlineError> {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).at("remove", path)?;
            }
            _ => make_dir(path)?,
        }
        for (number, index) in self.indexes.iter().enumerate() {
            write_file(&index_path(path, number), &index.to_bytes()?)?;
        }
        let tip = self.tip();
        write_file(&path.join(VMSTATE), tip.vmstate())?;
        if !tip.working_set().is_empty() {
            write_file(&path.join(WORKING_SET), tip.working_set())?;
        }
        self.fetch_disks(fetch, path)?;
        Ok(Snapshot::of_outline(
            Dir::open(path.to_owned())?,
            tip.manifest().clone(),
            tip.pages()?,
        ))
    }

    fn fetch_disks(&self, fetch: Fetch<'_>, path: &Path) -> Result<(), OutlineError> {
        let tip = self.tip();
        if tip.streams().len() == 1 {
            // Nothing else does where all copies fetch little.
            if let Some(cache) = fetch.cache {
                cache.trim();
            }
            return Ok(());
        }
        make_dir(&path.join(DISKS))?;
        let paths = tip.manifest().layers().map(|(file, _)| path.join(file));
        let disks = paths.zip(&tip.streams()[1..]).map(|(path, stream)| {
            let file = create_new(&path)?;
            file.set_len(stream.size.get()).at("write", &path)?;
            Ok(Some((file, path)))
        });
        let all = std::iter::once(Ok(None)).chain(disks);
        let files = Files::new(tip.clone(), all.collect::<Result<_, FileError>>()?);
        fetch.some::<OutlineError>(tip, files.chunks().into_iter(), &|number, raw| {
            Ok(files.write(number, raw)?)
        })
    }

    /// Reads what [`Outline::lay`] wrote of the indexes.
    ///
    /// # Errors
    /// If there is none, or one cannot be used.
    pub fn open(path: &Path) -> Result<Self, OutlineError> {
        let mut indexes = Vec::new();
        while indexes.len() < MAX_LAYERS {
            let path = index_path(path, indexes.len());
            let file = match crate::file::open_regular(&path) {
                Err(error) if error.is_not_found() && !indexes.is_empty() => break,
                other => other?,
            };
            let mut bytes = Vec::new();
            file.take(MAX_INDEX.get())
                .read_to_end(&mut bytes)
                .at("read", &path)?;
            let index = Index::parse(&bytes);
            indexes.push(Arc::new(
                index.map_err(|source| OutlineError::Index { path, source })?,
            ));
        }
        Ok(Self { indexes })
    }
}

fn index_path(path: &Path, number: usize) -> PathBuf {
    path.join(format!("index-{number}"))
}

fn make_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .at("create", path)
}
