//! A file or a tree as a stream of bytes, of any size and in constant memory: packed on one side, unpacked on the other.
//!
//! ```text
//!   pack("/srv/www") ─▶ directory "www" ─▶ file "index" ─▶ data… ─▶ file ends ─▶ … ─▶ leave ─▶ unpack("/tmp")
//! ```
//!
//! The host and the agent in a guest both do both. Neither trusts the other: what comes is names of one part each, put
//! below a directory that is held open, and no link is followed on the way. A file is written beside its place and
//! renamed into it, so under its own name it is whole or not there.
//!
//! What is kept: bytes, holes, permissions, times of change to the nanosecond, targets of links; owners where
//! [asked for](Owner::Kept). A hard link becomes a file of its own. Not kept: times of access, extended attributes.
//! Sockets, FIFOs and devices stay behind, and are [told](Tally::skipped).
//!
//! `docs/agent-protocol.md` has the stream byte for byte.
#![forbid(unsafe_code)]

mod beside;
mod destination;
mod pack;
mod record;
mod records;
mod tally;
mod unpack;

pub use destination::DestinationError;
pub use pack::{PackError, pack};
pub use record::{InvalidName, MAX_DATA, MAX_NAME, MAX_TARGET, Meta, Name, Record, Special};
pub use records::{Records, StreamError, Writer};
pub use tally::Tally;
pub use unpack::{Owner, UnpackError, unpack};

/// A tree that is deeper than this is refused: a descriptor is held for each directory on the way down.
pub const MAX_DEPTH: usize = 256;
