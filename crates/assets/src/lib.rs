//! The parts a microVM needs: Firecracker, guest kernel, base image; fetched, verified, built.
//!
//! ```text
//!   upstream release ─┐                        ┌─> Firecracker { firecracker, jailer }
//!   wheel from PyPI ──┴─ hash is the pin's ──┐ │
//!                                            ├─┼─> Guest { vmlinux, initrd }
//!   linux-image-cloud-amd64 ─┐               │ │
//!   busybox-static ──────────┼─ apt verifies ┘ ├─> a base image
//!   linux-image-amd64 ───────┘                 └─> Lab { kernel, initrd, qemu }
//! ```
//!
//! Each is made once and kept in a cache directory, with the hash of every file; every use
//! compares the hashes again. Several processes can share a cache. What is there and right costs
//! reading it once; what is damaged is made again.
//!
//! What needs a network or root says so through [`Event`]s before it does it.

#![forbid(unsafe_code)]

mod agent;
mod cache;
mod debian;
mod event;
mod fetch;
mod firecracker;
mod guest;
mod hash;
mod image;
mod initrd;
mod kernel;
pub mod lab;
mod layer;
mod modules;
pub mod pins;
mod registry;
mod suite;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use cache::{Built, Cache, Set, Unusable};

pub use event::{Event, Report};
pub use firecracker::{FIRECRACKER_VARIABLE, Firecracker};
pub use guest::{AGENT_ALONE, BOOT_ARGS, Guest};
pub use hash::Sha256;
pub use lab::Lab;
pub use layer::{LAYER_MIB, layer};

/// A cache directory of assets, and someone to tell about what happens.
pub struct Assets {
    cache: Cache,
    report: Report,
}

impl Assets {
    /// Uses `cache`, which need not exist yet, and tells `report` what happens.
    ///
    /// # Errors
    /// When the path cannot be made absolute, as there is no current directory.
    pub fn new(cache: &Path, report: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Result<Self> {
        let root = std::path::absolute(cache)
            .with_context(|| format!("cannot use {} as the cache", cache.display()))?;
        Ok(Self {
            cache: Cache::new(root),
            report: Box::new(report),
        })
    }

    fn report(&self, event: &Event<'_>) {
        (self.report)(event);
    }

    /// Tells that a file of a set is in place.
    fn announce(&self, set: &Set, what: &str, file: &str) -> Result<()> {
        self.report(&Event::Ready {
            what,
            path: &set.path(file),
            sha256: set.hash(file)?,
            source: &set.record.source,
        });
        Ok(())
    }

    /// The set of that name and recipe, verified; built by `build` into an empty directory first
    /// if it is not there or damaged.
    fn ensure(
        &self,
        name: &str,
        recipe: Sha256,
        build: impl FnOnce(&Path) -> Result<Built>,
    ) -> Result<Set> {
        if let Ok(set) = self.cache.find(name, recipe) {
            return Ok(set);
        }
        let _lock = self.cache.lock()?;
        // Someone else may have built it, or been in the middle of replacing it, meanwhile.
        match self.cache.find(name, recipe) {
            Ok(set) => return Ok(set),
            Err(Unusable::Absent) => {}
            Err(Unusable::Damaged(why)) => self.report(&Event::Damaged {
                what: name,
                why: &why,
            }),
        }
        let scratch = self.cache.scratch()?;
        let built = build(scratch.path()).with_context(|| format!("cannot make {name}"))?;
        self.cache.install(name, recipe, built, scratch)
    }
}

impl std::fmt::Debug for Assets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assets").finish_non_exhaustive()
    }
}

/// Makes `path` with everything above it.
fn create_directory(path: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}
