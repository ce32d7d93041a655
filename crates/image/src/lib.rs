//! Root images for microVMs: from directories, archives and OCI images, as ext4 file systems with a name.
//!
//! ```text
//! dir:PATH ──────────────┐
//! tar:FILE ──────────────┤                                  images/<digest>.ext4
//! oci-layout:DIR ────────┼─ Layers ─> Tree, Spool ─ ext4 ─>   ▲
//! docker-archive:FILE ───┤                                  images/<name>.json: digest, config
//! docker:// ─ Pull ─ layout                                   └ Program: what to run
//! ```
//!
//! Everything is read by this program itself: no archive is unpacked into the host's file system, nothing is mounted,
//! and no program is run. So owners, device nodes and names of a stranger's archive are numbers and bytes in an image
//! and nothing else, and whoever may write the state directory can build any image, root or not.
#![forbid(unsafe_code)]

mod archive;
mod build;
mod decompress;
mod directory;
mod ext4;
mod limits;
mod oci;
mod program;
mod sha256;
mod source;
mod sparse;
mod spool;
mod tree;

pub use archive::ArchiveError;
pub use build::{Build, BuildError, Input};
pub use directory::{DirectoryError, Owner};
pub use ext4::Ext4Error;
pub use limits::Limits;
pub use oci::OciError;
pub use oci::registry::{
    Credentials, CredentialsError, InvalidReference, Progress, Pull, Reference, RegistryError,
    Unauthorised,
};
pub use program::{NothingToRun, Program, Wishes};
pub use rekindle_store as store;
pub use sha256::{InvalidSha256, Sha256};
pub use source::{Source, SourceError};
pub use tree::TreeError;
