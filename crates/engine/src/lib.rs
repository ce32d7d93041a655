#![doc = include_str!("../README.md")]
// Unsafe code is in `sys.rs` alone; `forbid` would not let it.
#![deny(unsafe_code)]

pub mod agent;
mod cut_off;
mod drives;
mod engine;
pub mod host;
pub mod images;
mod pager;
pub mod programs;
#[expect(
    unsafe_code,
    reason = "a namespace and an ioctl; the file opens with its safety model"
)]
mod sys;
mod taps;
pub mod vm;

pub use cut_off::CutOffError;
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
