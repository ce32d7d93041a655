//! Firecracker snapshots on disk: layout, manifest, publish, verify, remove.
//!
//! ```text
//! Store::begin ──► Draft in tmp/<id>  ──publish──►  Snapshot in snapshots/<id>  ──remove──► gone
//!                    │ exclusive lock                 │ shared locks: Lease
//!                    └ dropped or dead: collected     └ present means whole; only its working set changes
//! ```
//!
//! A snapshot is a directory that explains itself: see [`manifest`] for what it says, [`pages`] for how
//! its memory is described page by page, and `docs/snapshot-format.md` for the bytes. A chain of Diff
//! snapshots is read through a [`flatten::Flat`], which says for each page which layer has it. What its guests
//! touched first is in its [`working_set`], which is a hint and no part of what makes it whole. To travel it is
//! [`packed`].
//!
//! Locks are `flock` on directories, so they end with the process that holds them, however it ends.
#![forbid(unsafe_code)]

pub mod causes;
pub mod collect;
pub mod digest;
pub mod disk;
pub mod file;
pub mod flatten;
pub mod image;
mod installation;
pub mod layout;
pub mod manifest;
pub mod names;
pub mod packed;
pub mod pages;
pub mod publish;
mod seal;
pub mod snapshot;
mod sparse;
pub mod store;
pub mod unit;
pub mod verify;
pub mod working_set;

pub use installation::InstallationId;
pub use layout::{Root, SnapshotId, SnapshotName, VmName};
pub use manifest::{Manifest, ManifestParts};
pub use publish::Draft;
pub use snapshot::{Lease, Snapshot};
pub use store::Store;
pub use working_set::WorkingSet;
