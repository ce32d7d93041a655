#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod drives;
mod engine;
pub mod host;
mod pager;
pub mod programs;
mod taps;
pub mod vm;

pub use drives::DriveError;
pub use engine::{Engine, EngineError};
pub use pager::PagerError;
pub use rekindle_store as store;
pub use taps::TapError;
pub use vm::Vm;

/// The project's README, so that its Rust blocks compile.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
