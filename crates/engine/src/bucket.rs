//! Repositories of packed snapshots by URL: in a directory, or in an object store.
//!
//! ```text
//!   file:///directory ─────────► Directory (the store crate)
//!   s3:// gs:// az:// ─────────► Bucket ─► try ─► back off, try again … until the patience ends ─► object_store
//!                                            └─ refused: no rights, no bucket: at once
//! ```
//!
//! A [`Bucket`] speaks to the `object_store` crate; what is here is what that leaves open: when to try again, when to
//! give up, and what to say then. Credentials are taken from the environment by that crate, and are in no message: of
//! what a store says only its code and its one sentence are repeated.

mod patience;
mod refusal;
mod url;

pub use patience::Patience;
pub use refusal::Refusal;
pub use url::{Location, Scheme, UrlError};

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{
    ClientConfigKey, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt as _, PutMode,
    PutPayload, RetryConfig,
};
use rekindle_store::Root;
use rekindle_store::file::FileError;
use rekindle_store::packed::{Cache, Directory, Object, ObjectError, Objects, Put, Repository};
use rekindle_store::unit::ByteSize;
// For its TLS alone, by a feature that object_store leaves to others.
use reqwest as _;
use thiserror::Error;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// How many requests are under way at once: enough to fill a line whose answers take 20 ms, and 64 MiB of packs at the most.
const AT_ONCE: usize = 8;

/// How long it may take until a connection is there.
const CONNECT: &str = "5s";

/// The crate's own limit of a request, which is not to be met: it knows not how much travels.
const LONGEST: &str = "1h";

/// Why a repository cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// The URL is none.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// What the environment says of the store cannot be used.
    #[error("cannot use {url} with what the environment says of it")]
    Settings {
        /// The URL.
        url: String,
        /// What is wrong.
        #[source]
        source: object_store::Error,
    },
    /// There is no thread for it.
    #[error("cannot start a thread for {url}")]
    Runtime {
        /// The URL.
        url: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// The repository at a URL. Nothing is asked of it yet.
///
/// Its calls wait for their answers: they are for threads, not for tasks.
///
/// # Errors
/// A [`PlaceError`].
pub fn repository(location: &Location, patience: Patience) -> Result<Repository, PlaceError> {
    Ok(Repository::of(objects(location, patience)?))
}

/// What the repository at a URL is made of. As [`repository`] otherwise.
///
/// # Errors
/// A [`PlaceError`].
pub fn objects(location: &Location, patience: Patience) -> Result<Box<dyn Objects>, PlaceError> {
    match location {
        Location::Directory(path) => Ok(Box::new(Directory::at(path))),
        Location::Bucket {
            scheme,
            bucket,
            prefix,
        } => {
            let url = location.to_string();
            let bucket = Bucket::open(*scheme, bucket, prefix.clone(), url, patience)?;
            Ok(Box::new(bucket))
        }
    }
}

/// As [`objects`], for a page server.
///
/// # Errors
/// If the URL is none, and a [`PlaceError`].
pub fn open(url: &str, patience: Duration) -> rekindle_pager::Opened {
    Ok(objects(&url.parse()?, Patience::of(patience))?)
}

/// Where under a state directory what is fetched stays, of which it may have about so many MiB; what is in a directory need
/// not.
///
/// # Errors
/// If the cache cannot be made.
pub fn cache(root: &Root, location: &Location, mib: u64) -> Result<Option<Cache>, FileError> {
    match location {
        Location::Directory(_) => Ok(None),
        Location::Bucket { .. } => {
            let limit = ByteSize::new(mib.saturating_mul(1 << 20));
            Ok(Some(Cache::open(root, limit)?))
        }
    }
}

/// A repository in an object store.
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
    patience: Patience,
    /// Whether it has done anything yet.
    known: AtomicBool,
    // Dropped last: what is under way needs it.
    runtime: Runtime,
}

// What the store is told by its environment stays out of it.
impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.url).finish()
    }
}

impl Bucket {
    fn open(
        scheme: Scheme,
        bucket: &str,
        prefix: Path,
        url: String,
        patience: Patience,
    ) -> Result<Self, PlaceError> {
        // The only one of TLS that is linked; another that was installed before is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let settings = |source| PlaceError::Settings {
            url: url.clone(),
            source,
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("objects")
            .enable_all()
            .build()
            .map_err(|source| PlaceError::Runtime {
                url: url.clone(),
                source,
            })?;
        let store = connect(scheme, bucket).map_err(settings)?;
        Ok(Self {
            store,
            prefix,
            url,
            patience,
            known: AtomicBool::new(false),
            runtime,
        })
    }

    fn path(&self, object: &Object) -> Path {
        let parts = object.to_string();
        self.prefix
            .parts()
            .chain(Path::from(parts).parts())
            .collect()
    }

    /// Asks until there is an answer, or the patience is at its end. `size` is how many bytes are to travel, about.
    /// Each try must end by itself.
    fn ask<T, F>(
        &self,
        action: &'static str,
        object: &Object,
        size: u64,
        ask: impl Fn(Path) -> F,
    ) -> Result<T, ObjectError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let path = self.path(object);
        let asked = self.runtime.block_on(async {
            let mut trying = self.patience.begin(size);
            loop {
                let refusal = match ask(path.clone()).await {
                    Ok(answer) => {
                        self.known.store(true, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(error) => Refusal::of(error),
                };
                let refusal = refusal.of_a_store(self.known.load(Ordering::Relaxed));
                match trying.pause_after(&refusal) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(refusal),
                }
            }
        });
        asked.map_err(|refusal| match refusal {
            Refusal::NotThere => ObjectError::Missing {
                url: self.url(object),
            },
            Refusal::Shorter => ObjectError::Length {
                url: self.url(object),
                expected: size,
            },
            refusal => ObjectError::Remote {
                action,
                url: self.url(object),
                source: Box::new(refusal),
            },
        })
    }

    /// A part of an object, or all of it.
    fn fetch(
        &self,
        object: &Object,
        range: Option<Range<u64>>,
        limit: u64,
    ) -> Result<Vec<u8>, ObjectError> {
        let asked = range.as_ref().map(|range| range.end - range.start);
        let answer = self.ask("read", object, asked.unwrap_or_default(), |path| {
            let options = GetOptions {
                range: range.clone().map(GetRange::Bounded),
                ..GetOptions::default()
            };
            async move {
                let result = self.within(0, self.store.get_opts(&path, options)).await?;
                let size = result.range.end - result.range.start;
                if size > limit || asked.is_some_and(|asked| asked != size) {
                    return Ok(None);
                }
                let bytes = self.within(size, body(result, size)).await?;
                Ok(Some(bytes))
            }
        })?;
        answer.ok_or_else(|| ObjectError::Length {
            url: self.url(object),
            expected: asked.unwrap_or(limit),
        })
    }

    /// One try: an error after its part of the patience.
    async fn within<T>(
        &self,
        size: u64,
        asked: impl Future<Output = object_store::Result<T>>,
    ) -> object_store::Result<T> {
        let limit = self.patience.one(size);
        timeout(limit, asked)
            .await
            .unwrap_or_else(|_| Err(refusal::silence(limit)))
    }
}

impl Objects for Bucket {
    fn url(&self, object: &Object) -> String {
        format!("{}/{object}", self.url)
    }

    fn place(&self) -> String {
        self.url.clone()
    }

    fn at_once(&self) -> usize {
        AT_ONCE
    }

    fn prepare(&self) -> Result<(), ObjectError> {
        Ok(())
    }

    fn size(&self, object: &Object) -> Result<Option<u64>, ObjectError> {
        let asked = self.ask("ask for", object, 0, |path| async move {
            Ok(self.within(0, self.store.head(&path)).await?.size)
        });
        unless_missing(asked)
    }

    fn get(&self, object: &Object, limit: u64) -> Result<Option<Vec<u8>>, ObjectError> {
        unless_missing(self.fetch(object, None, limit))
    }

    fn read(&self, object: &Object, range: Range<u64>) -> Result<Vec<u8>, ObjectError> {
        let size = range.end - range.start;
        self.fetch(object, Some(range), size)
    }

    fn put(&self, object: &Object, bytes: Vec<u8>) -> Result<Put, ObjectError> {
        let size = length_of(&bytes);
        let bytes = PutPayload::from(bytes);
        let mode = match object {
            // Whoever else puts it puts the same.
            Object::Pack(_) => PutMode::Overwrite,
            Object::Snapshot(_) | Object::Name(_) => PutMode::Create,
        };
        self.ask("write", object, size, |path| {
            let (bytes, mode) = (bytes.clone(), mode.clone());
            async move {
                let put = self.store.put_opts(&path, bytes, mode.into());
                match self.within(size, put).await {
                    Ok(_) => Ok(Put::New),
                    Err(object_store::Error::AlreadyExists { .. }) => {
                        // Or somebody is just putting it, and may yet fail: then that it is not there is tried again.
                        match self.within(0, self.store.head(&path)).await {
                            Ok(_) => Ok(Put::WasThere),
                            Err(object_store::Error::NotFound { .. }) => Err(refusal::contended()),
                            Err(error) => Err(error),
                        }
                    }
                    Err(error) => Err(error),
                }
            }
        })
    }

    fn remove(&self, object: &Object) -> Result<(), ObjectError> {
        let removed = self.ask("remove", object, 0, |path| async move {
            self.within(0, self.store.delete(&path)).await
        });
        unless_missing(removed).map(drop)
    }
}

/// All of an answer, which says that it has so many bytes. No more is taken than that.
async fn body(result: GetResult, size: u64) -> object_store::Result<Vec<u8>> {
    let mut stream = result.into_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.try_next().await? {
        bytes.extend_from_slice(&piece);
        if length_of(&bytes) > size {
            break;
        }
    }
    match length_of(&bytes) {
        found if found == size => Ok(bytes),
        found => Err(refusal::length(found, size)),
    }
}

fn length_of(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("sizes fit")
}

/// `None` for what is not there.
fn unless_missing<T>(asked: Result<T, ObjectError>) -> Result<Option<T>, ObjectError> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(ObjectError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The store that has a bucket, with what the environment says of it. Nothing is asked of it yet.
fn connect(scheme: Scheme, bucket: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    // When to try again and how long to wait is decided here.
    let retry = RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    };
    // The builders have no trait in common.
    macro_rules! build {
        ($builder:ident, $key:ident, $with_name:ident) => {
            Arc::new(
                $builder::from_env()
                    .with_config($key::Client(ClientConfigKey::ConnectTimeout), CONNECT)
                    .with_config($key::Client(ClientConfigKey::Timeout), LONGEST)
                    .$with_name(bucket)
                    .with_retry(retry)
                    .build()?,
            )
        };
    }
    Ok(match scheme {
        Scheme::S3 => build!(AmazonS3Builder, AmazonS3ConfigKey, with_bucket_name),
        Scheme::Google => build!(GoogleCloudStorageBuilder, GoogleConfigKey, with_bucket_name),
        Scheme::Azure => build!(MicrosoftAzureBuilder, AzureConfigKey, with_container_name),
    })
}
