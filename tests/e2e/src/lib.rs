//! Stories with a real Firecracker, told through the program `rekindle` as a person would use it.
//!
//! ```text
//!   story ─▶ Rekindle ─ does("pause web") ─▶ the program, in a state directory of its own
//!              │
//!              └─ leaves_nothing() ─▶ every VM and snapshot removed, and nothing of them is left on the host
//! ```
//!
//! `REKINDLE_BIN` names the program; without it, it is the one that cargo built beside the test
//! (`cargo build -p rekindle` makes it). `REKINDLE_FIRECRACKER` names Firecracker.
#![forbid(unsafe_code)]

mod listener;
mod network;
pub mod oci;
mod program;
pub mod registry;
mod rekindle;
pub mod s3;
mod said;
mod taps;

pub use listener::{Listener, is_drained, sequence};
pub use network::{HOST, HOST_V6, INTERNET, INTERNET_V6, METADATA, Networks};
pub use rekindle::{Rekindle, Role, end_all, finish, wait_for};
pub use said::Said;
pub use taps::Taps;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::ensure;

/// How long anything that ought to happen at once may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Waits until something is so that nothing announces.
///
/// # Errors
/// When it is not so after [`SOON`], or cannot be told.
pub fn until(what: &str, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not so: {what}");
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
