//! Typed client for Firecracker's API, and Firecracker as a process.
//!
//! ```text
//!   Launch ── spawn ──▶ Process ── ready ──▶ Client ── PUT /boot-source … ──▶ Firecracker
//!                          │                                                    │
//!                       Pidfd: died? kill                     serial ──▶ Fifo ──▶ Ring on disk
//! ```
//!
//! [`Client`] has one method for each endpoint of Firecracker 1.12 to 1.17-dev, with the bodies in
//! [`model`]. [`Launch`] and [`Process`] run Firecracker itself: they know without polling that its API
//! answers and that it died. [`Fifo`] and [`Ring`] keep its output on disk, with a bound. The crate works
//! alone: nothing in it needs the rest of Rekindle.
// Unsafe code is in `sys.rs` alone; `forbid` would not let it.
#![deny(unsafe_code)]

mod client;
mod fifo;
pub mod metrics;
pub mod model;
mod process;

mod ring;
#[expect(
    unsafe_code,
    reason = "a child's signal mask; the file opens with its safety model"
)]
mod sys;
mod version;

pub use client::{CallError, Client, Method, RawResponse};
pub use fifo::{Fifo, FifoError, drain, drain_rest};
pub use process::{
    AdoptError, Exit, IdentifyError, Jailer, Launch, Pidfd, Process, ProcessId, ReadyError,
    SpawnError, arguments_of, find_by_id,
};
pub use ring::{Ring, tail};
pub use version::{Feature, ParseVersionError, Version};
