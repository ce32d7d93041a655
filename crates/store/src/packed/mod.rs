//! The packed form of a snapshot, for travelling and for storing: compressed chunks in packs, and an index.
//!
//! ```text
//! snapshot ──plan──► chunks of up to 64 KiB ──BLAKE3, zstd──► packs of about 8 MiB, named by their BLAKE3
//!   memory             the working set, in order of touch        (chunks that are there already are left out)
//!   disks              64 KiB of neighbours, at least half full
//!                      the rest, page by page
//!          ──────────► index: manifest, state, working set; which pages are in which chunk, where each chunk is
//! ```
//!
//! Whoever has the index can have any page with one more read, and prove it: a chunk that does not have its BLAKE3 is
//! nobody's. [`Repository`] moves it, by way of a few verbs ([`Objects`]);
//! nothing here speaks to a network. Bytes: `docs/packed-format.md`.

mod cache;
mod chunk;
mod directory;
mod fetch;
mod index;
mod objects;
mod outline;
mod pack;
mod plan;
mod pull;
mod push;
mod repository;
mod unpack;

pub use cache::Cache;
pub use chunk::{ChunkError, Codec, decode};
pub use directory::Directory;
pub use fetch::{Fetch, FetchError, Fetched, Run, Take};
pub use index::{Chunk, Extent, Index, IndexError, MAX_INDEX, PackRef, Place, Stream};
pub use objects::{Object, ObjectError, Objects, Put};
pub use outline::{Outline, OutlineError};
pub use pack::{Known, KnownChunks, Pack, PackError, pack};
pub use pull::{PullError, Pulled};
pub use push::{PushError, Pushed, Stopped};
pub use repository::{IndexFault, Progress, Report, Repository};
pub use unpack::{Import, ImportError};

/// How many pages a chunk has at the most.
///
/// 64 KiB: `docs/decisions/0021-chunks-of-64-kib-by-zstd.md`.
pub const CHUNK_PAGES: u64 = 16;

/// The most that a reader takes for a chunk: 1 MiB, so that another size can be chosen later.
pub const MAX_CHUNK_PAGES: u64 = 256;

/// A pack is closed when it has this many bytes or more.
pub const PACK_SIZE: u64 = 8 << 20;

/// The largest pack that is read, in bytes.
pub const MAX_PACK: u64 = 32 << 20;
