#![doc = include_str!("../README.md")]
// Unsafe code is in `sys.rs` alone; `forbid` would not let it.
#![deny(unsafe_code)]

pub mod agent;
pub mod bucket;
mod drives;
mod engine;
pub mod host;
pub mod images;
pub mod jail;
pub mod net;
mod pager;
pub mod programs;
pub mod remote;
pub mod vm;

pub use drives::DriveError;
pub use engine::{Engine, EngineError};
pub use net::{NetError, TapError};
pub use pager::PagerError;
pub use rekindle_store as store;
pub use vm::Vm;

/// The project's README, so that its Rust blocks compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
