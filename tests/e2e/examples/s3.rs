//! Runs a command beside an object store of its own, which takes 20 ms more than it needs for each request.
//!
//! ```text
//! cargo run --release -p rekindle-e2e --example s3 -- target/release/rekindle bench remote s3://snapshots/bench
//! ```
//!
//! The command's environment tells where the store is; its bucket is called `snapshots`, and is gone afterwards.

use std::env::args_os;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context as _;
use rekindle_e2e::s3::{Line, S3};

const LATENCY: Duration = Duration::from_millis(20);

fn main() -> anyhow::Result<ExitCode> {
    let mut words = args_os().skip(1);
    let program = words.next().context("which command?")?;
    // Beside the build, since it may become large.
    let here = std::env::current_exe()?;
    let place = here.with_file_name(format!("s3-{}", std::process::id()));
    let s3 = S3::start(&place, Line::of(LATENCY))?;
    let status = s3.known_to(Command::new(program).args(words)).status();
    eprintln!(
        "the store had {} requests, which read {} bytes of packs",
        s3.line().requests(),
        s3.line().packs_read()
    );
    drop(s3);
    std::fs::remove_dir_all(&place)?;
    Ok(match status?.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
