//! What a real agent does for its callers.

mod copies;
mod harness;
mod sessions;
mod waking;
