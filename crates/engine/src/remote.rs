//! Snapshots that stay in a repository while copies of them run here.
//!
//! ```text
//!   find ─► indexes: what each page and disk is, and where      (nothing else, and not that if the cache has it)
//!   lay  ─► the VM's directory: indexes, vmstate, working set, disks whole
//!   memory: by the VM's page server, a chunk at a time, through the host's cache
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use rekindle_pager::{PackedSource, Prefetch};
use rekindle_store::file::FileError;
use rekindle_store::packed::{Fetch, Outline, OutlineError, PullError};
use rekindle_store::{Manifest, Root, Snapshot};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bucket::{self, Location, Patience, PlaceError, UrlError};

/// Which snapshot, and how it is fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RemoteConfig {
    /// The URL of its repository, a slash, its name there or its id.
    pub url: String,
    /// How long the store may take for one thing, longer for what is large.
    pub patience: Duration,
    /// How much of the disk the cache of chunks may take, about, in MiB.
    pub cache_mib: u64,
    /// What is fetched before the guest asks.
    pub prefetch: Prefetch,
}

impl RemoteConfig {
    /// Two minutes of patience, a cache of 4 GiB, and nothing but the working set ahead.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            patience: Duration::from_secs(120),
            cache_mib: 4096,
            prefetch: Prefetch::default(),
        }
    }
}

/// A snapshot that is somewhere else.
#[derive(Clone, Debug)]
pub struct Remote {
    config: RemoteConfig,
    place: Location,
    outline: Outline,
}

/// Why a snapshot that is somewhere else cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The URL is none.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// Its repository cannot be opened.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The cache cannot be used.
    #[error("cannot use the cache of chunks")]
    Cache(#[source] FileError),
    /// It is not there, or not whole.
    #[error(transparent)]
    Find(#[from] PullError),
    /// What must be here cannot be.
    #[error("cannot lay the snapshot out")]
    Lay(#[from] OutlineError),
}

impl Remote {
    /// Looks for it. Waits for the repository: not for tasks.
    ///
    /// # Errors
    /// A [`RemoteError`].
    pub fn find(root: &Root, config: RemoteConfig) -> Result<Self, RemoteError> {
        let (place, key) = Location::of_snapshot(&config.url)?;
        let repository = bucket::repository(&place, Patience::of(config.patience))?;
        let cache = bucket::cache(root, &place, config.cache_mib).map_err(RemoteError::Cache)?;
        let outline = repository.outline(root, &key, cache.as_ref())?;
        Ok(Self {
            config,
            place,
            outline,
        })
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        self.outline.manifest()
    }

    /// Its URL, by its id, which leads nowhere else ever.
    pub fn url(&self) -> String {
        format!("{}/{}", self.place, self.manifest().id)
    }

    /// How to find it again.
    pub fn config(&self) -> RemoteConfig {
        RemoteConfig {
            url: self.url(),
            ..self.config.clone()
        }
    }

    /// Writes what has to be here into `dir`, and fetches the disks. Waits for the repository.
    pub(crate) fn lay(&self, root: &Root, dir: &Path) -> Result<Snapshot, RemoteError> {
        let objects = bucket::objects(&self.place, Patience::of(self.config.patience))?;
        let cache =
            bucket::cache(root, &self.place, self.config.cache_mib).map_err(RemoteError::Cache)?;
        let fetch = Fetch {
            objects: &*objects,
            cache: cache.as_ref(),
        };
        Ok(self.outline.lay(fetch, dir)?)
    }

    /// The working set that copies on this host share and add to, where nothing else is of this snapshot; at first the one
    /// that came with it, which is `laid`. One that cannot be kept costs the next copy time.
    pub(crate) fn working_set(&self, root: &Root, laid: &Path) -> PathBuf {
        let cache = root.cache();
        let set = cache.join(format!("set-{}", self.manifest().id));
        let _ = std::fs::create_dir_all(&cache);
        // Whole or not at all; and whoever adds to it makes a new file of it.
        let _ = std::fs::hard_link(laid, &set);
        set
    }

    /// What a page server needs to know of it once it is laid out in `outline`.
    pub(crate) fn source(&self, root: &Root, outline: PathBuf) -> PackedSource {
        let cached = matches!(self.place, Location::Bucket { .. });
        PackedSource {
            outline,
            place: self.place.to_string(),
            root: cached.then(|| root.path().to_owned()),
            cache_bytes: self.config.cache_mib.saturating_mul(1 << 20),
            patience: self.config.patience,
            prefetch: self.config.prefetch,
        }
    }
}
